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


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
def test_sharded(tmp_path):
    """All checks of `distributed_worker.py`."""
    found = run_worker("tests.peft.distributed_worker", tmp_path / "store")
    wrong = {check: "\n".join(said) for check, said in found.items() if said != [""] * PROCESSES}
    assert len(found) > 15 and not wrong, "\n".join(wrong.values())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(tmp_path):
    """DeepSpeed ZeRO-3: what `zero3_worker.py` checks."""
    found = run_worker("tests.peft.zero3_worker", tmp_path / "store")
    assert found == {"zero3": [""] * PROCESSES}, "\n".join(found["zero3"])
