"""The one list of cases. Every backend, the planted bugs and the benchmark's checks run through it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_kernels import reference
from hra_kernels.factors import factor_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """Shapes, and what kind of columns u has."""

    M: int
    D: int
    R: int
    columns: str = "random"
    apply_gs: bool = False
    transpose: bool = True

    def __str__(self) -> str:
        side = "input" if self.transpose else "weight"
        return f"{self.M}x{self.D}r{self.R}-{self.columns}{'-gs' if self.apply_gs else ''}-{side}"


_SHAPES = [
    (1, 3, 1), (1, 5, 7), (1, 4096, 8), (2, 1000, 16), (127, 1001, 7), (128, 1000, 8), (129, 257, 3),
    (160, 512, 2), (64, 300, 1), (131, 264, 32), (257, 513, 64), (65, 320, 256), (4099, 64, 8),
]  # fmt: skip
_COLUMNS = ["paired_step", "near_parallel", "zero_columns", "scales", "spike"]

CASES = (
    [Case(*shape) for shape in _SHAPES]
    + [Case(*shape, transpose=False) for shape in _SHAPES if shape[2] in (2, 7, 8, 64)]
    + [Case(130, 1000, 8, columns) for columns in _COLUMNS]
    + [Case(131, 264, 7, columns, transpose=False) for columns in _COLUMNS]
    + [Case(*shape, apply_gs=True) for shape in _SHAPES if shape[2] in (1, 3, 7, 8, 32) and shape[2] < shape[1]]
    + [Case(130, 1000, 8, columns, apply_gs=True) for columns in ("zero_columns", "scales")]
)
SMALL_CASES = [case for case in CASES if case.M * case.D * case.R <= 131 * 264 * 32]
"""For executors that are slow for what they are: Triton's interpreter, the CUDA emulation."""


def make_u(D: int, R: int, columns: str, generator: torch.Generator) -> Tensor:
    """u (D, R) float32 of the named kind."""
    u = torch.randn(D, R, generator=generator)
    if columns == "paired_step":  # HRA's initialization, one optimizer step later
        u[:, 1::2] = u[:, 0 : 2 * (R // 2) : 2]
        u += 1e-4 * torch.randn(D, R, generator=generator).sign()
    elif columns == "near_parallel":
        u = u[:, :1] + 1e-5 * u
    elif columns == "zero_columns":
        u[:, 2::3] = 0
    elif columns == "scales":
        u *= torch.logspace(-30, 30, R)[torch.randperm(R, generator=generator)] / D**0.5
    elif columns == "spike":  # norms of neighbors differ by sqrt(D) while their largest entries agree
        u[:, ::2] *= 1e-4
        u[0, ::2] = 3.0
    else:
        assert columns == "random", columns
    return u


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, u, dy) of a case: x and dy (M, D) in `dtype`, u (D, R) in the factor's dtype."""
    generator = torch.Generator().manual_seed(hash((case.M, case.D, case.R, seed)) % 2**31)
    u = make_u(case.D, case.R, case.columns, generator).to(factor_dtype(dtype))
    x, dy = (torch.randn(case.M, case.D, generator=generator).to(dtype) for _ in range(2))
    return x, u, dy


def unit_columns(u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u's columns in `dtype`, as a leaf, without their powers of two, and these: du is the leaf's gradient over them.

    So a naive chain is not blamed for what its dtype cannot hold.
    """
    exponent = torch.frexp(torch.linalg.vector_norm(u.double(), dim=0)).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    scale = torch.where((u != 0).any(0), scale, 1)
    return (u.double() / scale).to(dtype).requires_grad_(), scale


def explicit(x: Tensor, u: Tensor, dy: Tensor, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y, dx and du by autograd through the explicit chain, one reflection at a time, all of it in `dtype`.

    In float64 this is the exact answer.
    """
    unit, scale = unit_columns(u, dtype)
    x = x.detach().to(dtype).requires_grad_()
    y = reference.explicit_chain(unit, case.apply_gs, x, case.transpose)
    y.backward(dy.to(dtype))
    du = unit.grad if unit.grad is not None else torch.zeros_like(unit)
    return {"y": y.detach(), "dx": x.grad, "du": du.double() / scale}


def explicit_weight_side(
    x: Tensor, u: Tensor, dx: Tensor, case: Case, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """du of y = x (W Q)ᵀ, from x and its gradient dx: that of `explicit` for the dy that gives this dx, dx Qᵀ."""
    columns = unit_columns(u, dtype)[0].detach()
    dy = reference.explicit_chain(columns, case.apply_gs, dx.to(dtype), case.transpose)
    return {"du": explicit(x, u, dy, case, dtype)["du"]}


def naive(
    x: Tensor, u: Tensor, dy: Tensor, case: Case, dtype: torch.dtype, answer: Callable = explicit
) -> dict[str, Tensor]:
    """`answer` in x's own dtype, whose distance from the exact one is the rounding error of such a chain.

    Float64 has nothing wider to be compared with, so there the order of features differs.
    """
    if dtype != torch.float64:
        return answer(x, u, dy, case, dtype)
    order = torch.randperm(case.D, generator=torch.Generator().manual_seed(1))
    results = answer(x[:, order], u[order], dy[:, order], case, dtype)
    back = torch.argsort(order)
    return {name: tensor[back] if name == "du" else tensor[:, back] for name, tensor in results.items()}
