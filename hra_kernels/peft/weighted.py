"""Weighted combinations of adapters, where they have a meaning: products of powers, Q_1^w_1 Q_2^w_2 ...

Q is orthogonal, and so is what an HRA adapter can be; sums and averages of vectors u or of matrices Q are not. But

    Q^1      Q itself: its columns, bit for bit. (Gram-Schmidt: the orthonormal columns that it reflects along)
    Q^-1     the inverse: the same columns in reverse order
    Q^w      the rotation of every plane that Q rotates by θ, -π < θ < π, by w θ instead: the geodesic from I to Q

are chains of as many columns as Q, and a product of chains is their columns side by side ("cat" in PEFT's words): W Q_1
Q_2 as for several active adapters. The last is not defined where Q turns something round by π: an odd number of
reflections does (determinant -1), and Gram-Schmidt.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.hra.layer import HRALayer
from peft.tuners.hra.model import HRAModel
from torch import Tensor, nn

from hra_kernels.factors import factor_dtype
from hra_kernels.peft.names import plain_name
from hra_kernels.reference import wy_factor

_HALF_TURN = 1e-4
"""A rotation this close to π (in radians) has no direction that the float32 columns could tell."""


def _padded(columns: Tensor, rank: int) -> Tensor:
    """With pairs of equal columns behind, which cancel, and a zero column where one is left over."""
    missing = rank - columns.shape[1]
    pairs = columns.new_ones(columns.shape[0], 2 * (missing // 2))
    return torch.cat([columns, pairs, columns.new_zeros(columns.shape[0], missing % 2)], 1)


def chain_power(u: Tensor, apply_gs: bool, weight: float) -> Tensor:
    """Columns (D, R) of the plain chain Q^weight, for Q the chain of u's columns.

    Args:
        u: (D, R), any floating dtype.
        apply_gs: whether Q is the chain of the Gram-Schmidt basis of u.
        weight: any finite number; see the head of this file for what it means.

    Returns:
        u's own dtype where columns are taken as they are, else the factor's: float32, or float64 for float64.

    Raises:
        ValueError: the power is not defined.
    """
    wide = factor_dtype(u.dtype)
    if abs(weight) == 1:
        columns = wy_factor(u, apply_gs=True)[0].mT if apply_gs else u
        return columns if weight == 1 else columns.flip(1)
    v, t = wy_factor(u.double(), apply_gs)
    basis = torch.linalg.qr(v.mT).Q
    inside = basis.mT @ v.mT
    identity = torch.eye(len(inside), dtype=v.dtype, device=v.device)
    q = identity - inside @ t @ inside.mT  # Q on the span of its columns; elsewhere it is the identity
    if not math.isfinite(weight) or not q.isfinite().all():
        raise ValueError(f"the weight and hra_u must be finite, got {weight} and an hra_u with NaN or infinity")
    if torch.linalg.svdvals(identity + q).min() < _HALF_TURN:
        raise ValueError(
            f"its reflections turn a direction round (an odd number of them does, and apply_GS=True), so that the "
            f"power {weight} is not defined; the weights 1 and -1 are"
        )
    # Cayley transform: skew-symmetric, and tan(θ / 2) tells all angles in (-π, π) apart
    tangents, vectors = torch.linalg.eigh(1j * torch.linalg.solve(identity + q, identity - q))
    columns = []
    for k in range(len(q) - len(q) // 2, len(q)):
        half = weight * math.atan(tangents[k])
        first, second = math.sqrt(2) * vectors[:, k].real, -math.sqrt(2) * vectors[:, k].imag
        if tangents[k] > 1e-12:
            columns += [math.cos(half) * first + math.sin(half) * second, first]
    chain = basis @ torch.stack(columns, 1) if columns else u.new_zeros(u.shape[0], 0)
    return _padded(chain.to(wide), u.shape[1])


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
    if any(getattr(config, "target_parameters", None) for config in model.peft_config.values()):
        raise NotImplementedError("add_weighted_adapter: not supported with target_parameters")


@torch.no_grad()
def _combined(layer: HRALayer, where: str, adapters: Sequence[str], weights: Sequence[float], rank: int) -> Tensor:
    columns = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in layer.hra_r:
            try:
                columns.append(chain_power(layer.hra_u[adapter], layer.hra_apply_GS[adapter], weight))
            except ValueError as error:
                raise ValueError(f"add_weighted_adapter: layer {where!r}, adapter {adapter!r}: {error}") from error
    return _padded(torch.cat(columns, 1), rank)


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
            columns = combined[name] if name in combined else _padded(fresh.detach()[:, :0], rank)
            layer.hra_u[adapter_name] = nn.Parameter(columns.to(fresh.device), requires_grad=False)
