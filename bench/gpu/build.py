"""Build the native modules with pip, as a user's installation does, and put them into the tree: for `bench.gpu.run`."""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.stages import ROOT

SOURCES = ("csrc", "python_bindings", "pyproject.toml")


def digest() -> str:
    """Of everything that a module is built from."""
    found = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*"))):
        if path.is_file():
            found.update(bytes(path.relative_to(ROOT)) + path.read_bytes())
    return found.hexdigest()


def check(built_from: Path, cuda: bool) -> None:
    """Raise what is amiss: a module that is missing or cannot be loaded, or one of other sources than the tree's."""
    for name in ("_native", "_cuda") if cuda else ("_native",):
        subprocess.run([sys.executable, "-c", f"import hra_kernels.{name}"], check=True, cwd=ROOT)
    if not built_from.exists() or built_from.read_text() != digest():
        raise RuntimeError("the modules are not known to be built from these sources")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels too, for sm_90a")
    options = parser.parse_args()
    target, built_from = options.work / "site", options.work / "built-from"
    shutil.rmtree(target, ignore_errors=True)
    built_from.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--target", str(target), "-C", f"build-dir={options.work / 'cmake'}", "--verbose", str(ROOT)]
    if options.cuda:
        command += ["-C", "cmake.define.HRA_CUDA=ON", "-C", "cmake.define.HRA_SPIN_LIMIT=10000000000"]
    subprocess.run(command, check=True)
    modules = sorted((target / "hra_kernels").glob("*.so"))
    for module in modules:
        shutil.copy2(module, ROOT / "hra_kernels" / module.name)
    built_from.write_text(digest())
    check(built_from, options.cuda)
    print(", ".join(module.name for module in modules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
