"""HRAConfig(side=..., eps=...): the authors' layer for language models, in PEFT, and out of reach of PEFT's own HRA."""

import copy
import json

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap as peft_hotswap
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import hra_kernels.peft
from hra_kernels import ops
from hra_kernels.peft import HRAConfig, hotswap
from hra_kernels.peft import model as peft_model
from hra_kernels.peft.export import lora_factors
from hra_kernels.reference import dense
from hra_kernels.regularizer import model_orthogonality_penalty, orthogonality_penalty
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft import quantized_layers
from tests.peft.models import seeded

EPS = 1e-4
BOUND = rounding(24, 8, layers=4)


class Net(nn.Module):
    """Square and other layers, with and without a bias, (B, 16) to (B, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 24, bias=False)
        self.conv1d = Conv1D(12, 24)
        nn.init.normal_(self.conv1d.bias)

    def forward(self, x):
        return self.conv1d(torch.tanh(self.wide(torch.tanh(self.square(x)))))


TARGETS = ["square", "wide", "conv1d"]


pytestmark = [
    pytest.mark.usefixtures("enabled"),
    pytest.mark.skipif(not peft_model._LAYERS_TAKE_CONFIG, reason="PEFT 0.19 has no room for side and eps"),
]


def net(dtype=torch.float32):
    return seeded(Net).to(dtype)


def settings(side="output", eps=EPS, **more):
    return HRAConfig(**{"r": 4, "init_weights": False, "target_modules": TARGETS, "side": side, "eps": eps, **more})


def adapt(model=None, config=None, adapter="default", seed=1):
    """A PeftModel whose vectors have norms around sqrt(EPS), where eps counts."""
    model = seeded(lambda: get_peft_model(model or net(), config or settings(), adapter_name=adapter), seed)
    shorten(model)
    return model


def shorten(model):
    with torch.no_grad():
        for name, u in model.named_parameters():
            if "hra_u" in name:
                u.copy_(u / u.norm(dim=0) * EPS**0.5 * torch.linspace(0.5, 3, u.shape[-1]))


def authors_q(u, eps, detach=True):
    u = (u.detach() if detach else u).double().reshape(-1, u.shape[-1])
    q = identity = torch.eye(u.shape[0], dtype=torch.float64)
    for column in u.unbind(1):
        unit = column / torch.sqrt((column**2).sum() + eps)
        q = q @ (identity - 2 * torch.outer(unit, unit))
    return q


def authors_model(model, *adapters):
    """The base network in float64 with Qᵀ W and W Q of these adapters written into its weights."""
    plain = net(torch.float64)
    for name in TARGETS:
        layer, base = getattr(model.base_model.model, name), getattr(plain, name)
        weight = layer.get_base_layer().weight.detach().double()
        rows = weight.mT if isinstance(base, Conv1D) else weight
        for adapter in adapters:
            config = model.peft_config[adapter]
            q = authors_q(layer.hra_u[adapter], config.eps)
            rows = rows @ q if config.side == "input" else q.T @ rows
        base.weight.data = rows.mT.contiguous() if isinstance(base, Conv1D) else rows
    return plain


def inputs(rows=5, dtype=torch.float32):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(7)).to(dtype)


KINDS = [("output", EPS), ("output", 0.0), ("input", EPS)]


@pytest.mark.parametrize(("side", "eps"), KINDS)
def test_forward_and_gradients(side, eps):
    model, x = adapt(config=settings(side, eps)).double(), inputs(dtype=torch.float64)
    exact = authors_model(model, "default")(x)
    assert relative(model(x), exact) < rounding(24, 8, torch.float64, layers=4)
    assert relative(net().double()(x), exact) > 0.01
    x = x.requires_grad_()
    us = {name: u for name, u in model.named_parameters() if u.requires_grad}
    assert len(us) == 3 and all(u.dim() == 3 and u.shape[1] == 1 for u in us.values())
    got = torch.autograd.grad(model(x).square().sum(), [x, *us.values()])
    layers = [getattr(model.base_model.model, name) for name in TARGETS]
    parameters = {}
    for name, layer in zip(TARGETS, layers, strict=True):
        weight = layer.get_base_layer().weight.detach()
        rows = weight.mT if name == "conv1d" else weight
        q = authors_q(layer.hra_u["default"], eps, detach=False)
        rows = rows @ q if side == "input" else q.T @ rows
        parameters[f"{name}.weight"] = rows.mT if name == "conv1d" else rows
    y = torch.func.functional_call(net(torch.float64), parameters, (x,))
    exact = torch.autograd.grad(y.square().sum(), [x, *us.values()])
    for one, other in zip(got, exact, strict=True):
        assert relative(one, other) < 2**0.5 * rounding(24, 8, torch.float64, layers=8)  # both are off


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    model = adapt(net(dtype))
    x = inputs(dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    assert relative(y, authors_model(model, "default")(x.double())) < 2 * rounding(24, 8, dtype, layers=4)
    exact = authors_model(adapt(), "default")(inputs().double())
    with torch.autocast("cpu", dtype):
        assert relative(adapt()(inputs()), exact) < 2 * rounding(24, 8, dtype, layers=4)


def test_start():
    """eps: near the base model, with short columns of their own. Without: pairs, and the base model bit for bit."""
    x = inputs()
    pairs = seeded(lambda: get_peft_model(net(), settings(eps=0.0, init_weights=True)))
    assert torch.equal(pairs(x), net()(x))
    near = seeded(lambda: get_peft_model(net(), settings(init_weights=True)))
    for layer in near.modules():
        if hasattr(layer, "hra_u"):
            u = layer.vectors("default").detach()
            assert u.shape == (layer.out_features, 4) and 0 < u.norm(dim=0).min() < u.norm(dim=0).max() < EPS**0.5
            assert len({float(value) for value in u[0]}) == 4
            assert (
                u.abs().max() <= 1.001 * EPS * (6 / 4) ** 0.5
            )  # what the authors' kaiming_uniform_(a=1 / eps) draws from
    assert 0 < relative(near(x), net()(x)) < 0.1


@pytest.mark.parametrize(("side", "eps"), KINDS)
def test_training(side, eps):
    model, x = adapt(config=settings(side, eps)), inputs(32)
    target = torch.randn(32, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam([u for u in model.parameters() if u.requires_grad], lr=3e-3)
    losses = []
    for _ in range(10):
        loss = (model(x) - target).square().mean() + 1e-4 * model_orthogonality_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert relative(model(x), authors_model(model, "default")(x.double())) < BOUND
    assert losses[-1] < losses[0]


def test_regularizer_sees_the_columns():
    model = adapt()
    us = [layer.vectors("default") for layer in model.modules() if hasattr(layer, "hra_u")]
    torch.testing.assert_close(model_orthogonality_penalty(model), orthogonality_penalty(us))


def both_sides():
    model = adapt()
    seeded(lambda: model.add_adapter("inside", settings("input", 0.0)), 3)
    seeded(lambda: model.add_adapter("out", settings("output", 1e-3)), 4)
    return model


ACTIVE = [["default"], ["default", "inside"], ["inside", "default", "out"], ["out", "inside"]]


@pytest.mark.parametrize("active", ACTIVE, ids="-".join)
@pytest.mark.parametrize("keep_original", [True, False])
def test_both_sides_and_merging(active, keep_original):
    model, x = both_sides(), inputs()
    model.base_model.set_adapter(active)
    exact = authors_model(model, *active)(x.double())
    assert relative(model(x), exact) < BOUND
    before = {name: weight.clone() for name, weight in model.state_dict().items() if "base_layer" in name}
    model.merge_adapter(safe_merge=True, keep_original=keep_original)
    assert relative(model(x), exact) < BOUND
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        assert name == "wide" or torch.equal(layer.base_layer.bias, getattr(net(), name).bias)
    model.unmerge_adapter()
    for name, weight in model.state_dict().items():
        if name in before:
            same = torch.equal(weight, before[name])
            assert same or (not keep_original and relative(weight, before[name]) < 100 * BOUND)
    assert relative(model(x), exact) < 100 * BOUND
    model.base_model.set_adapter(active)
    assert relative(model.merge_and_unload()(x), exact) < 100 * BOUND


def test_merging_one_after_the_other():
    model, x = both_sides(), inputs()
    model.base_model.set_adapter(["inside", "default", "out"])
    exact = authors_model(model, "inside", "default", "out")(x.double())
    for names in (["inside"], ["default"], ["out"]):
        model.merge_adapter(names)
        assert relative(model(x), exact) < BOUND
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.square.base_layer.weight, net().square.weight)


def test_a_singular_chain_stays_merged():
    model = adapt()
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "hra_u"):
                layer.hra_u["default"].zero_()[3, 0, 0] = EPS**0.5
    model.merge_adapter(keep_original=False)
    with pytest.raises(ValueError, match="cannot be undone"):
        model.unmerge_adapter()
    assert model.base_model.model.square.merged


@pytest.mark.parametrize("shape", [(6,), (6, 3)], ids=str)
def test_mixed_batch(shape):
    model = both_sides().eval()
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(5))
    names = ["default", "inside", "__base__", "out", "default", "inside"]
    got = model(x, adapter_names=names)
    for sample, name in enumerate(names):
        plain = net().double() if name == "__base__" else authors_model(model, name)
        assert relative(got[sample], plain(x[sample].double())) < BOUND
    assert torch.equal(got[2], model(x, adapter_names=["__base__"] * 6)[2])
    for name in ("default", "inside"):
        model.set_adapter(name)
        assert relative(model(x, adapter_names=[name] * 6), model(x)) < BOUND


@pytest.mark.parametrize("active", ACTIVE, ids="-".join)
def test_export(active, tmp_path):
    """A LoRA of the summed rank, exactly."""
    model, x = both_sides(), inputs()
    model.base_model.set_adapter(active)
    config = hra_kernels.peft.export_lora(model, tmp_path, active)
    assert isinstance(config, LoraConfig) and config.r == 4 * len(active)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert relative(loaded(x), authors_model(model, *active)(x.double())) < BOUND


@pytest.mark.parametrize(("side", "eps"), KINDS)
def test_files(side, eps, tmp_path):
    linear = ["square", "wide"]  # what PEFT's own HRA adapts
    model, x = adapt(config=settings(side, eps, target_modules=linear)), inputs()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(u.dim() == 3 and u.shape[1] == 1 for u in tensors.values())
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    config = loaded.peft_config["default"]
    assert (config.side, config.eps) == (side, eps) and torch.equal(loaded(x), model(x))
    again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again(x), model(x))
    with hra_kernels.peft.disabled(), pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(net(), tmp_path)
    with hra_kernels.peft.disabled():
        stock = get_peft_model(net(), settings("input", 0.0, target_modules=linear))
        with pytest.raises(RuntimeError, match="size mismatch"):
            stock.load_adapter(tmp_path, "other")
        with pytest.raises(RuntimeError, match="size mismatch"):  # the whole model's, without an adapter's file
            stock.load_state_dict(model.state_dict(), strict=False)


def test_a_file_whose_configuration_was_changed(tmp_path):
    """Vectors of one kind never become those of another kind, even where the layer is square."""
    model = adapt(config=settings(target_modules=["square"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in saved.items() if key not in ("side", "eps")}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(net(), tmp_path)
    path.write_text(json.dumps({**saved, "side": "left"}))
    with pytest.raises(ValueError, match="side must be one of"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_plain_adapters_are_saved_as_ever(tmp_path):
    adapt(config=settings("input", 0.0)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "side" not in saved and "eps" not in saved
    assert all(u.dim() == 2 for u in load_file(tmp_path / "adapter_model.safetensors").values())


def test_hotswap(tmp_path):
    model, x = adapt(), inputs()
    smaller = adapt(config=settings(r=2), seed=9)
    smaller.save_pretrained(tmp_path / "same")
    peft_hotswap.hotswap_adapter(model, tmp_path / "same", "default")
    assert relative(model(x), smaller(x)) < BOUND
    for other in (settings("input"), settings(eps=1e-3), settings("input", 0.0)):
        with pytest.raises(ValueError, match="Configs are incompatible"):
            peft_hotswap.check_hotswap_configs_compatible(settings(), other)
        with pytest.raises(ValueError, match=r"the new adapter must have side='output' and eps=0\.0001"):
            hotswap.hotswap_with_hra(None)(model, {}, "default", other)


def test_scales_and_weighted_adapters():
    model, x = both_sides(), inputs()
    layer = model.base_model.model.square
    with pytest.raises(ValueError, match="its scales are 0 and 1"):
        layer.set_scale("default", 0.5)
    layer.set_scale("default", 0)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.set_scale("default", 1)
    with pytest.raises(ValueError, match="has eps"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "new")
    for name, side in (("a", "output"), ("b", "output"), ("c", "input")):
        seeded(lambda name=name, side=side: model.add_adapter(name, settings(side, 0.0)), ord(name))
    with pytest.raises(ValueError, match="on one side"):
        model.base_model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new")
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, -1.0], "new")
    model.set_adapter("new")
    q = [authors_q(layer.hra_u[name], 0.0) for name in ("a", "b")]
    exact = (x.double() @ layer.base_layer.weight.double().T) @ q[0] @ q[1].T + layer.base_layer.bias
    assert relative(layer(x), exact) < BOUND
    model.set_adapter("a")
    y, once = layer(x), nn.functional.linear(x, layer.base_layer.weight)
    layer.set_scale("a", 0.5)  # twice the half is the whole
    v, t = ops.wy_factor(layer.chain(["a"])[0][0])
    half = dense(v, t)
    assert relative(once @ half @ half + layer.base_layer.bias, y) < 8 * BOUND


def test_deleting():
    model = both_sides()
    model.delete_adapter("default")
    layer = model.base_model.model.square
    assert set(layer.hra_side) == set(layer.hra_eps) == set(layer.hra_u) == {"inside", "out"}
    model.add_adapter("default", settings("input", 0.0))
    assert layer.hra_u["default"].shape == (16, 4)


def test_the_base_layers_bits_where_disabled():
    model, x = adapt(), inputs()
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))


@pytest.mark.parametrize("name", quantized_layers.formats(quantized_layers.FORMATS))
def test_quantized(name, tmp_path):
    """Whatever the format: the output of the layer as it is, reflected; gradients; and the merge, undone to the bit."""
    base = quantized_layers.FORMATS[name][1]()
    model = quantized_layers.alone(name)
    model = seeded(lambda: get_peft_model(model, settings(target_modules=["0"])), 1)
    shorten(model)
    layer = model.base_model.model[0]
    x = quantized_layers.inputs(6)
    q, bias = authors_q(layer.hra_u["default"], EPS), base.bias.detach().double()
    plain = base(x).detach().double()
    exact = (plain - bias) @ q + bias
    y = layer(x)
    assert relative(y, exact) < rounding(quantized_layers.IN, 4) and relative(plain, exact) > 0.01
    y.square().sum().backward()
    assert layer.hra_u["default"].grad.isfinite().all() and layer.hra_u["default"].grad.any()
    if layer.why_not_mergeable():
        with pytest.raises(NotImplementedError, match="must be readable to export side='output'"):
            hra_kernels.peft.export_lora(model, tmp_path)
        return
    a, b = lora_factors(layer, ["default"])
    update = (q.T - torch.eye(len(q))) @ quantized_layers.dequantize(layer.base_layer)
    assert relative(b @ a, update) < rounding(quantized_layers.IN, 4)
    before = quantized_layers.snapshot(layer.base_layer)
    layer.merge()
    assert relative(layer(x), exact) < 0.2 < relative(plain, exact)  # quantized again: as coarse as it was
    layer.unmerge()
    quantized_layers.same_bits(layer.base_layer, before)


def test_offloaded_base_layer():
    """Its bias is on no device between two forwards."""
    model, x = adapt(), inputs()
    y = model(x)
    accelerate.cpu_offload(model.base_model.model, execution_device="cpu")
    assert model.base_model.model.square.base_layer.bias.is_meta
    assert torch.equal(model(x), y)


def test_nested_tensors_of_an_encoder():
    """`nn.TransformerEncoder` makes them of padded batches."""
    encoder = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)).eval()
    model = adapt(encoder, settings(target_modules=["linear1", "linear2"])).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        model.merge_adapter()
        assert relative(y[~padding], model(x, src_key_padding_mask=padding)[~padding]) < BOUND


def test_transformers_files(tmp_path):
    """Of a transformers model with adapters of its own; PEFT's own layers refuse these files there too."""
    settings_of_model = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    base = seeded(lambda: LlamaForCausalLM(settings_of_model)).eval()
    model = adapt(copy.deepcopy(base), settings(target_modules=["q_proj", "v_proj"])).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with hra_kernels.peft.disabled(), pytest.raises(RuntimeError, match="mismatch"):
        copy.deepcopy(base).load_adapter(str(tmp_path))


@pytest.mark.slow
def test_graphs():
    """torch.compile, torch.export and torch.jit.trace, with both sides at once."""
    model, x = both_sides().eval(), inputs()
    model.base_model.set_adapter(["default", "inside"])
    y = model(x)
    assert relative(torch.compile(model, backend="aot_eager")(x), y) < BOUND
    assert relative(torch.export.export(model, (x,)).module()(x), y) < BOUND
    assert relative(torch.jit.trace(model, x)(x), y) < BOUND


def test_outputs_that_are_no_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = get_peft_model(nn.Sequential(Pair(4, 4)), settings(target_modules=["0"]))
    with pytest.raises(NotImplementedError, match=r"must return a tensor \(..., 4\), got tuple"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.Embedding(10, 4)], ids=["conv", "embedding"])
def test_other_layers(module):
    """They have eps, and no output side."""
    model = nn.Sequential(copy.deepcopy(module))
    with pytest.raises(NotImplementedError, match=r"supports side in \('input',\), got 'output'"):
        get_peft_model(model, settings(target_modules=["0"]))
    model = get_peft_model(nn.Sequential(copy.deepcopy(module)), settings("input", target_modules=["0"]))
    layer = model.base_model.model[0]
    u = layer.hra_u["default"]
    with torch.no_grad():
        u.copy_(u / u.norm(dim=0) * EPS**0.5)
    x = torch.randn(2, 3, 5, 5) if isinstance(module, nn.Conv2d) else torch.tensor([[1, 2, 3]])
    plain = copy.deepcopy(module).double()
    rows = plain.weight.detach().flatten(1) @ authors_q(u, EPS)
    plain.weight.data = rows.reshape(plain.weight.shape)
    exact = plain(x.double() if x.is_floating_point() else x)
    assert relative(model(x), exact) < rounding(27, 4)
    layer.merge()
    assert relative(layer.base_layer(x), exact) < rounding(27, 4)


def test_bad_configurations():
    with pytest.raises(ValueError, match="side must be one of"):
        HRAConfig(side="both")
    with pytest.raises(ValueError, match="eps must be a finite number"):
        HRAConfig(eps=-1e-4)
    with pytest.raises(ValueError, match="eps must be 0 with Gram-Schmidt"):
        HRAConfig(apply_GS=True, eps=EPS)
    with pytest.raises(ValueError, match="target_parameters have side"):
        HRAConfig(target_parameters=["experts"], side="output")


def test_releases_that_hand_over_fields(monkeypatch):
    """PEFT 0.19 does, and not ours: no adapter is built without what was asked for."""
    monkeypatch.setattr(peft_model, "_LAYERS_TAKE_CONFIG", False)
    for one in (settings(), settings("output", 0.0), settings("input")):
        with pytest.raises(ValueError, match=r"PEFT 0\.19 has no room for side and eps"):
            get_peft_model(net(), one)
