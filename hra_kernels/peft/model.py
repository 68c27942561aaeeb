"""PEFT's HRA model, building this package's layers."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.hra.layer import HRALinear as PeftHRALinear
from peft.tuners.hra.model import HRAModel as PeftHRAModel
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, onload_layer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hra_kernels.factor_cache import computed_at_entry, optimizer_steps, refill
from hra_kernels.ops import in_compiled_graph
from hra_kernels.partition import held, whole
from hra_kernels.peft.adapter_names import accept_adapter_names
from hra_kernels.peft.base_weight import is_offloaded, quantization_of, torchao_configuration
from hra_kernels.peft.conv import conv_layer_class
from hra_kernels.peft.embedding import HRAEmbedding
from hra_kernels.peft.experts import wrap_parameter
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.peft.linear import HRALinear, HRAQuantizedLinear
from hra_kernels.peft.merge import memory_of, shared_parameters
from hra_kernels.peft.names import plain_name
from hra_kernels.peft.sharded import give_back_gathered_weights
from hra_kernels.peft.weighted import add_weighted_adapter

_LAYERS_TAKE_CONFIG = "config" in inspect.signature(PeftHRALinear.__init__).parameters
"""PEFT 0.20 and newer hand the whole config to a layer; 0.19 hands over its fields."""


_POLICY, _REFERENCE = "default", "ref"
"""The adapters of TRL's trainers. They add the reference with the policy's own configuration object and then copy the
parameters named `....default....`, of which HRA has none (`hra_u.default`): here it starts as that copy instead."""


def layer_class(base: nn.Module) -> type[ReflectionLayer] | None:
    """The class for a base layer; None where HRA is not supported over it."""
    if quantization_of(base) is not None:
        return HRAQuantizedLinear
    if isinstance(base, nn.Linear | Conv1D):
        return HRALinear
    return HRAEmbedding if isinstance(base, nn.Embedding) else conv_layer_class(base)


def names_in_state_dict(model: nn.Module) -> set[str]:
    """Of all layers' vectors, without an adapter's name; FSDP takes the names of its wrappers out."""
    return {
        f"{name}.hra_u".replace("_fsdp_wrapped_module.", "")
        for name, module in model.named_modules()
        if isinstance(module, ReflectionLayer)
    }


class HRAModel(PeftHRAModel):
    """PEFT's `HRAModel` with this package's layers (`layer_class`); same arguments, attributes and checkpoints.

    A merge of several layers is checked before the first weight changes.
    """

    _refilled_after: int = -1
    """`optimizer_steps()` when the layers' factors were last computed together."""

    _passed_over: frozenset[str] = frozenset()
    """Modules that the configuration now being applied matches, and that cannot be adapted."""

    def _prepare_model(self, config: Any, model: nn.Module) -> None:
        """As PEFT's, before an adapter is added. What cannot be adapted is passed over, unless named in full."""
        super()._prepare_model(config, model)
        named = config.target_modules
        config = _maybe_include_all_linear_layers(config, model)
        self._passed_over = frozenset()
        uncalled = {
            f"{name}.{child}" if name else child
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for child, _ in module.named_children()
        }
        in_full = {named} if isinstance(named, str) else set(named or ())
        found = sorted(name for name in uncalled - in_full if self._check_target_module_exists(config, name))
        if config.target_modules is not named:  # "all-linear" is saved as the names that it stands for
            config.target_modules = set(config.target_modules).difference(found)
        if found:
            self._passed_over = frozenset(found)
            warnings.warn(
                f"HRA passes over {', '.join(found)}: nn.MultiheadAttention uses that weight without calling the "
                "layer, so an adapter there would have no effect. All else is adapted; to say that this is meant, "
                f"set exclude_modules={found}.",
                stacklevel=2,
            )

    def _check_target_module_exists(self, config: Any, key: str) -> Any:
        return key not in self._passed_over and super()._check_target_module_exists(config, key)

    def _create_and_replace(
        self,
        hra_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise NotImplementedError(
                f"HRA cannot adapt {current_key!r}: nn.MultiheadAttention uses the weight of its {target_name} without "
                f"calling it, so an adapter there would have no effect. Exclude it: exclude_modules=[{current_key!r}]."
            )
        parameter_name = optional_kwargs.get("parameter_name")
        if parameter_name is None:
            super()._create_and_replace(
                hra_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
            )
            layer = getattr(parent, target_name)
        else:
            layer = wrap_parameter(target, adapter_name, parameter_name, r=hra_config.r, config=hra_config)
            if layer is not target:
                if adapter_name not in self.active_adapters:
                    layer.requires_grad_(False)
                self._replace_module(parent, target_name, layer, target)
        if isinstance(layer, ReflectionLayer):
            if isinstance(parent, nn.TransformerEncoderLayer):
                layer.always_call()
            layer.name_in_model = current_key
            layer.torchao_configuration = torchao_configuration(self.model)
            if adapter_name == _REFERENCE and hra_config is self.peft_config.get(_POLICY):
                layer.copy_adapter(_POLICY, _REFERENCE)
            self._tie(layer, adapter_name)

    def _tie(self, layer: ReflectionLayer, adapter_name: str) -> None:
        """Give a layer the vectors of the token embeddings, where `ensure_weight_tying` is to keep both tied."""
        if self._check_tied_module_exists(self.peft_config[adapter_name], layer.name_in_model):
            layer.hra_u[adapter_name] = self.model.get_input_embeddings().hra_u[adapter_name]

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_targets_to_tie(self, peft_config, tied_weight_keys)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's, which calls this after loading, where low_cpu_mem_usage has replaced the parameters."""
        for layer in self._layers():
            if adapter_name in layer.hra_u:
                self._tie(layer, adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _check_new_adapter_config(self, config: Any) -> None:
        """As PEFT's. Where wrappers of parameters are nested is part of the names in a file, for all adapters alike."""
        super()._check_new_adapter_config(config)
        if not _LAYERS_TAKE_CONFIG and (getattr(config, "side", "input") != "input" or getattr(config, "eps", 0)):
            raise ValueError("HRA: PEFT 0.19 has no room for side and eps; install a newer one")
        wanted = set(getattr(config, "target_parameters", None) or ())
        for name, other in self.peft_config.items():
            present = set(getattr(other, "target_parameters", None) or ())
            if other is config or not (wanted and present):
                continue
            if not _LAYERS_TAKE_CONFIG:
                raise ValueError("HRA: PEFT 0.19 has room for one adapter with target_parameters; install a newer one")
            if wanted != present:
                raise ValueError(
                    "HRA: all adapters with target_parameters must have the same; the new one has "
                    f"{sorted(wanted)}, adapter {name!r} has {sorted(present)}"
                )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT's, which assigns `weight` even where a base layer comes back; quantized ones may have none.

        And it moves a new layer's vectors to where accelerate keeps the base weight, which may be no memory at all.
        """
        if isinstance(child, ReflectionLayer) and new_module is child.get_base_layer():
            setattr(parent, child_name, new_module)
            return
        vectors = dict(new_module.hra_u) if isinstance(new_module, ReflectionLayer) else {}
        super()._replace_module(parent, child_name, new_module, child)
        if vectors and is_offloaded(new_module.get_base_layer()):
            new_module.hra_u.update(vectors)

    @staticmethod
    def _create_new_module(hra_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = layer_class(base)
        if kind is None:
            raise TypeError(
                f"Target module {target} is not supported. Currently, HRA supports torch.nn.Linear, Conv1d, Conv2d, "
                "Conv3d and Embedding, transformers' Conv1D, and quantized linear layers that PEFT 0.20 or newer knows."
            )
        if _LAYERS_TAKE_CONFIG:
            kwargs["config"] = hra_config
        return kind(target, adapter_name, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT's, which calls it for each key of a file, with the names of a model whose blocks are not compiled."""
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    def _refill_factors(self) -> None:
        """Once after an optimizer's step: factors of one shape together, where that saves launches (`refill`)."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # nothing is kept
            return
        if self._refilled_after == optimizer_steps():
            return
        self._refilled_after = optimizer_steps()
        refill(self._chains_to_refill())

    def _chains_to_refill(self) -> Iterator[tuple]:
        for layer in self._layers_that_are_complete():
            chain = layer.chain_to_refill()
            if chain is not None:
                yield chain

    def _layers_that_are_complete(self) -> Iterator[ReflectionLayer]:
        """Those whose parameters no forward pre-hook of a module around them can still bring or change."""
        modules, seen = [self.model], set()
        while modules:
            module = modules.pop()
            if module in seen or module._forward_pre_hooks:
                continue
            seen.add(module)
            if isinstance(module, ReflectionLayer):
                yield module
            modules.extend(module.children())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around forward and generate with their keyword arguments."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None and in_compiled_graph():
            with computed_at_entry(self._chains_to_refill()):
                yield
            return
        if adapter_names is None:
            self._refill_factors()
            yield
            return
        with accept_adapter_names(self.model, self._layers(), adapter_names, kwargs.get("num_beams")):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **settings: Any,
    ) -> None:
        """Add the adapter W Q_1^w_1 Q_2^w_2 ..., of the adapters' summed rank; inactive, as PEFT's LoRA adds it.

        Args:
            adapters: names, in the order of their product.
            weights: 1 is the adapter as it is, -1 its inverse; in between, and beyond, the geodesic from the identity
                (weight 0) through the adapter. That is not defined for odd `r` and for `apply_GS`.
            adapter_name: of the new adapter. Its columns are plain (`apply_GS` False), whatever they come from.
            combination_type: only "cat".
            settings: PEFT's arguments for its other types; refused.

        Raises:
            ValueError: unknown or existing name, another combination type, a weight that is not defined, an adapter
                with trained biases or `modules_to_save`. The model is unchanged.
        """
        if settings:
            raise ValueError(f"add_weighted_adapter: HRA has no use for {', '.join(settings)}; see combination_type")
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def _check_merge_allowed(self) -> None:
        shared = shared_parameters(self.model)
        for layer in self._layers():
            names = shared.get(memory_of(layer.base_parameter()))
            if names:
                raise ValueError(
                    f"HRA cannot merge into {layer.describe()}: its weight is shared (tied) by {', '.join(names)}, "
                    "which the merge would change too. Untie it first (load the model with tie_word_embeddings=False "
                    "and copy the weight), or run the adapter unmerged."
                )
        super()._check_merge_allowed()

    def _check_merge_possible(self, adapter_names: list[str] | None, safe_merge: bool = False) -> None:
        give_back_gathered_weights(self.model)
        for layer in self._layers():
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in layer.hra_r and name not in layer.merged_adapters]
            if names and not layer.is_loaded_to_merge():
                layer.require_mergeable(names, safe_merge)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **other: Any
    ) -> dict[str, Tensor]:
        """As PEFT's, for wrapped models too: a state_dict has its names without those of FSDP's wrappers.

        Raises:
            ValueError: vectors of the adapter are partitioned, and were not gathered for this state_dict.
        """
        found = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **other
        )
        vectors = names_in_state_dict(model)
        found.update((key, u) for key, u in state_dict.items() if key.rpartition(".")[0] in vectors)
        for key, u in found.items():
            if key.rpartition(".")[0] in vectors and u.dim() < 2:
                raise ValueError(
                    f"HRA cannot save adapter {adapter_name!r}: {key} must be whole, got a part of shape "
                    f"{tuple(u.shape)}. Gather first: under DeepSpeed ZeRO-3 save inside "
                    "deepspeed.zero.GatheredParameters(list(model.parameters())), under FSDP1 hand over state_dict=, a "
                    "full state dict (FullStateDictConfig); accelerator.get_state_dict(model) is whole under both."
                )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, for wrapped models too (`_get_adapter_state_dict`); trained biases under their names in this one.

        Raises:
            RuntimeError: DeepSpeed has the adapter's vectors in parts.
        """
        for layer in filter(lambda module: isinstance(module, ReflectionLayer), model.modules()):
            if hasattr(held(layer.hra_u, adapter_name), "ds_id"):
                whole(held(layer.hra_u, adapter_name), "HRA, loading", f"hra_u of {layer.describe()}")
        vectors = names_in_state_dict(model)
        state_dict = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        state_dict = {f"{key}.{adapter_name}" if key in vectors else key: u for key, u in state_dict.items()}
        names = {plain_name(name): name for name, _ in model.named_parameters()}
        return {names.get(key, key): tensor for key, tensor in state_dict.items()}

    def _layers(self) -> list[ReflectionLayer]:
        return [module for module in self.model.modules() if isinstance(module, ReflectionLayer)]

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        progressbar: bool = False,
        keep_original: bool = True,
    ) -> None:
        """As PEFT's; all layers are checked before the first one is merged, and a failure undoes those before it.

        Weights are written in place: whoever else holds their memory sees the merge.

        Args:
            adapter_names: by default the active ones. The other active ones stay applied.
            progressbar: show one, as `merge_and_unload` does.
            keep_original: keep a copy of each weight, so that `unmerge_adapter` restores its bits. Without one it
                undoes the reflections in float32 (float64) and rounds once more.

        Raises:
            ValueError: an `hra_u` or a merged weight is not finite, a weight is tied to one that is not merged, or
                `adapter_names` leaves out an active adapter that comes before one of them.
            NotImplementedError: a base weight is not loaded, or quantized in a format that cannot be written.
        """
        for layer in self._layers():
            asked = layer.active_adapters if adapter_names is None else adapter_names
            layer.left_to_apply(list(dict.fromkeys([*layer.merged_adapters, *(n for n in asked if n in layer.hra_r)])))
        self._check_merge_possible(adapter_names)
        self._check_merge_allowed()
        merged: list[tuple[BaseTunerLayer, list[str]]] = []
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        try:
            for layer in tqdm(layers, disable=not progressbar, desc="Merging adapters"):
                merged.append((layer, list(layer.merged_adapters)))
                settings = {"keep_original": keep_original} if isinstance(layer, ReflectionLayer) else {}
                with onload_layer(layer):
                    layer.merge(adapter_names=adapter_names, safe_merge=safe_merge, **settings)
        except BaseException:
            for layer, names in merged:
                if layer.merged_adapters != names:
                    with onload_layer(layer):
                        layer.unmerge()
                        if names:
                            layer.merge(adapter_names=names)
            raise

    def unmerge_adapter(self) -> None:
        """As PEFT's."""
        give_back_gathered_weights(self.model)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's; with safe_merge no layer is merged, or unloaded, before all have been found to be mergeable."""
        if merge:
            self._check_merge_possible(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
