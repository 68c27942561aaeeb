"""`HRAConfig(ensure_weight_tying=True)`: one weight in two layers stays one when both are adapted."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hra_kernels.peft
from hra_kernels.peft import HRAConfig
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import dense_q, seeded

FLOAT32 = rounding(64, 4, layers=4)


def llama():
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, **heads)))


def tied(targets, **settings):
    with hra_kernels.peft.enabled():
        config = HRAConfig(r=4, init_weights=False, target_modules=targets, ensure_weight_tying=True, **settings)
        return seeded(lambda: get_peft_model(llama(), config), 1)


def both(model):
    inner = model.base_model.model
    return inner.model.embed_tokens.hra_u["default"], inner.lm_head.hra_u["default"]


TOKENS = torch.arange(1, 20)[None]


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens"], ".*embed_tokens"])
def test_one_parameter_for_both(targets):
    model = tied(targets)
    one, other = both(model)
    assert one is other and sum(p.requires_grad for p in model.parameters()) == 1
    exact = llama()
    with torch.no_grad():
        exact.model.embed_tokens.weight.copy_(exact.lm_head.weight @ dense_q(one).float())
        assert exact.lm_head.weight is exact.model.embed_tokens.weight
        assert relative(model(input_ids=TOKENS).logits, exact(input_ids=TOKENS).logits) < FLOAT32
    before = one.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert both(model)[0] is both(model)[1] and not torch.equal(one, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files(tmp_path, low_cpu_mem_usage):
    model = tied(["embed_tokens", "lm_head", "q_proj"])
    with hra_kernels.peft.enabled():
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert loaded.peft_config["default"].ensure_weight_tying and both(loaded)[0] is both(loaded)[1]
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    assert both(copy.deepcopy(loaded))[0] is not both(loaded)[0]


def test_modules_to_save():
    inner = tied(["q_proj"], modules_to_save=["embed_tokens"]).base_model.model
    embeddings = inner.model.embed_tokens.modules_to_save["default"]
    assert inner.lm_head.modules_to_save["default"].weight is embeddings.weight


def test_not_tied_without(tmp_path):
    with hra_kernels.peft.enabled(), pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(llama(), HRAConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    assert both(model)[0] is not both(model)[1]
    assert "ensure_weight_tying" not in model.peft_config["default"].to_dict()
