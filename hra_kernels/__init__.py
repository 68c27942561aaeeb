"""Householder Reflection Adaptation at nearly the frozen layer's cost.

Functions: `hra_linear`, `hra_conv2d`, `hra_weight`; underneath them `reflect`, `wy_factor`, `reflect_chain`.
Modules: `hra_kernels.nn`, `forget_factors`. PEFT: `hra_kernels.peft.enable()`. Backends: `use_backend`,
`backend_report`.
"""

import torch

OLDEST_TORCH = (2, 6)
"""What pyproject.toml asks for; where pip was not asked, nothing of this package is imported with an older one."""

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    raise ImportError(
        f"hra_kernels: PyTorch must be {'.'.join(map(str, OLDEST_TORCH))} or newer, got {torch.__version__}"
    )

from hra_kernels.factor_cache import forget_factors  # noqa: E402
from hra_kernels.functional import hra_conv2d, hra_linear, hra_weight  # noqa: E402
from hra_kernels.ops import backend_report, reflect, reflect_chain, use_backend, wy_factor  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "backend_report",
    "forget_factors",
    "hra_conv2d",
    "hra_linear",
    "hra_weight",
    "reflect",
    "reflect_chain",
    "use_backend",
    "wy_factor",
]
