"""What the launcher asks of CUDA's runtime, on one that counts: nothing on the emulation shows it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import native

HERE = Path(__file__).resolve().parent
SOURCE = native.ROOT / "csrc" / "cuda"


def complaints(folder, old="", new=""):
    """What the probe says of the launcher with `old` replaced."""
    if shutil.which("c++") is None:
        pytest.skip("the launcher needs a C++ compiler to be built")
    csrc = shutil.copytree(native.ROOT / "csrc", folder / "csrc")
    text = (csrc / "cuda" / "launch.cu").read_text()
    assert not old or text.count(old) == 1, old
    (csrc / "cuda" / "launch.cu").write_text(text.replace(old, new) if old else text)
    command = ["c++", "-std=c++17", "-w", "-pthread", f"-I{HERE / 'fake_runtime'}", f"-I{csrc}", "-xc++"]
    command += [str(HERE / "launch_probe.cpp"), str(csrc / "cuda" / "launch.cu"), "-o", str(folder / "probe")]
    subprocess.run(command, check=True)
    return subprocess.run([folder / "probe"], capture_output=True, text=True, timeout=60, check=True).stdout


def test_attributes_are_set_once_for_each_kernel_and_device(tmp_path):
    """To the most that there is, before the first launch, whatever threads launch with whatever sizes."""
    assert complaints(tmp_path) == "ok\n"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  if (allowed.count({device, kernel})) return cudaSuccess;\n", "", "set more than once"),
        ("allowed.count({device, kernel})", "!allowed.empty()", "before its attributes were set"),
        ("MaxDynamicSharedMemorySize, most_shared", "MaxDynamicSharedMemorySize, 900", "not the device's most"),
        ("  set(cudaFuncAttributePreferredSharedMemoryCarveout", "  if (false) set(cudaFuncAttribute"
         "PreferredSharedMemoryCarveout", "not three attributes"),
        ("  if (error == cudaSuccess) allowed.emplace", "  error = cudaSuccess, allowed.emplace", "is no error"),
    ],
    ids=["each launch", "one device", "one launch's size", "no carve-out", "refused"],
)  # fmt: skip
def test_planted_bugs_of_the_launcher_show(tmp_path, old, new, complaint):
    assert complaint in complaints(tmp_path, old, new)
