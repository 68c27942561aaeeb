"""Keeps a layer's compact WY factor between two changes of its parameters.

A factor depends on parameters alone, so a training step with many micro-batches, or the generation of many tokens,
needs it once. What counts as a change: another tensor, another version of it (any in-place operation PyTorch sees), a
step of any `torch.optim.Optimizer` since (some optimizers write through raw pointers, which no version shows), and on a
CPU any other value (weight averaging and `torch.autograd.gradcheck` write through `.data`). Comparing values would
stall a GPU: there, code that writes through `.data` outside an optimizer calls `clear()`.
"""

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hra_kernels.factors import join_factors
from hra_kernels.ops import chain_factor, factor_in_groups, wants_plain_ops, wy_factor_many

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How many steps all optimizers of this process have made."""
    return _optimizer_steps


class FactorCache:
    """One remembered `chain_factor`. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: tuple[tuple, list[weakref.ref], list[Tensor], tuple[Tensor, Tensor]] | None = None

    def get(self, us: Sequence[Tensor], apply_gs: Sequence[bool], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(v, t) of `ops.chain_factor` for the present values of us, in `dtype`'s factor dtype; without gradient.

        Computed afresh, and not kept, where keeping it would be wrong: while `torch.compile` or `torch.export` traces,
        while a CUDA graph is captured, and for tensors that carry no version (inference tensors, tensor subclasses).
        None under `torch.func` and forward-mode AD, whose operators compute their own.
        """
        if wants_plain_ops():
            return None
        if not self._may_keep(us):
            return chain_factor(us, apply_gs, dtype)
        key = self._key(us, apply_gs, dtype)
        factor = self._kept(key, us)
        if factor is None:
            with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
                factor = chain_factor(us, apply_gs, dtype)
                self._keep(key, us, factor)
        return factor

    def clear(self) -> None:
        """Forget the factor."""
        self._entry = None

    @staticmethod
    def _key(us: Sequence[Tensor], apply_gs: Sequence[bool], dtype: torch.dtype) -> tuple:
        device = us[0].device
        stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
        values = ((u.data_ptr(), u._version, u.dtype, gs) for u, gs in zip(us, apply_gs, strict=True))
        return (_optimizer_steps, dtype == torch.float64, stream, *values)

    def _kept(self, key: tuple, us: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        if self._entry is None:
            return None
        kept_key, kept_us, values, factor = self._entry
        if kept_key != key or any(kept() is not u for kept, u in zip(kept_us, us, strict=True)):
            return None
        same = all(torch.equal(value, u) for value, u in zip(values, us, strict=False))
        return factor if same else None

    def _keep(self, key: tuple, us: Sequence[Tensor], factor: tuple[Tensor, Tensor]) -> None:
        values = [u.detach().clone() for u in us] if us[0].device.type == "cpu" else []
        self._entry = (key, [weakref.ref(u) for u in us], values, factor)

    @staticmethod
    def _may_keep(us: Sequence[Tensor]) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if any(type(u) not in (Tensor, torch.nn.Parameter) or u.is_inference() for u in us):
            return False
        return not (us[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing())

    def __deepcopy__(self, memo: dict) -> "FactorCache":
        return FactorCache()

    def __reduce__(self) -> tuple:
        return FactorCache, ()


def refill(layers: Iterable[tuple[FactorCache, Sequence[Tensor], Sequence[bool]]]) -> None:
    """Bring the caches of a model up to date together: factors of one shape come from the launches of one.

    Where a backend computes factors in groups (`ops.factor_in_groups`), 200 layers of three shapes cost the launches of
    three, once an optimizer step; elsewhere each layer is left to compute its own. The backward of a factor stays with
    its layer: one node for all of them would hold every gradient back to the end, and activation checkpointing could
    not run a layer's forward again on its own.

    Args:
        layers: for each, its cache and what it will ask `FactorCache.get` for; the dtype is that of its vectors.
    """
    if wants_plain_ops():
        return
    stale = []
    for cache, us, apply_gs in layers:
        if us and cache._may_keep(us) and all(factor_in_groups(u) for u in us):
            key = cache._key(us, apply_gs, us[0].dtype)
            if cache._kept(key, us) is None:
                stale.append((cache, key, us, apply_gs))
    if len(stale) < 2:
        return
    factors: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
    with torch.inference_mode(False):
        for gs in (False, True):
            wanted = {id(u): u for _, _, us, flags in stale for u, flag in zip(us, flags, strict=True) if flag == gs}
            found = wy_factor_many(list(wanted.values()), gs)
            factors.update(((name, gs), factor) for name, factor in zip(wanted, found, strict=True))
        for cache, key, us, apply_gs in stale:
            parts = [factors[id(u), gs] for u, gs in zip(us, apply_gs, strict=True)]
            cache._keep(key, us, join_factors(parts))
