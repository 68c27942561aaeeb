"""What a GPU would refuse, found without one: `pretend_gpu`, and the benchmark's GPU branches under it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import record
from hra_kernels import ops
from hra_kernels.nn import HRALinear
from tests.bench.pretend_gpu import pretend_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing need be pretended")

METHODS = ["frozen", "ours", "ours-nn", "wy-eager", "lora", "oft", "peft-hra", "adalora", "loha", "lokr"]
COMMANDS = {
    "op": ["--shapes", "16x32x32", "--ranks", "8", "--backends", "reference"],
    "layer": ["--shapes", "16x32x32", "--dtype", "bfloat16", "--providers", *METHODS],
    "model": ["--models", "llama-tiny", "--modes", "eager", "checkpoint"],
    "numerics": ["--size", "32"],
    "scaling": ["--over", "D", "--values", "32", "--providers", "frozen", "ours", "peft-hra"],
}


@pytest.mark.slow
@pytest.mark.parametrize("level", COMMANDS)
def test_gpu_branches_of_the_benchmark(level, tmp_path):
    command = [sys.executable, "-m", "tests.bench.pretend_gpu", level, *COMMANDS[level]]
    environment = os.environ | {"HRA_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    settings = ["--seconds", "0.05", "--threads", "1", "--no-plots", "--out", str(tmp_path)]
    done = subprocess.run([*command, *settings], cwd=record.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads((tmp_path / f"{level}.json").read_text())["runs"]
    assert all(run["meta"]["gpu"]["multiprocessors"] == 132 for run in runs)
    rows = [row for run in runs for row in run["rows"]]
    assert not [row for row in rows if row.get("why") and row["why"] != "not available: no merge"]
    if level in ("op", "layer", "scaling"):
        assert {row.get("timing", "graph") for row in rows} == {"graph"}


def graph_of(function):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        return function()


@pytest.mark.parametrize("chains", [1, 3])
def test_a_training_step_can_be_captured(chains):
    with pretend_gpu(), ops.use_backend("reference"):
        layer = HRALinear(torch.nn.Linear(8, 4), 2)
        x = torch.randn(3, 8, device="cuda", requires_grad=True)
        us = [torch.randn(8, 2, device="cuda", requires_grad=True) for _ in range(chains)]
        graph_of(lambda: layer(ops.reflect_chain(x, us, [False] * chains)).sum().backward())
        assert x.grad is not None and all(u.grad is not None for u in us)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: torch.ones(2, device="cuda") + torch.ones(2), "same device"),
        (lambda: torch.randn(2, generator=torch.Generator(), device="cuda"), "'cuda' device type for generator"),
        (lambda: graph_of(lambda: torch.ones(2, device="cuda").sum().item()), "stream is capturing"),
        (lambda: graph_of(lambda: torch.ones(2).to("cuda")), "stream is capturing"),
        (lambda: graph_of(torch.cuda.synchronize), "stream is capturing"),
    ],
)
def test_what_a_gpu_refuses_is_refused(function, message):
    with pretend_gpu(), pytest.raises(RuntimeError, match=message):
        function()


def test_nothing_is_left_of_the_pretence():
    with pretend_gpu():
        assert torch.ones(2, device="cuda").is_cuda and torch.ones(2).device.type == "cpu"
    assert torch.ones(2).device.type == "cpu" and not torch.ones(2).is_cuda
