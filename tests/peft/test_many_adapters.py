"""Many adapters on one model: added, switched, merged, deleted and combined, with nothing left over from before."""

import contextlib
import gc
import weakref

import pytest
import torch
from peft import PeftModel
from torch import nn

import hra_kernels.peft
from hra_kernels.peft.powers import chain_power
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import (
    ALL_LAYERS,
    Net,
    adapt,
    config,
    dense_power,
    dense_q,
    exact_forward,
    images,
    linear,
    merged_weight,
    seeded,
)

FLOAT32 = rounding(96, 13, layers=3)
BASE = "__base__"


@pytest.fixture
def model():
    """default: r 4; b: r 6, only on the linear layers; gs: r 3 with Gram-Schmidt."""
    model = adapt(seeded(Net))
    seeded(lambda: model.add_adapter("b", config(targets=["lin0", "lin1"], r=6)), 7)
    seeded(lambda: model.add_adapter("gs", config(r=3, apply_GS=True)), 8)
    return model.eval()


# --- adding, switching, merging, deleting -----------------------------------------------------------------------------


def test_states_do_not_mix(model):
    """A long life, each step of it against float64: what is active counts, and nothing else."""
    x = images()

    def check(*active):
        assert relative(model(x), exact_forward(model, active, x)) < FLOAT32, active

    check("default")
    model.set_adapter("b")
    check("b")
    model.base_model.set_adapter(["gs", "b"])
    check("gs", "b")
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    check("gs", "b")
    assert relative(merged, model(x)) < FLOAT32
    model.delete_adapter("gs")
    check("b")
    seeded(lambda: model.add_adapter("gs", config(r=2)), 21)  # the old name with other vectors, and no Gram-Schmidt
    check("b")
    model.set_adapter("gs")
    check("gs")
    with model.disable_adapter():
        check()
    model.delete_adapter("b")
    check("gs")
    y = model(x, adapter_names=["gs", BASE, "default", "gs"])
    assert relative(y[[0, 3]], exact_forward(model, ["gs"], x)[[0, 3]]) < FLOAT32
    assert relative(y[2], exact_forward(model, ["default"], x)[2]) < FLOAT32
    model.set_adapter("default")
    check("default")
    with torch.no_grad():
        model.base_model.model.lin0.hra_u["default"].normal_()
    check("default")


def test_switching_restores_the_bits(model):
    x = images()
    before = {name: model(x) for name in ("default", "b", "gs") if model.set_adapter(name) is None}
    for _ in range(3):
        for name, expected in before.items():
            model.set_adapter(name)
            assert torch.equal(model(x), expected)
            model.merge_adapter()
            assert relative(model(x), expected) < FLOAT32
            model.unmerge_adapter()
            assert torch.equal(model(x), expected)


def test_switching_while_merged(model):
    """PEFT unmerges first, and says so."""
    x = images()
    model.set_adapter("b")
    expected = model(x)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert torch.equal(model(x), expected)


def test_deleting_a_merged_adapter(model):
    """PEFT 0.21 refuses. In releases that do not, unmerging still restores the weight."""
    weight = model.base_model.model.lin0.weight.clone()
    model.merge_adapter(["default"])
    with contextlib.suppress(ValueError):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.lin0.weight, weight)


def test_deleting_frees_the_factors(model):
    x = images()
    model(x)
    model(x, adapter_names=["default", "b", "gs", BASE])
    model.base_model.model.lin0.set_scale("default", 0.7)
    model(x)
    u = weakref.ref(model.base_model.model.lin0.hra_u["default"])
    model.delete_adapter("default")
    layer = model.base_model.model.lin0
    assert layer._factors._entry is None and layer._mixed_factors is None
    gc.collect()
    assert u() is None and "default" not in layer.hra_scales


def test_only_active_adapters_train(model):
    model.set_adapter("b")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"base_model.model.{layer}.hra_u.b" for layer in ("lin0", "lin1")}
    model.add_weighted_adapter(["default", "b"], [1, -1], "sum")
    assert trains == {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_adapter("sum")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"base_model.model.{layer}.hra_u.sum" for layer in ALL_LAYERS}


# --- powers of one chain ----------------------------------------------------------------------------------------------


POWER = 1e3 * rounding(24, 8, torch.float64)
"""The planes of a rotation are known to eps over the gap of its angles, which is 1e-3 for `paired_step`."""


def vectors(columns, features=24, r=6):
    u = seeded(lambda: torch.randn(features, r, dtype=torch.float64), 4)
    if columns == "paired_step":  # small angles, as training makes them
        u = u[:, 0::2].repeat_interleave(2, 1) + 1e-3 * u
    elif columns == "equal pairs and a zero pair":
        u = u[:, 0::2].repeat_interleave(2, 1)
        u[:, :2] = 0
    elif columns == "equal angles":  # three planes turned by the same angle: eigenvalues of multiplicity three
        u = torch.linalg.qr(u).Q
        u[:, 1::2] += u[:, 0::2]
    return u


@pytest.mark.parametrize("columns", ["random", "paired_step", "equal pairs and a zero pair", "equal angles"])
@pytest.mark.parametrize("weight", [0.5, -0.3, 0.0, 2.5, 1.0, -1.0])
def test_chain_power(columns, weight):
    u = vectors(columns)
    exact = dense_power(dense_q(u), weight)
    got = chain_power(u, False, weight)
    assert got.shape == u.shape and got.dtype == u.dtype
    assert (dense_q(got) - exact).abs().max() < POWER
    in_float32 = chain_power(u.float(), False, weight)
    assert in_float32.dtype == torch.float32 and (dense_q(in_float32) - exact).abs().max() < rounding(24, 6)


def test_powers_add_up():
    u = vectors("random")
    parts = dense_q(chain_power(u, False, 0.3)) @ dense_q(chain_power(u, False, 0.7))
    assert (parts - dense_q(u)).abs().max() < POWER
    assert chain_power(u.bfloat16(), False, 0.5).dtype == torch.float32  # the difference in a pair needs its bits
    assert torch.equal(chain_power(u.bfloat16(), False, -1), u.bfloat16().flip(1))


def test_more_columns_than_features():
    u = vectors("random", 5, 8)
    assert (dense_q(chain_power(u, False, 0.5)) - dense_power(dense_q(u), 0.5)).abs().max() < POWER


def test_gram_schmidt_as_a_plain_chain():
    u = vectors("random")
    for weight in (1, -1):
        assert (dense_q(chain_power(u, True, weight)) - dense_q(u, apply_gs=True)).abs().max() < POWER


@pytest.mark.parametrize("r, apply_gs", [(3, False), (6, True)])
def test_powers_that_are_not_defined(r, apply_gs):
    with pytest.raises(
        ValueError, match=r"turn a direction round.*power 0.5 is not defined; the weights 1, -1 and 0 are"
    ):
        chain_power(vectors("random", r=r), apply_gs, 0.5)


# --- add_weighted_adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapters, weights",
    [
        (["default", "b"], [1, 1]),
        (["b", "default"], [1, 1]),
        (["default", "gs", "b"], [1.0, 1.0, -1.0]),
        (["b", "default"], [0.5, -1.5]),
        (["b", "gs"], [2, -1]),
        (["default"], [0.25]),
        (["default", "default"], [1, -1]),
    ],
)
def test_add_weighted_adapter(model, adapters, weights):
    x = images()
    model.add_weighted_adapter(adapters=adapters, weights=weights, adapter_name="new")
    assert relative(model(x), exact_forward(model, ["default"], x)) < FLOAT32  # nothing changes until it is active
    model.set_adapter("new")
    exact = exact_forward(model, list(zip(adapters, weights, strict=True)), x)
    assert relative(model(x), exact) < FLOAT32
    rank = sum(model.peft_config[name].r for name in adapters)
    assert model.peft_config["new"].r == rank and not model.peft_config["new"].apply_GS
    model.merge_adapter()
    assert relative(model(x), exact) < FLOAT32
    model.unmerge_adapter()
    model.train()
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("ours", [True, False])
def test_a_combined_adapter_is_a_file_like_any_other(model, ours, tmp_path):
    """PEFT's own HRA reads it too: what pads a layer that lacks an adapter is pairs of equal columns, not zeros."""
    model.add_weighted_adapter(["default", "b"], [1, 0.5], "new", combination_type="cat")
    model.set_adapter("new")
    x = images()
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    base = seeded(Net)
    if ours:
        with hra_kernels.peft.enabled():
            loaded = PeftModel.from_pretrained(base, tmp_path / "new")
    else:
        loaded = PeftModel.from_pretrained(base, tmp_path / "new")
    assert relative(loaded(x), expected) < FLOAT32


def test_a_product_equals_both_active_bit_for_bit_in_its_vectors(model):
    model.add_weighted_adapter(["default", "b"], [1, 1], "new")
    layer = model.base_model.model.lin0
    assert torch.equal(layer.hra_u["new"], torch.cat([layer.hra_u["default"], layer.hra_u["b"]], 1))
    exact = merged_weight(layer, "default", "b")
    assert relative(merged_weight(layer, "new"), exact) < rounding(96, 10, torch.float64)


class Nested(nn.Module):
    """A top-level name that is also the end of another layer's name."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"lin": nn.Linear(8, 8)})

    def forward(self, x):
        return self.block["lin"](torch.tanh(self.lin(x)))


def test_a_layer_of_a_similar_name_stays_as_it_is():
    model = adapt(seeded(Nested), target_modules="lin")
    model.add_adapter("b", config(targets=["block.lin"]))
    assert "default" not in model.base_model.model.block["lin"].hra_u
    model.add_weighted_adapter(["default"], [1], "new")
    x = torch.randn(3, 8)
    expected = model(x)
    model.set_adapter("new")
    assert relative(model(x), expected) < FLOAT32


def test_in_16_bits():
    """Products keep the vectors' bits; powers are float32."""
    model = adapt(nn.Sequential(linear(dtype=torch.bfloat16)), targets=["0"])
    layer = model.base_model.model[0]
    layer.hra_u["default"].data = layer.hra_u["default"].data.bfloat16()
    model.add_weighted_adapter(["default", "default"], [1, -1], "product")
    model.add_weighted_adapter(["default"], [0.5], "power")
    assert layer.hra_u["product"].dtype == torch.bfloat16 and layer.hra_u["power"].dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"adapters": ["default", "other"]}, "Adapter other does not exist"),
        ({"weights": [1]}, "one weight for each of one or more adapters, got 1 weights for 2 adapters"),
        ({"adapters": [], "weights": []}, "one weight for each of one or more adapters, got 0 weights for 0"),
        ({"adapter_name": "gs"}, "there is an adapter 'gs' already; delete it first"),
        ({"combination_type": "svd"}, "supports combination_type='cat'.*got 'svd'.*export_lora"),
        ({"density": 0.5}, "HRA has no use for density"),
        ({"adapters": ["default", "gs"], "weights": [1, 0.5]}, r"layer 'conv'.*adapter 'gs'.*power 0.5 is not defined"),
        ({"weights": [1, float("nan")]}, r"layer 'lin0'.*adapter 'b': the weight and hra_u must be finite, got nan"),
    ],
)
def test_errors_change_nothing(model, change, message):
    arguments = {"adapters": ["default", "b"], "weights": [1, 1], "adapter_name": "new", **change}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**arguments)
    assert list(model.peft_config) == ["default", "b", "gs"]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("settings", [{"bias": "hra_only"}, {"modules_to_save": ["lin1"]}])
def test_other_weights_of_an_adapter_have_no_combination(settings):
    model = adapt(seeded(Net), targets=["lin0"], **settings)
    with pytest.raises(ValueError, match="adapter 'default' has trained biases or modules_to_save"):
        model.add_weighted_adapter(["default"], [1], "new")
