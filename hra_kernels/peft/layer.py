"""PEFT's HRA layer on the compiled kernels: what the layers over all kinds of base layers share.

    W Q in place of the base layer's weight W,  Q = Q_1 Q_2 ... of the active adapters, applied in one pass

The base layer is run through its own forward, so its hooks, its quantization and its offloading are its own business;
only for a plain `nn.Linear` without any is W Q formed, in training, where that is faster (`weight_side`). Saved for
backward: x, x vᵀ (M, R) and the factor; the factor is computed once per value of the adapters.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from hra_kernels.factor_cache import FactorCache, KeepsFactors
from hra_kernels.ops import reflect_chain, wants_plain_ops
from hra_kernels.partition import gather_in_forward, held, is_whole, weight_of
from hra_kernels.peft import base_weight, merge
from hra_kernels.peft.adapter_names import MixedFactors, check_mixed_batch
from hra_kernels.peft.powers import PowerCache
from hra_kernels.peft.sharded import is_sharded, whole_vectors
from hra_kernels.peft.vectors import AdapterVectors
from hra_kernels.soft import Rule

_WITHOUT_BASE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class ReflectionLayer(KeepsFactors, AdapterVectors):
    """A subclass supplies `_vector_shape`, `_adapted_forward`, and `_mixed_forward` if it can.

    An nn.Module first, as PEFT's layers are: FSDP2 gives a layer that it wraps another class of the same layout. Where
    a subclass is one of PEFT's layers too, it is listed behind: all that those do is done here, for any base layer.
    """

    sides: tuple[str, ...] = ("input",)
    """What `HRAConfig.side` may be over this kind of base layer."""

    name_in_model: str = ""
    """Where the layer sits in its model, for error messages."""

    torchao_configuration: Callable[[], Any] | None = None
    """How the model was quantized, where torchao did it and transformers loaded it; needed to merge."""

    _merged: merge.Merged | None = None
    _mixed_factors: dict[str, MixedFactors] | None = None
    """By side."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any = None, r: int = 0, **fields: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.hra_r: dict[str, int] = {}
        self.hra_apply_GS: dict[str, bool] = {}
        self.hra_side: dict[str, str] = {}
        self.hra_eps: dict[str, float] = {}
        self.hra_u = nn.ParameterDict({})
        self.hra_scales: dict[str, list[float]] = {}
        self._powers: dict[str, PowerCache] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs: dict[str, Any] = {}
        self.in_features, self.out_features = self._sizes()
        self._factors = FactorCache()
        self._output_factors = FactorCache()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config, **fields)

    def update_layer(self, adapter_name: str, r: int, config: Any = None, **fields: Any) -> None:
        """Add an adapter. PEFT 0.20 and newer hand over the whole config, 0.19 its fields."""
        settings = fields if config is None else vars(config)
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        side, eps = settings.get("side", "input"), settings.get("eps", 0) or 0  # to a compiler 0.0 is a variable
        if side not in self.sides:
            raise NotImplementedError(
                f"HRA: {self.describe()} supports side in {self.sides}, got {side!r}; exclude it (exclude_modules)"
            )
        self.hra_r[adapter_name] = r
        self.hra_apply_GS[adapter_name] = settings.get("apply_GS", False)
        self.hra_side[adapter_name], self.hra_eps[adapter_name] = side, eps
        self.hra_scales[adapter_name] = []
        self._powers[adapter_name] = PowerCache()
        shape = (self.out_features,) if side == "output" else self._vector_shape()
        mark = (1,) if self.is_marked(adapter_name) else ()
        self.hra_u[adapter_name] = nn.Parameter(torch.empty(*shape, *mark, r))
        if settings.get("init_weights", True):
            self.reset_hra_parameters(adapter_name)
        else:
            self.reset_hra_parameters_random(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=settings.get("inference_mode", False))

    def _sizes(self) -> tuple[int, int]:
        """in_features and out_features, as PEFT names them."""
        return _get_in_out_features(self.get_base_layer())

    def get_base_layer(self) -> nn.Module:
        """As PEFT's; at once, where the base layer is one that has none itself."""
        base = self._modules.get("base_layer")  # sooner than by nn.Module's __getattr__
        return base if type(base) in _WITHOUT_BASE else super().get_base_layer()

    def _vector_shape(self) -> tuple[int, ...]:
        """The shape of `hra_u` without its last dimension, r."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "hra." + nn.Module.__repr__(self)

    def describe(self) -> str:
        """The layer's name in its model where known, and its kind."""
        base = self.get_base_layer()
        kind = f"{type(self).__name__} over {type(base).__name__}({self.in_features}, {self.out_features})"
        return f"layer {self.name_in_model!r} ({kind})" if self.name_in_model else kind

    # --- parameters

    def base_parameter(self) -> Tensor | None:
        """The parameter that the reflections act on, as the base layer has it now; None where it has none."""
        return weight_of(self.get_base_layer())

    def chain_to_refill(self) -> tuple[FactorCache, list[Tensor], list[Rule]] | None:
        """What the next forward will ask of its cache (`factor_cache.refill`); None where that is not known ahead."""
        names = self._adapters_to_apply()
        hidden = base_weight.is_offloaded(self.hra_u) or self.look_for_hooks(self.hra_u)
        if hidden or not all(is_whole(held(self.hra_u, name)) for name in names):
            return None
        output = self.of_side("output", names)
        if output and output != names:  # two factors: each is computed where it is wanted
            return None
        return self._output_factors if output else self._factors, *self.chain(names)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's; to where the base layer runs, if accelerate keeps it elsewhere. Aligned, as files need not be."""
        device = device or base_weight.runs_on(self.get_base_layer())
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        u = self.hra_u[adapter_name]
        if type(u) is nn.Parameter and not u.is_meta and u.data_ptr() % u.element_size():
            self.hra_u[adapter_name] = nn.Parameter(u.detach().clone(), u.requires_grad)

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> Tensor:
        """Q = H_1 ... H_r of one adapter, dense (D, D) in the dtype of `hra_u`; H_r ... H_1 if reverse.

        For PEFT's callers only: forward, merge and unmerge never form it.
        """
        u = self.vectors(adapter_name)
        identity = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
        return reflect_chain(identity, *self.chain([adapter_name]), transpose=reverse)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: a chain of r reflections is exactly a LoRA of rank r. See `hra_kernels.peft.export`."""
        return True

    def copy_adapter(self, source: str, target: str) -> None:
        """Give one adapter the vectors of another, bit for bit; both are on the layer, with one configuration."""
        before = self.hra_u[target]
        if source in self.hra_r and not before.is_meta:
            copied = self.hra_u[source].detach().clone()
            self.hra_u[target] = nn.Parameter(copied, requires_grad=before.requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the adapter's scale, side, eps and factors go with it."""
        super().delete_adapter(adapter_name)
        for settings in (self.hra_scales, self.hra_side, self.hra_eps):
            settings.pop(adapter_name, None)
        self.forget_factors()

    def forget_factors(self) -> None:
        """Compute the factors anew in the next forward, those of a mixed batch too."""
        super().forget_factors()
        self._output_factors.clear()
        self._mixed_factors = None
        self._powers = {name: PowerCache() for name in self.hra_r}

    # --- forward

    def always_call(self) -> None:
        """Have a hook: for that `nn.TransformerEncoderLayer` calls a layer whose weight it else reads in evaluation."""
        if not self._forward_hooks:  # not a pre-hook: that could bring parameters, and no factor would be kept for it
            self.register_forward_hook(_do_nothing)

    def _adapters_to_apply(self, adapter_names: list[str] | None = None) -> list[str]:
        """In PEFT's order: W Q_1 Q_2 ...; of a mixed batch, those on this layer that a sample names."""
        if self._disable_adapters:
            return []
        if adapter_names is not None:
            names = [name for name in self.hra_r if name in adapter_names]
        else:
            names = self.left_to_apply(self.merged_adapters)
        return [name for name in names if self._scale_of(name) != 0]

    def left_to_apply(self, merged: Sequence[str]) -> list[str]:
        """The active adapters of this layer that `forward` applies while these are merged, in this order.

        Of W Q_A Q_B that is B where A is merged. Nothing where an adapter is merged that is not active: then the
        merged weight is what was asked for.

        Raises:
            ValueError: an active adapter that is not merged comes before one that is.
        """
        active = [name for name in self.active_adapters if name in self.hra_r]
        if not merged:
            return active
        left = [name for name in active if name not in merged]
        if not left or not set(merged) <= set(active):
            return []
        if active[: len(merged)] != list(merged):
            raise ValueError(
                f"HRA: {self.describe()} has the active adapters {active}, in the order of their product; while some "
                f"of them are not merged, those that are must be the first ones, in this order, got {list(merged)}. "
                "Merge the others first, or choose what is merged with set_adapter()"
            )
        return left

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the active adapters' reflections in its weight.

        Args:
            x: the base layer's input. Outside autocast it is cast to the base weight's floating dtype, and the result
                back to x's, unless `peft.helpers.disable_input_dtype_casting` is in force; under autocast it is cast
                as the base layer itself would, and the result has the base layer's dtype.
            args, kwargs: passed to the base layer as they are. But `adapter_names`, one per sample, chooses
                for each sample one adapter, or none by the name "__base__", in place of the active ones.

        With no adapter active on this layer, or on a sample, the result is the base layer's, bit for bit.
        """
        plain = None if kwargs or torch.compiler.is_compiling() else self._plain_chain(x)
        if plain is not None:
            return self._adapted_forward(x, *plain, *args)
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            check_mixed_batch(self, x, adapter_names)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        names = self._adapters_to_apply(adapter_names)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        hra_u = self._modules["hra_u"]
        if not torch.compiler.is_compiling():
            self._output_factors.parameters_come_late = self.look_for_hooks(hra_u)
            gather_in_forward(self, [held(hra_u, name) for name in names])
        if not base_weight.is_offloaded(hra_u):
            return self._cast_forward(x, names, adapter_names, *args, **kwargs)
        with base_weight.loaded(hra_u):
            return self._cast_forward(x, names, adapter_names, *args, **kwargs)

    def _plain_chain(self, x: Tensor) -> tuple[list[Tensor], list[bool]] | None:
        """`chain` of the only adapter, where `forward` has nothing to do but `_adapted_forward` of x; else None.

        That is most calls, and where layers are small, looking closer costs as much as the reflections.
        """
        name = self._active_adapter
        if type(name) is not str:
            name = name[0] if len(name) == 1 else None
        hra_u, base = self._modules["hra_u"], self._modules["base_layer"]
        u, weight = hra_u._parameters.get(name), base._parameters.get("weight")
        if (
            type(u) is not nn.Parameter
            or type(weight) is not nn.Parameter
            or weight.dtype != x.dtype
            or u.dim() != 2  # an output side, or eps
            or len(self.hra_r) != 1
            or self._disable_adapters
            or self.merged_adapters
            or self.hra_scales[name]
            or hasattr(u, "ds_id")
            or self._forward_pre_hooks
            or hra_u._forward_pre_hooks
            or "_hf_hook" in vars(hra_u)
            or torch._C._is_any_autocast_enabled()  # on another device too, but asked in a third of the time
        ):
            return None
        self._factors.parameters_come_late = False
        return [u], [self.hra_apply_GS[name]]

    def _cast_forward(
        self, x: Tensor, names: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        given = x.dtype
        x = self._cast_for_base(x)
        cast = x.dtype != given and not torch.is_autocast_enabled(x.device.type)
        if self.of_side("output", names):
            result = self._forward_with_output(x, names, adapter_names, *args, **kwargs)
        elif adapter_names is not None:
            result = self._mixed_forward(x, adapter_names, *args, **kwargs)
        else:
            result = self._adapted_forward(x, *self.chain(names), *args, **kwargs)
        if adapter_names is None and len(self.hra_r) > 1:
            _show_to_checkpoints([list(self.hra_r).index(name) for name in names], result)
        return result.to(given) if cast else result

    def _cast_for_base(self, x: Tensor) -> Tensor:
        kind, given = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            return x if given == torch.float64 else self._cast_input_dtype(x, torch.get_autocast_dtype(kind))
        dtype = getattr(self.base_parameter(), "dtype", given)
        if dtype == given:
            return x
        # a quantized weight's dtype says nothing about the inputs it wants
        return self._cast_input_dtype(x, dtype) if dtype in base_weight.MERGEABLE else x

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[Rule], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the chains along `us` in its weight; what a subclass is there for."""
        raise NotImplementedError

    def _forward_with_output(
        self, x: Tensor, names: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `_adapted_forward` and `_mixed_forward`, where some of `names` are on the output side."""
        raise NotImplementedError

    def _call_with(self, adapt: Callable[[Tensor], Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer of x with `adapt` of its own parameter in that one's place."""
        if base_weight.is_offloaded(self.get_base_layer()):  # its hook would load the plain weight over ours
            raise NotImplementedError(
                f"HRA: {self.describe()} runs its own forward with the adapted weight and is offloaded, which together "
                "is not supported; keep it loaded, or merge the adapter first"
            )
        parameter = self.base_parameter()
        name = next(name for name, one in self.base_layer.named_parameters() if one is parameter)
        return functional_call(self.base_layer, {name: adapt(parameter)}, (x, *args), kwargs)

    def _mixed_batch(self, adapter_names: list[str], x: Tensor, side: str = "input") -> tuple:
        """What `reflect_mixed` needs after an x whose samples have these adapters."""
        if self._mixed_factors is None:
            self._mixed_factors = {}
        names = self.of_side(side, self._adapters_to_apply(adapter_names))
        return self._mixed_factors.setdefault(side, MixedFactors()).get(names, *self.chain(names), adapter_names, x)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        why = ", whose weight is sharded" if is_sharded(self.get_base_layer()) else ""
        raise NotImplementedError(
            f"HRA: adapter_names (a batch that mixes adapters) is not supported by {self.describe()}{why}; exclude "
            "it (exclude_modules), or choose adapters with set_adapter() and run one forward for each"
        )

    # --- merging

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_original: bool = True
    ) -> None:
        """Put the reflections into the base weight, in place: W Q_1 Q_2 ..., in float32 (float64) and rounded once.

        Args:
            safe_merge: accepted for PEFT's sake: every merge of a layer is checked before its weight is touched.
            adapter_names: which adapters, in this order; by default the active ones. What remains of the active ones
                stays applied in `forward`, if these come first among them.
            keep_original: keep a copy of the weight while merged, so that `unmerge` restores its bits.

        Raises:
            ValueError: `hra_u` or the merged weight is not finite; the weight is left as it was.
            NotImplementedError: the base weight is not loaded, or quantized in a format that cannot be written, or a
                linear layer or an embedding has a forward of its own.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hra_r]
        if names:
            self.require_mergeable(names)
            chain, sides = self.chain(names), [self.hra_side[name] for name in names]
            weight = self.readable_weight()
            self._merged = merge.merge(weight, names, *chain, sides, self._merged, keep_original)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out again, in place: the original weight, bit for bit.

        Where no original was kept, or the weight was changed while merged, the reflections of the merge are undone on
        the weight as it is, in float32 (float64) and rounded once.

        Raises:
            ValueError: there is a soft chain (`eps`) that cannot be undone; the layer stays merged.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._merged is not None:
            merge.unmerge(self.readable_weight(), self._merged)
        self._merged = None
        self.merged_adapters.clear()

    def readable_weight(self) -> base_weight.Weight | None:
        """The base weight as floating-point rows, to be read and written; None where it cannot be had as such."""
        return base_weight.readable_weight(self, self.describe(), self.torchao_configuration)

    def why_not_mergeable(self) -> str | None:
        """Why the base weight cannot be merged into, or None where it can."""
        return base_weight.why_not_mergeable(self.get_base_layer(), self.torchao_configuration)

    def is_loaded_to_merge(self) -> bool:
        """Whether PEFT loads the base weight around a merge: before that, nothing can be said about it."""
        return base_weight.is_offloaded(self.get_base_layer())

    def require_mergeable(self, names: Sequence[str], safe_merge: bool = False) -> None:
        """Raise where merging these adapters could not work; nothing is changed.

        Args:
            names: adapters of this layer.
            safe_merge: compute the merged weight too, and drop it.

        Raises:
            ValueError: an `hra_u`, or the merged weight, is not finite.
            NotImplementedError: the base weight is not loaded, or quantized in a format that cannot be written, or a
                linear layer or an embedding has a forward of its own.
        """
        reason = self.why_not_mergeable()
        if reason:
            raise NotImplementedError(
                f"HRA cannot merge into {self.describe()}: {reason}. Supported are plain float32, float64, bfloat16 "
                "and float16 weights in layers that run the forward of their kind and, with PEFT 0.20 or newer, "
                "bitsandbytes, HQQ and torchao layers; run the adapter unmerged, exclude the layer "
                "(exclude_modules), or merge into an unquantized copy of the model."
            )
        us, apply_gs = self.chain(names)
        for name, u in zip(names, whole_vectors(us, self.describe()), strict=True):
            if not u.isfinite().all():
                raise merge.broken([name], "its hra_u holds NaN or infinity", self.describe())
        if safe_merge:
            sides = [self.hra_side[name] for name in names]
            merge.require_finite_result(self.readable_weight(), names, us, apply_gs, sides)


def _do_nothing(module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook."""


def _show_to_checkpoints(adapters: list[int], result: Any) -> None:
    """Save an empty tensor with these sizes in the graph behind a layer's result.

    `torch.utils.checkpoint` compares the shapes of what a forward and its recomputation save: so it raises where other
    adapters have been activated in between, whose vectors may well have the same shapes.
    """
    if torch.compiler.is_compiling() or wants_plain_ops():
        return
    outputs = result if isinstance(result, tuple) else (result,)
    node = next((y.grad_fn for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None), None)
    if node is not None:
        node.metadata["hra_active_adapters"] = torch.empty(0, *adapters, requires_grad=True).square()
