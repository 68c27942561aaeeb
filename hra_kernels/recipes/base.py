"""Fresh copies of one pretrained model, plain or with an adapter."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

from hra_kernels.peft import HRAConfig
from hra_kernels.recipes import RecipeError, refusing

Batch = dict[str, Tensor]
KINDS = {
    TaskType.SEQ_CLS: (transformers.AutoModelForSequenceClassification, "a classifier"),
    TaskType.CAUSAL_LM: (transformers.AutoModelForCausalLM, "a causal language model"),
}


def _sees_what_comes(config: transformers.PretrainedConfig) -> bool:
    """Whether transformers makes a causal language model of an encoder, with a warning alone."""
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return masked and not (config.is_decoder or getattr(config, "causal", False))


@dataclass(frozen=True)
class Base:
    """Makes fresh copies of one pretrained model; what is new in one is drawn from the seed: two copies are equal.

    Attributes:
        options: for `from_pretrained`.
        trained_whole: modules that are trained in full beside the adapter, as PEFT's `modules_to_save`.
    """

    source: str
    kind: TaskType
    seed: int
    device: torch.device
    tokenizer: transformers.PreTrainedTokenizerBase
    options: Mapping[str, Any] = field(default_factory=dict)
    trained_whole: Sequence[str] = ()

    @classmethod
    def open(cls, source: str, kind: TaskType, seed: int, **rest: Any) -> "Base":
        """Raises RecipeError if transformers finds no tokenizer for this name or folder."""
        with refusing(f"--model {source}: expected a model name or folder, got"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
        return cls(source, kind, seed, device, tokenizer, **rest)

    @property
    def name(self) -> str:
        return Path(self.source).name

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        auto, what = KINDS[self.kind]
        with refusing(f"--model {self.source}: expected {what}, got"):
            model = auto.from_pretrained(self.source, **self.options)
            if self.kind == TaskType.CAUSAL_LM and _sees_what_comes(model.config):
                raise ValueError(f"{type(model).__name__} of an encoder, which sees the words it is to predict")
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.device).eval()

    def let_gradient_through(self, model: nn.Module) -> None:
        """Gradients flow back to the model's first layer although nothing there is trained."""
        model.enable_input_require_grads()

    def save_merged(self, model: nn.Module, folder: Path) -> None:
        """All that `open` needs to read the merged model again."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def adapted(self, config: PeftConfig) -> PeftModel:
        """A fresh copy with an adapter, of HRA as PEFT builds it now: our layers or its own."""
        model = self.model()
        _check_targets(model, config.target_modules)
        torch.manual_seed(self.seed)
        with refusing("--target-modules"):
            return get_peft_model(model, config)

    def saved_adapter(self, folder: Path) -> PeftModel:
        """A fresh copy with the adapter that is saved in the folder."""
        return PeftModel.from_pretrained(self.model(), folder).eval()

    def hra_config(self, rank: int, targets: Sequence[str], apply_gs: bool, **layer: Any) -> HRAConfig:
        """`layer`: fields that PEFT's own HRAConfig has not."""
        # Gram-Schmidt of equal columns keeps one of each pair, so with it the columns are drawn independently
        return HRAConfig(
            task_type=self.kind,
            r=rank,
            target_modules=_targets(targets),
            apply_GS=apply_gs,
            init_weights=not apply_gs,
            modules_to_save=list(self.trained_whole) or None,
            **layer,
        )

    def lora_config(self, rank: int, targets: Sequence[str]) -> LoraConfig:
        return LoraConfig(
            task_type=self.kind,
            r=rank,
            lora_alpha=rank,
            target_modules=_targets(targets),
            modules_to_save=list(self.trained_whole) or None,
        )


def _check_targets(model: nn.Module, targets) -> None:
    if isinstance(targets, str):  # "all-linear" or a regular expression, which PEFT reads
        return
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in targets if target.rsplit(".", 1)[-1] not in names]
    if missing or not targets:
        raise RecipeError(
            f"--target-modules: expected names of Linear layers ({', '.join(sorted(names))}), "
            f"got {', '.join(missing) or 'none'}"
        )


def _targets(targets: Sequence[str]) -> list[str] | str:
    return "all-linear" if list(targets) == ["all-linear"] else list(targets)
