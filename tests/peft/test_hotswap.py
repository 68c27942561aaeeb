"""PEFT's hot swap: another adapter in the place of one, exactly, without a compilation, or a clear error."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from torch import nn
from torch._dynamo.testing import CompileCounter

import hra_kernels.peft
from hra_kernels.testing.tolerance import rounding
from tests.peft.models import Net, adapt, config, relative, seeded

pytestmark = pytest.mark.usefixtures("enabled")
FLOAT32 = rounding(96, 8, layers=6)


@pytest.fixture
def x():
    return seeded(lambda: torch.randn(4, 3, 8, 8), 9)


def saved(folder, seed=3, **settings):
    """(folder of an adapter, its outputs as a function of x)."""
    model = adapt(seeded(Net), seed=seed, **settings).eval()
    model.save_pretrained(folder)
    return folder, lambda x: model(x).detach()


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 2}, {"r": 3}, {"r": 1}, {"targets": ["lin0", "conv"]}], ids=str)
def test_swap(tmp_path, x, settings):
    model = adapt(seeded(Net)).eval()
    model(x)
    addresses = [p.data_ptr() for p in model.parameters()]
    folder, expected = saved(tmp_path, **settings)
    hotswap.hotswap_adapter(model, folder, adapter_name="default")
    assert relative(model(x), expected(x)) < FLOAT32
    assert [p.data_ptr() for p in model.parameters()] == addresses
    model.merge_adapter()
    assert relative(model(x), expected(x)) < FLOAT32


@pytest.mark.parametrize("r", [6, 3])
def test_gram_schmidt(tmp_path, x, r):
    model = adapt(seeded(Net), r=6, apply_GS=True).eval()
    folder, expected = saved(tmp_path, r=r, apply_GS=True)
    hotswap.hotswap_adapter(model, folder, adapter_name="default")
    assert relative(model(x), expected(x)) < FLOAT32


def test_what_does_not_fit_changes_nothing(tmp_path, x):
    model = adapt(seeded(Net), targets=["lin0", "lin1"]).eval()
    y = model(x)
    with pytest.raises(ValueError, match=r"lin0.hra_u.default must be \(96, 4\) .* got \(96, 8\).*target_rank=8"):
        hotswap.hotswap_adapter(model, saved(tmp_path / "8", r=8, targets=["lin0", "lin1"])[0], "default")
    with pytest.raises(RuntimeError, match=r"unexpected keys found: base_model.model.conv.hra_u.default"):
        hotswap.hotswap_adapter(model, saved(tmp_path / "conv")[0], "default")
    with pytest.raises(ValueError, match="apply_GS"):
        hotswap.hotswap_adapter(model, saved(tmp_path / "gs", targets=["lin0"], apply_GS=True)[0], "default")
    assert torch.equal(model(x), y)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"currently merged .* unmerge_adapter"):
        hotswap.hotswap_adapter(model, saved(tmp_path / "2", r=2, targets=["lin0", "lin1"])[0], "default")


@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_no_recompilation(tmp_path, x, whole):
    folder, first = saved(tmp_path / "a", r=2)
    others = [saved(tmp_path / "b", seed=4, r=8), saved(tmp_path / "c", seed=5, r=3, targets=["lin0"])]
    model = PeftModel.from_pretrained(seeded(Net), folder).eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert model.peft_config["default"].r == 8
    assert relative(model(x), first(x)) < FLOAT32
    backend = CompileCounter()
    torch._dynamo.reset()
    if whole:
        model = torch.compile(model, backend=backend)
    else:
        model.base_model.model.lin0 = torch.compile(model.base_model.model.lin0, backend=backend)
    assert relative(model(x), first(x)) < FLOAT32
    compiled = backend.frame_count
    assert compiled > 0
    for other, expected in others:
        hotswap.hotswap_adapter(model, other, adapter_name="default")
        assert relative(model(x), expected(x)) < FLOAT32
    assert backend.frame_count == compiled
    with pytest.raises(ValueError, match=r"must be \(.*, 8\).*got \(.*, 9\)"):
        hotswap.hotswap_adapter(model, saved(tmp_path / "9", r=9)[0], adapter_name="default")


def test_prepared_models_save_and_load(tmp_path, x):
    model = adapt(seeded(Net), r=3).eval()
    y = model(x)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    model.save_pretrained(tmp_path)
    assert relative(PeftModel.from_pretrained(seeded(Net), tmp_path).eval()(x), y) < FLOAT32


def test_preparation_refuses(x):
    model = adapt(seeded(Net), r=4)
    with pytest.raises(ValueError, match=r"target_rank must be at least .* got 2 for adapter 'default' of r = 4"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=2)
    compiled = torch.compile(model)
    with pytest.raises(ValueError, match="before compiling"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="before compiling"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    with pytest.raises(ValueError, match="No adapter layers found"):
        hotswap.prepare_model_for_compiled_hotswap(nn.Linear(2, 2), target_rank=8)


def test_lora_is_swapped_as_before(tmp_path, x):
    lora = LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    other = seeded(lambda: get_peft_model(seeded(Net), lora), 5).eval()
    other.save_pretrained(tmp_path)
    model = get_peft_model(seeded(Net), lora).eval()
    hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(model(x), other(x))


def test_switched_off_again():
    with hra_kernels.peft.disabled():
        ours = config().peft_type in hotswap.CONFIG_KEYS_TO_CHECK
        assert not ours and hotswap.hotswap_adapter_from_state_dict.__module__ == "peft.utils.hotswap"
