"""The drop-in on the other PEFT releases it names, each in a process of its own; `.ci/matrix` runs more tests."""

import subprocess
import sys

import peft
import pytest

import hra_kernels.peft
from hra_kernels.peft import SUPPORTED
from tests import releases

RELEASES = {"0.19": "0.19.1", "0.20": "0.20.0", "0.21": "0.21.2"}
FILES = [
    f"tests/peft/test_{name}.py"
    for name in (
        "dropin", "parity", "merge", "merge_models", "defects", "layer_kinds", "quantized",
        "mixed_batch", "many_adapters",
    )
]  # fmt: skip
# one test of each kind: switching, order, files, gradients, merging, convolutions, hooks, many adapters
SELECTION = (
    "disable_restores or outlive or active_adapters or interchangeable or same_initial or from_pretrained or float32 "
    "or rounds_once or merge_again or hooks or zero_column or tied "
    "or forward_and_gradients or merge_and_unmerge or each_sample or rules or llama or modules_to_save "
    "or states_do_not_mix or add_weighted or all_or_nothing"
)


@pytest.mark.parametrize("version", ["0.18.2", "0.9.0"])
def test_an_older_release_is_an_error(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(RuntimeError, match=f"0.19 to 0.21, got {version}"):
        hra_kernels.peft._require_supported()


@pytest.mark.parametrize("version", ["0.22.0", "0.30.1.dev0", "1.0.0"])
def test_a_newer_release_is_a_warning(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.warns(UserWarning, match=f"0.19 to 0.21, got {version}"):
        hra_kernels.peft._require_supported()


def test_a_release_known_not_to_work_is_an_error(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    monkeypatch.setattr(hra_kernels.peft, "_KNOWN_BROKEN", ("0.22",))
    with pytest.raises(RuntimeError, match="which does not work"):
        hra_kernels.peft._require_supported()


def test_every_supported_release_is_named():
    assert tuple(RELEASES) == SUPPORTED


@pytest.mark.slow
@pytest.mark.parametrize("release", [r for s, r in RELEASES.items() if not peft.__version__.startswith(s + ".")])
def test_other_release(release, request):
    environment = releases.environment("peft", release, request.config.cache)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *FILES]
    done = subprocess.run(command, cwd=releases.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
