"""Triton kernels of the WY factor, u (D, R) -> v (R, D), t (R, R), and of its gradient. Launched by `triton_backend`.

Every kernel takes L factors of one shape at once, `layer` the slowest axis of its grid: a model's layers cost the
launches of one. `reference.wy_factor` has the formulas. All sums are float64: R² D multiplications are few beside the
activations' even at half of float32's rate, and where columns are nearly parallel they leave nothing to argue about.

    scale_rows_kernel      powers of two; û and, for the chain, the differences of its pairs
    gram_kernel            a bᵀ over splits of D
    chain_factor_kernel    t by block back substitution, every 16 columns on their own
    gram_schmidt_kernel    the rows of l⁻¹ one by one, and which columns count
    ..._bwd_kernel         the same way back
"""

import triton
import triton.language as tl

MIN_EXPONENT = tl.constexpr(-105)  # a column of norm below 2^-106, 2^20 times float32's smallest normal, is zero
GS_RTOL_SQUARED = tl.constexpr(2.0**-26)  # reference.GS_RTOL ** 2


@triton.jit
def _norm_exponent(squares):
    """(exponent, whether it is a number's) of each norm: 2^-exponent brings it into [1/2, 1). squares is its square."""
    biased = (squares.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return (biased - 1021) >> 1, biased != 0x7FF


@triton.jit
def _power_of_two(exponent):
    """2^exponent, float64"""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _hat(u_ptr, stride_ud, stride_ur, offs_r, mask_r, offs_d, D, scale):
    """rows of û [BLOCK_P, BLOCK_D], float32"""
    mask = mask_r[:, None] & (offs_d < D)[None, :]
    u = tl.load(u_ptr + (offs_r * stride_ur)[:, None] + (offs_d * stride_ud)[None, :], mask, other=0.0)
    hat = (u.to(tl.float64) * scale[:, None]).to(tl.float32)
    return tl.where((scale != 0)[:, None], hat, 0.0)


@triton.jit
def _tree_sum(a, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of rows [ROWS], bit for bit the same in every kernel: a sum of two has one order, whatever the layout."""
    for level in tl.static_range(16):
        if (COLUMNS >> level) > 1:
            a = tl.sum(tl.reshape(a, (ROWS, COLUMNS >> (level + 1), 2)), axis=2)
    return tl.reshape(a, (ROWS,))


@triton.jit
def _scale(squares):
    exponent, finite = _norm_exponent(squares)
    scale = _power_of_two(tl.where(finite, -exponent, 0))
    return tl.where(exponent >= MIN_EXPONENT, scale, 0.0)


@triton.jit
def _pair_scales(
    u_ptr, stride_ud, stride_ur, first, R, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """(u's powers of two of a pair's first and second column, φ's exponent), each [BLOCK_P]"""
    mask_a = first < R
    mask_b = first + 1 < R
    acc_a = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
    acc_b = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < D)[None, :]
        u_ptrs = u_ptr + (first * stride_ur)[:, None] + (offs_d * stride_ud)[None, :]
        a = tl.load(u_ptrs, mask_a[:, None] & mask_d, other=0.0).to(tl.float64)
        b = tl.load(u_ptrs + stride_ur, mask_b[:, None] & mask_d, other=0.0).to(tl.float64)
        acc_a += a * a
        acc_b += b * b
    scale_a = _scale(_tree_sum(acc_a, BLOCK_P, BLOCK_D))
    scale_b = _scale(_tree_sum(acc_b, BLOCK_P, BLOCK_D))
    phi_exponent = tl.zeros((BLOCK_P,), tl.int64)
    if PAIRS:
        has_both = (scale_a != 0) & (scale_b != 0)
        acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
        for d0 in range(0, D, BLOCK_D):
            offs_d = d0 + tl.arange(0, BLOCK_D)
            a = _hat(u_ptr, stride_ud, stride_ur, first, mask_a, offs_d, D, scale_a)
            b = _hat(u_ptr, stride_ud, stride_ur, first + 1, mask_b, offs_d, D, scale_b)
            d = tl.where(has_both[:, None], b - a, b).to(tl.float64)
            acc += d * d
        exponent, finite = _norm_exponent(_tree_sum(acc, BLOCK_P, BLOCK_D))
        phi_exponent = tl.where(finite & (exponent >= MIN_EXPONENT), exponent, 0)
    return scale_a, scale_b, phi_exponent


@triton.jit
def scale_rows_kernel(
    v_ptr, scale_ptr, phi_ptr, u_ptr,    # (L, R, D) float32, (L, R) (L, R) float64, (L, D, R)
    D, R, stride_ul, stride_ud, stride_ur,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """v's rows, u's powers of two (0 for a zero column), and φ of each pair in the place of its first column."""
    layer = tl.program_id(1).to(tl.int64)
    u_ptr += layer * stride_ul
    v_ptr += layer * R * D
    first = 2 * (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))
    second = first + 1
    mask_a = first < R
    mask_b = second < R
    scale_a, scale_b, phi_exponent = _pair_scales(u_ptr, stride_ud, stride_ur, first, R, D, BLOCK_P, BLOCK_D, PAIRS)
    has_both = (scale_a != 0) & (scale_b != 0)
    tl.store(scale_ptr + layer * R + first, scale_a, mask_a)
    tl.store(scale_ptr + layer * R + second, scale_b, mask_b)
    if PAIRS:
        tl.store(phi_ptr + layer * R + first, _power_of_two(phi_exponent), mask_a)
    if NEED_V:
        inverse_phi = _power_of_two(-phi_exponent)
        for d0 in range(0, D, BLOCK_D):
            offs_d = d0 + tl.arange(0, BLOCK_D)
            a = _hat(u_ptr, stride_ud, stride_ur, first, mask_a, offs_d, D, scale_a)
            b = _hat(u_ptr, stride_ud, stride_ur, second, mask_b, offs_d, D, scale_b)
            if PAIRS:
                b = tl.where(has_both[:, None], b - a, b)
                b = (b.to(tl.float64) * inverse_phi[:, None]).to(tl.float32)
            mask_d = (offs_d < D)[None, :]
            tl.store(v_ptr + (first * D)[:, None] + offs_d[None, :], a, mask_a[:, None] & mask_d)
            tl.store(v_ptr + (second * D)[:, None] + offs_d[None, :], b, mask_b[:, None] & mask_d)


@triton.jit
def gram_kernel(
    g_ptr, a_ptr, b_ptr,    # (L, splits, R, R) float64, (L, R, D) (L, R, D) float32
    D, R, d_per_split,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This split's share of a bᵀ."""
    num_r = tl.cdiv(R, BLOCK_R)
    split = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    offs_i = (tl.program_id(0) // num_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = (tl.program_id(0) % num_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    a_ptrs = a_ptr + layer * R * D + (offs_i * D)[:, None]
    b_ptrs = b_ptr + layer * R * D + (offs_j * D)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    end = tl.minimum((split + 1) * d_per_split, D)
    for d0 in range(split * d_per_split, end, BLOCK_D):
        offs_d = (d0 + tl.arange(0, BLOCK_D))[None, :]
        a = tl.load(a_ptrs + offs_d, (offs_i < R)[:, None] & (offs_d < end), other=0.0).to(tl.float64)
        b = tl.load(b_ptrs + offs_d, (offs_j < R)[:, None] & (offs_d < end), other=0.0).to(tl.float64)
        acc += tl.sum(a[:, None, :] * b[None, :, :], axis=2)
    g_ptrs = g_ptr + ((layer * tl.num_programs(1) + split) * R + offs_i[:, None]) * R + offs_j[None, :]
    tl.store(g_ptrs, acc, (offs_i < R)[:, None] & (offs_j < R)[None, :])


@triton.jit
def _gram_row(g_ptr, row, offs_k, mask_k, R, num_splits, BLOCK_S: tl.constexpr):
    """g[row, offs_k] [BLOCK_R], summed over the splits"""
    offs_s = tl.arange(0, BLOCK_S)
    offsets = ((offs_s * R + row) * R)[:, None] + offs_k[None, :]
    return tl.sum(tl.load(g_ptr + offsets, (offs_s < num_splits)[:, None] & mask_k[None, :], other=0.0), axis=0)


@triton.jit
def _gram_entry(g_ptr, i, j, R, num_splits, BLOCK_S: tl.constexpr):
    """g[i, j] for i <= j, summed over the splits; 0 where j is R"""
    offs_s = tl.arange(0, BLOCK_S)
    mask = offs_s < tl.where(j < R, num_splits, 0)
    return tl.sum(tl.load(g_ptr + (offs_s * R + i) * R + j, mask, other=0.0), axis=0)


@triton.jit
def _pair_block(aa, ad, dd, phi, has_a, has_b):
    """t on the diagonal, for a pair and for what is left of one: (t11, t12, t21, t22)"""
    both = has_a & has_b
    only_a = has_a & (has_b == 0)
    only_b = has_b & (has_a == 0)
    bb = aa + 2 * phi * ad + phi * phi * dd
    scale = tl.where(both, 2 / tl.where(both, aa * bb, 1.0), 0.0)
    t11 = tl.where(only_a, 2 / tl.where(only_a, aa, 1.0), scale * phi * phi * dd)
    t12 = -scale * phi * (aa + 2 * phi * ad)
    t21 = scale * phi * aa
    t22 = tl.where(only_b, 2 / tl.where(only_b, dd, 1.0), scale * phi * phi * aa)
    return t11, t12, t21, t22


@triton.jit
def chain_factor_kernel(
    t_ptr, g_ptr, scale_ptr, phi_ptr,    # (L, R, R) float32, (L, splits, R, R) (L, R) (L, R) float64
    R, num_splits,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of t from the last pair of rows up: t_i = corner_i (identity_i - sum over k > i of g_ik t_k)."""
    layer = tl.program_id(1).to(tl.int64)
    g_ptr += layer * num_splits * R * R
    scale_ptr += layer * R
    phi_ptr += layer * R
    offs_k = tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    num_pairs = tl.cdiv(R, 2)
    for i in range(0, num_pairs):
        first = 2 * (num_pairs - 1 - i)
        second = first + 1
        has_a = tl.load(scale_ptr + first) != 0
        has_b = tl.load(scale_ptr + second, second < R, other=0.0) != 0
        aa = _gram_entry(g_ptr, first, first, R, num_splits, BLOCK_S)
        ad = _gram_entry(g_ptr, first, second, R, num_splits, BLOCK_S)
        dd = _gram_entry(g_ptr, second, second, R, num_splits, BLOCK_S)
        t11, t12, t21, t22 = _pair_block(aa, ad, dd, tl.load(phi_ptr + first), has_a, has_b)
        later = (offs_k > second) & (offs_k < R)
        z1 = tl.sum(_gram_row(g_ptr, first, offs_k, later, R, num_splits, BLOCK_S)[:, None] * t, axis=0)
        # where there is no second row, `later` is empty
        z2 = tl.sum(_gram_row(g_ptr, second, offs_k, later, R, num_splits, BLOCK_S)[:, None] * t, axis=0)
        e1 = tl.where(offs_j == first, 1.0, 0.0) - z1
        e2 = tl.where(offs_j == second, 1.0, 0.0) - z2
        t = tl.where((offs_k == first)[:, None], (t11 * e1 + t12 * e2)[None, :], t)
        t = tl.where((offs_k == second)[:, None], (t21 * e1 + t22 * e2)[None, :], t)
    t_ptrs = t_ptr + layer * R * R + (offs_k * R)[:, None] + offs_j[None, :]
    tl.store(t_ptrs, t.to(tl.float32), (offs_k < R)[:, None] & (offs_j < R)[None, :])


@triton.jit
def gram_schmidt_kernel(
    inverse_ptr, t_ptr, g_ptr,    # (L, R, R) float64, (L, R, R) float32, (L, splits, R, R) float64
    R, num_splits,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """l⁻¹ of û ûᵀ = l lᵀ, row by row, with zero rows for columns that depend on earlier ones; t = 2 on those kept."""
    layer = tl.program_id(0).to(tl.int64)
    inverse_ptr += layer * R * R
    t_ptr += layer * R * R
    g_ptr += layer * num_splits * R * R
    offs_k = tl.arange(0, BLOCK_R)
    mask_k = offs_k < R
    for j in range(0, R):
        g = _gram_row(g_ptr, j, offs_k, mask_k, R, num_splits, BLOCK_S)
        square = _gram_entry(g_ptr, j, j, R, num_splits, BLOCK_S)
        residual = square
        row = tl.where(offs_k == j, 1.0, 0.0).to(tl.float64)
        for i0 in range(0, j, BLOCK_C):
            offs_i = i0 + tl.arange(0, BLOCK_C)
            mask = (offs_i < j)[:, None] & mask_k[None, :]
            earlier = tl.load(inverse_ptr + (offs_i * R)[:, None] + offs_k[None, :], mask, other=0.0)
            overlap = tl.sum(earlier * g[None, :], axis=1)
            residual -= tl.sum(overlap * overlap, axis=0)
            row -= tl.sum(overlap[:, None] * earlier, axis=0)
        keep = (residual <= square * GS_RTOL_SQUARED) == 0  # a NaN is kept, so that it shows
        row = tl.where(keep, row / tl.sqrt(tl.where(keep, residual, 1.0)), 0.0)
        tl.store(inverse_ptr + j * R + offs_k, row, mask_k)
        tl.store(t_ptr + j * R + offs_k, tl.where((offs_k == j) & keep, 2.0, 0.0), mask_k)
        tl.debug_barrier()  # the next row's threads read what this row's have written


@triton.jit
def combine_rows_kernel(
    v_ptr, w_ptr, hat_ptr,    # (L, R, D) float32, (L, R, R) float64, (L, R, D) float32
    D, R,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """v = w û, which for w = l⁻¹ is the Gram-Schmidt basis."""
    layer = tl.program_id(2).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_i = offs_i < R
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float64)
    for k in range(0, R):
        w = tl.load(w_ptr + (layer * R + offs_i) * R + k, mask_i, other=0.0)
        hat = tl.load(hat_ptr + (layer * R + k) * D + offs_d, mask_d, other=0.0)
        acc += w[:, None] * hat.to(tl.float64)[None, :]
    v_ptrs = v_ptr + (layer * R + offs_i[:, None]) * D + offs_d[None, :]
    tl.store(v_ptrs, acc.to(tl.float32), mask_i[:, None] & mask_d[None, :])


@triton.jit
def chain_bwd_kernel(
    ds_ptr, t_ptr, dt_ptr,    # (L, R, R) float64, (L, R, R) (L, R, R) float32
    R,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C rows of ds = -tᵀ dt tᵀ."""
    layer = tl.program_id(1).to(tl.int64)
    t_ptr += layer * R * R
    dt_ptr += layer * R * R
    offs_i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_j = tl.arange(0, BLOCK_R)
    mask_i = offs_i < R
    mask_j = offs_j < R
    left = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)  # tᵀ dt
    for k in range(0, R):
        t = tl.load(t_ptr + k * R + offs_i, mask_i, other=0.0).to(tl.float64)
        dt = tl.load(dt_ptr + k * R + offs_j, mask_j, other=0.0).to(tl.float64)
        left += t[:, None] * dt[None, :]
    ds = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)
    for k in range(0, R):
        column = tl.sum(tl.where((offs_j == k)[None, :], left, 0.0), axis=1)
        t = tl.load(t_ptr + offs_j * R + k, mask_j, other=0.0).to(tl.float64)
        ds -= column[:, None] * t[None, :]
    ds_ptrs = ds_ptr + (layer * R + offs_i[:, None]) * R + offs_j[None, :]
    tl.store(ds_ptrs, ds, mask_i[:, None] & mask_j[None, :])


@triton.jit
def gram_schmidt_bwd_kernel(
    n_ptr, inverse_ptr, k_ptr,    # (L, R, R) (L, R, R) (L, splits, R, R) float64
    R, num_splits,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_C rows of n = -l⁻ᵀ w, w = tril(k) + tril(k, -1)ᵀ, k = dv vᵀ."""
    layer = tl.program_id(1).to(tl.int64)
    k_ptr += layer * num_splits * R * R
    offs_i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_j = tl.arange(0, BLOCK_R)
    offs_s = tl.arange(0, BLOCK_S)
    mask_i = offs_i < R
    mask_j = offs_j < R
    n = tl.zeros((BLOCK_C, BLOCK_R), tl.float64)
    for k in range(0, R):
        offsets = tl.maximum(offs_j, k) * R + tl.minimum(offs_j, k)
        mask = (offs_s < num_splits)[:, None] & mask_j[None, :]
        w = tl.sum(tl.load(k_ptr + (offs_s * R * R)[:, None] + offsets[None, :], mask, other=0.0), axis=0)
        inverse = tl.load(inverse_ptr + (layer * R + k) * R + offs_i, mask_i, other=0.0)
        n -= inverse[:, None] * w[None, :]
    n_ptrs = n_ptr + (layer * R + offs_i[:, None]) * R + offs_j[None, :]
    tl.store(n_ptrs, n, mask_i[:, None] & mask_j[None, :])


@triton.jit
def _load_ds(ds_ptr, row, k, mask, R):
    """(dg + dgᵀ)[row, k] without the pair's own term"""
    return tl.load(ds_ptr + tl.minimum(row, k) * R + tl.maximum(row, k), mask, other=0.0)


@triton.jit
def _sum_of_parts(
    parts_ptr, num_parts, offs_i, mask_i, offs_j, mask_j, columns, rows, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """[BLOCK_I, BLOCK_J] of the sum of (parts, rows, columns) float32, one part after the other"""
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    offsets = (offs_i * columns)[:, None] + offs_j[None, :]
    mask = mask_i[:, None] & mask_j[None, :]
    for part in range(0, num_parts):
        acc += tl.load(parts_ptr + tl.cast(part, tl.int64) * rows * columns + offsets, mask, other=0.0)
    return acc


@triton.jit
def _chain_ds(t_ptr, dt, offs_i, offs_j, R, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Rows offs_i of ds = -tᵀ dt tᵀ, float64 [BLOCK_I, BLOCK_J], of dt [BLOCK_J, BLOCK_J] float32"""
    mask_i = offs_i < R
    mask_j = offs_j < R
    left = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)  # tᵀ dt
    for k in range(0, R):
        t = tl.load(t_ptr + k * R + offs_i, mask_i, other=0.0).to(tl.float64)
        row = tl.sum(tl.where((offs_j == k)[:, None], dt, 0.0), axis=0)
        left += t[:, None] * row.to(tl.float64)[None, :]
    ds = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)
    for k in range(0, R):
        column = tl.sum(tl.where((offs_j == k)[None, :], left, 0.0), axis=1)
        t = tl.load(t_ptr + offs_j * R + k, mask_j, other=0.0).to(tl.float64)
        ds -= column[:, None] * t[None, :]
    return ds


@triton.jit
def chain_bwd_share(
    share, num_shares, ds_ptr, scale_ptr, phi_ptr, u_ptr, t_ptr, dt_parts_ptr,
    # (R, R) (R,) (R,) float64, (D, R), (R, R), (parts, R, R) float32
    D, R, stride_ud, stride_ur, dt_parts_count,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `factor_bwd_kernel` needs of one chain, for another kernel's idle programs: ds by the first, which is the
    last to get pairs."""
    # outside of the loop, which would keep what it needs in registers
    if share == 0:
        offs = tl.arange(0, BLOCK_R)
        mask = offs < R
        dt = _sum_of_parts(dt_parts_ptr, dt_parts_count, offs, mask, offs, mask, R, R, BLOCK_R, BLOCK_R)
        ds = _chain_ds(t_ptr, dt, offs, offs, R, BLOCK_R, BLOCK_R)
        tl.store(ds_ptr + (offs * R)[:, None] + offs[None, :], ds, mask[:, None] & mask[None, :])
    for pair in range(num_shares - 1 - share, tl.cdiv(R, 2 * BLOCK_P), num_shares):
        first = 2 * (pair * BLOCK_P + tl.arange(0, BLOCK_P))
        scale_a, scale_b, phi_exponent = _pair_scales(u_ptr, stride_ud, stride_ur, first, R, D, BLOCK_P, BLOCK_D, True)
        tl.store(scale_ptr + first, scale_a, first < R)
        tl.store(scale_ptr + first + 1, scale_b, first + 1 < R)
        tl.store(phi_ptr + first, _power_of_two(phi_exponent), first < R)


@triton.jit(do_not_specialize=["dv_parts_count"])
def factor_bwd_kernel(
    du_ptr, dv_ptr, v_ptr, w_ptr, inverse_ptr, scale_ptr, phi_ptr,
    # (L, D, R) u's dtype, (parts, R, D) or (L, R, D), (L, R, D) float32, (L, R, R) (L, R, R) (L, R) (L, R) float64
    D, R, dv_parts_count,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, APPLY_GS: tl.constexpr,
):  # fmt: skip
    """du from dûᵀ = dv + (dg + dgᵀ) v, w = ds (chain), or dûᵀ = l⁻ᵀ dv + w v, w = n (Gram-Schmidt).

    dv may be left in partial sums, of one chain; they are added in the order of `sum_kernel`.
    """
    layer = tl.program_id(2).to(tl.int64)
    v_ptr += layer * R * D
    dv_ptr += layer * R * D
    w_ptr += layer * R * R
    first = 2 * (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P))
    second = first + 1
    mask_a = first < R
    mask_b = second < R
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    scale_a = tl.load(scale_ptr + layer * R + first, mask_a, other=0.0)
    scale_b = tl.load(scale_ptr + layer * R + second, mask_b, other=0.0)
    acc_a = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
    acc_b = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
    for k in range(0, R):
        v = tl.load(v_ptr + k * D + offs_d, mask_d, other=0.0).to(tl.float64)[None, :]
        if APPLY_GS:
            w_a = tl.load(w_ptr + first * R + k, mask_a, other=0.0)
            w_b = tl.load(w_ptr + second * R + k, mask_b, other=0.0)
            dv = tl.load(dv_ptr + k * D + offs_d, mask_d, other=0.0).to(tl.float64)[None, :]
            inverse_a = tl.load(inverse_ptr + (layer * R + k) * R + first, mask_a, other=0.0)
            inverse_b = tl.load(inverse_ptr + (layer * R + k) * R + second, mask_b, other=0.0)
            acc_a += inverse_a[:, None] * dv
            acc_b += inverse_b[:, None] * dv
        else:
            w_a = _load_ds(w_ptr, first, k, mask_a, R)
            w_b = _load_ds(w_ptr, second, k, mask_b, R)
        acc_a += w_a[:, None] * v
        acc_b += w_b[:, None] * v
    if not APPLY_GS:
        mask = mask_d[None, :]
        acc_a += _sum_of_parts(dv_ptr, dv_parts_count, first, mask_a, offs_d, mask_d, D, R, BLOCK_P, BLOCK_D)
        acc_b += _sum_of_parts(dv_ptr, dv_parts_count, second, mask_b, offs_d, mask_d, D, R, BLOCK_P, BLOCK_D)
        has_both = (scale_a != 0) & (scale_b != 0)
        phi = tl.load(phi_ptr + layer * R + first, mask_a, other=1.0)
        above = tl.load(w_ptr + first * R + second, has_both, other=0.0)
        below = tl.load(w_ptr + second * R + first, has_both, other=0.0)
        v = tl.load(v_ptr + (first * D)[:, None] + offs_d[None, :], mask_a[:, None] & mask, other=0.0)
        acc_a += ((above - below) / phi)[:, None] * v.to(tl.float64)
        acc_b = acc_b / phi[:, None]
        acc_a -= tl.where(has_both[:, None], acc_b, 0.0)
    du_ptrs = du_ptr + (layer * D + offs_d[None, :]) * R
    du_a = tl.where((scale_a != 0)[:, None], acc_a * scale_a[:, None], 0.0).to(du_ptr.dtype.element_ty)
    du_b = tl.where((scale_b != 0)[:, None], acc_b * scale_b[:, None], 0.0).to(du_ptr.dtype.element_ty)
    tl.store(du_ptrs + first[:, None], du_a, mask_a[:, None] & mask_d[None, :])
    tl.store(du_ptrs + second[:, None], du_b, mask_b[:, None] & mask_d[None, :])
