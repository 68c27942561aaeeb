"""Quantized linear layers, built for real from one `nn.Linear`, for the tests of adapters over them."""

import importlib.util
import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn

import hra_kernels.peft
from tests.peft.models import linear, seeded

IN, OUT = 128, 64


def base_linear():
    return linear(IN, OUT).requires_grad_(False)


def bnb_8bit():
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one line per call
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(base_linear().state_dict())
    return layer.to("cpu")


def bnb_4bit(**options):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(IN, OUT, **{"compute_dtype": torch.float32, **options})
    layer.load_state_dict(base_linear().state_dict())
    return layer.to("cpu")


def hqq(bits, dtype=torch.float32):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    return HQQLinear(base_linear(), config, compute_dtype=dtype, device="cpu")


def torchao_config(name):
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


def torchao(name, dtype=torch.float32):
    from torchao import quantize_

    layer = base_linear().to(dtype)
    quantize_(layer, torchao_config(name).get_apply_tensor_subclass())
    return layer


def gptq():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    source, group = base_linear(), 32
    blocks = source.weight.detach().reshape(OUT, -1, group)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = (high - low) / 15
    layer = TorchLinear(
        bits=4, group_size=group, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=True
    )
    layer.pack_original(source, scale, torch.round(-low / scale), (torch.arange(IN) // group).to(torch.int32))
    layer.post_init()
    return layer


def dequantize(layer):
    """The weight (N, D) in float64, by each package's own means rather than PEFT's."""
    if hasattr(layer, "W_q"):
        return layer.dequantize().double()
    if hasattr(layer, "qweight"):
        return layer.dequantize_weight().T.double()
    if hasattr(layer, "state"):
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.double() * scale.double()[:, None] / 127
    if getattr(layer.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    return layer.weight.dequantize().double()


def stored(module):
    """Every tensor in which a quantized layer keeps its weight, by name."""
    if hasattr(module, "W_q"):
        meta = {key: value for key, value in module.meta.items() if isinstance(value, torch.Tensor)}
        return {"W_q": module.W_q.data, "bias": module.bias, **meta}
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return {"weight": weight.data, "absmax": weight.quant_state.absmax, "bias": module.bias}
    if hasattr(module, "state"):
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return {"weight": weight.data, "scale": scale, "bias": module.bias}
    names, _ = weight.__tensor_flatten__()
    return {"bias": module.bias, **{name: getattr(weight, name) for name in names}}


def snapshot(module):
    """A copy of them."""
    return {name: tensor.detach().clone() for name, tensor in stored(module).items()}


def same_bits(module, kept):
    """Raise unless they are those of a snapshot."""
    now = stored(module)
    assert now.keys() == kept.keys()
    for name, tensor in now.items():
        bits, before = (one.contiguous().view(torch.uint8) for one in (tensor, kept[name]))
        assert tensor.dtype == kept[name].dtype and torch.equal(bits, before), name


MERGEABLE = {
    "bitsandbytes 8-bit": ("bitsandbytes", bnb_8bit),
    "bitsandbytes nf4": ("bitsandbytes", lambda: bnb_4bit(quant_type="nf4", compress_statistics=False)),
    "bitsandbytes nf4 nested": ("bitsandbytes", lambda: bnb_4bit(quant_type="nf4")),
    "bitsandbytes fp4, bfloat16 storage": ("bitsandbytes", lambda: bnb_4bit(quant_storage=torch.bfloat16)),
    "HQQ 8-bit": ("hqq", lambda: hqq(8)),
    "HQQ 4-bit": ("hqq", lambda: hqq(4)),
    "torchao int8": ("torchao", lambda: torchao("Int8WeightOnlyConfig")),
    "torchao float8": ("torchao", lambda: torchao("Float8WeightOnlyConfig")),
}
FORMATS = {**MERGEABLE, "GPTQ 4-bit": ("gptqmodel", gptq)}


def missing(package):
    """Why tests with this package cannot run, or "" where they can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if package == "torchao" and peft.__version__.startswith("0.20"):
        return "PEFT 0.20 knows no torchao newer than 0.17"
    return ""


def needs(package):
    return pytest.mark.skipif(bool(missing(package)), reason=missing(package))


def formats(which):
    return [pytest.param(name, marks=needs(package)) for name, (package, _) in which.items()]


def alone(name):
    """A model of one layer; torchao's has the configuration where transformers keeps it."""
    model = nn.Sequential(FORMATS[name][1]())
    model.register_parameter("elsewhere", nn.Parameter(torch.zeros(1)))
    if name.startswith("torchao"):
        config = torchao_config({"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}[name.split()[1]])
        model.hf_quantizer = SimpleNamespace(quantization_config=config)
    return model


def build(name, **settings):
    """(base layer, a PeftModel of another such, its adapted layer)."""
    base, model = FORMATS[name][1](), alone(name)
    with hra_kernels.peft.enabled():
        config = HRAConfig(**{"r": 4, "init_weights": False, "target_modules": ["0"], **settings})
        model = seeded(lambda: get_peft_model(model, config), 1)
    return base, model, model.base_model.model[0]


def inputs(*shape):
    return seeded(lambda: torch.randn(*shape, IN), 2)
