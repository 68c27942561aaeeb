"""Build the native modules with pip, as a user's installation does, and put them into the tree: for `bench.gpu.run`."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.stages import BUILT, ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels too, for sm_90a")
    options = parser.parse_args()
    target = options.work / "site"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--target", str(target), "-C", f"build-dir={options.work / 'cmake'}", "--verbose", str(ROOT)]
    if options.cuda:
        command += ["-C", "cmake.define.HRA_CUDA=ON", "-C", "cmake.define.HRA_SPIN_LIMIT=10000000000"]
    subprocess.run(command, check=True)
    modules = sorted((target / "hra_kernels").glob("*.so"))
    for module in modules:
        shutil.copy2(module, ROOT / "hra_kernels" / module.name)
    check = BUILT if options.cuda else "import hra_kernels._native"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
    print(", ".join(module.name for module in modules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
