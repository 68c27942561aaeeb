"""The CUDA emulation tested: planted bugs of synchronization and of arithmetic must show, and right kernels must pass.

Small kernels (emulation_probes.cu) show each thing that the emulation models. Then the kernels themselves are built
with one line changed, and the very checks of test_emulated.py must fail. The right ones also run under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from hra_kernels.backends import tuning
from tests import native
from tests.cuda import emulation
from tests.cuda.test_emulated import check_every_schedule

HERE = Path(__file__).resolve().parent
COMPILER = ["c++", "-std=c++17", "-O1", "-DHRA_EMULATION", f"-I{HERE}", "-xc++"]
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
    csrc = native.ROOT / "csrc"
    sources = [HERE / "emulation_probes.cu", *sorted((HERE / "emulation").glob("*.cpp"))]
    program = folder / "emulation_probes"
    subprocess.run([*COMPILER, *options, f"-I{csrc}", *map(str, sources), "-o", str(program)], check=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_right_probe_passes_under_sanitizers(sanitized_probes, name):
    for seed in emulation.SEEDS:
        done = probe(sanitized_probes, name, False, seed)
        assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


@pytest.mark.slow
def test_shared_overrun_is_located_by_the_sanitizer(sanitized_probes):
    done = probe(sanitized_probes, "shared_overrun", True, 0)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "shared_overrun" in done.stderr


@pytest.mark.slow
def test_kernels_under_sanitizers():
    """The kernels' own tests, in a process of their own, on a module built with both sanitizers."""
    tests = "every_schedule or every_slice or any_number or outside or alone_is_the_same"
    module = f"--emulated-module={emulation.build('emulation-sanitized', HRA_SANITIZE='ON')}"
    pytest_quietly = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    native.run_under_sanitizers(*pytest_quietly, module, "tests/cuda/test_emulated.py", "-k", tests)


# --- the kernels with one line changed --------------------------------------------------------------------------------

SHAPE = (104, 1000, 8, None)


def check_reflections(module):
    """More tiles than a cluster has places for, in clusters of two blocks."""
    with mock.patch.dict(tuning.SLICES, {key: [(tuning.WIDE, 512)] for key in tuning.SLICES}):
        check_every_schedule(module, emulation.backend(module), SHAPE, torch.bfloat16)


def check_ragged(module):
    """Rows that end within a vector, and a last tile that has fewer."""
    with mock.patch.dict(tuning.SLICES, {key: [(tuning.WIDE, 512)] for key in tuning.SLICES}):
        check_every_schedule(module, emulation.backend(module), (33, 301, 13, None), torch.float16)


NEVER_SENT = "a message that is never sent"

# (file that is changed, unit that is compiled, what stands there, what is planted, the check that must fail)
MUTANTS = {
    "cluster writes before it has met": (
        "cluster_fwd.cu", "cluster_fwd.cu", "HRA_CLUSTER_BARRIER();", ";", check_reflections,
    ),
    "backward writes before the cluster has met": (
        "cluster_bwd.cu", "cluster_bwd.cu", "HRA_CLUSTER_BARRIER();", ";", check_reflections,
    ),
    "one copy of the exchange": (
        "cluster.h", "cluster_fwd.cu", "slots + copy * cluster * kParts + lane", "slots + lane", check_reflections,
    ),
    "one copy of the warps' parts": ("cluster.h", "cluster_fwd.cu", "parts[copy]", "parts[0]", check_reflections),
    "parts added up before they are there": (
        "cluster.h", "cluster_bwd.cu", "__syncthreads();\n    const int n", "const int n", check_reflections,
    ),
    "messages read before they are there": (
        "cluster.h", "cluster_bwd.cu", "mailbox_wait(mailbox, turn / 2 % 2);", "", check_reflections,
    ),
    NEVER_SENT: (
        "cluster.h", "cluster_fwd.cu", "send_in_cluster(", "if (to != 0 || rank != 1) send_in_cluster(",
        check_reflections,
    ),
    "the other phase awaited": ("cluster.h", "cluster_fwd.cu", "turn / 2 % 2)", "turn % 2)", check_reflections),
    "x read before it is there": (
        "cluster_bwd.cu", "cluster_bwd.cu", "cp_async_wait<0>();", "", check_reflections,
    ),
    "v's columns as they lie": (
        "cluster.h", "cluster_fwd.cu", "return fragment_column(column + at);", "return column + at;",
        check_reflections,
    ),
    "m as one term": (
        "fragments.h", "cluster_bwd.cu", "mma_terms<2>(product[n]", "mma_terms<0>(product[n]", check_reflections,
    ),
    "m's two tiles the same": (
        "fragments.h", "cluster_fwd.cu", "lane % 16, lane / 16 * 8)", "lane % 16, 0)", check_ragged,
    ),
    "m's first term for all": (
        "fragments.h", "cluster_fwd.cu", "m.at(lane / 8 % 3, lane % 8, 0)", "m.at(0, lane % 8, 0)", check_reflections,
    ),
    "v as one term": ("split.h", "cluster_fwd.cu", "if (i + j <= kOrder)", "if (j == 0)", check_ragged),
    "float16 as one term": ("split.h", "cluster_fwd.cu", "kTermsOf<fp16> = 2", "kTermsOf<fp16> = 1", check_ragged),
    "m transposed": (
        "fragments.h", "cluster_fwd.cu", "return m.transpose ? ", "return !m.transpose ? ", check_reflections,
    ),
    "last column masked": (
        "fragments.h", "cluster_fwd.cu", "(rows.columns) - column;", "(rows.columns) - column - 1;", check_ragged,
    ),
    "qm with s's m": (
        "cluster_bwd.cu", "cluster_bwd.cu", "R, !to.m.transpose}", "R, to.m.transpose}", check_reflections,
    ),
    "half of dv": (
        "cluster_bwd.cu", "cluster_bwd.cu", "add_vectors(dv, shared.x, qm_terms, column);", "", check_reflections,
    ),
    "one block adds up all of dm": (
        "cluster_bwd.cu", "cluster_bwd.cu", " && turn % to.cluster == static_cast<int>(rank)", "", check_reflections,
    ),
    "the last cluster's share of dv dropped": (
        "cluster_bwd.cu", "cluster_bwd.cu", "part < to.vector_parts;", "part + 1 < to.vector_parts;",
        check_reflections,
    ),
    "sums of warps added before they are there": (
        "cluster_bwd.cu", "cluster_bwd.cu", "sums[thread_id()] = sum;\n    __syncthreads();",
        "sums[thread_id()] = sum;", check_reflections,
    ),
    "dt transposed": (
        "cluster_bwd.cu", "cluster_bwd.cu", "to.dt[to.transpose ?", "to.dt[!to.transpose ?", check_reflections,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def objects():
    """The object files of the unchanged module, to link a changed one with."""
    emulation.build()
    folder = native.ROOT / "build" / "emulation" / "CMakeFiles" / "_emulated.dir"
    sources = {
        path.name
        for part in ("csrc", "python_bindings", "tests/cuda/emulation")
        for path in (native.ROOT / part).rglob("*.c*")
    }
    return sorted(path for path in folder.rglob("*.o") if path.stem in sources)  # no leftovers of sources now gone


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_planted_bug_breaks_the_checks(objects, tmp_path, bug):
    changed, unit, before, after, checks = MUTANTS[bug]
    csrc = shutil.copytree(native.ROOT / "csrc", tmp_path / "csrc")
    source = (csrc / "cuda" / changed).read_text()
    assert source.count(before) == 1, f"{before!r} is {source.count(before)} times in {changed}"
    (csrc / "cuda" / changed).write_text(source.replace(before, after))
    module = tmp_path / "_emulated.so"
    others = [str(path) for path in objects if path.name != f"{unit}.o"]
    assert len(others) == len(objects) - 1
    options = ["-w", "-fPIC", "-fvisibility=hidden", "-c", str(csrc / "cuda" / unit), "-o", str(tmp_path / "unit.o")]
    subprocess.run([*COMPILER, *options], check=True)
    subprocess.run(["c++", "-shared", str(tmp_path / "unit.o"), *others, "-o", str(module)], check=True)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        checks(emulation.load(module))
    assert bug != NEVER_SENT or "waits at a mailbox" in str(caught.value)  # a hang, on a GPU
