"""Merging whole models: memory, progress, and all or nothing."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from hra_kernels.peft import base_weight
from hra_kernels.testing.tolerance import rounding
from tests.peft.models import Net, adapt, config, seeded

FLOAT32 = rounding(96, 6, layers=3)
MIB = 2**20


def allocated(run):
    """(most, left): bytes that PyTorch's allocator gave out during run() and had not got back.

    It knows the size of what it gets back only where that was given out inside another such measurement.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now


class Wide(nn.Sequential):
    """Four layers of 8 MiB each in bfloat16; their D x D matrices would be 64 MiB in float32."""

    def __init__(self):
        super().__init__(*(nn.Linear(4096, 1024, bias=False, dtype=torch.bfloat16) for _ in range(4)))


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(base_weight, "_BLOCK", 2**16)
    models = []
    allocated(lambda: models.append(adapt(seeded(Wide), targets=["0", "1", "2", "3"]).base_model))
    return models[0]


def test_memory_of_one_merge(wide):
    """Beside the weight that results, a few blocks of rows; afterwards the original weight, until it is unmerged."""
    layer = wide.model[0]
    most, left = allocated(layer.merge)
    assert most < 11 * MIB and 8 * MIB <= left < 9 * MIB
    most, left = allocated(layer.unmerge)
    assert most < 3 * MIB and -9 * MIB < left <= -8 * MIB


def test_memory_of_merge_and_unload(wide):
    """One layer at a time: the originals of the others do not pile up."""
    most, left = allocated(wide.merge_and_unload)
    assert most < 19 * MIB and left < MIB


def test_progress(capfd):
    model = adapt(seeded(Net))
    model.merge_adapter()
    model.unmerge_adapter()
    assert "Merging" not in capfd.readouterr().err
    model.merge_adapter(progressbar=True)
    assert "Merging adapters: 100%" in capfd.readouterr().err
    model.unmerge_adapter()
    copy.deepcopy(model).merge_and_unload()
    assert "merging" not in capfd.readouterr().err
    model.merge_and_unload(progressbar=True)
    assert "Unloading and merging model: 100%" in capfd.readouterr().err


@pytest.fixture
def overflowing():
    """A float16 model whose last layer cannot be merged: the result is beyond the dtype's range."""
    model = adapt(seeded(Net).half())
    model.add_adapter("b", config(r=2))
    layer = model.base_model.model.lin1
    layer.base_layer.weight.data.fill_(60000.0)
    with torch.no_grad():
        layer.hra_u["default"].zero_()
        layer.hra_u["default"][0, 0], layer.hra_u["default"][1:, 0] = 1.0, -0.1
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_adapter_is_all_or_nothing(overflowing, safe_merge):
    before = weights(overflowing)
    with pytest.raises(ValueError, match=r"broken: .*out of its dtype's range.*'lin1'.*is unchanged"):
        overflowing.merge_adapter(safe_merge=safe_merge)
    assert same(overflowing, before)
    assert not any(layer.merged for layer in overflowing.modules() if hasattr(layer, "merged_adapters"))


def test_a_failed_merge_keeps_earlier_ones(overflowing):
    with contextlib.suppress(ValueError):  # b fits into conv and lin0, maybe not into lin1
        overflowing.merge_adapter(["b"])
    net = overflowing.base_model.model
    before, merged = weights(overflowing), [list(layer.merged_adapters) for layer in (net.conv, net.lin0, net.lin1)]
    with pytest.raises(ValueError, match="out of its dtype's range"):
        overflowing.merge_adapter(["default"])
    assert same(overflowing, before)
    assert merged == [list(layer.merged_adapters) for layer in (net.conv, net.lin0, net.lin1)]


def test_safe_merge_and_unload_is_all_or_nothing(overflowing):
    before = weights(overflowing)
    with pytest.raises(ValueError, match=r"broken: .*out of its dtype's range.*'lin1'.*is unchanged"):
        overflowing.merge_and_unload(safe_merge=True)
    assert same(overflowing, before)
