"""The Triton backend: the operators of `ops` for any GPU that Triton supports.

Kernels are in `triton_kernels` (reflect) and `triton_factor_kernels` (wy_factor), their launches in `triton_reflect`
and `triton_factor`, tile sizes in `tuning`. With TRITON_INTERPRET=1 in the environment the same functions serve CPU
tensors, through the interpreter of Triton.

A chain's backward is three launches up to 32 columns: what its u needs rides along in programs of its own, so that a
layer's training step is four (six in 16 bits with more than 16 columns). Otherwise the factor's backward is three
launches beside those of `reflect_bwd`.
"""

import functools
import importlib.util
import os
from importlib import metadata

import torch
from torch import Tensor

from hra_kernels.backends import triton_factor, triton_launch, triton_reflect
from hra_kernels.backends.base import Backend

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
    return not triton_launch.is_amd() and torch.cuda.get_device_capability(device) < (8, 0)


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
        v, t = triton_factor.factor(u[None], apply_gs)
        return v[0], t[0]

    def wy_factor_many(self, us: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """Three launches for all, four with apply_gs."""
        return triton_factor.factor(us, apply_gs)

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        return triton_factor.factor_bwd(dv, dt, u, v, t, apply_gs)

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        """With a float16 x, entries of v must be below 128 in size: `wy_factor` returns such, `ops.reflect` scales."""
        return triton_reflect.reflect(x, v, t, transpose, need_p=True)

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return triton_reflect.reflect(dy, v, t, not transpose, need_p=False)[0]

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Two runs agree bit for bit."""
        return triton_reflect.reflect_bwd(dy, x, v, t, p, transpose)

    def chain_bwd(
        self, dy: Tensor, x: Tensor, u: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, apply_gs: bool
    ) -> tuple[Tensor, Tensor]:
        """Three launches up to 32 columns, four in 16 bits with more than 16."""
        if apply_gs or v.shape[0] > triton_reflect.FUSED_BACKWARD_RANK or dy.numel() == 0 or v.numel() == 0:
            return super().chain_bwd(dy, x, u, v, t, p, transpose, apply_gs)
        return triton_reflect.chain_bwd(dy, x, u, v, t, p, transpose)

    def weight_side_bwd(self, dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Two reads of x and dx; two runs agree bit for bit."""
        return triton_reflect.weight_side_bwd(dx, x, v, t)


BACKEND = TritonBackend()
