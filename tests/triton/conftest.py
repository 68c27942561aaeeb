"""Without a GPU these tests run the kernels in Triton's interpreter, which `tests/conftest.py` turned on."""

import os

import pytest

from hra_kernels.backends import triton_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton.interpreter import coarse_tiles  # noqa: F401  a fixture; importing it repairs the interpreter


@pytest.fixture(autouse=True)
def fresh_plans():
    """Launches are planned anew, so that what a test puts in a kernel's or a table's place is taken."""
    triton_launch.forget_plans()
    yield
    triton_launch.forget_plans()
