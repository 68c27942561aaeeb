"""Nsight Compute's counters of every kernel at the target shapes, to see why one misses its target.

`python -m bench.gpu.counters --work FOLDER` runs itself under ncu, where each operator runs once within a profiler's
range that names it, and condenses what ncu found to one line per kernel.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SHAPES = [(8192, 2048), (8192, 4096), (8192, 16384)]
RANKS = [8]
SECTIONS = ["SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis"]
METRICS = {
    "Duration": "time",
    "DRAM Throughput": "DRAM",
    "L1/TEX Cache Throughput": "L1",
    "L2 Cache Throughput": "L2",
    "Issue Slots Busy": "issue",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy",
    "Waves Per SM": "waves",
}
"""What a line of the summary shows, by ncu's name."""


def profile(work: Path) -> int:
    """Profile all operators in one process; leaves counters.ncu-rep, and counters.csv and .txt in the results."""
    report, results = work / "counters.ncu-rep", work / "results"
    results.mkdir(parents=True, exist_ok=True)
    options = ["--nvtx", "--profile-from-start", "off", "--clock-control", "none", "--force-overwrite"]
    options += [part for section in SECTIONS for part in ("--section", section)]
    operators = [sys.executable, "-m", "bench.gpu.counters"]
    status = subprocess.run(["ncu", *options, "--export", str(report), *operators]).returncode
    if status:
        return status
    printed = ["ncu", "--import", str(report), "--page", "details", "--csv"]
    text = subprocess.run(printed, capture_output=True, text=True).stdout
    (results / "counters.csv").write_text(text)
    lines = summarize(text)
    (results / "counters.txt").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} kernels" if lines else f"ncu's table could not be read: {text[:300]}")
    return 0 if lines else 1


def summarize(text: str) -> list[str]:
    """One line per kernel from ncu's CSV (`--page details`): operator, kernel, and `METRICS`."""
    header = re.search(r'^"ID",.*$', text, re.MULTILINE)
    if header is None:
        return []
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(text[header.start() :])):
        found = kernels.setdefault(row["ID"], {"operator": "?", "kernel": kernel_name(row["Kernel Name"])})
        named = re.search(r"hra/([\w/]+)", " ".join(value for value in row.values() if isinstance(value, str)))
        if named:
            found["operator"] = named.group(1)
        if row["Metric Name"] in METRICS:
            found[METRICS[row["Metric Name"]]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return [
        f"{found['operator']:<40} {found['kernel']:<28} "
        + ", ".join(f"{name} {found[name]}" for name in METRICS.values() if name in found)
        for found in kernels.values()
    ]


def kernel_name(signature: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    plain = signature.replace("<unnamed>::", "").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain)[0].split("::")[-1].split()[-1]


def run_operators(device_name: str, shapes: Iterable[tuple[int, int]], ranks: list[int], backends: list[str]) -> None:
    """Each operator once within a range named hra/backend/operator/MxDrR, having run before."""
    import torch

    from bench import op
    from hra_kernels import ops
    from hra_kernels.testing import cases

    device = torch.device(device_name)
    for M, D in shapes:
        for rank in ranks:
            inputs = op.Inputs(cases.Case(M, D, rank), torch.bfloat16, device, seed=0)
            for backend in backends:
                for name, call in op.calls(torch.ops.hra).items():
                    with ops.use_backend(backend):
                        call(inputs)
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                            torch.cuda.profiler.start()
                            with torch.cuda.nvtx.range(f"hra/{backend}/{name}/{M}x{D}r{rank}"):
                                call(inputs)
                                torch.cuda.synchronize()
                            torch.cuda.profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="profile under ncu, into this folder; without it the operators only")
    parser.add_argument("--rehearse", action="store_true", help="the operators once on a CPU, without ncu")
    options = parser.parse_args()
    if options.rehearse:
        run_operators("cpu", [(64, 128)], RANKS, ["cpu"])
        print("operators run; ncu needs a GPU")
        return 0
    if options.work:
        return profile(options.work)
    run_operators("cuda", SHAPES, RANKS, ["triton", "cuda"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
