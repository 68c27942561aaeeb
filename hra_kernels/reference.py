"""The specification: Householder reflection adaptation in plain PyTorch, any device, any dtype, float64 included.

    W' = W H_1 ... H_R,   H_i = I - 2 u_i u_iᵀ / (u_iᵀ u_i)          (arXiv 2405.17484, eq. 4)

`explicit_chain` and `explicit_gram_schmidt` spell that out. Everything else here is what the kernels compute:

    wy_factor    u (D, R)                ->  v (R, D), t (R, R)   with   Q = H_1 ... H_R = I - vᵀ t v
    reflect      x (M, D), v, t          ->  y = x - (x vᵀ) m v,  m = t  (y = x Q)  or  m = tᵀ  (y = x Qᵀ)

and their closed-form gradients. `t` is kept small by scaling and kept exact by taking the reflections in pairs:

    v[2k]     = û_2k                      û = u times a power of two that brings each norm into [1/2, 1)
    v[2k + 1] = (û_2k+1 - û_2k) / φ_k     φ = the power of two that brings this row's norm into [1/2, 1)

HRA starts from pairs of equal columns and learns the difference within each pair. Here that difference is a row of its
own, so no rounding of `v` can lose it, and while it is zero every product that contains it is exactly zero: the layer
starts as the identity bit for bit, whatever the dtype, the backend, or the order of its additions.

Why `t` has a closed form: with S the matrix of the plain compact WY form, S = triu(g, 1) + diag(g) / 2 for g = ûᵀ û
and Q = I - û S⁻¹ ûᵀ, a change of basis v = Bᵀ ûᵀ turns S into Bᵀ S B. Bᵀ S B is block upper triangular with 2 x 2
blocks; above the blocks it is the Gram matrix of v, on them (a, d the two rows of the pair, φ as above)

    [ aa / 2          aa / (2 φ) + ad ]        inverse:   2   [ φ² dd            -φ (aa + 2 φ ad) ]
    [ -aa / (2 φ)     dd / 2          ]                 ----- [ φ aa              φ² aa           ]
                                                        aa bb                    bb = aa + 2 φ ad + φ² dd
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hra_kernels.factors import factor_dtype

GS_RTOL = 2.0**-13
"""Gram-Schmidt drops a column whose part outside the earlier columns' span is below this fraction of its norm.

float32 knows a column to 6e-8 of its norm, so a kept direction is known to 5e-4 at worst; gradients grow by at most
1 / GS_RTOL. Kept directions are orthogonal to eps64 / GS_RTOL² = 1.5e-8 at worst: float32 accuracy, in float64 too."""


def explicit_chain(u: Tensor, apply_gs: bool = False, x: Tensor | None = None, transpose: bool = False) -> Tensor:
    """x Q (x Qᵀ if transpose) in u's dtype, one reflection at a time; without x (M, D), Q = H_1 ... H_R itself (D, D).

    A zero column reflects nothing. Differentiable; squares of the columns must be in the dtype's range.
    """
    basis = explicit_gram_schmidt(u) if apply_gs else u
    y = torch.eye(u.shape[0], dtype=u.dtype, device=u.device) if x is None else x
    for column in reversed(basis.unbind(1)) if transpose else basis.unbind(1):
        square = column @ column
        y = y - (2 / torch.where(square > 0, square, 1)) * torch.outer(y @ column, column)
    return y


def explicit_gram_schmidt(u: Tensor, rtol: float = GS_RTOL) -> Tensor:
    """u with orthonormal columns spanning the same space, one column at a time; dependent columns become zero."""
    kept: list[Tensor] = []
    columns = []
    for column in u.unbind(1):
        norm = torch.linalg.vector_norm(column)
        rest = column / torch.where(norm > 0, norm, 1)
        for _ in range(2):  # twice is enough (Kahan): the second sweep removes what rounding left of the first
            for other in kept:
                rest = rest - (other @ rest) * other
        length = torch.linalg.vector_norm(rest)
        if norm > 0 and length > rtol:
            kept.append(rest / length)
            columns.append(kept[-1])
        else:
            columns.append(torch.zeros_like(column))
    return torch.stack(columns, 1) if columns else u


def plain_wy(u: Tensor) -> Tensor:
    """t (R, R) of Q = I - u t uᵀ from t⁻¹ = triu(g, 1) + diag(g) / 2, g = uᵀu; no column may be zero."""
    g = u.mT @ u
    s = torch.triu(g, 1) + torch.diag(torch.diagonal(g)) / 2
    return torch.linalg.solve_triangular(s, torch.eye(u.shape[1], dtype=u.dtype, device=u.device), upper=True)


def dense(v: Tensor, t: Tensor) -> Tensor:
    """Q = I - vᵀ t v as a dense (D, D) matrix."""
    return torch.eye(v.shape[1], dtype=v.dtype, device=v.device) - v.mT @ t @ v


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly (exp2 and ldexp round), for exponents in [-1022, 1023]."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _norm_exponent(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(exponent, nonzero) of each row: 2^-exponent brings its norm into [1/2, 1); rows below the threshold are zero.

    The threshold is 2^20 times the smallest normal number (1e-32 in float32). Below it the gradient, which grows as
    1 / norm, would leave the dtype's range.
    """
    largest = rows.abs().amax(1).double()
    coarse = torch.frexp(largest).exponent
    norm = torch.linalg.vector_norm(rows.double() * _power_of_two(-coarse)[:, None], dim=1)
    exponent = coarse + torch.frexp(norm).exponent
    nonzero = (largest != 0) & (exponent >= math.frexp(torch.finfo(rows.dtype).tiny * 2.0**20)[1])
    return torch.where(nonzero & largest.isfinite(), exponent, 0), nonzero


def _scaled_rows(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ûᵀ (R, D), its exponents (R,) and which rows are nonzero (R,)."""
    rows = u.mT.to(factor_dtype(u.dtype)).contiguous()
    if rows.numel() == 0:
        empty = torch.zeros(rows.shape[0], dtype=torch.int32, device=u.device)
        return rows.clone(), empty, empty.bool()
    exponent, nonzero = _norm_exponent(rows)
    scaled = (rows.double() * _power_of_two(-exponent)[:, None]).to(rows.dtype)
    return torch.where(nonzero[:, None], scaled, 0), exponent, nonzero


def _paired_rows(hat: Tensor, nonzero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v (R, D), log2 of φ (R // 2,), and which second rows are differences (R // 2,), from ûᵀ."""
    pairs = hat.shape[0] // 2
    v = hat.clone()
    log_phi = torch.zeros(pairs, dtype=torch.int32, device=hat.device)
    has_both = nonzero[0 : 2 * pairs : 2] & nonzero[1 : 2 * pairs : 2]
    if pairs and hat.shape[1]:
        first, second = hat[0 : 2 * pairs : 2], hat[1 : 2 * pairs : 2]
        d = torch.where(has_both[:, None], second - first, second)
        log_phi, _ = _norm_exponent(d)
        v[1 : 2 * pairs : 2] = (d.double() * _power_of_two(-log_phi)[:, None]).to(d.dtype)
    return v, log_phi, has_both


def _pair_blocks(g: Tensor, phi: Tensor, nonzero: Tensor) -> Tensor:
    """The 2 x 2 diagonal blocks of t (R // 2, 2, 2)."""
    pairs = phi.shape[0]
    first = 2 * torch.arange(pairs, device=g.device)
    second = first + 1
    aa, ad, dd = g[first, first], g[first, second], g[second, second]
    has_a, has_b = nonzero[first], nonzero[second]
    both = has_a & has_b
    bb = aa + 2 * phi * ad + phi * phi * dd
    scale = torch.where(both, 2 / torch.where(both, aa * bb, 1), 0)
    t11 = torch.where(both, scale * phi * phi * dd, torch.where(has_a, 2 / torch.where(has_a, aa, 1), 0))
    t12 = -scale * phi * (aa + 2 * phi * ad)
    t21 = scale * phi * aa
    only_b = has_b & ~has_a
    t22 = torch.where(both, scale * phi * phi * aa, torch.where(only_b, 2 / torch.where(only_b, dd, 1), 0))
    return torch.stack([torch.stack([t11, t12], -1), torch.stack([t21, t22], -1)], -2)


def _chain_factor(u: Tensor) -> tuple[Tensor, Tensor]:
    hat, _, nonzero = _scaled_rows(u)
    v, log_phi, _ = _paired_rows(hat, nonzero)
    g = v.double() @ v.double().mT
    blocks = _pair_blocks(g, _power_of_two(log_phi), nonzero)
    rank = g.shape[0]
    t = g.new_zeros(0, 0)
    for j in range(0, rank, 2):
        if j + 1 < rank:
            corner = blocks[j // 2]
        else:
            corner = torch.where(nonzero[j], 2 / torch.where(nonzero[j], g[j, j], 1), 0).reshape(1, 1)
        above = -t @ (g[:j, j : j + 2] @ corner)
        left = corner.new_zeros(corner.shape[0], j)
        t = torch.cat([torch.cat([t, above], 1), torch.cat([left, corner], 1)])
    return v, t.to(v.dtype)


def _gram_schmidt_cholesky(hat: Tensor) -> tuple[Tensor, Tensor]:
    """(l⁻¹, kept): v = l⁻¹ ûᵀ has orthonormal rows where kept, zero rows elsewhere; l is Cholesky of ûᵀû."""
    rows = hat.double()
    g = rows @ rows.transpose(0, 1)
    rank = g.shape[0]
    identity = torch.eye(rank, dtype=g.dtype, device=g.device)
    inverse = torch.zeros_like(g)
    kept = []
    for j in range(rank):
        # the combination of the first j + 1 columns that is orthogonal to the first j
        overlap = inverse @ g[:, j]
        residual = g[j, j] - overlap.square().sum()
        keep = ~(residual <= GS_RTOL**2 * g[j, j])  # a NaN is kept, so that it shows
        row = torch.where(keep, (identity[j] - overlap @ inverse) * torch.where(keep, residual, 1).rsqrt(), 0)
        inverse = torch.where(identity[:, j : j + 1] > 0, row, inverse)
        kept.append(keep)
    return inverse, torch.stack(kept) if kept else g.new_zeros(0, dtype=torch.bool)


def wy_factor(u: Tensor, apply_gs: bool = False) -> tuple[Tensor, Tensor]:
    """(v, t) of Q = I - vᵀ t v for the columns of u.

    Args:
        u: (D, R) raw vectors, any floating dtype and any scale.
        apply_gs: reflect along the Gram-Schmidt basis of u instead of u's own columns (`HRAConfig.apply_GS`).

    Returns:
        v (R, D) and t (R, R), float32, or float64 for a float64 u; inner arithmetic is float64. A zero column reflects
        nothing: its rows of v and t are zero. With `apply_gs`, v is orthonormal, t is 2 on the diagonal, and a column
        that depends on the earlier ones (see `GS_RTOL`) counts as zero.
    """
    if not apply_gs:
        return _chain_factor(u)
    hat, _, _ = _scaled_rows(u)
    inverse, kept = _gram_schmidt_cholesky(hat)
    return (inverse @ hat.double()).to(hat.dtype), torch.diag(2 * kept.to(hat.dtype))


def portable_factor(u: Tensor, apply_gs: bool = False) -> tuple[Tensor, Tensor]:
    """`wy_factor` in operators that other runtimes have, for graphs that leave PyTorch: ONNX knows no frexp.

    The same Q = I - vᵀ t v in another basis: v are unit columns, not pairs, so that Q is exact to rounding only, where
    it is the identity too. t grows over blocks of 1, 2, 4, ... columns: [[a, -a g d], [0, d]] from its blocks a and d.
    """
    dtype = factor_dtype(u.dtype)
    rows = u.transpose(0, 1).double()
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)
    length = rows.square().sum(1, keepdim=True).sqrt()
    zero = length * largest < torch.finfo(dtype).tiny * 2.0**20  # as in `_norm_exponent`; a NaN is none, so it shows
    rows = torch.where(zero, 0.0, rows / torch.where(zero, 1.0, length))
    column = torch.arange(rows.shape[0], device=u.device)
    diagonal = column[:, None] == column
    if apply_gs:
        inverse, kept = _gram_schmidt_cholesky(rows)
        return (inverse @ rows).to(dtype).contiguous(), torch.where(kept[:, None] & diagonal, 2.0, 0.0).to(dtype)
    v = rows.to(dtype).contiguous()
    g = v.double() @ v.double().transpose(0, 1)  # of v as rounded: then t makes the product orthogonal
    t = torch.where(zero | ~diagonal, 0.0, 2 / torch.where(zero, 1.0, g))
    size = 1
    while size < rows.shape[0]:
        block, pair = column // size, column // (2 * size)
        above = (pair[:, None] == pair) & (block[:, None] < block)
        t = t - t @ torch.where(above, g, 0.0) @ t
        size *= 2
    return v, t.to(dtype)


def wy_factor_bwd(dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool = False) -> Tensor:
    """du (D, R), in u's dtype, from the gradients of `wy_factor`'s two results. Zero columns get a zero gradient.

    The powers of two and the set of columns Gram-Schmidt keeps are constants of the derivative: they are locally.
    """
    hat, exponent, nonzero = _scaled_rows(u)
    dv, v64, t = dv.double(), v.double(), t.double()
    if apply_gs:
        # v = l⁻¹ ûᵀ is a QR decomposition; this is its closed-form gradient with a constant t
        inverse, _ = _gram_schmidt_cholesky(hat)
        k = torch.tril(dv @ v64.mT)
        dhat = inverse.mT @ (dv - (k + torch.tril(k, -1).mT) @ v64)
    else:
        _, log_phi, has_both = _paired_rows(hat, nonzero)
        phi = _power_of_two(log_phi)
        ds = -t.mT @ dt.double() @ t.mT
        pairs = phi.shape[0]
        dg = torch.triu(ds, 1) + torch.diag(torch.diagonal(ds)) / 2
        first = 2 * torch.arange(pairs, device=u.device)
        second = first + 1
        asymmetric = (ds[first, second] - ds[second, first]) / (2 * phi)
        dg[first, first] += torch.where(has_both, asymmetric, 0)
        dhat = dv + (dg + dg.mT) @ v64
        dd = dhat[1 : 2 * pairs : 2] * _power_of_two(-log_phi)[:, None]
        dhat[first] -= torch.where(has_both[:, None], dd, 0)
        dhat[second] = dd
    du = torch.where(nonzero[:, None], dhat * _power_of_two(-exponent)[:, None], 0)
    return du.mT.to(u.dtype).contiguous()


def _without_autocast(function: Callable) -> Callable:
    """Autocast would round the factor's own products to 16 bits."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return wrapped


@_without_autocast
def reflect_fwd(x: Tensor, v: Tensor, t: Tensor, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """y = x - (x vᵀ) m v in x's dtype and p = x vᵀ (M, R) in v's dtype; m = tᵀ if transpose else t.

    Leading dimensions that x, v and t share are a batch, as in `torch.matmul`; `reflect_bwd` likewise.
    """
    m = t.transpose(-2, -1) if transpose else t  # not mT: the TorchScript exporter to ONNX does not know it
    p = x.to(v.dtype) @ v.transpose(-2, -1)
    return (x.to(v.dtype) - (p @ m) @ v).to(x.dtype), p


def reflect_dx(dy: Tensor, v: Tensor, t: Tensor, transpose: bool = False) -> Tensor:
    """dx = dy - (dy vᵀ) mᵀ v in dy's dtype: the same reflection with the other side's m."""
    return reflect_fwd(dy, v, t, not transpose)[0]


@_without_autocast
def reflect_bwd(
    dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dv, dt) of `reflect_fwd`'s y: dx in dy's dtype, dv (R, D) and dt (R, R) in v's dtype.

    q = dy vᵀ,  dx = dy - (q mᵀ) v,  dv = -((p m)ᵀ dy + (q mᵀ)ᵀ x),  dm = -pᵀ q,  dt = dmᵀ if transpose else dm
    """
    m = t.mT if transpose else t
    wide = dy.to(v.dtype)
    q = wide @ v.mT
    qm = q @ m.mT
    dx = (wide - qm @ v).to(dy.dtype)
    dv = -((p @ m).mT @ wide + qm.mT @ x.to(v.dtype))
    dm = -p.mT @ q
    return dx, dv, dm.mT.contiguous() if transpose else dm


@_without_autocast
def weight_side_bwd(dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(dv, dt) of y = x (W Q)ᵀ for an orthogonal Q = I - vᵀ t v, from x (M, D) and dx (M, D) alone.

    They are those of `reflect_bwd(dy', x, v, t, p, transpose=True)` for dy' = dx Qᵀ, the gradient of x Qᵀ, which is not
    formed: one read of x and of dx, nothing of size M D written, neither dy nor W needed. Two sums over the rows,

        p = x vᵀ,  q = dx vᵀ,  E = pᵀ dx (R, D),  F = qᵀ x (R, D),

    and then, with c = pᵀ q = E vᵀ and k = I - (v vᵀ) t, for which v Q = k v,

        dv = -(t (E - c tᵀ v) + tᵀ k F),  dt = -k cᵀ
    """
    x, dx = x.to(v.dtype), dx.to(v.dtype)
    p, q = x @ v.mT, dx @ v.mT
    c = p.mT @ q
    k = torch.eye(v.shape[0], dtype=v.dtype, device=v.device) - (v @ v.mT) @ t
    dv = -(t @ (p.mT @ dx - (c @ t.mT) @ v) + t.mT @ (k @ (q.mT @ x)))
    return dv, -k @ c.mT


def reflect_mixed(
    x: Tensor, v: Tensor, t: Tensor, chains: Tensor, samples: Tensor | None = None, transpose: bool = False
) -> Tensor:
    """y (B, L, D): x[samples[s]] (L, D) reflected by chain number chains[s] of `stack_factors`; other samples as is.

    `samples` None means every sample of x, in order. Sample by sample this is `reflect_fwd`, and so is its gradient.
    """
    y, _ = reflect_fwd(x if samples is None else x[samples], v[chains], t[chains], transpose)
    return y if samples is None else x.index_copy(0, samples, y)
