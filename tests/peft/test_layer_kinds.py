"""Every kind of base layer: forward, gradients, merge, unmerge, files and LoRA export against dense float64."""

import pytest
import torch
import torch.nn.functional as F
from peft import HRAConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import hra_kernels.peft
from hra_kernels.peft.export import export_lora, lora_factors, lora_state, truncated_factors
from hra_kernels.reference import explicit_chain
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import PadsItself, adapt, layer_of, seeded

FLOAT32 = rounding(64, 6, layers=2)


def ids(*shape):
    return seeded(lambda: torch.randint(0, 11, shape), 3)


def normal(*shape):
    return seeded(lambda: torch.randn(shape), 3)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    embed_scale = 3.0

    def forward(self, tokens):
        return self.embed_scale * super().forward(tokens)


class Causal(nn.Conv1d):
    """Pads in its own forward."""

    def forward(self, x):
        return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias, self.stride)


class PadsInConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


GEOMETRIES = [
    {"kernel_size": (1, 4)},
    {"kernel_size": (5, 2), "stride": (2, 1)},
    {"kernel_size": 3, "padding": (2, 1)},
    {"kernel_size": (3, 5), "stride": 2, "padding": (0, 2)},
    {"kernel_size": 3, "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 5), "padding": "same"},
    {"kernel_size": (2, 5), "padding": "valid"},
    *(
        {"kernel_size": (5, 3), "padding": padding, "padding_mode": mode}
        for mode in ("reflect", "circular", "replicate")
        for padding in ((2, 1), "same")
    ),
]
KINDS = {
    "Linear": (lambda: nn.Linear(12, 20), normal(3, 5, 12)),
    "Conv1D": (lambda: Conv1D(20, 12), normal(3, 5, 12)),
    "Embedding": (lambda: nn.Embedding(11, 12), ids(3, 5)),
    "Embedding, one row": (lambda: nn.Embedding(11, 12), ids(4)),
    "Embedding, padding": (lambda: nn.Embedding(11, 12, padding_idx=2), ids(3, 5)),
    "Embedding, scaled": (lambda: ScaledEmbedding(11, 12), ids(3, 5)),
    "Conv1d": (lambda: nn.Conv1d(3, 8, 5), normal(2, 3, 17)),
    "Conv1d, strided": (lambda: nn.Conv1d(3, 8, 4, stride=3, padding=2, dilation=2, bias=False), normal(2, 3, 17)),
    "Conv1d, same": (lambda: nn.Conv1d(3, 8, 4, padding="same", padding_mode="reflect"), normal(2, 3, 17)),
    "Conv1d, circular": (lambda: nn.Conv1d(3, 8, 3, padding=2, padding_mode="circular"), normal(2, 3, 17)),
    "Conv1d, unbatched": (lambda: nn.Conv1d(3, 8, 5), normal(3, 17)),
    "Conv1d, own forward": (lambda: Causal(3, 8, 3), normal(2, 3, 17)),
    "Conv2d": (lambda: nn.Conv2d(3, 8, (3, 2)), normal(2, 3, 7, 6)),
    "Conv2d, unbatched": (lambda: nn.Conv2d(3, 8, 3, padding=1), normal(3, 7, 7)),
    "Conv2d, channels last": (lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), normal(2, 3, 7, 6)),
    "Conv2d, own forward": (lambda: PadsItself(3, 8, 3, stride=2), normal(2, 3, 8, 8)),
    "Conv2d, own _conv_forward": (lambda: PadsInConvForward(3, 8, 3, stride=2), normal(2, 3, 8, 8)),
    **{
        f"Conv2d, {geometry}": (lambda geometry=geometry: nn.Conv2d(3, 8, **geometry), normal(2, 3, 11, 9))
        for geometry in GEOMETRIES
    },
    "Conv3d": (lambda: nn.Conv3d(2, 6, (2, 3, 1)), normal(2, 2, 5, 6, 4)),
    "Conv3d, strided": (
        lambda: nn.Conv3d(2, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1)),
        normal(2, 2, 5, 6, 4),
    ),
    "Conv3d, replicate": (
        lambda: nn.Conv3d(2, 6, 2, padding=(1, 0, 1), padding_mode="replicate"),
        normal(2, 2, 4, 3, 5),
    ),
    "Conv3d, unbatched": (lambda: nn.Conv3d(2, 6, 2), normal(2, 4, 3, 5)),
}
PLAIN = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")


def dense(base, x, u, apply_gs=False):
    """The layer with W Q as its weight, in float64, differentiable in x and u."""
    weight = base.weight.detach().double()
    if isinstance(base, Conv1D):
        merged = (weight.T @ explicit_chain(u, apply_gs)).T
    else:
        merged = (weight.flatten(1) @ explicit_chain(u, apply_gs)).reshape(weight.shape)
    others = {name: p.detach().double() for name, p in base.named_parameters() if name != "weight"}
    return functional_call(base, {"weight": merged, **others}, (x,)), merged


def build(kind, dtype=torch.float32, **settings):
    make, x = KINDS[kind]
    base = seeded(make).to(dtype)
    return base, layer_of(base, **settings), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind, apply_gs):
    base, layer, x = build(kind, apply_GS=apply_gs, r=3)
    u = layer.hra_u["default"]
    x.requires_grad_(x.is_floating_point())
    y = layer(x)
    exact_x = x.detach().double().requires_grad_() if x.is_floating_point() else x
    exact_u = u.detach().double().requires_grad_()
    exact, _ = dense(base, exact_x, exact_u, apply_gs)
    assert y.shape == exact.shape and relative(y, exact) < FLOAT32
    assert relative(base(x), exact) > 0.1  # the adapter does something
    dy = torch.randn_like(exact)
    inputs = [u, x] if x.is_floating_point() else [u]
    exact_inputs = [exact_u, exact_x] if x.is_floating_point() else [exact_u]
    grads = torch.autograd.grad(y, inputs, dy.float())
    for got, expected in zip(grads, torch.autograd.grad(exact, exact_inputs, dy), strict=True):
        assert relative(got, expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind, dtype):
    base, layer, x = build(kind, dtype)
    y = layer(x)
    _, merged = dense(base, x.double() if x.is_floating_point() else x, layer.hra_u["default"].detach().double())
    layer.merge()
    assert layer.weight.dtype == dtype and layer.weight.stride() == base.weight.stride()
    assert relative(layer.weight, merged) < rounding(64, 6, dtype)
    assert relative(layer(x), y) < rounding(64, 6, dtype, layers=2)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert torch.equal(layer.weight, base.weight) and torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", PLAIN)
def test_starts_as_the_base_layer_and_switches_off(kind):
    base, layer, x = build(kind, init_weights=True)
    assert torch.equal(layer(x), base(x))
    _, layer, x = build(kind)
    assert not torch.equal(layer(x), base(x))
    layer.set_adapter([])
    assert torch.equal(layer(x), base(x))
    layer.set_adapter(["default"])
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))


SMALL = {
    "Linear": (1, 2), "Conv1D": (1, 1), "Embedding": (1, 1), "Conv1d": (1, 3, 6), "Conv2d": (1, 3, 3, 3),
    "Conv3d": (1, 2, 2, 3, 2),
}  # fmt: skip


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_float64_gradcheck(kind, apply_gs):
    _, layer, x = build(kind, torch.float64, r=2, apply_GS=apply_gs)
    layer.double()
    u = layer.hra_u["default"].detach().clone().requires_grad_()
    x = x[tuple(slice(size) for size in SMALL[kind])].clone()
    x.requires_grad_(x.is_floating_point())

    def run(u, x):
        return functional_call(layer, {"hra_u.default": u}, (x,))

    assert torch.autograd.gradcheck(run, (u, x)) and torch.autograd.gradgradcheck(run, (u, x))


@pytest.mark.parametrize("kind", ["Conv2d, own forward", "Conv2d, own _conv_forward"])
def test_own_forward_runs_once(kind):
    _, layer, x = build(kind)
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert calls == [1]


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding", "Conv3d"])
def test_compile(kind):
    _, layer, x = build(kind)
    torch._dynamo.reset()
    assert relative(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < FLOAT32


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("order", [["default", "b"], ["b", "default"]])
def test_two_adapters(kind, order):
    """W Q_1 Q_2 in the order in which they are active; merged one by one as well as together."""
    base, _, x = build(kind)
    model = adapt(nn.Sequential(base), targets=["0"])
    with hra_kernels.peft.enabled():
        model.add_adapter("b", HRAConfig(r=2, init_weights=False, target_modules=["0"], apply_GS=True))
    layer = model.base_model.model[0]
    model.base_model.set_adapter(order)
    y = model(x)
    wide = x.double() if x.is_floating_point() else x
    step = build(kind)[0].double()
    for name in order:
        exact, merged = dense(step, wide, layer.hra_u[name].detach().double(), name == "b")
        step.weight.data = merged
    assert relative(y, exact) < FLOAT32
    model.merge_adapter(order[:1])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(order)
    assert relative(model(x), exact) < FLOAT32
    model.unmerge_adapter()
    assert torch.equal(layer.weight, base.weight)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.mix = nn.Conv1d(12, 10, 3, padding=1)
        self.project = Conv1D(24, 10)
        self.volume = nn.Conv3d(3, 4, (1, 2, 2))
        self.head = nn.Linear(12, 3)

    def forward(self, tokens):
        x = self.mix(self.words(tokens).mT).mT.contiguous()
        x = self.project(torch.tanh(x))  # (B, L, 24)
        x = self.volume(x.reshape(len(x), -1, 3, 2, 4).transpose(1, 2))
        return self.head(torch.tanh(x.transpose(1, 2).flatten(2)))


TARGETS = ["words", "mix", "project", "volume", "head"]


def test_files_through_peft(tmp_path):
    base, tokens = seeded(Everything), ids(2, 6)
    model = adapt(base, targets=TARGETS)
    y = model(tokens)
    assert relative(base(tokens), y) > 0.1
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    state = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {"words": (12, 4), "mix": (36, 4), "project": (10, 4), "volume": (12, 4), "head": (12, 4)}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        f"base_model.model.{name}.hra_u": shape for name, shape in shapes.items()
    }
    with hra_kernels.peft.enabled():
        loaded = PeftModel.from_pretrained(seeded(Everything), str(tmp_path))
        empty = PeftModel.from_pretrained(seeded(Everything), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(loaded(tokens), y) and torch.equal(empty(tokens), y)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert relative(merged(tokens), y) < FLOAT32


def refused(kind, base):
    """PEFT's LoRA convolutions drop dilation and padding modes, and know no forward of the base layer's own."""
    dilated = any(step != 1 for step in getattr(base, "dilation", ()))
    return dilated or getattr(base, "padding_mode", "zeros") != "zeros" or "own" in kind


@pytest.mark.parametrize("kind", KINDS)
def test_export_by_kind(kind):
    base, layer, x = build(kind, r=3)
    model = adapt(nn.Sequential(base), targets=["0"], r=3).eval()
    if refused(kind, base):
        with pytest.raises(NotImplementedError, match=r"layer '0'.*cannot be exported: PEFT's LoRA layer .*Merge"):
            lora_state(model)
        return
    config, state = lora_state(model)
    lora = get_peft_model(nn.Sequential(base), config).eval()
    set_peft_model_state_dict(lora, state)
    assert relative(lora(x), layer(x)) < FLOAT32


def test_truncated_convolution():
    """PEFT's convert_to_lora of a convolution at a lower rank is the best one."""
    _, layer, _ = build("Conv1d")
    a, b = lora_factors(layer, ["default"])
    exact = (b.flatten(1) @ a.flatten(1)).double()
    a, b = truncated_factors(a, b, 2)
    assert a.shape == (2, 3, 5) and b.shape == (8, 2, 1)
    error = torch.linalg.matrix_norm((b.flatten(1) @ a.flatten(1)).double() - exact)
    assert error.item() == pytest.approx(torch.linalg.svdvals(exact)[2:].norm().item(), rel=FLOAT32)


def gpt2():
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=12)
    return seeded(lambda: GPT2LMHeadModel(config)).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_proj", "wpe"], None])
def test_gpt2(tmp_path, targets):
    """The model that Conv1D is for, by PEFT's own choice of modules too; files, merge, LoRA."""
    if targets is None and "gpt2" not in TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING:
        pytest.skip("this PEFT names no HRA modules for GPT-2")
    tokens = ids(2, 7)
    plain = gpt2()(tokens).logits
    settings = {"r": 4, "init_weights": False, "task_type": "CAUSAL_LM", "target_modules": targets}
    with hra_kernels.peft.enabled():
        model = seeded(lambda: get_peft_model(gpt2(), HRAConfig(**settings)), 1).eval()
        y = model(tokens).logits
        assert relative(plain, y) > 0.01
        model.save_pretrained(str(tmp_path / "hra"))
        export_lora(model, tmp_path / "lora")
        loaded = PeftModel.from_pretrained(gpt2(), str(tmp_path / "hra")).eval()
    assert torch.equal(loaded(tokens).logits, y)
    lora = PeftModel.from_pretrained(gpt2(), str(tmp_path / "lora")).eval()
    assert relative(lora(tokens).logits, y) < FLOAT32
    assert relative(model.merge_and_unload()(tokens).logits, y) < FLOAT32


UNSUPPORTED = {
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(3, 4, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(3, 4, 3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(11, 12),
    "LayerNorm": lambda: nn.LayerNorm(12),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_layer_is_a_clear_error(kind):
    with pytest.raises(TypeError, match=rf"{kind}\(.*not supported. Currently, HRA supports torch.nn.Linear, Conv1d"):
        layer_of(UNSUPPORTED[kind]())


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_groups(kind):
    with pytest.raises(NotImplementedError, match=rf"{kind.__name__} layers with groups > 1 \(got groups=3\)"):
        layer_of(kind(3, 6, 3, groups=3))


@pytest.mark.parametrize("kind", PLAIN)
def test_rank_must_be_positive(kind):
    with pytest.raises(ValueError, match="positive integer value but the value passed is 0"):
        layer_of(KINDS[kind][0](), r=0)
