"""PEFT's own HRA tests, from PEFT's source distribution, with this package's tuner on.

The distribution is fetched with pip into pytest's cache (nothing of it is in this repository) and its tests run in a
process of their own under `suite_plugin.py`. Where it cannot be fetched the tests are skipped, with the reason.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest

HERE = Path(__file__).parent
FILES = [
    "test_custom_models.py", "test_initialization.py", "test_decoder_models.py", "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py", "test_seq_classifier.py", "test_vision_models.py",
]  # fmt: skip
OTHER_MODELS = "GPTJ or Llama or qwen2 or Gemma3 or Mistral or Bart or Roberta or Deberta"


def pip(*arguments, into):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip {' '.join(arguments)}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def suite(request):
    """A folder with PEFT's `tests` package and tiny models under the hub's names."""
    for name in ("diffusers", "scipy", "parameterized", "attr"):
        pytest.importorskip(name, reason="PEFT's tests import it: pip install hra-kernels[peft-suite]")
    root = Path(request.config.cache.mkdir(f"peft-{peft.__version__}"))
    if not (root / "complete").exists():
        pip("download", "--no-deps", "--no-binary", "peft", f"peft=={peft.__version__}", into=root)
        (archive,) = root.glob("peft-*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                name = member.name.partition("/")[2]
                if name.startswith("tests/") and name.endswith(".py") and member.isfile():
                    target = root / name
                    assert target.resolve().is_relative_to(root.resolve())
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
        (root / "tests" / "__init__.py").touch()
        (root / "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore\n")
        (root / "complete").touch()
    return root


def run_suite(root, selection):
    """(passed, forward calls of our layers) of PEFT's tests that `-k selection` selects; all of them must pass."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parents[1]))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the models are tiny
        "HF_HUB_CACHE": str(root / "hub"),
    }
    build = "import pathlib, sys, suite_plugin; suite_plugin.build_hub(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(root / "hub")], env=environment, check=True, capture_output=True)
    options = ["-q", "-p", "no:cacheprovider", "-p", "suite_plugin", "-k", selection]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in FILES)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    forwards = int(re.search(r"forward calls of hra_kernels layers: (\d+)", done.stdout)[1])
    return passed, forwards


@pytest.mark.slow
@pytest.mark.skipif(not peft.__version__.startswith("0.21."), reason="the tiny models are those of PEFT 0.21's tests")
def test_peft_own_tests(suite):
    """Custom models, and one transformers model of each kind; with PEFT's own layers the same tests pass."""
    passed, forwards = run_suite(suite, f"(HRA or hra) and not ({OTHER_MODELS})")
    assert passed > 350 and forwards > 1500, f"{passed} tests passed with {forwards} forward calls of our layers"
