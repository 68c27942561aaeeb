"""`hra-kernels verify`: silent where all is right, and exit status 1 for each bug that is planted into a backend."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hra_kernels import cli, ops, verify
from hra_kernels.testing.cases import CASES, DTYPES

REFERENCE = ops.BACKENDS["reference"]
forward, backward, factor = REFERENCE.reflect_fwd, REFERENCE.reflect_bwd, REFERENCE.wy_factor
SOME = [case for case in CASES if case.D <= 1001 and case.R <= 8]


@pytest.fixture
def few_cases(monkeypatch):
    """Enough of the cases to see the planted bugs in seconds."""
    every = verify.verify
    monkeypatch.setattr(verify, "verify", lambda backends: every(backends, SOME))


def does_nothing(x, v, t, transpose):
    return x.clone(), x.to(v.dtype) @ v.mT


def leaves_a_hole(x, v, t, transpose):
    """Right but for the last row, which it does not write."""
    y, p = forward(x, v, t, transpose)
    hole = torch.empty_like(y)
    hole[:-1] = y[:-1]
    return hole, p


def scales_dv(dy, x, v, t, p, transpose):
    dx, dv, dt = backward(dy, x, v, t, p, transpose)
    return dx, 1.01 * dv, dt


def transposes_dt(dy, x, v, t, p, transpose):
    dx, dv, dt = backward(dy, x, v, t, p, transpose)
    return dx, dv, dt.mT.contiguous()


def off_by_a_thousandth(u, apply_gs):
    v, t = factor(u, apply_gs)
    return v, 1.001 * t


def does_not_launch(x, v, t, transpose):
    raise RuntimeError("no kernel image\nis available")


PLANTED = [
    ("reflect_fwd", does_nothing, "y has"),
    ("reflect_fwd", leaves_a_hole, "y has inf"),
    ("reflect_fwd", does_not_launch, "RuntimeError: no kernel image is available"),
    ("reflect_bwd", scales_dv, "du has"),
    ("reflect_bwd", transposes_dt, "du has"),
    ("wy_factor", off_by_a_thousandth, "y has"),
]


QUICK = (does_not_launch,)
ROWS = [pytest.param(*row, id=row[1].__name__, marks=[] if row[1] in QUICK else pytest.mark.slow) for row in PLANTED]


@pytest.mark.parametrize(("name", "bug", "said"), ROWS)
def test_a_planted_bug_is_found(few_cases, monkeypatch, capsys, name, bug, said):
    monkeypatch.setattr(REFERENCE, name, bug)
    assert cli.main(["verify", "--backend", "reference"]) == 1
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "float32" in line]
    assert "WRONG" in row and said in row
    assert out.endswith("A value is wrong.\n")


def test_every_available_backend_is_right_and_the_others_are_named(few_cases, monkeypatch, capsys):
    report = ops.backend_report()
    if not torch.cuda.is_available():
        report["triton"] = "interpreted here, which takes minutes"
    monkeypatch.setattr(ops, "backend_report", lambda: report)
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    for name, reason in report.items():
        lines = [line for line in out.splitlines() if line.split()[0] == name]
        if reason:
            assert lines == [f"{name:<9}  not available: {reason}"]
        else:
            assert len(lines) >= len(DTYPES) and all(line.endswith("right") for line in lines)
    assert out.endswith("Every value is right.\n")
    assert not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.slow
def test_json(few_cases, monkeypatch, capsys):
    assert cli.main(["verify", "--backend", "reference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["right"] and found["not_available"] == {}
    cpu = [row for row in found["rows"] if row["device"] == "cpu"]
    assert [row["dtype"] for row in cpu] == [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert all(row["cases"] == len(SOME) and 0 < row["worst"] <= 1 and row["wrong"] == [] for row in cpu)
    monkeypatch.setattr(REFERENCE, "reflect_fwd", leaves_a_hole)
    assert cli.main(["verify", "--backend", "reference", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["right"]
    assert all(row["worst"] is None and row["wrong"] for row in found["rows"])


def test_a_backend_that_does_not_run_here(monkeypatch, capsys):
    monkeypatch.setattr(ops, "backend_report", lambda: {"reference": None, "triton": "no GPU"})
    assert cli.main(["verify", "--backend", "triton"]) == 2
    assert capsys.readouterr().err == "hra-kernels: backend triton does not run here: no GPU\n"


@pytest.mark.slow
def test_as_a_module_all_cases():
    """No test framework, nothing but torch: as from an installed wheel."""
    code = "import sys, runpy; sys.modules['pytest'] = sys.modules['peft'] = None; sys.argv = ['verify', '--json'];"
    code += "runpy.run_module('hra_kernels.verify', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # minutes longer
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(done.stdout)["rows"]
    assert {row["cases"] for row in rows if row["backend"] == "reference"} == {len(CASES)}
