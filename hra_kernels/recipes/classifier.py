"""A sentence classifier: loading, adapters, batches, training steps and predictions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import HRAConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

from hra_kernels.recipes import RecipeError, refusing
from hra_kernels.recipes.text_data import Example

Batch = dict[str, Tensor]
POOL = 16
"""Batches of examples that are sorted by length together in training."""


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples and their classes' numbers."""

    rows: list[dict[str, list[int]]]
    labels: Tensor
    pad: Callable[[list[dict[str, list[int]]]], Batch]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """These examples as tensors padded to the longest of them, with `labels`."""
        return {**self.pad([self.rows[i] for i in indices]), "labels": self.labels[list(indices)]}

    def by_length(self) -> list[int]:
        """Indices, longest first: neighbors need little padding."""
        return sorted(range(len(self)), key=lambda i: -len(self.rows[i]["input_ids"]))


@dataclass(frozen=True)
class Base:
    """Makes fresh copies of one pretrained model, each with a new head."""

    source: str
    classes: list[str]
    seed: int
    device: torch.device
    tokenizer: transformers.PreTrainedTokenizerBase

    @classmethod
    def open(cls, source: str, classes: list[str], seed: int) -> "Base":
        """Raises RecipeError if transformers finds no tokenizer for this name or folder."""
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with refusing(f"--model {source}: expected a model name or folder, got"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(source, classes, seed, device, tokenizer)

    def model(self) -> nn.Module:
        """The pretrained model with a head drawn from the seed: two calls give equal models."""
        torch.manual_seed(self.seed)
        with refusing(f"--model {self.source}: expected a classifier, got"):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.source,
                num_labels=len(self.classes),
                id2label=dict(enumerate(self.classes)),
                label2id={name: i for i, name in enumerate(self.classes)},
                ignore_mismatched_sizes=True,
            )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.device).eval()

    def adapted(self, config: PeftConfig) -> PeftModel:
        """A fresh copy with an adapter, drawn from the seed as well."""
        model = self.model()
        _check_targets(model, config.target_modules)
        torch.manual_seed(self.seed)
        with refusing("--target-modules"):
            return get_peft_model(model, config)

    def encode(self, examples: Sequence[Example], max_length: int) -> Encoded:
        texts = [example.text for example in examples]
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        found = self.tokenizer(texts, pairs, truncation=True, max_length=max_length)
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        number = {name: i for i, name in enumerate(self.classes)}
        labels = torch.tensor([number[example.label] for example in examples])
        return Encoded(rows, labels, lambda chosen: dict(self.tokenizer.pad(chosen, return_tensors="pt")))


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


def hra_config(rank: int, targets: Sequence[str], apply_gs: bool) -> HRAConfig:
    # Gram-Schmidt of equal columns keeps one of each pair, so with it the columns are drawn independently
    return HRAConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        target_modules=_targets(targets),
        apply_GS=apply_gs,
        init_weights=not apply_gs,
    )


def lora_config(rank: int, targets: Sequence[str]) -> LoraConfig:
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=rank, target_modules=_targets(targets))


def _targets(targets: Sequence[str]) -> list[str] | str:
    return "all-linear" if list(targets) == ["all-linear"] else list(targets)


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One optimizer step; the loss before it."""
    device = next(model.parameters()).device
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def shuffled_batches(encoded: Encoded, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end: each pass over the examples in a new order, with examples of similar length together.

    Similar means within the next POOL batches' worth of examples: padding to the longest of 32 random sentences of the
    default data would nearly double the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(encoded))
    while True:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, POOL * batch_size):
            pool = sorted(order[start : start + POOL * batch_size], key=lambda i: len(encoded.rows[i]["input_ids"]))
            starts = range(0, len(pool) - batch_size + 1, batch_size)
            for number in torch.randperm(len(starts), generator=generator).tolist():
                yield encoded.batch(pool[starts[number] : starts[number] + batch_size])


@torch.inference_mode()
def predict(model: nn.Module, encoded: Encoded, batch_size: int = 128) -> Tensor:
    """Logits (examples, classes) in the examples' order, float32 on the CPU."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = encoded.by_length()
    parts = []
    for start in range(0, len(order), batch_size):
        batch = encoded.batch(order[start : start + batch_size])
        parts.append(model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.float().cpu())
    model.train(was_training)
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def accuracy(logits: Tensor, encoded: Encoded) -> float:
    return (logits.argmax(-1) == encoded.labels).double().mean().item()


def saved_adapter(base: Base, folder: Path) -> PeftModel:
    """A fresh copy of the base model with the adapter that is saved in the folder."""
    return PeftModel.from_pretrained(base.model(), folder).eval()
