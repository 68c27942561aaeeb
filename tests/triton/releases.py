"""The Triton releases that the kernels are tested with: the installed one, and the one that GPU images carry."""

import os

import pytest

from tests import releases
from tests.releases import ROOT as ROOT

RELEASES = ("installed", "3.6.0")


def environment(release: str, cache: pytest.Cache) -> dict[str, str]:
    """The environment of a process that imports this release."""
    return dict(os.environ) if release == "installed" else releases.environment("triton", release, cache)
