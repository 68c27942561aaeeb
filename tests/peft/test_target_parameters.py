"""Fused expert weights through PEFT's `target_parameters`: one chain an expert, against dense float64."""

import copy

import accelerate
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import hra_kernels.peft
from hra_kernels.peft import HRAConfig
from hra_kernels.peft.experts import ParamWrapper
from hra_kernels.reference import explicit_chain
from hra_kernels.regularizer import model_orthogonality_penalty, orthogonality_penalty
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import seeded

FLOAT32 = rounding(20, 6, layers=3)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Each token goes through every expert; the layout of the weights is the module's own."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        first, second = ((3, 12, 20), (3, 20, 12)) if is_transposed else ((3, 20, 12), (3, 12, 20))
        self.gate_up_proj = nn.Parameter(torch.randn(first) / 4)
        self.down_proj = nn.Parameter(torch.randn(second) / 4)

    def forward(self, x, scale):
        up, down = self.gate_up_proj, self.down_proj
        up, down = (up, down) if self.is_transposed else (up.mT, down.mT)
        return scale * torch.tanh(x @ up) @ down


class Net(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.experts = Experts(is_transposed)
        self.table = nn.Module()
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        return self.last(self.experts(self.first(x)[None], 2.0).sum(0))


def net(is_transposed=False, dtype=torch.float32):
    return seeded(lambda: Net(is_transposed)).to(dtype).requires_grad_(False)


def adapt(base, targets=BOTH, seed=1, **settings):
    config = HRAConfig(**{"r": 4, "init_weights": False, "target_parameters": list(targets), **settings})
    with hra_kernels.peft.enabled():
        return seeded(lambda: get_peft_model(copy.deepcopy(base), config), seed)


def wrappers(model):
    return {module.parameter_name: module for module in model.modules() if isinstance(module, ParamWrapper)}


def dense(base, us, apply_gs=False):
    """{parameter: W_e Q_e of every expert} in float64, differentiable in us {name: [(E, D, r), ...]}."""
    merged = {}
    for name, chains in us.items():
        weight = getattr(base.experts, name).detach().double()
        rows = weight.mT if base.experts.is_transposed else weight
        for u in chains:
            rows = torch.stack([one @ explicit_chain(vectors, apply_gs) for one, vectors in zip(rows, u, strict=True)])
        merged[f"experts.{name}"] = rows.mT if base.experts.is_transposed else rows
    return merged


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]])
def test_forward_and_gradients(is_transposed, apply_gs, targets):
    base = net(is_transposed)
    model = adapt(base, targets, apply_GS=apply_gs, r=3)
    layers = wrappers(model)
    assert layers.keys() == {name.rpartition(".")[2] for name in targets}
    assert {name: tuple(one.hra_u["default"].shape) for name, one in layers.items()} == {
        name: (3, {"gate_up_proj": 12, "down_proj": 20}[name], 3) for name in layers
    }
    assert [name for name, p in model.named_parameters() if p.requires_grad] and all(
        "hra_u" in name for name, p in model.named_parameters() if p.requires_grad
    )
    x = torch.randn(7, 12, requires_grad=True)
    us = {name: one.hra_u["default"] for name, one in layers.items()}
    wide = {name: [u.detach().double().requires_grad_()] for name, u in us.items()}
    exact_x = x.detach().double().requires_grad_()
    exact = functional_call(copy.deepcopy(base).double(), dense(base, wide, apply_gs), (exact_x,))
    y = model(x)
    assert relative(y, exact) < FLOAT32 and relative(base(x), exact) > 0.1
    dy = torch.randn_like(exact)
    got = torch.autograd.grad(y, [x, *us.values()], dy.float())
    expected = torch.autograd.grad(exact, [exact_x, *(chains[0] for chains in wide.values())], dy)
    assert all(relative(one, other) < FLOAT32 for one, other in zip(got, expected, strict=True))


def test_starts_as_the_base_model():
    base = net()
    x = torch.randn(7, 12)
    model = adapt(base, init_weights=True)
    assert torch.equal(model(x), base(x))
    model = adapt(base)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@pytest.mark.skipif(peft.__version__.startswith("0.19"), reason="PEFT 0.19 has room for one such adapter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_merge_and_unmerge(is_transposed, dtype):
    base = net(is_transposed, dtype)
    model = adapt(base)
    with hra_kernels.peft.enabled():
        other = HRAConfig(r=2, apply_GS=True, init_weights=False, target_parameters=BOTH)
        model.add_adapter("b", other)
    model.base_model.set_adapter(["default", "b"])
    layers, x = wrappers(model), torch.randn(7, 12, dtype=dtype)
    y = model(x)
    us = {name: [one.hra_u["default"].detach().double()] for name, one in layers.items()}
    first = dense(base, us)
    exact = {}
    for name, merged in first.items():
        step = copy.deepcopy(base).double()
        short = name.rpartition(".")[2]
        getattr(step.experts, short).data = merged
        exact.update(dense(step, {short: [layers[short].hra_u["b"].detach().double()]}, True))
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["default", "b"])
    for name, one in layers.items():
        assert one.base_parameter().dtype == dtype and one.base_parameter().is_contiguous()
        assert relative(one.base_parameter(), exact[f"experts.{name}"]) < rounding(20, 6, dtype)
    assert relative(model(x), y) < rounding(20, 6, dtype, layers=4)
    model.unmerge_adapter()
    for name, one in layers.items():
        assert torch.equal(one.base_parameter(), getattr(base.experts, name))
    assert torch.equal(model(x), y)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.experts) is Experts and merged.state_dict().keys() == base.state_dict().keys()
    assert relative(merged(x), y) < rounding(20, 6, dtype, layers=4)


def test_failed_merge_changes_nothing():
    base = net()
    model = adapt(base)
    with torch.no_grad():
        wrappers(model)["down_proj"].hra_u["default"][1, 2, 0] = float("inf")
    with pytest.raises(ValueError, match=r"hra_u holds NaN or infinity.*'experts.down_proj'.*is unchanged"):
        model.merge_adapter()
    assert not any(one.merged for one in wrappers(model).values())
    base.experts.gate_up_proj.data[0, 1, 2] = float("nan")
    model = adapt(base)
    with pytest.raises(ValueError, match=r"base weight is not finite.*'experts.gate_up_proj'.*is unchanged"):
        model.merge_adapter()
    assert not any(one.merged for one in wrappers(model).values())
    assert torch.equal(wrappers(model)["down_proj"].base_parameter(), base.experts.down_proj)


def test_offloaded_parameter_is_refused():
    """In forward its hook would load the plain weight over ours; what was merged into it PEFT would not keep."""
    model = adapt(net())
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(NotImplementedError, match=r"'experts.down_proj'.*is offloaded"):
        model(torch.randn(7, 12))
    with pytest.raises(NotImplementedError, match=r"'experts.down_proj'.*Parameter of torch.float32 on meta"):
        model.merge_adapter()
    assert not any(one.merged for one in wrappers(model).values())


def mixtral():
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(num_key_value_heads=2, num_local_experts=3, vocab_size=30, **settings)
    return seeded(lambda: MixtralForCausalLM(config)).eval()


def gpt_oss():
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GptOssConfig(
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, head_dim=8, vocab_size=30, **settings
    )
    return seeded(lambda: GptOssForCausalLM(config)).eval()


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_mixture_models(make, tmp_path):
    """With layers besides; training, files, merging."""
    base, tokens = make(), torch.arange(14).reshape(2, 7)
    model = adapt(base, target_modules=["q_proj"], init_weights=True, task_type="CAUSAL_LM").train()
    assert len([one for one in model.modules() if isinstance(one, ParamWrapper)]) == 4
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    y = model(tokens).logits
    assert relative(y, base(tokens).logits) > 1e-3
    model.save_pretrained(str(tmp_path))
    with hra_kernels.peft.enabled():
        loaded = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
        assert type(loaded.peft_config["default"]) is HRAConfig
        empty = PeftModel.from_pretrained(make(), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(loaded(tokens).logits, y) and torch.equal(empty(tokens).logits, y)
    merged = loaded.merge_and_unload()
    assert [type(one) for one in merged.modules()] == [type(one) for one in base.modules()]
    assert relative(merged(tokens).logits, y) < rounding(24, 4, layers=40)
    assert torch.equal(model.unload()(tokens).logits, base(tokens).logits)


def test_configuration_file_without_target_parameters_is_peft_s(tmp_path):
    HRAConfig(r=4, target_modules=["a"]).save_pretrained(str(tmp_path / "ours"))
    peft.HRAConfig(r=4, target_modules=["a"]).save_pretrained(str(tmp_path / "peft"))
    assert (tmp_path / "ours" / "adapter_config.json").read_text() == (
        tmp_path / "peft" / "adapter_config.json"
    ).read_text()
    assert type(PeftConfig.from_pretrained(str(tmp_path / "ours"))) is peft.HRAConfig
    with hra_kernels.peft.enabled():
        assert type(PeftConfig.from_pretrained(str(tmp_path / "ours"))) is HRAConfig


def test_regularizer_takes_each_expert_for_itself():
    model = adapt(net(), BOTH[:1])
    u = wrappers(model)["gate_up_proj"].hra_u["default"]
    assert torch.allclose(model_orthogonality_penalty(model), orthogonality_penalty(u.unbind(0)))


def test_errors():
    model = adapt(net())
    clash = r"must have the same; the new one has \['experts.d|PEFT 0.19 has room for one"
    with hra_kernels.peft.enabled(), pytest.raises(ValueError, match=clash):
        model.add_adapter("b", HRAConfig(target_parameters=BOTH[1:]))
    with pytest.raises(NotImplementedError, match="add_weighted_adapter: not supported with target_parameters"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "c")
    with pytest.raises(NotImplementedError, match=r"adapter_names.*not supported by layer 'experts\.\w+_proj'"):
        model.eval()(torch.randn(2, 12), adapter_names=["default", "__base__"])
    with pytest.raises(NotImplementedError, match="a chain for each expert"):
        wrappers(model)["down_proj"].get_delta_weight("default")
    with pytest.raises(NotImplementedError, match=r"'bias' of Linear.*supported are floating-point \(N, D\).*\(5,\)"):
        adapt(net(), ["last.bias"])
    with pytest.raises(TypeError, match="target_parameters"):
        peft.HRAConfig(target_parameters=BOTH)
