"""The accuracy rules of the project; no test has a tolerance of its own.

Operators, whose every case has an exact answer and a naive chain beside it (`assert_accurate`):

    allowed = max(k * error of the naive chain in x's dtype, 2 * error of merely rounding the exact answer)
              + 4 R eps32 * condition * scale

`exact` is the explicit chain in float64 on the very same (low-precision) inputs. k is 1 for bfloat16 and float16, where
we accumulate in float32 and so must beat the naive chain, 4 for float32, and 8 for float64, whose Gram matrix has no
wider dtype to be computed in. Two terms absorb luck in small cases: rounding costs in the max norm at least half a unit
in the last place of the largest entry, though that one may happen to be representable; and the last term, whose scale
is max|exact| in the max norm and 1 in the relative Frobenius norm. The rule holds in both norms, for y and for every
gradient: the Frobenius norm misses one masked row, the max norm misses a small error everywhere. The condition is 1
where shapes and seeds are fixed, and `condition` where columns may be parallel by accident.

Layers and models, which are compared with another way to the same result: `rounding`, from sizes and dtype alone.
Chains that must be orthogonal: `orthogonality`.
"""

import math

import torch
from torch import Tensor

from hra_kernels.factors import factor_dtype
from hra_kernels.reference import GS_RTOL

NAIVE_FACTOR = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}


def errors(got: Tensor, exact: Tensor) -> dict[str, float]:
    """{norm: error} of `got`; NaN anywhere gives NaN."""
    difference = got.double() - exact
    if difference.numel() == 0:
        return {"max": 0.0, "frobenius": 0.0}
    size = torch.linalg.vector_norm(exact)
    return {
        "max": difference.abs().max().item(),
        "frobenius": (torch.linalg.vector_norm(difference) / torch.where(size > 0, size, 1)).item(),
    }


def allowed(
    naive: Tensor, exact: Tensor, dtype: torch.dtype, out_dtype: torch.dtype, rank: int, condition: float = 1.0
) -> dict[str, float]:
    """{norm: allowed error} for a result of dtype `out_dtype` computed from a `dtype` x with `rank` reflections."""
    naive_errors, rounding = errors(naive, exact), errors(exact.to(out_dtype), exact)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale = {"max": exact.abs().max().item() if exact.numel() else 0.0, "frobenius": 1.0}
    rounding["max"] = max(rounding["max"], _half_last_place(scale["max"], out_dtype))
    factor = NAIVE_FACTOR[dtype]
    return {
        norm: max(factor * naive_errors[norm], 2 * rounding[norm]) + 4 * rank * unit * condition * scale[norm]
        for norm in scale
    }


def _half_last_place(value: float, dtype: torch.dtype) -> float:
    """What rounding a number of this size to `dtype` costs at most."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 2) if value else 0.0


def violations(
    got: dict[str, Tensor],
    naive: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    rank: int,
    condition: float = 1.0,
) -> list[str]:
    """One line for each tensor and norm that breaks the rule; empty where all is well."""
    found = []
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape, f"{name}: shape {tuple(tensor.shape)}, {tuple(exact[name].shape)} due"
        bounds = allowed(naive[name], exact[name], dtype, tensor.dtype, rank, condition)
        for norm, error in errors(tensor, exact[name]).items():
            if not error <= bounds[norm]:  # so written that NaN fails
                found.append(f"{name}: {norm} error {error:.3e} exceeds {bounds[norm]:.3e}")
    return found


def assert_accurate(
    got: dict[str, Tensor], naive: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, rank: int
) -> None:
    """Assert the rule for every tensor in `got` by name."""
    found = violations(got, naive, exact, dtype, rank)
    assert not found, "; ".join(found)


def relative(got: Tensor, exact: Tensor) -> float:
    """Largest difference as a fraction of the largest exact value; NaN stays NaN."""
    exact = exact.detach().double()
    return ((got.detach().double() - exact).abs().max() / exact.abs().max()).item()


def rounding(features: int, rank: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> float:
    """The `relative` error that rounding explains, of outputs and gradients of `layers` layers in `dtype`.

    A sum of n rounded products is off by less than 8 sqrt(n) eps / 2 of its terms' size but once in 10^13 sums (Higham
    and Mary, 2019): 4 sqrt(D) eps for x vᵀ and for the product with W. Each reflection rounds what it writes, a few
    times: 4 eps, and amplifies nothing, being orthogonal. 16-bit layers sum in float32, but round x Qᵀ and y, half of
    eps each, and their gradients likewise: 2 eps. Errors of different layers are independent, so their squares add up.
    """
    wide = factor_dtype(dtype)
    one = 4 * (features**0.5 + rank) * torch.finfo(wide).eps
    if dtype != wide:
        one += 2 * torch.finfo(dtype).eps
    return layers**0.5 * one


def condition(v: Tensor, t: Tensor) -> float:
    """|A|_F of A = |v_i| |t_ij| |v_j|: by how much errors of t and of v's rows, relative to each, may change vᵀ t v.

    2 for a single reflection; the chain I - vᵀ t v itself has norm 1, so what is larger cancels.
    """
    norms = torch.linalg.vector_norm(v.double(), dim=1)
    return torch.linalg.matrix_norm(norms[:, None] * t.double().abs() * norms).item()


def orthogonality(u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> float:
    """Largest entry of QᵀQ - I that rounding explains, for (v, t) = wy_factor(u, apply_gs) and Q = I - vᵀ t v.

    To first order δ(QᵀQ) = -(Qᵀ vᵀ δt v + its transpose), so no entry exceeds 2 |vᵀ δt v|. With c the `condition`: t
    rounded to its dtype gives |vᵀ δt v| <= c eps / 2. Before that, float64 sums of D + R products make
    t⁻¹ off by s |v_i| |v_j|, s = 4 sqrt(D + R) eps64 (see `rounding`), and δt = -t δ(t⁻¹) t gives |vᵀ δt v| <= s c².

    With Gram-Schmidt Q = I - 2 vᵀ v and δ(QᵀQ) = 4 vᵀ (v vᵀ - I) v, where K rows are kept. Rounding v to its dtype
    makes v vᵀ off by eps in each entry. v = l⁻¹ û makes it off by l⁻¹ δg l⁻ᵀ, |δg_ij| <= s, which is K s / σ² with û's
    least singular value σ: at least GS_RTOL, else a column would have been dropped.

    The check itself multiplies in float64: s once more.
    """
    rank, features = v.shape
    eps = torch.finfo(v.dtype).eps
    s = 4 * (features + rank) ** 0.5 * torch.finfo(torch.float64).eps
    if apply_gs:
        kept = u.double()[:, t.diagonal() != 0]
        unit = kept / torch.linalg.vector_norm(kept, dim=0)
        least = max(torch.linalg.svdvals(unit).min().item(), GS_RTOL) if kept.shape[1] else 1.0
        return 4 * kept.shape[1] * (eps + s / least**2) + s
    c = condition(v, t)
    return c * eps + 2 * s * c**2 + s
