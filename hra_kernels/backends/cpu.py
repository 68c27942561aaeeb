"""The `cpu` backend: allocates what csrc/cpu/ fills, and calls it. `hra_kernels.reference` is the specification.

Rows of x and dy may be apart by any stride; u and the factor's small tensors are made contiguous here.
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
        size_d, rank = u.shape
        dtype = factor_dtype(u.dtype)
        v, t = torch.empty((rank, size_d), dtype=dtype), torch.empty((rank, rank), dtype=dtype)
        if rank:
            u = u.contiguous()
            _native.wy_factor_fwd(
                v=v.data_ptr(), t=t.data_ptr(), u=u.data_ptr(), D=size_d, R=rank,
                dtype=_CODES[u.dtype], apply_gs=apply_gs,
                num_threads=torch.get_num_threads(),
            )  # fmt: skip
        return v, t

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        size_d, rank = u.shape
        du = torch.empty((size_d, rank), dtype=u.dtype)
        if rank:
            dv, dt, u, v, t = dv.contiguous(), dt.contiguous(), u.contiguous(), v.contiguous(), t.contiguous()
            _native.wy_factor_bwd(
                du=du.data_ptr(), dv=dv.data_ptr(), dt=dt.data_ptr(), u=u.data_ptr(), v=v.data_ptr(), t=t.data_ptr(),
                D=size_d, R=rank, dtype=_CODES[u.dtype],
                apply_gs=apply_gs, num_threads=torch.get_num_threads(),
            )  # fmt: skip
        return du

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        p = torch.empty((x.shape[0], v.shape[0]), dtype=v.dtype)
        return _reflect(x, v, t, transpose, p), p

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return _reflect(dy, v, t, not transpose, None)

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        size_m, size_d = x.shape
        dx = torch.empty((size_m, size_d), dtype=dy.dtype)
        dv, dt = torch.empty(v.shape, dtype=v.dtype), torch.empty(t.shape, dtype=t.dtype)
        if v.shape[0] == 0:
            return dx.copy_(dy), dv, dt
        v, t, p = v.contiguous(), t.contiguous(), p.contiguous()
        _native.reflect_bwd(
            dx=dx.data_ptr(), dv=dv.data_ptr(), dt=dt.data_ptr(), dy=dy.data_ptr(), x=x.data_ptr(),
            v=v.data_ptr(), t=t.data_ptr(), p=p.data_ptr(), M=size_m, D=size_d, R=v.shape[0],
            stride_dxm=size_d, stride_dym=dy.stride(0), stride_xm=x.stride(0),
            dtype=_CODES[x.dtype], transpose=transpose, num_threads=torch.get_num_threads(),
        )  # fmt: skip
        return dx, dv, dt

    def weight_side_bwd(self, dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        dv, dt = torch.empty(v.shape, dtype=v.dtype), torch.empty(t.shape, dtype=t.dtype)
        if v.shape[0] == 0:
            return dv, dt
        v, t = v.contiguous(), t.contiguous()
        _native.weight_side_bwd(
            dv=dv.data_ptr(), dt=dt.data_ptr(), dx=dx.data_ptr(), x=x.data_ptr(), v=v.data_ptr(), t=t.data_ptr(),
            M=x.shape[0], D=x.shape[1], R=v.shape[0], stride_dxm=dx.stride(0), stride_xm=x.stride(0),
            dtype=_CODES[x.dtype], num_threads=torch.get_num_threads(),
        )  # fmt: skip
        return dv, dt


def _reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool, p: Tensor | None) -> Tensor:
    size_m, size_d = x.shape
    y = torch.empty((size_m, size_d), dtype=x.dtype)
    if v.shape[0] == 0:
        return y.copy_(x)
    v, t = v.contiguous(), t.contiguous()
    _native.reflect_fwd(
        y=y.data_ptr(), p=0 if p is None else p.data_ptr(), x=x.data_ptr(), v=v.data_ptr(), t=t.data_ptr(),
        M=size_m, D=size_d, R=v.shape[0], stride_ym=size_d, stride_xm=x.stride(0),
        dtype=_CODES[x.dtype], transpose=transpose, num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return y


BACKEND = CpuBackend()
