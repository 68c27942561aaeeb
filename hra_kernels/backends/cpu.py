"""The `cpu` backend: allocates what csrc/cpu/ fills, and calls it. `hra_kernels.reference` is the specification.

Rows of x, dy and u may be apart by any stride; the factor's small tensors are made contiguous here.
"""

from importlib import import_module

import torch
from torch import Tensor

from hra_kernels.factors import factor_dtype

try:
    _native = import_module("hra_kernels._native")
except ImportError as error:
    _native = None
    _import_error = " ".join(str(error).split())

MAX_RANK = 256
"""Largest number of columns; csrc/hra.h: kMaxRank."""

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def why_unavailable() -> str | None:
    """None, or why the compiled module cannot be imported."""
    return None if _native is not None else f"the compiled module is missing: {_import_error}"


def why_unsupported(device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """None, or which property of the tensors the kernels do not take."""
    if device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    if dtype not in _CODES:
        return f"it serves float32, float64, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if rank > MAX_RANK:
        return f"it serves up to {MAX_RANK} columns, these are {rank}"
    return None


def _check_rows(op: str, name: str, rows: Tensor) -> None:
    if rows.dim() != 2 or (rows.stride(1) != 1 and rows.shape[1] > 1):
        raise ValueError(
            f"{op}: {name} must be (M, D) with contiguous rows, got shape {tuple(rows.shape)}, strides {rows.stride()}"
        )


def wy_factor(u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
    """v (R, D) and t (R, R); see `reference.wy_factor`."""
    size_d, rank = u.shape
    dtype = factor_dtype(u.dtype)
    v, t = torch.empty((rank, size_d), dtype=dtype), torch.empty((rank, rank), dtype=dtype)
    if rank:
        _native.wy_factor_fwd(
            v.data_ptr(),
            t.data_ptr(),
            u.data_ptr(),
            size_d,
            rank,
            *u.stride(),
            _CODES[u.dtype],
            apply_gs,
            torch.get_num_threads(),
        )
    return v, t


def wy_factor_bwd(dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
    """du (D, R); see `reference.wy_factor_bwd`."""
    size_d, rank = u.shape
    du = torch.empty((size_d, rank), dtype=u.dtype)
    if rank:
        dv, dt, v, t = dv.contiguous(), dt.contiguous(), v.contiguous(), t.contiguous()
        _native.wy_factor_bwd(
            du.data_ptr(),
            dv.data_ptr(),
            dt.data_ptr(),
            u.data_ptr(),
            v.data_ptr(),
            t.data_ptr(),
            size_d,
            rank,
            *u.stride(),
            _CODES[u.dtype],
            apply_gs,
            torch.get_num_threads(),
        )
    return du


def _reflect(op: str, x: Tensor, v: Tensor, t: Tensor, transpose: bool, p: Tensor | None) -> Tensor:
    _check_rows(op, "dy" if op == "reflect_dx" else "x", x)
    size_m, size_d = x.shape
    y = torch.empty((size_m, size_d), dtype=x.dtype)
    if v.shape[0] == 0:
        return y.copy_(x)
    v, t = v.contiguous(), t.contiguous()
    _native.reflect_fwd(
        y.data_ptr(),
        0 if p is None else p.data_ptr(),
        x.data_ptr(),
        v.data_ptr(),
        t.data_ptr(),
        size_m,
        size_d,
        v.shape[0],
        size_d,
        x.stride(0),
        _CODES[x.dtype],
        transpose,
        torch.get_num_threads(),
    )
    return y


def reflect_fwd(x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    """y (M, D) and p (M, R); see `reference.reflect_fwd`."""
    p = torch.empty((x.shape[0], v.shape[0]), dtype=v.dtype)
    return _reflect("reflect_fwd", x, v, t, transpose, p), p


def reflect_dx(dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
    """dx (M, D); see `reference.reflect_dx`."""
    return _reflect("reflect_dx", dy, v, t, not transpose, None)


def reflect_bwd(
    dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, D), dv (R, D), dt (R, R); see `reference.reflect_bwd`."""
    _check_rows("reflect_bwd", "dy", dy)
    _check_rows("reflect_bwd", "x", x)
    size_m, size_d = x.shape
    dx = torch.empty((size_m, size_d), dtype=dy.dtype)
    dv, dt = torch.empty(v.shape, dtype=v.dtype), torch.empty(t.shape, dtype=t.dtype)
    if v.shape[0] == 0:
        return dx.copy_(dy), dv, dt
    v, t, p = v.contiguous(), t.contiguous(), p.contiguous()
    _native.reflect_bwd(
        dx.data_ptr(),
        dv.data_ptr(),
        dt.data_ptr(),
        dy.data_ptr(),
        x.data_ptr(),
        v.data_ptr(),
        t.data_ptr(),
        p.data_ptr(),
        size_m,
        size_d,
        v.shape[0],
        size_d,
        dy.stride(0),
        x.stride(0),
        _CODES[x.dtype],
        transpose,
        torch.get_num_threads(),
    )
    return dx, dv, dt
