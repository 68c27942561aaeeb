"""Axolotl: `adapter: hra`, on these kernels. In the configuration:

    plugins: [hra_kernels.integrations.axolotl.HRAPlugin]
    adapter: hra
    lora_r: 8
    lora_target_linear: true

It also reads lora_target_modules, lora_target_parameters, lora_exclude_modules, lora_modules_to_save, lora_model_dir
and its own hra_apply_gs; HRA has no alpha and no dropout.
"""

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import find_all_linear_names
from peft import PeftModel, TaskType, get_peft_model
from pydantic import BaseModel
from torch import nn

import hra_kernels.peft


class HRAArgs(BaseModel):
    hra_apply_gs: bool = False


def hra_config(model: nn.Module, cfg) -> hra_kernels.peft.HRAConfig:
    """PEFT's configuration for what `cfg` asks for. Raises ValueError for dropout."""
    if cfg.lora_dropout:
        raise ValueError(f"adapter: hra: lora_dropout must be 0, HRA has none; got {cfg.lora_dropout}")
    modules = cfg.lora_target_modules or []
    if cfg.lora_target_linear:
        modules = sorted({*([modules] if isinstance(modules, str) else modules), *find_all_linear_names(model)})
    kinds = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}
    return hra_kernels.peft.HRAConfig(
        r=cfg.lora_r or 8, apply_GS=bool(cfg.hra_apply_gs), init_weights=not cfg.hra_apply_gs,
        target_modules=modules or None, target_parameters=cfg.lora_target_parameters or None,
        exclude_modules=cfg.lora_exclude_modules or None, modules_to_save=cfg.lora_modules_to_save or None,
        task_type=next((kind for word, kind in kinds.items() if word in type(model).__name__), TaskType.CAUSAL_LM),
    )  # fmt: skip


class HRAPlugin(BasePlugin):
    """Serves the adapter `hra`; with another one it changes nothing."""

    def get_input_args(self) -> str:
        return f"{__name__}.HRAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="hra")]

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        if cfg.adapter != "hra":
            return None
        hra_kernels.peft.enable()
        config = hra_config(model, cfg)
        if config_only:  # DPO and its like build the model themselves
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config
