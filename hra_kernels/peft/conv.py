"""PEFT's HRA layer over convolutions of one, two and three spatial dimensions.

    y = conv(x, W Q) = base_layer(x) - conv1x1(conv(x, v), W vᵀ t)

with the rows of v (R, in_channels kh kw) as R extra filters: R / out_channels of the base layer's work. A base layer
with a forward of its own (one that pads first, say), or with hooks, runs that forward with W Q in place of its weight.
"""

import math
from functools import partial
from typing import Any

from peft.tuners.hra.layer import HRAConv2d as PeftHRAConv2d
from torch import Tensor, nn

from hra_kernels.functional import conv_correction, hra_weight
from hra_kernels.mixed_batch import conv_correction_mixed
from hra_kernels.ops import attach_factor, in_factor_dtype
from hra_kernels.peft.base_weight import loaded
from hra_kernels.peft.layer import ReflectionLayer


class ConvLayer(ReflectionLayer):
    """What `HRAConv1d`, `HRAConv2d` and `HRAConv3d` share."""

    def _vector_shape(self) -> tuple[int, ...]:
        base = self.get_base_layer()
        return (base.in_channels * math.prod(base.kernel_size),)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, for any kernel shape.

        Raises:
            NotImplementedError: the convolution has groups.
        """
        base = self.get_base_layer()
        if base.groups > 1:
            raise NotImplementedError(
                f"HRA does not support {type(base).__name__} layers with groups > 1 (got groups={base.groups})."
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[bool], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        factor = self._factors.get(us, apply_gs, x.dtype)
        if runs_own_code(base):
            adapt = partial(hra_weight, u=us, apply_gs=apply_gs, factor=factor)
            return self._call_with(adapt, x, *args, **kwargs)
        us = in_factor_dtype(us, x.dtype)
        with loaded(base):
            correction = conv_correction(x, base.weight, attach_factor(us, apply_gs, factor), *_geometry(base))
        return self.base_layer(x, *args, **kwargs) + correction

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if runs_own_code(base):  # W Q in place of its weight would be one weight for all samples
            return super()._mixed_forward(x, adapter_names, *args, **kwargs)
        if x.dim() != base.weight.dim():
            raise ValueError(f"adapter_names: the input of {self.describe()} must be (B, C, ...), got {tuple(x.shape)}")
        v, t, chains, samples = self._mixed_batch(adapter_names, x)
        own = x if samples is None else x[samples]
        with loaded(base):
            correction = conv_correction_mixed(own, base.weight, v, t, chains, *_geometry(base))
        y = self.base_layer(x, *args, **kwargs)
        return y + correction if samples is None else y.index_add(0, samples, correction)


def _geometry(base: nn.Module) -> tuple:
    return base.stride, base.padding, base.dilation, base.padding_mode


class HRAConv1d(ConvLayer):
    """As `HRAConv2d`, over an `nn.Conv1d`; `hra_u` is (in_channels k, r)."""


class HRAConv2d(ConvLayer, PeftHRAConv2d):
    """PEFT's HRA layer over an `nn.Conv2d` or a subclass of it: any kernel, stride, padding, padding mode, dilation.

    Arguments, attributes and parameters are those of `peft.tuners.hra.layer.HRAConv2d`; `hra_u` is
    (in_channels kh kw, r). Grouped convolutions raise NotImplementedError, as PEFT's do.
    """


class HRAConv3d(ConvLayer):
    """As `HRAConv2d`, over an `nn.Conv3d`; `hra_u` is (in_channels kd kh kw, r)."""


_PLAIN = {nn.Conv1d: HRAConv1d, nn.Conv2d: HRAConv2d, nn.Conv3d: HRAConv3d}


def conv_layer_class(base: nn.Module) -> type[ConvLayer] | None:
    """The layer for a convolution or a subclass of one; None for everything else."""
    return next((layer for kind, layer in _PLAIN.items() if isinstance(base, kind)), None)


def runs_own_code(base: nn.Module) -> bool:
    """Whether calling the base layer does more than `nn.Conv2d` does. accelerate's hook does not: it moves tensors."""
    kind = type(base)
    plain = next(plain for plain in _PLAIN if isinstance(base, plain))
    if kind.forward is not plain.forward or kind._conv_forward is not plain._conv_forward:
        return True
    replaced = "forward" in base.__dict__ and not hasattr(base, "_hf_hook")
    return replaced or bool(base._forward_hooks or base._forward_pre_hooks)
