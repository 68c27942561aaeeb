"""Time per training step of several ways to train the same model on the same batches, interleaved in one process."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hra_kernels.measuring import stopwatch
from hra_kernels.recipes.base import Base, Batch

WARM_UP_STEPS = 1


@dataclass
class Method:
    """One way to train the model, and what was measured of it."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    optimizer: torch.optim.Optimizer | None = field(init=False)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.model.train()
        # small enough that every method stays near where it began: what is timed here is not a training
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0) if trained else None

    def step(self, batches: Sequence[Batch]) -> float:
        """One step on the batch whose turn it is, the same for every method; its seconds."""
        number, device = len(self.losses), next(self.model.parameters()).device
        torch.manual_seed(number)  # the same dropout for every method
        stopwatch.synchronize(device)
        start = time.perf_counter()
        batch = {name: tensor.to(device) for name, tensor in batches[number % len(batches)].items()}
        loss = self.loss(self.model, batch)
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        stopwatch.synchronize(device)
        return time.perf_counter() - start

    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """{median_s, p20_s, p80_s, steps}."""
        found = stopwatch.summary(self.seconds)
        return {f"{key}_s": found[key] for key in ("median", "p20", "p80")} | {"steps": found["rounds"]}


def frozen(base: Base, heads: Sequence[str], through: bool) -> nn.Module:
    """The base model with only its head trained, or nothing.

    Args:
        heads: prefixes of the names of the parameters to train.
        through: let the gradient flow back through every frozen layer, as it must for an adapter in the first one:
            the least that any adapter's step can cost. Without it the backward pass ends at the head.
    """
    model = base.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(heads)))
    if through:
        base.let_gradient_through(model)
    return model


def measure(
    methods: Sequence[Method], batches: Sequence[Batch], rounds: int, seconds: float, progress: Callable[[], None]
) -> None:
    """Time every method by one step in each of up to `rounds` rounds over about `seconds`; in 5 rounds at least.

    Args:
        progress: called after each round.
    """
    for method in methods:
        for _ in range(WARM_UP_STEPS):
            method.step(batches)
        progress()
    samplers = {method.name: lambda method=method: method.step(batches) for method in methods}
    found = stopwatch.interleave(
        samplers, None, seconds, min_rounds=5, max_rounds=rounds, advance=lambda fraction: progress()
    )
    for method in methods:
        method.seconds = list(found.taken[method.name].values())


def largest_loss_difference(one: Method, other: Method) -> float:
    """Over the steps both have done, relative to the loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=False))
