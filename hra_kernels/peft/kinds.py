"""Which of this package's layers goes over which base layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hra_kernels.peft.base_weight import is_torchao, quantization_of, unpack_for_cpu
from hra_kernels.peft.conv import conv_layer_class
from hra_kernels.peft.embedding import HRAEmbedding
from hra_kernels.peft.layer import HRALinear, ReflectionLayer
from hra_kernels.peft.own_setup import OwnSetup


class HRALinearLike(ReflectionLayer, OwnSetup, nn.Module):
    """`HRALinear` over what maps features as an `nn.Linear` does and is none: transformers' `Conv1D`."""

    def _vector_shape(self) -> tuple[int, ...]:
        return (self.in_features,)

    _adapted_forward = HRALinear._adapted_forward
    _mixed_forward = HRALinear._mixed_forward


class HRAQuantisedLinear(HRALinearLike):
    """`HRALinear` over a linear layer that PEFT knows as quantized; the layer dequantizes in its own forward."""

    torchao_configuration: Callable[[], Any] | None = None
    """How the model was quantized, where torchao did it and transformers loaded it; needed to merge."""

    def _cast_for_base(self, x: Tensor) -> Tensor:
        # torchao's weights have the dtype of the inputs they want; the others' dtype is that of their storage
        return super()._cast_for_base(x) if is_torchao(self.get_base_layer()) else x

    def _cast_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        trains = torch.is_grad_enabled() and (x.requires_grad or any(self.hra_u[name].requires_grad for name in names))
        if trains:
            unpack_for_cpu(self.get_base_layer())
        y = super()._cast_forward(x, names, *args, **kwargs)
        if trains and not y.requires_grad:
            raise NotImplementedError(
                f"HRA cannot train {self.describe()}: the forward of its quantized base layer has no gradient with "
                "respect to its input (torchao's 8-bit activations have none). Use weight-only quantization, or run "
                "it under torch.no_grad()."
            )
        return y


def layer_class(base: nn.Module) -> type[ReflectionLayer] | None:
    """The class for a base layer; None where HRA is not supported over it."""
    if quantization_of(base) is not None:
        return HRAQuantisedLinear
    if isinstance(base, nn.Linear):
        return HRALinear
    if isinstance(base, Conv1D):
        return HRALinearLike
    if isinstance(base, nn.Embedding):
        return HRAEmbedding
    return conv_layer_class(base)
