"""Measure how the GPU kernels are launched and write this GPU's table: `python -m bench.gpu.tune --out FOLDER`.

Triton   For every key of `tuning.CONFIGS` and a shape from each of its size ranges, a search starts at the present tile
         and moves to the fastest neighbor (one parameter doubled or halved, one stage more or less) until none is
         faster. Neighbors are compiled side by side in processes of their own.
CUDA     For every key of `tuning.SLICES` and each width, all slices.

What the project's targets rest on comes first. A choice counts only if its results are as accurate as the present
one's: compilers do miscompile. Leaves tuning.json (every time taken) and table/<architecture>.json in FOLDER, and puts
the table into the tree if every tile in it passes its test there. A call goes on where the last one stopped; what is
left when --total seconds have been spent keeps its present lines.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import op, timing
from bench.gpu.stages import ROOT, TO_BE_CONTINUED, pytest
from hra_kernels import reference
from hra_kernels.backends import cuda as cuda_backend
from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import triton_launch, tuning
from hra_kernels.measuring import stopwatch
from hra_kernels.testing import cases, tolerance

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
TEST_S = 90.0
"""Kept back for the test of the new table, which compiles its tiles."""
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


def present_tiles() -> tuning.TileTable:
    """The tiles in force on this device."""
    return tuning.CONFIGS.get(tuning.architecture(), tuning.CONFIGS[tuning.DEFAULT])


@contextlib.contextmanager
def only_line(table: dict, key: tuple, line: tuple) -> Iterator[None]:
    """`table[key]` is one line inside the `with` block."""
    present = table[key]
    table[key] = [line]
    triton_launch.forget_plans()
    try:
        yield
    finally:
        table[key] = present
        triton_launch.forget_plans()


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
    """The bench of one key of `CONFIGS`."""
    kernel, element_size, rank = key
    dtype = torch.bfloat16 if element_size == 2 else torch.float32
    return Bench(triton_backend.BACKEND, KERNELS[kernel], shape, rank, dtype, device)


_last_bench = functools.lru_cache(maxsize=1)(triton_bench)


def compile_config(key: tuple[str, int, int], shape: tuple[int, int], config: tuning.LaunchConfig) -> None:
    """Runs in a process of its own: leaves the compiled kernel in Triton's cache on the disk."""
    with contextlib.suppress(Exception), only_line(present_tiles(), key, (WIDE, WIDE, config)):  # `measure` says why
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
        with only_line(present_tiles(), key, (WIDE, WIDE, config)):
            return bench.measure()

    def prepare(configs: list[tuning.LaunchConfig]) -> None:
        with contextlib.suppress(BrokenExecutor):  # a compiler crashed: what is missing is compiled when it is measured
            for done in [pool.submit(compile_config, key, shape, config) for config in configs] if pool else []:
                done.result()

    best, log = search(measure, tuning.select_config(*key, *shape), most, prepare)
    return dataclasses.astuple(best), log


# --- CUDA -------------------------------------------------------------------------------------------------------------


def search_slices(backend: object, key: tuple[str, int], shape: tuple[int, int], device: str) -> tuple[int, list[dict]]:
    """The best slice for one pass, rank and width, and all that were measured, the present one first.

    Raises:
        RuntimeError: the present slice does not run.
    """
    direction, rank = key
    bench = Bench(backend, PASSES[direction], shape, rank, torch.bfloat16, device)
    widest = 2048 if direction == "forward" else 1024
    present = tuning.select_slice(direction, rank, shape[1])
    best, log = present, []
    for size in [present, *(size for size in SLICES if size != present)]:
        if size > widest or 16 * size < shape[1]:  # a cluster has 16 blocks at most
            continue
        with only_line(tuning.SLICES, key, (WIDE, size)):
            seconds, error = bench.measure()
        log.append({"choice": size, "seconds": seconds, "error": error})
        if log[0]["seconds"] is None:
            raise RuntimeError(f"tune: the present slice {present} does not run")
        fastest = next(entry["seconds"] for entry in log if entry["choice"] == best)
        if seconds is not None and error <= 1.5 * log[0]["error"] + 1e-7 and seconds < WORTH * fastest:
            best = size
    return best, log


# --- the tables -------------------------------------------------------------------------------------------------------


def evidence(shape: tuple[int, int], seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1e6:.1f} us at {shape[0]} x {shape[1]}"


def limit(value: int) -> int | None:
    return None if value == WIDE else value


def tile_rows(key: tuple[str, int, int], found: dict[tuple, tuple]) -> list[dict]:
    """The lines of a key: `found` is {shape: (tile, seconds)}; where it has nothing the present line stands."""
    kernel, element_size, rank = key
    rows: list[dict] = []
    for most_m, most_d, shape in RANGES:
        tile, seconds = found.get(shape, (dataclasses.astuple(tuning.select_config(*key, *shape)), None))
        row = {"kernel": kernel, "bytes": element_size, "rank": rank, "max_m": limit(most_m), "max_d": limit(most_d)}
        row |= {"tile": list(tile), "why": evidence(shape, seconds)}
        if rows and (rows[-1]["max_m"], rows[-1]["tile"]) == (row["max_m"], row["tile"]):
            rows.pop()
        rows.append(row)
    return rows


def slice_rows(key: tuple[str, int], found: dict[tuple, tuple]) -> list[dict]:
    """Likewise for a key of `SLICES`; beyond the widest shape the present lines stand."""
    rows: list[dict] = []
    for width in WIDTHS:
        size, seconds = found.get((8192, width), (tuning.select_slice(*key, width), None))
        row = {"pass": key[0], "rank": key[1], "max_d": width, "slice": size, "why": evidence((8192, width), seconds)}
        if rows and rows[-1]["slice"] == size:
            rows.pop()
        rows.append(row)
    beyond = [(most_d, size) for most_d, size in tuning.SLICES[key] if most_d > WIDTHS[-1]]
    return rows + [
        {"pass": key[0], "rank": key[1], "max_d": most_d, "slice": size, "why": "not measured"}
        for most_d, size in beyond
    ]


def table(log: dict[str, dict], architecture: str, gpu: str | None) -> str:
    """The file of an architecture with what was found on `gpu`; lines that were not searched stay as they are."""
    path = tuning.TABLES / f"{architecture}.json"
    present = json.loads(path.read_text()) if path.exists() else {"tiles": [], "slices": []}
    found: dict[tuple, dict[tuple, tuple]] = {}
    for entry in log.values():
        best = tuple(entry["best"]) if isinstance(entry["best"], list) else entry["best"]
        seconds = next(taken["seconds"] for taken in entry["tried"] if taken["choice"] == entry["best"])
        found.setdefault(tuple(entry["key"]), {})[tuple(entry["shape"])] = (best, seconds)
    tiles, slices = (
        [row for row in present[name] if tuple(row[part] for part in parts) not in found]
        for name, parts in (("tiles", ("kernel", "bytes", "rank")), ("slices", ("pass", "rank")))
    )
    for key, of_shapes in found.items():
        if key in tuning.SLICES:
            slices += slice_rows(key, of_shapes)
        else:
            tiles += tile_rows(key, of_shapes)
    parts = [f' "architecture": {json.dumps(architecture)}', f' "measured_on": {json.dumps(gpu)}']
    for name, rows in (("tiles", tiles), ("slices", slices)):
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        parts.append(f' "{name}": [\n{lines}\n ]' if rows else f' "{name}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def put_in_place(text: str, architecture: str) -> bool:
    """Put a table into the tree and test its tiles there; where one fails, the tree is as it was."""
    path = tuning.TABLES / f"{architecture}.json"
    before = path.read_text() if path.exists() else None
    path.write_text(text)
    tests = pytest("", 0, "-k", "shipped_tiles", "tests/triton/test_kernels.py", workers=12).command
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run(tests, cwd=ROOT, timeout=TEST_S - 10).returncode == 0:
            return True
    path.unlink() if before is None else path.write_text(before)
    return False


def jobs(rehearse: bool, with_slices: bool) -> list[tuple[tuple, tuple[int, int]]]:
    """(key, shape), the most wanted first: two-byte activations of rank 16 and less, then the slices, then the rest."""
    keys = [key for key in present_tiles() if key[0] in KERNELS]
    if rehearse:
        return [(keys[0], (40, 128))]
    triton = [(key, shape) for key in keys for _, _, shape in reversed(RANGES)]
    wanted = [(key, shape) for key, shape in triton if key[1] == 2 and key[2] <= 16 and shape[0] > FEW_ROWS]
    slices = [(key, (8192, width)) for key in tuning.SLICES for width in WIDTHS] if with_slices else []
    return wanted + slices + [job for job in triton if job not in wanted]


def search_all(options: argparse.Namespace, planned: dict[str, tuple], log: dict[str, dict]) -> list[str]:
    """Search what `log` does not have, as far as the time goes; the names that are left."""
    device = "cpu" if options.rehearse else "cuda"
    before = sum(entry["took"] for entry in log.values())
    end = time.monotonic() + min(options.seconds - TEST_S, options.total - before)
    left = [name for name in planned if name not in log]
    with contextlib.ExitStack() as stack:
        pool = None
        if not options.rehearse:
            pool = stack.enter_context(ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")))
        while left and time.monotonic() < end:
            name = left.pop(0)
            key, shape = planned[name]
            begun = time.monotonic()
            try:
                if key in tuning.SLICES:
                    best, tried = search_slices(cuda_backend.BACKEND, key, shape, device)
                else:
                    best, tried = search_triton(key, shape, device, options.most, pool)
            except RuntimeError as error:  # this one is left as it is; the others may run
                print(f"{name}: {error}", flush=True)
                continue
            took = time.monotonic() - begun
            log[name] = {"key": key, "shape": shape, "best": best, "took": took, "tried": tried}
            (options.out / "tuning.json").write_text(json.dumps(log) + "\n")
            fastest = next(entry for entry in tried if entry["choice"] == best)
            rate = tried[0]["seconds"] / fastest["seconds"]
            print(f"{name}: {best}, {rate:.2f} x the first one's speed, {len(tried)} tried in {took:.1f} s", flush=True)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="end, to be resumed, within this time")
    parser.add_argument("--total", type=float, default=240, help="of all calls together; then what is left stands")
    parser.add_argument("--most", type=int, default=24, help="measurements per shape")
    parser.add_argument("--rehearse", action="store_true", help="one tiny shape, in the interpreter, nothing in place")
    options = parser.parse_args()
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse needs TRITON_INTERPRET=1")
    if options.rehearse:
        importlib.import_module("tests.triton.interpreter")  # for its repairs
        options.most = min(options.most, 4)
    else:
        torch.cuda.init()
    reason = "a rehearsal" if options.rehearse else cuda_backend.BACKEND.why_unavailable()
    if reason:
        print(f"the CUDA kernels' slices are left out: {reason}")
    (options.out / "table").mkdir(parents=True, exist_ok=True)
    path = options.out / "tuning.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    planned = {
        f"{'/'.join(map(str, key))} {shape[0]}x{shape[1]}": (key, shape)
        for key, shape in jobs(options.rehearse, reason is None)
    }
    left = search_all(options, planned, log)
    architecture = tuning.architecture()
    text = table(log, architecture, None if options.rehearse else torch.cuda.get_device_name())
    if not options.rehearse and not put_in_place(text, architecture):
        print("a tile of the new table fails its test, or they take too long: the present table stands")
        return 1
    (options.out / "table" / f"{architecture}.json").write_text(text)
    print(f"{len(planned) - len(left)} of {len(planned)} searched, {len(left)} left")
    return TO_BE_CONTINUED if left and sum(entry["took"] for entry in log.values()) < options.total else 0


if __name__ == "__main__":
    sys.exit(main())
