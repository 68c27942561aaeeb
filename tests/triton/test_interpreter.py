"""The Triton kernels executed on the CPU: the shared tests and `triton_suite.py` in processes of their own.

Interpreted and compiled kernels cannot live in one process: TRITON_INTERPRET is read when they are defined.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.triton import releases as triton_releases

RUNS = {
    "accuracy": ["tests/operators/test_accuracy.py", "--backends", "triton"],
    "kernels": ["tests/triton/suite.py", "tests/triton/planted.py"],
}
LEAST = {"accuracy": 100, "kernels": 90}
"""Tests that pass at least: a run that skips or collects less shows nothing."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the shared tests run the kernels on it"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter"),
]


@pytest.fixture(scope="module", params=triton_releases.RELEASES)
def runs(request):
    """All runs of a Triton release, side by side, each on one thread."""
    environment = triton_releases.environment(request.param, request.config.cache)
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.triton.interpreter", "-p", "no:cacheprovider", "-rN"]
    started = {
        name: subprocess.Popen(
            [*command, *arguments],
            cwd=triton_releases.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, arguments in RUNS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", RUNS)
def test_interpreted(runs, name):
    output, _ = runs[name].communicate(timeout=1800)
    print(output.splitlines()[-1])
    assert runs[name].returncode == 0, output[-8000:]
    passed = int(re.search(r"(\d+) passed", output).group(1))
    assert passed >= LEAST[name], output[-2000:]
