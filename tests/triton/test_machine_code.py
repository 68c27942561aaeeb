"""Every launch of the Triton backend compiles, for GPUs that are not here, to machine code that may ship.

Shared memory under the chip's limit, no spills, matrix instructions and 16-byte accesses where x is multiplied. The
table is printed: `TRITON_INTERPRET=0 pytest -s -m slow` of this file, or `python -m tests.triton.machine_code`.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from hra_kernels.backends import tuning
from tests.triton import machine_code
from tests.triton import releases as triton_releases

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
