"""The short way through an adapted layer's forward: when it is taken, and that it gives what the long way gives."""

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

import hra_kernels.peft


def adapted(**fields):
    torch.manual_seed(0)
    config = peft.HRAConfig(r=4, target_modules=["0"], init_weights=False, **fields)
    with hra_kernels.peft.enabled():
        return peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), config)


def second_adapter(model):
    with hra_kernels.peft.enabled():
        model.add_adapter("second", peft.HRAConfig(r=4, target_modules=["0"], init_weights=False))


def layer_of(model):
    return model.base_model.model[0]


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.filterwarnings("ignore:HRA adapter")
def test_both_ways_agree_bit_for_bit(apply_gs, monkeypatch):
    model, x = adapted(apply_GS=apply_gs), torch.randn(2, 3, 16, requires_grad=True)
    layer, found = layer_of(model), []
    assert layer._plain_chain(x) is not None
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(layer, "_plain_chain", lambda _: None)
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.hra_u["default"]])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.merge_adapter(),
        lambda model: layer_of(model).scale_layer(-1.0),
        lambda model: layer_of(model).set_scale("default", 0.0),
        second_adapter,
        lambda model: model.base_model.set_adapter([]),
        lambda model: layer_of(model).register_forward_pre_hook(lambda *_: None),
        lambda model: layer_of(model).hra_u.register_forward_pre_hook(lambda *_: None),
        lambda model: layer_of(model).base_layer.double(),
        lambda model: setattr(layer_of(model).hra_u["default"], "ds_id", 0),
        lambda model: setattr(layer_of(model).hra_u, "_hf_hook", None),
        lambda model: model.base_model.delete_adapter("default"),
    ],
    ids=[
        "disabled",
        "merged",
        "scaled",
        "zero",
        "two",
        "none",
        "hook",
        "vectors-hook",
        "cast",
        "deepspeed",
        "offloaded",
        "deleted",
    ],
)
def test_anything_else_takes_the_long_way(change):
    model, x = adapted(), torch.randn(3, 16)
    assert layer_of(model)._plain_chain(x) is not None
    change(model)
    assert layer_of(model)._plain_chain(x) is None


def test_autocast_takes_the_long_way():
    layer, x = layer_of(adapted()), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._plain_chain(x) is None
        assert layer(x).dtype == torch.bfloat16


def calls(function):
    """Of Python functions."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    function()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_calls_of_python_functions_in_a_layer():
    """A time that no machine disturbs: how many functions the host goes through, LoRA's at most."""
    layer, x = layer_of(adapted()), torch.randn(3, 16)
    lora = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), peft.LoraConfig(r=4, target_modules=["0"]))
    assert calls(lambda: layer(x)) <= calls(lambda: layer_of(lora)(x))
