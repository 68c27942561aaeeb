"""Merging reflections into a weight and taking them out again.

    merge     W <- W Q_1 Q_2 ...      in float32 (float64 for a float64 weight) by blocks of rows, rounded once
    unmerge   W <- the bits that were there before; W Q⁻¹ where they were not kept, or the weight was changed since

On the output side Qᵀ W, which is (Wᵀ Q)ᵀ: the same on blocks of columns. The sides do not depend on each other's order.

Both write into the memory of W. A quantized weight is dequantized, merged and quantized again, into new memory. Extra
memory: the original weight as stored, while merged (for a moment only, where it is not kept), and one block of rows;
for a quantized weight also two floating-point copies for a moment, and for adapters of both sides one in the factor's
dtype. Nothing is (D, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hra_kernels.factors import factor_dtype, join_factors
from hra_kernels.ops import chain_factor, reflect
from hra_kernels.peft.base_weight import ShardedWeight, Weight, is_plain, row_blocks
from hra_kernels.peft.sharded import whole_vectors
from hra_kernels.soft import SIDES, Rule, Soft, inverse_factor


@dataclass
class Step:
    """Of one merge, the chains of one side: a factor for each of `Weight.parts`, and whether a chain is soft."""

    side: str
    factors: list[tuple[Tensor, Tensor]]
    is_soft: bool


@dataclass
class Merged:
    """What `unmerge` needs: the weight before, what the merged weight was, and the steps in the order of merging.

    Without an original there is no fingerprint either.
    """

    original: Any | None
    fingerprint: tuple | None
    steps: list[Step]
    sharded: bool


def broken(names: Sequence[str], why: str, where: str) -> ValueError:
    """The error for adapters that would not give a finite weight; PEFT's own begins with the same words."""
    return ValueError(
        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: {why}. "
        f"The weight of {where} is unchanged."
    )


@torch.no_grad()
def require_finite_result(
    weight: Weight, names: Sequence[str], us: Sequence[Tensor], apply_gs: Sequence[Rule], sides: Sequence[str]
) -> None:
    """Raise ValueError where `merge` would not give a finite weight. Computes it, and keeps nothing."""
    _merged_rows(weight, weight.read(), names, _steps(weight, us, apply_gs, sides))


@torch.no_grad()
def merge(
    weight: Weight,
    names: Sequence[str],
    us: Sequence[Tensor],
    apply_gs: Sequence[Rule],
    sides: Sequence[str],
    before: Merged | None,
    keep_original: bool = True,
) -> Merged:
    """Merge chains into a weight.

    Args:
        weight: changed in place; as it was where this raises.
        names: of the adapters, for errors.
        us: their vectors in the order of the product, (D, r), (N, r) on the output side, or (E, D, r) for experts;
            FSDP2's shards are gathered.
        apply_gs: for each, what its reflections are along.
        sides: for each, "input" or "output".
        before: what the last merge into this weight gave, if it still holds.
        keep_original: keep a copy of the weight from before the first merge, so that `unmerge` restores its bits.

    Returns:
        What `unmerge` wants: it takes this merge and those before it out.

    Raises:
        ValueError: the merged weight is not finite.
    """
    pending = _steps(weight, us, apply_gs, sides)
    steps = pending if before is None else [*before.steps, *pending]
    sharded = isinstance(weight, ShardedWeight)
    original = _unchanged_original(weight, before) if before is not None else None
    if original is not None:  # one rounding for all: start again from the original
        weight.write(_merged_rows(weight, weight.read(original), names, steps))
    else:
        replaced = weight.write(_merged_rows(weight, weight.read(), names, pending))
        original = replaced if before is None else None
    if original is None or not keep_original:
        return Merged(None, None, steps, sharded)
    return Merged(original, weight.fingerprint(), steps, sharded)


def _unchanged_original(weight: Weight, state: Merged) -> Any | None:
    """The kept original, where the weight is still what the merge made of it."""
    return state.original if state.original is not None and state.fingerprint == weight.fingerprint() else None


@torch.no_grad()
def unmerge(weight: Weight, state: Merged) -> None:
    """Take out what `merge` put in: the original, bit for bit, if it was kept and the weight was not changed since.

    Else the reflections are undone in float32 (float64) on the weight as it is: one more rounding of it.

    Raises:
        RuntimeError: the weight was merged as shards and is whole now.
        ValueError: the reflections are to be undone, and are those of a soft chain that has no good inverse.
    """
    if state.sharded and not isinstance(weight, ShardedWeight):
        raise RuntimeError(
            f"HRA: {weight.where} was merged while its weight was sharded, and FSDP has gathered it for a forward "
            "since; call unmerge_adapter() on the model, before disabling or switching adapters"
        )
    original = _unchanged_original(weight, state)
    if original is not None:
        weight.restore(original)
    else:
        weight.write(_reflected(weight, weight.read(), state.steps, inverse=True))


def _steps(weight: Weight, us: Sequence[Tensor], apply_gs: Sequence[Rule], sides: Sequence[str]) -> list[Step]:
    steps, us = [], whole_vectors(us)
    for side in dict.fromkeys(sides):
        own = [i for i, one in enumerate(sides) if one == side]
        rules = [apply_gs[i] for i in own]
        chains = zip(*(weight.parts(us[i].to(weight.device)) for i in own), strict=True)
        factors = [chain_factor(chain, rules, weight.dtype) for chain in chains]
        steps.append(Step(side, factors, any(isinstance(rule, Soft) for rule in rules)))
    return steps


def _merged_rows(weight: Weight, rows: Tensor, names: Sequence[str], steps: list[Step]) -> Tensor:
    merged = _reflected(weight, rows, steps, inverse=False)
    if not all(merged[rows].isfinite().all() for rows in row_blocks(merged)):
        raise broken(names, "the base weight is not finite, or the result is out of its dtype's range", weight.where)
    return merged


def _reflected(weight: Weight, rows: Tensor, steps: list[Step], inverse: bool) -> Tensor:
    """The weight's rows with the reflections, or without them if inverse: a new tensor of their dtype and format."""
    result, wide = torch.empty_like(rows), factor_dtype(weight.dtype)
    sides = [[step for step in steps if step.side == side] for side in SIDES]
    for i, (part, out) in enumerate(zip(weight.parts(rows), weight.parts(result), strict=True)):
        inside, outside = (_joined(own, i, weight.device, wide, inverse) if own else None for own in sides)
        between = torch.empty_like(part, dtype=wide) if inside and outside else out  # so that both round once
        if inside:
            _reflect_rows(part, between, *inside)
        if outside:
            _reflect_rows((between if inside else part).mT, out.mT, *outside)
    return result


def _joined(
    steps: list[Step], part: int, device: torch.device, dtype: torch.dtype, inverse: bool
) -> tuple[Tensor, Tensor, bool]:
    """What `reflect` takes after x for the product of these chains, or its inverse."""
    parts = [step.factors[part] for step in steps]
    v, t = join_factors([(v.to(device, dtype), t.to(device, dtype)) for v, t in parts])
    if inverse and any(step.is_soft for step in steps):
        return *inverse_factor(v, t), False
    return v, t, inverse


def _reflect_rows(rows: Tensor, out: Tensor, v: Tensor, t: Tensor, transpose: bool) -> None:
    for block in row_blocks(rows):
        with torch.autocast(rows.device.type, enabled=False):
            y = reflect(rows[block].flatten(1).to(v.dtype), v, t, transpose)
        out[block] = y.view(rows[block].shape).to(out.dtype)


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """{`memory_of` a parameter: the names of the modules that hold it}, where there are several."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(memory_of(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def memory_of(parameter: Tensor | None) -> int:
    """Equal for parameters that a merge in place would change together: one parameter, or two over one memory."""
    address = parameter.data_ptr() if is_plain(parameter) and parameter.numel() else 0
    return address or id(parameter)
