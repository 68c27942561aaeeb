"""Triton's kernels in processes of their own: interpreted, with every release tested, and compiled for GPUs elsewhere.

Interpreted and compiled kernels cannot live in one process: TRITON_INTERPRET is read when they are defined.
"""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from tests.triton import releases as triton_releases

INTERPRETED = {
    "accuracy": ["tests/operators/test_accuracy.py", "--backends", "triton"],
    "kernels": ["-m", "slow or not slow", "tests/triton/test_kernels.py", "tests/triton/test_planted.py"],
}
LEAST = {"accuracy": 100, "kernels": 90, "compiled": 5}
"""Tests that pass at least: a run that skips or collects less shows nothing."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def start(release, cache, interpret, arguments):
    environment = triton_releases.environment(release, cache)
    environment |= {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rN", *arguments]
    return subprocess.Popen(
        command,
        cwd=triton_releases.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(process, name):
    output, _ = process.communicate(timeout=1800)
    print(output)
    assert process.returncode == 0, output[-8000:]
    assert int(re.search(r"(\d+) passed", output).group(1)) >= LEAST[name], output[-2000:]


@pytest.fixture(scope="module", params=triton_releases.RELEASES)
def interpreted(request):
    """All interpreted runs of a Triton release, side by side, each on one thread."""
    cache = request.config.cache
    started = {name: start(request.param, cache, "1", arguments) for name, arguments in INTERPRETED.items()}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the shared tests run the kernels on it")
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(interpreted, name):
    check(interpreted[name], name)


def test_compiled(request):
    """`test_machine_code.py`, whose kernels are compiled: `pytest -s` shows its tables."""
    check(
        start("installed", request.config.cache, "0", ["-s", "-m", "slow", "tests/triton/test_machine_code.py"]),
        "compiled",
    )
