"""PEFT's HRA layer on the compiled kernels.

    y = base_layer(x Qᵀ),  Q = Q_1 Q_2 ... of the active adapters, applied in one pass over x

The base layer is always run through its own forward, so its hooks, its quantization and its offloading are its own
business. Saved for backward: x, x vᵀ (M, R) and the factor; the factor is computed once per value of the adapters.
"""

import warnings
from functools import partial
from typing import Any

import torch
from peft.tuners.hra.layer import HRALayer
from peft.tuners.hra.layer import HRALinear as PeftHRALinear
from torch import Tensor, nn

from hra_kernels.factor_cache import FactorCache
from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.ops import reflect_chain
from hra_kernels.peft import merge, sharded
from hra_kernels.peft.adapter_names import MixedBatch, MixedFactors, check_mixed_batch
from hra_kernels.peft.offload import loaded

_CASTABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ReflectionLayer(nn.Module, HRALayer):
    """What the layers of this package share. A subclass supplies `_adapted_forward`, and `_mixed_forward` if it can.

    An nn.Module first, as PEFT's layers are: FSDP2 gives a layer that it wraps another class of the same layout.
    """

    name_in_model: str = ""
    """Where the layer sits in its model, for error messages."""

    _merged: "merge.Merged | None" = None
    _mixed_factors: MixedFactors | None = None

    def describe(self) -> str:
        """The layer's name in its model where known, and its kind."""
        base = self.get_base_layer()
        kind = f"{type(self).__name__} over {type(base).__name__}({self.in_features}, {self.out_features})"
        return f"layer {self.name_in_model!r} ({kind})" if self.name_in_model else kind

    # --- parameters

    def reset_hra_parameters(self, adapter_name: str) -> None:
        """PEFT's default initialization: pairs of equal columns, so that the layer starts as the base layer.

        With `apply_GS` there is no such start: Gram-Schmidt keeps one of each pair (the other depends on it), leaving
        r / 2 reflections, -1 on their span, and no gradient for the rest. Independent columns are drawn instead.
        """
        if self.hra_apply_GS[adapter_name]:
            warnings.warn(
                f"HRA adapter {adapter_name!r}: apply_GS=True cannot start from HRA's pairs of equal columns, of which "
                "Gram-Schmidt keeps one each; independent columns are drawn, so the layer does not start as the base "
                "layer (none with apply_GS can). Set init_weights=False to say that this is meant.",
                stacklevel=2,
            )
            self.reset_hra_parameters_random(adapter_name)
        else:
            super().reset_hra_parameters(adapter_name)

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> Tensor:
        """Q = H_1 ... H_r of one adapter, dense (D, D) in the dtype of `hra_u`; H_r ... H_1 if reverse.

        For PEFT's callers only: forward, merge and unmerge never form it.
        """
        u = self.hra_u[adapter_name]
        identity = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
        return reflect_chain(identity, [u], [self.hra_apply_GS[adapter_name]], transpose=reverse)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: a chain of r reflections is exactly a LoRA of rank r. See `hra_kernels.peft.export`."""
        return True

    def train(self, mode: bool = True) -> nn.Module:
        """As `nn.Module.train`. Forgets the cached factor: weights averaged by hand are swapped in around this call."""
        self._forget_factors()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the adapter's factors go with it."""
        self._forget_factors()
        super().delete_adapter(adapter_name)

    def _forget_factors(self) -> None:
        self._factors.clear()
        self._mixed_factors = None

    # --- forward

    def _adapters_to_apply(self, adapter_names: list[str] | None = None) -> list[str]:
        """In PEFT's order: W Q_1 Q_2 ...; of a mixed batch, those on this layer that a sample names."""
        if self.disable_adapters or self.merged:
            return []
        if adapter_names is not None:
            return [name for name in self.hra_u if name in adapter_names]
        return [name for name in self.active_adapters if name in self.hra_u]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the active adapters' reflections in its weight.

        Args:
            x: the base layer's input. Outside autocast it is cast to the base weight's floating dtype, and the result
                back to x's, unless `peft.helpers.disable_input_dtype_casting` is in force; under autocast it is cast
                as the base layer itself would, and the result has the base layer's dtype.
            args, kwargs: passed to the base layer as they are. But `adapter_names`, one a sample of the batch, chooses
                for each sample one adapter, or none by the name "__base__", in place of the active ones.

        With no adapter active on this layer, or on a sample, the result is the base layer's, bit for bit.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            check_mixed_batch(self, x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._adapters_to_apply(adapter_names)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        with loaded(self.hra_u):
            return self._cast_forward(x, names, adapter_names, *args, **kwargs)

    def _cast_forward(
        self, x: Tensor, names: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        given = x.dtype
        x = self._cast_for_base(x)
        if adapter_names is not None:
            result = self._mixed_forward(x, adapter_names, *args, **kwargs)
        else:
            us, apply_gs = [self.hra_u[name] for name in names], [self.hra_apply_GS[name] for name in names]
            result = self._adapted_forward(x, us, apply_gs, *args, **kwargs)
        return result if x.dtype == given or torch.is_autocast_enabled(x.device.type) else result.to(given)

    def _cast_for_base(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return x if x.dtype == torch.float64 else self._cast_input_dtype(x, torch.get_autocast_dtype(kind))
        weight = getattr(self.get_base_layer(), "weight", None)
        # a quantized weight's dtype says nothing about the inputs it wants
        return self._cast_input_dtype(x, weight.dtype) if getattr(weight, "dtype", None) in _CASTABLE else x

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[bool], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the chains along `us` in its weight; what a subclass is there for."""
        raise NotImplementedError

    def _mixed_batch(self, adapter_names: list[str], x: Tensor) -> MixedBatch:
        """What `reflect_mixed` needs for an x whose samples have these adapters."""
        if self._mixed_factors is None:
            self._mixed_factors = MixedFactors()
        return self._mixed_factors.get(self, adapter_names, x)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        why = ", whose weight is sharded" if sharded.is_sharded(self.get_base_layer()) else ""
        raise NotImplementedError(
            f"HRA: adapter_names (a batch that mixes adapters) is not supported by {self.describe()}{why}; exclude "
            "it (exclude_modules), or choose adapters with set_adapter() and run one forward for each"
        )

    # --- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the reflections into the base weight: W Q_1 Q_2 ..., computed in float32 (float64) and rounded once.

        The original weight is kept while merged, so that `unmerge` restores its bits.

        Args:
            safe_merge: accepted for PEFT's sake: every merge of a layer is checked before its weight is touched.
            adapter_names: which adapters, in this order; by default the active ones.

        Raises:
            ValueError: `hra_u` or the merged weight is not finite; the weight is left as it was.
            NotImplementedError: the base weight is not loaded, or quantized in a format that cannot be written.
        """
        merge.merge(self, adapter_names)

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original weight, bit for bit.

        Where the base weight was changed while merged, the reflections of the merge are undone on the changed weight.
        """
        merge.unmerge(self)


class HRALinear(ReflectionLayer, PeftHRALinear):
    """PEFT's HRA layer over an `nn.Linear` or a subclass of it, quantized ones included.

    Arguments, attributes and parameters are those of `peft.tuners.hra.layer.HRALinear`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._factors = FactorCache()

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[bool], *args: Any, **kwargs: Any) -> Tensor:
        if sharded.is_sharded(self.get_base_layer()):
            reflect = partial(sharded.reflect, layer=self, us=us, apply_gs=apply_gs)
            return sharded.call_base(self, reflect, x, *args, **kwargs)
        factor = self._factors.get(us, apply_gs, x.dtype)
        return self.base_layer(reflect_chain(x, us, apply_gs, factor, transpose=True), *args, **kwargs)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if sharded.is_sharded(self.get_base_layer()):
            return ReflectionLayer._mixed_forward(self, x, adapter_names)
        batch = self._mixed_batch(adapter_names, x)
        return self.base_layer(reflect_mixed(x, *batch, transpose=True), *args, **kwargs)
