"""The CUDA kernels as a CPU module, built where a test first asks for it and kept in build/ for the next run."""

import functools
import importlib.util
import zlib
from pathlib import Path
from types import ModuleType

from hra_kernels import ops
from hra_kernels.backends.cuda import CudaBackend
from tests import native

SEEDS = (0, 1, 2, 3, 4, 5)
"""Even seeds interleave warps, odd seeds let one run ahead; 2 and 3 go downwards, 4 and 5 at random."""


def backend(module: ModuleType) -> CudaBackend:
    """The CUDA backend on an emulated module; its factors are the reference's."""
    return CudaBackend(module, "cpu", ops.BACKENDS["reference"])


def build(name: str = "emulation", **options: str) -> Path:
    """The path of `_emulated`, built into build/`name`."""
    # the target brings its own -O2
    return native.build("_emulated", name, HRA_EMULATION="ON", CMAKE_BUILD_TYPE="None", **options)


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
