"""Which backends the shared tests run on.

    pytest --backends cpu,reference    these only; one that is not available is an error
    pytest                             all that are available here; the others are skipped with their reason

Outputs allocated with `torch.empty` are filled with NaN, so that a kernel that leaves a hole shows it.
"""

import os

# libgomp's idle threads spin; where anything else runs on the machine, that costs tests most of their time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from hra_kernels import ops


def pytest_addoption(parser):
    parser.addoption("--backends", default="", help="comma-separated backends for the shared tests (default: all)")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        asked = metafunc.config.getoption("backends")
        report = ops.backend_report()
        names = asked.split(",") if asked else list(report)
        unknown = [name for name in names if name not in report or (asked and report[name])]
        if unknown:
            raise pytest.UsageError(f"--backends: {unknown} not available; the report is {report}")
        skips = {name: [pytest.mark.skip(reason=f"backend {name}: {report[name]}")] for name in names if report[name]}
        metafunc.parametrize("backend", [pytest.param(name, marks=skips.get(name, [])) for name in names])


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_backend(backend):
    """Run the test on one backend."""
    with ops.use_backend(backend):
        yield backend


@pytest.fixture
def device(request):
    """Where a test puts its tensors: the GPU, if there is one and the test's backend (if it has one) serves it."""
    gpu = torch.device("cuda")
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "reference"
    if torch.cuda.is_available() and ops.BACKENDS[name].why_unsupported(gpu, torch.bfloat16, 8) is None:
        return gpu
    return torch.device("cpu")
