"""Level `host`: what Python takes for an adapted Linear in eager mode, beyond the frozen one, with LoRA beside it.

The tensors are so small that the time is the host's. A step is a forward and a backward, the second micro-batch after
an optimizer's step, so that the factor is there. `cpu` runs the CPU kernels; `triton` is what a GPU's host does, up to
where a kernel would be launched, as Triton compiles it for Hopper; none is launched.

Layers are stacked, and what is shown is the time of one, less that of the frozen one in the same round.
"""

import argparse
import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from bench import layer, providers, record, shapes, timing
from bench.record import Planned, Progress
from hra_kernels import backends, factor_cache, use_backend
from hra_kernels.measuring import stopwatch

DEFAULT_PROVIDERS = [providers.FLOOR, "ours", "ours-nn", "lora"]
PATHS = ("cpu", "triton")
MODES = ("train", "no-grad")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--shape", default="16x64x64", help="MxDxN")
    parser.add_argument("--layers", type=int, default=8, help="in the stack (default 8)")
    parser.add_argument("--dtype", default="float32", choices=layer.DTYPES)
    parser.add_argument("--rank", type=int, default=8)


_takes_anything = "".format
"""As a function written in C does that is given the arguments of a launch."""


def _current_device() -> int:
    """As `torch.cuda.current_device`: whether CUDA is in use, and a C function."""
    return abs(torch.cuda.is_initialized())


@contextlib.contextmanager
def triton_without_launches(launch: Callable = _takes_anything) -> Iterator[None]:
    """CPU tensors on the Triton backend as if they were a Hopper GPU's, up to where Triton calls the driver to launch.

    Kernels are compiled. All Python that a host runs for a GPU is run: this backend's, Triton's JIT and its launcher
    of compiled kernels. Left out, or those of a CPU, are functions written in C: the launch itself (one a kernel, a
    microsecond to read the arguments and what CUDA takes), and what PyTorch asks CUDA for and allocates there (about
    0.1 us each). Nothing is written, so the frozen layers multiply what memory happened to hold. Others' operators, and
    the frozen layer's, run on the CPU; two threads and more make LoRA's small products slower than they are on one.

    Args:
        launch: called in place of the driver, with what it would get; the fifth argument is the kernel's name.

    Raises:
        providers.Unavailable: Triton is not installed, or interprets its kernels in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise providers.Unavailable("TRITON_INTERPRET=1: Triton's kernels are interpreted in this process")
    try:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime import driver
    except ImportError as error:
        raise providers.Unavailable(f"Triton is not installed: {error}") from error
    from hra_kernels.backends import triton, triton_launch

    class Launcher(CudaLauncher):
        arg_annotations = kernel_signature = None

        def __init__(self, kernel: CompiledKernel) -> None:
            vars(self).update(kernel.metadata._asdict(), launch=launch)
            kernel.function = kernel.metadata.name

    hopper = SimpleNamespace(
        is_active=lambda: True,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=_current_device,
        get_current_stream=abs,  # of a device's index, and written in C
    )
    before = dict(vars(driver))  # not all releases have the same attributes
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (CompiledKernel, "_init_handles", lambda self: None),
            (CompiledKernel, "run", property(Launcher, lambda kernel, value: None)),  # Triton 3.4 sets it
            (triton, "_interpreted", lambda: True),  # the tensors are a CPU's
            (factor_cache, "_values_are_at_hand", lambda us: not us[0].is_cpu),  # the rule on a GPU
            (factor_cache, "_capturing", lambda: abs(torch.cuda.is_initialized())),
            (factor_cache, "_stream_of", lambda u: abs(u.get_device()) if u.is_cpu else 0),
        ):
            stack.enter_context(mock.patch.object(place, name, value, create=name == "run"))
        driver.set_active(hopper)
        triton_launch.forget_plans()
        try:
            with use_backend("triton"):
                yield
        finally:
            vars(driver).update(before)
            triton_launch.forget_plans()
            backends._chosen.cache_clear()


def _variant(provider: providers.Provider, case: dict, mode: str) -> timing.Variant:
    """The provider's stack in this mode."""
    shape, dtype = shapes.linear(case["M"], case["D"], case["N"]), layer.DTYPES[case["dtype"]]
    cpu = torch.device("cpu")
    u = layer.make_u(shape.D, case["rank"], cpu)
    adapted = layer.adapted(provider, layer.make_base(shape, dtype, cpu), u)
    stack = nn.Sequential(*(copy.deepcopy(adapted) for _ in range(case["layers"])))
    x, dy = layer.make_inputs(shape, dtype, cpu, 0)
    if mode == "train":
        return timing.Variant(layer.variant(stack, [(x, dy)]).run)

    def run(_: int) -> object:
        with torch.no_grad():
            return stack(x)

    return timing.Variant(run)


def _per_layer(taken: dict[int, float], other: dict[int, float], layers: int) -> dict[int, float]:
    """Round by round, what one layer takes beyond the other."""
    return {k: (seconds - other[k]) / layers for k, seconds in taken.items() if k in other}


def measure_case(case: dict, chosen: list[providers.Provider], seconds: float, progress: Progress) -> dict:
    """The rows of one case; `beyond` is in seconds a layer, `over_lora` its ratio to LoRA's, round by round."""
    with triton_without_launches() if case["path"] == "triton" else contextlib.nullcontext():
        rows, samplers = {}, {}
        for k, provider in enumerate(chosen):
            progress(f"{case['name']}: build {provider.label}", 0.5 * k / len(chosen))
            row = rows[provider.name] = {"provider": provider.name, "label": provider.label, "why": None}
            try:
                timed = _variant(provider, case, case["mode"])
                timed.run(0)  # compiles
                samplers[provider.name] = timing.cpu_sampler(timed, 1)
            except Exception as error:
                row["why"] = providers.reason(error)
        floor = providers.FLOOR if providers.FLOOR in samplers else None
        advance = lambda done: progress(f"{case['name']}: rounds", 0.5 + 0.5 * done)  # noqa: E731
        result = stopwatch.interleave(samplers, floor, seconds, advance=advance)
    _add_numbers(rows, result.taken, floor, case["layers"])
    return record.entry(case, torch.device("cpu"), seconds, list(rows.values()), result)


def _add_numbers(rows: dict[str, dict], taken: dict[str, dict[int, float]], floor: str | None, layers: int) -> None:
    """Seconds a layer, and what follows from comparing them, into the rows."""
    beyond = {name: _per_layer(samples, taken[floor], layers) for name, samples in taken.items()} if floor else {}
    for name, samples in taken.items():
        rows[name]["seconds"] = stopwatch.summary(value / layers for value in samples.values())
        if floor and name != floor:
            rows[name]["beyond"] = stopwatch.summary(beyond[name].values())
            if "lora" in beyond:
                lora = beyond["lora"]
                rows[name]["over_lora"] = stopwatch.summary(
                    value / lora[k] for k, value in beyond[name].items() if k in lora
                )


def plan(options: argparse.Namespace) -> list[Planned]:
    """One case per path and mode."""
    (shape,) = shapes.parse([options.shape])

    def planned(path: str, mode: str) -> Planned:
        case = {"name": f"{path}, {mode}, {shape}", "path": path, "mode": mode, "layers": options.layers}
        case |= {"M": shape.M, "D": shape.D, "N": shape.N, "dtype": options.dtype, "rank": options.rank}
        run: Callable[[Progress], dict] = lambda progress: measure_case(  # noqa: E731
            case, options.providers, options.seconds, progress
        )
        return Planned(case, run)

    return [planned(path, mode) for path in options.paths for mode in options.modes]
