"""Factors (v, t) put together and taken apart: chains joined into one, split again, or side by side for a batch."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of `v`, `t`, `p` and their gradients: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks_above(widths: Sequence[int], device: torch.device) -> Tensor:
    """Mask (R, R) of the entries right of the diagonal blocks of these widths."""
    column = torch.arange(sum(widths), device=device)
    # counted on the device: bringing the widths there would break the capture of a CUDA graph
    chain = sum((column >= end).int() for end in itertools.accumulate(widths))
    return chain[:, None] < chain[None, :]


def join_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(v, t) of Q_1 Q_2 ... from the factor of each: t = [[t_1, -t_1 (v_1 v_2ᵀ) t_2], [0, t_2]] and so on."""
    v, t = factors[0]
    for next_v, next_t in factors[1:]:
        g = v.double() @ next_v.double().transpose(0, 1)
        above = -(t.double() @ g @ next_t.double()).to(t.dtype)
        t = torch.cat([torch.cat([t, above], 1), torch.cat([next_t.new_zeros(next_t.shape[0], t.shape[0]), next_t], 1)])
        v = torch.cat([v, next_v])
    return v, t


def join_factors_bwd(
    dv: Tensor, dt: Tensor, v: Tensor, t: Tensor, widths: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """(dv_i, dt_i) of each joined factor. With b = blockdiag(t_i) and g the blocks of v vᵀ above it, t = b (I + g b)⁻¹,

    so db = (I - t g)ᵀ dt (I - g t)ᵀ on the diagonal blocks and dg = -tᵀ dt tᵀ above them.
    """
    above = _blocks_above(widths, t.device)
    wide_v, wide_t, wide_dt = v.double(), t.double(), dt.double()
    g = torch.where(above, wide_v @ wide_v.mT, 0)
    identity = torch.eye(t.shape[0], dtype=torch.float64, device=t.device)
    db = (identity - wide_t @ g).mT @ wide_dt @ (identity - g @ wide_t).mT
    dg = torch.where(above, -wide_t.mT @ wide_dt @ wide_t.mT, 0)
    dv = dv + ((dg + dg.mT) @ wide_v).to(dv.dtype)
    return split_factor(dv, db.to(dt.dtype), widths)


def split_factor(v: Tensor, t: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The (v_i, t_i) that `join_factors` joined: row blocks of v, diagonal blocks of t."""
    parts, start = [], 0
    for width in widths:
        block = slice(start, start + width)
        parts.append((v[block], t[block, block].contiguous()))
        start += width
    return parts


def stack_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """v (C, R, D) and t (C, R, R) of C chains side by side; those of lower rank end in zero rows, which do nothing."""
    rank = max(v.shape[0] for v, _ in factors)
    pads = [rank - v.shape[0] for v, _ in factors]
    v = torch.stack([F.pad(v, (0, 0, 0, pad)) for (v, _), pad in zip(factors, pads, strict=True)])
    t = torch.stack([F.pad(t, (0, pad, 0, pad)) for (_, t), pad in zip(factors, pads, strict=True)])
    return v, t
