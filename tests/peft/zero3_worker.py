"""What each process of `test_zero3` in `test_distributed.py` runs: DeepSpeed ZeRO-3 against the model in one piece.

    python -m tests.peft.zero3_worker RANK WORLD STORE

Prints one JSON line, [what went wrong]; leaves by `os._exit`, as `distributed_worker.py` does.
"""

import json
import os
import sys
import traceback

import deepspeed
import pytest
import torch
import torch.distributed as dist
from peft import HRAConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import hra_kernels.peft
from hra_kernels.regularizer import model_orthogonality_penalty
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import seeded

FLOAT32 = rounding(64, 4, layers=14)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1)))
    return seeded(lambda: get_peft_model(model, HRAConfig(r=4, init_weights=False, target_modules=TARGETS)), 1)


def vectors(model):
    return [p for p in model.parameters() if p.requires_grad]


def same_outputs(models, tokens):
    with torch.no_grad():
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "synced_gpus": True}
        one, other = (model.generate(input_ids=tokens[:, :5], **settings) for model in models)
        assert torch.equal(one, other), (one, other)
        one, other = (model(input_ids=tokens).logits for model in models)
        assert relative(one, other) < FLOAT32, relative(one, other)


def check(threshold):
    """Generate, train with the regularizer, generate, save, load; vectors of up to `threshold` entries stay whole."""
    exact, model = llama(), llama()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(vectors(model), 0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        },
    )
    optimizer = torch.optim.SGD(vectors(exact), 0.1)
    tokens = torch.arange(1, 20)[None].repeat(2, 1)
    same_outputs((model, exact), tokens)
    for _ in range(2):
        losses = [one(input_ids=tokens, labels=tokens, use_cache=False).loss for one in (engine, exact)]
        losses = [
            loss + 0.1 * model_orthogonality_penalty(one) for loss, one in zip(losses, (model, exact), strict=True)
        ]
        assert relative(*(loss.detach() for loss in losses)) < FLOAT32, losses
        engine.backward(losses[0])
        engine.step()
        optimizer.zero_grad()
        losses[1].backward()
        optimizer.step()
    same_outputs((model, exact), tokens)
    wanted = get_peft_model_state_dict(exact)
    if not threshold:
        with pytest.raises(ValueError, match=r"hra_u\.default must be whole.*GatheredParameters"):
            get_peft_model_state_dict(model)
        with pytest.raises(NotImplementedError, match=r"'model\.layers\.0\.self_attn\.q_proj'.*GatheredParameters"):
            model.merge_adapter()
        with pytest.raises(RuntimeError, match=r"self_attn\.q_proj.*GatheredParameters"):
            set_peft_model_state_dict(model, wanted)
    with deepspeed.zero.GatheredParameters(vectors(model)):
        saved = get_peft_model_state_dict(model)
        assert saved.keys() == wanted.keys()
        assert all(relative(saved[name], wanted[name]) < FLOAT32 for name in wanted)
    other = {name: seeded(lambda u=u: torch.randn_like(u), 9) for name, u in wanted.items()}
    set_peft_model_state_dict(exact, other)
    with deepspeed.zero.GatheredParameters(vectors(model), modifier_rank=0):
        set_peft_model_state_dict(model, other)
    same_outputs((model, exact), tokens)


def main() -> None:
    rank, world, store = sys.argv[1:4]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    hra_kernels.peft.enable()
    why = ""
    try:
        deepspeed.init_distributed("gloo")
        for threshold in (0, 100_000):
            check(threshold)
    except BaseException:  # pytest's failures are no Exception
        why = traceback.format_exc()
    print(json.dumps(["zero3", why]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
