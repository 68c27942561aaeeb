"""Keeps a layer's compact WY factor between two changes of its parameters.

A factor depends on parameters alone, so a training step with many micro-batches, or the generation of many tokens,
needs it once. What counts as a change: another tensor, another version of it (any in-place operation PyTorch sees), a
step of any `torch.optim.Optimizer` since (some optimisers write through raw pointers, which no version shows), and on a
CPU any other value (weight averaging and `torch.autograd.gradcheck` write through `.data`). Comparing values would
stall a GPU: there, code that writes through `.data` outside an optimiser calls `clear()`.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hra_kernels.ops import _wants_plain_ops, chain_factor

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


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
        if _wants_plain_ops():
            return None
        if not self._may_keep(us):
            return chain_factor(us, apply_gs, dtype)
        device = us[0].device
        stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
        key = (
            _optimizer_steps,
            dtype == torch.float64,
            stream,
            *((u.data_ptr(), u._version, u.dtype, gs) for u, gs in zip(us, apply_gs, strict=True)),
        )
        entry = self._entry
        if entry is not None and entry[0] == key and all(kept() is u for kept, u in zip(entry[1], us, strict=True)):
            _, _, values, factor = entry
            if all(torch.equal(value, u) for value, u in zip(values, us, strict=False)):
                return factor
        with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
            factor = chain_factor(us, apply_gs, dtype)
            values = [u.detach().clone() for u in us] if device.type == "cpu" else []
        self._entry = (key, [weakref.ref(u) for u in us], values, factor)
        return factor

    def clear(self) -> None:
        """Forget the factor."""
        self._entry = None

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
