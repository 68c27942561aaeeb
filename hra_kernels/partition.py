"""Parameters that are kept in parts between two forwards, one part per process, and how to have them whole.

FSDP2           DTensors, which gather themselves, with gradient
FSDP1           pieces of shape (n,), or tensors without memory: whole in the forward of their unit, nowhere else
DeepSpeed ZeRO  stage 3: shape (0,), and an attribute `ds_id`; DeepSpeed gathers on request
"""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from hra_kernels.ops import wants_plain_ops


def held(module: nn.Module, name: str) -> Any:
    """What the module itself has by this name now, or None.

    At any other access DeepSpeed gathers a parameter; wrappers (FSDP's, a compiled module) give what they wrap has.
    """
    for place in (module._parameters, module._modules, vars(module)):
        if place.get(name) is not None:
            return place.get(name)
    return getattr(module, name) if hasattr(type(module), name) else None


def weight_of(module: nn.Module) -> Any:
    """`module.weight`, or None where there is none; sooner than by nn.Module's `__getattr__`."""
    weight = module._parameters.get("weight")
    return getattr(module, "weight", None) if weight is None else weight


def is_whole(parameter: Tensor) -> bool:
    """Whether these are all values of a parameter with two dimensions or more, and not a part of them."""
    if hasattr(parameter, "device_mesh"):
        return False
    if parameter.dim() < 2 or parameter.numel() == 0 or wants_plain_ops():  # torch.func's tensors have no storage
        return parameter.dim() > 1
    return parameter.untyped_storage().size() > 0


def whole(parameter: Tensor, op: str, name: str) -> Tensor:
    """The parameter, gathered with gradient where it is a DTensor. Every rank must come here.

    Raises:
        RuntimeError: FSDP1 or DeepSpeed ZeRO-3 has it in parts at present.
    """
    if hasattr(parameter, "device_mesh"):
        return parameter.full_tensor()
    if not is_whole(parameter):
        raise RuntimeError(
            f"{op}: {name} must be whole, got a part of shape {tuple(parameter.shape)}; gather it around this call, "
            "with deepspeed.zero.GatheredParameters (DeepSpeed ZeRO-3) or FSDP.summon_full_params (FSDP1, which so "
            "gives no gradient: there use FSDP2, fully_shard)"
        )
    return parameter


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager:
    """While this lasts, those that DeepSpeed has partitioned are whole. Every rank must come here."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    return sys.modules["deepspeed"].zero.GatheredParameters(partitioned)


def gather_in_forward(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """In a module's forward: have DeepSpeed gather these now, and in every later forward of this module.

    It does so itself for a module's own parameters alone, and not before the first forward of its engine.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id") and not is_whole(parameter):
            sys.modules["deepspeed"].zero.register_external_parameter(module, parameter)
            parameter.all_gather()
