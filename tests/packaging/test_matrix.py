"""The table of releases is what `.ci/matrix` makes of its results, and its cells are releases that are supported."""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import hra_kernels
import hra_kernels.peft

PATH = Path(__file__).resolve().parents[2] / ".ci" / "matrix"


@pytest.fixture(scope="module")
def matrix():
    loader = importlib.machinery.SourceFileLoader("matrix_script", str(PATH))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look there
    loader.exec_module(module)
    yield module
    del sys.modules[loader.name]


def test_the_table_is_of_these_results(matrix):
    assert matrix.TABLE.read_text() == matrix.table(json.loads(matrix.RESULTS.read_text()))


def test_the_oldest_supported_releases_have_a_cell(matrix):
    cell = matrix.CELLS["oldest"]
    assert cell.torch.startswith(".".join(map(str, hra_kernels.OLDEST_TORCH)) + ".")
    assert cell.peft.startswith(hra_kernels.peft.SUPPORTED[0] + ".")


def test_a_failure_shows(matrix):
    assert matrix.result({"ok": True, "passed": 9, "seconds": 1}) == "ok (9)"
    assert matrix.result({"ok": False, "passed": 9, "failed": 2, "errors": 1, "seconds": 1}) == "**3 failed** (9)"
    assert matrix.result({"ok": False, "seconds": 1}) == "**not ok**"
    assert matrix.result(None) == "-"
