"""Another release of one package for a test's process: fetched with pip into pytest's cache, laid over what is here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def environment(package: str, release: str, cache: pytest.Cache) -> dict[str, str]:
    """The environment of a process that imports this release; skips the test where pip cannot fetch it."""
    folder = Path(cache.mkdir(f"{package}-releases")) / release
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*command, f"{package}=={release}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip install {package}=={release}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        (folder / "complete").touch()
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    check = f"import {package}; assert {package}.__version__ == {release!r}, {package}.__version__"
    subprocess.run([sys.executable, "-c", check], env=found, check=True)
    return found
