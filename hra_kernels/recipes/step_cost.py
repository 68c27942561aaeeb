"""Time per training step of several ways to train the same model on the same batches, interleaved in one process."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hra_kernels.recipes.classifier import Base, Batch, optimizer_for, train_step

WARM_UP_STEPS = 1
HEADS = ("classifier.", "score.")
"""What PEFT trains in full beside an adapter for sequence classification."""


@dataclass
class Method:
    """One way to train the model, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.model.train()
        # small enough that every method stays near where it began: what is timed here is not a training
        self.optimizer = optimizer_for(self.model, lr=1e-5)

    def step(self, batch: Batch, seed: int) -> None:
        torch.manual_seed(seed)  # the same dropout for every method
        _synchronize()
        start = time.perf_counter()
        loss = train_step(self.model, self.optimizer, batch)
        _synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)

    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        p20, _, _, p80 = statistics.quantiles(self.seconds, n=5)
        return {"median_s": self.median(), "p20_s": p20, "p80_s": p80, "steps": len(self.seconds)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def frozen(base: Base, through: bool) -> nn.Module:
    """The base model with only its head trained.

    Args:
        through: let the gradient flow back through every frozen layer, as it must for an adapter in the first one:
            the least that any adapter's step can cost. Without it the backward pass ends at the head.
    """
    model = base.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEADS))
    if through:
        model.enable_input_require_grads()
    return model


def measure(
    methods: Sequence[Method], batches: Sequence[Batch], rounds: int, seconds: float, progress: Callable[[], None]
) -> None:
    """Time every method: rounds of one step each, until `rounds` are done or the time is up, but 5 at least."""
    started = None
    for number in range(-WARM_UP_STEPS, rounds):
        if number == 0:
            started = time.monotonic()
        if number >= 5 and time.monotonic() - started > seconds:
            return
        for method in methods:
            method.step(batches[number % len(batches)], seed=number + WARM_UP_STEPS)
            if number < 0:
                method.seconds.clear()
        progress()


def largest_loss_difference(one: Method, other: Method) -> float:
    """Over the steps both have done, relative to the loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True))
