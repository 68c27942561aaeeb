"""TRL's trainers: the adapter "ref", the policy's own configuration added once more, starts as the policy."""

import math
import uuid

import peft
import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hra_kernels.peft
from tests.peft.models import Experts, Net, adapt, config, seeded

pytestmark = pytest.mark.usefixtures("enabled")


def trls_copy(model):
    """What DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer do with a model that has an adapter already."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, param in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(param.data)


def vectors(model, adapter):
    return {name: p for name, p in model.named_parameters() if name.endswith(f"hra_u.{adapter}")}


def assert_reference(model):
    policy, reference = vectors(model, "default"), vectors(model, "ref")
    assert len(policy) == len(reference) > 0
    for name, u in policy.items():
        copied = reference[name.replace("default", "ref")]
        assert torch.equal(copied, u) and copied.dtype == u.dtype and copied.data_ptr() != u.data_ptr()
        assert u.requires_grad and not copied.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"r": 3}, {"apply_GS": True}], ids=str)
def test_the_reference_is_the_policy(dtype, settings):
    model = adapt(seeded(Net).to(dtype), **settings)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    y = model(x)
    trls_copy(model)
    assert_reference(model)
    assert torch.equal(model(x), y)
    with torch.no_grad():
        for u in vectors(model, "default").values():
            u.add_(torch.randn_like(u))  # training
    assert not torch.equal(model(x), y)
    model.set_adapter("ref")
    assert torch.equal(model(x), y)


@pytest.mark.skipif(peft.__version__.startswith("0.19"), reason="PEFT 0.19 has room for one such adapter")
def test_saved_weights_and_parameters_of_experts():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.lin, self.head = Experts(), nn.Linear(6, 6), nn.Linear(6, 2)

    settings = hra_kernels.peft.HRAConfig(
        r=4, target_modules=["lin"], target_parameters=["experts.weight"], modules_to_save=["head"], init_weights=False
    )
    model = get_peft_model(Model(), settings)
    model.base_model.model.head.modules_to_save["default"].weight.data.add_(1)
    trls_copy(model)
    assert_reference(model)
    head = model.base_model.model.head.modules_to_save
    assert torch.equal(head["ref"].weight, head["default"].weight)


@pytest.mark.parametrize("name, same", [("another", True), ("ref", False)])
def test_other_adapters_start_on_their_own(name, same):
    model = adapt(seeded(Net))
    model.add_adapter(name, model.peft_config["default"] if same else config())
    policy = vectors(model, "default")
    for key, u in vectors(model, name).items():
        assert not torch.equal(u, policy[key.replace(f"hra_u.{name}", "hra_u.default")])


# --- TRL itself -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trl(monkeypatch):
    trl = pytest.importorskip("trl")
    from datasets.fingerprint import Hasher

    # names of cache files, from a pickle of all that a function can reach, which not every module allows
    monkeypatch.setattr(Hasher, "hash", classmethod(lambda cls, value: uuid.uuid4().hex[:16]))
    return trl


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(100))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def policy():
    llama = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    settings = HRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    return seeded(lambda: get_peft_model(LlamaForCausalLM(llama), settings))


ROWS = {
    "DPO": lambda i: {"chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 40} w{i + 41}"},
    "KTO": lambda i: {"completion": f" w{i + 2} w{i + 3}", "label": i % 2 == 0},
    "GRPO": lambda i: {},
    "RLOO": lambda i: {},
}


@pytest.mark.parametrize("method", ROWS)
def test_trainer(tmp_path, trl, method):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", **ROWS[method](i)} for i in range(16)])
    online = {} if method in ("DPO", "KTO") else {"beta": 0.1}
    arguments = getattr(trl, f"{method}Config")(
        str(tmp_path), per_device_train_batch_size=8, max_steps=1, report_to=[], use_cpu=True, bf16=False,
        learning_rate=0.0, logging_steps=1, gradient_checkpointing=False, save_strategy="no", **online,
    )  # fmt: skip
    reward = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]} if online else {}
    trainer = getattr(trl, f"{method}Trainer")(
        model=policy(), args=arguments, train_dataset=rows, processing_class=tokenizer(), **reward
    )
    assert_reference(trainer.model)
    if method == "DPO":
        trainer.train()
        (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert float(loss) == pytest.approx(math.log(2), abs=1e-4)  # logged with four digits
