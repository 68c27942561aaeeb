"""Benchmarks: `python -m bench LEVEL`. What is measured is in `layer.py`, `op.py`, ...; how, in `timing.py`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read as torch loads; its profiler serves for memory only, silently
