"""The kernel hub's copy of the Triton kernels (`.ci/kernel_hub`) keeps the hub's rules and computes what it should.

The rules are "Kernel requirements" and "Write kernels" in huggingface/kernels' documentation. One of them is not kept:
code for Python 3.9, which the package `kernels` itself does not run on. kernel-builder needs Nix; here `build` does
what it does to pure Python. `kernels` is fetched with pip into pytest's cache, because other packages load kernels
of theirs through it where it is installed.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
REPO_ID = "someone/hra"
KERNELS = "kernels==0.17.2"
SERVED = ("torch", "triton")  # the hub's rule says Torch, and its own examples import Triton

OPS = """
import torch

_OPS_NAME = "{identifier}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name):
    return f"{{_OPS_NAME}}::{{op_name}}"
"""

SIDE_BY_SIDE = """
import importlib.util, sys
sys.modules["hra_kernels"] = None  # an import of it fails
import torch

def load(variant, identifier):  # as kernels.importer does
    spec = importlib.util.spec_from_file_location(identifier, variant + "/__init__.py")
    sys.modules[identifier] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[identifier])
    return sys.modules[identifier]

first, second = (load(*pair.split("=")) for pair in sys.argv[1:])
assert not list(torch.ops.hra), "operators outside the build's namespace"
assert second.reflect is not first.reflect
x, u = torch.randn(6, 24), torch.nn.Parameter(torch.randn(24, 4))
for hra in (first, second):
    assert not [name for name in hra.__all__ if not callable(getattr(hra, name))]
    missing = hra.backend_report()
    assert missing["triton"] is None and "Triton alone" in missing["cpu"] and "Triton alone" in missing["cuda"], missing
    with hra.use_backend("triton"):
        hra.hra_linear(x, torch.eye(24), u).square().sum().backward()
    compiled = torch.compile(lambda x: hra.hra_linear(x, torch.eye(24), u), backend="aot_eager", fullgraph=True)
    with hra.use_backend("reference"):
        torch.testing.assert_close(compiled(x).norm(dim=1), x.norm(dim=1))
torch.testing.assert_close(u.grad, torch.zeros_like(u), rtol=0, atol=1e-4)  # a rotation changes no norm
"""

THROUGH_THE_HUB = """
import os, sys
from pathlib import Path
sys.modules["hra_kernels"] = None
from kernels._rust import Build, Metadata  # the hub's own parsers
import pytest

repository, variant, identifier = sys.argv[1:]
backends = {str(backend).lower() for backend in Build.open(repository).general.backends}
assert backends == {"cpu", "cuda", "rocm"}, backends
assert Metadata.read_from_file(Path(variant) / "metadata.json").id == identifier
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-c", os.devnull, repository + "/tests"]))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "hra"
    subprocess.run([sys.executable, ROOT / ".ci" / "kernel_hub", folder, "--repo-id", REPO_ID], check=True)
    return folder


def build(repository: Path, out: Path, revision: str) -> tuple[Path, str]:
    """(build variant, its identifier), of what is in the repository now.

    The variant is the one the hub's loader takes here: it goes by PyTorch's build, whether or not there is a GPU.
    """
    backend = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    variant, identifier = out / "build" / f"torch-{backend}", f"_hra_{backend}_{revision}"
    shutil.copytree(repository / "torch-ext" / "hra", variant, ignore=shutil.ignore_patterns("__pycache__"))
    (variant / "_ops.py").write_text(OPS.format(identifier=identifier))
    metadata = {
        "id": identifier, "name": "hra", "version": 0, "license": "Apache-2.0", "backend": {"type": backend},
        "python-depends": [],
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return variant, identifier


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def broken_rules(source: str) -> list[str]:
    """What the hub would refuse in a module: imports of others than it serves, operators in a namespace of its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            names = []
        tops = {name.split(".")[0] for name in names}
        found += [f"line {node.lineno}: import of {top}" for top in tops - sys.stdlib_module_names - {*SERVED}]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("hra::", "hra.")):
            found.append(f"line {node.lineno}: the operator {node.value}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Library") and node.args:
            namespace = ast.unparse(node.args[0])
            if namespace != "registered.name":
                found.append(f"line {node.lineno}: operators in the namespace {namespace}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.hra":
            found.append(f"line {node.lineno}: torch.ops.hra")
    return found


def test_modules_keep_the_rules(repository):
    modules = sorted((repository / "torch-ext").rglob("*.py"))
    assert {"triton_kernels.py", "triton_factor_kernels.py", "ops.py"} <= {path.name for path in modules}
    assert {path.name: found for path in modules if (found := broken_rules(path.read_text()))} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "from hra_kernels.ops import reflect", "import hra_kernels.ops", "def f():\n    from hra_kernels import ops",
        "import numpy", "from hra.ops import reflect", "torch.library.Library('hra', 'DEF')",
        "@torch.library.custom_op('hra::more', mutates_args=())\ndef more(x): ...", "torch.ops.hra.reflect_fwd(x)",
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_found(planted):
    assert broken_rules(planted)
    assert not broken_rules("import json\nimport torch\nfrom . import ops\nfrom ..backends.base import Backend")


def test_the_layout(repository):
    tomllib = pytest.importorskip("tomllib")
    description = tomllib.loads((repository / "build.toml").read_text())
    assert description["general"]["edition"] == 5
    assert description["general"]["name"] == "hra"
    assert description["general"]["hub"] == {"repo-id": REPO_ID}
    assert set(description) == {"general", "torch-noarch"}
    extensions = description["torch-noarch"]["pyext"]
    files = [path for path in (repository / "torch-ext" / "hra").rglob("*") if path.is_file()]
    assert {path.suffix[1:] for path in files} == set(extensions)
    # kernel-builder writes this one
    assert "_ops.py" not in {path.name for path in files}
    assert all((repository / name).is_file() for name in ("flake.nix", "CARD.md", "LICENSE", "tests/test_hra.py"))


@pytest.mark.slow
def test_two_builds_in_one_process(repository, tmp_path):
    pytest.importorskip("triton")
    pairs = [build(repository, tmp_path / revision, revision) for revision in ("aaaaaaa", "bbbbbbb")]
    run("-c", SIDE_BY_SIDE, *(f"{variant}={identifier}" for variant, identifier in pairs))


@pytest.mark.slow
def test_its_own_test_through_the_hubs_loader(repository, tmp_path, request):
    """Forward and backward against explicit reflections in float64, and build.toml as the hub's own parser reads it."""
    pytest.importorskip("triton")
    folder = Path(request.config.cache.mkdir("kernel-hub")) / KERNELS
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*command, KERNELS], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip install {KERNELS}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        (folder / "complete").touch()
    variant, identifier = build(repository, tmp_path, "ccccccc")
    said = run(
        "-c", THROUGH_THE_HUB, repository, variant, identifier,
        LOCAL_KERNELS=f"{REPO_ID}={tmp_path}", PYTHONPATH=str(folder),
    )  # fmt: skip
    assert "1 passed" in said
