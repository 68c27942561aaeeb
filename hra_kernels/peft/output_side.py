"""HRA on the output side of a linear layer: Qᵀ W in place of W.

    y = (base_layer(x) - b) Q + b    computed as    base_layer(x) Q + (b - b Q)

What is reflected is what the base layer returns, so its weight may be stored in any way. Adapters of both sides may be
active together: W Q_A ... on the input side and Q_Bᵀ ... W on the output side do not get in each other's way.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hra_kernels.functional import reflect_output
from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.peft.base_weight import is_offloaded, loaded
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.peft.sharded import is_sharded
from hra_kernels.soft import bias_correction


def forward(
    layer: ReflectionLayer, x: Tensor, names: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
) -> Tensor:
    """The layer's output with the adapters `names`, of both sides; or, for each sample, with that of `adapter_names`.

    Raises:
        NotImplementedError: the base weight is sharded, the base layer returns no (..., N) tensor, or its output passes
            no gradient on to its input.
    """
    base = layer.get_base_layer()
    if is_sharded(base):
        raise NotImplementedError(f"HRA: {layer.describe()} has a sharded weight, which has no side='output' adapters")
    inside = layer.of_side("input", names)
    if not inside:
        y = layer.base_layer(x, *args, **kwargs)
    elif adapter_names is not None:
        y = layer._mixed_forward(x, adapter_names, *args, **kwargs)
    else:
        y = layer._adapted_forward(x, *layer.chain(inside), *args, **kwargs)
    _check(layer, x, y)
    bias = _bias(base)
    if adapter_names is None:
        us, rules = layer.chain(layer.of_side("output", names))
        factor = layer._output_factors.get(us, rules, y.dtype)
        if y.is_nested and y.layout == torch.strided:
            return torch.nested.as_nested_tensor([reflect_output(one, bias, us, rules, factor) for one in y.unbind()])
        return reflect_output(y, bias, us, rules, factor)
    v, t, chains, samples = layer._mixed_batch(adapter_names, y, "output")
    y = reflect_mixed(y, v, t, chains, samples)
    if bias is None:
        return y
    correction = bias_correction(bias, v, t).to(y.dtype)[chains]
    correction = correction.reshape(len(chains), *[1] * (y.dim() - 2), -1).expand(len(chains), *y.shape[1:])
    return y + correction if samples is None else y.index_add(0, samples, correction)


def _check(layer: ReflectionLayer, x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor) or y.size(-1) != layer.out_features:  # nested tensors have no shape
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise NotImplementedError(
            f"HRA: with side='output', {layer.describe()} must return a tensor (..., {layer.out_features}), got {got}"
        )
    if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
        raise NotImplementedError(
            f"HRA cannot train what comes before {layer.describe()}: the forward of its base layer has no gradient "
            "with respect to its input. Run it under torch.no_grad(), or use another quantization."
        )


def _bias(base: nn.Module) -> Tensor | None:
    bias = getattr(base, "bias", None)
    if bias is None or not is_offloaded(base):
        return bias
    with loaded(base):
        return base.bias.clone()
