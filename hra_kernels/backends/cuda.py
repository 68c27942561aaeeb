"""The `cuda` backend: allocates what csrc/cuda/ fills, and launches it on torch's current stream.

Nothing in csrc/cuda/ has run on a GPU yet: it is tested on the CPU emulation (tests/cuda/emulation.py), and serves only
by name (`HRA_BACKEND=cuda` or `use_backend("cuda")`). `hra_kernels.reference` is the specification.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from hra_kernels.backends.base import Backend
from hra_kernels.backends.tuning import select_slice

try:
    _cuda = import_module("hra_kernels._cuda")
except ImportError as error:
    _cuda = None
    _import_error = " ".join(str(error).split())

_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


class CudaBackend(Backend):
    """The operators through one compiled module: `_cuda`, or its emulation, whose device is the CPU."""

    name = "cuda"
    dtypes = tuple(_CODES)
    max_rank = 64  # csrc/hra.h: cuda::kMaxRank
    shares_launches = True

    def __init__(self, native: ModuleType | None, device_type: str):
        self._native = native
        self.device_type = device_type

    def why_unavailable(self) -> str | None:
        """None, or what is missing: the module, or a GPU for it."""
        if self._native is None:
            return f"the CUDA module is missing: {_import_error}"
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return "the CUDA module is built, but PyTorch sees no GPU"
        return None

    def _why_device_unsupported(self, device: torch.device) -> str | None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs compute capability 8.0, {device} has {torch.cuda.get_device_capability(device)}"
        return None

    def _launch(self, function, tensor: Tensor, *arguments) -> None:
        stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
        with torch.cuda.device_of(tensor):
            function(*arguments, stream)

    def wy_factor_many(self, us: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """One launch for every 32 of them."""
        count, size_d, rank = us.shape
        v = torch.empty((count, rank, size_d), dtype=torch.float32, device=us.device)
        t = torch.empty((count, rank, rank), dtype=torch.float32, device=us.device)
        layers = [
            (one_v.data_ptr(), one_t.data_ptr(), u.data_ptr(), size_d, rank, *u.stride(), _CODES[u.dtype], apply_gs)
            for one_v, one_t, u in zip(v, t, us, strict=True)
        ]
        if layers:
            self._launch(self._native.wy_factor_fwd, us, layers)
        return v, t

    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        v, t = self.wy_factor_many(u[None], apply_gs)
        return v[0], t[0]

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        size_d, rank = u.shape
        du = torch.empty((size_d, rank), dtype=u.dtype, device=u.device)
        tensors = [dv.contiguous(), dt.contiguous(), u, v.contiguous(), t.contiguous()]
        pointers = [tensor.data_ptr() for tensor in tensors]
        layer = (du.data_ptr(), *pointers, size_d, rank, *u.stride(), _CODES[u.dtype], bool(apply_gs))
        self._launch(self._native.wy_factor_bwd, u, [layer])
        return du

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        size_m, size_d = x.shape
        rank = v.shape[0]
        y = torch.empty((size_m, size_d), dtype=x.dtype, device=x.device)
        p = torch.empty((size_m, rank), dtype=torch.float32, device=x.device)
        v, t = v.contiguous(), t.contiguous()
        pointers = [tensor.data_ptr() for tensor in (y, p, x, v, t)]
        sizes = (size_m, size_d, rank, size_d, x.stride(0))
        slice_d = select_slice("forward", rank, size_d)
        self._launch(self._native.reflect_fwd, x, *pointers, *sizes, _CODES[x.dtype], transpose, slice_d)
        return y, p

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return self._backward(dy, None, v, t, None, transpose)[0]

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backward(dy, x, v, t, p, transpose)

    def _backward(self, dy, x, v, t, p, transpose):
        size_m, size_d = dy.shape
        rank = v.shape[0]
        code = _CODES[dy.dtype]
        slice_d = select_slice("forward" if x is None else "backward", rank, size_d)
        dx = torch.empty((size_m, size_d), dtype=dy.dtype, device=dy.device)
        v, t = v.contiguous(), t.contiguous()
        dv = dt = workspace = None
        workspace_bytes = 0
        if x is not None:
            p = p.contiguous()
            dv = torch.empty((rank, size_d), dtype=torch.float32, device=dy.device)
            dt = torch.empty((rank, rank), dtype=torch.float32, device=dy.device)
            with torch.cuda.device_of(dy):  # the plan is the device's
                workspace_bytes = self._native.reflect_bwd_workspace_bytes(size_m, size_d, rank, code, slice_d)
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=dy.device)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (dx, dv, dt, dy, x, v, t, p)]
        strides = (size_d, dy.stride(0), size_d if x is None else x.stride(0))
        self._launch(
            self._native.reflect_bwd,
            dy,
            *pointers,
            *(size_m, size_d, rank, *strides, code, transpose, slice_d),
            0 if workspace is None else workspace.data_ptr(),
            workspace_bytes,
        )
        return dx, dv, dt


BACKEND = CudaBackend(_cuda, "cuda")
