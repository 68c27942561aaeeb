"""Triton's releases: too old a one is a reason, not a kernel; `hra-kernels env` names an assembler that is in doubt."""

import dataclasses
import re

import pytest
import torch

from hra_kernels import env
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


@dataclasses.dataclass
class Ptxas:
    """Triton's description of an assembler; of those in its folder, the one for Blackwell is `newest`."""

    path: str
    version: str
    newest = "13.1"

    @classmethod
    def from_path(cls, path):
        return cls(path, cls.newest)


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """`env`'s words on the assembler of a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def words(capability, version, newest=None, hip=None):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(env, "_ptxas", lambda capability: Ptxas(str(tmp_path / "ptxas"), version))
        if newest:
            (tmp_path / "ptxas-blackwell").touch()
            monkeypatch.setattr(Ptxas, "newest", newest)
        return env._ptxas_note()

    return words


@pytest.mark.parametrize("version", ["12.8", "12.9", "13.0"])
def test_an_assembler_that_miscompiles_for_hopper_is_named(on_gpu, version):
    said = on_gpu((9, 0), version)
    assert said.startswith(f"ptxas {version}, which has made wrong code")
    assert "`hra-kernels verify`" in said and said.endswith("; Triton 3.9 has a newer one")
    assert on_gpu((9, 0), version, newest="12.9") == said
    assert re.search(
        r"; TRITON_PTXAS_PATH=/.*/ptxas-blackwell has a newer one$", on_gpu((9, 0), version, newest="13.1")
    )


@pytest.mark.parametrize(
    ("capability", "version"), [((9, 0), "13.1"), ((9, 0), "14.0"), ((8, 0), "12.8"), ((10, 0), "12.9")]
)
def test_other_assemblers_are_not_doubted(on_gpu, capability, version):
    assert on_gpu(capability, version) == f"ptxas {version}"


def test_amd_has_no_such_assembler(on_gpu):
    assert on_gpu((9, 0), "12.8", hip="6.4") is None


def test_triton_answers_which_assembler_it_takes():
    pytest.importorskip("triton")
    assert re.fullmatch(r"\d+\.\d+", env._ptxas((9, 0)).version)
