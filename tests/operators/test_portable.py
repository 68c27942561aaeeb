"""What stands for the operators in graphs that leave PyTorch: `reference.portable_factor` and the decompositions."""

import pytest
import torch
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode

from hra_kernels import ops, reference
from hra_kernels.testing.tolerance import assert_accurate


def vectors(kind: str, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    u = torch.randn(96, rank, generator=generator, dtype=torch.float64)
    if kind == "near pairs":
        u[:, 1::2] = u[:, 0 : 2 * (rank // 2) : 2] + 1e-3 * u[:, 1::2]
    elif kind == "near parallel":
        u = u[:, :1] + 1e-3 * u
    elif kind == "scales":
        u *= 10.0 ** torch.linspace(-28, 15, rank, dtype=torch.float64)
    elif kind == "zero columns":
        u[:, ::3], u[:, 1::3] = 0, 1e-38 * u[:, 1::3]
    return u.to(dtype)


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["independent", "near pairs", "near parallel", "scales", "zero columns"])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 32])
def test_portable_factor_is_the_same_chain(rank, kind, dtype, apply_gs):
    if kind == "zero columns" and dtype == torch.float64:
        pytest.skip("1e-38 is below float32's threshold alone")
    if kind.startswith("near") and dtype == torch.float64 and apply_gs:
        pytest.skip("a basis of near columns is known to eps64 / 1e-3² alone, in `reference.wy_factor` too")
    u = vectors(kind, rank, dtype)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0), dtype=dtype)
    got = reference.reflect_fwd(x, *reference.portable_factor(u, apply_gs))[0]
    if kind == "zero columns":
        u = torch.where(u.abs().amax(0) < 1e-30, 0, u)
    columns = reference.explicit_gram_schmidt(u.double()) if apply_gs else u.double()
    exact, naive = x.double(), x
    for column in columns.unbind(1):
        size = column.norm()
        unit = column / torch.where(size > 0, size, 1)
        exact = exact - 2 * torch.outer(exact @ unit, unit)
        naive = naive - 2 * torch.outer(naive @ unit.to(dtype), unit.to(dtype))
    assert_accurate({"y": got}, {"y": naive}, {"y": exact}, dtype, rank)


def test_portable_factor_shows_nan():
    u = vectors("independent", 4, torch.float32)
    u[3, 2] = torch.nan
    assert reference.portable_factor(u)[0][2].isnan().all()


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decompositions_look_like_the_operators(dtype, apply_gs):
    """Shapes, dtypes and strides: with symbolic sizes PyTorch asks the decomposition for them."""
    u, x = vectors("independent", 5, torch.float32).to(dtype), torch.randn(6, 96).to(dtype)
    v, t = ops.wy_factor(u, apply_gs)
    calls = {"wy_factor_fwd": (u, apply_gs), "reflect_fwd": (x, v, t, True), "reflect_dx": (x, v, t, True)}
    for name, arguments in calls.items():
        operator = getattr(torch.ops.hra, name).default
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            expected, got = operator(*fake), decomposition_table[operator](*fake)
        pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
        for one, other in pairs:
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), name
