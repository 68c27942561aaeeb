"""The CUDA kernels as a CPU module, built where a test first asks for it and kept in build/ for the next run."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from hra_kernels import ops
from hra_kernels.backends.cuda import CudaBackend

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2, 3, 4, 5)
"""Even seeds interleave warps, odd seeds let one run ahead; 2 and 3 go downwards, 4 and 5 at random."""


class BuildFailed(Exception):
    """What the compiler said."""


def backend(native: ModuleType) -> CudaBackend:
    """The CUDA backend on an emulated module; its factors are the reference's."""
    return CudaBackend(native, "cpu", ops.BACKENDS["reference"])


def run(command: list[str]) -> None:
    """Run a build step; raise `BuildFailed` with its output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def build(source: Path = ROOT, *, sanitize: bool = False, name: str | None = None) -> Path:
    """The path of `_emulated`, built from the tree at `source` (a copy with a planted bug, for instance)."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("the CUDA emulation needs cmake and a C++ compiler to be built")
    import pybind11

    folder = ROOT / "build" / (name or ("emulation-sanitized" if sanitize else "emulation"))
    options = [
        "-DHRA_EMULATION=ON",
        f"-DHRA_EMULATION_SANITIZE={'ON' if sanitize else 'OFF'}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_CXX_COMPILER=c++",  # not $CXX: PEFT's BOFT sets it to gcc, which links no C++ library
        "-DCMAKE_BUILD_TYPE=None",  # the target brings its own -O2
    ]
    run(["cmake", "-S", str(source / "csrc"), "-B", str(folder), *options])
    run(["cmake", "--build", str(folder), "--target", "_emulated", "--parallel", str(min(4, os.cpu_count() or 1))])
    found = list(folder.glob("_emulated*.so"))
    assert len(found) == 1, found
    return found[0]


def load(path: Path) -> ModuleType:
    """Import a built module; a process can hold several, from several folders."""
    # pybind11 keeps one module per full name, so each path gets a package name of its own
    name = f"emulation_{zlib.crc32(str(path).encode()):08x}._emulated"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated() -> ModuleType:
    """The module of this tree."""
    return load(build())
