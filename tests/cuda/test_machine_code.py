"""What nvcc makes of the CUDA kernels: no spills, matrix instructions and 16-byte accesses, memory that fits."""

import shutil

import pytest
import torch

from tests.cuda import machine_code
from tests.cuda.machine_code import SHARED_LIMIT, SLICES, WIDTHS

pytestmark = pytest.mark.slow

KERNELS = {"cluster_fwd": 12, "cluster_bwd": 8, "reduce": 1}
"""How often each is instantiated: two dtypes, two ranks, three slices or two."""


@pytest.fixture(scope="module")
def kernels():
    reason = machine_code.why_unavailable()
    if reason:
        pytest.skip(f"the CUDA kernels are not compiled: {reason}")
    found = machine_code.kernels(machine_code.compiled_module())
    print()
    for kernel in found:
        print(kernel)
    return found


def named(kernels, part):
    found = [kernel for kernel in kernels if part in kernel.name]
    assert len(found) == KERNELS[part]
    return found


def test_no_local_memory(kernels):
    assert len(kernels) == sum(KERNELS.values())
    assert not [str(kernel) for kernel in kernels if kernel.stack or kernel.counts["local"]]


@pytest.mark.parametrize("part", ["cluster_fwd", "cluster_bwd"])
def test_instructions(kernels, part):
    for kernel in named(kernels, part):
        for wanted in ("mma", "ldmatrix", "load16", "store16", "cluster", "send16"):
            assert kernel.counts[wanted], kernel
        assert kernel.counts["async16"] or part == "cluster_fwd", kernel


def test_a_spin_limit_traps_and_does_not_spill(kernels):
    """What test builds on a GPU carry, so that a hang becomes an error; what ships does without."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the path")
    limited = machine_code.kernels(machine_code.build("cuda-spin-limit", HRA_SPIN_LIMIT="2000000000"))
    for part in ("cluster_fwd", "cluster_bwd"):
        assert all(kernel.counts["trap"] and not kernel.counts["local"] for kernel in named(limited, part))
        assert not any(kernel.counts["trap"] for kernel in named(kernels, part))


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("direction", SLICES)
def test_shared_memory_fits(direction, D):
    """Every slice that 16 blocks can cover runs, and none asks for more memory than there is."""
    for R in (8, 16):
        for size in SLICES[direction]:
            if 16 * size < D:
                continue
            shapes = machine_code.launches(direction, D, R, torch.bfloat16, size)
            assert shapes[0][1] == -(-D // size), (R, size, shapes)
            assert max(memory for _, _, memory in shapes) <= SHARED_LIMIT, (R, size, shapes)
