"""What tests of several files of operators use."""

import pytest

from hra_kernels import factor_cache, ops


@pytest.fixture
def computed(monkeypatch):
    """A list with one entry for each factor computed."""
    calls = []
    monkeypatch.setattr(
        factor_cache, "chain_factor", lambda us, *rest: calls.append(len(us)) or ops.chain_factor(us, *rest)
    )
    return calls
