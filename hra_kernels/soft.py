"""Soft chains: reflections along û = u / sqrt(|u|² + ε), near the identity while u is short, and not orthogonal.

    H_i = I - 2 û_i û_iᵀ,   Q = H_1 ... H_R = I - vᵀ t v    with the plain chain's v and t of [u; sqrt(ε) I], v cut to D

The columns of [u; sqrt(ε) I] (D + R, R) have the norms sqrt(|u|² + ε) and the products that u's columns have, which is
all that a chain's t depends on. So every backend serves soft chains as they are, and only a factor's computation,
forward and backward, differs. ε = 0 is the plain chain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_kernels.factors import factor_dtype

SIDES = ("input", "output")


@dataclass(frozen=True)
class Soft:
    """In a chain's place in `apply_gs`: neither plain (False) nor Gram-Schmidt (True), but soft with this ε > 0."""

    eps: float


Rule = bool | Soft
"""What one chain's reflections are along: its columns (False), their Gram-Schmidt basis (True), soft unit vectors."""


def check_side(op: str, side: str) -> None:
    """Raise ValueError where `side` is neither "input" (W Q) nor "output" (Qᵀ W)."""
    if side not in SIDES:
        raise ValueError(f"{op}: side must be one of {SIDES}, got {side!r}")


def rule(op: str, apply_gs: bool, eps: float) -> Rule:
    """The rule of a chain with these two settings.

    Raises:
        ValueError: eps is negative or not finite, or is given together with apply_gs: a Gram-Schmidt basis has units.
    """
    if not (isinstance(eps, (int, float)) and 0 <= eps < math.inf):
        raise ValueError(f"{op}: eps must be a finite number of at least 0, got {eps!r}")
    if apply_gs and eps:
        raise ValueError(f"{op}: eps must be 0 with Gram-Schmidt, whose vectors have length one, got {eps}")
    return Soft(float(eps)) if eps else apply_gs


def init_short_(u: Tensor, eps: float) -> None:
    """Draw u (D, R) as the authors' code does: independent columns, each entry within about ±eps sqrt(6 / R)."""
    torch.nn.init.kaiming_uniform_(u, a=1 / eps)


def extended(u: Tensor, eps: float) -> Tensor:
    """[u; sqrt(ε) I] (D + R, R) in the factor's dtype."""
    wide = u.to(factor_dtype(u.dtype))
    return torch.cat([wide, math.sqrt(eps) * torch.eye(u.shape[1], dtype=wide.dtype, device=u.device)])


def factor_by_rule(wy_factor: Callable, u: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(v, t) of u's chain, by a `wy_factor(u, apply_gs)` that knows no soft ones."""
    if not isinstance(rule, Soft):
        return wy_factor(u, rule)
    v, t = wy_factor(extended(u, rule.eps), False)
    return v[:, : u.shape[0]].contiguous(), t


def factor_bwd_by_rule(
    wy_factor: Callable, wy_factor_bwd: Callable, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, rule: Rule
) -> Tensor:
    """du in u's dtype, by a `wy_factor_bwd(dv, dt, u, v, t, apply_gs)` that knows no soft ones.

    The part of v that was cut off is computed again: R x R values that no forward wants.
    """
    if not isinstance(rule, Soft):
        return wy_factor_bwd(dv, dt, u, v, t, rule)
    long = extended(u, rule.eps)
    v, t = wy_factor(long, False)
    dv = torch.cat([dv, dv.new_zeros(dv.shape[0], u.shape[1])], 1)
    du = wy_factor_bwd(dv, dt, long, v, t, False)[: u.shape[0]]
    # a zero column's gradient is zero, and would be rounding errors over sqrt(ε) where the other of its pair is not
    return torch.where((u != 0).any(0), du, 0).to(u.dtype).contiguous()


_MOST_AMPLIFIED = 100
"""Undoing a soft chain multiplies rounding errors by the inverse of its smallest singular value: this much is let."""


def inverse_factor(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(v, s) of Q⁻¹ = I - vᵀ s v for Q = I - vᵀ t v: s = -(I - t v vᵀ)⁻¹ t. For a plain chain that is tᵀ.

    Raises:
        ValueError: Q is singular, or nearly so: H_i is where |u_i|² = ε.
    """
    wide_v, wide_t = v.double(), t.double()
    # on the span of v's rows Q is this matrix, in an orthonormal basis, and elsewhere the identity
    low = torch.linalg.qr(wide_v.mT, mode="r").R
    identity = torch.eye(t.shape[0], dtype=torch.float64, device=t.device)
    on_span = torch.eye(low.shape[0], dtype=torch.float64, device=t.device) - low @ wide_t @ low.mT
    smallest = torch.linalg.svdvals(on_span).min().item()
    if not smallest * _MOST_AMPLIFIED >= 1:
        raise ValueError(
            f"a soft chain (eps > 0) with a singular value of {smallest:.1e} cannot be undone: that would multiply the "
            f"rounding of the weight by more than {_MOST_AMPLIFIED}"
        )
    return v, torch.linalg.solve(identity - wide_t @ wide_v @ wide_v.mT, -wide_t).to(t.dtype)


def bias_correction(bias: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """b - b Q = (b vᵀ) t v, in v's dtype: with it (y - b) Q + b is y Q + (b - b Q), and y is rounded but once more.

    Sums, not matrix products, which autocast and TF32 would round.

    Args:
        bias: (N,).
        v, t: (..., R, N) and (..., R, R).

    Returns:
        (..., N).
    """
    p = (v * bias.to(v.dtype)).sum(-1, keepdim=True)
    return (v * (t * p).sum(-2)[..., None]).sum(-2)
