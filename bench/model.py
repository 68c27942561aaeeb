"""Level `model`: a whole training step of a transformer and of a UNet: forward, loss, backward, AdamW on the adapters.

The floor is the frozen model that trains one vector, added to what enters its first adapted layer, so that a gradient
flows back to there: a step that no adapter can undercut. Loss and adapter gradients are checked against float64 before
the clock starts: the HRA family against the explicit chain, every other method against itself. Modes are ways to train:
as it is, with activation checkpointing, and under torch.compile.
"""

import argparse
import copy
import warnings

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import networks, record, timing
from bench import providers as catalog
from bench.accuracy import beyond
from bench.layer import DTYPES
from bench.record import Planned, Progress
from hra_kernels import reference
from hra_kernels.measuring import stopwatch
from hra_kernels.testing import tolerance

BOUND = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float64: 1e-10}
"""Largest relative error of loss and adapter gradient. A network amplifies rounding, bfloat16's to several per cent; an
adapter that does nothing, or one gradient that is missing, is off by 1."""
DEFAULT_PROVIDERS = ["frozen", "ours", "wy-eager", "peft-hra", "lora", "oft"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=networks.MODELS, help="default: those that suit the device")
    parser.add_argument("--dtype", default=None, choices=[str(dtype).removeprefix("torch.") for dtype in BOUND])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=MODES, help="default: eager")
    parser.add_argument("--rank", type=int, default=8)


class TrainedShift(nn.Module):
    """The floor's only parameter, in front of the layer it wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(base.weight.new_zeros(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x + self.shift)


class ExplicitChain(nn.Module):
    """The exact answer's Linear: one reflection at a time."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.u = nn.Parameter(base.weight.new_empty(base.in_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        # else a float64 x would be kept for every reflection of every layer
        return self.base(checkpoint(self._reflected, x, use_reentrant=False))

    def _reflected(self, x: Tensor) -> Tensor:
        return reference.explicit_chain(self.u, x=x.flatten(0, -2), transpose=True).view_as(x)


EXACT = catalog.Provider("exact", "explicit chain", wrap=ExplicitChain, hra=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter parameters in the order of their layers."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapt(
    provider: catalog.Provider, base: nn.Module, spec: networks.Model, rank: int, device: torch.device
) -> nn.Module:
    """A copy of `base` with the provider's adapters away from their initial state."""
    model = provider.build_model(copy.deepcopy(base), spec.targets, rank).to(device)
    if provider.name == catalog.FLOOR:
        path = first_layer(model, spec)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, TrainedShift(model.get_submodule(path)))
        return model
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(model).values():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(noise) if provider.hra else parameter.add_(0.02 * noise)
    return model


def first_layer(model: nn.Module, spec: networks.Model) -> str:
    """The path of the first layer an adapter would sit on."""
    return next(
        path
        for path, _ in model.named_modules()
        if any(path == target or path.endswith(f".{target}") for target in spec.targets)
    )


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with every block's activations computed again in backward, by its own library's switch."""
    if hasattr(model, "gradient_checkpointing_enable"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 6 will call it otherwise
            model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.enable_gradient_checkpointing()
    return model


MODES = {"eager": lambda model: model, "checkpoint": checkpointed, "compile": torch.compile}
"""Ways to train a model."""


def loss_and_gradient(model: nn.Module, spec: networks.Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and all adapter gradients in one vector."""
    parameters = list(trainable(model).values())
    loss = spec.loss(model, batch)
    grads = torch.autograd.grad(loss, parameters)
    return loss.detach()[None], torch.cat([grad.double().flatten() for grad in grads])


def _cast(batch: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()}


class ModelCheck:
    """Checks adapted models of one case; the HRA family's float64 answer is computed once."""

    def __init__(
        self, base: nn.Module, spec: networks.Model, rank: int, batch: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.base, self.spec, self.rank, self.batch, self.dtype = base, spec, rank, batch, dtype
        self.exact: tuple[Tensor, Tensor] | None = None

    def _wide_answer(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """One sample at a time, for memory: every loss is a mean over samples of one length."""
        device = next(model.parameters()).device
        samples = zip(*(value.split(1) for value in _cast(self.batch, torch.float64, device).values()), strict=True)
        answers = [loss_and_gradient(model, self.spec, dict(zip(self.batch, one, strict=True))) for one in samples]
        return tuple(torch.stack(parts).mean(0) for parts in zip(*answers, strict=True))

    def __call__(
        self, provider: catalog.Provider, model: nn.Module, prepared: nn.Module
    ) -> tuple[dict[str, float], str | None]:
        """({quantity: relative error}, None or what is wrong) of `prepared`, which is `model` in the case's mode."""
        device = next(model.parameters()).device
        if provider.hra:
            if self.exact is None:
                twin = adapt(EXACT, self.base.double(), self.spec, self.rank, device)
                self.base.to(self.dtype)
                self.exact = self._wide_answer(twin)
            exact = self.exact
        else:
            exact = self._wide_answer(copy.deepcopy(model).double())
        got = loss_and_gradient(prepared, self.spec, self.batch)
        relative = {
            name: tolerance.errors(value, wide)["frobenius"]
            for name, value, wide in zip(("loss", "gradient"), got, exact, strict=True)
        }
        return relative, beyond(relative, BOUND[self.dtype])


def training_step(model: nn.Module, spec: networks.Model, batch: dict[str, Tensor]) -> timing.Variant:
    """One optimizer step on what is trainable."""
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, foreach=True, capturable=parameters[0].is_cuda)

    def run(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        spec.loss(model, batch).backward()
        optimizer.step()

    return timing.Variant(run)


def measure_case(case: dict, options: argparse.Namespace, progress: Progress) -> dict:
    """One table: a training step by every provider that passed its check."""
    device, dtype, spec = options.device, DTYPES[case["dtype"]], networks.MODELS[case["model"]]
    torch.manual_seed(0)
    try:
        with device:
            base = spec.build().to(dtype)
    except catalog.Unavailable as error:  # the model itself cannot be built here
        row = {"provider": "all", "label": "all", "why": catalog.reason(error)}
        return record.entry(case, device, None, [row])
    batch = _cast(spec.batch(torch.Generator().manual_seed(0)), dtype, device)
    check = ModelCheck(base, spec, options.rank, batch, dtype)
    rows, samplers = {}, {}
    for k, provider in enumerate(options.providers):
        progress(f"{spec.name}: check {provider.label}", 0.5 * k / len(options.providers))
        row = rows[provider.name] = {"provider": provider.name, "label": provider.label, "why": None}
        try:
            model = adapt(provider, base, spec, options.rank, device)
            prepared = MODES[case["mode"]](model)
            if provider.name != catalog.FLOOR:
                row["error"], wrong = check(provider, model, prepared)
                row["why"] = wrong and f"wrong: {wrong}"
            if row["why"] is None:
                timed = training_step(prepared, spec, batch)
                timed.run(0)
                row["peak_bytes"] = timing.peak_bytes(lambda timed=timed: timed.run(0), device)
                samplers[provider.name] = timing.wall_sampler(timed, device)
        except Exception as error:
            row["why"] = catalog.reason(error)
    floor = catalog.FLOOR if catalog.FLOOR in samplers else None
    result = stopwatch.interleave(
        samplers, floor, options.seconds, advance=lambda done: progress(f"{spec.name}: rounds", 0.5 + 0.5 * done)
    )
    for name, samples in result.taken.items():
        row = rows[name]
        row["seconds"] = stopwatch.summary(samples.values())
        row["per_second"], row["unit"] = spec.count / row["seconds"]["median"], spec.unit
        if floor:
            row["ratio"] = stopwatch.ratio_to_floor(samples, result.taken[floor])
    return record.entry(case, device, options.seconds, list(rows.values()), result)


def plan(options: argparse.Namespace) -> list[Planned]:
    """One case per model and mode."""
    dtype = options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32")
    found = [
        {"name": name if mode == "eager" else f"{name}, {mode}", "model": name, "mode": mode}
        | {"dtype": dtype, "rank": options.rank}
        for name in options.models or networks.DEFAULT[options.device.type]
        for mode in options.modes
    ]
    return [Planned(case, lambda progress, case=case: measure_case(case, options, progress)) for case in found]
