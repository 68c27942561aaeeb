"""Releases that are not supported: one sentence with the range, which pip is told too, and nothing half imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hra_kernels
import hra_kernels.peft
from hra_kernels.backends import triton

PYPROJECT = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("package", "oldest"),
    [
        ("torch", ".".join(map(str, hra_kernels.OLDEST_TORCH))),
        ("triton", ".".join(map(str, triton.OLDEST_TRITON))),
        ("peft", hra_kernels.peft.SUPPORTED[0]),
    ],
)
def test_pip_is_told_the_same(package, oldest):
    assert re.findall(rf'"{package}>=([\d.]+)', PYPROJECT) == [oldest]


def test_extras_are_spelled_as_metadata_spells_them():
    """pip before 23.3, which Python 3.11's venv brings, installs none of an extra that is written another way."""
    others = re.findall(r'"(?!hra-kernels)[\w-]+\[([^\]]+)\]', PYPROJECT)
    assert others
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", extra) for names in others for extra in names.split(","))


def imported_with(package, version, module):
    """(the last line of the error, this package's modules that stayed imported) of an import in a new process"""
    code = (
        f"import sys, {package}\n{package}.__version__ = {version!r}\n"
        f"try:\n    import {module}\nexcept Exception as error:\n    print(error)\n"
        f"print(*(name for name in sys.modules if name.startswith({module!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, left = done.stdout.split("\n")[:2]
    return error, left.split()


@pytest.mark.slow
def test_an_older_torch():
    version = "2.5.1+cu124"
    error, left = imported_with("torch", version, "hra_kernels")
    assert error == f"hra_kernels: PyTorch must be 2.6 or newer, got {version}"
    assert not left


@pytest.mark.slow
def test_an_older_peft():
    error, left = imported_with("peft", "0.18.1", "hra_kernels.peft")
    assert error.startswith("hra_kernels.peft: PEFT must be 0.19 to 0.21, got 0.18.1")
    assert not left
