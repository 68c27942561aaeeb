"""The CUDA kernels as machine code for a GPU that is not here.

    python -m tests.cuda.machine_code       prints one line for each kernel, and each launch's memory

Read from the installed module, the one that ships. Where that has none it is built into build/cuda-strict, where a
spill or local memory is an error, and kept there. Shared memory is chosen at launch, so it is read from launches on the
emulation.
"""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from hra_kernels.backends import tuning
from tests import native
from tests.cuda import emulation

ARCHITECTURE = "90a"
SHARED_LIMIT = 232448
"""Bytes of shared memory one block may have; NVIDIA's published limit for compute capability 9.0."""

_INSTRUCTIONS = {
    "mma": r"HMMA\.16816\.F32\.BF16",
    "ldmatrix": r"LDSM\.",
    "async16": r"LDGSTS\.E\.(?:BYPASS\.)?(?:LTC\w+\.)?128",
    "load16": r"LDG\.E\.(?:\w+\.)*128",
    "store16": r"STG\.E\.(?:\w+\.)*128",
    "cluster": r"UCGABAR_ARV",
    "send16": r"STAS\.128",
    "trap": r"BPT\.TRAP",
    "local": r"(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel: registers and counts of the instructions in `_INSTRUCTIONS`."""

    name: str
    registers: int
    stack: int
    counts: Counter

    def __str__(self) -> str:
        counts = "  ".join(f"{name} {self.counts[name]:4d}" for name in _INSTRUCTIONS)
        return f"{self.name:34s} registers {self.registers:3d}  stack {self.stack}  {counts}"


def why_unavailable() -> str | None:
    """None, or why the kernels cannot be compiled or read here."""
    if _installed() is None:
        for tool in ("nvcc", "cmake"):
            if shutil.which(tool) is None:
                return f"{tool} is not on the path"
    return None if _tool("cuobjdump") else "there is no cuobjdump, neither on the path nor in Triton's wheel"


def _tool(name: str) -> str | None:
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def _installed() -> Path | None:
    found = importlib.util.find_spec("hra_kernels._cuda")
    return Path(found.origin) if found else None


def build(name: str, **options: str) -> Path:
    """The path of `_cuda`, built into build/`name`, where a spill or local memory is an error."""
    architectures = f"{ARCHITECTURE}-real"
    strict = {"HRA_CUDA": "ON", "HRA_CUDA_STRICT": "ON", "CMAKE_CUDA_ARCHITECTURES": architectures}
    return native.build("_cuda", name, **strict, **options)


def compiled_module() -> Path:
    """The path of `_cuda`: the installed one, or one built strictly."""
    return _installed() or build("cuda-strict")


def _short(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"hra::\w+::|\(anonymous namespace\)::|void |\(int\)", "", name)
    return name.split("(")[0].replace(" ", "")


def kernels(module: Path) -> list[Kernel]:
    """Every kernel in the module."""
    arguments = [_tool("cuobjdump"), "-arch", f"sm_{ARCHITECTURE}", str(module)]
    usage = subprocess.run([*arguments, "-res-usage"], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([*arguments, "-sass"], capture_output=True, text=True, check=True).stdout
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    found = []
    for section in code.split("Function : ")[1:]:
        name, body = section.split("\n", 1)
        counts = Counter({key: len(re.findall(pattern, body)) for key, pattern in _INSTRUCTIONS.items()})
        found.append(Kernel(_short(name), *resources[name], counts))
    return found


def launches(direction: str, D: int, R: int, dtype: torch.dtype, size: int, rows: int = 16):
    """(blocks, blocks per cluster, shared bytes) of each launch of a pass on the emulation with one slice."""
    emulated = emulation.emulated()
    emulated.emulate(0)
    backend = emulation.backend(emulated)
    x, v, t = torch.zeros(rows, D, dtype=dtype), torch.zeros(R, D), torch.zeros(R, R)
    emulated.launches()
    with mock.patch.dict(tuning.SLICES, {key: [(tuning.WIDE, size)] for key in tuning.SLICES}):
        if direction == "forward":
            backend.reflect_fwd(x, v, t, True)
        else:
            backend.reflect_bwd(x, x, v, t, torch.zeros(rows, R), True)
    return emulated.launches()


SLICES = {"forward": (512, 1024, 2048), "backward": (512, 1024)}
WIDTHS = (64, 2048, 4096, 8192, 16384)


def main() -> None:
    """Print both tables."""
    reason = why_unavailable()
    if reason:
        sys.exit(f"the CUDA kernels cannot be compiled here: {reason}")
    for kernel in kernels(compiled_module()):
        print(kernel)
    for direction, sizes in SLICES.items():
        for D, R, size in itertools.product(WIDTHS, (8, 16), sizes):
            if 16 * size < D:
                continue
            shapes = launches(direction, D, R, torch.bfloat16, size)
            described = ", ".join(f"cluster {cluster} {memory} B" for _, cluster, memory in shapes)
            print(f"{direction:8s} bfloat16 D {D:5d} R {R:2d} slice {size:4d}: {described}")


if __name__ == "__main__":
    main()
