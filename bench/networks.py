"""Whole models built from their configuration: real architectures, chosen sizes, random weights, no downloads."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.providers import Unavailable


@dataclass(frozen=True)
class Model:
    """`build()` gives the network, `batch(generator)` its keyword inputs, `loss(model, batch)` a scalar.

    `count` says how many `unit`s one step works through.
    """

    name: str
    targets: list[str]
    unit: str
    count: int
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]


def llama(
    name: str, width: int, up: int, layers: int, heads: int, kv_heads: int, vocabulary: int, batch: int, length: int
):
    """A Llama decoder with a language-model loss; all its Linears but the head are adapted."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=up,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def make_batch(generator: torch.Generator) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(vocabulary, (batch, length), generator=generator)}

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs, labels=inputs["input_ids"]).loss

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Model(name, targets, "tokens", batch * length, build, make_batch, loss)


def bert(name: str, width: int, up: int, layers: int, heads: int, batch: int, length: int):
    """A BERT encoder classifying sentences; attention and dense layers are adapted."""

    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=30522,
            hidden_size=width,
            intermediate_size=up,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForSequenceClassification(config)

    def make_batch(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_ids": torch.randint(30522, (batch, length), generator=generator),
            "labels": torch.randint(2, (batch,), generator=generator),
        }

    targets = ["query", "key", "value", "output.dense", "intermediate.dense"]
    return Model(name, targets, "tokens", batch * length, build, make_batch, lambda model, inputs: model(**inputs).loss)


def unet(name: str, channels: tuple[int, ...], context: int, heads: int, batch: int, size: int):
    """Stable Diffusion's UNet predicting noise; the attention projections are adapted, as in the paper."""

    def build() -> nn.Module:
        try:
            from diffusers import UNet2DConditionModel
            from diffusers.utils import logging
        except ImportError as error:
            raise Unavailable(f"diffusers: {error}") from error
        logging.set_verbosity_error()
        kinds = len(channels) - 1
        return UNet2DConditionModel(
            sample_size=size,
            block_out_channels=channels,
            cross_attention_dim=context,
            attention_head_dim=heads,
            down_block_types=("CrossAttnDownBlock2D",) * kinds + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * kinds,
        )

    def make_batch(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(batch, 4, size, size, generator=generator),
            "timestep": torch.randint(1000, (batch,), generator=generator),
            "encoder_hidden_states": torch.randn(batch, 77, context, generator=generator),
            "noise": torch.randn(batch, 4, size, size, generator=generator),
        }

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        given = {key: value for key, value in inputs.items() if key != "noise"}
        return nn.functional.mse_loss(model(**given).sample, inputs["noise"])

    return Model(name, ["to_q", "to_k", "to_v", "to_out.0"], "images", batch, build, make_batch, loss)


MODELS = {
    model.name: model
    for model in [
        llama("llama-tiny", 64, 128, 2, 2, 1, 128, 2, 16),
        llama("llama-small", 512, 1408, 4, 8, 4, 4096, 2, 256),
        bert("minilm-l6", 384, 1536, 6, 12, 16, 64),
        unet("unet-tiny", (32, 64), 32, 4, 1, 8),
        unet("unet-small", (64, 128, 256), 256, 8, 2, 32),
        llama("llama3-8b-4layers", 4096, 14336, 4, 32, 8, 32768, 2, 2048),
        llama("qwen2.5-7b-4layers", 3584, 18944, 4, 28, 4, 32768, 2, 2048),
        bert("bert-base", 768, 3072, 12, 12, 32, 128),
        unet("sd1.5-unet", (320, 640, 1280, 1280), 768, 8, 4, 64),
    ]
}
DEFAULT = {
    "cpu": ["llama-small", "minilm-l6", "unet-small"],
    "cuda": ["llama3-8b-4layers", "qwen2.5-7b-4layers", "bert-base", "sd1.5-unet"],
}
