"""The `cuda` backend: allocates what csrc/cuda/ fills, and launches it on torch's current stream.

Nothing in csrc/cuda/ has run on a GPU yet: it is tested on the CPU emulation (tests/cuda/emulation.py), and serves only
by name (`HRA_BACKEND=cuda` or `use_backend("cuda")`). `hra_kernels.reference` is the specification.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from hra_kernels.backends.tuning import select_slice

try:
    _cuda = import_module("hra_kernels._cuda")
except ImportError as error:
    _cuda = None
    _import_error = " ".join(str(error).split())

_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_LEAST_CAPABILITY = (8, 0)


def _rows(op: str, name: str, rows: Tensor) -> Tensor:
    if rows.dim() != 2 or (rows.stride(1) != 1 and rows.shape[1] > 1):
        raise ValueError(
            f"{op}: {name} must be (M, D) with contiguous rows, got shape {tuple(rows.shape)}, strides {rows.stride()}"
        )
    return rows


class CudaBackend:
    """The operators through one compiled module: `_cuda`, or its emulation, whose device is the CPU."""

    def __init__(self, native: ModuleType, device_type: str):
        self._native = native
        self._device_type = device_type

    def why_unavailable(self) -> str | None:
        """None, or that there is no GPU for the loaded module."""
        if self._device_type == "cuda" and not torch.cuda.is_available():
            return "the CUDA module is built, but PyTorch sees no GPU"
        return None

    def why_unsupported(self, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
        """None, or which property of the tensors the kernels do not take."""
        if device.type != self._device_type:
            return f"it serves {self._device_type} tensors, these are on {device}"
        if dtype not in _CODES:
            return f"it serves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if rank > self._native.MAX_RANK:
            return f"it serves up to {self._native.MAX_RANK} columns, these are {rank}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
            return f"it needs compute capability 8.0, {device} has {torch.cuda.get_device_capability(device)}"
        return None

    def _launch(self, function, tensor: Tensor, *arguments) -> None:
        stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
        with torch.cuda.device_of(tensor):
            function(*arguments, stream)

    def wy_factors(self, us: Sequence[Tensor], apply_gs: Sequence[bool]) -> list[tuple[Tensor, Tensor]]:
        """`reference.wy_factor` of many layers on one device, in one launch for every 32 of them."""
        results, layers = [], []
        for u, gs in zip(us, apply_gs, strict=True):
            size_d, rank = u.shape
            v = torch.empty((rank, size_d), dtype=torch.float32, device=u.device)
            t = torch.empty((rank, rank), dtype=torch.float32, device=u.device)
            results.append((v, t))
            layers.append(
                (v.data_ptr(), t.data_ptr(), u.data_ptr(), size_d, rank, *u.stride(), _CODES[u.dtype], bool(gs))
            )
        if layers:
            self._launch(self._native.wy_factor_fwd, us[0], layers)
        return results

    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """v (R, D) and t (R, R); see `reference.wy_factor`."""
        return self.wy_factors([u], [apply_gs])[0]

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        """du (D, R); see `reference.wy_factor_bwd`."""
        size_d, rank = u.shape
        du = torch.empty((size_d, rank), dtype=u.dtype, device=u.device)
        tensors = [dv.contiguous(), dt.contiguous(), u, v.contiguous(), t.contiguous()]
        pointers = [tensor.data_ptr() for tensor in tensors]
        layer = (du.data_ptr(), *pointers, size_d, rank, *u.stride(), _CODES[u.dtype], bool(apply_gs))
        self._launch(self._native.wy_factor_bwd, u, [layer])
        return du

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        """y (M, D) and p (M, R); see `reference.reflect_fwd`."""
        _rows("reflect_fwd", "x", x)
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
        """dx (M, D); see `reference.reflect_dx`."""
        return self._backward("reflect_dx", dy, None, v, t, None, transpose)[0]

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx (M, D), dv (R, D), dt (R, R); see `reference.reflect_bwd`."""
        return self._backward("reflect_bwd", dy, x, v, t, p, transpose)

    def _backward(self, op, dy, x, v, t, p, transpose):
        _rows(op, "dy", dy)
        size_m, size_d = dy.shape
        rank = v.shape[0]
        code = _CODES[dy.dtype]
        slice_d = select_slice("forward" if x is None else "backward", rank, size_d)
        dx = torch.empty((size_m, size_d), dtype=dy.dtype, device=dy.device)
        v, t = v.contiguous(), t.contiguous()
        dv = dt = workspace = None
        workspace_bytes = 0
        if x is not None:
            _rows(op, "x", x)
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


class _Missing:
    """Stands for the backend where the compiled module cannot be imported."""

    def why_unavailable(self) -> str | None:
        """Why the module is missing."""
        return f"the CUDA module is missing: {_import_error}"


def _load() -> CudaBackend | _Missing:
    return CudaBackend(_cuda, "cuda") if _cuda is not None else _Missing()


BACKEND = _load()
