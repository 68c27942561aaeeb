"""PEFT's `adapter_names`: the samples of one batch, each with an adapter of its own or with none ("__base__").

The rules are those of PEFT's LoRA: in evaluation mode, one name a sample, known adapters, nothing merged; under beam
search a name holds for all beams of its sample. `accept_adapter_names` hands the names to the layers while the model
runs, `MixedFactors` keeps for one layer what `hra_kernels.mixed_batch` needs.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.hra.layer import HRALayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hra_kernels.factor_cache import FactorCache
from hra_kernels.factors import stack_factors
from hra_kernels.ops import attach_factor, in_factor_dtype

BASE = "__base__"


class MixedFactors:
    """The factors of one layer's adapters side by side, and the samples' places among them, as last asked for.

    Each adapter's factor is remembered as `FactorCache` does it; while none changes, and the same adapters are asked
    for, a call launches nothing. Memory: twice the factors. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._caches: dict[str, FactorCache] = {}
        self._stack: tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] | None = None
        self._places: tuple[tuple, tuple[Tensor, Tensor | None]] | None = None

    def get(
        self, names: list[str], us: list[Tensor], flags: list[bool], adapter_names: Sequence[str], x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(v, t, chains, samples) of `mixed_batch.reflect_mixed` for a batch x whose samples have `adapter_names`.

        Args:
            names: those of them that are on the layer, one at least, each once.
            us: their vectors (D, r).
            flags: their `apply_GS`.
        """
        us = in_factor_dtype(us, x.dtype)
        caches = [self._caches.setdefault(name, FactorCache()) for name in names]
        factors = [cache.get([u], [gs], x.dtype) for cache, u, gs in zip(caches, us, flags, strict=True)]
        return *self._stacked(us, flags, factors), *self._place(names, adapter_names, x.device)

    def _stacked(self, us: list[Tensor], flags: list[bool], factors: list) -> tuple[Tensor, Tensor]:
        if None in factors or (torch.is_grad_enabled() and any(u.requires_grad for u in us)):
            attached = [attach_factor([u], [gs], factor) for u, gs, factor in zip(us, flags, factors, strict=True)]
            return stack_factors(attached)
        kept = self._stack
        if kept is not None and list(map(id, kept[0])) == list(map(id, factors)):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            stack = stack_factors(factors)
        self._stack = (factors, stack)
        return stack

    def _place(self, names: list[str], adapter_names: Sequence[str], device: torch.device) -> tuple:
        key = (tuple(names), tuple(adapter_names), device)
        kept = self._places
        if kept is None or kept[0] != key:
            samples = [sample for sample, name in enumerate(adapter_names) if name in names]
            chains = [names.index(adapter_names[sample]) for sample in samples]
            with torch.inference_mode(False):
                places = (
                    torch.tensor(chains, device=device),
                    None if len(samples) == len(adapter_names) else torch.tensor(samples, device=device),
                )
            self._places = kept = (key, places)
        return kept[1]

    def __deepcopy__(self, memo: dict) -> "MixedFactors":
        return MixedFactors()

    def __reduce__(self) -> tuple:
        return MixedFactors, ()


def check_mixed_batch(layer: HRALayer, x: Tensor, adapter_names: Sequence[str]) -> None:
    """Raise ValueError where the names do not fit this layer's batch, or the layer is merged; as PEFT's LoRA does."""
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def _hand_over(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str], thread: int):
    """A forward pre-hook, for the calls of one thread: others may be running the same model with other names."""
    return (args, {**kwargs, "adapter_names": adapter_names}) if threading.get_ident() == thread else None


@contextmanager
def accept_adapter_names(
    model: nn.Module, tuner_layers: Sequence[HRALayer], adapter_names: Sequence[str], num_beams: int | None
) -> Iterator[None]:
    """While this lasts, the model's adapted layers (and PEFT's `modules_to_save`) are called with these names.

    Args:
        model: the base model, in evaluation mode.
        tuner_layers: its adapted layers.
        adapter_names: one per sample.
        num_beams: as given to `generate`. Samples are repeated as often, but not for an encoder.

    Raises:
        TypeError, ValueError: no list of names, a model in training mode, an unknown name.
    """
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(adapter_names).difference([BASE], *(layer.hra_u for layer in tuner_layers))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    encoder = model.get_encoder() if beams > 1 and hasattr(model, "get_encoder") else None
    in_encoder = set() if encoder is None or encoder is model else set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(beams)]
    with ExitStack() as stack:
        for module in [*tuner_layers, *(m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))]:
            names = list(adapter_names) if module in in_encoder else repeated
            hook = partial(_hand_over, adapter_names=names, thread=threading.get_ident())
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
