"""The Triton releases that the kernels are tested with: the installed one, and the one that GPU images carry."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("installed", "3.6.0")


def environment(release: str, cache: pytest.Cache) -> dict[str, str]:
    """The environment of a process that imports this release, which pip fetches into pytest's cache; skips without."""
    if release == "installed":
        return dict(os.environ)
    folder = Path(cache.mkdir("triton-releases")) / release
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*command, f"triton=={release}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip install triton=={release}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        (folder / "complete").touch()
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    check = f"import triton; assert triton.__version__ == {release!r}, triton.__version__"
    subprocess.run([sys.executable, "-c", check], env=found, check=True)
    return found
