"""The short way through an adapted layer's forward: when it is taken, and that it gives what the long way gives."""

import sys

import peft
import pytest
import torch
from torch import nn

from tests.peft.models import adapt, config


def adapted(**settings):
    return adapt(nn.Sequential(nn.Linear(16, 8)), targets=["0"], **settings)


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


CHANGES = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.base_model.merge_adapter(),
    "scaled": lambda model: layer_of(model).scale_layer(-1.0),
    "zero": lambda model: layer_of(model).set_scale("default", 0.0),
    "two": lambda model: model.add_adapter("second", config(targets=["0"])),
    "none": lambda model: model.base_model.set_adapter([]),
    "hook": lambda model: layer_of(model).register_forward_pre_hook(lambda *_: None),
    "vectors-hook": lambda model: layer_of(model).hra_u.register_forward_pre_hook(lambda *_: None),
    "cast": lambda model: layer_of(model).base_layer.double(),
    "deepspeed": lambda model: setattr(layer_of(model).hra_u["default"], "ds_id", 0),
    "offloaded": lambda model: setattr(layer_of(model).hra_u, "_hf_hook", None),
    "deleted": lambda model: model.base_model.delete_adapter("default"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
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
