"""What a job's file gives to the skeleton: model, data, metrics, settings."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hra_kernels.measuring.text import percent_text
from hra_kernels.recipes.base import Base, Batch

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Metric:
    """What is reported first, and by which the kept step is chosen."""

    name: str
    higher: bool = True
    percent: bool = True

    def text(self, value: float) -> str:
        return percent_text(value) if self.percent else f"{value:.4f}"


@dataclass(frozen=True)
class Settings:
    """What the Trainer is told, beside the learning rate and the batch size."""

    steps: int
    warm_up: int
    schedule: str = "linear"
    checks: int = 10
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    clip: float = 0.0
    fsdp: bool = False


class Application(ABC):
    """One application: fresh models, data, how outputs become metrics. A job's file derives its own.

    Attributes:
        train: rows, each a dictionary with `input_ids`; `collate` makes a batch of some.
        reference: rows of the page's table that need no model, such as always the same answer.
        heads: prefixes of the parameters that a frozen model trains; empty where it trains none.
        output: what one number of `outputs` is.
        described: more of the data for results.json; `notes` are sentences for the page.
        by_token: whether a loss is a mean over tokens, whose number transformers then counts over all processes.
        rivals: methods to train as well, for their metrics.
        layer: fields of `hra_kernels.peft.HRAConfig` that PEFT's own has not; with some, nothing is compared
            with PEFT's own HRA.
    """

    arguments: argparse.Namespace
    base: Base
    source: str
    sizes: dict[str, int]
    train: list[dict]
    main: Metric
    settings: Settings
    reference: ClassVar[dict[str, dict[str, float]]] = {}
    heads: ClassVar[Sequence[str]] = ()
    output: ClassVar[str] = "output"
    by_token: ClassVar[bool] = True
    rivals: ClassVar[Sequence[str]] = ()
    described: ClassVar[dict[str, list[str]]] = {}
    layer: Mapping[str, Any] = MappingProxyType({})
    notes: Sequence[str] = ()
    started: float

    @property
    def batch_size(self) -> int:
        return min(self.arguments.batch_size, len(self.train))

    @abstractmethod
    def collate(self, rows: list[dict]) -> Batch:
        """Rows padded to the longest of them, with `labels`."""

    @abstractmethod
    def outputs(self, model: nn.Module, part: Part) -> Tensor:
        """What the model says of each example of a split, in order, (examples, ...), float32 on the CPU."""

    @abstractmethod
    def metrics(self, outputs: Tensor, part: Part) -> dict[str, float]:
        """At least `main.name`."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of a batch that `collate` made, a scalar."""
        return model(**batch).loss

    def checked(self, model: nn.Module, step: int, folder: Path) -> None:  # noqa: B027
        """Called after each validation, by the first process; `folder` lasts as long as the checkpoints."""

    def draw(self, folder: Path, checkpoints: Path) -> None:  # noqa: B027
        """Leave pictures in `folder`; `checkpoints` is what `checked` was given."""

    def last(self, model: nn.Module) -> dict[str, float]:
        """Slow metrics that are taken once before and once after."""
        return {}


def inference(model: nn.Module, rows: list[dict], collate, batch_size: int, say) -> list[Tensor]:
    """`say(model's output, batch)` for every row, in the rows' order; rows of similar length share a batch."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    found: list = [None] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate([rows[i] for i in chosen]).items()}
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}  # no loss of the model's own
            for number, value in zip(chosen, say(model(**inputs), batch).float().cpu(), strict=True):
                found[number] = value
    model.train(was_training)
    return found
