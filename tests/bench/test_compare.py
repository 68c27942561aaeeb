"""`--base`: which benchmark measures an older commit."""

import pytest
from rich.console import Console

from bench import compare


@pytest.fixture
def older(tmp_path):
    for name in ("bench", "tests"):
        (tmp_path / "older" / name).mkdir(parents=True)
        (tmp_path / "older" / name / "own.py").touch()
    return tmp_path / "older"


@pytest.mark.parametrize("module", [None, "hra_kernels.measuring"])
def test_an_older_package_is_measured_by_the_benchmark_that_knows_it(module, older, tmp_path, monkeypatch):
    def run(command, **options):
        if module and "--help" in command:
            raise RuntimeError(f"... failed with 1:\nModuleNotFoundError: No module named '{module}'")

    monkeypatch.setattr(compare, "_run", run)
    compare._install(older, tmp_path / "target", Console(quiet=True))
    assert (tmp_path / "target/bench/own.py").exists() == bool(module)


def test_a_benchmark_that_fails_otherwise_is_an_error(older, tmp_path, monkeypatch):
    def run(command, **options):
        if "--help" in command:
            raise RuntimeError("... failed with 1:\nModuleNotFoundError: No module named 'rich'")

    monkeypatch.setattr(compare, "_run", run)
    with pytest.raises(RuntimeError, match="rich"):
        compare._install(older, tmp_path / "target", Console(quiet=True))
