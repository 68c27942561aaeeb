"""What nvcc makes of the CUDA kernels: no spills, matrix instructions and 16-byte accesses, memory that fits."""

import pytest
import torch

from tests.cuda import machine_code as cuda_machine_code
from tests.cuda.machine_code import ARCHITECTURES, SHAPES, SHARED_LIMIT, SLICES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels():
    reason = cuda_machine_code.why_unavailable()
    if reason:
        pytest.skip(f"the CUDA kernels are not compiled: {reason}")
    found = cuda_machine_code.kernels(cuda_machine_code.compiled_module())
    print()
    for kernel in found:
        print(kernel)
    return found


def named(kernels, architecture, part):
    return [kernel for kernel in kernels if kernel.architecture == architecture and part in kernel.name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory(kernels, architecture):
    found = named(kernels, architecture, "")
    assert len(found) == 47
    assert not [str(kernel) for kernel in found if kernel.stack or kernel.counts["local"]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("part", ["sweep_fwd", "sweep_bwd_project", "sweep_bwd_apply", "cluster_fwd", "cluster_bwd"])
def test_instructions(kernels, architecture, part):
    found = named(kernels, architecture, part)
    if part.startswith("cluster"):
        assert len(found) == (12 if part == "cluster_fwd" else 8)
        if architecture == "80":
            assert all(kernel.registers <= 16 and not kernel.counts["mma"] for kernel in found), "empty before sm_90"
            return
        assert all(kernel.counts["cluster"] and kernel.counts["send16"] for kernel in found)
    else:
        assert len(found) == 8
    for kernel in found:
        assert kernel.counts["mma"] and kernel.counts["ldmatrix"], kernel
        assert kernel.counts["async16"] or part == "cluster_fwd", kernel
        assert kernel.counts["load16"] or part == "sweep_bwd_apply", kernel
        if part != "sweep_bwd_project":
            assert kernel.counts["store16"], kernel


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_shared_memory_fits(op, capability):
    """No launch asks for more than there is; on an H100 every slice that 16 blocks can cover runs."""
    for D, R in SHAPES:
        for size in SLICES:
            if D > 4096 and (capability != 90 or size == 0):
                continue  # the sweeps take any width alike
            for dtype in (torch.bfloat16, torch.float32):
                shapes = cuda_machine_code.launches(op, D, R, dtype, capability, size)
                assert max(memory for _, _, memory in shapes) <= SHARED_LIMIT[capability]
                widest = 2048 if op == "forward" else 1024
                clustered = 0 < size <= widest and 16 * size >= D and dtype == torch.bfloat16 and R <= 16
                if capability == 90:
                    expected = -(-D // size) if clustered else 1
                    assert shapes[0][1] == expected, (D, R, size, dtype, shapes)
