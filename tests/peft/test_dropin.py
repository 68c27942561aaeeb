"""Switching on and off, the life of adapters through PEFT's own calls, and files that serve both sides."""

import copy
import importlib
import subprocess
import sys

import peft
import pytest
import torch
from packaging.version import Version
from peft import HRAConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.hra import HRALayer
from peft.tuners.hra.layer import HRAConv2d as PeftHRAConv2d
from peft.tuners.hra.layer import HRALinear as PeftHRALinear
from peft.tuners.hra.model import HRAModel as PeftHRAModel
from safetensors.torch import load_file
from torch import nn

import hra_kernels.peft
from hra_kernels.peft import HRAConv2d, HRALinear, HRAModel
from hra_kernels.peft import linear as module_of_layers
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Net, adapt, config, dense_q, exact_forward, merged_weight, seeded

FLOAT32 = rounding(96, 8, layers=3)


def kinds(model):
    return [type(module) for module in model.modules() if isinstance(module, HRALayer)]


OURS = [HRAConv2d, HRALinear, HRALinear]
THEIRS = [PeftHRAConv2d, PeftHRALinear, PeftHRALinear]


# --- on and off -------------------------------------------------------------------------------------------------------


def namespace():
    model = importlib.import_module("peft.tuners.hra.model")
    return [
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.HRA], model.HRALinear, model.HRAConv2d, model.HRAModel,
        peft.HRAModel, peft.tuners.HRAModel, peft.tuners.hra.HRAModel, peft.tuners.hra.HRALinear, vars(model).keys(),
    ]  # fmt: skip


def test_disable_restores_everything():
    before = namespace()
    for _ in range(2):
        hra_kernels.peft.enable()
        hra_kernels.peft.enable()
        assert hra_kernels.peft.is_enabled() and kinds(get_peft_model(seeded(Net), config())) == OURS
        assert namespace() != before
        hra_kernels.peft.disable()
        hra_kernels.peft.disable()
        assert namespace() == before and not hra_kernels.peft.is_enabled()
        assert kinds(get_peft_model(seeded(Net), config())) == THEIRS


def test_context_manager_nests_and_survives_errors():
    with pytest.raises(ZeroDivisionError), hra_kernels.peft.enabled():
        with hra_kernels.peft.enabled():
            pass
        assert hra_kernels.peft.is_enabled()
        raise ZeroDivisionError
    assert not hra_kernels.peft.is_enabled()
    hra_kernels.peft.enable()
    with hra_kernels.peft.enabled():
        pass
    assert hra_kernels.peft.is_enabled()
    hra_kernels.peft.disable()


def test_classes_are_peft_classes():
    assert issubclass(HRALinear, PeftHRALinear) and issubclass(HRAConv2d, PeftHRAConv2d)
    assert issubclass(HRALinear, HRALayer) and issubclass(HRAModel, PeftHRAModel)
    assert HRALinear.adapter_layer_names == ("hra_u",)
    assert HRALinear.other_param_names == ("hra_r", "hra_apply_GS")


def test_models_outlive_disable():
    model = adapt(seeded(Net))
    x = torch.randn(4, 3, 8, 8)
    before = model(x)
    assert not hra_kernels.peft.is_enabled()
    model.add_adapter("second", config(targets=["lin0", "lin1"]))
    model.add_adapter("third", config(targets=["conv"]))
    assert torch.equal(model(x), before) and kinds(model) == OURS
    assert kinds(model.merge_and_unload()) == []


def test_new_targets_of_an_adapted_model_stay_ours():
    model = adapt(seeded(Net), targets=["lin0"])
    model.add_adapter("wide", config())
    assert kinds(model) == OURS


def test_stock_model_class_builds_our_layers_while_on(enabled):
    assert kinds(PeftHRAModel(seeded(Net), config(), "default")) == OURS
    assert type(peft.HRAModel(seeded(Net), config(), "default")) is HRAModel


def test_inject_adapter_in_model(enabled):
    model = inject_adapter_in_model(config(), seeded(Net))
    assert kinds(model) == OURS and type(model) is Net


def test_transformers_add_adapter(enabled):
    transformers = pytest.importorskip("transformers")
    wanted = importlib.import_module("transformers.integrations.peft").MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(wanted):
        pytest.skip(f"transformers {transformers.__version__} wants PEFT {wanted} or newer for its own add_adapter")
    settings = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40
    )
    model = transformers.BertModel(settings)
    model.add_adapter(config(targets=["query", "value"]), adapter_name="a")
    assert kinds(model) == [HRALinear, HRALinear]
    ids = torch.arange(12)[None]
    model.eval()
    adapted = model(ids).last_hidden_state
    model.disable_adapters()
    assert not torch.equal(model(ids).last_hidden_state, adapted)
    model.enable_adapters()
    assert torch.equal(model(ids).last_hidden_state, adapted)


def test_mixed_model_refuses_hra_as_peft_does(enabled):
    with pytest.raises(ValueError, match="HRA"):
        get_peft_model(seeded(Net), config(), mixed=True)


def test_over_a_lora_layer(enabled):
    """HRA over LoRA: the base layer's own forward, LoRA included, sees the reflected input."""
    model = get_peft_model(seeded(Net), LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    lora = model.base_model.model.lin0
    stacked = get_peft_model(copy.deepcopy(model.base_model.model), config(targets=["lin0"])).base_model.model.lin0
    x = torch.randn(5, 96)
    q = dense_q(stacked.hra_u["default"]).float()
    assert relative(stacked(x), lora(x @ q.mT)) < FLOAT32


# --- the life of adapters ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_adapters():
    model = adapt(seeded(Net))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.add_adapter("b", config(r=3))
    return model


@pytest.mark.parametrize("active", [["default"], ["b"], ["default", "b"], ["b", "default"], []])
def test_active_adapters_and_their_order(two_adapters, active):
    model = two_adapters
    model.base_model.set_adapter(active)
    x = torch.randn(4, 3, 8, 8)
    exact = exact_forward(model, active, x)
    assert relative(model(x), exact) < FLOAT32
    if active:
        model.merge_adapter()
        assert relative(model(x), exact) < FLOAT32
        model.unmerge_adapter()
        assert relative(model(x), exact) < FLOAT32


def test_one_pass_for_several_adapters(two_adapters, monkeypatch):
    calls = []
    original = module_of_layers.reflect_chain
    monkeypatch.setattr(
        module_of_layers, "reflect_chain", lambda x, us, *a, **k: (calls.append(len(us)), original(x, us, *a, **k))[1]
    )
    two_adapters.base_model.set_adapter(["default", "b"])
    two_adapters(torch.randn(2, 3, 8, 8))
    assert calls == [2, 2]  # the two linear layers, once each


def test_delete_and_set_adapter(two_adapters):
    model = two_adapters
    x = torch.randn(4, 3, 8, 8)
    model.set_adapter("b")
    expected = model(x)
    model.delete_adapter("default")
    assert torch.equal(model(x), expected)
    assert list(model.base_model.model.lin0.hra_u) == ["b"] and list(model.base_model.model.lin0.hra_r) == ["b"]


def test_disable_adapter_and_unload():
    base = seeded(Net)
    model = adapt(base)
    x = torch.randn(4, 3, 8, 8)
    adapted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), adapted)
    assert torch.equal(model.unload()(x), base(x))


def test_only_the_vectors_train():
    model = adapt(seeded(Net))
    assert {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.requires_grad} == {"hra_u"}
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# --- initialization and sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_starts_as_the_base_layer_bit_for_bit(dtype):
    base = seeded(Net).to(dtype)
    model = adapt(base, init_weights=True, r=8)
    x = torch.randn(4, 3, 8, 8).to(dtype)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("settings", [{}, {"init_weights": True}, {"r": 7}, {"r": 7, "init_weights": True}])
@pytest.mark.filterwarnings("ignore:The symmetric initialization")
def test_same_initial_vectors_as_peft(settings):
    ours, theirs = adapt(seeded(Net), **settings), adapt(seeded(Net), ours=False, **settings)
    for (name, p), (other, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and p.dtype == q.dtype and torch.equal(p, q) and p.requires_grad == q.requires_grad


def test_odd_r_warns_as_peft():
    with pytest.warns(UserWarning, match="can NOT be performed when r is odd"):
        model = adapt(seeded(Net), r=3, init_weights=True)
    q = model.base_model.model.lin0.get_delta_weight("default").double()
    assert torch.linalg.det(q).item() == pytest.approx(-1, abs=96 * FLOAT32)  # why no odd chain is the identity


def test_r_above_in_features():
    model = adapt(seeded(Net), r=40, targets=["lin1"])
    x = torch.randn(6, 12)
    layer = model.base_model.model.lin1
    assert relative(layer(x), x.double() @ merged_weight(layer).mT) < FLOAT32


def test_get_delta_weight_is_q():
    for apply_gs in (False, True):
        layer = adapt(seeded(Net), apply_GS=apply_gs, r=5).base_model.model.lin0
        theirs = adapt(seeded(Net), ours=False, apply_GS=apply_gs, r=5).base_model.model.lin0
        for reverse in (False, True):
            got, expected = layer.get_delta_weight("default", reverse), theirs.get_delta_weight("default", reverse)
            assert got.dtype == expected.dtype and relative(got, expected) < FLOAT32
    with torch.no_grad():
        assert (layer.get_delta_weight("default") - dense_q(layer.hra_u["default"], True)).abs().max() < rounding(96, 5)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["ours", "theirs"])
@pytest.mark.parametrize("bias", ["none", "hra_only"])
def test_adapter_files_are_interchangeable_bit_for_bit(writer, bias, tmp_path):
    base = seeded(Net)
    settings = {"r": 5, "bias": bias, "modules_to_save": None}
    ours, theirs = adapt(base, **settings), adapt(base, ours=False, **settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = {side: load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")}
    assert "base_model.model.lin0.hra_u" in saved["ours"]
    assert saved["ours"].keys() == saved["theirs"].keys()
    assert all(torch.equal(saved["ours"][key], saved["theirs"][key]) for key in saved["ours"])
    configs = [(tmp_path / side / "adapter_config.json").read_bytes() for side in ("ours", "theirs")]
    assert configs[0] == configs[1]

    x = torch.randn(4, 3, 8, 8)
    if writer == "ours":
        loaded, expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"), ours(x)
        assert kinds(loaded) == THEIRS
    else:
        with hra_kernels.peft.enabled():
            loaded, expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs"), theirs(x)
        assert kinds(loaded) == OURS
    assert relative(loaded(x), expected) < FLOAT32
    for name, parameter in loaded.named_parameters():
        if "hra_u" in name:
            assert torch.equal(parameter, saved["ours"][name.removesuffix(".default")])
    loaded.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (tmp_path / writer / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_and_load_adapter(low_cpu_mem_usage, tmp_path):
    base = seeded(Net)
    first, second = adapt(base), adapt(base, seed=5, r=3)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    x = torch.randn(4, 3, 8, 8)
    expected = first(x), second(x)
    with hra_kernels.peft.enabled():
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", low_cpu_mem_usage=low_cpu_mem_usage)
        model.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert kinds(model) == OURS
    assert torch.equal(model(x), expected[0])
    model.set_adapter("second")
    assert torch.equal(model(x), expected[1])
    model.load_state_dict(model.state_dict())


def test_loading_new_values_is_seen():
    """The factor follows the values: load_state_dict, in-place writes, optimizer steps, averaged weights."""
    model, other = adapt(seeded(Net)), adapt(seeded(Net), seed=9)
    x = torch.randn(4, 3, 8, 8)
    model(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    assert relative(model(x), exact_forward(model, ["default"], x)) < FLOAT32
    model(x).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert relative(model(x), exact_forward(model, ["default"], x)) < FLOAT32
    for p in model.parameters():
        p.data.add_(0.01 * torch.randn_like(p))  # as weight averaging does, before it calls eval()
    model.eval()
    assert relative(model(x), exact_forward(model, ["default"], x)) < FLOAT32


# --- bad surroundings -------------------------------------------------------------------------------------------------


def test_without_peft():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import hra_kernels\n"
        "try:\n    import hra_kernels.peft\n"
        "except ImportError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "hra_kernels.peft needs PEFT: pip install 'hra-kernels[peft]'" in out


def test_wrong_width():
    layer = adapt(nn.Sequential(nn.Linear(8, 4)), targets=["0"])
    with pytest.raises(ValueError, match=r"D = x.shape\[-1\] = 9, got shape \(4, 8\)"):
        layer(torch.randn(3, 9))


def test_config_class_is_peft_own():
    assert type(adapt(seeded(Net)).peft_config["default"]) is HRAConfig
