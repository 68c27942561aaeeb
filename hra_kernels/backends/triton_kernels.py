"""Triton kernels of `reflect`: y = x - (x vᵀ) m v forward, (dx, dv, dt) backward. Launched by `triton_backend`.

    forward    one program owns BLOCK_M rows and sweeps D twice: p = x vᵀ, then y = x - (p m) v, the second sweep in
               reverse order so that it starts with what the caches still hold. 2 M D elements through device memory.
    backward   p is saved, so the first sweep needs dy alone: q = dy vᵀ, then q mᵀ, p m and pᵀ q, all of size R.
               The second kernel owns a strip of columns, keeps v and dv of it on the chip, and reads dy and x once:
               4 M D elements, less what L2 still holds of dy. Row splits leave partial sums that `sum_kernel` adds
               up in a fixed order: two runs agree bit for bit, and the partials are 1/64 of x at R = 8.
               Adding dv atomically would save only those bytes.

Precision: 16-bit x is multiplied as it is; v and s = p m are pairs hi + lo of 16-bit values; sums are float32. Modes:

    SPLIT = 0  float32 x: float32 operands, three-pass tf32 or ieee (PRECISION)
    SPLIT = 1  16-bit x, R <= 8: one tile of 16 rows holds [hi | lo], where the matrix units would have padding
    SPLIT = 2  16-bit x, R <= 16: one product for each of hi and lo
    SPLIT = 3  16-bit x, R > 16: the same, but v_ptr is what `halves_kernel` has made of v. Loops that split v in
               registers leave none for tiles of a useful size; halves go from memory to the matrix units as they are.
               A launch more takes longer than what it would save up to 16 columns.

Where no operand is x, y or a gradient, the pairs are bfloat16 also for float16 tensors: s spans more than float16 does.
Where one is, float16 operands are scaled by powers of two, which is exact.
"""

import triton
import triton.language as tl

from hra_kernels.backends.triton_factor_kernels import chain_bwd_share


@triton.jit
def _rank_offsets(R, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr):
    """(row of v that each row of a rank tile holds, whether there is one, whether it holds the hi part)"""
    offs = tl.arange(0, BLOCK_R)
    if SPLIT == 1:
        half: tl.constexpr = BLOCK_R // 2
        return offs % half, (offs % half) < R, offs < half
    else:
        return offs, offs < R, offs < BLOCK_R


@triton.jit
def _split(a, dtype: tl.constexpr):
    """(hi, lo) of a float32 tile"""
    hi = a.to(dtype)
    return hi, (a - hi.to(tl.float32)).to(dtype)


@triton.jit
def _packed(a, is_hi, dtype: tl.constexpr):
    """One tile that is hi where is_hi and lo elsewhere; `a` repeats itself there"""
    hi, lo = _split(a, dtype)
    return tl.where(is_hi, hi, lo)


@triton.jit
def _fold(a, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_M, BLOCK_R] -> [BLOCK_M, BLOCK_R / 2], the sum of the hi and the lo half"""
    return tl.sum(tl.reshape(a, (BLOCK_M, 2, BLOCK_R // 2)), axis=1)


@triton.jit
def _bfloat16_halves(halves_ptr, R, D):
    """Those of v's halves that meet no x, y or gradient; of v itself, v"""
    if halves_ptr.dtype.element_ty == tl.float16:
        return (halves_ptr + 2 * tl.cast(R, tl.int64) * D).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        return halves_ptr


@triton.jit
def _load_v(v_ptrs, R, D, mask, SPLIT: tl.constexpr):
    """(hi, lo) of a tile with SPLIT = 3, else the tile twice"""
    v = tl.load(v_ptrs, mask, other=0.0)
    if SPLIT == 3:
        return v, tl.load(v_ptrs + tl.cast(R, tl.int64) * D, mask, other=0.0)
    else:
        return v, v


@triton.jit
def _times_rows(x, v, lo, is_hi, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x vᵀ for x [BLOCK_M, BLOCK_D] in its own dtype, and v and lo [BLOCK_R, BLOCK_D] of `_load_v`, scaled"""
    if SPLIT == 0:
        return tl.dot(x, tl.trans(v), acc, input_precision=PRECISION)
    elif SPLIT == 1:
        return tl.dot(x, tl.trans(_packed(v, is_hi[:, None], x.dtype)), acc)
    else:
        hi = v
        if SPLIT == 2:
            hi, lo = _split(v, x.dtype)
        acc = tl.dot(x, tl.trans(lo), acc)
        return tl.dot(x, tl.trans(hi), acc)


@triton.jit
def _combine_rows(s, v, lo, is_hi, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + s v for s [BLOCK_M, BLOCK_R] float32, which repeats itself with SPLIT = 1, and v and lo of `_load_v`"""
    if SPLIT == 0:
        return tl.dot(s, v, acc, input_precision=PRECISION)
    elif SPLIT == 1:
        s_hi, s_lo = _split(s, tl.bfloat16)
        packed = _packed(v, is_hi[:, None], tl.bfloat16)
        acc = tl.dot(s_lo, packed, acc)
        return tl.dot(s_hi, packed, acc)
    else:
        s_hi, s_lo = _split(s, tl.bfloat16)
        v_hi, v_lo = v, lo
        if SPLIT == 2:
            v_hi, v_lo = _split(v, tl.bfloat16)
        acc = tl.dot(s_lo, v_hi, acc)
        acc = tl.dot(s_hi, v_lo, acc)
        return tl.dot(s_hi, v_hi, acc)


@triton.jit
def _project(
    x_ptr, v_ptr, v_rows, row_offsets, mask_m, D, R,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr, V_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x vᵀ [BLOCK_M, BLOCK_R] over all of D; with SPLIT = 1 its halves are yet to be added"""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    offs_r, mask_r, is_hi = _rank_offsets(R, BLOCK_R, SPLIT)
    for d0 in range(0, D, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(x_ptr + row_offsets[:, None] + offs_d[None, :], mask_m[:, None] & mask_d[None, :], other=0.0)
        v_ptrs = v_ptr + (offs_r * D)[:, None] + offs_d[None, :]
        v, lo = _load_v(v_ptrs, v_rows, D, mask_r[:, None] & mask_d[None, :], SPLIT)
        if SPLIT != 3:
            v = v * V_SCALE
        acc = _times_rows(x, v, lo, is_hi, acc, SPLIT, PRECISION)
    return acc * (1.0 / V_SCALE)


@triton.jit
def halves_kernel(
    halves_ptr, v_ptr,    # (2 or 4, R, D) 16 bits, (R, D) float32
    R, D,
    V_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hi and lo of V_SCALE v; for float16 tensors those of v in bfloat16 behind them."""
    size = tl.cast(R, tl.int64) * D
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    v = tl.load(v_ptr + offs, mask, other=0.0)
    hi, lo = _split(v * V_SCALE, halves_ptr.dtype.element_ty)
    tl.store(halves_ptr + offs, hi, mask)
    tl.store(halves_ptr + size + offs, lo, mask)
    if halves_ptr.dtype.element_ty == tl.float16:
        pairs_ptr = _bfloat16_halves(halves_ptr, R, D)
        hi, lo = _split(v, tl.bfloat16)
        tl.store(pairs_ptr + offs, hi, mask)
        tl.store(pairs_ptr + size + offs, lo, mask)


@triton.jit
def _load_m(m_ptr, stride_mi, stride_mj, offs_i, mask_i, offs_j, mask_j):
    """m [BLOCK_R, BLOCK_R]"""
    offsets = (offs_i * stride_mi)[:, None] + (offs_j * stride_mj)[None, :]
    return tl.load(m_ptr + offsets, mask_i[:, None] & mask_j[None, :], other=0.0)


@triton.jit
def _row_blocks(M, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr):
    """(first, end, step) of a program's blocks of rows. With SPLIT = 3 it has one: a loop over several holds what they
    have in common, m's addresses above all, in registers, and R = 64 spills."""
    pid = tl.program_id(0)
    if SPLIT == 3:
        return pid, pid + 1, 1
    else:
        return pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)


@triton.jit(do_not_specialize=["M"])
def reflect_kernel(
    y_ptr, p_ptr, x_ptr, v_ptr, m_ptr,    # (M, D) (M, R) (M, D) (R, D) (R, R)
    M, D, R, stride_ym, stride_xm, stride_mi, stride_mj,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    V_SCALE: tl.constexpr, PRECISION: tl.constexpr, NEED_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x - (x vᵀ) m v and p = x vᵀ for R <= BLOCK_R. Up to 16 columns the grid holds as many row blocks as L2."""
    offs_r, mask_r, is_hi = _rank_offsets(R, BLOCK_R, SPLIT)
    pairs_ptr = _bfloat16_halves(v_ptr, R, D)
    num_d = tl.cdiv(D, BLOCK_D)
    first, end, step = _row_blocks(M, BLOCK_M, SPLIT)
    for block in range(first, end, step):
        offs_m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        p = _project(
            x_ptr, v_ptr, R, offs_m * stride_xm, mask_m, D, R,
            BLOCK_M, BLOCK_D, BLOCK_R, SPLIT, V_SCALE, PRECISION,
        )  # fmt: skip
        # the columns of p repeat themselves with SPLIT = 1, so do rows and columns of m: the product adds the halves
        # of p and yields s twice, once for the hi and once for the lo rows of v
        m = _load_m(m_ptr, stride_mi, stride_mj, offs_r, mask_r, offs_r, mask_r)
        s = tl.dot(p, m, input_precision=PRECISION)
        if NEED_P:
            if SPLIT == 1:
                offs_p = tl.arange(0, BLOCK_R // 2)
                p = _fold(p, BLOCK_M, BLOCK_R)
                tl.store(p_ptr + (offs_m * R)[:, None] + offs_p[None, :], p, mask_m[:, None] & (offs_p < R)[None, :])
            else:
                tl.store(p_ptr + (offs_m * R)[:, None] + offs_r[None, :], p, mask_m[:, None] & mask_r[None, :])
        # a loop that names its stages has all of its loads pipelined, not only those that are multiplied
        for i in tl.range(0, num_d, num_stages=STAGES):
            offs_d = (num_d - 1 - i) * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            mask = mask_m[:, None] & mask_d[None, :]
            v_ptrs = pairs_ptr + (offs_r * D)[:, None] + offs_d[None, :]
            v, lo = _load_v(v_ptrs, R, D, mask_r[:, None] & mask_d[None, :], SPLIT)
            x_ptrs = x_ptr + (offs_m * stride_xm)[:, None] + offs_d[None, :]
            x = tl.load(x_ptrs, mask, other=0.0, eviction_policy="evict_first")
            acc = _combine_rows(s, v, lo, is_hi, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), SPLIT, PRECISION)
            y = (x.to(tl.float32) - acc).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + (offs_m * stride_ym)[:, None] + offs_d[None, :], y, mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["M"])
def project_kernel(
    p_ptr, x_ptr, v_ptr,    # (M, R) (M, D) (R, D)
    M, D, R, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    V_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = x vᵀ: one program for BLOCK_R of the columns."""
    # one axis for all programs: a grid's others end at 65535, which rows exceed. Columns are the faster index, so that
    # the other columns' programs find x in L2
    num_r = tl.cdiv(R, BLOCK_R)
    r0 = tl.program_id(0) % num_r * BLOCK_R
    pid_m = (tl.program_id(0) // num_r).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_r, mask_r, _ = _rank_offsets(R - r0, BLOCK_R, SPLIT)
    p = _project(
        x_ptr, v_ptr + r0.to(tl.int64) * D, R, offs_m * stride_xm, mask_m, D, R - r0,
        BLOCK_M, BLOCK_D, BLOCK_R, SPLIT, V_SCALE, PRECISION,
    )  # fmt: skip
    if SPLIT == 1:
        offs_r = tl.arange(0, BLOCK_R // 2)
        mask_r = offs_r < R
        p = _fold(p, BLOCK_M, BLOCK_R)
    tl.store(p_ptr + (offs_m * R)[:, None] + (r0 + offs_r)[None, :], p, mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def backward_rows_kernel(
    qm_ptr, s_ptr, dt_ptr, dy_ptr, v_ptr, p_ptr, m_ptr,    # (M, R) (M, R) (programs, R, R) (M, D) (R, D) (M, R) (R, R)
    M, D, R, stride_dym, stride_mi, stride_mj, stride_ti, stride_tj,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    V_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q mᵀ for q = dy vᵀ, s = p m, and each program's share of dt, which is -pᵀ q or its transpose; R <= BLOCK_R."""
    pid = tl.program_id(0)
    offs_r, mask_r, _ = _rank_offsets(R, BLOCK_R, SPLIT)
    offs_k = tl.arange(0, BLOCK_R)
    mask_k = offs_k < R
    acc_dm = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    first, end, step = _row_blocks(M, BLOCK_M, SPLIT)
    for block in range(first, end, step):
        offs_m = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        q = _project(
            dy_ptr, v_ptr, R, offs_m * stride_dym, mask_m, D, R,
            BLOCK_M, BLOCK_D, BLOCK_R, SPLIT, V_SCALE, PRECISION,
        )  # fmt: skip
        offsets = (offs_m * R)[:, None] + offs_k[None, :]
        mask = mask_m[:, None] & mask_k[None, :]
        p = tl.load(p_ptr + offsets, mask, other=0.0)
        # rows that repeat themselves with SPLIT = 1, as q's columns do
        mt = _load_m(m_ptr, stride_mj, stride_mi, offs_r, mask_r, offs_k, mask_k)
        tl.store(qm_ptr + offsets, tl.dot(q, mt, input_precision=PRECISION), mask)
        m = _load_m(m_ptr, stride_mi, stride_mj, offs_k, mask_k, offs_k, mask_k)
        tl.store(s_ptr + offsets, tl.dot(p, m, input_precision=PRECISION), mask)
        acc_dm = tl.dot(tl.trans(p), q, acc_dm, input_precision=PRECISION)
    if SPLIT == 1:
        offs_j = tl.arange(0, BLOCK_R // 2)
        acc_dm = _fold(acc_dm, BLOCK_R, BLOCK_R)
    else:
        offs_j = offs_k
    offsets = (offs_k * stride_ti)[:, None] + (offs_j * stride_tj)[None, :]
    tl.store(dt_ptr + pid.to(tl.int64) * R * R + offsets, -acc_dm, mask_k[:, None] & (offs_j < R)[None, :])


@triton.jit
def _transposed_product(s_t, x, is_hi, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + sᵀ x for sᵀ [BLOCK_R, BLOCK_M] float32, which repeats itself with SPLIT = 1, and x [BLOCK_M, BLOCK_D]"""
    if SPLIT == 0:
        return tl.dot(s_t, x, acc, input_precision=PRECISION)
    scaled = s_t
    if x.dtype == tl.float16:
        # each row by the power of two that brings its largest entry into [1, 2)
        bits = tl.max(tl.abs(s_t), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        scaled = s_t * ((254 << 23) - bits).to(tl.float32, bitcast=True)[:, None]
    if SPLIT == 1:
        product_of = _packed(scaled, is_hi[:, None], x.dtype)
        if x.dtype == tl.float16:
            return acc + tl.dot(product_of, x) * bits.to(tl.float32, bitcast=True)[:, None]
        else:
            return tl.dot(product_of, x, acc)
    else:
        hi, lo = _split(scaled, x.dtype)
        if x.dtype == tl.float16:
            product = tl.dot(hi, x, tl.dot(lo, x))
            return acc + product * bits.to(tl.float32, bitcast=True)[:, None]
        else:
            return tl.dot(hi, x, tl.dot(lo, x, acc))


@triton.jit
def _backward_columns(
    dx_ptr, dv_ptr, dy_ptr, x_ptr, v_ptr, qm_ptr, s_ptr,
    split, pid_d, M, D, R, rows_per_split, stride_dxm, stride_dym, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, NEED_DX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    r0 = tl.program_id(2) * BLOCK_R
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_r, mask_r, is_hi = _rank_offsets(R - r0, BLOCK_R, SPLIT)
    pairs_ptr = _bfloat16_halves(v_ptr, R, D)
    v_offsets = ((r0 + offs_r) * D)[:, None] + offs_d[None, :]
    v, lo = _load_v(pairs_ptr + v_offsets, R, D, mask_r[:, None] & mask_d[None, :], SPLIT)
    acc_dv = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = split.to(tl.int64) * rows_per_split
    end = tl.minimum(start + rows_per_split, M)
    for m0 in tl.range(start, end, BLOCK_M, num_stages=STAGES):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_d[None, :]
        dy = tl.load(dy_ptr + (offs_m * stride_dym)[:, None] + offs_d[None, :], mask, other=0.0)
        x_ptrs = x_ptr + (offs_m * stride_xm)[:, None] + offs_d[None, :]
        x = tl.load(x_ptrs, mask, other=0.0, eviction_policy="evict_first")
        # qm is read twice, as each product wants it: a load with two layouts to serve is not pipelined
        offsets_t = (r0 + offs_r)[:, None] + (offs_m * R)[None, :]
        mask_t = mask_r[:, None] & mask_m[None, :]
        s_t = tl.load(s_ptr + offsets_t, mask_t, other=0.0)
        qm_t = tl.load(qm_ptr + offsets_t, mask_t, other=0.0)
        acc_dv = _transposed_product(s_t, dy, is_hi, acc_dv, SPLIT, PRECISION)
        acc_dv = _transposed_product(qm_t, x, is_hi, acc_dv, SPLIT, PRECISION)
        if NEED_DX:
            r_offsets = (offs_m * R)[:, None] + (r0 + offs_r)[None, :]
            qm = tl.load(qm_ptr + r_offsets, mask_m[:, None] & mask_r[None, :], other=0.0)
            acc = _combine_rows(qm, v, lo, is_hi, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), SPLIT, PRECISION)
            dx = (dy.to(tl.float32) - acc).to(dx_ptr.dtype.element_ty)
            dx_ptrs = dx_ptr + (offs_m * stride_dxm)[:, None] + offs_d[None, :]
            tl.store(dx_ptrs, dx, mask, eviction_policy="evict_first")
    dv_ptrs = dv_ptr + (split.to(tl.int64) * R + r0) * D
    if SPLIT == 1:
        offs_h = tl.arange(0, BLOCK_R // 2)
        acc_dv = tl.sum(tl.reshape(acc_dv, (2, BLOCK_R // 2, BLOCK_D)), axis=0)
        tl.store(dv_ptrs + (offs_h * D)[:, None] + offs_d[None, :], -acc_dv, (offs_h < R)[:, None] & mask_d[None, :])
    else:
        tl.store(dv_ptrs + (offs_r * D)[:, None] + offs_d[None, :], -acc_dv, mask_r[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_split", "dt_parts_count"])
def backward_columns_kernel(
    dx_ptr, dv_ptr, dy_ptr, x_ptr, v_ptr, qm_ptr, s_ptr,    # (M, D) (splits, R, D) (M, D) (M, D) (R, D) (M, R) (M, R)
    ds_ptr, scale_ptr, phi_ptr, u_ptr, t_ptr, dt_parts_ptr,    # of `chain_bwd_share`, if CHAIN
    M, D, R, rows_per_split, stride_dxm, stride_dym, stride_xm, stride_ud, stride_ur, dt_parts_count,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, NEED_DX: tl.constexpr, STAGES: tl.constexpr,
    CHAIN: tl.constexpr, BLOCK_P: tl.constexpr, SCALE_BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = dy - qm v (R <= BLOCK_R only) and this split's share of dv = -(sᵀ dy + qmᵀ x), for BLOCK_D columns.

    With CHAIN there is one strip more than D has: its programs do what else the chain's gradient needs, at once.
    """
    split = tl.program_id(0)
    # the last columns first: `backward_rows_kernel` has read them last, and L2 may still hold them
    pid_d = tl.num_programs(1) - 1 - tl.program_id(1)
    if CHAIN:
        if pid_d * BLOCK_D >= D:
            chain_bwd_share(
                split, tl.num_programs(0), ds_ptr, scale_ptr, phi_ptr, u_ptr, t_ptr, dt_parts_ptr,
                D, R, stride_ud, stride_ur, dt_parts_count, BLOCK_R, BLOCK_P, SCALE_BLOCK_D,
            )  # fmt: skip
        else:
            _backward_columns(
                dx_ptr, dv_ptr, dy_ptr, x_ptr, v_ptr, qm_ptr, s_ptr,
                split, pid_d, M, D, R, rows_per_split, stride_dxm, stride_dym, stride_xm,
                BLOCK_M, BLOCK_D, BLOCK_R, SPLIT, PRECISION, NEED_DX, STAGES,
            )  # fmt: skip
    else:
        _backward_columns(
            dx_ptr, dv_ptr, dy_ptr, x_ptr, v_ptr, qm_ptr, s_ptr,
            split, pid_d, M, D, R, rows_per_split, stride_dxm, stride_dym, stride_xm,
            BLOCK_M, BLOCK_D, BLOCK_R, SPLIT, PRECISION, NEED_DX, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def combine_kernel(
    y_ptr, x_ptr, s_ptr, v_ptr,    # (M, D) (M, D) (M, R) (R, D)
    M, D, R, stride_ym, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x - s v for R > BLOCK_R."""
    num_d = tl.cdiv(D, BLOCK_D)  # one axis for all programs, as in `project_kernel`
    pid_m = (tl.program_id(0) // num_d).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_d = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    pairs_ptr = _bfloat16_halves(v_ptr, R, D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        offs_r, mask_r, is_hi = _rank_offsets(R - r0, BLOCK_R, SPLIT)
        s_offsets = (offs_m * R)[:, None] + (r0 + offs_r)[None, :]
        s = tl.load(s_ptr + s_offsets, mask_m[:, None] & mask_r[None, :], other=0.0)
        v_offsets = ((r0 + offs_r) * D)[:, None] + offs_d[None, :]
        v, lo = _load_v(pairs_ptr + v_offsets, R, D, mask_r[:, None] & mask_d[None, :], SPLIT)
        acc = _combine_rows(s, v, lo, is_hi, acc, SPLIT, PRECISION)
    mask = mask_m[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + (offs_m * stride_xm)[:, None] + offs_d[None, :], mask, other=0.0)
    y = (x.to(tl.float32) - acc).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (offs_m * stride_ym)[:, None] + offs_d[None, :], y, mask)


@triton.jit(do_not_specialize=["rows", "inner", "inner_per_split"])
def product_kernel(
    c_ptr, a_ptr, b_ptr,    # (splits, rows, cols) (rows, inner) (inner, cols), float32
    rows, cols, inner, inner_per_split, stride_ci, stride_cj, stride_ai, stride_ak, stride_bk, stride_bj, alpha,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c = alpha a b, each split of the inner axis on its own: p m, q mᵀ and pᵀ q for R > BLOCK_R."""
    split = tl.program_id(1).to(tl.int64)
    num_j = tl.cdiv(cols, BLOCK_J)  # one axis for all tiles, as in `project_kernel`
    offs_i = (tl.program_id(0) // num_j).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.program_id(0) % num_j * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_i = offs_i < rows
    mask_j = offs_j < cols
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    end = tl.minimum((split + 1) * inner_per_split, inner)
    for k0 in range(split * inner_per_split, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < end
        a_ptrs = a_ptr + (offs_i * stride_ai)[:, None] + (offs_k * stride_ak)[None, :]
        b_ptrs = b_ptr + (offs_k * stride_bk)[:, None] + (offs_j * stride_bj)[None, :]
        a = tl.load(a_ptrs, mask_i[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask_k[:, None] & mask_j[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    c_ptrs = c_ptr + split * rows * cols + (offs_i * stride_ci)[:, None] + (offs_j * stride_cj)[None, :]
    tl.store(c_ptrs, alpha * acc, mask_i[:, None] & mask_j[None, :])


@triton.jit
def _sum_parts(out_ptr, parts_ptr, block, size, num_parts, BLOCK: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, num_parts):
        acc += tl.load(parts_ptr + tl.cast(part, tl.int64) * size + offs, mask, other=0.0)
    tl.store(out_ptr + offs, acc, mask)


@triton.jit(do_not_specialize=["dv_parts_count", "dt_parts_count"])
def sum_kernel(
    dv_ptr, dt_ptr, dv_parts_ptr, dt_parts_ptr,    # (dv_size,) (dt_size,) (dv_parts, dv_size) (dt_parts, dt_size)
    dv_size, dt_size, dv_parts_count, dt_parts_count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dv and dt from their partial sums, in a fixed order."""
    pid = tl.program_id(0)
    num_dv = tl.cdiv(dv_size, BLOCK)
    if pid < num_dv:
        _sum_parts(dv_ptr, dv_parts_ptr, pid, dv_size, dv_parts_count, BLOCK)
    else:
        _sum_parts(dt_ptr, dt_parts_ptr, pid - num_dv, dt_size, dt_parts_count, BLOCK)
