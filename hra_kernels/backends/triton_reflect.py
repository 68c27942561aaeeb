"""Launches of `triton_kernels`: reflections and their gradients.

Forward and dx are one launch up to 64 columns, three above. A backward is two launches up to 32 columns, five up to 64,
six above, one more where partial sums have to be added up. Nothing is specialized on M: a new batch size compiles
nothing.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_kernels.backends import triton_launch, tuning
from hra_kernels.backends.triton_launch import cdiv, float32_precision, num_warps, power_of_two_above

FUSED_RANK = 64
"""Up to here p and m of a row block fit on the chip. More columns go 64 at a time through kernels of their own."""

FUSED_BACKWARD_RANK = 32
"""Up to here q, p, m and dt do. More columns spill registers: the products of size R are kernels of their own."""


def _mode(x: Tensor, R: int) -> dict[str, object]:
    """The constants every kernel of `triton_kernels` takes, explained there."""
    split = 0 if x.dtype == torch.float32 else 1 if R <= 8 else 2
    block_r = power_of_two_above(R, 16) if R <= FUSED_RANK else FUSED_RANK
    return {"BLOCK_R": block_r, "SPLIT": split, "PRECISION": float32_precision()}


def v_scale(dtype: torch.dtype) -> float:
    """What v is multiplied by, and its products divided by, where it meets x: float16 has no small numbers."""
    return 256.0 if dtype == torch.float16 else 1.0


def require_int_offsets(op: str, v: Tensor) -> None:
    if v.numel() >= 2**31:
        raise ValueError(f"{op}: v must have fewer than 2^31 elements, got {v.shape[0]} x {v.shape[1]}")


def _m_strides(t: Tensor, transpose: bool) -> dict[str, int]:
    i, j = (1, 0) if transpose else (0, 1)
    return {"stride_mi": t.stride(i), "stride_mj": t.stride(j)}


def _config(name: str, x: Tensor, R: int) -> tuning.LaunchConfig:
    return tuning.select_config(name, x.element_size(), R, *x.shape)


def _launch(kernel, config: tuning.LaunchConfig, grid: tuple[int, ...], mode: dict, **arguments) -> None:
    kernel[grid](
        **arguments, **mode, BLOCK_M=config.block_m, BLOCK_D=config.block_d,
        num_warps=num_warps(config), num_stages=config.num_stages,
    )  # fmt: skip


def _product(c: Tensor, a: Tensor, b: Tensor, splits: int, alpha: float, strides: tuple[int, int]) -> None:
    """c (splits, rows, cols) = alpha a b, the inner axis in `splits` parts; `strides` of c's last two axes."""
    (rows, inner), cols = a.shape, b.shape[1]
    block = tuning.PRODUCT_CONFIG.block_m
    block_k = tuning.PRODUCT_CONFIG.block_d
    triton_launch.kernels().product_kernel[(cdiv(cols, block) * cdiv(rows, block), splits)](
        c_ptr=c, a_ptr=a, b_ptr=b, rows=rows, cols=cols, inner=inner,
        inner_per_split=cdiv(cdiv(inner, splits), block_k) * block_k,
        stride_ci=strides[0], stride_cj=strides[1], stride_ai=a.stride(0), stride_ak=a.stride(1),
        stride_bk=b.stride(0), stride_bj=b.stride(1), alpha=alpha,
        BLOCK_I=block, BLOCK_J=block, BLOCK_K=block_k, PRECISION=float32_precision(),
        num_warps=num_warps(tuning.PRODUCT_CONFIG), num_stages=tuning.PRODUCT_CONFIG.num_stages,
    )  # fmt: skip


def _project(p: Tensor, x: Tensor, v: Tensor, mode: dict) -> None:
    M, D = x.shape
    R = v.shape[0]
    config = _config("project", x, R)
    _launch(
        triton_launch.kernels().project_kernel, config, (cdiv(R, mode["BLOCK_R"]) * cdiv(M, config.block_m),), mode,
        p_ptr=p, x_ptr=x, v_ptr=v, M=M, D=D, R=R, stride_xm=x.stride(0), V_SCALE=v_scale(x.dtype),
    )  # fmt: skip


def _combine(y: Tensor, x: Tensor, s: Tensor, v: Tensor, mode: dict) -> None:
    M, D = x.shape
    config = _config("combine", x, v.shape[0])
    _launch(
        triton_launch.kernels().combine_kernel, config, (cdiv(D, config.block_d) * cdiv(M, config.block_m),), mode,
        y_ptr=y, x_ptr=x, s_ptr=s, v_ptr=v, M=M, D=D, R=v.shape[0], stride_ym=y.stride(0), stride_xm=x.stride(0),
    )  # fmt: skip


@functools.cache
def _chip(device: torch.device) -> tuple[int, int] | None:
    """(multiprocessors, bytes of L2), None where no GPU is"""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _most_row_blocks(x: Tensor, block_m: int) -> int:
    """Row blocks of x that may be in flight for their second sweep to find them in L2, and no processor idle."""
    chip = _chip(x.device)
    if chip is None:
        return x.shape[0]
    processors, cache = chip
    return processors * max(1, int(tuning.L2_SHARE * cache) // (processors * block_m * x.shape[1] * x.element_size()))


def reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool, need_p: bool) -> tuple[Tensor, Tensor | None]:
    (M, D), R = x.shape, v.shape[0]
    require_int_offsets("reflect_fwd" if need_p else "reflect_dx", v)
    y = triton_launch.empty((M, D), x.dtype, x.device)
    p = triton_launch.empty((M, R), torch.float32, x.device) if need_p or R > FUSED_RANK else None
    if M == 0 or D == 0 or R == 0:
        return y.copy_(x), p.zero_() if p is not None else None
    v = v.contiguous()
    mode = _mode(x, R)
    with torch.cuda.device_of(x):
        if R <= FUSED_RANK:
            config = _config("reflect", x, R)
            programs = min(cdiv(M, config.block_m), _most_row_blocks(x, config.block_m))
            _launch(
                triton_launch.kernels().reflect_kernel, config, (programs,), mode,
                y_ptr=y, p_ptr=p if need_p else y, x_ptr=x, v_ptr=v, m_ptr=t, M=M, D=D, R=R,
                stride_ym=y.stride(0), stride_xm=x.stride(0), **_m_strides(t, transpose),
                V_SCALE=v_scale(x.dtype), NEED_P=need_p, STAGES=config.num_stages,
            )  # fmt: skip
        else:
            s = triton_launch.empty((M, R), torch.float32, x.device)
            _project(p, x, v, mode)
            _product(s[None], p, t.mT if transpose else t, 1, 1.0, (R, 1))
            _combine(y, x, s, v, mode)
    return y, p


def _column_splits(M: int, D: int, R: int, block_m: int, block_d: int) -> tuple[int, int]:
    """(rows a split, splits) for `backward_columns_kernel`, of which dv's partial sums are one a split."""
    strips = cdiv(D, block_d)
    blocks = cdiv(M, block_m)
    rows = cdiv(blocks, max(1, min(blocks, tuning.COLUMN_PROGRAMS // strips))) * block_m
    return rows, cdiv(M, rows)


@dataclass(frozen=True)
class Chain:
    """What the columns' kernel computes beside dx and dv, for the gradient of u (D, R)."""

    u: Tensor
    ds: Tensor
    scale: Tensor
    phi: Tensor


def _rows_bwd(dy: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, mode: dict) -> tuple[Tensor, ...]:
    """q mᵀ and p m (M, R) for q = dy vᵀ, and dt (parts, R, R)."""
    (M, D), R = dy.shape, v.shape[0]
    qm = triton_launch.empty((M, R), torch.float32, dy.device)
    s = triton_launch.empty((M, R), torch.float32, dy.device)
    t_strides = (1, R) if transpose else (R, 1)
    if R <= FUSED_BACKWARD_RANK:
        config = _config("backward_rows", dy, R)
        dt_parts = triton_launch.empty(
            (min(cdiv(M, config.block_m), tuning.ROW_PROGRAMS), R, R), torch.float32, dy.device
        )
        _launch(
            triton_launch.kernels().backward_rows_kernel, config, (dt_parts.shape[0],), mode,
            qm_ptr=qm, s_ptr=s, dt_ptr=dt_parts, dy_ptr=dy, v_ptr=v, p_ptr=p, m_ptr=t, M=M, D=D, R=R,
            stride_dym=dy.stride(0), **_m_strides(t, transpose), stride_ti=t_strides[0], stride_tj=t_strides[1],
            V_SCALE=v_scale(dy.dtype),
        )  # fmt: skip
    else:
        dt_parts = triton_launch.empty((min(cdiv(M, 512), 64), R, R), torch.float32, dy.device)
        q = triton_launch.empty((M, R), torch.float32, dy.device)
        m = t.mT if transpose else t
        _project(q, dy, v, mode)
        _product(qm[None], q, m.mT, 1, 1.0, (R, 1))
        _product(s[None], p, m, 1, 1.0, (R, 1))
        _product(dt_parts, p.mT, q, dt_parts.shape[0], -1.0, t_strides)
    return qm, s, dt_parts


def _columns_bwd(
    dx: Tensor | None, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, qm: Tensor, s: Tensor, dt_parts: Tensor,
    chain: Chain | None, mode: dict,
) -> Tensor:  # fmt: skip
    """dv (parts, R, D); fills dx if given, and the chain's tensors."""
    (M, D), R = x.shape, v.shape[0]
    config = _config("backward_columns" if R <= FUSED_RANK else "backward_dv", x, R)
    rows_per_split, splits = _column_splits(M, D, R, config.block_m, config.block_d)
    dv_parts = triton_launch.empty((splits, R, D), torch.float32, x.device)
    strips = cdiv(D, config.block_d)
    ds, scale, phi, u = (chain.ds, chain.scale, chain.phi, chain.u) if chain else (qm, qm, qm, qm)
    _launch(
        triton_launch.kernels().backward_columns_kernel, config,
        (splits, strips + (chain is not None), cdiv(R, mode["BLOCK_R"])), mode,
        dx_ptr=x if dx is None else dx, dv_ptr=dv_parts, dy_ptr=dy, x_ptr=x, v_ptr=v, qm_ptr=qm, s_ptr=s,
        ds_ptr=ds, scale_ptr=scale, phi_ptr=phi, u_ptr=u, t_ptr=t, dt_parts_ptr=dt_parts,
        M=M, D=D, R=R, rows_per_split=rows_per_split, stride_dxm=D, stride_dym=dy.stride(0), stride_xm=x.stride(0),
        stride_ud=u.stride(0), stride_ur=u.stride(1), dt_parts_count=dt_parts.shape[0],
        NEED_DX=dx is not None, STAGES=config.num_stages, CHAIN=chain is not None,
        BLOCK_P=tuning.SCALE_PAIRS, SCALE_BLOCK_D=tuning.SCALE_BLOCK_D,
    )  # fmt: skip
    return dv_parts


def bwd_parts(
    dx: Tensor, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, chain: Chain | None = None
) -> tuple[Tensor, Tensor]:
    """(dv (parts, R, D), dt (parts, R, R)); fills dx, and the chain's tensors."""
    mode = _mode(x, v.shape[0])
    qm, s, dt_parts = _rows_bwd(dy, v, t, p, transpose, mode)
    fused = v.shape[0] <= FUSED_RANK
    if not fused:
        _combine(dx, dy, qm, v, mode)
    return _columns_bwd(dx if fused else None, dy, x, v, t, qm, s, dt_parts, chain, mode), dt_parts


def sums(dv_parts: Tensor, dt_parts: Tensor) -> tuple[Tensor, Tensor]:
    """dv and dt of their partial sums; a single part is its own sum."""
    dv, dt = (parts[0] if len(parts) == 1 else triton_launch.empty(parts.shape[1:], parts.dtype, parts.device)
              for parts in (dv_parts, dt_parts))  # fmt: skip
    dv_size = dv.numel() if len(dv_parts) > 1 else 0
    dt_size = dt.numel() if len(dt_parts) > 1 else 0
    if dv_size or dt_size:
        triton_launch.kernels().sum_kernel[(cdiv(dv_size, tuning.SUM_BLOCK) + cdiv(dt_size, tuning.SUM_BLOCK),)](
            dv_ptr=dv, dt_ptr=dt, dv_parts_ptr=dv_parts, dt_parts_ptr=dt_parts, dv_size=dv_size, dt_size=dt_size,
            dv_parts_count=len(dv_parts), dt_parts_count=len(dt_parts), BLOCK=tuning.SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return dv, dt
