"""The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on a module built with both.

PyTorch takes a block of exactly a tensor's size from the heap, so that one element too many is caught.
"""

import pytest

from hra_kernels.backends import cpu
from tests import native

pytestmark = pytest.mark.slow

RUN = """
import importlib.util, sys
import pytest
spec = importlib.util.spec_from_file_location("hra_kernels._native", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
ON_EACH_ISA = ["tests/operators/test_accuracy.py", "tests/operators/test_hostile.py"]


@pytest.fixture(scope="module")
def sanitized():
    if cpu.BACKEND.why_unavailable():
        pytest.skip(cpu.BACKEND.why_unavailable())
    return str(native.build("_native", "native-sanitized", HRA_SANITIZE="ON", HRA_CUDA="OFF"))


def test_bindings(sanitized):
    native.run_under_sanitizers("-c", RUN, sanitized, "tests/cpu/test_bindings.py")


@pytest.mark.parametrize("isa", cpu._native.isas() if cpu._native else [])
def test_operators(sanitized, isa):
    native.run_under_sanitizers("-c", RUN, sanitized, "--backends", "cpu", "--isa", isa, *ON_EACH_ISA)
