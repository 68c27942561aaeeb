"""HRA adapters as LoRA adapters, exactly: what serves LoRA alone (vLLM, Diffusers, llama.cpp) can then serve HRA.

    W Q - W = -(W vᵀ) t v  has rank R, so   A = v (R, D),  B = -(W vᵀ) t (N, R)   is W Q as a LoRA of rank R, scale 1

On the output side, Qᵀ W - W = -vᵀ tᵀ (v W): A = v W (R, D), B = -vᵀ tᵀ (N, R).

For a convolution A is a (R, C, kh, kw) kernel and B a 1 x 1 convolution; for an embedding PEFT calls (W vᵀ) t, an
embedding of its own, A, and v B. Several adapters are one chain and one LoRA of
their summed rank. B depends on the base weight: the LoRA belongs to the very base model it was exported from.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hra_kernels.factors import factor_dtype
from hra_kernels.ops import chain_factor
from hra_kernels.peft.base_weight import has_own_forward
from hra_kernels.peft.conv import ConvLayer, runs_own_code
from hra_kernels.peft.embedding import HRAEmbedding
from hra_kernels.peft.experts import ParamWrapper
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.peft.linear import HRALinear, HRAQuantizedLinear
from hra_kernels.peft.names import plain_name
from hra_kernels.peft.sharded import whole_vectors
from hra_kernels.soft import SIDES, Rule

_PREFIX = "base_model.model."
_KEYS = "lora_A.weight", "lora_B.weight"
_EMBEDDING_KEYS = "lora_embedding_A", "lora_embedding_B"
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_DIFFUSERS_HEADER = "lora_adapter_metadata"
_LORA_BIAS = {"none": "none", "all": "all", "hra_only": "lora_only"}


@torch.no_grad()
def lora_factors(layer: ReflectionLayer, adapter_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(A, B) of the LoRA that equals these adapters on this layer, in this order: W Q_1 Q_2 ... = W + B A.

    Args:
        layer: unmerged; its base layer may be quantized (a linear one; where PEFT cannot dequantize it, its own forward
            gives W vᵀ).
        adapter_names: those the layer does not have are passed over; one at least must be there.

    Returns:
        float32 (float64 over a float64 weight), as PEFT's LoRA has them: A (R, D) and B (N, R) for a linear layer,
        A (R, C, kh, kw) and B (N, R, 1, 1) for a convolution, A (R, N) and B (D, R) for an embedding of N rows.

    Raises:
        ValueError: the layer is merged, has none of the adapters, or an `hra_u` is not finite.
        NotImplementedError: a convolution or an embedding whose weight is not plain floating point, or that PEFT's LoRA
            layers would run differently: dilation, padding modes, forwards of their own.
    """
    names = [name for name in adapter_names if name in layer.hra_r]
    if not names:
        raise ValueError(
            f"{layer.describe()}: expected one of {list(layer.hra_u)} to export, got {list(adapter_names)}"
        )
    if layer.merged:
        raise ValueError(f"{layer.describe()} is merged; call unmerge_adapter() before exporting")
    us, rules = layer.chain(names)
    us = whole_vectors(us, layer.describe())
    for name, u in zip(names, us, strict=True):
        if not u.isfinite().all():
            raise ValueError(f"{layer.describe()}: hra_u of adapter {name!r} must be finite, it holds NaN or infinity")
    _require_same_forward(layer)
    weight = layer.readable_weight()
    dtype = torch.float32 if weight is None else weight.dtype
    base, is_linear = layer.get_base_layer(), isinstance(layer, HRALinear)
    if layer.of_side("output", names):
        if weight is None:
            raise NotImplementedError(f"{layer.describe()}: its weight must be readable to export side='output'")
        return _factors_of_both_sides(layer, names, us, rules, weight.read().to(us[0].device, factor_dtype(dtype)))
    v, t = chain_factor(us, rules, dtype)
    if weight is not None:
        product = weight.read().flatten(1).to(v.device, v.dtype) @ v.mT
    elif is_linear:
        product = (base(v) - base(torch.zeros_like(v[:1]))).to(v.dtype).mT  # without the bias, where there is one
    else:
        raise NotImplementedError(f"{layer.describe()}: its weight must be plain floating point to be exported")
    back = (-product @ t).contiguous()
    if is_linear:
        return v, back
    if isinstance(layer, HRAEmbedding):
        return back.mT.contiguous(), v.mT.contiguous()
    return v.reshape(-1, *base.weight.shape[1:]), back.reshape(*back.shape, *[1] * (base.weight.dim() - 2))


def _factors_of_both_sides(
    layer: ReflectionLayer, names: Sequence[str], us: Sequence[Tensor], rules: Sequence[Rule], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(A, B) of a linear layer with output side: Qᵀ (W + B_in A_in) = W + B_in A_in - vᵀ tᵀ v (W + B_in A_in)."""
    sides: dict[str, tuple[list[Tensor], list[Rule]]] = {side: ([], []) for side in SIDES}
    for name, u, rule in zip(names, us, rules, strict=True):
        sides[layer.hra_side[name]][0].append(u)
        sides[layer.hra_side[name]][1].append(rule)
    a, b = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    if sides["input"][0]:
        a, t = chain_factor(*sides["input"], weight.dtype)
        b = -(weight @ a.mT) @ t
    v, t = chain_factor(*sides["output"], weight.dtype)
    adapted = v @ weight + (v @ b) @ a
    return torch.cat([a, adapted]).contiguous(), torch.cat([b, -v.mT @ t.mT], 1).contiguous()


def _require_same_forward(layer: ReflectionLayer) -> None:
    """Raise where PEFT's LoRA layer, given the right A and B, would not compute what ours does."""
    base, lacks = layer.get_base_layer(), None
    if isinstance(layer, ParamWrapper):
        lacks = "for target_parameters has another layout"
    elif isinstance(layer, ConvLayer):
        if runs_own_code(base):
            lacks = "knows nothing of the base layer's own forward or hooks"
        elif base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
            lacks = f"has neither dilation (here {base.dilation}) nor padding modes (here {base.padding_mode!r})"
    elif not isinstance(layer, HRAQuantizedLinear) and has_own_forward(base):
        lacks = "adds to the output of the base layer, whose own forward may not be linear in its input and weight"
    if lacks:
        instead = "Run the adapter as it is" if layer.why_not_mergeable() else "Merge it instead (merge_and_unload)"
        raise NotImplementedError(
            f"{layer.describe()} cannot be exported: PEFT's LoRA layer {lacks}. {instead}, or exclude the layer."
        )


def truncated_factors(a: Tensor, b: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of a lower rank, in O((D + N) R²): an SVD between two QR decompositions.

    Args:
        a: (R, D), or a convolution's (R, C, kh, kw).
        b: (N, R), or (N, R, 1, 1).
        rank: the new rank; or, as a float, the share of the squared singular values to keep.

    Returns:
        (A, B) as they are where `rank` is an integer of at least R.
    """
    if isinstance(rank, int) and rank >= a.shape[0]:
        return a, b
    left, left_r = torch.linalg.qr(b.flatten(1).double())
    right, right_r = torch.linalg.qr(a.flatten(1).double().mT)
    first, sizes, second = torch.linalg.svd(left_r @ right_r.mT, full_matrices=False)
    if not isinstance(rank, int):
        energy = sizes.square().cumsum(0)
        rank = min(int(torch.searchsorted(energy, rank * energy[-1])) + 1, len(sizes))
    new_a, new_b = second[:rank] @ right.mT, (left @ first[:, :rank]) * sizes[:rank]
    return (
        new_a.to(a.dtype).reshape(-1, *a.shape[1:]).contiguous(),
        new_b.to(b.dtype).reshape(b.shape[0], -1, *b.shape[2:]).contiguous(),
    )


def exact_conversion(stock: Callable[..., tuple[Tensor, Tensor, int]]) -> Callable[..., tuple[Tensor, Tensor, int]]:
    """PEFT's `_convert_module_to_lora` (a truncated SVD of a dense update), with this package's layers taken exactly.

    Their (A, B, rank) is exact from the adapter's own rank upwards, and the best approximation below it.
    """

    def convert(module: nn.Module, rank: int | float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        if not isinstance(module, ReflectionLayer):
            return stock(module, rank, adapter_name)
        a, b = truncated_factors(*lora_factors(module, [adapter_name]), rank)
        return a, b, a.shape[0]

    return convert


def lora_state(model: nn.Module, adapter_names: Sequence[str] | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter (configuration and tensors) that equals HRA adapters of a model, at the scale they are set to.

    Args:
        model: a `PeftModel`, or a model of Diffusers or transformers with adapters of its own (`add_adapter`), with
            layers built after `hra_kernels.peft.enable()`; compiled or not, as its blocks.
        adapter_names: which adapters, applied in this order; by default the active ones.

    Returns:
        `LoraConfig` and a state dict with the keys of PEFT's adapter files. Trained biases and `modules_to_save` of
        the (single) adapter come along.

    Raises:
        TypeError: the model has no adapters, or no layer of this package.
        ValueError: unknown adapter, merged layer, value not finite, or several adapters that carry other weights.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model)
    known = _configs(model)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, ReflectionLayer)]
    if not modules:
        raise TypeError("lora_state: no layer of hra_kernels found; call hra_kernels.peft.enable() before loading")
    names = list(adapter_names) if adapter_names is not None else list(modules[0][1].active_adapters)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"lora_state: adapters must be among {list(known)}, got {names}")
    configs = [known[name] for name in names]
    layers = {
        plain_name(name).removeprefix(_PREFIX): module
        for name, module in modules
        if any(adapter in module.hra_r for adapter in names)
    }
    if not layers:
        raise TypeError(f"lora_state: none of the adapters {names} is HRA's")
    if len(names) > 1 and any(config.bias != "none" or config.modules_to_save for config in configs):
        raise ValueError("lora_state: adapters with trained biases or modules_to_save can only be exported one by one")
    state = _carried_along(model, names[0]) if len(names) == 1 else {}
    ranks = {}
    for name, layer in layers.items():
        a, b = lora_factors(layer, names)
        key_a, key_b = _EMBEDDING_KEYS if isinstance(layer, HRAEmbedding) else _KEYS
        state[f"{_PREFIX}{name}.{key_a}"], state[f"{_PREFIX}{name}.{key_b}"] = a, b
        ranks[name] = a.shape[0]
    rank = max(ranks.values())
    odd = {name: one for name, one in ranks.items() if one != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=odd,
        alpha_pattern=dict(odd),
        target_modules=list(layers),
        fan_in_fan_out=_only_transposed(layers.values()),
        bias=_LORA_BIAS[configs[0].bias],
        modules_to_save=configs[0].modules_to_save,
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        inference_mode=True,
    )
    return config, {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _configs(model: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of a model's adapters, by name."""
    known = getattr(model, "peft_config", None)
    if not isinstance(known, dict) or not all(isinstance(config, PeftConfig) for config in known.values()):
        raise TypeError(
            f"lora_state: model must be a PeftModel, or a model with adapters (add_adapter), got {type(model).__name__}"
        )
    return known


def _carried_along(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What an adapter's file holds besides its vectors: biases and `modules_to_save`."""
    whole = get_peft_model_state_dict(model, adapter_name=adapter_name)
    bias = _configs(model)[adapter_name].bias
    if bias != "none":  # PEFT 0.19 leaves those out that are not of LoRA
        part = ".bias" if bias == "all" else ".base_layer.bias"
        trained = {name: p for name, p in model.named_parameters() if name.endswith(part) and p.requires_grad}
        whole = {name: p for name, p in trained.items() if ".modules_to_save." not in name} | whole
    whole = {plain_name(key).removeprefix(_PREFIX): tensor for key, tensor in whole.items()}
    return {f"{_PREFIX}{key}": tensor for key, tensor in whole.items() if not key.endswith(".hra_u")}


def _only_transposed(layers: Iterable[ReflectionLayer]) -> bool:
    """What PEFT's LoRA would set itself, with a warning, where it meets transformers' Conv1D."""
    linear = [layer.get_base_layer() for layer in layers if isinstance(layer, HRALinear)]
    return bool(linear) and all(isinstance(base, Conv1D) for base in linear)


def export_lora(
    model: nn.Module | Mapping[str, nn.Module],
    folder: str | Path,
    adapter_names: Sequence[str] | None = None,
    format: Literal["peft", "diffusers"] = "peft",
    **metadata: Any,
) -> LoraConfig | dict[str, LoraConfig]:
    """Write the LoRA adapter folder that equals HRA adapters.

    Args:
        model, adapter_names: as in `lora_state`; everything is computed before the first byte is written. For
            "diffusers" also several models of one pipeline, {"unet": ..., "text_encoder_2": ...}.
        folder: made where missing.
        format: "peft" writes adapter_config.json and adapter_model.safetensors; "diffusers" the one file that
            `pipe.load_lora_weights(folder)` looks for, pytorch_lora_weights.safetensors.
        metadata: further string entries for the file's header.

    Returns:
        The configuration written, or one for each model of several.

    Raises:
        ValueError: another format, a component that has no name in Diffusers, or weights that its format has no room
            for: trained biases, `modules_to_save`, embeddings.
    """
    if format not in ("peft", "diffusers"):
        raise ValueError(f"export_lora: format must be 'peft' or 'diffusers', got {format!r}")
    folder, header = Path(folder), {"format": "pt", **{key: str(value) for key, value in metadata.items()}}
    if format == "diffusers":
        models = model if isinstance(model, Mapping) else {_component(model): model}
        configs, state, settings = {}, {}, {}
        for name, one in models.items():
            configs[name], tensors = lora_state(one, adapter_names)
            state.update(_diffusers_state(name, tensors))
            settings.update({f"{name}.{key}": value for key, value in _diffusers_settings(configs[name]).items()})
        header[_DIFFUSERS_HEADER] = json.dumps(settings, indent=2, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / _DIFFUSERS_FILE, metadata=header)
        return configs if isinstance(model, Mapping) else configs.popitem()[1]
    config, state = lora_state(model, adapter_names)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata=header)
    config.save_pretrained(str(folder))
    return config


def _component(model: nn.Module) -> str:
    """What Diffusers' pipelines call a model of this class."""
    model = getattr(model, "_orig_mod", model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, package = type(base).__name__, type(base).__module__.split(".")[0]
    if package == "transformers":
        return "text_encoder"
    for part, component in (("UNet", "unet"), ("Transformer", "transformer")):
        if package == "diffusers" and part in kind:
            return component
    raise ValueError(
        f"export_lora: what Diffusers calls a {kind} is not known; give its name in the pipeline, as in "
        "export_lora({'transformer_2': model}, ...)"
    )


def _diffusers_state(component: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in state:
        if not key.endswith(_KEYS):
            raise ValueError(
                f"export_lora: Diffusers' LoRA files have no room for {key.removeprefix(_PREFIX)} (trained biases, "
                "modules_to_save and embeddings); train without it, or export with format='peft'"
            )
    return {f"{component}.{key.removeprefix(_PREFIX)}": tensor for key, tensor in state.items()}


def _diffusers_settings(config: LoraConfig) -> dict[str, Any]:
    """Those that its loaders cannot tell from the tensors in every release; ^: a name can be the end of another."""
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": {f"^{name}": rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in config.alpha_pattern.items()},
        "target_modules": sorted(config.target_modules),
    }
