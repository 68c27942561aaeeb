"""A wheel by itself: installed beside PyTorch alone, without the source tree, it computes, reports and serves PEFT.

It is built here by pip, without CUDA; `.ci/wheels` builds what is published.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

OPERATORS = """
import torch, hra_kernels
assert hra_kernels.backend_report()["cpu"] is None, hra_kernels.backend_report()
x, u = torch.randn(5, 32, requires_grad=True), torch.randn(32, 4, requires_grad=True)
v, t = hra_kernels.wy_factor(u)
y = hra_kernels.reflect(x, v, t)
torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
y.square().sum().backward()
torch.testing.assert_close(x.grad, 2 * x)
torch.testing.assert_close(u.grad, torch.zeros_like(u), atol=1e-4, rtol=0)
try:
    import hra_kernels.peft
except ImportError as error:
    assert "hra-kernels[peft]" in str(error)
else:
    raise AssertionError("PEFT is not here")
"""
PEFT = """
import torch, hra_kernels.peft
from peft import HRAConfig, get_peft_model
hra_kernels.peft.enable()
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8)), HRAConfig(r=4, target_modules=["0"]))
x = torch.randn(3, 16)
layer = model.base_model.model[0]
assert type(layer).__module__.startswith("hra_kernels.peft"), type(layer)
torch.testing.assert_close(model(x), layer.base_layer(x))
model(x).sum().backward()
assert layer.hra_u["default"].grad is not None
"""


def dependencies(*roots: str) -> set[str]:
    """These installed distributions and, without extras, all that they need."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            needed = map(Requirement, distribution(name).requires or [])
            waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def lend(folder: Path, *roots: str) -> None:
    """Links into `folder` to installed distributions and what they need, and to nothing else."""
    for name in dependencies(*roots):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files if file.parts[0] != ".."}:
            if top != "__pycache__" and not (folder / top).exists():
                (folder / top).symlink_to(installed.locate_file(top))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """(a folder with the wheel and PyTorch, how to run Python with it alone)."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT]
    done = subprocess.run(build, env=os.environ | {"HRA_CUDA": "OFF"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    packages = folder / "packages"
    subprocess.run([*pip, "install", "--no-deps", "--quiet", "--target", packages, wheel], check=True)
    lend(packages, "torch", "numpy")

    def python(*arguments):
        # -S: no site-packages of this environment
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(
            command, cwd=folder, env={"PYTHONPATH": str(packages)}, capture_output=True, text=True, timeout=300
        )

    yield packages, python
    shutil.rmtree(folder)


def test_operators_beside_torch_alone(environment):
    _, python = environment
    done = python("-c", OPERATORS)
    assert done.returncode == 0, done.stderr


def test_env_reports_what_the_wheel_lacks(environment):
    _, python = environment
    done = python("-m", "hra_kernels.cli", "env")
    assert done.returncode == 0, done.stderr
    assert "HRA_CUDA=OFF asked for a build without it" in done.stdout


def test_peft_with_the_extra(environment):
    packages, python = environment
    lend(packages, "peft", "transformers", "safetensors")
    done = python("-c", PEFT)
    assert done.returncode == 0, done.stderr
