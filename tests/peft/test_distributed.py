"""Sharded models, tensor parallelism, FSDP and DeepSpeed ZeRO-3, on two processes, against the model in one piece."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    "column_wise", "column_wise_after_sequence_parallel", "row_wise", "row_wise_one_sample", "row_wise_from_dtensor",
    "row_wise_from_replicated", "replicated_layer_from_sharded_batch", "training", "in_16_bits", "refused",
    "tensor_parallel_merge", "fsdp2", "fsdp2_disable_while_merged", "fsdp2_non_finite_vectors",
    "fsdp2_penalty", "fsdp1", "output_side",
)  # fmt: skip


PROCESSES = 2


def run_worker(module, store):
    """{check: [what went wrong in each process]}"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(PROCESSES), str(store)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    found: dict[str, list[str]] = {}
    try:
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err[-3000:]
            for name, why in map(json.loads, filter(lambda line: line.startswith('["'), out.splitlines())):
                found.setdefault(name, []).append(why)
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of all checks of `distributed_worker.py`."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not built in")
    return run_worker("tests.peft.distributed_worker", tmp_path_factory.mktemp("store") / "store")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.slow
def test_sharded(outcomes, check):
    assert outcomes[check] == [""] * PROCESSES, "\n".join(outcomes[check])


def test_every_check_is_listed(outcomes):
    assert tuple(outcomes) == CHECKS


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(tmp_path):
    """DeepSpeed ZeRO-3: what `zero3_worker.py` checks."""
    found = run_worker("tests.peft.zero3_worker", tmp_path / "store")
    assert found == {"zero3": [""] * PROCESSES}, "\n".join(found["zero3"])
