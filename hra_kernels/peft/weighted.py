"""Weighted combinations of adapters, where they have a meaning: products of powers, Q_1^w_1 Q_2^w_2 ...

Q is orthogonal, and so is what an HRA adapter can be; sums and averages of vectors u or of matrices Q are not. But the
powers of Q are chains (`powers.chain_power`), and a product of chains is their columns side by side ("cat" in PEFT's
words): W Q_1 Q_2 as for several active adapters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.hra.layer import HRALayer
from peft.tuners.hra.model import HRAModel
from torch import Tensor, nn

from hra_kernels.peft.names import plain_name
from hra_kernels.peft.powers import chain_power, padded


def _check(model: HRAModel, adapters: Sequence[str], weights: Sequence[float], name: str, kind: str) -> None:
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"add_weighted_adapter: expected one weight for each of one or more adapters, got {len(weights)} weights "
            f"for {len(adapters)} adapters"
        )
    if name in model.peft_config:
        raise ValueError(f"add_weighted_adapter: there is an adapter {name!r} already; delete it first")
    if kind != "cat":
        raise ValueError(
            f"add_weighted_adapter: HRA supports combination_type='cat' (the product of the adapters' powers), got "
            f"{kind!r}: other combinations of reflections are no reflections. export_lora() makes LoRA adapters that "
            "can be combined in PEFT's other ways"
        )
    for adapter in adapters:
        config = model.peft_config[adapter]
        if config.bias != "none" or config.modules_to_save:
            raise ValueError(
                f"add_weighted_adapter: adapter {adapter!r} has trained biases or modules_to_save, which have no "
                "weighted combination"
            )
        if getattr(config, "eps", 0):
            raise ValueError(f"add_weighted_adapter: adapter {adapter!r} has eps, with which a chain has no powers")
    sides = {adapter: getattr(model.peft_config[adapter], "side", "input") for adapter in adapters}
    if len(set(sides.values())) > 1:
        raise ValueError(f"add_weighted_adapter: all adapters must be on one side, got {sides}")
    if any(getattr(config, "target_parameters", None) for config in model.peft_config.values()):
        raise NotImplementedError("add_weighted_adapter: not supported with target_parameters")


@torch.no_grad()
def _combined(layer: HRALayer, where: str, adapters: Sequence[str], weights: Sequence[float], rank: int) -> Tensor:
    columns = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in layer.hra_r:
            try:
                columns.append(chain_power(layer.vectors(adapter), layer.hra_apply_GS[adapter], weight))
            except ValueError as error:
                raise ValueError(f"add_weighted_adapter: layer {where!r}, adapter {adapter!r}: {error}") from error
    return padded(torch.cat(columns, 1), rank)


def add_weighted_adapter(
    model: HRAModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See `HRAModel.add_weighted_adapter`. Everything is computed before the model is touched."""
    _check(model, adapters, weights, adapter_name, combination_type)
    configs = [model.peft_config[adapter] for adapter in adapters]
    rank = sum(config.r for config in configs)
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, HRALayer)}
    combined = {
        name: _combined(layer, name, adapters, weights, rank)
        for name, layer in layers.items()
        if any(adapter in layer.hra_r for adapter in adapters)
    }
    fields: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    model.peft_config[adapter_name] = dataclasses.replace(
        configs[0], r=rank, apply_GS=False, init_weights=False, target_modules=set(combined), **fields
    )
    try:
        model.inject_adapter(model.model, adapter_name)
    except BaseException:
        del model.peft_config[adapter_name]
        for layer in layers.values():
            layer.delete_adapter(adapter_name)
        raise
    model.peft_config[adapter_name].target_modules = set(map(plain_name, combined))  # as its file will say
    for name, layer in layers.items():
        if adapter_name in layer.hra_r:  # a target's name can be the end of another layer's, which has no part in it
            fresh = layer.hra_u[adapter_name]
            columns = combined[name] if name in combined else torch.zeros_like(fresh)
            columns = columns.to(fresh.device).reshape(fresh.shape)
            layer.hra_u[adapter_name] = nn.Parameter(columns, requires_grad=False)
