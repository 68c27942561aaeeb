"""The pytest plugin under which `test_own_suite.py` runs PEFT's own tests, in a process of its own.

It turns this package's tuner on, counts its layers' forward calls, and makes PEFT's
tests run without a model hub: tiny random models are written into a hub cache of their own, where `from_pretrained`
finds them by the hub's names, and the two helpers that would download data get an image made here.
"""

import importlib.machinery
import sys
import types
from pathlib import Path

import torch
import transformers
from transformers.utils.import_utils import is_datasets_available

REVISION = "0" * 40

_SMALL = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
_BERT = {**_SMALL, "intermediate_size": 37, "pad_token_id": 0}
_OPT = {**_SMALL, "word_embed_proj_dim": 32, "ffn_dim": 64}
_GPT = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
_GPTJ = {**_GPT, "rotary_dim": 4}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 16}
_T5 = {"vocab_size": 1024, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 1024, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37,
}  # fmt: skip
_RESNET = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "num_labels": 3}

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTConfig", "OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJConfig", "GPTJForCausalLM", _GPTJ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralConfig", "MistralForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartConfig", "BartForConditionalGeneration", _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertConfig", "BertModel", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaConfig", "RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaConfig", "DebertaModel", {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Config", "DebertaV2Model", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertConfig", "BertForSequenceClassification", _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaConfig", "RobertaForSequenceClassification", _BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaConfig", "LlamaForSequenceClassification", {**_LLAMA, "pad_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetConfig", "ResNetForImageClassification", _RESNET,
    ),
}  # fmt: skip


def build_hub(folder: Path) -> None:
    """Write every model that is not there yet, as the hub's own cache would hold it."""
    for name, (config_name, model_name, settings) in MODELS.items():
        entry = folder / f"models--{name.replace('/', '--')}"
        if (entry / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings))
        model.save_pretrained(entry / "snapshots" / REVISION)
        if model_name.startswith("ResNet"):
            transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(
                entry / "snapshots" / REVISION
            )
        (entry / "refs").mkdir(parents=True, exist_ok=True)
        (entry / "refs" / "main").write_text(REVISION)


def _stand_in_for_datasets() -> None:
    """PEFT's test helpers import `datasets` for one image; transformers is asked first, and remembers it is absent."""
    if is_datasets_available():
        return

    def load_dataset(name: str) -> dict:
        assert name == "huggingface/cats-image", f"no stand-in for {name}"
        return {"test": {"image": [torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8).numpy()]}}

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    module.Dataset = dict
    sys.modules["datasets"] = module


_stand_in_for_datasets()  # before PEFT, which looks for it, is imported

import hra_kernels.peft  # noqa: E402
from hra_kernels.peft.layer import ReflectionLayer  # noqa: E402

_forwards = 0

hra_kernels.peft.enable()
_forward = ReflectionLayer.forward


def _counted_forward(self, *args, **kwargs):
    global _forwards
    _forwards += 1
    return _forward(self, *args, **kwargs)


ReflectionLayer.forward = _counted_forward


class _AlwaysCached(dict):
    """Tells PEFT's tests that every model was fetched before, so that they stay offline."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


def pytest_collection_finish(session):
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _AlwaysCached()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"forward calls of hra_kernels layers: {_forwards}")
