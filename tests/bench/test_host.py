"""Level `host`: what it makes of its samples, and its path to where Triton would launch a kernel."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import host, record


def test_what_is_beyond_the_frozen_layer():
    taken = {"frozen": {0: 1.0, 1: 2.0}, "ours": {0: 5.0, 1: 4.0}, "lora": {0: 3.0, 1: 3.0}}
    rows = {name: {} for name in taken}
    host._add_numbers(rows, taken, "frozen", 2)
    assert rows["frozen"]["seconds"]["median"] == 0.75 and "beyond" not in rows["frozen"]
    assert rows["ours"]["beyond"]["median"] == 1.5  # (5 - 1) / 2 and (4 - 2) / 2
    assert rows["ours"]["over_lora"]["median"] == 2.0 and rows["lora"]["over_lora"]["median"] == 1.0


COUNT = """
from collections import Counter

import torch
from bench import host, layer, providers
from hra_kernels import backends, factor_cache
from hra_kernels.backends import triton

case = {"M": 16, "D": 64, "N": 64, "dtype": "float32", "rank": 8, "layers": 2}
before = triton._interpreted, factor_cache._values_are_at_hand
launches = Counter()
with host.triton_without_launches(lambda *given: launches.update([given[4]])):
    step = host._variant(providers.BY_NAME["ours"], case, "train")
    step.run(0)
    launches.clear()
    step.run(0)
    assert launches["reflect_kernel"] == 2 and launches["backward_rows_kernel"] == 2, launches
assert (triton._interpreted, factor_cache._values_are_at_hand) == before
assert backends.choose(torch.device("cpu"), torch.float32, 8).name != "triton"
"""


@pytest.mark.slow
def test_the_path_to_a_launch_is_compiled_and_nothing_is_left_of_it():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
