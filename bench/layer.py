"""Level `layer`: one adapted Linear or Conv2d, forward and backward, as it stands inside a network being trained.

x requires a gradient, the base weight does not. The floor is the frozen layer alone under the same conditions.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import providers as catalog
from bench import record, shapes, timing
from bench.accuracy import LayerCheck
from bench.record import Planned, Progress
from hra_kernels.measuring import stopwatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["standard"], help="MxDxN, a shape's name, or a group's")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rank", type=int, default=8)


def make_base(shape: shapes.Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen layer of a shape, with PyTorch's own initial weights."""
    torch.manual_seed(0)
    with device:
        if shape.conv:
            conv = shape.conv
            base = nn.Conv2d(conv.channels, conv.out_channels, conv.kernel, padding=conv.kernel // 2)
        else:
            base = nn.Linear(shape.D, shape.N, bias=False)
    return base.to(dtype).requires_grad_(False)


def make_inputs(shape: shapes.Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """(x, dy) of a shape: standard normal, drawn where they are used: a host takes a second for 50 million."""
    generator = torch.Generator(device).manual_seed(seed)
    if shape.conv:
        conv = shape.conv
        sizes = (conv.batch, conv.channels, conv.size, conv.size), (conv.batch, conv.out_channels, conv.size, conv.size)
    else:
        sizes = (shape.M, shape.D), (shape.M, shape.N)
    return tuple(torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)


def make_u(D: int, rank: int, device: torch.device) -> Tensor:
    """u (D, R) away from HRA's initialization: there pairs cancel and an adapter that does nothing would be right."""
    return torch.randn(D, rank, generator=torch.Generator().manual_seed(1)).to(device)


def adapted(provider: catalog.Provider, base: nn.Module, u: Tensor) -> nn.Module:
    """The provider's layer around `base`, away from its initial state."""
    layer = provider.build(base, u.shape[1]).to(u.device)
    if provider.hra:
        catalog.set_u(layer, u)
    else:
        catalog.scramble(layer, torch.Generator().manual_seed(2))
    return layer


def variant(layer: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> timing.Variant:
    """Forward and backward of `layer` over the input sets."""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    leaves = [(x.detach().requires_grad_(), dy) for x, dy in inputs]

    def run(i: int) -> object:
        x, dy = leaves[i]
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    return timing.Variant(run, timing.touch_parameters(parameters))


def prepare(row: dict, layer: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> Callable[[], float]:
    """Put memory and, on a GPU, the host's time into `row`; the sampler of what is timed in rounds."""
    timed, (x, _) = variant(layer, inputs), inputs[0]
    row["peak_bytes"] = timing.peak_bytes(lambda: timed.run(0), x.device)
    leaf = x.detach().requires_grad_()
    saved = timing.saved_storages(lambda: layer(leaf), [*layer.parameters(), *layer.buffers()])
    row["saved_bytes"] = sum(saved.values())
    row["saved_beyond_x_bytes"] = row["saved_bytes"] - saved.get(leaf.untyped_storage().data_ptr(), 0)
    if x.device.type == "cuda":
        row["host_seconds"] = timing.host_seconds(timed, x.device)
    sampler = timing.sampler(timed, x.device, len(inputs))
    row["timing"] = getattr(sampler, "method", "calls")
    return sampler


def measure_case(
    case: dict,
    base: nn.Module,
    inputs: list[tuple[Tensor, Tensor]],
    u: Tensor,
    chosen: list[catalog.Provider],
    seconds: float,
    progress: Progress,
    network: Callable[[nn.Module], nn.Module] = lambda layer: layer,
) -> dict:
    """The rows of one case: check, memory, then interleaved rounds over all providers that passed.

    `network` makes what is timed from the layer that was checked.
    """
    device, (x, dy) = u.device, inputs[0]
    check = LayerCheck(base, x, u, dy)
    rows, samplers = {}, {}
    for k, provider in enumerate(chosen):
        progress(f"{case['name']}: check {provider.label}", 0.5 * k / len(chosen))
        row = rows[provider.name] = {"provider": provider.name, "label": provider.label, "why": None}
        try:
            layer = adapted(provider, base, u)
            row["error"], wrong = check(provider, layer)
            row["why"] = wrong and f"wrong: {wrong}"
            if row["why"] is None:
                samplers[provider.name] = prepare(row, network(layer), inputs)
        except Exception as error:
            row["why"] = catalog.reason(error)
    floor = catalog.FLOOR if catalog.FLOOR in samplers else None
    result = stopwatch.interleave(
        samplers, floor, seconds, advance=lambda done: progress(f"{case['name']}: rounds", 0.5 + 0.5 * done)
    )
    for name, samples in result.taken.items():
        rows[name]["seconds"] = stopwatch.summary(samples.values())
        if floor:
            rows[name]["ratio"] = stopwatch.ratio_to_floor(samples, result.taken[floor])
    return record.entry(case, device, seconds, list(rows.values()), result)


def plan(options: argparse.Namespace) -> list[Planned]:
    """One case per shape."""
    device, dtype = options.device, DTYPES[options.dtype]

    def planned(shape: shapes.Shape) -> Planned:
        case = {"name": str(shape), **shape.as_dict(), "dtype": options.dtype, "rank": options.rank}

        def measure(progress: Progress) -> dict:
            base = make_base(shape, dtype, device)
            inputs = [make_inputs(shape, dtype, device, 0)]
            bytes_each = sum(tensor.numel() * tensor.element_size() for tensor in inputs[0])
            inputs += [make_inputs(shape, dtype, device, i) for i in range(1, timing.input_sets(bytes_each, device))]
            u = make_u(shape.D, options.rank, device)
            return measure_case(case, base, inputs, u, options.providers, options.seconds, progress)

        return Planned(case, measure)

    return [planned(shape) for shape in shapes.parse(options.shapes)]
