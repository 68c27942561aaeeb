"""Modules of `csrc/` built for tests, in folders of build/ that the next run finds; and Python under sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str]) -> None:
    """Run a build step; raise `RuntimeError` with its output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def build(target: str, name: str, **options: str) -> Path:
    """The path of a module, built into build/`name` with CMake's `options`; the test is skipped without a compiler."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip(f"{target} needs cmake and a C++ compiler to be built")
    import pybind11

    folder = ROOT / "build" / name
    options |= {
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_CXX_COMPILER": "c++",  # not $CXX: PEFT's BOFT sets it to gcc, which links no C++ library
    }
    defined = [f"-D{option}={value}" for option, value in options.items()]
    run(["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), *defined])
    run(["cmake", "--build", str(folder), "--target", target, "--parallel", str(min(4, os.cpu_count() or 1))])
    (built,) = folder.glob(f"{target}*.so")
    return built


def run_under_sanitizers(*arguments: str) -> None:
    """Python with AddressSanitizer loaded, which modules built with it need; fresh memory is NaN in every dtype."""
    # libstdc++ too: AddressSanitizer looks for the throwing of exceptions when it is loaded
    found = [f"-print-file-name={library}" for library in ("libasan.so", "libstdc++.so.6")]
    runtime = [subprocess.run(["c++", one], capture_output=True, text=True).stdout.strip() for one in found]
    if not all(map(os.path.isabs, runtime)):
        pytest.skip("the compiler has no libasan.so to preload")
    settings = "detect_leaks=0:detect_stack_use_after_return=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    environment = os.environ | {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": settings}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
