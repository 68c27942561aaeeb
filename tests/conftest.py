"""Which backends the shared tests run on.

    pytest --backends cpu,reference    these only; one that is not available is an error
    pytest                             all that run at full speed here; the others are skipped with their reason
    pytest --isa avx2                  the CPU kernels' instruction set, instead of the best that this processor has

Without a GPU, Triton's kernels are interpreted: in a process where TRITON_INTERPRET is 1 when they are defined they can
be nothing else, so it is set here, before anything imports them. TRITON_INTERPRET=0 leaves them to Triton's compiler.

Outputs allocated with `torch.empty` are filled with NaN, so that a kernel that leaves a hole shows it.
"""

import importlib.util
import os
import signal

# libgomp's idle threads spin; where anything else runs on the machine, that costs tests most of their time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from hra_kernels import factor_cache, ops

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    parser.addoption("--backends", default="", help="comma-separated backends for the shared tests (default: all)")
    parser.addoption("--isa", help="avx512, avx2 or baseline: run the CPU kernels with this instruction set")
    parser.addoption("--emulated-module", help="a build of the CUDA emulation to test, in place of this tree's own")


def pytest_configure(config):
    # ignored in what a script starts in the background, where tests of Ctrl-C would have nothing to test
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if INTERPRETED and "triton" in config.getoption("backends").split(","):
        config.pluginmanager.import_plugin("tests.triton.interpreter")
    isa = config.getoption("isa")
    if isa:
        reason = ops.backend_report()["cpu"]
        if reason:
            raise pytest.UsageError(f"--isa: {reason}")
        native = importlib.import_module("hra_kernels._native")
        if isa not in native.isas():
            raise pytest.UsageError(f"--isa: expected one of {', '.join(native.isas())} on this machine, got {isa!r}")
        native.set_isa(isa)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        asked = metafunc.config.getoption("backends")
        report = ops.backend_report()
        names = asked.split(",") if asked else list(report)
        unknown = [name for name in names if name not in report or (asked and report[name])]
        if unknown:
            raise pytest.UsageError(f"--backends: {unknown} not available; the report is {report}")
        if INTERPRETED and not asked:
            report["triton"] = "interpreted here, a minute or more: pytest --backends triton"
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


@pytest.fixture
def computed(monkeypatch):
    """A list with one entry for each factor computed, its number of chains."""
    calls = []
    monkeypatch.setattr(
        factor_cache, "chain_factor", lambda us, *rest: calls.append(len(us)) or ops.chain_factor(us, *rest)
    )
    for backend in {type(backend) for backend in ops.BACKENDS.values()}:
        renew = backend.copy_and_factor
        monkeypatch.setattr(backend, "copy_and_factor", lambda *args, renew=renew: calls.append(1) or renew(*args))
    return calls
