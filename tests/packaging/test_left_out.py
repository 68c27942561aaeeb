"""A machine without a compiler, or with an nvcc that is too old: the package installs without what cannot be built."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hra_kernels import backends, ops
from hra_kernels.backends import compiled, cpu

ROOT = Path(__file__).resolve().parents[2]
OLD_NVCC = """#!/bin/sh
for word in "$@"; do case "$word" in
  *compute_90a*|*compute_100a*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_90a'" >&2; exit 1;;
esac; done
exec {nvcc} "$@"
"""


def test_a_left_out_module_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "hra_kernels._absent_left_out", SimpleNamespace(REASON="no compiler was there"))
    module, reason = compiled.load("_absent")
    assert module is None
    assert "_absent is missing" in reason and "no compiler was there" in reason


def test_a_failed_build_is_named():
    module, reason = compiled.load("_absent")
    assert module is None
    assert "its build failed when hra-kernels was installed" in reason


def test_a_module_that_does_not_load_is_not_called_missing(monkeypatch):
    def refuse(name):
        raise ImportError("version `GLIBCXX_9' not found")

    monkeypatch.setattr(compiled, "import_module", refuse)
    assert compiled.load("_native") == (
        None, "the compiled module _native does not load: version `GLIBCXX_9' not found"
    )  # fmt: skip


@pytest.fixture
def chosen_anew():
    backends._chosen.cache_clear()
    yield
    backends._chosen.cache_clear()


def test_operators_run_on_the_reference_and_warn_once(chosen_anew, monkeypatch):
    monkeypatch.setattr(cpu.BACKEND, "why_unavailable", lambda: "it was left out")
    monkeypatch.setattr(backends, "_forced", None)
    backends._warn_of_missing.cache_clear()
    u, x = torch.randn(16, 4, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match="it was left out"):
        y = ops.reflect(x, *ops.wy_factor(u))
    expected = x
    for column in u.T:
        expected = expected - 2 * torch.outer(expected @ column, column) / (column @ column)
    torch.testing.assert_close(y, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.reflect(x, *ops.wy_factor(u))


@pytest.fixture
def configure(tmp_path):
    """CMake on csrc/ with variables set in the environment: (exit status, what it said, the build folder)."""
    cmake = shutil.which("cmake")
    pybind11 = pytest.importorskip("pybind11")
    if not cmake:
        pytest.skip("cmake is not installed")

    def run(**variables):
        environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDACXX", "HRA_CUDA")}
        command = [
            cmake, "-S", ROOT / "csrc", "-B", tmp_path / "build", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, tmp_path / "build"

    return run


@pytest.mark.slow
def test_without_a_compiler_both_modules_are_left_out(configure):
    status, said, build = configure(CXX="/nonexistent/c++")
    assert status == 0, said
    for module in ("_native", "_cuda"):
        assert "no working CXX compiler" in (build / f"{module}_left_out.py").read_text()


@pytest.mark.slow
def test_an_old_nvcc_leaves_out_cuda_alone(configure, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(OLD_NVCC.format(nvcc=shutil.which("nvcc") or "false"))
    nvcc.chmod(0o755)
    status, said, build = configure(CUDACXX=str(nvcc))
    assert status == 0, said
    note = (build / "_cuda_left_out.py").read_text()
    assert "Unsupported gpu architecture 'compute_90a'" in note
    compile(note, "note", "exec")
    assert not (build / "_native_left_out.py").exists()


@pytest.mark.slow
def test_cuda_on_request_fails_where_it_cannot_be_built(configure):
    status, said, _ = configure(CUDACXX="/nonexistent/nvcc", HRA_CUDA="ON")
    assert status != 0
    assert "HRA_CUDA=ON asks for the CUDA kernels" in said


@pytest.mark.slow
def test_cuda_off_leaves_it_out(configure):
    status, said, build = configure(HRA_CUDA="OFF")
    assert status == 0, said
    assert "HRA_CUDA=OFF" in (build / "_cuda_left_out.py").read_text()
