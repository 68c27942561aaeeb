"""The `cpu` backend: allocates what csrc/cpu/ fills, and calls it. `hra_kernels.reference` is the specification.

Rows of x and dy may be apart by any stride; u and the factor's small tensors are made contiguous here. At few rows a
call costs what Python costs: `new_empty` takes half the time of `torch.empty` with a dtype, positions that of names.
"""

import torch
from torch import Tensor

from hra_kernels.backends.base import Backend
from hra_kernels.backends.compiled import load
from hra_kernels.factors import factor_dtype

_native, _why_missing = load("_native")

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""csrc/hra.h: DType."""


class CpuBackend(Backend):
    """The compiled module `_native`."""

    name = "cpu"
    device_type = "cpu"
    dtypes = tuple(_CODES)
    max_rank = 256  # csrc/hra.h: kMaxRank

    def why_unavailable(self) -> str | None:
        """None, or why the compiled module is not here."""
        return _why_missing

    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        return _factor(u, apply_gs, None)

    def copy_and_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        copy = u.new_empty(*u.shape)
        return copy, _factor(u, apply_gs, copy)

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        size_d, rank = u.shape
        du = u.new_empty(size_d, rank)
        if rank:
            dv, dt, u, v, t = dv.contiguous(), dt.contiguous(), u.contiguous(), v.contiguous(), t.contiguous()
            _native.wy_factor_bwd(
                du.data_ptr(), dv.data_ptr(), dt.data_ptr(), u.data_ptr(), v.data_ptr(), t.data_ptr(),
                size_d, rank, _CODES[u.dtype], apply_gs, torch.get_num_threads(),
            )  # fmt: skip
        return du

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        p = v.new_empty(x.shape[0], v.shape[0])
        return _reflect(x, v, t, transpose, p), p

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return _reflect(dy, v, t, not transpose, None)

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        (size_m, size_d), rank = x.shape, v.shape[0]
        dx, dv, dt = dy.new_empty(size_m, size_d), v.new_empty(rank, size_d), v.new_empty(rank, rank)
        if rank == 0:
            return dx.copy_(dy), dv, dt
        v, t, p = v.contiguous(), t.contiguous(), p.contiguous()
        _native.reflect_bwd(
            dx.data_ptr(), dv.data_ptr(), dt.data_ptr(), dy.data_ptr(), x.data_ptr(), v.data_ptr(), t.data_ptr(),
            p.data_ptr(), size_m, size_d, rank, size_d, dy.stride(0), x.stride(0),
            _CODES[x.dtype], transpose, torch.get_num_threads(),
        )  # fmt: skip
        return dx, dv, dt

    def weight_side_bwd(self, dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        (size_m, size_d), rank = x.shape, v.shape[0]
        dv, dt = v.new_empty(rank, size_d), v.new_empty(rank, rank)
        if rank:
            v, t = v.contiguous(), t.contiguous()
            _native.weight_side_bwd(
                dv.data_ptr(), dt.data_ptr(), dx.data_ptr(), x.data_ptr(), v.data_ptr(), t.data_ptr(),
                size_m, size_d, rank, dx.stride(0), x.stride(0), _CODES[x.dtype], torch.get_num_threads(),
            )  # fmt: skip
        return dv, dt

    def chain_bwd(
        self, dy: Tensor, x: Tensor, u: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, apply_gs: bool
    ) -> tuple[Tensor, Tensor]:
        size_m, size_d = x.shape
        rank = v.shape[0]
        if rank == 0:
            return super().chain_bwd(dy, x, u, v, t, p, transpose, apply_gs)
        dx, du = dy.new_empty(size_m, size_d), u.new_empty(size_d, rank)
        u, v, t, p = u.contiguous(), v.contiguous(), t.contiguous(), p.contiguous()
        _native.chain_bwd(
            dx.data_ptr(), du.data_ptr(), dy.data_ptr(), x.data_ptr(), u.data_ptr(), v.data_ptr(), t.data_ptr(),
            p.data_ptr(), size_m, size_d, rank, dy.stride(0), x.stride(0), _CODES[x.dtype],
            _CODES[u.dtype], transpose, apply_gs, torch.get_num_threads(),
        )  # fmt: skip
        return dx, du


def same_values(a: Tensor, b: Tensor) -> bool:
    """`torch.equal` of two tensors on a CPU that have one dtype; bit by bit where that is sooner, NaN equal to itself.

    PyTorch compares element by element: (4096, 8) floats in 60 us, these bytes in 3.
    """
    if _native is None or a.shape != b.shape or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    return _native.same_bytes(a.data_ptr(), b.data_ptr(), a.nbytes)


def _factor(u: Tensor, apply_gs: bool, copy: Tensor | None) -> tuple[Tensor, Tensor]:
    size_d, rank = u.shape
    dtype = factor_dtype(u.dtype)
    like = u if u.dtype == dtype else u.new_empty(0, dtype=dtype)
    v, t = like.new_empty(rank, size_d), like.new_empty(rank, rank)
    if rank:
        u = u.contiguous()
        _native.wy_factor_fwd(
            v.data_ptr(), t.data_ptr(), 0 if copy is None else copy.data_ptr(), u.data_ptr(),
            size_d, rank, _CODES[u.dtype], apply_gs, torch.get_num_threads(),
        )  # fmt: skip
    return v, t


def _reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool, p: Tensor | None) -> Tensor:
    size_m, size_d = x.shape
    y = x.new_empty(size_m, size_d)
    rank = v.shape[0]
    if rank == 0:
        return y.copy_(x)
    v, t = v.contiguous(), t.contiguous()
    _native.reflect_fwd(
        y.data_ptr(), 0 if p is None else p.data_ptr(), x.data_ptr(), v.data_ptr(), t.data_ptr(),
        size_m, size_d, rank, size_d, x.stride(0), _CODES[x.dtype], transpose, torch.get_num_threads(),
    )  # fmt: skip
    return y


BACKEND = CpuBackend()
