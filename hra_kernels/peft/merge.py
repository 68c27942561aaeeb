"""Merging reflections into a base weight and taking them out again.

    merge     W <- W Q_1 Q_2 ...      in float32 (float64 for a float64 weight) by blocks of rows, rounded once
    unmerge   W <- the tensor that was there before; W Qᵀ where the weight has been changed since

Extra memory: the original weight (in its own dtype) while merged, and one block of rows. Nothing is (D, D).
"""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hra_kernels.ops import chain_factor, reflect
from hra_kernels.reference import factor_dtype, join_factors

if TYPE_CHECKING:
    from hra_kernels.peft.layer import ReflectionLayer

_BLOCK = 2**22
"""Elements in a block of rows: 16 MiB of float32."""

_MERGEABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Factor = tuple[Tensor, Tensor]


@dataclass
class Merged:
    """What `unmerge` needs: the factors in the order of merging, the weight before, and what the merged weight was."""

    original: Tensor | None
    fingerprint: tuple
    factors: list[Factor] = field(default_factory=list)


def why_not_mergeable(layer: "ReflectionLayer") -> str | None:
    """Why the layer's base weight cannot be merged into, or None where it can."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        return f"its base layer is a {type(layer.get_base_layer()).__name__} without a weight tensor (quantised?)"
    if weight.device.type == "meta":
        return "its base weight is not loaded (meta device)"
    # a quantised or sharded weight is another kind of tensor, or one of integers
    if type(weight.detach()) is not Tensor or weight.dtype not in _MERGEABLE:
        return f"its base weight is a {type(weight).__name__} of {weight.dtype} (quantised or sharded?)"
    return None


def require_mergeable(layer: "ReflectionLayer", names: list[str]) -> None:
    """Raise where merging these adapters into this layer could not work; nothing is changed.

    Raises:
        ValueError: an `hra_u` is not finite.
        NotImplementedError: the base weight is quantised, sharded or not loaded.
    """
    reason = why_not_mergeable(layer)
    if reason:
        raise NotImplementedError(
            f"HRA cannot merge into {layer.describe()}: {reason}. Supported are plain float32, float64, bfloat16 and "
            "float16 weights; run the adapter unmerged, or merge it into an unquantised copy of the model."
        )
    for name in names:
        if not layer.hra_u[name].isfinite().all():
            raise ValueError(_broken(layer, name, "its hra_u holds NaN or infinity"))


def _broken(layer: "ReflectionLayer", name: str, why: str) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {why}. "
        f"The weight of {layer.describe()} is unchanged."
    )


@torch.no_grad()
def merge(layer: "ReflectionLayer", adapter_names: list[str] | None) -> None:
    """See `ReflectionLayer.merge`."""
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.hra_u]
    if not names:
        return
    require_mergeable(layer, names)
    weight = layer.get_base_layer().weight
    us = [layer.hra_u[name].to(weight.device) for name in names]
    flags = [layer.hra_apply_GS[name] for name in names]
    factor = chain_factor(us, flags, weight.dtype)
    before = layer._merged
    if before is not None and before.original is not None and before.fingerprint == fingerprint(weight):
        # one rounding for all: start again from the original
        original, factors = before.original.to(weight.device), [*before.factors, factor]
        merged = reflect_rows(original, join_factors(factors), inverse=False)
    else:
        original, factors = (weight.data if before is None else None), [*(before.factors if before else []), factor]
        merged = reflect_rows(weight.data, factor, inverse=False)
    if not merged.isfinite().all():
        why = "the base weight is not finite, or the result is out of its dtype's range"
        raise ValueError(_broken(layer, ", ".join(names), why))
    weight.data = merged
    layer._merged = Merged(original, fingerprint(merged), factors)
    layer.merged_adapters.extend(names)


@torch.no_grad()
def unmerge(layer: "ReflectionLayer") -> None:
    """See `ReflectionLayer.unmerge`."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    state = layer._merged
    if state is not None:
        weight = layer.get_base_layer().weight
        if state.original is not None and state.fingerprint == fingerprint(weight):
            weight.data = state.original.to(weight.device)
        else:
            wide = factor_dtype(weight.dtype)
            factors = [(v.to(weight.device, wide), t.to(weight.device, wide)) for v, t in state.factors]
            weight.data = reflect_rows(weight.data, join_factors(factors), inverse=True)
    layer._merged = None
    layer.merged_adapters.clear()


def _row_blocks(weight: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // max(1, weight[0].numel())) if weight.numel() else 1
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def reflect_rows(weight: Tensor, factor: Factor, inverse: bool) -> Tensor:
    """W Q, or W Qᵀ if inverse, as a new tensor of W's dtype and memory format; (N, ...) is seen as (N, D)."""
    v, t = factor
    merged = torch.empty_like(weight)
    with torch.autocast(weight.device.type, enabled=False):
        for rows in _row_blocks(weight):
            block = weight[rows]
            merged[rows] = reflect(block.flatten(1).to(v.dtype), v, t, transpose=inverse).view(block.shape)
    return merged


def fingerprint(weight: Tensor) -> tuple:
    """Equal for equal bits; writes through `.data` leave no other trace."""
    bits = _INTEGERS[weight.element_size()]
    total, start = torch.zeros((), dtype=torch.int64, device=weight.device), 0
    for rows in _row_blocks(weight):
        values = weight.detach()[rows].flatten().view(bits).to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + values.numel()) + 1, 2, device=weight.device)
        total += (values * odd).sum()
        start += values.numel()
    return tuple(weight.shape), weight.dtype, int(total)


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: the names of the modules that hold it}, where there are several."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}
