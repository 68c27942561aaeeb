"""Merging: exact, bounded in memory, atomic, and undone to the bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hra_kernels.factors import factor_dtype
from hra_kernels.peft import base_weight
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Net, adapt, config, layer_of, merged_weight, seeded

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def linear(dtype=torch.float32, features=60, out=37):
    return seeded(lambda: nn.Linear(features, out)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apply_gs", [False, True])
def test_merge_rounds_once(dtype, apply_gs):
    """Every element is the exact value rounded, or, where float32 arithmetic lands on the other side, its neighbor."""
    layer = layer_of(linear(dtype), r=8, apply_GS=apply_gs)
    exact = merged_weight(layer)
    layer.merge()
    once = torch.finfo(dtype).eps / 2 + rounding(60, 8, factor_dtype(dtype))
    assert layer.weight.dtype == dtype and relative(layer.weight, exact) < once
    if dtype in (torch.bfloat16, torch.float16):
        assert (layer.weight == exact.to(dtype)).float().mean() > 0.99


def test_merge_in_blocks(monkeypatch):
    whole, pieces = layer_of(linear()), layer_of(linear())
    whole.merge()
    monkeypatch.setattr(base_weight, "_BLOCK", 130)  # two rows at a time, and a last block of one
    pieces.merge()
    assert relative(pieces.weight, whole.weight) < rounding(60, 4)
    pieces.unmerge()
    assert torch.equal(pieces.weight, linear().weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_non_finite_vectors_leave_all_layers_untouched(bad, safe_merge, how):
    model = adapt(seeded(Net))
    before = {name: p.clone() for name, p in model.named_parameters() if "hra_u" not in name}
    with torch.no_grad():
        model.base_model.model.lin1.hra_u["default"][3, 1] = bad
    with pytest.raises(ValueError, match=r"The adapter default seems to be broken: its hra_u holds NaN.*'lin1'"):
        getattr(model, how)(safe_merge=safe_merge)
    net = model.base_model.model
    assert not any(layer.merged for layer in (net.conv, net.lin0, net.lin1))
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])


def test_merge_again_and_more():
    """A second adapter joins the first: one rounding from the original weight for both, one restore for both."""
    model = adapt(nn.Sequential(linear(torch.bfloat16)), targets=["0"])
    model.add_adapter("b", config(targets=["0"]))
    layer = model.base_model.model[0]
    alias, before, exact = layer.weight.detach(), layer.weight.clone(), merged_weight(layer, "default", "b")
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["default", "b"])
    assert layer.merged_adapters == ["default", "b"]
    assert (layer.weight == exact.to(torch.bfloat16)).float().mean() > 0.99 and torch.equal(alias, layer.weight)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["b"])
    model.unmerge_adapter()
    assert torch.equal(alias, before) and torch.equal(layer.weight, before) and layer.merged_adapters == []
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.parametrize("order", [["default", "b"], ["b", "default"]])
def test_weight_changed_while_merged(order):
    """Then the original is no answer: the reflections are undone on the weight as it has become."""
    model = adapt(nn.Sequential(linear()), targets=["0"])
    model.add_adapter("b", config(targets=["0"]))
    layer = model.base_model.model[0]
    before = layer.weight.clone()
    model.merge_adapter(order)
    change = torch.randn(37, 60)
    layer.base_layer.weight.data.add_(change)
    layer.unmerge()
    unmerged = layer.weight.clone()
    layer.base_layer.weight.data = before
    merged_before = merged_weight(layer, *order)
    layer.base_layer.weight.data = unmerged
    assert relative(merged_weight(layer, *order), merged_before + change.double()) < rounding(60, 10, layers=3)


def test_vectors_changed_while_merged():
    """Unmerge undoes what was merged, not what the adapter has become."""
    layer = layer_of(linear())
    before = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.hra_u["default"].add_(1)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_cast_while_merged():
    layer = layer_of(linear())
    before = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.weight.dtype == torch.bfloat16 and relative(layer.weight, before) < rounding(60, 4, torch.bfloat16)


def test_merged_model_survives_copies():
    model = adapt(seeded(Net))
    x = torch.randn(2, 3, 8, 8)
    plain = model(x)
    before = model.base_model.model.lin0.weight.clone()
    model.merge_adapter()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        other.unmerge_adapter()
        assert torch.equal(other.base_model.model.lin0.weight, before) and torch.equal(other(x), plain)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_returns_plain_layers(safe_merge):
    base = seeded(Net)
    model = adapt(base)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    merged = model.merge_and_unload(progressbar=False, safe_merge=safe_merge)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert relative(merged(x), expected) < rounding(96, 10, layers=3)


def test_weight_not_loaded():
    layer = layer_of(linear())
    layer.base_layer.to("meta")
    with pytest.raises(NotImplementedError, match=r"not loaded \(meta device\)"):
        layer.merge()


def test_fingerprint_sees_every_bit():
    weight = seeded(lambda: torch.randn(5, 7))
    print_before = base_weight.fingerprint(weight)
    assert base_weight.fingerprint(weight.clone()) == print_before
    for index in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1).view(torch.int32)[index] ^= 1
        assert base_weight.fingerprint(changed) != print_before
    swapped = weight[[1, 0, 2, 3, 4]]
    assert base_weight.fingerprint(swapped) != print_before
