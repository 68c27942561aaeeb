"""`import hra_kernels.peft.auto` is `hra_kernels.peft.enable()`: for code in which nothing but an import can be added.

And for a program that cannot be edited at all, which it runs as Python would:

    python -m hra_kernels.peft.auto train.py ARGUMENTS
    python -m hra_kernels.peft.auto -m package.module ARGUMENTS
    torchrun OPTIONS -m hra_kernels.peft.auto train.py ARGUMENTS
"""

import runpy
import sys
from pathlib import Path

from hra_kernels.peft import enable

enable()


def main() -> None:
    """Run the script or, after -m, the module that the command line names, as `__main__`."""
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    sys.argv[:] = arguments[is_module:]
    if not sys.argv:
        raise SystemExit("python -m hra_kernels.peft.auto: expected a script, or -m and a module, got nothing")
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
