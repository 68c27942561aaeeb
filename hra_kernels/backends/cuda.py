"""The `cuda` backend: reflections by the cluster kernels of csrc/cuda, on NVIDIA GPUs of compute capability 9.0.

It allocates what they fill and launches them on torch's current stream; factors come from another backend. Nothing in
csrc/cuda has run on a GPU yet: it is tested on the CPU emulation (tests/cuda/emulation.py), and serves only by name
(`HRA_BACKEND=cuda` or `use_backend("cuda")`).
"""

import contextlib
from types import ModuleType

import torch
from torch import Tensor

from hra_kernels.backends import triton
from hra_kernels.backends.base import Backend
from hra_kernels.backends.compiled import load
from hra_kernels.backends.tuning import select_slice

_cuda, _why_missing = load("_cuda")

_CODES = {torch.bfloat16: 2, torch.float16: 3}
_CAPABILITY = (9, 0)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class CudaBackend(Backend):
    """Reflections through one compiled module: `_cuda`, or its emulation, whose device is the CPU.

    Args:
        native: the module, or None where it cannot be imported.
        device_type: where the module's tensors are.
        factors: the backend that computes the factors.
    """

    name = "cuda"
    dtypes = tuple(_CODES)
    max_rank = 16  # csrc/hra.h: cuda::kMaxRank
    max_width = 16 * 1024  # the largest cluster, and the backward's widest slice

    def __init__(self, native: ModuleType | None, device_type: str, factors: Backend):
        self._native = native
        self.device_type = device_type
        self._factors = factors
        self.shares_launches = factors.shares_launches
        self._resident: dict[tuple, int] = {}

    def why_unavailable(self) -> str | None:
        """None, or what is missing: the module, a GPU for it, or the backend of the factors."""
        if self._native is None:
            return _why_missing
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return "the CUDA module is built, but PyTorch sees no GPU"
        reason = self._factors.why_unavailable()
        return f"its factors come from backend {self._factors.name!r}: {reason}" if reason else None

    def _why_device_unsupported(self, device: torch.device) -> str | None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) != _CAPABILITY:
            return f"it needs compute capability 9.0, {device} has {torch.cuda.get_device_capability(device)}"
        return None

    def why_unsupported(
        self, device: torch.device, dtype: torch.dtype, rank: int, width: int | None = None
    ) -> str | None:
        reason = super().why_unsupported(device, dtype, rank, width)
        if reason or width is None:
            return reason
        for backward in (False, True):
            slice_d, clusters = self._clusters(backward, device, dtype, rank, width)
            if clusters == 0:
                return f"{device} forms no clusters of {-(-width // slice_d)} blocks, which D = {width} needs"
        return None

    def _clusters(
        self, backward: bool, device: torch.device, dtype: torch.dtype, rank: int, width: int
    ) -> tuple[int, int]:
        """Columns that a block holds, and how many clusters of such blocks run at once: asked once, then remembered."""
        slice_d = select_slice("backward" if backward else "forward", rank, width)
        key = (backward, device, dtype, rank, width, slice_d)
        if key not in self._resident:
            with _on(device):
                self._resident[key] = self._native.resident_clusters(backward, width, rank, _CODES[dtype], slice_d)
        return slice_d, self._resident[key]

    def _launch(self, function, device: torch.device, *arguments) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        with _on(device):
            function(*arguments, stream)

    def why_factor_unsupported(self, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
        return self._factors.why_factor_unsupported(device, dtype, rank)

    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        return self._factors.wy_factor(u, apply_gs)

    def wy_factor_many(self, us: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        return self._factors.wy_factor_many(us, apply_gs)

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        return self._factors.wy_factor_bwd(dv, dt, u, v, t, apply_gs)

    def _reflect(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool, p: Tensor | None) -> Tensor:
        (size_m, size_d), rank = x.shape, v.shape[0]
        y = torch.empty((size_m, size_d), dtype=x.dtype, device=x.device)
        v, t = v.contiguous(), t.contiguous()
        self._launch(
            self._native.reflect_fwd,
            x.device,
            *(y.data_ptr(), 0 if p is None else p.data_ptr(), x.data_ptr(), v.data_ptr(), t.data_ptr()),
            *(size_m, size_d, rank, size_d, x.stride(0), _CODES[x.dtype], transpose),
            *self._clusters(False, x.device, x.dtype, rank, size_d),
        )
        return y

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        p = torch.empty((x.shape[0], v.shape[0]), dtype=torch.float32, device=x.device)
        return self._reflect(x, v, t, transpose, p), p

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return self._reflect(dy, v, t, not transpose, None)

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        (size_m, size_d), rank = dy.shape, v.shape[0]
        clusters = self._clusters(True, dy.device, dy.dtype, rank, size_d)
        dx = torch.empty((size_m, size_d), dtype=dy.dtype, device=dy.device)
        dv = torch.empty((rank, size_d), dtype=torch.float32, device=dy.device)
        dt = torch.empty((rank, rank), dtype=torch.float32, device=dy.device)
        workspace_bytes = self._native.reflect_bwd_workspace_bytes(size_m, size_d, rank, *clusters)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=dy.device)
        tensors = (dx, dv, dt, dy, x, v.contiguous(), t.contiguous(), p.contiguous())
        self._launch(
            self._native.reflect_bwd,
            dy.device,
            *(tensor.data_ptr() for tensor in tensors),
            *(size_m, size_d, rank, size_d, dy.stride(0), x.stride(0), _CODES[dy.dtype], transpose),
            *(*clusters, workspace.data_ptr(), workspace_bytes),
        )
        return dx, dv, dt


BACKEND = CudaBackend(_cuda, "cuda", triton.BACKEND)
