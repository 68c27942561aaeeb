"""Base models of a few thousand parameters and their data in folders, as a person would have them on disk."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hra_kernels.recipes import glue

WORDS = ["[PAD]", "[UNK]", "good", "bad", *map(str, range(60))]


def save_base(folder: Path, hidden: int = 16) -> Path:
    """Weights, configuration and tokenizer of a BERT with two layers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    return _save_tokenizer(folder)


def save_deberta(folder: Path) -> Path:
    """A DeBERTaV2 as DeBERTaV3-base is configured, but for its sizes, and without dropout."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_buckets=8,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.DebertaV2Model(config).save_pretrained(folder)
    return _save_tokenizer(folder)


def save_llama(folder: Path) -> Path:
    """A causal language model with two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return _save_tokenizer(folder, eos_token="[PAD]")


def _save_tokenizer(folder: Path, **special: str) -> Path:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", **special
    )
    tokenizer.save_pretrained(folder)
    return folder


CLIP_WORDS = ["<|startoftext|>", "<|endoftext|>"]
CLIP_WORDS += [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]


def save_stable_diffusion(folder: Path) -> Path:
    """A pipeline in the layout of Stable Diffusion 1.5, random: pictures of 32 x 32, latents of 4 x 16 x 16."""
    import diffusers  # not in the extra of the other jobs

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    text = transformers.CLIPTextConfig(
        vocab_size=len(CLIP_WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    vocabulary = {word: number for number, word in enumerate(CLIP_WORDS)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    parts = vae, transformers.CLIPTextModel(text), tokenizer, unet, scheduler
    diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int = 3) -> Path:
    """Noise of 40 x 40."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        noise = torch.rand(40, 40, 3, generator=torch.Generator().manual_seed(number))
        Image.fromarray((255 * noise).byte().numpy()).save(folder / f"{number}.jpg")
    return folder


def save_controlled(path: Path, count: int = 40) -> Path:
    """Lines with pictures of `pictures` beside the file, three in turn, and prompts."""
    save_pictures(path.parent / "pictures")
    rows = [{"target": f"pictures/{i % 3}.jpg", "prompt": f"a cup {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_sentences(path: Path) -> Path:
    """Sixty different sentences of two classes."""
    rows = [f"{'good' if number % 2 else 'bad'} {number},{number % 2}" for number in range(60)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def save_problems(path: Path) -> Path:
    """Forty problems in MetaMathQA's format, of one length, with responses of five."""
    rows = []
    for i in range(40):
        query, response = "good " * (5 - i % 5), "bad " * (i % 5)
        rows.append({"query": f"{i} {query}", "response": f"{i} {response}. The answer is: {i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_glue(folder: Path, task: str) -> Path:
    """Splits of a task of GLUE with its fields, labels as numbers, in the layout of the hub but as .jsonl."""
    spec = glue.TASKS[task]
    target = folder / task
    target.mkdir(parents=True)
    for split, count in (("train", 48), *((name, 12) for name in spec.dev)):
        rows = []
        for i in range(count):
            label = i % len(spec.classes) if spec.classes else i % 11 / 2
            rows.append({**{name: f"{'good' if i % 2 else 'bad'} {i}" for name in spec.columns}, "label": label})
        (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
