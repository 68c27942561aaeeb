"""PEFT's HRA layer over what maps features: y = base_layer(x Qᵀ), plain, sharded or quantized."""

from functools import partial
from typing import Any

import torch
from peft.tuners.hra.layer import HRALinear as PeftHRALinear
from torch import Tensor, nn

from hra_kernels import weight_side
from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.ops import is_eager, reflect_chain
from hra_kernels.partition import is_whole
from hra_kernels.peft import output_side, sharded
from hra_kernels.peft.base_weight import has_own_forward, is_torchao, unpack_for_cpu
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.soft import SIDES


class HRALinear(ReflectionLayer, PeftHRALinear):
    """PEFT's HRA layer over an `nn.Linear` or a subclass of it, or transformers' `Conv1D`; both sides.

    Arguments, attributes and parameters are those of `peft.tuners.hra.layer.HRALinear`.
    """

    sides = SIDES

    def _sizes(self) -> tuple[int, int]:
        base = self.get_base_layer()
        # those of the whole weight, where PEFT gives those of the shard under tensor parallelism
        return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else super()._sizes()

    def _vector_shape(self) -> tuple[int, ...]:
        return (self.in_features,)

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[bool], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if not sharded.is_sharded(base):
            eager = is_eager(x, *us)
            factor = self._factors.get(us, apply_gs, x.dtype, eager)
            if x.is_nested and x.layout == torch.strided:  # nn.TransformerEncoder makes these of padded batches
                x = torch.nested.as_nested_tensor(
                    [reflect_chain(part, us, apply_gs, factor, transpose=True) for part in x.unbind()]
                )
            elif eager and not (args or kwargs) and self._takes_weight_side(x, us, apply_gs):
                return weight_side.linear(x, base.weight, base.bias, us, apply_gs, factor)
            else:
                x = reflect_chain(x, us, apply_gs, factor, True, eager)
            return self._modules["base_layer"](x, *args, **kwargs)
        if self.base_layer is not base:  # another adapter's layer, whose part of the work would miss the reflections
            raise NotImplementedError(
                f"HRA: {self.describe()} is over a {type(self.base_layer).__name__} with a sharded weight, which "
                "together is not supported; use one adapter method a layer"
            )
        reflect = partial(sharded.reflect, us=us, apply_gs=apply_gs, cache=self._factors)
        return sharded.call_base(base, reflect, x, *args, **kwargs)

    def _takes_weight_side(self, x: Tensor, us: list[Tensor], apply_gs: list[bool]) -> bool:
        """Whether W Q serves better, and nobody but PyTorch's own `F.linear` would see W or x in the base layer."""
        base = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        if type(base) is not nn.Linear or type(weight) is not nn.Parameter:
            return False
        if not weight_side.serves(x, weight, us, apply_gs):
            return False
        return is_whole(weight) and not has_own_forward(base) and not _is_watched(base)

    def _forward_with_output(
        self, x: Tensor, names: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return output_side.forward(self, x, names, adapter_names, *args, **kwargs)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if sharded.is_sharded(self.get_base_layer()):
            return super()._mixed_forward(x, adapter_names)
        batch = self._mixed_batch(adapter_names, x)
        return self.base_layer(reflect_mixed(x, *batch, transpose=True), *args, **kwargs)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks, accelerate's included, run around the module's forward or backward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "_hf_hook" in vars(module) or torch.nn.modules.module._has_any_global_hook()


class HRAQuantizedLinear(HRALinear):
    """`HRALinear` over a linear layer that PEFT knows as quantized; the layer dequantizes in its own forward."""

    def _plain_chain(self, x: Tensor) -> None:
        """None: there always is something to look at."""

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
