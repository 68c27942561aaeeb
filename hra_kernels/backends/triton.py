"""The Triton backend: the operators of `ops` for any GPU that Triton supports, launched from here.

Kernels are in `triton_kernels` (reflect) and `triton_factor_kernels` (wy_factor), tile sizes in `tuning`. With
TRITON_INTERPRET=1 in the environment the same functions serve CPU tensors, through Triton's interpreter.

Forward and dx are one launch up to 64 columns, three above. A chain's backward is three launches up to 32 columns: what
its u needs rides along in programs of its own, so that a layer's training step is four. Otherwise `reflect_bwd` is two
launches up to 32 columns, five up to 64, six above, one more where partial sums have to be added up, and the factor's
backward is three. Nothing is specialized on M: a new batch size compiles nothing.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from hra_kernels.backends.base import Backend
from hra_kernels.backends.tuning import (
    COLUMN_PROGRAMS,
    GRAM_BLOCK_D,
    GRAM_COLUMNS,
    L2_SHARE,
    PRODUCT_CONFIG,
    ROW_PROGRAMS,
    SCALE_BLOCK_D,
    SCALE_PAIRS,
    SUM_BLOCK,
    LaunchConfig,
    factor_warps,
    gram_splits,
    select_config,
)

FUSED_RANK = 64
"""Up to here p and m of a row block fit on the chip. More columns go 64 at a time through kernels of their own."""

FUSED_BACKWARD_RANK = 32
"""Up to here q, p, m and dt do. More columns spill registers: the products of size R are kernels of their own."""

OLDEST_TRITON = (3, 4)
"""What the extra `triton` asks for; older ones come with PyTorch 2.6 and 2.7."""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_not_installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # builds for other GPUs have other names
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton must be {'.'.join(map(str, OLDEST_TRITON))} or newer, got {version}"
    return None


@functools.cache
def _is_too_old(device: torch.device) -> bool:
    return not _is_amd() and torch.cuda.get_device_capability(device) < (8, 0)


def _kernels():
    from hra_kernels.backends import triton_kernels  # Triton may be missing, and importing it takes a while

    return triton_kernels


def _factor_kernels():
    from hra_kernels.backends import triton_factor_kernels

    return triton_factor_kernels


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every tensor a kernel of this backend writes is allocated here."""
    return torch.empty(shape, dtype=dtype, device=device)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two_above(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _is_amd() -> bool:
    return torch.version.hip is not None


def _float32_precision() -> str:
    """How float32 tiles are multiplied: three passes of tf32 (1e-6 relative), on AMD by its float32 matrix units."""
    return "ieee" if _is_amd() else "tf32x3"


def _num_warps(config: LaunchConfig) -> int:
    """The same number of threads everywhere: AMD's warps (wavefronts) have 64 of them."""
    return max(1, config.num_warps // 2) if _is_amd() else config.num_warps


# --- reflect ----------------------------------------------------------------------------------------------------------


def _mode(x: Tensor, R: int) -> dict[str, object]:
    """The constants every kernel of `triton_kernels` takes, explained there."""
    split = 0 if x.dtype == torch.float32 else 1 if R <= 8 else 2
    block_r = _power_of_two_above(R, 16) if R <= FUSED_RANK else FUSED_RANK
    return {"BLOCK_R": block_r, "SPLIT": split, "PRECISION": _float32_precision()}


def _v_scale(dtype: torch.dtype) -> float:
    """What v is multiplied by, and its products divided by, where it meets x: float16 has no small numbers."""
    return 256.0 if dtype == torch.float16 else 1.0


def _require_int_offsets(op: str, v: Tensor) -> None:
    if v.numel() >= 2**31:
        raise ValueError(f"{op}: v must have fewer than 2^31 elements, got {v.shape[0]} x {v.shape[1]}")


def _m_strides(t: Tensor, transpose: bool) -> dict[str, int]:
    i, j = (1, 0) if transpose else (0, 1)
    return {"stride_mi": t.stride(i), "stride_mj": t.stride(j)}


def _config(name: str, x: Tensor, R: int) -> LaunchConfig:
    return select_config(name, x.element_size(), R, *x.shape)


def _launch(kernel, config: LaunchConfig, grid: tuple[int, ...], mode: dict, **arguments) -> None:
    kernel[grid](
        **arguments, **mode, BLOCK_M=config.block_m, BLOCK_D=config.block_d,
        num_warps=_num_warps(config), num_stages=config.num_stages,
    )  # fmt: skip


def _product(c: Tensor, a: Tensor, b: Tensor, splits: int, alpha: float, strides: tuple[int, int]) -> None:
    """c (splits, rows, cols) = alpha a b, the inner axis in `splits` parts; `strides` of c's last two axes."""
    (rows, inner), cols = a.shape, b.shape[1]
    block = PRODUCT_CONFIG.block_m
    block_k = PRODUCT_CONFIG.block_d
    _kernels().product_kernel[(_cdiv(cols, block) * _cdiv(rows, block), splits)](
        c_ptr=c, a_ptr=a, b_ptr=b, rows=rows, cols=cols, inner=inner,
        inner_per_split=_cdiv(_cdiv(inner, splits), block_k) * block_k,
        stride_ci=strides[0], stride_cj=strides[1], stride_ai=a.stride(0), stride_ak=a.stride(1),
        stride_bk=b.stride(0), stride_bj=b.stride(1), alpha=alpha,
        BLOCK_I=block, BLOCK_J=block, BLOCK_K=block_k, PRECISION=_float32_precision(),
        num_warps=_num_warps(PRODUCT_CONFIG), num_stages=PRODUCT_CONFIG.num_stages,
    )  # fmt: skip


def _project(p: Tensor, x: Tensor, v: Tensor, mode: dict) -> None:
    M, D = x.shape
    R = v.shape[0]
    config = _config("project", x, R)
    _launch(
        _kernels().project_kernel, config, (_cdiv(R, mode["BLOCK_R"]) * _cdiv(M, config.block_m),), mode,
        p_ptr=p, x_ptr=x, v_ptr=v, M=M, D=D, R=R, stride_xm=x.stride(0), V_SCALE=_v_scale(x.dtype),
    )  # fmt: skip


def _combine(y: Tensor, x: Tensor, s: Tensor, v: Tensor, mode: dict) -> None:
    M, D = x.shape
    config = _config("combine", x, v.shape[0])
    _launch(
        _kernels().combine_kernel, config, (_cdiv(D, config.block_d) * _cdiv(M, config.block_m),), mode,
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
    return processors * max(1, int(L2_SHARE * cache) // (processors * block_m * x.shape[1] * x.element_size()))


def _reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool, need_p: bool) -> tuple[Tensor, Tensor | None]:
    (M, D), R = x.shape, v.shape[0]
    _require_int_offsets("reflect_fwd" if need_p else "reflect_dx", v)
    y = _empty((M, D), x.dtype, x.device)
    p = _empty((M, R), torch.float32, x.device) if need_p or R > FUSED_RANK else None
    if M == 0 or D == 0 or R == 0:
        return y.copy_(x), p.zero_() if p is not None else None
    v = v.contiguous()
    mode = _mode(x, R)
    with torch.cuda.device_of(x):
        if R <= FUSED_RANK:
            config = _config("reflect", x, R)
            programs = min(_cdiv(M, config.block_m), _most_row_blocks(x, config.block_m))
            _launch(
                _kernels().reflect_kernel, config, (programs,), mode,
                y_ptr=y, p_ptr=p if need_p else y, x_ptr=x, v_ptr=v, m_ptr=t, M=M, D=D, R=R,
                stride_ym=y.stride(0), stride_xm=x.stride(0), **_m_strides(t, transpose),
                V_SCALE=_v_scale(x.dtype), NEED_P=need_p, STAGES=config.num_stages,
            )  # fmt: skip
        else:
            s = _empty((M, R), torch.float32, x.device)
            _project(p, x, v, mode)
            _product(s[None], p, t.mT if transpose else t, 1, 1.0, (R, 1))
            _combine(y, x, s, v, mode)
    return y, p


def _column_splits(M: int, D: int, R: int, block_m: int, block_d: int) -> tuple[int, int]:
    """(rows a split, splits) for `backward_columns_kernel`, of which dv's partial sums are one a split."""
    strips = _cdiv(D, block_d)
    blocks = _cdiv(M, block_m)
    rows = _cdiv(blocks, max(1, min(blocks, COLUMN_PROGRAMS // strips))) * block_m
    return rows, _cdiv(M, rows)


@dataclass(frozen=True)
class _Chain:
    """What the columns' kernel computes beside dx and dv, for the gradient of u (D, R)."""

    u: Tensor
    ds: Tensor
    scale: Tensor
    phi: Tensor


def _rows_bwd(dy: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, mode: dict) -> tuple[Tensor, ...]:
    """q mᵀ and p m (M, R) for q = dy vᵀ, and dt (parts, R, R)."""
    (M, D), R = dy.shape, v.shape[0]
    qm = _empty((M, R), torch.float32, dy.device)
    s = _empty((M, R), torch.float32, dy.device)
    t_strides = (1, R) if transpose else (R, 1)
    if R <= FUSED_BACKWARD_RANK:
        config = _config("backward_rows", dy, R)
        dt_parts = _empty((min(_cdiv(M, config.block_m), ROW_PROGRAMS), R, R), torch.float32, dy.device)
        _launch(
            _kernels().backward_rows_kernel, config, (dt_parts.shape[0],), mode,
            qm_ptr=qm, s_ptr=s, dt_ptr=dt_parts, dy_ptr=dy, v_ptr=v, p_ptr=p, m_ptr=t, M=M, D=D, R=R,
            stride_dym=dy.stride(0), **_m_strides(t, transpose), stride_ti=t_strides[0], stride_tj=t_strides[1],
            V_SCALE=_v_scale(dy.dtype),
        )  # fmt: skip
    else:
        dt_parts = _empty((min(_cdiv(M, 512), 64), R, R), torch.float32, dy.device)
        q = _empty((M, R), torch.float32, dy.device)
        m = t.mT if transpose else t
        _project(q, dy, v, mode)
        _product(qm[None], q, m.mT, 1, 1.0, (R, 1))
        _product(s[None], p, m, 1, 1.0, (R, 1))
        _product(dt_parts, p.mT, q, dt_parts.shape[0], -1.0, t_strides)
    return qm, s, dt_parts


def _columns_bwd(
    dx: Tensor | None, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, qm: Tensor, s: Tensor, dt_parts: Tensor,
    chain: _Chain | None, mode: dict,
) -> Tensor:  # fmt: skip
    """dv (parts, R, D); fills dx if given, and the chain's tensors."""
    (M, D), R = x.shape, v.shape[0]
    config = _config("backward_columns" if R <= FUSED_RANK else "backward_dv", x, R)
    rows_per_split, splits = _column_splits(M, D, R, config.block_m, config.block_d)
    dv_parts = _empty((splits, R, D), torch.float32, x.device)
    strips = _cdiv(D, config.block_d)
    ds, scale, phi, u = (chain.ds, chain.scale, chain.phi, chain.u) if chain else (qm, qm, qm, qm)
    _launch(
        _kernels().backward_columns_kernel, config,
        (splits, strips + (chain is not None), _cdiv(R, mode["BLOCK_R"])), mode,
        dx_ptr=x if dx is None else dx, dv_ptr=dv_parts, dy_ptr=dy, x_ptr=x, v_ptr=v, qm_ptr=qm, s_ptr=s,
        ds_ptr=ds, scale_ptr=scale, phi_ptr=phi, u_ptr=u, t_ptr=t, dt_parts_ptr=dt_parts,
        M=M, D=D, R=R, rows_per_split=rows_per_split, stride_dxm=D, stride_dym=dy.stride(0), stride_xm=x.stride(0),
        stride_ud=u.stride(0), stride_ur=u.stride(1), dt_parts_count=dt_parts.shape[0],
        NEED_DX=dx is not None, STAGES=config.num_stages, CHAIN=chain is not None,
        BLOCK_P=SCALE_PAIRS, SCALE_BLOCK_D=SCALE_BLOCK_D,
    )  # fmt: skip
    return dv_parts


def _bwd_parts(
    dx: Tensor, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, chain: _Chain | None = None
) -> tuple[Tensor, Tensor]:
    """(dv (parts, R, D), dt (parts, R, R)); fills dx, and the chain's tensors."""
    mode = _mode(x, v.shape[0])
    qm, s, dt_parts = _rows_bwd(dy, v, t, p, transpose, mode)
    fused = v.shape[0] <= FUSED_RANK
    if not fused:
        _combine(dx, dy, qm, v, mode)
    return _columns_bwd(dx if fused else None, dy, x, v, t, qm, s, dt_parts, chain, mode), dt_parts


def _sums(dv_parts: Tensor, dt_parts: Tensor) -> tuple[Tensor, Tensor]:
    """dv and dt of their partial sums; a single part is its own sum."""
    dv, dt = (parts[0] if len(parts) == 1 else _empty(parts.shape[1:], parts.dtype, parts.device)
              for parts in (dv_parts, dt_parts))  # fmt: skip
    dv_size = dv.numel() if len(dv_parts) > 1 else 0
    dt_size = dt.numel() if len(dt_parts) > 1 else 0
    if dv_size or dt_size:
        _kernels().sum_kernel[(_cdiv(dv_size, SUM_BLOCK) + _cdiv(dt_size, SUM_BLOCK),)](
            dv_ptr=dv, dt_ptr=dt, dv_parts_ptr=dv_parts, dt_parts_ptr=dt_parts, dv_size=dv_size, dt_size=dt_size,
            dv_parts_count=len(dv_parts), dt_parts_count=len(dt_parts), BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return dv, dt


# --- wy_factor --------------------------------------------------------------------------------------------------------


def _scale_rows(u: Tensor, pairs: bool, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale, φ), both (L, R) float64, of u (L, D, R); fills v (L, R, D) if given."""
    L, D, R = u.shape
    scale = _empty((L, R), torch.float64, u.device)
    phi = _empty((L, R), torch.float64, u.device)
    _factor_kernels().scale_rows_kernel[(_cdiv(R, 2 * SCALE_PAIRS), L)](
        v_ptr=scale if v is None else v, scale_ptr=scale, phi_ptr=phi, u_ptr=u, D=D, R=R,
        stride_ul=u.stride(0), stride_ud=u.stride(1), stride_ur=u.stride(2),
        BLOCK_P=SCALE_PAIRS, BLOCK_D=SCALE_BLOCK_D, PAIRS=pairs, NEED_V=v is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    return scale, phi


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ (L, splits, R, R) float64, each split's share, of a and b (L, R, D)."""
    L, R, D = a.shape
    per_split = max(GRAM_COLUMNS, _cdiv(_cdiv(D, gram_splits(R)), GRAM_BLOCK_D) * GRAM_BLOCK_D)
    splits = _cdiv(D, per_split)
    g = _empty((L, splits, R, R), torch.float64, a.device)
    _factor_kernels().gram_kernel[(_cdiv(R, 16) ** 2, splits, L)](
        g_ptr=g, a_ptr=a, b_ptr=b, D=D, R=R, d_per_split=per_split,
        BLOCK_R=16, BLOCK_D=GRAM_BLOCK_D, num_warps=8, num_stages=1,
    )  # fmt: skip
    return g


def _gram_schmidt(g: Tensor, t: Tensor) -> Tensor:
    """l⁻¹ (L, R, R) float64; fills t."""
    L, splits, R, _ = g.shape
    inverse = _empty((L, R, R), torch.float64, g.device)
    _factor_kernels().gram_schmidt_kernel[(L,)](
        inverse_ptr=inverse, t_ptr=t, g_ptr=g, R=R, num_splits=splits,
        BLOCK_R=_power_of_two_above(R, 16), BLOCK_C=16, BLOCK_S=gram_splits(R), num_warps=4, num_stages=1,
    )  # fmt: skip
    return inverse


def _factor(u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
    """v (L, R, D) and t (L, R, R) of u (L, D, R)."""
    L, D, R = u.shape
    v = _empty((L, R, D), torch.float32, u.device)
    t = _empty((L, R, R), torch.float32, u.device)
    if u.numel() == 0:
        return v, t.zero_()
    kernels = _factor_kernels()
    block_r = _power_of_two_above(R, 16)
    with torch.cuda.device_of(u):
        if not apply_gs:
            scale, phi = _scale_rows(u, True, v)
            g = _gram(v, v)
            kernels.chain_factor_kernel[(_cdiv(R, 16), L)](
                t_ptr=t, g_ptr=g, scale_ptr=scale, phi_ptr=phi, R=R, num_splits=g.shape[1],
                BLOCK_R=block_r, BLOCK_C=16, BLOCK_S=gram_splits(R), num_warps=factor_warps(block_r), num_stages=1,
            )  # fmt: skip
        else:
            hat = _empty((L, R, D), torch.float32, u.device)
            _scale_rows(u, False, hat)
            inverse = _gram_schmidt(_gram(hat, hat), t)
            kernels.combine_rows_kernel[(_cdiv(D, 128), _cdiv(R, 16), L)](
                v_ptr=v, w_ptr=inverse, hat_ptr=hat, D=D, R=R, BLOCK_R=16, BLOCK_D=128, num_warps=4, num_stages=1
            )
    return v, t


def _factor_bwd(dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
    """du (D, R)."""
    D, R = u.shape
    du = _empty((D, R), u.dtype, u.device)
    if u.numel() == 0:
        return du
    dv, dt, v, t = (tensor.contiguous()[None] for tensor in (dv, dt, v, t))
    kernels = _factor_kernels()
    block_r = _power_of_two_above(R, 16)
    w = _empty((1, R, R), torch.float64, u.device)
    inverse = w
    with torch.cuda.device_of(u):
        if not apply_gs:
            scale, phi = _scale_rows(u[None], True, None)
            kernels.chain_bwd_kernel[(_cdiv(R, 16), 1)](
                ds_ptr=w, t_ptr=t, dt_ptr=dt, R=R, BLOCK_R=block_r, BLOCK_C=16, num_warps=4, num_stages=1
            )
        else:
            hat = _empty((1, R, D), torch.float32, u.device)
            scale, phi = _scale_rows(u[None], False, hat)
            inverse = _gram_schmidt(_gram(hat, hat), _empty((1, R, R), torch.float32, u.device))
            k = _gram(dv, v)
            kernels.gram_schmidt_bwd_kernel[(_cdiv(R, 16), 1)](
                n_ptr=w, inverse_ptr=inverse, k_ptr=k, R=R, num_splits=k.shape[1],
                BLOCK_R=block_r, BLOCK_C=16, BLOCK_S=gram_splits(R), num_warps=4, num_stages=1,
            )  # fmt: skip
        kernels.factor_bwd_kernel[(_cdiv(D, 128), _cdiv(R, 16), 1)](
            du_ptr=du, dv_ptr=dv, v_ptr=v, w_ptr=w, inverse_ptr=inverse, scale_ptr=scale, phi_ptr=phi, D=D, R=R,
            dv_parts_count=1, BLOCK_P=8, BLOCK_D=128, APPLY_GS=apply_gs, num_warps=4, num_stages=1,
        )  # fmt: skip
    return du


# --- the backend ------------------------------------------------------------------------------------------------------


class TritonBackend(Backend):
    """Any GPU that Triton supports."""

    name = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    max_rank = 256
    shares_launches = True

    @property
    def device_type(self) -> str:
        return "cpu" if _interpreted() else "cuda"

    def why_unavailable(self) -> str | None:
        """None where Triton and a GPU (or the interpreter) are here, else the reason."""
        reason = _why_not_installed()
        if reason:
            return reason
        if not torch.cuda.is_available() and not _interpreted():
            return "PyTorch sees no GPU (with TRITON_INTERPRET=1 Triton runs on the CPU, for tests)"
        return None

    def _why_device_unsupported(self, device: torch.device) -> str | None:
        if device.type == "cuda" and _is_too_old(device):
            return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
        return None

    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """Sums are in float64. A column with a NaN or an infinity makes its rows of v and t so: nothing hides it."""
        v, t = _factor(u[None], apply_gs)
        return v[0], t[0]

    def wy_factor_many(self, us: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """Three launches for all, four with apply_gs."""
        return _factor(us, apply_gs)

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        return _factor_bwd(dv, dt, u, v, t, apply_gs)

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        """With a float16 x, entries of v must be below 128 in size: `wy_factor` returns such, `ops.reflect` scales."""
        return _reflect(x, v, t, transpose, need_p=True)

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return _reflect(dy, v, t, not transpose, need_p=False)[0]

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Two runs agree bit for bit."""
        _require_int_offsets("reflect_bwd", v)
        dx = _empty(x.shape, dy.dtype, dy.device)
        if dy.numel() == 0 or v.numel() == 0:
            return dx.copy_(dy), torch.zeros_like(v), torch.zeros_like(t)
        with torch.cuda.device_of(x):
            parts = _bwd_parts(dx, dy, x, v.contiguous(), t, p.contiguous(), transpose)
            return dx, *_sums(*parts)

    def chain_bwd(
        self, dy: Tensor, x: Tensor, u: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, apply_gs: bool
    ) -> tuple[Tensor, Tensor]:
        """Three launches up to 32 columns."""
        if apply_gs or v.shape[0] > FUSED_BACKWARD_RANK or dy.numel() == 0 or v.numel() == 0:
            return super().chain_bwd(dy, x, u, v, t, p, transpose, apply_gs)
        _require_int_offsets("chain_bwd", v)
        D, R = u.shape
        dx, du = _empty(x.shape, dy.dtype, dy.device), _empty((D, R), u.dtype, u.device)
        w = _empty((R + 2, R), torch.float64, u.device)
        ds, scale, phi = w[:R], w[R], w[R + 1]
        v, t, p = v.contiguous(), t.contiguous(), p.contiguous()
        with torch.cuda.device_of(x):
            dv_parts, _ = _bwd_parts(dx, dy, x, v, t, p, transpose, _Chain(u, ds, scale, phi))
            _factor_kernels().factor_bwd_kernel[(_cdiv(D, 128), _cdiv(R, 16), 1)](
                du_ptr=du, dv_ptr=dv_parts, v_ptr=v, w_ptr=ds, inverse_ptr=ds, scale_ptr=scale, phi_ptr=phi,
                D=D, R=R, dv_parts_count=len(dv_parts), BLOCK_P=8, BLOCK_D=128, APPLY_GS=False, num_warps=4,
                num_stages=1,
            )  # fmt: skip
        return dx, du


BACKEND = TritonBackend()
