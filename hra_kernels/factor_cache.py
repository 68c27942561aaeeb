"""Keeps a layer's compact WY factor between two changes of its parameters.

A factor depends on parameters alone, so a training step with many micro-batches, or the generation of many tokens,
needs it once. It is validated by what it was computed from, each time it is used:

    on a CPU   by values. The factor is computed from a copy, which is kept and compared: whoever writes, and however,
               in between or meanwhile, the factor is that of the values that are there when it is asked for.
    on a GPU   looking at values would stall it. There a factor belongs to a storage, an address, a version and the
               number of steps that optimizers have made (some write through raw pointers, which no version shows).
               Storages are held weakly: that keeps no memory, but a storage's name is not given to another one, as an
               address is. Never the tensors themselves: `torch.utils.swap_tensors` refuses what is referred to weakly.

What no key shows is no reason to keep: parameters that a CUDA graph was captured with (a replay writes to addresses,
moves no version and runs no hook), and those of a layer whose own hooks may bring them. One thing is left: code that
writes through `.data` on a GPU, or into shards that are gathered later, outside an optimizer, a graph and a layer's
hooks, calls `forget_factors(model)`.

Graphs of `torch.compile` find their factors on a CPU by the same rule (`factor_of_memory`). On a GPU they compute them
in every call, those of a whole model together (`computed_at_entry`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from hra_kernels.backends import choose
from hra_kernels.backends.cpu import same_values
from hra_kernels.factors import join_factors
from hra_kernels.ops import PLAIN, chain_factor, factor_in_groups, is_eager, wants_plain_ops, wy_factor_many
from hra_kernels.soft import Rule, Soft

_optimizer_steps = 0

_AS_IT_IS = nullcontext()

_captured: set[int] = set()
"""Addresses of parameters that a CUDA graph was captured with. What comes to lie there later is not kept either."""


def _capturing() -> bool:
    # nothing is captured before CUDA is in use, which takes a tenth of the time to find out that `is_available` does
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream_of(u: Tensor) -> int:
    """The current stream of u's device: by its handle, for a Stream object takes longer than all else of a key."""
    return torch._C._cuda_getCurrentRawStream(u.get_device()) if u.is_cuda else 0


def _values_are_at_hand(us: Sequence[Tensor]) -> bool:
    return us[0].is_cpu


def _after_step(optimizer: Optimizer, *_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    if _capturing():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        _captured.update(parameter.data_ptr() for parameter in parameters if type(parameter) in PLAIN)


register_optimizer_step_post_hook(_after_step)


def optimizer_steps() -> int:
    """How many steps all optimizers of this process have made."""
    return _optimizer_steps


def _outside_inference_mode() -> AbstractContextManager:
    """An inference tensor could not be saved for a later backward."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _AS_IT_IS


def forget_factors(model: nn.Module) -> None:
    """Forget the factors of all layers in `model`, of `hra_kernels.nn` and of `hra_kernels.peft`.

    For code that writes parameters on a GPU where nothing shows it: through `.data`, outside an optimizer's step.
    `train()`, `eval()` and `load_state_dict()` do the same.
    """
    for module in model.modules():
        if isinstance(module, KeepsFactors):
            module.forget_factors()


class FactorCache:
    """One remembered `chain_factor`. Copies and pickles of it are empty."""

    parameters_come_late: bool = False
    """Whether something that shows nowhere may write parameters before each use: the owner has hooks (see `get`)."""

    given: tuple[Tensor, Rule, tuple[Tensor, Tensor]] | None = None
    """What `computed_at_entry` has for the graph that is traced: vectors, what they are along, and their factor."""

    def __init__(self) -> None:
        self._entry: tuple[tuple, list[Tensor], list[StorageWeakRef], tuple[Tensor, Tensor]] | None = None

    def get(
        self, us: Sequence[Tensor], apply_gs: Sequence[Rule], dtype: torch.dtype, eager: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """(v, t) of `ops.chain_factor` for the present values of us, in `dtype`'s factor dtype; without gradient.

        Computed afresh, and not kept, where keeping it would be wrong: while a CUDA graph is captured and ever after,
        on a GPU where `parameters_come_late`, and for tensors that carry no version (inference tensors, tensor
        subclasses). None under `torch.func` and forward-mode AD, and while `torch.compile` or `torch.export` traces,
        but for what `computed_at_entry` gave: there operators compute their own.

        Args:
            eager: whether the caller knows that `is_eager(*us)`.
        """
        eager = eager or is_eager(*us)
        if eager:
            factor = self._of_one_chain(us, apply_gs, dtype)
            if factor is not None:
                return factor
        elif torch.compiler.is_compiling():
            return self._given_for(us, apply_gs, dtype)
        elif wants_plain_ops():
            return None
        if not self._may_keep(us):
            return chain_factor(us, apply_gs, dtype)
        key = validity_key(us, apply_gs, dtype)
        if not eager or len(us) > 1:  # else it was looked for above
            factor = self._kept(key, us)
            if factor is not None:
                return factor
        with _outside_inference_mode():
            values = copied_values(us)
            factor = chain_factor(values or us, apply_gs, dtype)
            self._keep(key, us, values, factor)
        return factor

    def clear(self) -> None:
        """Forget the factor."""
        self._entry = None

    def _given_for(
        self, us: Sequence[Tensor], apply_gs: Sequence[Rule], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        if self.given is None or len(us) != 1:
            return None
        u, gs, factor = self.given
        fits = u is us[0] and gs == apply_gs[0] and (u.dtype == torch.float64) == (dtype == torch.float64)
        return factor if fits else None

    def _may_keep(self, us: Sequence[Tensor]) -> bool:
        if torch._C._get_tracing_state() is not None:
            return False
        for u in us:
            if type(u) not in PLAIN or u.is_inference():
                return False
        if _values_are_at_hand(us):
            return True
        if _capturing():
            _captured.update(u.data_ptr() for u in us)
        if self.parameters_come_late or (_captured and any(u.data_ptr() in _captured for u in us)):
            self.clear()  # its key may fit again, when the hook is gone
            return False
        return True

    def _of_one_chain(
        self, us: Sequence[Tensor], apply_gs: Sequence[Rule], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """`get` of one chain as nearly every call wants it, in one step; None where that must look closer."""
        if self._entry is None or len(us) != 1:
            return None
        key, values, _, factor = self._entry
        u = us[0]
        if values:
            if not u.is_cpu or key != (dtype == torch.float64, *apply_gs, u.dtype):
                return None
            return factor if same_values(values[0], u) else self._renewed(key, values[0], u, apply_gs[0])
        if self.parameters_come_late or _captured or u.is_inference() or _capturing():
            return None
        return factor if key == _key_of_places(us, apply_gs, dtype) else None

    def _renewed(self, key: tuple, before: Tensor, u: Tensor, gs: Rule) -> tuple[Tensor, Tensor] | None:
        """The factor of one chain of which the values alone have changed: once a layer and training step."""
        if u.shape != before.shape or isinstance(gs, Soft) or (u.dtype == torch.float64) != key[0] or u.is_inference():
            return None
        with _outside_inference_mode():
            values, factor = choose(u.device, u.dtype, u.shape[1], factor=True).copy_and_factor(u, gs)
        self._keep(key, [u], [values], factor)
        return factor

    def _kept(self, key: tuple, us: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        entry = self._entry
        if entry is None or entry[0] != key:
            return None
        _, values, _, factor = entry
        if values and not all(map(same_values, values, us)):
            return None
        return factor

    def _keep(self, key: tuple, us: Sequence[Tensor], values: list[Tensor], factor: tuple[Tensor, Tensor]) -> None:
        storages = [] if values else [StorageWeakRef(u.untyped_storage()) for u in us]
        self._entry = (key, values, storages, factor)

    def __deepcopy__(self, memo: dict) -> "FactorCache":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class KeepsFactors(nn.Module):
    """A layer with a `FactorCache`: when it forgets, and when not to rely on it."""

    _factors: FactorCache

    def forget_factors(self) -> None:
        """Compute the factor anew in the next forward."""
        self._factors.clear()

    def train(self, mode: bool = True) -> nn.Module:
        """As `nn.Module.train`. Forgets the factor: weights averaged by hand are swapped in around this call."""
        self.forget_factors()
        return super().train(mode)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self.forget_factors()
        super()._load_from_state_dict(*args, **kwargs)

    def look_for_hooks(self, *modules: nn.Module) -> bool:
        """Whether a forward pre-hook of the layer, or of `modules` in it, may bring parameters; its cache is told."""
        late = bool(self._forward_pre_hooks)
        for module in modules:
            late = late or bool(module._forward_pre_hooks)
        if not torch.compiler.is_compiling():  # where nothing is kept
            self._factors.parameters_come_late = late
        return late


_of_memory: dict[tuple[int, int], tuple[StorageWeakRef, FactorCache]] = {}
"""For compiled graphs, by storage and place in it. One that is held weakly gives its name to no other."""


def factor_of_memory(u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor] | None:
    """`FactorCache.get` for whoever has u and no cache: an operator in a compiled graph. Not to be written to.

    None on a GPU, where no rule holds in a graph: one that `torch.compile` made moves the version of what it writes
    before it writes, a captured one moves none.
    """
    if not _values_are_at_hand([u]):
        return None
    storage = u.untyped_storage()
    place = (storage._cdata, u.storage_offset())
    found = _of_memory.get(place)
    if found is None:
        for other, (ref, _) in list(_of_memory.items()):
            if ref.expired():
                _of_memory.pop(other, None)
        found = _of_memory[place] = (StorageWeakRef(storage), FactorCache())
    return found[1].get([u], [apply_gs], u.dtype)


def validity_key(us: Sequence[Tensor], apply_gs: Sequence[Rule], dtype: torch.dtype) -> tuple:
    """All that a factor belongs to but values."""
    if _values_are_at_hand(us):
        return (dtype == torch.float64, *apply_gs, *[u.dtype for u in us])
    return _key_of_places(us, apply_gs, dtype)


def _key_of_places(us: Sequence[Tensor], apply_gs: Sequence[Rule], dtype: torch.dtype) -> tuple:
    return (dtype == torch.float64, _optimizer_steps, _stream_of(us[0]), *map(_place, us, apply_gs))


def _place(u: Tensor, gs: Rule) -> tuple:
    return u.untyped_storage()._cdata, u.data_ptr(), u._version, u.dtype, u.shape, u.stride(), gs


def copied_values(us: Sequence[Tensor]) -> list[Tensor]:
    """Copies to compute from and to compare with later; none where comparing would stall a GPU."""
    return [u.detach().clone() for u in us] if _values_are_at_hand(us) else []


def refill(layers: Iterable[tuple[FactorCache, Sequence[Tensor], Sequence[Rule]]]) -> None:
    """Bring the caches of a model up to date together: factors of one shape come from the launches of one.

    Where a backend computes factors in groups (`ops.factor_in_groups`), 200 layers of three shapes cost the launches of
    three, once an optimizer step; elsewhere each layer is left to compute its own, as is one whose vectors are not here
    yet (partitioned ones are of shape (0,)). The backward of a factor stays with its layer: one node for all of them
    would hold every gradient back to the end, and activation checkpointing could not run a layer's forward again on
    its own.

    Args:
        layers: for each, its cache and what it will ask `FactorCache.get` for; the dtype is that of its vectors.
            Not those whose vectors may change before it asks, by a hook.
    """
    if wants_plain_ops():
        return
    stale = []
    for cache, us, apply_gs in layers:
        if us and cache._may_keep(us) and all(u.dim() == 2 and factor_in_groups(u) for u in us):
            key = validity_key(us, apply_gs, us[0].dtype)
            if cache._kept(key, us) is None:
                stale.append((cache, key, us, apply_gs))
    if len(stale) < 2:
        return
    factors: dict[tuple[int, Rule], tuple[Tensor, Tensor]] = {}
    with _outside_inference_mode():
        copies = [copied_values(us) for _, _, us, _ in stale]
        for gs in {flag: None for _, _, _, flags in stale for flag in flags}:
            wanted = {
                id(u): u
                for (_, _, us, flags), values in zip(stale, copies, strict=True)
                for u, flag in zip(values or us, flags, strict=True)
                if flag == gs
            }
            found = wy_factor_many(list(wanted.values()), gs)
            factors.update(((name, gs), factor) for name, factor in zip(wanted, found, strict=True))
        for (cache, key, us, apply_gs), values in zip(stale, copies, strict=True):
            parts = [factors[id(u), gs] for u, gs in zip(values or us, apply_gs, strict=True)]
            cache._keep(key, us, values, join_factors(parts))


@contextmanager
def computed_at_entry(layers: Iterable[tuple[FactorCache, Sequence[Tensor], Sequence[Rule]]]) -> Iterator[None]:
    """While `torch.compile` traces a model's forward: have its graph compute factors of one shape by one operator.

    Only where graphs keep no factor, on a GPU (`factor_of_memory`). The graph computes them in every call, at this
    place, and `FactorCache.get` gives them while this lasts.

    Args: as of `refill`.
    """
    chains: dict[Rule, list[tuple[FactorCache, Tensor]]] = {}
    for cache, us, apply_gs in layers:
        if us and _values_are_at_hand(us):
            break  # each module that is looked at costs guards; nearly always they are all on one device
        if len(us) == 1 and type(us[0]) is nn.Parameter and us[0].dim() == 2 and not us[0].is_meta:
            chains.setdefault(apply_gs[0], []).append((cache, us[0]))
    for gs, members in chains.items():
        factors = wy_factor_many([u for _, u in members], gs)
        for (cache, u), factor in zip(members, factors, strict=True):
            cache.given = (u, gs, factor)
    try:
        yield
    finally:
        for members in chains.values():
            for cache, _ in members:
                cache.given = None
