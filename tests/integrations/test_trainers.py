"""Plugins for Axolotl and ms-swift: against the trainers where they are installed, always against their interfaces.

The stand-ins have what the plugins touch, written after Axolotl 0.19.0 and ms-swift 4.6.0.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

import hra_kernels
import hra_kernels.peft

FOLDER = Path(hra_kernels.__file__).parent / "integrations"


class Settings(dict):
    """Axolotl's DictDefault: what is not there is None."""

    __getattr__ = dict.get


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig()
        self.query, self.value, self.head = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.head(self.value(self.query(x).relu()))

    def prepare_inputs_for_generation(self, *arguments, **options):  # PEFT asks for it
        raise NotImplementedError


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules in the place of a trainer's; the plugin that imported them is forgotten afterwards."""

    def install(plugin, modules):
        packages = {dotted.rsplit(".", i)[0] for dotted in modules for i in range(dotted.count(".") + 1)}
        for name in sorted(packages):
            module = ModuleType(name)
            vars(module).update(modules.get(name, {}))
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, f"hra_kernels.integrations.{plugin}", raising=False)
        found = importlib.import_module(f"hra_kernels.integrations.{plugin}")
        monkeypatch.delitem(sys.modules, f"hra_kernels.integrations.{plugin}")
        return found

    yield install
    hra_kernels.peft.disable()


@pytest.fixture(params=["stand-in", "installed"])
def axolotl(request, stand_in, monkeypatch):
    """(the plugin's module, Axolotl's load_adapter with the plugin registered, its settings' type)."""
    if request.param == "installed":
        base = pytest.importorskip("axolotl.integrations.base")
        adapter = pytest.importorskip("axolotl.loaders.adapter")
        settings = pytest.importorskip("axolotl.utils.dict").DictDefault
        manager = base.PluginManager.get_instance()
        manager.register("hra_kernels.integrations.axolotl.HRAPlugin")
        assert manager.supports_adapter("hra")
        assert manager.get_input_args() == ["hra_kernels.integrations.axolotl.HRAArgs"]
        monkeypatch.setattr(adapter, "find_all_linear_names", lambda model: ["query", "value"])
        plugin = importlib.import_module("hra_kernels.integrations.axolotl")
        monkeypatch.setattr(plugin, "find_all_linear_names", adapter.find_all_linear_names)
        return plugin, adapter.load_adapter, settings
    plugin = stand_in(
        "axolotl",
        {
            "axolotl.integrations.base": {"BasePlugin": object, "AdapterCapabilities": SimpleNamespace},
            "axolotl.loaders.adapter": {"find_all_linear_names": lambda model: ["query", "value"]},
        },
    )

    def load_adapter(model, cfg, name, **options):
        (capability,) = plugin.HRAPlugin().get_adapter_capabilities()
        assert capability.name == name == cfg.adapter
        return plugin.HRAPlugin().load_adapter(model, cfg, **options)

    return plugin, load_adapter, Settings


def is_ours(layer):
    return type(layer).__module__.startswith("hra_kernels.peft")


def test_axolotl_loads_the_adapter(axolotl, tmp_path):
    _, load_adapter, settings = axolotl
    cfg = settings(
        {"adapter": "hra", "lora_r": 4, "lora_target_linear": True, "lora_dropout": 0.0, "hra_apply_gs": True}
    )
    model, config = load_adapter(Block(), cfg, "hra")
    assert isinstance(model, PeftModel)
    assert (config.r, config.apply_GS, config.target_modules) == (4, True, {"query", "value"})
    base = model.base_model.model
    assert is_ours(base.query) and is_ours(base.value) and not is_ours(base.head)
    x = torch.randn(3, 16)
    expected = base(x)
    model.save_pretrained(tmp_path)
    loaded, _ = load_adapter(Block(), settings({**cfg, "lora_model_dir": str(tmp_path)}), "hra", inference=True)
    torch.testing.assert_close(loaded.base_model.model(x), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_axolotl_gives_dpo_the_configuration_alone(axolotl):
    _, load_adapter, settings = axolotl
    cfg = settings({"adapter": "hra", "lora_target_modules": ["query"], "lora_modules_to_save": ["head"]})
    model, config = load_adapter(Block(), cfg, "hra", config_only=True)
    assert model is None
    assert (config.r, config.target_modules, config.modules_to_save) == (8, {"query"}, ["head"])
    assert hra_kernels.peft.is_enabled()


def test_axolotl_leaves_other_adapters_alone(axolotl):
    plugin, _, settings = axolotl
    assert plugin.HRAPlugin().load_adapter(Block(), settings({"adapter": "lora"})) is None
    assert not hra_kernels.peft.is_enabled()


def test_axolotl_refuses_dropout(axolotl):
    _, load_adapter, settings = axolotl
    with pytest.raises(ValueError, match=r"lora_dropout must be 0.*got 0.1"):
        load_adapter(Block(), settings({"adapter": "hra", "lora_dropout": 0.1}), "hra")


@pytest.fixture(params=["stand-in", "installed"])
def swift_tuner(request, stand_in):
    """The tuner that ms-swift finds under `hra`."""
    if request.param == "installed":
        tuners_map = pytest.importorskip("swift.tuner_plugin").tuners_map
        # as --external_plugins does
        pytest.importorskip("swift.utils").import_external_file(str(FOLDER / "ms_swift.py"))
        return tuners_map["hra"]

    class PeftTuner:
        @staticmethod
        def from_pretrained(model, model_id, **kwargs):
            return PeftModel.from_pretrained(model, model_id, **kwargs)

    tuners_map = {}
    stand_in(
        "ms_swift",
        {
            "swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": tuners_map},
            "swift.pipelines.train.tuner": {
                "get_target_modules": lambda args, model: args.target_modules,
                "get_modules_to_save": lambda args, model, task: args.modules_to_save,
            },
        },
    )
    return tuners_map["hra"]


@pytest.mark.parametrize(
    ("task", "expected"), [("causal_lm", "CAUSAL_LM"), ("embedding", None), ("seq_cls", "SEQ_CLS")]
)
def test_swift_builds_and_loads(swift_tuner, tmp_path, task, expected):
    arguments = SimpleNamespace(
        lora_rank=4, target_modules=["query"], target_parameters=None, modules_to_save=[], task_type=task
    )
    model = swift_tuner.prepare_model(arguments, Block())
    config = model.peft_config["default"]
    assert (config.r, config.target_modules, config.task_type) == (4, {"query"}, expected)
    layer = model.base_model.model.query
    assert is_ours(layer)
    with torch.no_grad():
        layer.hra_u["default"] += torch.randn(16, 4)
    x = torch.randn(3, 16)
    model.save_pretrained(tmp_path)
    hra_kernels.peft.disable()
    loaded = swift_tuner.from_pretrained(Block(), str(tmp_path), is_trainable=True)
    assert is_ours(loaded.base_model.model.query)
    with torch.no_grad():
        torch.testing.assert_close(loaded.base_model.model(x), model.base_model.model(x), rtol=0, atol=0)
