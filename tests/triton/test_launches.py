"""How many launches a layer makes on the Triton backend, counted at the launchers: nothing runs."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from hra_kernels import ops, reflect_chain
from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import triton_factor_kernels, triton_kernels, triton_launch

pytestmark = pytest.mark.skipif(
    triton_backend.BACKEND.why_unavailable() is not None, reason="no GPU, and TRITON_INTERPRET=0"
)


STEP = ("reflect_kernel", "backward_rows_kernel", "backward_columns_kernel", "factor_bwd_kernel")


@pytest.fixture
def launches(monkeypatch):
    """A counter of kernels by name."""
    counted = Counter()

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda **_: counted.update([self.name])

    def counting(module):
        return type("Kernels", (), {name: Counted(name) for name in vars(module) if name.endswith("_kernel")})

    monkeypatch.setattr(triton_launch, "kernels", lambda: counting(triton_kernels))
    monkeypatch.setattr(triton_launch, "factor_kernels", lambda: counting(triton_factor_kernels))
    return counted


@pytest.mark.parametrize("M", [16, 2048])
@pytest.mark.parametrize(
    "rank, dtype", [(8, torch.float32), (32, torch.float32), (16, torch.bfloat16), (32, torch.bfloat16)], ids=str
)
def test_launches_of_a_layer_and_step(device, launches, M, rank, dtype):
    """Four, at any number of rows; with more than 16 columns in 16 bits one more each way, for the halves of v."""
    halves = {"halves_kernel": 1} if rank > 16 and dtype != torch.float32 else {}
    x = torch.randn(M, 1024, device=device, dtype=dtype, requires_grad=True)
    u = torch.randn(1024, rank, device=device, requires_grad=True)
    with ops.use_backend("triton"):
        factor = ops.chain_factor([u], [False])
        launches.clear()
        y = reflect_chain(x, [u], [False], factor, transpose=True)
        assert launches == {"reflect_kernel": 1} | halves
        launches.clear()
        y.backward(torch.ones_like(y))
        assert launches == dict.fromkeys(STEP[1:], 1) | halves
        launches.clear()
        with torch.no_grad():
            reflect_chain(x, [u], [False], factor, transpose=True)
        assert launches == {"reflect_kernel": 1} | halves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_reflect(device, launches, dtype):
    """One forward; two backward where one program holds every row, one more where sums are left to add."""
    v, t = torch.randn(8, 40, device=device), torch.randn(8, 8, device=device)
    for M, expected in [(1, 3), (200, 4)]:
        launches.clear()
        x = torch.randn(M, 40, device=device).to(dtype)
        _, p = triton_backend.BACKEND.reflect_fwd(x, v, t, True)
        triton_backend.BACKEND.reflect_bwd(x, x, v, t, p, True)
        assert launches.total() == expected, launches
