"""A base model of a few thousand parameters in a folder, as a person would have it on disk."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = ["[PAD]", "[UNK]", "good", "bad", *map(str, range(60))]


def save_base(folder: Path, hidden: int = 16) -> Path:
    """Weights, configuration and tokenizer of a BERT with two layers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return folder


def save_sentences(path: Path) -> Path:
    """Sixty different sentences of two classes."""
    rows = [f"{'good' if number % 2 else 'bad'} {number},{number % 2}" for number in range(60)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path
