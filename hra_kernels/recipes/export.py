"""`hra-kernels export`: a saved HRA adapter as a LoRA adapter, exactly, for what serves LoRA alone."""

import argparse

import transformers
from peft import PeftConfig, PeftModel, PeftType, TaskType

import hra_kernels.peft
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.recipes.errors import RecipeError

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
}


def main(arguments: argparse.Namespace) -> int:
    """Load the base model, attach the adapter, write the LoRA folder; one line says what was written."""
    try:
        config = PeftConfig.from_pretrained(arguments.adapter)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"export: {arguments.adapter} must be a folder with an adapter_config.json: {error}"
        ) from error
    if config.peft_type != PeftType.HRA:
        raise RecipeError(f"export: {arguments.adapter} must be an HRA adapter, it is {config.peft_type}")
    name = arguments.model or config.base_model_name_or_path
    if not name:
        raise RecipeError(f"export: {arguments.adapter} does not name its base model; give it with --model")
    options = {} if arguments.num_labels is None else {"num_labels": arguments.num_labels}
    auto = _AUTO_CLASSES.get(config.task_type, transformers.AutoModel)
    try:
        base = auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"export: the base model {name} does not load: {error}") from error
    with hra_kernels.peft.enabled():
        model = PeftModel.from_pretrained(base, arguments.adapter)
    written = hra_kernels.peft.export_lora(model, arguments.out)
    layers = sum(isinstance(module, ReflectionLayer) for module in model.modules())
    print(f"{arguments.out}: LoRA of rank {written.r} over {layers} layers of {name}")
    return 0
