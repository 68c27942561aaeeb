"""Launches of `triton_kernels`: reflections and their gradients.

Forward and dx are one launch up to 64 columns, three above. A backward is two launches up to 32 columns, five up to 64,
six above, one more where partial sums have to be added up. Nothing is specialized on M: a new batch size compiles
nothing.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hra_kernels.backends import triton_launch, tuning
from hra_kernels.backends.triton_launch import (
    Launch,
    cdiv,
    float32_precision,
    num_warps,
    on,
    planned,
    power_of_two_above,
)

FUSED_RANK = 64
"""Up to here p and m of a row block fit on the chip. More columns go 64 at a time through kernels of their own."""

FUSED_BACKWARD_RANK = 32
"""Up to here q, p, m and dt do. More columns spill registers: the products of size R are kernels of their own."""


class Rows(NamedTuple):
    """What a launch follows from: rows of a tensor, the columns of its chain, and where."""

    M: int
    D: int
    R: int
    dtype: torch.dtype
    device: torch.device


def _mode(dtype: torch.dtype, R: int) -> dict[str, object]:
    """The constants every kernel of `triton_kernels` takes, explained there."""
    split = 0 if dtype == torch.float32 else 1 if R <= 8 else 2
    block_r = power_of_two_above(R, 16) if R <= FUSED_RANK else FUSED_RANK
    return {"BLOCK_R": block_r, "SPLIT": split, "PRECISION": float32_precision()}


def v_scale(dtype: torch.dtype) -> float:
    """What v is multiplied by, and its products divided by, where it meets x: float16 has no small numbers."""
    return 256.0 if dtype == torch.float16 else 1.0


def require_int_offsets(op: str, v: Tensor) -> None:
    if v.numel() >= 2**31:
        raise ValueError(f"{op}: v must have fewer than 2^31 elements, got {v.shape[0]} x {v.shape[1]}")


def _m_strides(t_strides: tuple[int, int], transpose: bool) -> dict[str, int]:
    stride_i, stride_j = reversed(t_strides) if transpose else t_strides
    return {"stride_mi": stride_i, "stride_mj": stride_j}


def _config(name: str, rows: Rows) -> tuning.LaunchConfig:
    with on(rows.device):
        return tuning.select_config(name, rows.dtype.itemsize, rows.R, rows.M, rows.D)


def _launch(name: str, config: tuning.LaunchConfig, grid: tuple[int, ...], rows: Rows, **arguments) -> Launch:
    return Launch(
        getattr(triton_launch.kernels(), name), grid, rows.device, M=rows.M, D=rows.D, R=rows.R, **arguments,
        **_mode(rows.dtype, rows.R), BLOCK_M=config.block_m, BLOCK_D=config.block_d,
        num_warps=num_warps(config), num_stages=config.num_stages,
    )  # fmt: skip


# --- more columns than a tile holds -----------------------------------------------------------------------------------


@planned
def _product_launch(
    device: torch.device, rows: int, cols: int, inner: int, splits: int, alpha: float,
    c_strides: tuple[int, int], a_strides: tuple[int, int], b_strides: tuple[int, int],
) -> Launch:  # fmt: skip
    config = tuning.PRODUCT_CONFIG
    block, block_k = config.block_m, config.block_d
    return Launch(
        triton_launch.kernels().product_kernel, (cdiv(cols, block) * cdiv(rows, block), splits), device,
        rows=rows, cols=cols, inner=inner, inner_per_split=cdiv(cdiv(inner, splits), block_k) * block_k,
        stride_ci=c_strides[0], stride_cj=c_strides[1], stride_ai=a_strides[0], stride_ak=a_strides[1],
        stride_bk=b_strides[0], stride_bj=b_strides[1], alpha=alpha,
        BLOCK_I=block, BLOCK_J=block, BLOCK_K=block_k, PRECISION=float32_precision(),
        num_warps=num_warps(config), num_stages=config.num_stages,
    )  # fmt: skip


def _product(c: Tensor, a: Tensor, b: Tensor, splits: int, alpha: float, strides: tuple[int, int]) -> None:
    """c (splits, rows, cols) = alpha a b, the inner axis in `splits` parts; `strides` of c's last two axes."""
    (rows, inner), cols = a.shape, b.shape[1]
    launch = _product_launch(a.device, rows, cols, inner, splits, alpha, strides, a.stride(), b.stride())
    launch(c_ptr=c, a_ptr=a, b_ptr=b)


@planned
def _project_launch(rows: Rows, stride_xm: int) -> Launch:
    config = _config("project", rows)
    grid = (cdiv(rows.R, FUSED_RANK) * cdiv(rows.M, config.block_m),)
    return _launch("project_kernel", config, grid, rows, stride_xm=stride_xm, V_SCALE=v_scale(rows.dtype))


@planned
def _combine_launch(rows: Rows, stride_ym: int, stride_xm: int) -> Launch:
    config = _config("combine", rows)
    grid = (cdiv(rows.D, config.block_d) * cdiv(rows.M, config.block_m),)
    return _launch("combine_kernel", config, grid, rows, stride_ym=stride_ym, stride_xm=stride_xm)


# --- forward and dx ---------------------------------------------------------------------------------------------------


@functools.cache
def _chip(device: torch.device) -> tuple[int, int] | None:
    """(multiprocessors, bytes of L2), None where no GPU is"""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _most_row_blocks(rows: Rows, block_m: int) -> int:
    """Row blocks of x that may be in flight for their second sweep to find them in L2, and no processor idle."""
    chip = _chip(rows.device)
    if chip is None:
        return rows.M
    processors, cache = chip
    return processors * max(1, int(tuning.L2_SHARE * cache) // (processors * block_m * rows.D * rows.dtype.itemsize))


@planned
def _reflect_launch(rows: Rows, stride_xm: int, t_strides: tuple[int, int], transpose: bool, need_p: bool) -> Launch:
    config = _config("reflect", rows)
    programs = min(cdiv(rows.M, config.block_m), _most_row_blocks(rows, config.block_m))
    return _launch(
        "reflect_kernel", config, (programs,), rows,
        stride_ym=rows.D, stride_xm=stride_xm, **_m_strides(t_strides, transpose),
        V_SCALE=v_scale(rows.dtype), NEED_P=need_p, STAGES=config.num_stages,
    )  # fmt: skip


def reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool, need_p: bool) -> tuple[Tensor, Tensor | None]:
    """y (M, D), and p (M, R) if needed, of `Backend.reflect_fwd`."""
    shape, dtype, device = x.shape, x.dtype, x.device
    M, D = shape
    R = v.shape[0]
    require_int_offsets("reflect_fwd" if need_p else "reflect_dx", v)
    y = triton_launch.empty(shape, dtype, device)
    p = triton_launch.empty((M, R), torch.float32, device) if need_p or R > FUSED_RANK else None
    if M == 0 or D == 0 or R == 0:
        return y.copy_(x), p.zero_() if p is not None else None
    v, rows, stride_xm = v.contiguous(), Rows(M, D, R, dtype, device), x.stride(0)
    if R <= FUSED_RANK:
        launch = _reflect_launch(rows, stride_xm, t.stride(), transpose, need_p)
        launch(y_ptr=y, p_ptr=p if need_p else y, x_ptr=x, v_ptr=v, m_ptr=t)
    else:
        s = triton_launch.empty((M, R), torch.float32, device)
        _project_launch(rows, stride_xm)(p_ptr=p, x_ptr=x, v_ptr=v)
        _product(s[None], p, t.mT if transpose else t, 1, 1.0, (R, 1))
        _combine_launch(rows, D, stride_xm)(y_ptr=y, x_ptr=x, s_ptr=s, v_ptr=v)
    return y, p


# --- backward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """What the columns' kernel computes beside dx and dv, for the gradient of u (D, R)."""

    u: Tensor
    ds: Tensor
    scale: Tensor
    phi: Tensor


@planned
def _rows_launch(
    rows: Rows, stride_dym: int, t_strides: tuple[int, int], transpose: bool
) -> tuple[Launch, tuple[int, int, int]]:
    """And the shape of dt's partial sums."""
    config, R = _config("backward_rows", rows), rows.R
    programs = min(cdiv(rows.M, config.block_m), tuning.ROW_PROGRAMS)
    stride_ti, stride_tj = (1, R) if transpose else (R, 1)
    launch = _launch(
        "backward_rows_kernel", config, (programs,), rows,
        stride_dym=stride_dym, **_m_strides(t_strides, transpose), stride_ti=stride_ti, stride_tj=stride_tj,
        V_SCALE=v_scale(rows.dtype),
    )  # fmt: skip
    return launch, (programs, R, R)


def _rows_bwd(dy: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, rows: Rows) -> tuple[Tensor, ...]:
    """q mᵀ and p m (M, R) for q = dy vᵀ, and dt (parts, R, R)."""
    M, _, R, _, device = rows
    qm = triton_launch.empty((M, R), torch.float32, device)
    s = triton_launch.empty((M, R), torch.float32, device)
    if R <= FUSED_BACKWARD_RANK:
        launch, shape = _rows_launch(rows, dy.stride(0), t.stride(), transpose)
        dt_parts = triton_launch.empty(shape, torch.float32, device)
        launch(qm_ptr=qm, s_ptr=s, dt_ptr=dt_parts, dy_ptr=dy, v_ptr=v, p_ptr=p, m_ptr=t)
    else:
        dt_parts = triton_launch.empty((min(cdiv(M, 512), 64), R, R), torch.float32, device)
        q = triton_launch.empty((M, R), torch.float32, device)
        m = t.mT if transpose else t
        _project_launch(rows, dy.stride(0))(p_ptr=q, x_ptr=dy, v_ptr=v)
        _product(qm[None], q, m.mT, 1, 1.0, (R, 1))
        _product(s[None], p, m, 1, 1.0, (R, 1))
        _product(dt_parts, p.mT, q, dt_parts.shape[0], -1.0, (1, R) if transpose else (R, 1))
    return qm, s, dt_parts


def _column_splits(rows: Rows, block_m: int, block_d: int) -> tuple[int, int]:
    """(rows a split, splits) for `backward_columns_kernel`, of which dv's partial sums are one a split."""
    strips = cdiv(rows.D, block_d)
    blocks = cdiv(rows.M, block_m)
    per_split = cdiv(blocks, max(1, min(blocks, tuning.COLUMN_PROGRAMS // strips))) * block_m
    return per_split, cdiv(rows.M, per_split)


@planned
def _columns_launch(
    rows: Rows, stride_dym: int, stride_xm: int, u_strides: tuple[int, int], chain: bool, dt_parts_count: int
) -> tuple[Launch, tuple[int, int, int]]:
    """And the shape of dv's partial sums."""
    D, R = rows.D, rows.R
    config = _config("backward_columns" if R <= FUSED_RANK else "backward_dv", rows)
    rows_per_split, splits = _column_splits(rows, config.block_m, config.block_d)
    launch = _launch(
        "backward_columns_kernel", config,
        (splits, cdiv(D, config.block_d) + chain, cdiv(R, _mode(rows.dtype, R)["BLOCK_R"])), rows,
        rows_per_split=rows_per_split, stride_dxm=D, stride_dym=stride_dym, stride_xm=stride_xm,
        stride_ud=u_strides[0], stride_ur=u_strides[1], dt_parts_count=dt_parts_count,
        NEED_DX=R <= FUSED_RANK, STAGES=config.num_stages, CHAIN=chain,
        BLOCK_P=tuning.SCALE_PAIRS, SCALE_BLOCK_D=tuning.SCALE_BLOCK_D,
    )  # fmt: skip
    return launch, (splits, R, D)


def bwd_parts(
    dx: Tensor, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, chain: Chain | None = None
) -> tuple[Tensor, Tensor]:
    """(dv (parts, R, D), dt (parts, R, R)); fills dx, and the chain's tensors."""
    (M, D), R = x.shape, v.shape[0]
    rows, stride_dym = Rows(M, D, R, x.dtype, x.device), dy.stride(0)
    qm, s, dt_parts = _rows_bwd(dy, v, t, p, transpose, rows)
    if R > FUSED_RANK:
        _combine_launch(rows, D, stride_dym)(y_ptr=dx, x_ptr=dy, s_ptr=qm, v_ptr=v)
    ds, scale, phi, u = (chain.ds, chain.scale, chain.phi, chain.u) if chain else (qm, qm, qm, qm)
    launch, shape = _columns_launch(rows, stride_dym, x.stride(0), u.stride(), chain is not None, dt_parts.shape[0])
    dv_parts = triton_launch.empty(shape, torch.float32, rows.device)
    launch(
        dx_ptr=dx if R <= FUSED_RANK else x, dv_ptr=dv_parts, dy_ptr=dy, x_ptr=x, v_ptr=v, qm_ptr=qm, s_ptr=s,
        ds_ptr=ds, scale_ptr=scale, phi_ptr=phi, u_ptr=u, t_ptr=t, dt_parts_ptr=dt_parts,
    )  # fmt: skip
    return dv_parts, dt_parts


@planned
def _sum_launch(device: torch.device, dv_size: int, dt_size: int, dv_parts_count: int, dt_parts_count: int) -> Launch:
    programs = cdiv(dv_size, tuning.SUM_BLOCK) + cdiv(dt_size, tuning.SUM_BLOCK)
    return Launch(
        triton_launch.kernels().sum_kernel, (programs,), device,
        dv_size=dv_size, dt_size=dt_size, dv_parts_count=dv_parts_count, dt_parts_count=dt_parts_count,
        BLOCK=tuning.SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def sums(dv_parts: Tensor, dt_parts: Tensor) -> tuple[Tensor, Tensor]:
    """dv and dt of their partial sums; a single part is its own sum."""
    dv, dt = (parts[0] if len(parts) == 1 else triton_launch.empty(parts.shape[1:], parts.dtype, parts.device)
              for parts in (dv_parts, dt_parts))  # fmt: skip
    dv_size = dv.numel() if len(dv_parts) > 1 else 0
    dt_size = dt.numel() if len(dt_parts) > 1 else 0
    if dv_size or dt_size:
        launch = _sum_launch(dv.device, dv_size, dt_size, len(dv_parts), len(dt_parts))
        launch(dv_ptr=dv, dt_ptr=dt, dv_parts_ptr=dv_parts, dt_parts_ptr=dt_parts)
    return dv, dt
