"""A Triton older than the kernels are tested with is a reason, not a kernel."""

import pytest
import torch

from hra_kernels.backends import triton


@pytest.fixture
def installed(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def install(version):
        monkeypatch.setattr(triton.metadata, "version", lambda name: version)
        triton._why_not_installed.cache_clear()

    yield install
    triton._why_not_installed.cache_clear()


@pytest.mark.parametrize("version", ["3.3.1", "3.2.0", "2.9.0"])
def test_an_old_release_is_a_reason(installed, version):
    installed(version)
    assert triton.BACKEND.why_unavailable() == f"Triton must be 3.4 or newer, got {version}"


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0+git1234", "4.0"])
def test_a_newer_release_serves(installed, version):
    installed(version)
    assert triton.BACKEND.why_unavailable() is None
