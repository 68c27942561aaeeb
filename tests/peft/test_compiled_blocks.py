"""Models whose blocks, or which themselves, are replaced by `torch.compile(...)`: files hold the plain names."""

import copy

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import hra_kernels.peft
from tests.peft.models import adapt, seeded

pytestmark = pytest.mark.usefixtures("enabled")
NAMES_BY_TUNER = pytest.mark.skipif(
    not hasattr(peft.tuners.tuners_utils.BaseTuner, "_remove_adapter_name_from_key"),
    reason="PEFT 0.20 and older name the tensors of a file without asking the tuner",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def compiled_blocks(deep: nn.Module) -> nn.Module:
    for i, block in enumerate(deep.blocks):
        deep.blocks[i] = torch.compile(block, backend="eager")
    return deep


def compiled_model(when: str, **settings) -> nn.Module:
    """A trained PeftModel over `Deep`, its blocks compiled before or after the adapter came."""
    base = seeded(Deep)
    model = adapt(compiled_blocks(base) if when == "before" else base, targets=["fc", "head"], **settings)
    if when == "after":
        compiled_blocks(model.get_base_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.5 * parameter.requires_grad)
    return model


@NAMES_BY_TUNER
@pytest.mark.parametrize("bias", ["none", "hra_only"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_saved_adapter_loads_into_the_plain_model(when, bias, tmp_path):
    model, x = compiled_model(when, bias=bias), torch.linspace(-1, 1, 32).reshape(4, 8)
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(seeded(Deep), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@NAMES_BY_TUNER
@pytest.mark.parametrize("bias", ["none", "hra_only"])
def test_saved_adapter_loads_into_compiled_blocks(bias):
    model = compiled_model("before", bias=bias)
    state = get_peft_model_state_dict(model)
    other = adapt(compiled_blocks(seeded(Deep)), targets=["fc", "head"], seed=7, bias=bias)
    assert not set_peft_model_state_dict(other, copy.deepcopy(state)).unexpected_keys
    assert all(torch.equal(tensor, state[name]) for name, tensor in get_peft_model_state_dict(other).items())


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_export_lora(when, whole, tmp_path):
    model, x = compiled_model(when), torch.linspace(-1, 1, 32).reshape(4, 8)
    hra_kernels.peft.export_lora(torch.compile(model, backend="eager") if whole else model, tmp_path)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(seeded(Deep), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


@NAMES_BY_TUNER
@pytest.mark.parametrize("when", ["before", "after", "whole"])
def test_combined_adapter_of_compiled_blocks(when, tmp_path):
    if when == "whole":
        model = adapt(torch.compile(seeded(Deep), backend="eager"), targets=["fc", "head"])
    else:
        model = compiled_model(when)
    model.add_weighted_adapter(["default"], [1.0], "combined")
    model.set_adapter("combined")
    model.save_pretrained(tmp_path, selected_adapters=["combined"])
    assert "_orig_mod" not in (tmp_path / "combined" / "adapter_config.json").read_text()
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(seeded(Deep), str(tmp_path / "combined"))
        assert torch.equal(loaded(x), model(x))
