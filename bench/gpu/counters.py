"""Nsight Compute's counters of every kernel at the target shapes, to see why one misses its target.

`python -m bench.gpu.counters` runs each operator once, within a profiler's range that names it; the stage `profile`
runs it under ncu and condenses what ncu found to one line a kernel.
"""

import argparse
import csv
import io
import re
import shutil
import sys
from collections.abc import Iterable

from bench.gpu.session import Session, StageFailed

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


def run(session: Session) -> str:
    """Profile all operators in one process; leaves counters.ncu-rep, and counters.csv and .txt in the results."""
    session.results.mkdir(parents=True, exist_ok=True)
    operators = [sys.executable, "-m", "bench.gpu.counters", "--device", session.device]
    if session.rehearse:
        session.command("profile", [*operators, "--shapes", "64x128", "--backends", "cpu", "--ranks", "8"], least=20)
        return "operators run; ncu needs a GPU"
    ncu = shutil.which("ncu")
    if ncu is None:
        raise StageFailed("ncu is not on the PATH")
    report = session.work / "counters.ncu-rep"
    options = ["--nvtx", "--profile-from-start", "off", "--clock-control", "none", "--force-overwrite"]
    options += [part for section in SECTIONS for part in ("--section", section)]
    session.command("profile", [ncu, *options, "--export", str(report), *operators], least=60)
    printed = ["--import", str(report), "--page", "details", "--csv"]
    _, text = session.command("profile", [ncu, *printed], least=10)
    (session.results / "counters.csv").write_text(text)
    lines = summarize(text)
    if not lines:
        raise StageFailed("ncu's table could not be read; see profile.log")
    (session.results / "counters.txt").write_text("\n".join(lines) + "\n")
    return f"{len(lines)} kernels"


def summarize(text: str) -> list[str]:
    """One line a kernel from ncu's CSV (`--page details`): operator, kernel, and `METRICS`."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=[f"{M}x{D}" for M, D in SHAPES], metavar="MxD")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    options = parser.parse_args()
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in options.shapes]
    run_operators(options.device, shapes, options.ranks, options.backends)


if __name__ == "__main__":
    main()
