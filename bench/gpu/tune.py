"""Measure launch configurations of the Triton kernels and write the table: `python -m bench.gpu.tune --out FOLDER`.

For every entry of `hra_kernels.tuning.CONFIGS` and a shape from each of its size ranges, a search starts at the present
configuration and moves to the fastest neighbour (one parameter doubled or halved, one stage more or less) until none is
faster. A configuration counts only if its results are as accurate as the present one's: compilers do miscompile.

Leaves tuning.json (every time taken) and tuning.py (the module with the new table), and goes on where it stopped.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from bench import timing
from hra_kernels import reference, triton_backend, tuning
from tests import cases, tolerance

KERNELS = {"reflect": "reflect_fwd", "backward_rows": "reflect_bwd", "backward_columns": "reflect_bwd"}
"""Kernels worth tuning, and the operator that runs each."""
FEW_ROWS, WIDE = 1024, 2**40
RANGES = [
    (FEW_ROWS, WIDE, (512, 4096)),
    (WIDE, 2048, (8192, 2048)),
    (WIDE, 8192, (8192, 4096)),
    (WIDE, WIDE, (8192, 16384)),
]
"""(largest M, largest D, the shape that stands for the range)."""
LEAST = tuning.LaunchConfig(16, 32, 1, 1)
MOST = tuning.LaunchConfig(128, 512, 16, 5)
WORTH = 0.97
"""A neighbour must take less than this share of the best time: below it is noise."""


def neighbours(config: tuning.LaunchConfig) -> list[tuning.LaunchConfig]:
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


class Bench:
    """Times one operator at one shape under any configuration of one kernel."""

    def __init__(self, key: tuple[str, int, int], shape: tuple[int, int], device: torch.device) -> None:
        kernel, element_size, block_r = key
        self.key, self.device = key, device
        dtype = torch.bfloat16 if element_size == 2 else torch.float32
        rank = 8 if block_r == 16 else block_r
        case = cases.Case(*shape, rank)
        count = timing.input_sets(3 * shape[0] * shape[1] * element_size, device)
        self.sets = []
        for seed in range(count):
            x, u, dy = (tensor.to(device) for tensor in cases.make_inputs(case, dtype, seed))
            v, t = reference.wy_factor(u)
            self.sets.append((x, dy, v, t, reference.reflect_fwd(x, v, t, True)[1]))
        self.operator = KERNELS[kernel]
        x, dy, v, t, p = (tensor.double() for tensor in self.sets[0])
        forward, backward = reference.reflect_fwd(x, v, t, True), reference.reflect_bwd(dy, x, v, t, p, True)
        self.exact = forward if self.operator == "reflect_fwd" else backward

    def call(self, i: int) -> tuple[torch.Tensor, ...]:
        x, dy, v, t, p = self.sets[i]
        if self.operator == "reflect_fwd":
            return triton_backend.reflect_fwd(x, v, t, True)
        return triton_backend.reflect_bwd(dy, x, v, t, p, True)

    def measure(self, config: tuning.LaunchConfig, samples: int = 5) -> tuple[float | None, float]:
        """(seconds, or None where it does not run; relative error)."""
        present = tuning.CONFIGS[self.key]
        tuning.CONFIGS[self.key] = [(WIDE, WIDE, config)]
        try:
            got = self.call(0)
            error = max(tolerance.errors(a, b)["frobenius"] for a, b in zip(got, self.exact, strict=True))
            if self.device.type != "cuda":
                start = time.perf_counter()
                self.call(0)
                return time.perf_counter() - start, error
            sample = timing.sampler(timing.Variant(self.call), self.device, len(self.sets))
            return timing.summary(sample() for _ in range(samples))["median"], error
        except Exception as reason:  # out of registers or shared memory, or the compiler gave up: all the same here
            print(f"    {config}: {type(reason).__name__}", flush=True)
            return None, float("nan")
        finally:
            tuning.CONFIGS[self.key] = present


def search(bench: Bench, start: tuning.LaunchConfig, most: int) -> tuple[tuning.LaunchConfig, list[dict]]:
    """The fastest configuration found in at most `most` measurements, and all of them."""
    seconds, error = bench.measure(start)
    if seconds is None:
        raise RuntimeError(f"tune: the present configuration {start} of {bench.key} does not run")
    tried = {start: seconds}
    log = [{"config": dataclasses.astuple(start), "seconds": seconds, "error": error}]
    best, moved = start, True
    while moved and len(tried) < most:
        moved, centre = False, best
        for config in neighbours(centre):
            if config in tried or len(tried) >= most:
                continue
            tried[config], found_error = bench.measure(config)
            log.append({"config": dataclasses.astuple(config), "seconds": tried[config], "error": found_error})
            right = found_error <= 1.5 * error + 1e-7
            if tried[config] is not None and right and tried[config] < WORTH * tried[best]:
                best, moved = config, True
    return best, log


def table(found: dict[tuple, dict[tuple, tuple]]) -> str:
    """The `CONFIGS` block of tuning.py: `found` by key and shape where there is any, the present lines elsewhere."""
    lines = ["CONFIGS = {"]
    for key, present in tuning.CONFIGS.items():
        entries = present
        if key in found:
            entries = []
            for most_m, most_d, shape in RANGES:
                standing = tuning.select_config(*key, *shape)
                config = tuning.LaunchConfig(*found[key][shape]) if shape in found[key] else standing
                if entries and entries[-1][0] == most_m and entries[-1][2] == config:
                    entries.pop()
                entries.append((most_m, most_d, config))
        lines.append(f"    {key!r}: [".replace("'", '"'))
        for most_m, most_d, config in entries:
            sizes = ", ".join("2**40" if size == WIDE else str(size) for size in (most_m, most_d))
            lines.append(f"        ({sizes}, LaunchConfig{dataclasses.astuple(config)}),")
        lines.append("    ],")
    return "\n".join([*lines, "}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="stop, to be resumed, after this long")
    parser.add_argument("--most", type=int, default=24, help="measurements a shape")
    parser.add_argument("--rehearse", action="store_true", help="one tiny shape in Triton's interpreter")
    options = parser.parse_args()
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse needs TRITON_INTERPRET=1")
    device = torch.device("cpu" if options.rehearse else "cuda")
    log_path = options.out / "tuning.json"
    log = json.loads(log_path.read_text()) if log_path.exists() else {}
    keys = [key for key in tuning.CONFIGS if key[0] in KERNELS]
    jobs = [(key, shape) for key in keys for _, _, shape in RANGES]
    if options.rehearse:
        jobs = [(key, (40, 128)) for key in keys[:1]]
    options.out.mkdir(parents=True, exist_ok=True)
    start, left = time.monotonic(), 0
    for key, shape in jobs:
        name = f"{'/'.join(map(str, key))} {shape[0]}x{shape[1]}"
        if name in log:
            continue
        if time.monotonic() - start > options.seconds:
            left += 1
            continue
        best, tried = search(Bench(key, shape, device), tuning.select_config(*key, *shape), options.most)
        log[name] = {"key": key, "shape": shape, "best": dataclasses.astuple(best), "tried": tried}
        log_path.write_text(json.dumps(log) + "\n")
        fastest = next(entry for entry in tried if tuple(entry["config"]) == dataclasses.astuple(best))
        gain = tried[0]["seconds"] / fastest["seconds"]
        print(f"{name}: {best}, {gain:.2f} x the present one's speed, {len(tried)} tried", flush=True)
    found: dict[tuple, dict[tuple, tuple]] = {}
    for entry in log.values():
        found.setdefault(tuple(entry["key"]), {})[tuple(entry["shape"])] = tuple(entry["best"])
    source = Path(tuning.__file__).read_text()
    written, count = re.subn(r"^CONFIGS = \{.*?^\}$", lambda _: table(found), source, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise RuntimeError("tune: tuning.py must hold one block from 'CONFIGS = {' to '}' in the first column")
    compile(written, "tuning.py", "exec")
    (options.out / "tuning.py").write_text(written)
    print(f"{len(log)} of {len(jobs)} searched, {left} left")
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
