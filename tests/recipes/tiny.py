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
