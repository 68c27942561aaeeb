"""HRA exported as LoRA: the same outputs through PEFT's own LoRA layers, from files, for every kind of layer."""

import pytest
import torch
from peft import HRAConfig, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import hra_kernels.peft
from hra_kernels import cli
from hra_kernels.peft.export import export_lora, lora_factors, lora_state, truncated_factors
from hra_kernels.testing.tolerance import rounding

FLOAT32 = rounding(48, 7, layers=5)


@pytest.fixture(autouse=True)
def tuner_on():
    with hra_kernels.peft.enabled():
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.first = nn.Linear(6, 20)
        self.second = nn.Linear(20, 5, bias=False)

    def forward(self, x):
        return self.second(self.first(self.conv(x).mean((2, 3))).tanh())


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def trained(model):
    """Adapters away from their initialization, other weights too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hra_" in name or parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def config(**options):
    return HRAConfig(**{"r": 4, "target_modules": ["conv", "first", "second"], "init_weights": False, **options})


@pytest.mark.parametrize("options", [{}, {"r": 3}, {"apply_GS": True}, {"r": 32}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_agree_through_peft_lora(tmp_path, dtype, options):
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    model = trained(get_peft_model(base(dtype), config(**options), autocast_adapter_dtype=False))
    y = model(x)
    export_lora(model, tmp_path)
    with torch.no_grad():
        lora = PeftModel.from_pretrained(base(dtype), tmp_path, autocast_adapter_dtype=False).eval()
        assert isinstance(lora.peft_config["default"], LoraConfig)
        error = (lora(x) - y).abs().max() / y.abs().max()
    assert error < rounding(48, options.get("r", 4), dtype, layers=3)
    assert (y - base(dtype)(x)).abs().max() > 0.1 * y.abs().max()  # the adapter does something


def test_several_adapters_become_one_of_summed_rank(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    model = get_peft_model(base(), config())
    model.add_adapter("other", config(r=3, target_modules=["first"], apply_GS=True))
    trained(model).base_model.set_adapter(["default", "other"])
    y = model(x)
    written = export_lora(model, tmp_path)
    assert written.r == 7 and written.rank_pattern == {"conv": 4, "second": 4}
    lora = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(lora(x), y, rtol=FLOAT32, atol=FLOAT32)


def test_biases_and_saved_modules_come_along(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    model = trained(
        get_peft_model(base(), config(target_modules=["conv", "first"], bias="hra_only", modules_to_save=["second"]))
    )
    export_lora(model, tmp_path)
    torch.testing.assert_close(
        PeftModel.from_pretrained(base(), tmp_path).eval()(x), model(x), rtol=FLOAT32, atol=FLOAT32
    )


def test_nothing_is_lost_beyond_the_rank():
    layer = trained(get_peft_model(base(), config(target_modules=["first"]))).base_model.model.first
    a, b = lora_factors(layer, ["default"])
    weight = layer.base_layer.weight.double()
    exact = (weight @ layer.get_delta_weight("default").double() - weight).detach()
    assert (b.double() @ a.double() - exact).abs().max() < FLOAT32 * exact.abs().max()
    a, b = truncated_factors(a, b, 3)
    assert torch.linalg.matrix_norm(b.double() @ a.double() - exact).item() == pytest.approx(
        torch.linalg.svdvals(exact)[3:].norm().item(), rel=FLOAT32
    )


def test_peft_converts_exactly():
    lora = pytest.importorskip("peft.tuners.lora.conversion")
    x = torch.randn(4, 6)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 5))
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    model = trained(get_peft_model(net, HRAConfig(r=4, target_modules=["0", "2"], init_weights=False)))
    y = model(x)
    for rank in (4, 16, 1.0):
        converted_config, tensors = lora.convert_to_lora(model, rank=rank)
        fresh = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 5))
        fresh.load_state_dict(state)
        converted = get_peft_model(fresh, converted_config).eval()
        set_peft_model_state_dict(converted, tensors)
        torch.testing.assert_close(converted(x), y, rtol=FLOAT32, atol=FLOAT32)


def test_errors(tmp_path):
    model = trained(get_peft_model(base(), config()))
    with pytest.raises(ValueError, match=r"adapters must be among \['default'\], got \['missing'\]"):
        lora_state(model, ["missing"])
    with pytest.raises(TypeError, match=r"model must be a PeftModel, or a model with adapters .*, got Net"):
        lora_state(base())
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        export_lora(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model.unmerge_adapter()
    model.base_model.model.first.hra_u["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match=r"first.*hra_u of adapter 'default' must be finite"):
        export_lora(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with hra_kernels.peft.enabled():
        hra_kernels.peft.disable()
        stock = get_peft_model(base(), config(target_modules=["first"]))
        hra_kernels.peft.enable()
    with pytest.raises(TypeError, match=r"call hra_kernels\.peft\.enable\(\) before loading"):
        lora_state(stock)


def test_command_line(tmp_path, capsys):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **settings))
    bert.save_pretrained(tmp_path / "base")
    tuned = HRAConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS", init_weights=False)
    model = trained(get_peft_model(bert, tuned))
    model.save_pretrained(str(tmp_path / "hra"))
    arguments = ["export", str(tmp_path / "hra"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "lora")]
    assert cli.main(arguments) == 0
    assert "LoRA of rank 4 over 5 layers" in capsys.readouterr().out
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = PeftModel.from_pretrained(fresh, str(tmp_path / "lora")).eval()
    tokens = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(lora(tokens).logits, model(tokens).logits, rtol=FLOAT32, atol=FLOAT32)
    assert cli.main(["export", str(tmp_path / "lora"), "--out", str(tmp_path / "again")]) == 2
    assert "must be an HRA adapter, it is" in capsys.readouterr().err
