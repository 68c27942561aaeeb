"""What is here, and the two ceilings, a large copy and a large matrix product: for `bench.gpu.run`."""

import argparse
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import timing
from hra_kernels import env

PACKAGES = ["torch", "triton", "numpy", "peft", "transformers", "diffusers", "pytest", "pytest-xdist", "pytest-timeout"]
PACKAGES += ["hypothesis", "pybind11", "scikit-build-core", "cmake", "ninja"]
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cuobjdump", "git")


def assemblers() -> dict[str, str]:
    """Triton brings several, each for some GPUs: they decide registers and spills, and some have made wrong code."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return {}
    folder = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    versions = {}
    for path in sorted(folder.glob("ptxas*")):
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        versions[path.name] = "".join(re.findall(r"release [\d.]+, (V[\d.]+)", said)) or said.strip()[-80:]
    return versions


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call: the fastest of ten."""
    sample = timing.wall_sampler(timing.Variant(lambda i: run()), device)
    return min(sample() for _ in range(10))


def facts(device: torch.device) -> dict:
    """Versions, the GPU, tools on the PATH, copy rate and rate of a matrix product."""
    found = {"python": platform.python_version()} | {name: env.version(name) for name in PACKAGES}
    found |= {"assemblers": assemblers(), "tools": {name: shutil.which(name) is not None for name in TOOLS}}
    on_gpu = device.type == "cuda"
    if on_gpu:
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = torch.cuda.get_device_capability()
        found["memory GiB"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
    a = torch.randn(2**30 if on_gpu else 2**20, device=device)
    b = torch.empty_like(a)
    found["copy GB/s"] = round(2 * a.nbytes / seconds(lambda: b.copy_(a), device) / 1e9, 1)
    size = 8192 if on_gpu else 256
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bf16 matmul TFLOP/s"] = round(2 * size**3 / seconds(lambda: x @ y, device) / 1e12, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args()
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    found = json.dumps(facts(options.device))
    (options.work / "logs").mkdir(parents=True, exist_ok=True)
    (options.work / "logs" / "machine.json").write_text(found + "\n")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
