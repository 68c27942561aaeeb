"""Merging reflections into a base weight and taking them out again.

    merge     W <- W Q_1 Q_2 ...      in float32 (float64 for a float64 weight) by blocks of rows, rounded once
    unmerge   W <- the tensor that was there before; W Qᵀ where the weight has been changed since

A quantized weight is dequantized, merged and quantized again. Extra memory: the original weight as stored, while
merged, and one block of rows; for a quantized weight also two floating-point copies for a moment. Nothing is (D, D).
"""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hra_kernels.factors import factor_dtype, join_factors
from hra_kernels.ops import chain_factor, reflect
from hra_kernels.peft.base_weight import (
    PlainWeight,
    QuantisedWeight,
    ShardedWeight,
    readable_weight,
    row_blocks,
    whole_vectors,
    why_not_mergeable,
)

if TYPE_CHECKING:
    from hra_kernels.peft.layer import ReflectionLayer

Factor = tuple[Tensor, Tensor]
Weight = PlainWeight | ShardedWeight | QuantisedWeight

_NOT_FINITE = "the base weight is not finite, or the result is out of its dtype's range"


@dataclass
class Merged:
    """What `unmerge` needs: the factors in the order of merging, the weight before, and what the merged weight was."""

    original: Any | None
    fingerprint: tuple
    factors: list[Factor] = field(default_factory=list)
    sharded: bool = False


def require_mergeable(layer: "ReflectionLayer", names: list[str]) -> None:
    """Raise where merging these adapters into this layer could not work; nothing is changed.

    Raises:
        ValueError: an `hra_u` is not finite.
        NotImplementedError: the base weight is not loaded, or quantized in a format that cannot be written.
    """
    reason = why_not_mergeable(layer)
    if reason:
        raise NotImplementedError(
            f"HRA cannot merge into {layer.describe()}: {reason}. Supported are plain float32, float64, bfloat16 and "
            "float16 weights and, with PEFT 0.20 or newer, bitsandbytes, HQQ and torchao layers; run the adapter "
            "unmerged, or merge it into an unquantized copy of the model."
        )
    for name, u in zip(names, whole_vectors(layer, names), strict=True):
        if not u.isfinite().all():
            raise ValueError(_broken(layer, name, "its hra_u holds NaN or infinity"))


def _broken(layer: "ReflectionLayer", name: str, why: str) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {why}. "
        f"The weight of {layer.describe()} is unchanged."
    )


@torch.no_grad()
def require_finite_result(layer: "ReflectionLayer", names: list[str]) -> None:
    """Raise ValueError where merging these adapters would not give a finite weight. Computes it, and keeps nothing."""
    weight = readable_weight(layer)
    factor, rows = _factor(layer, names, weight), weight.read()
    if not all(_reflected(rows[block], factor, inverse=False).isfinite().all() for block in row_blocks(rows)):
        raise ValueError(_broken(layer, ", ".join(names), _NOT_FINITE))


@torch.no_grad()
def merge(layer: "ReflectionLayer", adapter_names: list[str] | None) -> None:
    """See `ReflectionLayer.merge`."""
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.hra_u]
    if not names:
        return
    require_mergeable(layer, names)
    weight = readable_weight(layer)
    factor = _factor(layer, names, weight)
    before, current = layer._merged, weight.keep()
    original, factors = current, [factor]
    if before is not None:
        original = before.original if before.fingerprint == weight.fingerprint() else None
        factors = [*_moved(before.factors, weight), factor]
    try:
        if before is not None and original is not None:  # one rounding for all: start again from the original
            weight.restore(original)
            factor = join_factors(factors)
        merged = reflect_rows(weight.read(), factor, inverse=False)
        if not all(merged[rows].isfinite().all() for rows in row_blocks(merged)):
            raise ValueError(_broken(layer, ", ".join(names), _NOT_FINITE))
        weight.write(merged)
    except BaseException:
        weight.restore(current)
        raise
    layer._merged = Merged(original, weight.fingerprint(), factors, isinstance(weight, ShardedWeight))
    layer.merged_adapters.extend(names)


@torch.no_grad()
def unmerge(layer: "ReflectionLayer") -> None:
    """See `ReflectionLayer.unmerge`."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    state = layer._merged
    if state is not None:
        weight = readable_weight(layer)
        if state.sharded and not isinstance(weight, ShardedWeight):
            raise RuntimeError(
                f"HRA: {layer.describe()} was merged while its weight was sharded, and FSDP has gathered it for a "
                "forward since; call unmerge_adapter() on the model, before disabling or switching adapters"
            )
        if state.original is not None and state.fingerprint == weight.fingerprint():
            weight.restore(state.original)
        else:
            factor = join_factors(_moved(state.factors, weight))
            weight.write(reflect_rows(weight.read(), factor, inverse=True))
    layer._merged = None
    layer.merged_adapters.clear()


def _factor(layer: "ReflectionLayer", names: list[str], weight: Weight) -> Factor:
    us = [u.to(weight.device) for u in whole_vectors(layer, names)]
    return chain_factor(us, [layer.hra_apply_GS[name] for name in names], weight.dtype)


def _moved(factors: list[Factor], weight: Weight) -> list[Factor]:
    wide = factor_dtype(weight.dtype)
    return [(v.to(weight.device, wide), t.to(weight.device, wide)) for v, t in factors]


def reflect_rows(weight: Tensor, factor: Factor, inverse: bool) -> Tensor:
    """W Q, or W Qᵀ if inverse, as a new tensor of W's dtype and memory format; (N, ...) is seen as (N, D)."""
    merged = torch.empty_like(weight)
    for rows in row_blocks(weight):
        merged[rows] = _reflected(weight[rows], factor, inverse)
    return merged


def _reflected(rows: Tensor, factor: Factor, inverse: bool) -> Tensor:
    v, t = factor
    with torch.autocast(rows.device.type, enabled=False):
        return reflect(rows.flatten(1).to(v.dtype), v, t, transpose=inverse).view(rows.shape).to(rows.dtype)


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: the names of the modules that hold it}, where there are several."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}
