"""`hra-kernels export`: a saved HRA adapter as a LoRA adapter, exactly, for what serves LoRA alone."""

import argparse
import importlib
import json
import os
import warnings

import transformers
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict, load_peft_weights

import hra_kernels.peft
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.recipes import RecipeError, reason, refusing
from hra_kernels.recipes.saving import written_whole

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}
_WEIGHT_FILES = "adapter_model.safetensors", "adapter_model.bin"


def _config(adapter: str) -> PeftConfig:
    """The adapter's configuration, checked as far as PEFT does not."""
    with refusing(f"{adapter} must be a folder with the adapter_config.json of an HRA adapter"):
        try:
            config = PeftConfig.from_pretrained(adapter)
        except KeyError as kind:
            raise RecipeError(f"{adapter} must be an HRA adapter, it is {kind}") from kind
    if config.peft_type != PeftType.HRA:
        kind = getattr(config.peft_type, "value", None)
        raise RecipeError(f"{adapter} must be an HRA adapter, it is {kind}")
    if not isinstance(config.r, int) or config.r < 1:
        raise RecipeError(f"{adapter}/adapter_config.json: r must be a positive integer, it is {config.r!r}")
    if os.path.isdir(adapter) and not any(os.path.exists(os.path.join(adapter, name)) for name in _WEIGHT_FILES):
        raise RecipeError(f"{adapter} must hold the adapter's weights, {' or '.join(_WEIGHT_FILES)}")
    return config


def _diffusers_class(folder: str) -> type | None:
    """The class of Diffusers that this folder's config.json names, as its models (not its pipelines) save it."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    kind = settings.get("_class_name") if isinstance(settings, dict) else None
    return None if kind is None else getattr(importlib.import_module("diffusers"), kind)


def _load(adapter: str, config: PeftConfig, name: str, num_labels: int | None) -> PeftModel:
    """The base model of this name with the adapter, every tensor of which has found its layer and the reverse."""
    options = {} if num_labels is None else {"num_labels": num_labels}
    with refusing(f"the base model {name} does not load"):
        kind = _diffusers_class(name) or _AUTO_CLASSES.get(config.task_type, transformers.AutoModel)
        base = kind.from_pretrained(name, **options)
    with refusing(f"the weights of {adapter}, {' or '.join(_WEIGHT_FILES)}, do not load"):
        saved = load_peft_weights(adapter, device="cpu")
    with refusing(f"{adapter} does not fit {name}"), hra_kernels.peft.enabled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error, below
        model = PeftModel.from_pretrained(base, adapter)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    unused = {key for key in saved if key.endswith("hra_u")} - set(wanted)
    for keys, where in ((set(wanted) - set(saved), "the adapter's file lacks"), (unused, "the model has no layer for")):
        if keys:
            some = f"{min(keys)}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}"
            raise RecipeError(f"{adapter} does not fit {name}: {where} {some}")
    return model


def main(arguments: argparse.Namespace) -> int:
    """Load the base model, attach the adapter, write the LoRA folder; one line says what was written."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.component and arguments.format != "diffusers":
        raise RecipeError("--component is a name in a pipeline of Diffusers; it goes with --format diffusers")
    config = _config(arguments.adapter)
    name = arguments.model or config.base_model_name_or_path
    if not name:
        raise RecipeError(f"{arguments.adapter} does not name its base model; give it with --model")
    model = _load(arguments.adapter, config, name, arguments.num_labels)
    with written_whole(arguments.out) as folder:
        try:
            exported = {arguments.component: model} if arguments.component else model
            written = hra_kernels.peft.export_lora(exported, folder, format=arguments.format)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise RecipeError(f"{arguments.adapter}: {reason(error)}") from error
    layers = sum(isinstance(module, ReflectionLayer) for module in model.modules())
    rank = (written[arguments.component] if arguments.component else written).r
    print(f"{arguments.out}: LoRA of rank {rank} over {layers} layers of {name}")
    return 0
