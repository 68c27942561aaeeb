"""Quantized base layers, run for real: bitsandbytes, HQQ, torchao and GPTQ, against the dequantized weight in float64.

Each format runs where its package is installed. GPTQ's (`gptqmodel`) asks for a PyTorch of its own, so CI skips it.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import HRAConfig, PeftModel, get_peft_model
from torch import nn

import hra_kernels.peft
from hra_kernels.peft.base_weight import quantization_of
from hra_kernels.peft.export import export_lora, lora_factors
from hra_kernels.reference import explicit_chain
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import dense_q, layer_of, seeded
from tests.peft.quantized_layers import (
    FORMATS,
    IN,
    MERGEABLE,
    OUT,
    alone,
    base_linear,
    build,
    dequantize,
    formats,
    hqq,
    inputs,
    needs,
    same_bits,
    snapshot,
    torchao,
    torchao_config,
)

pytest.importorskip("peft.utils.quantization_utils", reason="PEFT 0.19 has no quantization backends")
FLOAT32 = rounding(IN, 4)
EIGHT_BITS = 8 / 127 / 12**0.5
"""Activations rounded in steps of 1 / 127 of a row's largest err by steps / sqrt(12), and so does y beside its largest;
8 standard deviations of that, as in `rounding`."""

each_format = pytest.mark.parametrize("name", formats(FORMATS))
each_mergeable = pytest.mark.parametrize("name", formats(MERGEABLE))


@each_format
@pytest.mark.parametrize("shape", [(9,), (2, 5)])
def test_forward_and_gradients(name, shape):
    base, _, layer = build(name)
    base.train(), layer.train()
    weight, u = dequantize(base), layer.hra_u["default"]
    assert u.shape == (IN, 4) and u.dtype == torch.float32
    x = inputs(*shape).requires_grad_()
    y = layer(x)
    exact_x, exact_u = x.detach().double().requires_grad_(), u.detach().double().requires_grad_()
    exact = F.linear(exact_x, weight @ explicit_chain(exact_u), base.bias.detach().double())
    assert y.dtype == torch.float32 and y.shape == exact.shape
    assert relative(y, exact) < FLOAT32
    dy = torch.randn_like(exact)
    got = torch.autograd.grad(y, [u, x], dy.float())
    for one, expected in zip(got, torch.autograd.grad(exact, [exact_u, exact_x], dy), strict=True):
        assert relative(one, expected) < FLOAT32
    assert relative(base(x), exact) > 0.1  # the adapter does something


@each_format
def test_inference(name):
    """In evaluation mode bitsandbytes rounds activations to 8 bits, or repacks 4-bit weights with 16-bit scales."""
    base, _, layer = build(name)
    base.eval(), layer.eval()
    weight, q = dequantize(base), dense_q(layer.hra_u["default"])
    x = inputs(9)
    with torch.no_grad():
        reflected = x.double() @ q.T
        own = relative(base(reflected.float()), F.linear(reflected, weight, base.bias.double()))
        y = layer(x)
    assert own < EIGHT_BITS
    assert relative(y, F.linear(x.double(), weight @ q, base.bias.double())) < 2 * own + FLOAT32


@each_format
def test_training_after_inference(name):
    """bitsandbytes' packing for inference on a CPU has no gradient: it is undone when training goes on."""
    _, _, layer = build(name)
    x = inputs(9)
    layer.train()
    before = torch.autograd.grad(layer(x).square().sum(), layer.hra_u["default"])[0]
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    after = torch.autograd.grad(layer(x).square().sum(), layer.hra_u["default"])[0]
    assert relative(after, before) < (
        EIGHT_BITS if "nf4" in name or "fp4" in name else FLOAT32
    )  # scales of 16 bits by then


@each_format
def test_mixed_batch(name):
    """Each sample with its adapter or with none, bit for bit; with a gradient, also after inference."""
    _, model, layer = build(name)
    model.add_adapter("b", HRAConfig(r=3, init_weights=False, target_modules=["0"]))
    layer.eval()
    x, names = inputs(4, 5), ["b", "__base__", "default", "b"]
    with torch.no_grad():
        y = layer(x, adapter_names=names)
        assert torch.equal(y[1], layer.base_layer(x)[1])
        singles = {}
        for adapter in ("b", "default"):
            layer.set_adapter(adapter)
            singles[adapter] = layer(x)
    assert relative(y[2], singles["default"][2]) < EIGHT_BITS and relative(y[[0, 3]], singles["b"][[0, 3]]) < EIGHT_BITS
    assert relative(y[[0, 3]], singles["default"][[0, 3]]) > 0.1
    dy = torch.randn(4, 5, OUT)
    (got,) = torch.autograd.grad(layer(x, adapter_names=names), layer.hra_u["default"], dy)
    (expected,) = torch.autograd.grad(layer(x[2]), layer.hra_u["default"], dy[2])
    assert relative(got, expected) < EIGHT_BITS


CASTS = {name: FORMATS[name] for name in FORMATS if name.startswith(("bitsandbytes", "GPTQ"))}


@pytest.mark.parametrize("name", formats(CASTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(name, dtype):
    """Formats that take inputs of any dtype; the result has it too."""
    base, _, layer = build(name)
    base.train(), layer.train()
    x = inputs(9).to(dtype)
    exact = F.linear(x.double(), dequantize(base) @ dense_q(layer.hra_u["default"]), base.bias.double())
    y = layer(x)
    assert y.dtype == dtype and relative(y, exact) < rounding(IN, 4, torch.bfloat16)


BFLOAT16 = {
    "HQQ 4-bit": ("hqq", lambda: hqq(4, torch.bfloat16)),
    "torchao int8": ("torchao", lambda: torchao("Int8WeightOnlyConfig", torch.bfloat16)),
}


@pytest.mark.parametrize("name", formats(BFLOAT16))
def test_quantized_from_bfloat16(name):
    """Formats whose inputs have the dtype that was quantized; torchao's says so, and other inputs are cast to it."""
    base = BFLOAT16[name][1]()
    with hra_kernels.peft.enabled():
        config = HRAConfig(r=4, init_weights=False, target_modules=["0"])
        layer = get_peft_model(nn.Sequential(BFLOAT16[name][1]()), config).base_model.model[0]
    x = inputs(9).bfloat16().requires_grad_()
    y = layer(x)
    exact = F.linear(x.double(), dequantize(base) @ dense_q(layer.hra_u["default"]), base.bias.double())
    assert y.dtype == torch.bfloat16 and relative(y, exact) < rounding(IN, 4, torch.bfloat16)
    y.sum().backward()
    assert layer.hra_u["default"].grad.dtype == torch.float32 and layer.hra_u["default"].grad.abs().max() > 0
    if name.startswith("torchao"):
        y = layer(inputs(9))
        assert y.dtype == torch.float32 and relative(y, exact) < rounding(IN, 4, torch.bfloat16)
    else:
        layer.merge()
        assert layer.base_layer.compute_dtype == torch.bfloat16 and relative(layer(x), exact) < 0.2


# --- merging ----------------------------------------------------------------------------------------------------------


def effective(module):
    """The weight (N, D) that a layer's own forward applies, whatever it stores."""
    with torch.no_grad():
        return (module(torch.eye(IN)) - module(torch.zeros(1, IN))).T.double()


def distance(one, other):
    return (torch.linalg.matrix_norm(one - other) / torch.linalg.matrix_norm(other)).item()


@each_mergeable
@pytest.mark.parametrize("used", ["new", "after training", "after inference"])
def test_merge_and_unmerge(name, used):
    """What is merged is W Q, quantized no worse than W was; what is unmerged is bit for bit what was there."""
    base, model, layer = build(name)
    exact = dequantize(base) @ dense_q(layer.hra_u["default"])
    once = distance(dequantize(base), base_linear().weight.double())
    x, kind = inputs(9), type(layer.base_layer)
    if used == "after training":
        layer.train()
        layer(x).sum().backward()
    layer.eval()
    with torch.no_grad():
        if used == "after inference":
            layer(x)
        before = snapshot(layer.base_layer)
        model.merge_adapter()
        assert layer.merged and type(layer.base_layer) is kind
        assert distance(effective(layer.base_layer), exact) < 1.2 * once + 0.003
        assert torch.equal(layer(x), layer.base_layer(x))
        model.unmerge_adapter()
    same_bits(layer.base_layer, before)
    assert not layer.merged


@each_mergeable
def test_merge_several_then_unmerge(name):
    """The second adapter joins at the original weight: quantized once, for both."""
    base, model, layer = build(name)
    with hra_kernels.peft.enabled():
        model.add_adapter("b", HRAConfig(r=2, init_weights=False, target_modules=["0"]))
    exact = dequantize(base) @ dense_q(layer.hra_u["default"]) @ dense_q(layer.hra_u["b"])
    before = snapshot(layer.base_layer)
    model.merge_adapter(["default"])
    first = effective(layer.base_layer)
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["default", "b"])
    once = distance(dequantize(base), base_linear().weight.double())
    assert distance(effective(layer.base_layer), exact) < 1.2 * once + 0.003
    assert distance(first, exact) > 0.1
    model.unmerge_adapter()
    with torch.no_grad():
        y = layer.base_layer(inputs(9))
    if "bitsandbytes" not in name:
        same_bits(layer.base_layer, before)
    assert relative(y, FORMATS[name][1]()(inputs(9))) < EIGHT_BITS


@each_mergeable
@pytest.mark.parametrize("how", ["raises", "gives NaN"])
def test_failed_merge_changes_nothing(name, how, monkeypatch):
    """Whatever goes wrong while PEFT writes the new weight, and after it has."""
    _, model, layer = build(name)
    before, x = snapshot(layer.base_layer), inputs(9)
    y = layer(x)
    backend = type(quantization_of(layer.get_base_layer()))
    write, read = backend.set_base_weight, backend.get_base_weight

    def failing(self, peft_layer, rows):
        write(self, peft_layer, rows)
        if how == "raises":
            raise RuntimeError("no memory left")
        monkeypatch.setattr(backend, "get_base_weight", lambda self, base: read(self, base) * float("nan"))

    monkeypatch.setattr(backend, "set_base_weight", failing)
    with pytest.raises(*((RuntimeError, "no memory") if how == "raises" else (ValueError, "must be finite after"))[:1]):
        model.merge_adapter()
    monkeypatch.undo()
    assert not layer.merged and layer.merged_adapters == []
    same_bits(layer.base_layer, before)
    assert torch.equal(layer(x), y)
    model.merge_adapter()
    model.unmerge_adapter()
    same_bits(layer.base_layer, before)


@each_mergeable
def test_non_finite_vectors(name):
    _, model, layer = build(name)
    before = snapshot(layer.base_layer)
    with torch.no_grad():
        layer.hra_u["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"hra_u holds NaN or infinity.*'0'.*is unchanged"):
        model.merge_adapter()
    same_bits(layer.base_layer, before)


@each_mergeable
def test_merge_and_unload(name):
    base, model, layer = build(name)
    exact = dequantize(base) @ dense_q(layer.hra_u["default"])
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[0]) is type(base) and torch.equal(merged[0].bias, base.bias)
    once = distance(dequantize(base), base_linear().weight.double())
    assert distance(effective(merged[0]), exact) < 1.2 * once + 0.003


@needs("torchao")
def test_torchao_without_its_configuration():
    layer = layer_of(torchao("Int8WeightOnlyConfig"))
    with pytest.raises(NotImplementedError, match=r"layer '0'.*quantization_config=TorchAoConfig\(\.\.\.\)"):
        layer.merge()


@needs("torchao")
def test_a_forward_without_gradient_is_refused():
    """torchao's 8-bit activations give the input no gradient, and nothing below such a layer would train."""
    layer = layer_of(torchao("Int8DynamicActivationInt8WeightConfig"))
    with pytest.raises(NotImplementedError, match=r"cannot train layer '0'.*no gradient.*Use weight-only"):
        layer(inputs(9))
    with torch.no_grad():
        y = layer(inputs(9))
    exact = F.linear(inputs(9).double(), dequantize(layer.base_layer) @ dense_q(layer.hra_u["default"]))
    assert relative(y - layer.base_layer.bias, exact) < EIGHT_BITS


@needs("gptqmodel")
def test_gptq_is_not_merged():
    _, model, _ = build("GPTQ 4-bit")
    with pytest.raises(NotImplementedError, match=r"layer '0'.*quantized with gptq.*Supported are plain"):
        model.merge_adapter()


class Int8Linear(nn.Linear):
    """A quantized layer that PEFT does not know: integers for a weight, and a forward of its own."""

    def __init__(self, source):
        super().__init__(source.in_features, source.out_features)
        self.scale = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((source.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = source.bias

    def forward(self, x):
        return F.linear(x, (self.weight * self.scale).to(x.dtype), self.bias.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_format_that_peft_does_not_know(dtype):
    base = Int8Linear(base_linear())
    layer = layer_of(base)
    x = inputs(9).to(dtype)
    y = layer(x)
    y.sum().backward()
    dense = (base.weight * base.scale).double() @ dense_q(layer.hra_u["default"])
    exact = F.linear(x.double(), dense, base.bias.double())
    assert y.dtype == dtype and relative(y, exact) < rounding(IN, 4, dtype)
    assert layer.hra_u["default"].grad.abs().max() > 0
    with pytest.raises(NotImplementedError, match=r"cannot merge into layer '0'.*int8.*Supported are plain float32"):
        layer.merge()


# --- files and LoRA ---------------------------------------------------------------------------------------------------


@each_format
def test_files_and_export(name, tmp_path):
    base, model, layer = build(name)
    base.train(), model.train()
    x = inputs(9)
    y = model(x)
    model.save_pretrained(str(tmp_path / "hra"))
    with hra_kernels.peft.enabled():
        loaded = PeftModel.from_pretrained(alone(name), str(tmp_path / "hra")).train()
    assert torch.equal(loaded(x), y)
    a, b = lora_factors(layer, ["default"])
    weight = dequantize(base)
    exact = weight @ dense_q(layer.hra_u["default"]) - weight
    assert relative(b.double() @ a.double(), exact) < FLOAT32
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(alone(name), str(tmp_path / "lora")).train()
    assert relative(lora(x), y) < FLOAT32


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def bnb_config(**options):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


LOADED = {
    "bitsandbytes 8-bit": ("bitsandbytes", lambda: bnb_config(load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda: bnb_config(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torchao int8": ("torchao", lambda: torchao_config("Int8WeightOnlyConfig")),
    "torchao float8": ("torchao", lambda: torchao_config("Float8WeightOnlyConfig")),
}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    seeded(lambda: LlamaForCausalLM(LlamaConfig(**TINY))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", formats(LOADED))
def test_transformers_loads_trains_merges(name, tiny_llama, tmp_path):
    """The whole way: from_pretrained with a quantization_config, training, files, merging, unmerging, LoRA."""
    from transformers import AutoModelForCausalLM

    def load():
        options = {"quantization_config": LOADED[name][1](), "device_map": "cpu", "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tiny_llama, **options)

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with hra_kernels.peft.enabled():
        model = seeded(lambda: get_peft_model(load(), HRAConfig(**settings)), 1).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(str(tmp_path / "hra"))
    export_lora(model, tmp_path / "lora")
    with torch.no_grad():
        y = model(tokens).logits
        with hra_kernels.peft.enabled():
            assert torch.equal(PeftModel.from_pretrained(load(), str(tmp_path / "hra")).eval()(tokens).logits, y)
        lora = PeftModel.from_pretrained(load(), str(tmp_path / "lora")).eval()
        assert relative(lora(tokens).logits, y) < (EIGHT_BITS if "bitsandbytes" in name else FLOAT32)
        quantization = relative(load()(tokens).logits, plain(tokens).logits)
        model.merge_adapter()
        assert relative(model(tokens).logits, y) < 2 * quantization
        model.unmerge_adapter()
        assert torch.equal(model(tokens).logits, y)
        assert relative(model.merge_and_unload()(tokens).logits, y) < 2 * quantization
