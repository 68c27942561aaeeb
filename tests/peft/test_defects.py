"""What PEFT's own HRA gets wrong or refuses, right here: one test each (of convolutions in `test_layer_kinds.py`)."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import HRAConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn

import hra_kernels.peft
from hra_kernels.peft import HRALinear
from hra_kernels.testing.tolerance import orthogonality, relative, rounding
from tests.peft.models import (
    Net,
    PadsItself,
    adapt,
    conv2d,
    dense_q,
    layer_of,
    linear,
    merged_weight,
    seeded,
    set_u,
)

FLOAT32 = rounding(96, 4, layers=3)
BFLOAT16 = rounding(48, 4, torch.bfloat16)


def forward_backward(layer, x):
    y = layer(x)
    y.backward(torch.randn_like(y))
    return y


# --- the vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_gs", [False, True])
def test_zero_column(apply_gs):
    layer = layer_of(linear(), apply_GS=apply_gs)
    u = torch.randn(48, 4)
    u[:, 1] = 0
    set_u(layer, u)
    x = torch.randn(7, 48)
    y = forward_backward(layer, x)
    exact = F.linear(x.double(), layer.weight.double() @ dense_q(u, apply_gs), layer.bias.double())
    assert relative(y, exact) < FLOAT32
    assert layer.hra_u["default"].grad.isfinite().all()
    assert not layer.hra_u["default"].grad[:, 1].any()
    layer.merge()
    assert layer.weight.isfinite().all()
    assert relative(layer(x), exact) < FLOAT32


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-10, 1e10, 1e20, 1e30])
def test_column_norms(scale):
    layer = layer_of(linear())
    u = torch.randn(48, 4)
    x = torch.randn(7, 48)
    set_u(layer, u)
    plain = layer(x)
    scales = torch.tensor([1.0, scale, 1.0, scale])
    set_u(layer, u * scales)
    y = forward_backward(layer, x)
    assert relative(y, plain) < rounding(48, 4)
    assert layer.hra_u["default"].grad.isfinite().all()


def orthogonality_error(layer):
    q = layer.get_delta_weight("default").double()
    return (q.mT @ q - torch.eye(len(q))).abs().max().item()


@pytest.mark.parametrize("r", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_schmidt_at_default_initialization(r, dtype):
    with pytest.warns(UserWarning, match="apply_GS=True cannot start from HRA's pairs"):
        layer = layer_of(linear(512, 64, dtype), apply_GS=True, init_weights=True, r=r)
    u = layer.hra_u["default"]
    assert torch.linalg.matrix_rank(u.detach().float()) == r  # independent columns: nothing is lost
    assert u.dtype == torch.float32 and orthogonality_error(layer) < rounding(512, r)
    weight = layer.weight.clone()
    y = forward_backward(layer, torch.randn(9, 512, dtype=dtype))
    assert y.isfinite().all() and u.grad.abs().max() < 1e3
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("r", [8, 32])
def test_gram_schmidt_of_paired_columns_from_a_file(r):
    """PEFT's initialization repeats each column; such vectors can still come from an adapter file."""
    layer = layer_of(linear(512, 64), apply_GS=True, r=r)
    half = torch.randn(512, r // 2)
    paired = torch.repeat_interleave(half, 2, dim=1)
    set_u(layer, paired)
    assert orthogonality_error(layer) < rounding(512, r)
    before = layer.get_delta_weight("default")
    set_u(layer, paired * (1 + 1e-7))
    assert (layer.get_delta_weight("default") - before).abs().max() < rounding(512, r)  # not a matter of rounding noise
    forward_backward(layer, torch.randn(9, 512))
    assert layer.hra_u["default"].grad.abs().max() < 1e3


def test_gram_schmidt_with_r_above_d():
    layer = layer_of(linear(6, 5), apply_GS=True, r=10)
    assert orthogonality_error(layer) < rounding(6, 10)
    expected = -torch.eye(6)  # the columns span everything, and the projector on everything is the identity
    assert torch.allclose(layer.get_delta_weight("default"), expected, atol=rounding(6, 10))
    assert forward_backward(layer, torch.randn(3, 6)).isfinite().all()
    assert layer.hra_u["default"].grad.isfinite().all()


# --- the base layer's own business ------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.out_proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.out_proj(self.attention(x, x, x)[0])


PASSED_OVER = r"HRA passes over attention.out_proj: .*exclude_modules=\['attention.out_proj'\]"


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", ".*out_proj", ["out_proj"]])
def test_multihead_attention_is_passed_over(targets, tmp_path):
    """It uses its out_proj without calling it. A match by anything but its full name leaves it out, and warns."""
    with pytest.warns(UserWarning, match=PASSED_OVER) as caught:
        model = adapt(Attends(), targets=targets)
    assert sum("passes over" in str(warning.message) for warning in caught) == 1
    net = model.base_model.model
    assert isinstance(net.out_proj, HRALinear) and not isinstance(net.attention.out_proj, HRALinear)
    assert model.targeted_module_names == ["out_proj"]
    assert model(torch.randn(3, 2, 16)).shape == (3, 2, 16)
    model.save_pretrained(tmp_path)
    with hra_kernels.peft.enabled(), pytest.warns(UserWarning, match=PASSED_OVER):
        again = PeftModel.from_pretrained(Attends(), tmp_path)
    assert torch.equal(again.base_model.model.out_proj.hra_u["default"], net.out_proj.hra_u["default"])


@pytest.mark.parametrize("targets", ["attention.out_proj", ["attention.out_proj", "out_proj"]])
def test_multihead_attention_named_in_full(targets):
    with pytest.raises(NotImplementedError, match=r"'attention.out_proj'.*exclude_modules=\['attention.out_proj'\]"):
        adapt(Attends(), targets=targets)


def test_multihead_attention_excluded():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapt(Attends(), targets=["out_proj"], exclude_modules=["attention.out_proj"])
    assert model(torch.randn(3, 2, 16)).shape == (3, 2, 16)


def test_multihead_attention_alone():
    with pytest.warns(UserWarning, match=PASSED_OVER), pytest.raises(ValueError, match="not found in the base model"):
        adapt(nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}), targets=["out_proj"])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_forward_hooks_of_the_base_layer(kind):
    layer = layer_of(linear() if kind == "linear" else conv2d(3))
    x = torch.randn((5, 48) if kind == "linear" else (2, 3, 7, 7))
    plain = layer(x)
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.base_layer.register_forward_hook(lambda module, args, y: (seen.append("post"), 2 * y)[1])
    assert relative(layer(x), 2 * plain) < FLOAT32
    assert seen == ["pre", "post"]
    scaled = layer.base_layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    bias = layer.bias if kind == "linear" else layer.bias[:, None, None]
    assert relative(layer(x), 2 * (3 * (plain - bias) + bias)) < FLOAT32
    scaled.remove()


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_accelerate_offload(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = adapt(seeded(Net))
    x = torch.randn(4, 3, 8, 8)
    exact = model(x)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    for _ in range(2):
        assert torch.equal(model(x), exact)
    assert model.base_model.model.lin0.base_layer.weight.device.type == "meta"


def test_offloaded_layer_merges():
    accelerate = pytest.importorskip("accelerate")
    model = adapt(seeded(Net))
    x = torch.randn(4, 3, 8, 8)
    exact = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    model.merge_adapter()
    assert relative(model(x), exact) < FLOAT32


# --- 16-bit -----------------------------------------------------------------------------------------------------------


def layer_with_16_bit_vectors(base):
    """Its hra_u stays in the base layer's 16-bit dtype, as with `autocast_adapter_dtype=False`."""
    layer = layer_of(base, r=8)
    layer.hra_u["default"].data = layer.hra_u["default"].data.to(base.weight.dtype)
    return layer


def test_bf16_vectors_have_float32_factors():
    layer = layer_with_16_bit_vectors(linear(256, 64, torch.bfloat16))
    u = layer.hra_u["default"]
    assert u.dtype == torch.bfloat16
    v, t = layer._factors.get([u], [False], torch.bfloat16)
    q = torch.eye(256, dtype=torch.float64) - v.double().mT @ t.double() @ v.double()
    assert v.dtype == torch.float32
    assert (q.mT @ q - torch.eye(256)).abs().max() < orthogonality(u.float(), v, t, False)
    assert relative(q, dense_q(u)) < rounding(256, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [layer_with_16_bit_vectors, layer_of])
def test_hundred_merge_cycles_restore_the_bits(dtype, make):
    layer = make(linear(64, 32, dtype))
    before = layer.weight.clone()
    for _ in range(100):
        layer.merge()
        assert not torch.equal(layer.weight, before)
        layer.unmerge()
        assert torch.equal(layer.weight, before)


def test_merge_under_autocast_is_float32():
    layer = layer_of(linear())
    exact = merged_weight(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    assert layer.weight.dtype == torch.float32 and relative(layer.weight, exact) < rounding(48, 4)


def test_disable_adapter_while_merged():
    base = seeded(Net).to(torch.bfloat16)
    model = adapt(base)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    for name, parameter in base.named_parameters():
        layer, _, kind = name.partition(".")
        assert torch.equal(getattr(getattr(model.base_model.model, layer).base_layer, kind), parameter)


def test_disable_input_dtype_casting_with_bf16_base():
    model = adapt(nn.Sequential(linear(dtype=torch.bfloat16)), targets=["0"])
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    with disable_input_dtype_casting(model):
        y = model(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, model(x))


def test_float32_input_into_bf16_base():
    layer = layer_of(linear(dtype=torch.bfloat16))
    x = torch.randn(5, 48)
    exact = F.linear(x.double(), merged_weight(layer), layer.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
    assert relative(y, exact) < BFLOAT16
    y = layer(x)  # outside autocast as in PEFT: the result has the input's dtype
    assert y.dtype == torch.float32 and relative(y, exact) < BFLOAT16


# --- the rest ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.embed_tokens(ids))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merge_with_tied_embeddings_is_refused(how):
    model = adapt(seeded(Tied), targets=["lm_head"])
    ids = torch.arange(10)[None]
    before, weight = model(ids), model.base_model.model.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match=r"'lm_head'.*shared \(tied\) by embed_tokens, lm_head.*Untie it first"):
        getattr(model, how)()
    assert torch.equal(model.base_model.model.embed_tokens.weight, weight)
    assert torch.equal(model(ids), before)
    tied = model.base_model.model
    tied.lm_head.base_layer.weight = nn.Parameter(tied.embed_tokens.weight.detach().clone(), requires_grad=False)
    assert relative(model.merge_and_unload()(ids), before) < FLOAT32


def test_bias_hra_only_then_disable():
    """As PEFT documents it for LoRA: a bias that was trained stays, and disabling the adapter warns of it."""
    base = linear()
    model = adapt(nn.Sequential(base), targets=["0"], bias="hra_only")
    layer = model.base_model.model[0]
    assert layer.bias.requires_grad
    x = torch.randn(5, 48)
    forward_backward(model, x)
    with torch.no_grad():
        layer.base_layer.bias -= layer.bias.grad
    with pytest.warns(UserWarning, match="bias configured to be 'hra_only'"), model.disable_adapter():
        assert torch.equal(model(x), F.linear(x, base.weight, layer.bias))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv with its own forward"])
def test_base_weight_that_requires_grad(kind):
    bases = {"linear": linear, "conv": lambda: conv2d(3), "conv with its own forward": lambda: PadsItself(3, 8, 3)}
    base = bases[kind]()
    layer = layer_of(base)
    layer.base_layer.weight.requires_grad_(True)
    x = torch.randn((5, 48) if kind == "linear" else (2, 3, 7, 7))
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = merged_weight(layer).requires_grad_()
    exact = torch.func.functional_call(base.double(), {"weight": weight}, (x.double(),))
    (grad,) = torch.autograd.grad(exact, weight, dy.double())
    expected = (grad.flatten(1) @ dense_q(layer.hra_u["default"]).mT).reshape(grad.shape)
    assert relative(layer.base_layer.weight.grad, expected) < FLOAT32


@pytest.mark.parametrize("setting", ["target_parameters", "rank_pattern"])
def test_settings_hra_does_not_have(setting):
    """PEFT's configuration; `hra_kernels.peft.HRAConfig` has target_parameters."""
    with pytest.raises(TypeError, match=setting):
        HRAConfig(target_modules=["lin0"], **{setting: {}})
