"""Merging in place, with or without a copy to restore; all of the active adapters, or the first of them."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import hra_kernels.peft
from hra_kernels.factors import factor_dtype
from hra_kernels.peft.experts import ParamWrapper
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Experts, Net, adapt, config, conv2d, layer_of, linear, seeded


def experts_wrapper():
    return seeded(lambda: ParamWrapper(Experts(), "default", parameter_name="weight", r=4, init_weights=False))


KINDS = {
    "linear": lambda: layer_of(linear()),
    "bfloat16": lambda: layer_of(linear(dtype=torch.bfloat16)),
    "conv": lambda: layer_of(conv2d(3)),
    "channels_last": lambda: layer_of(conv2d(3).to(memory_format=torch.channels_last)),
    "conv1d": lambda: layer_of(seeded(lambda: Conv1D(20, 48))),
    "embedding": lambda: layer_of(seeded(lambda: nn.Embedding(30, 16))),
    "parameter": experts_wrapper,
}


@pytest.mark.parametrize("keep_original", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_aliases_see_a_merge(kind, keep_original):
    """As optimizers, FSDP and other processes hold on to it. Without a copy each merge and unmerge rounds once."""
    layer = KINDS[kind]()
    weight = layer.base_parameter()
    alias, before = weight.detach(), weight.detach().clone()
    layer.merge(keep_original=keep_original)
    assert weight.data_ptr() == alias.data_ptr() and torch.equal(weight, alias) and not torch.equal(alias, before)
    assert keep_original or layer._merged.original is None
    layer.unmerge()
    assert weight.data_ptr() == alias.data_ptr() and torch.equal(weight, alias)
    once = torch.finfo(weight.dtype).eps / 2 + rounding(48, 4, factor_dtype(weight.dtype))
    assert torch.equal(alias, before) if keep_original else relative(alias, before) < 2 * once


def test_weight_of_inference_mode():
    with torch.inference_mode():
        base = linear()
    layer = layer_of(linear())
    layer.base_layer = base
    before = base.weight.clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_backward_across_a_merge_is_an_error():
    """The graph holds the weight's own memory: its gradient would be that of another weight."""
    layer = layer_of(linear())
    y = layer(torch.randn(3, 48, requires_grad=True))
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_shared_by_two_parameters():
    """Tied through `.data`: a merge into one would change the other, which has no adapter."""
    model = adapt(nn.Sequential(linear(20, 20), linear(20, 20)), targets=["0"])
    adapted, other = model.base_model.model
    other.weight.data = adapted.base_layer.weight.data
    with pytest.raises(ValueError, match=r"layer '0'.*shared \(tied\) by 0.base_layer, 1,"):
        model.merge_adapter()


# --- without a copy ---------------------------------------------------------------------------------------------------


def test_without_a_copy_one_after_the_other():
    model = adapt(nn.Sequential(linear()), targets=["0"])
    model.add_adapter("b", config(targets=["0"]))
    layer = model.base_model.model[0]
    before = layer.weight.clone()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["b"], keep_original=False)
    assert layer._merged.original is None
    model.unmerge_adapter()
    assert relative(layer.weight, before) < rounding(48, 8, layers=3)


# --- some of the active adapters --------------------------------------------------------------------------------------


@pytest.fixture
def several():
    """A model with adapters a, b and c, all active in this order."""
    with hra_kernels.peft.enabled():
        model = seeded(lambda: get_peft_model(Net(), config(), adapter_name="a"))
    for number, name in enumerate("bc"):
        seeded(lambda name=name: model.add_adapter(name, config()), 2 + number)
    model.base_model.set_adapter(["a", "b", "c"])
    return model.eval()


BOUND = rounding(96, 12, layers=5)


@pytest.mark.parametrize("merged", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_the_others_stay_applied(several, merged):
    x = torch.randn(4, 3, 8, 8)
    plain = several(x)
    several.merge_adapter(merged)
    assert relative(several(x), plain) < BOUND
    several.unmerge_adapter()
    assert torch.equal(several(x), plain)


def test_the_others_still_train(several):
    x = torch.randn(4, 3, 8, 8)
    lin0 = several.base_model.model.lin0
    several(x).sum().backward()
    expected = lin0.hra_u["b"].grad.clone()
    several.zero_grad()
    several.merge_adapter(["a"])
    several(x).sum().backward()
    assert lin0.hra_u["a"].grad is None and relative(lin0.hra_u["b"].grad, expected) < BOUND


@pytest.mark.parametrize("merged", [["b"], ["a", "c"], ["b", "a"]])
def test_out_of_order_is_an_error(several, merged):
    """W Q_b is no part of W Q_a Q_b Q_c: nothing is merged."""
    before = several.base_model.model.lin0.weight.clone()
    with pytest.raises(ValueError, match=r"active adapters \['a', 'b', 'c'\].*must be the first ones"):
        several.merge_adapter(merged)
    assert not several.base_model.model.conv.merged
    assert torch.equal(several.base_model.model.lin0.weight, before)


def test_order_changed_while_merged(several):
    """The model's own set_adapter unmerges first; a layer's does not."""
    several.merge_adapter(["a"])
    several.base_model.model.lin0.set_adapter(["b", "a", "c"])
    with pytest.raises(ValueError, match=r"active adapters \['b', 'a', 'c'\]"):
        several(torch.randn(4, 3, 8, 8))


def test_unloading_some_of_them(several):
    """What is not merged is dropped: the model that comes back has no adapters."""
    x = torch.randn(4, 3, 8, 8)
    several.base_model.set_adapter(["b"])
    expected = several(x)
    several.base_model.set_adapter(["a", "b", "c"])
    assert relative(several.merge_and_unload(adapter_names=["b"])(x), expected) < BOUND


def test_inactive_adapters_alone(several):
    x = torch.randn(4, 3, 8, 8)
    several.base_model.set_adapter(["b"])
    expected = several(x)
    several.base_model.set_adapter(["a"])
    several.merge_adapter(["b"])
    assert relative(several(x), expected) < BOUND
