"""What every operator requires of its arguments, whichever backend serves it. `op` is the name that errors give."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hra_kernels.factors import factor_dtype

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIDE = {dtype: factor_dtype(dtype) for dtype in _FLOATING}


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """One of the four dtypes that are served."""
    if tensor.dtype not in _FLOATING:
        allowed = "float32, float64, bfloat16 or float16"
        raise TypeError(f"{op}: {name} must be {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_u(op: str, u: Tensor) -> None:
    """u (D, R)."""
    check_dtype(op, "u", u)
    if u.dim() != 2:
        raise ValueError(f"{op}: u must be (D, R), got shape {tuple(u.shape)}")


def check_us(op: str, us: Tensor) -> None:
    """us (L, D, R)."""
    check_dtype(op, "us", us)
    if us.dim() != 3:
        raise ValueError(f"{op}: us must be (L, D, R), got shape {tuple(us.shape)}")


def check_factor(op: str, name: str, x: Tensor, v: Tensor, t: Tensor) -> None:
    """v (R, D) and t (R, R) that reflect x (..., D), called `name`."""
    check_dtype(op, name, x)
    x_shape, v_shape = x.shape, v.shape  # each look at a shape makes a new one, and every call passes here
    if not x_shape:
        raise ValueError(f"{op}: {name} must have at least one dimension, (..., D), got a scalar")
    if len(v_shape) != 2 or v_shape[1] != x_shape[-1]:
        raise ValueError(
            f"{op}: v must be (R, D) with D = {name}.shape[-1] = {x_shape[-1]}, got shape {tuple(v_shape)}"
        )
    rank = v_shape[0]
    if t.shape != (rank, rank):
        raise ValueError(f"{op}: t must be (R, R) with R = v.shape[0] = {rank}, got shape {tuple(t.shape)}")
    wanted, device = factor_dtype(x.dtype), x.device
    for other, tensor in (("v", v), ("t", t)):
        if tensor.dtype != wanted:
            raise TypeError(f"{op}: {other} must be {wanted} for {x.dtype} {name}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{op}: {other} must be on {name}'s device {device}, got {tensor.device}")


def check_chain(op: str, name: str, x: Tensor, v: Tensor, t: Tensor, us: Sequence[Tensor]) -> None:
    """`check_factor`, and us (D, R_i) whose factor v and t can be: R is the sum of R_i."""
    if _fits_chain(x, v, t, us):
        return
    check_factor(op, name, x, v, t)
    rank, width = v.shape
    for u in us:
        check_u(op, u)
        check_like(op, "u", u, (width, u.shape[1]), u.dtype, v.device)
    columns = sum(u.shape[1] for u in us)
    if columns != rank:
        raise ValueError(f"{op}: v must have one row for each of the {columns} columns of u, got {rank}")


def _fits_chain(
    x: Tensor, v: Tensor, t: Tensor, us: Sequence[Tensor], dy: Tensor | None = None, p: Tensor | None = None
) -> bool:
    """All that `check_chain` or `check_chain_bwd` asks for, of one u: in one function, for every layer passes here."""
    u, shape, v_shape, dtype, device = us[0], x.shape, v.shape, x.dtype, x.device
    wide = _WIDE.get(dtype)
    if len(us) != 1 or len(v_shape) != 2 or not shape:
        return False
    rank, width = v_shape
    return (
        shape[-1] == width
        and u.shape == (width, rank)
        and t.shape == (rank, rank)
        and wide is not None
        and v.dtype == wide
        and t.dtype == wide
        and u.dtype in _WIDE
        and v.device == device
        and t.device == device
        and u.device == device
        and (
            dy is None
            or (
                dy.shape == shape
                and dy.dtype == dtype
                and dy.device == device
                and p.shape == (shape[0], rank)
                and p.dtype == wide
                and p.device == device
            )
        )
    )


def check_like(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """A tensor whose shape, dtype and device follow from the others."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_rows(op: str, name: str, rows: Tensor) -> None:
    """(M, D), each row contiguous; rows may be any stride apart."""
    if rows.dim() != 2 or (rows.stride(1) != 1 and rows.shape[1] > 1 and rows.numel()):
        raise ValueError(
            f"{op}: {name} must be (M, D) with contiguous rows, got shape {tuple(rows.shape)}, strides {rows.stride()}"
        )


def check_reflect_bwd(op: str, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor) -> None:
    """The arguments of `reflect_fwd`, its p, and the gradient of its y."""
    check_factor(op, "x", x, v, t)
    check_like(op, "dy", dy, x.shape, x.dtype, x.device)
    check_like(op, "p", p, (*x.shape[:-1], v.shape[0]), v.dtype, x.device)


def check_weight_side_bwd(op: str, dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> None:
    """What `reflect_fwd` takes, and the gradient of its x."""
    check_factor(op, "x", x, v, t)
    check_like(op, "dx", dx, x.shape, x.dtype, x.device)


def check_chain_bwd(op: str, dy: Tensor, x: Tensor, us: Sequence[Tensor], v: Tensor, t: Tensor, p: Tensor) -> None:
    """`check_chain` of x (M, D), its p, and the gradient of its y."""
    if _fits_chain(x, v, t, us, dy, p):
        return
    check_chain(op, "x", x, v, t, us)
    check_like(op, "dy", dy, x.shape, x.dtype, x.device)
    check_like(op, "p", p, (x.shape[0], v.shape[0]), v.dtype, x.device)


def check_wy_factor_bwd(op: str, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor) -> None:
    """u (D, R), its factor, and the factor's gradients."""
    check_u(op, u)
    (size_d, rank), dtype, device = u.shape, factor_dtype(u.dtype), u.device
    for name, tensor in (("dv", dv), ("v", v)):
        check_like(op, name, tensor, (rank, size_d), dtype, device)
    for name, tensor in (("dt", dt), ("t", t)):
        check_like(op, name, tensor, (rank, rank), dtype, device)
