"""The CUDA emulation tested: planted bugs of synchronization and of arithmetic must show, and right kernels must pass.

Small kernels (emulation_probes.cu) show each thing that the emulation models. Then the kernels themselves are built
with one line changed, and the very checks of test_cuda_emulated.py must fail. The right ones also run under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from hra_kernels import reference
from hra_kernels.backends import tuning
from hra_kernels.backends.cuda import CudaBackend
from tests.cuda import emulation
from tests.cuda.test_emulated import check_every_schedule

HERE = Path(__file__).resolve().parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]

# what the planted bug of each probe turns into: a wrong result, or a report that holds these words
PROBES = {
    "missing_barrier": "wrong",
    "missing_trailing_barrier": "wrong",
    "missing_warp_sync": "wrong",
    "wait_off_by_one": "wrong",
    "copy_read_before_barrier": "wrong",
    "unwritten_shared": "wrong",
    "fragments": "wrong",
    "cluster_single_copy": "wrong",
    "copy_never_waited_for": "ended with cp.async copies in flight",
    "misaligned_copy": "not 16-byte aligned",
    "exited_lane": "ended while its warp waits for it at __shfl_xor_sync",
    "divergent_barrier": "while others are at __syncthreads",
    "barrier_after_exit": "ended while its block waits for it",
    "shared_overrun": "wrote past its 4096 bytes of shared memory",
    "cluster_not_met": "before the cluster has met",
    "cluster_ended": "of a block that has ended",
    "mailbox_not_armed": "waits at a mailbox",
    "mailbox_overfilled": "more bytes than a mailbox expects",
}


def compile_probes(folder, options):
    if shutil.which("c++") is None:
        pytest.skip("the CUDA emulation needs a C++ compiler to be built")
    csrc = emulation.ROOT / "csrc"
    sources = [HERE / "emulation_probes.cu", *sorted((HERE / "emulation").glob("*.cpp"))]
    program = folder / "emulation_probes"
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-DHRA_EMULATION",
        f"-I{csrc}",
        f"-I{HERE}",
        *options,
        "-x",
        "c++",
        *map(str, sources),
    ]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    return compile_probes(tmp_path_factory.mktemp("probes"), [])


@pytest.fixture(scope="module")
def sanitized_probes(tmp_path_factory):
    return compile_probes(tmp_path_factory.mktemp("sanitized_probes"), SANITIZERS)


def probe(program, name, planted, seed):
    return subprocess.run([program, name, str(int(planted)), str(seed)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", PROBES)
def test_right_probe_passes(probes, name):
    for seed in emulation.SEEDS:
        assert probe(probes, name, False, seed).stdout == "ok\n"


@pytest.mark.parametrize("name", PROBES)
def test_planted_probe_is_caught(probes, name):
    for seed in emulation.SEEDS:
        assert PROBES[name] in probe(probes, name, True, seed).stdout


@pytest.mark.parametrize("name", PROBES)
def test_right_probe_passes_under_sanitizers(sanitized_probes, name):
    for seed in emulation.SEEDS:
        done = probe(sanitized_probes, name, False, seed)
        assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_shared_overrun_is_located_by_the_sanitizer(sanitized_probes):
    done = probe(sanitized_probes, "shared_overrun", True, 0)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "shared_overrun" in done.stderr


@pytest.mark.slow
def test_kernels_under_sanitizers():
    """The kernels' own tests, in a process of their own, on a module built with both sanitizers."""
    runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no libasan.so to preload")
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "HRA_EMULATED_MODULE": str(emulation.build(sanitize=True)),
    }
    tests = "every_schedule or many_layers or outside or alone_is_the_same or wide"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/cuda/test_emulated.py",
        "-k",
        tests,
    ]
    done = subprocess.run(command, cwd=emulation.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --- the kernels with one line changed --------------------------------------------------------------------------------

SWEEP, CLUSTER = 80, 90
ALIGNED, RAGGED, BLOCKS = (70, 264, 8, None), (33, 131, 3, None), (104, 1000, 8, None)
BF16, FP32 = torch.bfloat16, torch.float32


def check(shape, dtype, capability):
    def run(native):
        with mock.patch.dict(tuning.SLICES, {key: [(tuning.WIDE, 512)] for key in tuning.SLICES}):
            check_every_schedule(native, CudaBackend(native, "cpu"), shape, dtype, capability)

    return run


def check_factor(native):
    backend = CudaBackend(native, "cpu")
    u = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for apply_gs in (False, True):
        v, t = backend.wy_factor(u, apply_gs)
        exact_v, exact_t = reference.wy_factor(u, apply_gs)
        torch.testing.assert_close(v, exact_v, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(t, exact_t, rtol=1e-6, atol=1e-7)
        dv, dt = torch.randn(6, 40), torch.randn(6, 6)
        exact_du = reference.wy_factor_bwd(dv, dt, u, v, t, apply_gs)
        torch.testing.assert_close(backend.wy_factor_bwd(dv, dt, u, v, t, apply_gs), exact_du, rtol=1e-5, atol=1e-6)


# (file that is changed, unit that is compiled, what stands there, what is planted, the check that must fail)
MUTANTS = {
    "sweep without its barrier": (
        "sweep.h", "sweep_fwd.cu", "cp_async_wait<kStages - 2>();\n      __syncthreads();",
        "cp_async_wait<kStages - 2>();", check(ALIGNED, BF16, SWEEP),
    ),
    "sweep waits for one group too few": (
        "sweep.h", "sweep_fwd.cu", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()",
        check(ALIGNED, BF16, SWEEP),
    ),
    "sum over warps without its barrier": (
        "sweep.h", "sweep_fwd.cu", "here[group * kRows * kRank];\n    }\n    __syncthreads();",
        "here[group * kRows * kRank];\n    }", check(ALIGNED, BF16, SWEEP),
    ),
    "next coefficients stored over this tile's": (
        "sweep_bwd.cu", "sweep_bwd.cu", "tile * kRows, column0 + column);\n    }\n    __syncthreads();",
        "tile * kRows, column0 + column);\n    }", check(ALIGNED, BF16, SWEEP),
    ),
    "cluster writes before it has met": (
        "cluster_fwd.cu", "cluster_fwd.cu", "HRA_CLUSTER_BARRIER();", ";", check(BLOCKS, BF16, CLUSTER),
    ),
    "one copy of the exchange": (
        "cluster.h", "cluster_fwd.cu", "slots + copy * cluster * kParts + lane", "slots + lane",
        check(BLOCKS, BF16, CLUSTER),
    ),
    "one copy of the warps' parts": (
        "cluster.h", "cluster_fwd.cu", "parts[copy]", "parts[0]", check(BLOCKS, BF16, CLUSTER),
    ),
    "parts added up before they are there": (
        "cluster.h", "cluster_bwd.cu", "__syncthreads();\n    const int n", "const int n",
        check(BLOCKS, BF16, CLUSTER),
    ),
    "messages read before they are there": (
        "cluster.h", "cluster_bwd.cu", "mailbox_wait(mailbox, turn / 2 % 2);", "", check(BLOCKS, BF16, CLUSTER),
    ),
    "the other phase awaited": (
        "cluster.h", "cluster_fwd.cu", "turn / 2 % 2)", "turn % 2)", check(BLOCKS, BF16, CLUSTER),
    ),
    "x read before it is there": (
        "cluster_bwd.cu", "cluster_bwd.cu", "cp_async_wait<0>();", "", check(BLOCKS, BF16, CLUSTER),
    ),
    "v's columns as they lie": (
        "cluster.h", "cluster_fwd.cu", "return fragment_column(column + at);", "return column + at;",
        check(BLOCKS, BF16, CLUSTER),
    ),
    "m as one term": (
        "fragments.h", "cluster_bwd.cu", "mma_terms<2>(product[n]", "mma_terms<0>(product[n]",
        check(BLOCKS, BF16, CLUSTER),
    ),
    "float32 without its third term": (
        "split.h", "sweep_fwd.cu", "kX = 3, kV = 3, kOrder = 2", "kX = 3, kV = 3, kOrder = 1",
        check(ALIGNED, FP32, SWEEP),
    ),
    "m transposed": (
        "reflect.h", "sweep_fwd.cu", "m.transpose ? static_cast", "!m.transpose ? static_cast",
        check(ALIGNED, BF16, SWEEP),
    ),
    "last column masked": (
        "tiles.h", "sweep_fwd.cu", "column0 - column;\n    int count", "column0 - column - 1;\n    int count",
        check(RAGGED, BF16, SWEEP),
    ),
    "qm with s's m": (
        "sweep_bwd.cu", "sweep_bwd.cu", "R, !to.m.transpose};", "R, to.m.transpose};", check(ALIGNED, BF16, SWEEP),
    ),
    "half of dv": (
        "reflect_bwd.h", "sweep_bwd.cu", "accumulate_vectors(dv, x, qm, column);", "", check(ALIGNED, BF16, SWEEP),
    ),
    "half of a cluster's dv": (
        "cluster_bwd.cu", "cluster_bwd.cu", "add_vectors(dv, shared.x, qm_terms, column);", "",
        check(BLOCKS, BF16, CLUSTER),
    ),
    "factor's corner with the wrong sign": (
        "wy_device.h", "wy.cu", "-scale * phi * (aa", "scale * phi * (aa", check_factor,
    ),
    "Gram's derivative dropped": (
        "wy.cu", "wy.cu", "first += s[r * R + k] * v;", "", check_factor,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def objects():
    """The object files of the unchanged module, to link a changed one with."""
    emulation.build()
    folder = emulation.ROOT / "build" / "emulation" / "CMakeFiles" / "_emulated.dir"
    sources = {
        path.name
        for part in ("csrc", "python_bindings", "tests/cuda/emulation")
        for path in (emulation.ROOT / part).rglob("*.c*")
    }
    return sorted(path for path in folder.rglob("*.o") if path.stem in sources)  # no leftovers of sources now gone


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_planted_bug_breaks_the_checks(objects, tmp_path, bug):
    changed, unit, before, after, checks = MUTANTS[bug]
    csrc = shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc")
    source = (csrc / "cuda" / changed).read_text()
    assert source.count(before) == 1, f"{before!r} is {source.count(before)} times in {changed}"
    (csrc / "cuda" / changed).write_text(source.replace(before, after))
    module = tmp_path / "_emulated.so"
    others = [str(path) for path in objects if path.name != f"{unit}.o"]
    assert len(others) == len(objects) - 1
    compiler = ["c++", "-std=c++17", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-DHRA_EMULATION", f"-I{HERE}"]
    subprocess.run([*compiler, "-xc++", "-c", str(csrc / "cuda" / unit), "-o", str(tmp_path / "unit.o")], check=True)
    subprocess.run(["c++", "-shared", str(tmp_path / "unit.o"), *others, "-o", str(module)], check=True)
    with pytest.raises((AssertionError, RuntimeError)):
        checks(emulation.load(module))
