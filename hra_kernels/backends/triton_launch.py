"""What all launchers of the Triton backend share: where kernels come from, where tensors are made, sizes of grids."""

import torch
from torch import Tensor

from hra_kernels.backends.tuning import LaunchConfig


def kernels():
    from hra_kernels.backends import triton_kernels  # Triton may be missing, and importing it takes a while

    return triton_kernels


def factor_kernels():
    from hra_kernels.backends import triton_factor_kernels

    return triton_factor_kernels


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every tensor a kernel of this backend writes is allocated here."""
    return torch.empty(shape, dtype=dtype, device=device)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_above(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def is_amd() -> bool:
    return torch.version.hip is not None


def float32_precision() -> str:
    """How float32 tiles are multiplied: three passes of tf32 (1e-6 relative), on AMD by its float32 matrix units."""
    return "ieee" if is_amd() else "tf32x3"


def num_warps(config: LaunchConfig) -> int:
    """The same number of threads everywhere: AMD's warps (wavefronts) have 64 of them."""
    return max(1, config.num_warps // 2) if is_amd() else config.num_warps
