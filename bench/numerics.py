"""Level `numerics`: what the time buys: orthogonality, identity at the start, drift of merging, gradients, bfloat16.

Nothing is timed. Every quantity is one run with one row per provider, its numbers under `values`; `MEANING` says what
they are.
"""

import argparse
import copy
import math

import torch
from torch import Tensor, nn

from bench import layer, record, shapes
from bench import providers as catalog
from bench.accuracy import explicit_layer, gradients
from bench.record import Planned, Progress
from hra_kernels import reference
from hra_kernels.testing import cases, tolerance

MEANING = {
    "orthogonality": "max |QᵀQ - I| in float32 of the map the layer applies, by the kind of u's columns:",
    "identity": "max |layer(x) - base(x)| right after creation, by dtype; 0 means bit for bit:",
    "merge": "Relative change of the base weight after n cycles of merge and unmerge, by dtype and n:",
    "gradient": "Relative error of u's gradient against float64, one optimizer step after creation and at random u:",
    "training": "bfloat16 against float32: |Q16 - Q32| / |Q32 - I| after n AdamW steps on the same teacher's data:",
}
DEFAULT_PROVIDERS = ["ours", "wy-eager", "peft-hra"]
COLUMNS = ["random", "near_parallel", "paired_step", "zero_columns", "scales"]
MERGES = (1, 10, 100)
STEPS = (1, 3, 10, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=512, help="D = N of the layer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)


def _base(size: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    return layer.make_base(shapes.linear(1, size, size), dtype, device)


def _identity_base(size: int, device: torch.device) -> nn.Linear:
    base = _base(size, torch.float32, device)
    with torch.no_grad():
        base.weight.copy_(torch.eye(size))
    return base


def _columns(size: int, rank: int, kind: str, device: torch.device) -> Tensor:
    return cases.make_u(size, rank, kind, torch.Generator().manual_seed(5)).to(device)


def _map_of(adapted: nn.Module, size: int) -> Tensor:
    """Qᵀ as an adapted identity layer applies it to the unit vectors, in float64."""
    u = catalog.hra_parameter(adapted)
    with torch.no_grad():
        return adapted(torch.eye(size, device=u.device)).double()


def orthogonality(provider: catalog.Provider, size: int, rank: int, device: torch.device) -> dict[str, float]:
    values = {}
    for kind in COLUMNS:
        adapted = provider.build(_identity_base(size, device), rank).to(device)
        catalog.set_u(adapted, _columns(size, rank, kind, device))
        q = _map_of(adapted, size)
        values[kind] = (q @ q.mT - torch.eye(size, device=device)).abs().max().item()
    return values


def identity(provider: catalog.Provider, size: int, rank: int, device: torch.device) -> dict[str, float]:
    values = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = _base(size, dtype, device)
        adapted = provider.build(copy.deepcopy(base), rank).to(device)
        if isinstance(adapted, catalog.PlainWY):  # it has no initialization of its own: PEFT's, in pairs
            half = torch.randn(size, rank // 2, generator=torch.Generator().manual_seed(6))
            catalog.set_u(adapted, half.repeat_interleave(2, 1))
        x = layer.make_inputs(shapes.linear(256, size, size), dtype, device, 7)[0]
        with torch.no_grad():
            values[str(dtype).removeprefix("torch.")] = (adapted(x).double() - base(x).double()).abs().max().item()
    return values


def merge(provider: catalog.Provider, size: int, rank: int, device: torch.device) -> dict[str, float]:
    if provider.peft is None:
        raise catalog.Unavailable("no merge")
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        adapted = provider.build(_base(size, dtype, device), rank)
        catalog.set_u(adapted, _columns(size, rank, "random", device))
        before = adapted.get_base_layer().weight.detach().double().clone()
        for cycle in range(1, max(MERGES) + 1):
            adapted.merge()
            adapted.unmerge()
            if cycle in MERGES:
                change = (adapted.get_base_layer().weight.detach().double() - before).norm() / before.norm()
                values[f"{str(dtype).removeprefix('torch.')} x{cycle}"] = change.item()
    return values


def gradient(provider: catalog.Provider, size: int, rank: int, device: torch.device) -> dict[str, float]:
    values = {}
    for kind in ("paired_step", "random"):
        for dtype in (torch.float32, torch.bfloat16):
            base = _base(size, dtype, device)
            x, dy = layer.make_inputs(shapes.linear(1024, size, size), dtype, device, 8)
            u = _columns(size, rank, kind, device)
            exact = explicit_layer(base, x, u, dy, torch.float64)["du"]
            adapted = provider.build(base, rank).to(device)
            catalog.set_u(adapted, u)
            du = gradients(adapted, x, [catalog.hra_parameter(adapted)], dy)[1][1]
            values[f"{kind} {str(dtype).removeprefix('torch.')}"] = tolerance.errors(du, exact)["frobenius"]
    return values


def training(provider: catalog.Provider, size: int, rank: int, device: torch.device) -> dict[str, float]:
    weight = _base(size, torch.bfloat16, device).weight.detach().float()
    columns = torch.randn(size, 2, generator=torch.Generator().manual_seed(9)).to(device)
    teacher = reference.explicit_chain(columns.double(), x=weight.double())
    trajectories = []
    for dtype in (torch.float32, torch.bfloat16):
        base = _base(size, dtype, device)
        with torch.no_grad():
            base.weight.copy_(weight)
        adapted = provider.build(base, rank).to(device)
        half = torch.randn(size, rank // 2, generator=torch.Generator().manual_seed(10)) / math.sqrt(size)
        catalog.set_u(adapted, half.repeat_interleave(2, 1))
        u = catalog.hra_parameter(adapted)
        optimizer = torch.optim.AdamW([u], lr=1e-3, weight_decay=0.0)
        maps = {}
        for step in range(1, max(STEPS) + 1):
            x = torch.randn(256, size, generator=torch.Generator().manual_seed(step)).to(device)
            x = x.bfloat16().float()  # the same data for both
            y = adapted(x.to(dtype)).float()
            loss = (y - (x.double() @ teacher.mT).float()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in STEPS:
                maps[step] = explicit_layer(
                    _identity_base(size, device),
                    torch.eye(size, device=device),
                    u,
                    torch.eye(size, device=device),
                    torch.float64,
                )["y"]
        trajectories.append(maps)
    wide, narrow = trajectories
    unit = torch.eye(size, device=device)
    return {f"step {step}": ((narrow[step] - wide[step]).norm() / (wide[step] - unit).norm()).item() for step in STEPS}


MEASURES = {
    "orthogonality": orthogonality,
    "identity": identity,
    "merge": merge,
    "gradient": gradient,
    "training": training,
}


def plan(options: argparse.Namespace) -> list[Planned]:
    """One case per quantity."""

    def planned(name: str) -> Planned:
        case = {"name": name, "D": options.size, "rank": options.rank}

        def measure(progress: Progress) -> dict:
            rows = []
            for k, provider in enumerate(options.providers):
                progress(f"{name}: {provider.label}", k / len(options.providers))
                row = {"provider": provider.name, "label": provider.label, "why": None}
                try:
                    row["values"] = MEASURES[name](provider, options.size, options.rank, options.device)
                except Exception as error:
                    row["why"] = catalog.reason(error)
                rows.append(row)
            return record.entry(case, options.device, None, rows)

        return Planned(case, measure)

    return [planned(name) for name in options.measures]
