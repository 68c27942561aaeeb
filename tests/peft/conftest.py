"""What tests of several files of the drop-in use."""

import pytest

import hra_kernels.peft


@pytest.fixture
def enabled():
    """PEFT builds this package's layers."""
    with hra_kernels.peft.enabled():
        yield
