"""Level `scaling`: how the cost of an adapted Linear grows with M, D, R and the number of adapted layers.

One sweep at a time around a middle point; D = N throughout. Layers are stacked into one network, so that the cost of
Python and of many small launches shows; each kind of layer is checked once, on the first of the stack.
"""

import argparse
import copy

import torch
from torch import nn

from bench import layer, shapes, timing
from bench.record import Planned, Progress

SWEEPS = {
    "cpu": {"M": [1, 16, 64, 256, 1024, 4096], "D": [256, 512, 1024, 2048], "R": [2, 8, 32, 128], "layers": [1, 4, 16]},
    "cuda": {
        "M": [1, 16, 256, 2048, 8192, 32768],
        "D": [1024, 2048, 4096, 8192],
        "R": [2, 8, 16, 32, 64, 128],
        "layers": [1, 8, 32, 128],
    },
}
MIDDLE = {"cpu": {"M": 512, "D": 1024, "R": 8, "layers": 1}, "cuda": {"M": 4096, "D": 4096, "R": 8, "layers": 1}}
DEFAULT_PROVIDERS = ["frozen", "ours", "wy-eager", "peft-hra", "lora", "oft"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--over", nargs="+", default=list(SWEEPS["cpu"]), choices=SWEEPS["cpu"], help="which sweeps")
    parser.add_argument("--values", nargs="+", type=int, help="values of the one sweep named by --over")
    parser.add_argument("--dtype", default="float32", choices=layer.DTYPES)


class _Stack(nn.Module):
    """Copies of a layer one after another; `first` is what the accuracy check is given."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.layers:
            x = module(x)
        return x


def _stacked(count: int):
    def stack(adapted: nn.Module) -> nn.Module:
        return _Stack([adapted, *(copy.deepcopy(adapted) for _ in range(count - 1))]) if count > 1 else adapted

    return stack


def plan(options: argparse.Namespace) -> list[Planned]:
    """One case per point of each sweep."""
    device, dtype = options.device, layer.DTYPES[options.dtype]

    def planned(sweep: str, value: int) -> Planned:
        point = MIDDLE[device.type] | {sweep: value}
        case = {"name": f"{sweep} = {value}", "sweep": sweep, "value": value, "dtype": options.dtype, **point}
        case["rank"] = point["R"]

        def measure(progress: Progress) -> dict:
            shape = shapes.linear(point["M"], point["D"], point["D"])
            base = layer.make_base(shape, dtype, device)
            count = timing.input_sets(2 * shape.M * shape.D * dtype.itemsize, device)
            inputs = [layer.make_inputs(shape, dtype, device, seed) for seed in range(count)]
            u, stack = layer.make_u(shape.D, point["R"], device), _stacked(point["layers"])
            return layer.measure_case(case, base, inputs, u, options.providers, options.seconds, progress, stack)

        return Planned(case, measure)

    return [planned(sweep, value) for sweep in options.over for value in options.values or SWEEPS[device.type][sweep]]
