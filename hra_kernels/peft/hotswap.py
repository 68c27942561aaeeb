"""PEFT's hot swap for HRA: another adapter's vectors in place of one adapter's, without recompiling a compiled model.

A smaller r is padded with zero columns, which reflect nothing: exact. A larger one does not fit, unless
`prepare_model_for_compiled_hotswap(model, target_rank=...)` has made room before.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import PeftType
from torch import Tensor, nn

from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.peft.names import plain_name

CONFIG_KEYS = ["apply_GS", "side", "eps"]
"""What PEFT's `check_hotswap_configs_compatible` has to find equal."""


def _layers(model: nn.Module) -> dict[str, ReflectionLayer]:
    named = model.named_modules()
    return {plain_name(name): module for name, module in named if isinstance(module, ReflectionLayer)}


def _pad(u: Tensor, rank: int) -> Tensor:
    return torch.cat([u, u.new_zeros(*u.shape[:-1], rank - u.shape[-1])], -1)


def hotswap_with_hra(stock: Callable[..., None]) -> Callable[..., None]:
    """PEFT's `hotswap_adapter_from_state_dict`, for HRA configurations too."""

    def hotswap_adapter_from_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        """As PEFT's. For HRA everything is checked before the first layer changes.

        Layers that the new adapter does not have are left without reflections.

        Raises:
            ValueError: the adapter is merged, or a layer's r is larger than what the model has room for.
            RuntimeError: the new adapter has a layer that the old one does not have.
        """
        if config.peft_type == PeftType.HRA:
            _swap(model, state_dict, adapter_name, config)
        else:
            stock(model, state_dict, adapter_name, config, parameter_prefix)

    return hotswap_adapter_from_state_dict


@torch.no_grad()
def _swap(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any) -> None:
    layers = {name: layer for name, layer in _layers(model).items() if adapter_name in layer.hra_r}
    new = getattr(config, "side", "input"), getattr(config, "eps", 0.0)
    for name, layer in layers.items():
        if new != (layer.hra_side[adapter_name], layer.hra_eps[adapter_name]):
            raise ValueError(
                f"hotswap: the new adapter must have side={layer.hra_side[adapter_name]!r} and "
                f"eps={layer.hra_eps[adapter_name]} as layer {name!r} has, got side={new[0]!r} and eps={new[1]}"
            )
    targets = {f"{name}.hra_u.{adapter_name}": layer.hra_u[adapter_name] for name, layer in layers.items()}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Cannot hot-swap adapter {adapter_name!r} because it is currently merged into the base weights; call "
            "unmerge_adapter() (Diffusers: unfuse_lora()) first"
        )
    state_dict = {plain_name(key): tensor for key, tensor in state_dict.items()}
    unexpected = set(state_dict) - set(targets)
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(sorted(unexpected))}."
        )
    for key, new in state_dict.items():
        old = targets[key]
        if new.shape[:-1] != old.shape[:-1] or new.shape[-1] > old.shape[-1]:
            raise ValueError(
                f"hotswap: {key} must be {tuple(old.shape)} or of a smaller last dimension, got {tuple(new.shape)}; "
                f"call prepare_model_for_compiled_hotswap(model, target_rank={new.shape[-1]}) before the swap (and "
                "before compiling)"
            )
    for key, old in targets.items():
        if key in state_dict:
            old.copy_(_pad(state_dict[key].to(old.device), old.shape[-1]))
        else:
            old.zero_()


def preparation_with_hra(stock: Callable[..., None]) -> Callable[..., None]:
    """PEFT's `prepare_model_for_compiled_hotswap`, for models with HRA layers too."""

    def prepare_model_for_compiled_hotswap(
        model: nn.Module,
        *,
        target_rank: int | None = None,
        config: Any = None,
        check_compiled: Literal["error", "warn", "ignore"] = "error",
    ) -> None:
        """As PEFT's: pads the adapters of every HRA layer to `target_rank`, exactly, and sets it in `config`.

        Raises:
            ValueError: the model is compiled already (see `check_compiled`), or an adapter has a larger r.
        """
        layers = _layers(model)
        if not layers:
            stock(model, target_rank=target_rank, config=config, check_compiled=check_compiled)
            return
        _check_not_compiled(model, check_compiled)
        if target_rank is None:
            return
        for name, layer in layers.items():
            for adapter, r in layer.hra_r.items():
                if r > target_rank:
                    raise ValueError(
                        f"hotswap: target_rank must be at least the r of the adapters, got {target_rank} for adapter "
                        f"{adapter!r} of r = {r} on layer {name!r}"
                    )
        for layer in layers.values():
            for adapter, u in layer.hra_u.items():
                layer.hra_u[adapter] = nn.Parameter(_pad(u.detach(), target_rank), requires_grad=u.requires_grad)
                layer.hra_r[adapter] = target_rank
        for one in config.values() if isinstance(config, dict) else [config] if config else []:
            one.r = target_rank

    return prepare_model_for_compiled_hotswap


def _check_not_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        message = "call prepare_model_for_compiled_hotswap before compiling the model; now it will be compiled again"
        if check_compiled == "error":
            raise ValueError(message)
        if check_compiled == "warn":
            warnings.warn(message, stacklevel=3)
