"""Measure how the GPU kernels are launched and write the tables: `python -m bench.gpu.tune --out FOLDER`.

Triton   For every entry of `tuning.CONFIGS` and a shape from each of its size ranges, a search starts at
         the present configuration and moves to the fastest neighbor (one parameter doubled or halved, one stage more
         or less) until none is faster. Neighbours are compiled side by side in processes of their own.
CUDA     For every entry of `SLICES` and each width, all slices.

What the project's targets rest on comes first. A choice counts only if its results are as accurate as the present
one's: compilers do miscompile. Leaves tuning.json (every time taken) and tuning.py (the module with the new tables). A
call goes on where the last one stopped; what is left when --total seconds have been spent keeps its present lines.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import op, timing
from hra_kernels import reference
from hra_kernels.backends import cuda as cuda_backend
from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import tuning
from hra_kernels.measuring import stopwatch
from hra_kernels.testing import cases, tolerance
from tests.cuda import emulation

KERNELS = {"reflect": "reflect_fwd", "backward_rows": "reflect_bwd", "backward_columns": "reflect_bwd"}
"""Triton kernels worth tuning, and the operator that runs each."""
PASSES = {"forward": "reflect_fwd", "backward": "reflect_bwd"}
"""The CUDA kernels' passes likewise."""
FEW_ROWS, WIDE = 1024, 2**40
RANGES = [
    (FEW_ROWS, WIDE, (512, 4096)),
    (WIDE, 2048, (8192, 2048)),
    (WIDE, 8192, (8192, 4096)),
    (WIDE, WIDE, (8192, 16384)),
]
"""(largest M, largest D, the shape that stands for the range)."""
WIDTHS = (2048, 4096, 8192, 16384)
SLICES = (512, 1024, 2048)
LEAST = tuning.LaunchConfig(16, 32, 1, 1)
MOST = tuning.LaunchConfig(128, 512, 16, 5)
WORTH = 0.97
"""A neighbor must take less than this share of the best time: below it is noise."""
COMPILERS = 6
"""Processes that compile: other stages of bench.gpu.run use the machine's cores too."""


def neighbors(config: tuning.LaunchConfig) -> list[tuning.LaunchConfig]:
    """Configurations one step away, within `LEAST` and `MOST`."""
    found = []
    for name in ("block_m", "block_d", "num_warps"):
        value = getattr(config, name)
        found += [dataclasses.replace(config, **{name: other}) for other in (value // 2, value * 2)]
    found += [dataclasses.replace(config, num_stages=config.num_stages + step) for step in (-1, 1)]
    names = [field.name for field in dataclasses.fields(config)]
    return [
        other
        for other in found
        if all(getattr(LEAST, name) <= getattr(other, name) <= getattr(MOST, name) for name in names)
    ]


@contextlib.contextmanager
def only_line(table: dict, key: tuple, line: tuple) -> Iterator[None]:
    """`table[key]` is one line inside the `with` block."""
    present = table[key]
    table[key] = [line]
    try:
        yield
    finally:
        table[key] = present


class Bench:
    """Times one operator of one backend at one shape."""

    def __init__(self, backend, operator: str, shape: tuple[int, int], rank: int, dtype: torch.dtype, device: str):
        self.device = torch.device(device)
        self.operators, self.operator, case = op.calls(backend), operator, cases.Case(*shape, rank)
        count = timing.input_sets(3 * shape[0] * shape[1] * dtype.itemsize, self.device)
        self.sets = [op.Inputs(case, dtype, self.device, seed) for seed in range(count)]

    @functools.cached_property
    def exact(self) -> tuple[torch.Tensor, ...]:
        """The first set's result in float64."""
        wide = SimpleNamespace(**{name: tensor.double() for name, tensor in vars(self.sets[0]).items()})
        return op.calls(reference)[self.operator](wide)

    def call(self, i: int) -> tuple[torch.Tensor, ...]:
        return self.operators[self.operator](self.sets[i])

    def measure(self, samples: int = 5) -> tuple[float | None, float]:
        """(seconds, or None where it does not run; relative error) with the tables as they are."""
        try:
            got = self.call(0)
            error = max(tolerance.errors(a, b)["frobenius"] for a, b in zip(got, self.exact, strict=True))
            if self.device.type != "cuda":
                start = time.perf_counter()
                self.call(0)
                return time.perf_counter() - start, error
            sample = timing.sampler(timing.Variant(self.call), self.device, len(self.sets))
            return stopwatch.summary(sample() for _ in range(samples))["median"], error
        except Exception as reason:  # out of registers or shared memory, or the compiler gave up: all the same here
            print(f"    {type(reason).__name__}", flush=True)
            return None, float("nan")


# --- Triton -----------------------------------------------------------------------------------------------------------


def triton_bench(key: tuple[str, int, int], shape: tuple[int, int], device: str) -> Bench:
    """The bench of one entry of `CONFIGS`."""
    kernel, element_size, block_r = key
    dtype = torch.bfloat16 if element_size == 2 else torch.float32
    return Bench(triton_backend.BACKEND, KERNELS[kernel], shape, 8 if block_r == 16 else block_r, dtype, device)


_last_bench = functools.lru_cache(maxsize=1)(triton_bench)


def compile_config(key: tuple[str, int, int], shape: tuple[int, int], config: tuning.LaunchConfig) -> None:
    """Runs in a process of its own: leaves the compiled kernel in Triton's cache on the disk."""
    with contextlib.suppress(Exception), only_line(tuning.CONFIGS, key, (WIDE, WIDE, config)):  # `measure` says why
        _last_bench(key, shape, "cuda").call(0)
        torch.cuda.synchronize()


def search(
    measure: Callable[[tuning.LaunchConfig], tuple[float | None, float]],
    start: tuning.LaunchConfig,
    most: int,
    prepare: Callable[[list[tuning.LaunchConfig]], None] = lambda configs: None,
) -> tuple[tuning.LaunchConfig, list[dict]]:
    """The fastest configuration found in at most `most` measurements, and all of them.

    `prepare` is called with the configurations that are measured next.
    """
    seconds, error = measure(start)
    if seconds is None:
        raise RuntimeError(f"tune: the present configuration {start} does not run")
    tried = {start: seconds}
    log = [{"choice": dataclasses.astuple(start), "seconds": seconds, "error": error}]
    best, moved = start, True
    while moved and len(tried) < most:
        moved = False
        new = [config for config in neighbors(best) if config not in tried][: most - len(tried)]
        prepare(new)
        for config in new:
            tried[config], found_error = measure(config)
            log.append({"choice": dataclasses.astuple(config), "seconds": tried[config], "error": found_error})
            right = found_error <= 1.5 * error + 1e-7
            if tried[config] is not None and right and tried[config] < WORTH * tried[best]:
                best, moved = config, True
    return best, log


def search_triton(
    key: tuple[str, int, int], shape: tuple[int, int], device: str, most: int, pool: Executor | None
) -> tuple[tuple, list[dict]]:
    """The best configuration of one entry at one shape, and all that were measured."""
    bench = triton_bench(key, shape, device)

    def measure(config: tuning.LaunchConfig) -> tuple[float | None, float]:
        with only_line(tuning.CONFIGS, key, (WIDE, WIDE, config)):
            return bench.measure()

    def prepare(configs: list[tuning.LaunchConfig]) -> None:
        with contextlib.suppress(BrokenExecutor):  # a compiler crashed: what is missing is compiled when it is measured
            for done in [pool.submit(compile_config, key, shape, config) for config in configs] if pool else []:
                done.result()

    best, log = search(measure, tuning.select_config(*key, *shape), most, prepare)
    return dataclasses.astuple(best), log


# --- CUDA -------------------------------------------------------------------------------------------------------------


def search_slices(
    backend: cuda_backend.CudaBackend, key: tuple[str, int], shape: tuple[int, int], device: str
) -> tuple[int, list[dict]]:
    """The best slice for one pass, rank and width, and all that were measured; the present one is measured first."""
    direction, rank = key
    bench = Bench(backend, PASSES[direction], shape, rank, torch.bfloat16, device)
    widest = 2048 if direction == "forward" else 1024
    present = tuning.select_slice(direction, rank, shape[1])
    best, log = present, []
    for size in sorted(SLICES, key=lambda size: size != present):
        if size > widest or 16 * size < shape[1]:
            continue
        with only_line(tuning.SLICES, key, (WIDE, size)):
            seconds, error = bench.measure()
        log.append({"choice": size, "seconds": seconds, "error": error})
        of_best = next(entry["seconds"] for entry in log if entry["choice"] == best)
        right = error <= 1.5 * log[0]["error"] + 1e-7
        if seconds is not None and right and (of_best is None or seconds < WORTH * of_best):
            best = size
    return best, log


def cuda_module(rehearse: bool) -> tuple[cuda_backend.CudaBackend | None, str]:
    """The backend whose slices are measured, or None and why there is none; a rehearsal builds nothing."""
    if not rehearse:
        reason = cuda_backend.BACKEND.why_unavailable()
        return (None, reason) if reason else (cuda_backend.BACKEND, "")
    built = sorted((emulation.ROOT / "build" / "emulation").glob("_emulated*.so"))
    sources = [
        *(emulation.ROOT / "csrc" / "cuda").rglob("*.[ch]*"),
        *(emulation.ROOT / "python_bindings").glob("cuda*"),
    ]
    if not built or built[0].stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return (
            None,
            "the emulation is not built, or older than its sources (pytest tests/cuda/test_emulated.py builds it)",
        )
    native = emulation.load(built[0])
    native.emulate(0)
    return emulation.backend(native), ""


# --- the tables -------------------------------------------------------------------------------------------------------


def config_lines(key: tuple[str, int, int], found: dict[tuple, tuple]) -> list[str]:
    """An entry of `CONFIGS`: `found` is {shape: (config, seconds)}; where it has nothing the present line stands."""
    entries = []
    for most_m, most_d, shape in RANGES:
        config, seconds = found.get(shape, (dataclasses.astuple(tuning.select_config(*key, *shape)), None))
        if entries and entries[-1][0] == most_m and entries[-1][2] == config:
            entries.pop()
        entries.append((most_m, most_d, config, evidence(shape, seconds)))
    name = {FEW_ROWS: "FEW_ROWS", WIDE: "WIDE"}
    return [f"({name.get(m, m)}, {name.get(d, d)}, LaunchConfig{config}),  # {why}" for m, d, config, why in entries]


def slice_lines(key: tuple[str, int], found: dict[tuple, tuple]) -> list[str]:
    """An entry of `SLICES` likewise; beyond the widest shape the present lines stand."""
    entries = []
    for width in WIDTHS:
        size, seconds = found.get((8192, width), (tuning.select_slice(*key, width), None))
        if entries and entries[-1][1] == size:
            entries.pop()
        entries.append((width, size, evidence((8192, width), seconds)))
    entries += [(*line, "not measured") for line in tuning.SLICES[key] if line[0] > WIDTHS[-1]]
    return [f"({most_d}, {size}),  # {why}" for most_d, size, why in entries]


def evidence(shape: tuple[int, int], seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1e6:.1f} us at {shape[0]} x {shape[1]}"


def module(log: dict[str, dict], gpu: str | None) -> str:
    """tuning.py's source with what was found on `gpu`; entries that were not searched stay as they are."""
    found: dict[tuple, dict[tuple, tuple]] = {}
    for entry in log.values():
        best = tuple(entry["best"]) if isinstance(entry["best"], list) else entry["best"]
        seconds = next(taken["seconds"] for taken in entry["tried"] if taken["choice"] == entry["best"])
        found.setdefault(tuple(entry["key"]), {})[tuple(entry["shape"])] = (best, seconds)
    source = Path(tuning.__file__).read_text()
    for key, of_shapes in found.items():
        written = repr(key).replace("'", '"')
        lines = (slice_lines if key in tuning.SLICES else config_lines)(key, of_shapes)
        block = f"    {written}: [\n" + "".join(f"        {line}\n" for line in lines) + "    ],\n"
        # an entry ends on its own line, or on the first one that closes its bracket
        pattern = rf"^    {re.escape(written)}: \[(?:[^\n]+\n|\n.*?^    \],\n)"
        source, count = re.subn(pattern, lambda _: block, source, flags=re.DOTALL | re.MULTILINE)  # noqa: B023
        if count != 1:
            raise RuntimeError(f"tune: tuning.py has {count} entries for {key}")
    if gpu:
        measured = f"Measured on {gpu} where a line's comment is a time. Any other comment"
        source = source.replace("NOT YET MEASURED ON A GPU. Each line's comment", measured, 1)
    compile(source, "tuning.py", "exec")
    return source


def jobs(rehearse: bool, with_slices: bool) -> list[tuple[tuple, tuple[int, int]]]:
    """(key, shape), the most wanted first: two-byte activations of rank 16 and less, then the slices, then the rest."""
    keys = [key for key in tuning.CONFIGS if key[0] in KERNELS]
    if rehearse:
        return [(keys[0], (40, 128))] + [(key, (40, 520)) for key in tuning.SLICES if with_slices]
    triton = [(key, shape) for key in keys for _, _, shape in reversed(RANGES)]
    wanted = [(key, shape) for key, shape in triton if key[1:] == (2, 16) and shape[0] > FEW_ROWS]
    slices = [(key, (8192, width)) for key in tuning.SLICES for width in WIDTHS] if with_slices else []
    return wanted + slices + [job for job in triton if job not in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240, help="stop, to be resumed, after this long")
    parser.add_argument("--total", type=float, default=240, help="of all calls together; then what is left stands")
    parser.add_argument("--most", type=int, default=24, help="measurements a shape")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, in the interpreter and on the emulation")
    options = parser.parse_args()
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse needs TRITON_INTERPRET=1")
    if options.rehearse:
        importlib.import_module("tests.triton.interpreter")  # for its repairs
    device = "cpu" if options.rehearse else "cuda"
    backend, reason = cuda_module(options.rehearse)
    if reason:
        print(f"the CUDA kernels' slices are left out: {reason}")
    log_path = options.out / "tuning.json"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    options.out.mkdir(parents=True, exist_ok=True)
    start, before = time.monotonic(), sum(entry["took"] for entry in log.values())
    planned = {
        f"{'/'.join(map(str, key))} {shape[0]}x{shape[1]}": (key, shape)
        for key, shape in jobs(options.rehearse, backend is not None)
    }
    left = [name for name in planned if name not in log]
    spent = lambda: time.monotonic() - start  # noqa: E731
    with contextlib.ExitStack() as stack:
        pool = None
        if not options.rehearse:
            pool = stack.enter_context(ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")))
        while left and spent() < options.seconds and before + spent() < options.total:
            name = left.pop(0)
            key, shape = planned[name]
            begun = time.monotonic()
            if key in tuning.SLICES:
                best, tried = search_slices(backend, key, shape, device)
            else:
                best, tried = search_triton(key, shape, device, options.most, pool)
            took = time.monotonic() - begun
            log[name] = {"key": key, "shape": shape, "best": best, "took": took, "tried": tried}
            log_path.write_text(json.dumps(log) + "\n")
            fastest = next(entry for entry in tried if entry["choice"] == best)
            rate = tried[0]["seconds"] / fastest["seconds"] if tried[0]["seconds"] else float("nan")
            print(f"{name}: {best}, {rate:.2f} x the first one's speed, {len(tried)} tried in {took:.1f} s", flush=True)
    (options.out / "tuning.py").write_text(
        module(json.loads(log_path.read_text()), None if options.rehearse else torch.cuda.get_device_name())
    )
    print(f"{len(planned) - len(left)} of {len(planned)} searched, {len(left)} left")
    return 3 if left and before + spent() < options.total else 0


if __name__ == "__main__":
    sys.exit(main())
