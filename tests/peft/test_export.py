"""HRA exported as LoRA: the same outputs through PEFT's own LoRA layers, from files, for every kind of layer."""

import pytest
import torch
from peft import HRAConfig, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

import hra_kernels.peft
from hra_kernels import cli
from hra_kernels.peft.export import export_lora, lora_factors, lora_state, truncated_factors
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Net, adapt, config, images, seeded

pytestmark = pytest.mark.usefixtures("enabled")
FLOAT32 = rounding(96, 7, layers=5)


def trained(model):
    """Other weights that train with an adapter, moved away from their start too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def as_lora(folder, dtype=torch.float32):
    lora = PeftModel.from_pretrained(seeded(Net).to(dtype), folder).eval()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    return lora


@pytest.mark.parametrize("options", [{}, {"r": 3}, {"apply_GS": True}, {"r": 32}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_agree_through_peft_lora(tmp_path, dtype, options):
    base, x = seeded(Net).to(dtype), images(dtype=dtype)
    model = adapt(base, **options)
    export_lora(model, tmp_path)
    assert relative(as_lora(tmp_path, dtype)(x), model(x)) < rounding(96, options.get("r", 4), dtype, layers=3)
    assert relative(base(x), model(x)) > 0.1  # the adapter does something


def test_several_adapters_become_one_of_summed_rank(tmp_path):
    model, x = adapt(seeded(Net)), images()
    model.add_adapter("other", config(r=3, targets=["lin0"], apply_GS=True))
    model.base_model.set_adapter(["default", "other"])
    written = export_lora(model, tmp_path)
    assert written.r == 7 and written.rank_pattern == {"conv": 4, "lin1": 4}
    assert relative(as_lora(tmp_path)(x), model(x)) < FLOAT32


def test_biases_and_saved_modules_come_along(tmp_path):
    model = trained(adapt(seeded(Net), targets=["conv", "lin0"], bias="hra_only", modules_to_save=["lin1"]))
    x = images()
    export_lora(model, tmp_path)
    assert relative(as_lora(tmp_path)(x), model(x)) < FLOAT32


def test_nothing_is_lost_beyond_the_rank():
    layer = adapt(seeded(Net), targets=["lin0"]).base_model.model.lin0
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
    model, x = adapt(seeded(Net), targets=["lin0", "lin1"]), images()
    for rank in (4, 16, 1.0):
        converted_config, tensors = lora.convert_to_lora(model, rank=rank)
        converted = get_peft_model(seeded(Net), converted_config).eval()
        set_peft_model_state_dict(converted, tensors)
        assert relative(converted(x), model(x)) < FLOAT32


def test_errors(tmp_path):
    model = adapt(seeded(Net))
    with pytest.raises(ValueError, match=r"adapters must be among \['default'\], got \['missing'\]"):
        lora_state(model, ["missing"])
    with pytest.raises(TypeError, match=r"model must be a PeftModel, or a model with adapters .*, got Net"):
        lora_state(seeded(Net))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        export_lora(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model.unmerge_adapter()
    model.base_model.model.lin0.hra_u["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match=r"lin0.*hra_u of adapter 'default' must be finite"):
        export_lora(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with hra_kernels.peft.disabled():
        stock = get_peft_model(seeded(Net), config(targets=["lin0"]))
    with pytest.raises(TypeError, match=r"call hra_kernels\.peft\.enable\(\) before loading"):
        lora_state(stock)


def test_command_line(tmp_path, capsys):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **settings))
    bert.save_pretrained(tmp_path / "base")
    tuned = HRAConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(bert, tuned).eval()
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
