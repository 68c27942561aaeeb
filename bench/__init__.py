"""Benchmarks: `python -m bench LEVEL`. What is measured is in `layer.py`, `op.py`, ...; how, in `timing.py`."""

import os

COMMIT_VARIABLE = "HRA_BENCH_COMMIT"
"""Names the commit where the tree has come without its history, as to a lent machine."""

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read as torch loads; its profiler serves for memory only, silently
