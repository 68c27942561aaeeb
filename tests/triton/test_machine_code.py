"""Every launch of the Triton backend compiles, for GPUs that are not here, to machine code that may ship.

Shared memory under the chip's limit, no spills, matrix instructions and 16-byte accesses where x is multiplied. The
table is printed: `TRITON_INTERPRET=0 pytest -s -m slow` of this file, or `python -m tests.triton.machine_code`.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hra_kernels.backends import tuning
from tests.triton import machine_code
from tests.triton import releases as triton_releases

MOST_BARRIERS = {
    ("reflect_kernel", 8): (2, 10),
    ("reflect_kernel", 32): (2, 2),
    ("backward_rows_kernel", 8): (3,),
    ("backward_rows_kernel", 32): (2,),
    ("backward_columns_kernel", 8): (12,),
}
"""In each steady loop on sm_90 at 8192 x 4096, by rank: counted when the loops were last changed."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="test_processes.py runs this, compiled"),
]


@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_every_launch_compiles_well(target):
    results = machine_code.compile_all([target])
    print(f"\n{machine_code.table(results)}")
    assert results and not [f"{result.launch}: {problem}" for result in results for problem in result.problems()]


@pytest.mark.parametrize("release", triton_releases.RELEASES[1:])
def test_the_gpu_machines_release(release, request):
    """The same for Hopper with the Triton that its machines carry."""
    command = [sys.executable, "-m", "tests.triton.machine_code", "--target", "sm_90"]
    environment = triton_releases.environment(release, request.config.cache)
    done = subprocess.run(command, cwd=triton_releases.ROOT, env=environment, capture_output=True, text=True)
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("release", triton_releases.RELEASES[1:])
def test_the_jit_compiles_every_kind_of_size(release, request):
    environment = triton_releases.environment(release, request.config.cache)
    command = [sys.executable, "-m", "tests.triton.jit"]
    done = subprocess.run(command, cwd=triton_releases.ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 50


@pytest.mark.parametrize("release", triton_releases.RELEASES)
def test_direct_launches_are_those_of_the_jit(release, request):
    environment = triton_releases.environment(release, request.config.cache)
    command = [sys.executable, "-m", "tests.triton.direct"]
    done = subprocess.run(command, cwd=triton_releases.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 50


def test_a_new_batch_size_compiles_nothing():
    """Whatever Triton would specialize on (1, multiples of 16), M is none of it: one kernel serves every M."""

    def heard(M):
        launches = machine_code.launches_of(lambda: machine_code.call_reflect(M, 4096, 8, machine_code.torch.bfloat16))
        return {launch for launch in launches if launch.kernel != "sum_kernel"}  # one block of rows has no sum to make

    small = heard(7)
    assert heard(1) == heard(16) == heard(48) == small
    assert heard(5000) == heard(8192) == heard(8193)


def test_a_fat_tile_is_rejected():
    """The gate sees spills: the same kernel with a tile no register file holds."""
    launch = next(launch for launch in machine_code.launches("sm_90") if launch.kernel == "backward_rows_kernel")
    constants = tuple((name, {"BLOCK_M": 256, "BLOCK_D": 256}.get(name, value)) for name, value in launch.constants)
    fat = machine_code.Launch(launch.kernel, launch.signature, constants, launch.aligned, launch.options)
    assert machine_code.compile_launch(fat, "sm_90").problems()


def test_each_architecture_is_gated_against_its_own_table(monkeypatch):
    """A tile that was tuned for one chip, and fits no other, is launched and judged on that chip alone."""
    key, line = ("reflect", 2, 8), (tuning.WIDE, tuning.WIDE, tuning.LaunchConfig(128, 512, 8, 4))
    tuned = tuning.CONFIGS[tuning.DEFAULT] | {key: [line]}
    monkeypatch.setitem(tuning.CONFIGS, "sm_90", tuned)

    def has_it(target):
        options = [launch for launch in machine_code.launches(target) if ("BLOCK_M", 128) in launch.constants]
        return any(("BLOCK_D", 512) in launch.constants for launch in options)

    assert has_it("sm_90") and not any(has_it(target) for target in machine_code.TARGETS if target != "sm_90")


def compiled(kernel: str, target: str = "sm_90", rank: int = 8, v: str = "", **changed) -> machine_code.Compiled:
    """The launch of `kernel` at 8192 x 4096 in bfloat16, with another v, constants or options where they are given."""
    call = lambda: machine_code.call_reflect(8192, 4096, rank, machine_code.torch.bfloat16)  # noqa: E731
    launch = next(launch for launch in machine_code.launches_of(call, target) if launch.kernel == kernel)
    constants, options = (
        tuple((name, changed.get(name, value)) for name, value in pairs) for pairs in (launch.constants, launch.options)
    )
    signature = tuple((name, v if v and name == "v_ptr" else kind) for name, kind in launch.signature)
    launch = dataclasses.replace(launch, signature=signature, constants=constants, options=options)
    return machine_code.compile_launch(launch, target)


def test_a_pipeline_that_waits_for_all_copies_is_rejected():
    """Two stages, as the backward once had: the next tile is asked for when the last one has been used up."""
    assert not compiled("backward_rows_kernel").problems()
    assert compiled("backward_rows_kernel", num_stages=2).problems() == ["a wait for all copies"]


def test_a_second_sweep_that_loads_x_where_it_is_used_is_rejected(monkeypatch, tmp_path):
    """As it once did: without stages of its own, a loop pipelines only the loads that are multiplied."""
    right = compiled("reflect_kernel")
    assert not right.problems() and len(right.loops) == 2
    planted = edited("for i in tl.range(0, num_d, num_stages=STAGES):", "for i in range(0, num_d):", tmp_path)
    monkeypatch.setattr(machine_code, "triton_kernels", planted)
    wrong = compiled("reflect_kernel")
    assert any("a load that blocks" in problem for problem in wrong.problems())
    assert wrong.barriers[1] > MOST_BARRIERS["reflect_kernel", 8][1] >= right.barriers[1]


def test_v_split_in_the_loop_is_rejected(monkeypatch, tmp_path):
    """`backward_columns_kernel` holds v: it is split before the loop, which reads it from memory never again."""

    def splits(result):
        return [loop.conversions.count("16x128xf32") for loop in result.loops]

    assert splits(compiled("backward_columns_kernel")) == [0]
    anew = "tl.load(v_ptr + v_offsets + 0 * m0, mask_r[:, None] & mask_d[None, :], other=0.0)"
    planted = edited("acc = _combine_rows(qm, v,", f"acc = _combine_rows(qm, {anew},", tmp_path)
    monkeypatch.setattr(machine_code, "triton_kernels", planted)
    assert splits(compiled("backward_columns_kernel"))[0] > 0


@pytest.mark.parametrize("kernel", ["reflect_kernel", "backward_rows_kernel"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_v_split_in_the_sweeps_is_rejected(kernel, target):
    """Beyond 16 columns: as they are up to 16, from v in float32."""
    assert not compiled(kernel, target, rank=32).problems()
    assert "v is split in the loop" in compiled(kernel, target, rank=32, v="*fp32", SPLIT=2).problems()


def test_a_product_of_a_transposed_product_is_rejected(monkeypatch, tmp_path):
    """Wrong numbers on Hopper with Triton 3.4.0 to 3.7.0; `pᵀ q` is the other way round because of it."""
    planted = edited("tl.dot(tl.trans(p), q, acc_dm,", "tl.dot(tl.trans(q), p, acc_dm,", tmp_path)
    assert not compiled("backward_rows_kernel").transposed
    monkeypatch.setattr(machine_code, "triton_kernels", planted)
    assert compiled("backward_rows_kernel").transposed == 1


@pytest.mark.parametrize("kernel, rank", MOST_BARRIERS)
def test_barriers(kernel, rank):
    found, most = compiled(kernel, rank=rank).barriers, MOST_BARRIERS[kernel, rank]
    assert len(found) == len(most)
    assert all(count <= limit for count, limit in zip(found, most, strict=True)), found


def edited(old: str, new: str, directory: Path):
    """The module of kernels with one line changed."""
    source = Path(machine_code.triton_kernels.__file__).read_text()
    assert source.count(old) == 1, old
    path = directory / "edited_kernels.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
