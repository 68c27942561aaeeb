"""Merging reflections into a weight and taking them out again.

    merge     W <- W Q_1 Q_2 ...      in float32 (float64 for a float64 weight) by blocks of rows, rounded once
    unmerge   W <- the bits that were there before; W Qᵀ where they were not kept, or the weight was changed since

Both write into the memory of W. A quantized weight is dequantized, merged and quantized again, into new memory. Extra
memory: the original weight as stored, while merged (for a moment only, where it is not kept), and one block of rows;
for a quantized weight also two floating-point copies for a moment. Nothing is (D, D).
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

Factors = list[tuple[Tensor, Tensor]]
"""Of one merge: a factor for each of `Weight.parts`."""


@dataclass
class Merged:
    """What `unmerge` needs: the weight before, what the merged weight was, and the factors in the order of merging.

    Without an original there is no fingerprint either.
    """

    original: Any | None
    fingerprint: tuple | None
    merges: list[Factors]
    sharded: bool


def broken(names: Sequence[str], why: str, where: str) -> ValueError:
    """The error for adapters that would not give a finite weight; PEFT's own begins with the same words."""
    return ValueError(
        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: {why}. "
        f"The weight of {where} is unchanged."
    )


@torch.no_grad()
def require_finite_result(weight: Weight, names: Sequence[str], us: Sequence[Tensor], apply_gs: Sequence[bool]) -> None:
    """Raise ValueError where `merge` would not give a finite weight. Computes it, and keeps nothing."""
    _merged_rows(weight, weight.read(), names, [_factors(weight, us, apply_gs)])


@torch.no_grad()
def merge(
    weight: Weight,
    names: Sequence[str],
    us: Sequence[Tensor],
    apply_gs: Sequence[bool],
    before: Merged | None,
    keep_original: bool = True,
) -> Merged:
    """Merge chains into a weight.

    Args:
        weight: changed in place; as it was where this raises.
        names: of the adapters, for errors.
        us: their vectors in the order of the product, (D, r), or (E, D, r) for experts; FSDP2's shards are gathered.
        apply_gs: for each, whether its chain is that of its Gram-Schmidt basis.
        before: what the last merge into this weight gave, if it still holds.
        keep_original: keep a copy of the weight from before the first merge, so that `unmerge` restores its bits.

    Returns:
        What `unmerge` wants: it takes this merge and those before it out.

    Raises:
        ValueError: the merged weight is not finite.
    """
    pending = [_factors(weight, us, apply_gs)]
    merges = pending if before is None else [*before.merges, *pending]
    sharded = isinstance(weight, ShardedWeight)
    original = _unchanged_original(weight, before) if before is not None else None
    if original is not None:  # one rounding for all: start again from the original
        weight.write(_merged_rows(weight, weight.read(original), names, merges))
    else:
        replaced = weight.write(_merged_rows(weight, weight.read(), names, pending))
        original = replaced if before is None else None
    if original is None or not keep_original:
        return Merged(None, None, merges, sharded)
    return Merged(original, weight.fingerprint(), merges, sharded)


def _unchanged_original(weight: Weight, state: Merged) -> Any | None:
    """The kept original, where the weight is still what the merge made of it."""
    return state.original if state.original is not None and state.fingerprint == weight.fingerprint() else None


@torch.no_grad()
def unmerge(weight: Weight, state: Merged) -> None:
    """Take out what `merge` put in: the original, bit for bit, if it was kept and the weight was not changed since.

    Else the reflections are undone in float32 (float64) on the weight as it is: one more rounding of it.

    Raises:
        RuntimeError: the weight was merged as shards and is whole now.
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
        weight.write(_reflected(weight, weight.read(), state.merges, inverse=True))


def _factors(weight: Weight, us: Sequence[Tensor], apply_gs: Sequence[bool]) -> Factors:
    chains = zip(*(weight.parts(u.to(weight.device)) for u in whole_vectors(us)), strict=True)
    return [chain_factor(chain, apply_gs, weight.dtype) for chain in chains]


def _merged_rows(weight: Weight, rows: Tensor, names: Sequence[str], merges: list[Factors]) -> Tensor:
    merged = _reflected(weight, rows, merges, inverse=False)
    if not all(merged[rows].isfinite().all() for rows in row_blocks(merged)):
        raise broken(names, "the base weight is not finite, or the result is out of its dtype's range", weight.where)
    return merged


def _reflected(weight: Weight, rows: Tensor, merges: list[Factors], inverse: bool) -> Tensor:
    """The weight's rows times Q, or Qᵀ if inverse, as a new tensor of their dtype and memory format."""
    result, wide = torch.empty_like(rows), factor_dtype(weight.dtype)
    for part, out, factors in zip(weight.parts(rows), weight.parts(result), zip(*merges, strict=True), strict=True):
        v, t = join_factors([(v.to(weight.device, wide), t.to(weight.device, wide)) for v, t in factors])
        for block in row_blocks(part):
            with torch.autocast(part.device.type, enabled=False):
                y = reflect(part[block].flatten(1).to(wide), v, t, transpose=inverse)
            out[block] = y.view(part[block].shape).to(part.dtype)
    return result


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
