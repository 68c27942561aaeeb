"""`import hra_kernels.peft.auto`, and `python -m hra_kernels.peft.auto` for programs that cannot be edited."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import torch
from peft import HRAConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), HRAConfig(r=2, target_modules=["0"]))
print(__name__, type(model.base_model.model[0]).__module__.split(".")[0], sys.argv[1:])
if len(sys.argv) > 1:
    import beside
"""


def run(*arguments, folder=ROOT):
    # PYTHONSAFEPATH and the like would take away what is tested
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").touch()
    return tmp_path


@pytest.mark.slow
def test_the_import_is_enough():
    done = run("-c", "import hra_kernels.peft.auto\n" + PROGRAM)
    assert done.stdout == "__main__ hra_kernels []\n", done.stderr


@pytest.mark.slow
def test_without_it_peft_builds_its_own():
    done = run("-c", PROGRAM)
    assert done.stdout == "__main__ peft []\n", done.stderr


@pytest.mark.slow
def test_a_script_runs_as_by_python(program):
    done = run("-m", "hra_kernels.peft.auto", str(program / "program.py"), "-m", "--lr=1", folder=program.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ hra_kernels ['-m', '--lr=1']\n"


@pytest.mark.slow
def test_a_module_runs_as_by_python(program):
    done = run("-m", "hra_kernels.peft.auto", "-m", "program", "--lr=1", folder=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ hra_kernels ['--lr=1']\n"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_nothing_to_run_is_an_error(arguments):
    done = run("-m", "hra_kernels.peft.auto", *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("expected a script, or -m and a module, got nothing")
