"""Householder Reflection Adaptation at nearly the frozen layer's cost.

Functions: `hra_linear`, `hra_conv2d`, `hra_weight`; underneath them `reflect`, `wy_factor`, `reflect_chain`.
Modules: `hra_kernels.nn`, `forget_factors`. PEFT: `hra_kernels.peft.enable()`. Backends: `use_backend`,
`backend_report`.
"""

from hra_kernels.factor_cache import forget_factors
from hra_kernels.functional import hra_conv2d, hra_linear, hra_weight
from hra_kernels.ops import backend_report, reflect, reflect_chain, use_backend, wy_factor

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
