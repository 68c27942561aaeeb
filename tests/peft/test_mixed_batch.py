"""Batches that mix adapters: the grouped pass against dense float64, and PEFT's `adapter_names` by PEFT's rules."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from hra_kernels import mixed_batch, reference
from hra_kernels.factors import factor_dtype, stack_factors
from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.testing.cases import DTYPES, Case, explicit, make_u, naive
from hra_kernels.testing.tolerance import relative, rounding, violations
from tests.peft.models import Net, PadsItself, adapt, config, conv2d, images, linear, seeded, set_u

FLOAT32 = rounding(96, 7, layers=3)
BASE = "__base__"

# --- the operator -----------------------------------------------------------------------------------------------------

# (columns, rank, Gram-Schmidt); the last chain serves no sample
CHAINS = [
    ("random", 8, False), ("paired_step", 4, False), ("random", 3, True), ("zero_columns", 7, False),
    ("random", 2, False),
]  # fmt: skip
SAMPLES, OF_CHAIN = [0, 1, 3, 4, 5, 7], [2, 0, 3, 0, 1, 1]  # samples 2 and 6 have none
D = 120


def operator_inputs(dtype, length=40):
    generator = torch.Generator().manual_seed(0)
    shape = (8, length, D) if length else (8, D)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    us = [make_u(D, r, columns, generator).to(factor_dtype(dtype)) for columns, r, _ in CHAINS]
    return x, dy, us


def operator_results(x, dy, us, transpose, of_chain=OF_CHAIN):
    x, us = x.detach().requires_grad_(), [u.detach().requires_grad_() for u in us]
    v, t = stack_factors([reference.wy_factor(u, gs) for u, (_, _, gs) in zip(us, CHAINS, strict=True)])
    y = reflect_mixed(x, v, t, torch.tensor(of_chain), torch.tensor(SAMPLES), transpose)
    y.backward(dy)
    return y.detach(), x.grad, [u.grad for u in us]


def operator_violations(x, dy, us, results, transpose):
    """Of the accuracy rule, chain by chain: the samples of one chain are the rows of one explicit chain."""
    y, dx, dus = results
    found = []
    for chain, (columns, r, gs) in enumerate(CHAINS[:-1]):
        own = [sample for sample, c in zip(SAMPLES, OF_CHAIN, strict=True) if c == chain]
        rows = lambda tensor, own=own: tensor[own].reshape(-1, D)  # noqa: E731
        case = Case(rows(x).shape[0], D, r, columns, gs, transpose)
        exact, plain = (
            explicit(rows(x), us[chain], rows(dy), case),
            naive(rows(x), us[chain], rows(dy), case, x.dtype),
        )
        got = {"y": rows(y), "dx": rows(dx), "du": dus[chain]}
        found += [f"chain {chain}: {line}" for line in violations(got, plain, exact, x.dtype, r)]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", [None, 3 * 40 * D, 13 * D], ids=["whole", "samples", "rows"])
def test_reflect_mixed(dtype, transpose, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(mixed_batch, "_BLOCK", block)
    x, dy, us = operator_inputs(dtype)
    results = operator_results(x, dy, us, transpose)
    assert not operator_violations(x, dy, us, results, transpose)
    y, dx, dus = results
    assert torch.equal(y[[2, 6]], x[[2, 6]]) and torch.equal(dx[[2, 6]], dy[[2, 6]])
    assert not dus[-1].any() and not dus[3][:, 2::3].any()


@pytest.mark.parametrize("transpose", [False, True])
def test_reflect_mixed_one_row_a_sample(transpose):
    x, dy, us = operator_inputs(torch.float32, length=None)
    assert not operator_violations(x, dy, us, operator_results(x, dy, us, transpose), transpose)


@pytest.mark.parametrize("bug", ["wrong chain", "wrong side", "gradient of one sample lost"])
def test_planted_bugs(bug):
    x, dy, us = operator_inputs(torch.float32)
    results = operator_results(x, dy, us, bug != "wrong side", [2, 0, 3, 0, 1, 0] if bug == "wrong chain" else OF_CHAIN)
    if bug == "gradient of one sample lost":
        lost = dy.clone()
        lost[7] = 0
        results = (*results[:2], operator_results(x, lost, us, True)[2])
    assert operator_violations(x, dy, us, results, True)


def test_gradcheck():
    us = [torch.randn(6, r, dtype=torch.float64, requires_grad=True) for r in (2, 3)]
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)

    def run(x, *us):
        v, t = stack_factors([reference.wy_factor(u, gs) for u, gs in zip(us, (False, True), strict=True)])
        return reflect_mixed(x, v, t, torch.tensor([1, 0, 1]), torch.tensor([0, 2, 3]), True)

    assert torch.autograd.gradcheck(run, (x, *us)) and torch.autograd.gradgradcheck(run, (x, *us))


def test_compiled_operator():
    x, _, us = operator_inputs(torch.float32)
    v, t = stack_factors([reference.wy_factor(u) for u in us])
    arguments = (v, t, torch.tensor(OF_CHAIN), torch.tensor(SAMPLES), True)
    compiled = torch.compile(reflect_mixed, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x, *arguments), reflect_mixed(x, *arguments)) < FLOAT32


@pytest.mark.parametrize("shape", [(0, 5, D), (3, 0, D), (0, D)])
def test_empty(shape):
    v, t = stack_factors([reference.wy_factor(torch.randn(D, 4))])
    x = torch.randn(shape, requires_grad=True)
    y = reflect_mixed(x, v, t, torch.zeros(shape[0], dtype=torch.int64))
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape


def test_16_bit_input_is_not_widened_as_a_whole(monkeypatch):
    monkeypatch.setattr(mixed_batch, "_BLOCK", 2**14)
    x, dy, us = operator_inputs(torch.bfloat16, length=1000)
    widest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal widest
            result = function(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.dtype != x.dtype]
            widest = max([widest, *sizes])
            return result

    with Watch():
        operator_results(x, dy, us, True)
    assert widest < x.numel() / 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(D)}, r"x must be \(B, ..., D\).*got shape \(120,\)"),
        ({"x": torch.randn(8, D).to(torch.int32)}, "x must be float32, float64, bfloat16 or float16, got int32"),
        ({"v": torch.randn(5, 8, 3)}, r"v must be \(C, R, D\) with D = x.shape\[-1\] = 120, got shape \(5, 8, 3\)"),
        ({"t": torch.randn(5, 8, 7)}, r"t must be \(C, R, R\) = \(5, 8, 8\), got \(5, 8, 7\)"),
        ({"v": torch.randn(5, 8, D).double()}, "v must be torch.float32 for torch.float32 x, got torch.float64"),
        ({"chains": torch.tensor([0.0])}, r"chains must be \(S,\) int64, got \(1,\) torch.float32"),
        ({"chains": torch.tensor([0, 1])}, "chains must name one chain for each of 6 samples, got 2"),
        ({"samples": None}, "chains must name one chain for each of 8 samples, got 6"),
    ],
)
def test_operator_errors(change, message):
    x, _, us = operator_inputs(torch.float32, length=None)
    v, t = stack_factors([reference.wy_factor(u) for u in us])
    arguments = {"x": x, "v": v, "t": t, "chains": torch.tensor(OF_CHAIN), "samples": torch.tensor(SAMPLES), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        reflect_mixed(**arguments)


# --- layers -----------------------------------------------------------------------------------------------------------


def mixed_layer(base, **settings):
    """A layer with three adapters: of rank 4, of rank 3, and of rank 6 with Gram-Schmidt."""
    model = adapt(nn.Sequential(base), targets=["0"], **settings)
    for seed, (name, own) in enumerate({"b": {"r": 3}, "gs": {"r": 6, "apply_GS": True}}.items()):
        seeded(lambda name=name, own=own: model.add_adapter(name, config(targets=["0"], **own)), seed)
    return model.eval().base_model.model[0]


NAMES = ["b", BASE, "default", "gs", "b", BASE, "gs"]
LAYERS = {
    "linear": (linear, (7, 48)),
    "linear, sequences": (linear, (7, 5, 48)),
    "linear, images": (linear, (7, 2, 3, 48)),
    "conv": (lambda: conv2d(3, padding=1), (7, 3, 6, 5)),
    "conv, geometry": (lambda: conv2d((3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)), (7, 3, 9, 8)),
    "conv, same": (lambda: conv2d((2, 3), padding="same"), (7, 3, 6, 5)),
    "conv, reflect": (lambda: conv2d(3, padding=(2, 1), padding_mode="reflect"), (7, 3, 6, 5)),
    "conv 1d": (lambda: seeded(lambda: nn.Conv1d(3, 8, 4, stride=2, padding=1)), (7, 3, 11)),
    "conv 3d": (lambda: seeded(lambda: nn.Conv3d(2, 6, (2, 3, 1), dilation=(1, 2, 1))), (7, 2, 4, 7, 3)),
    "Conv1D": (lambda: seeded(lambda: Conv1D(20, 48)), (7, 5, 48)),
    "embedding": (lambda: seeded(lambda: nn.Embedding(30, 12)), (7, 5)),
    "embedding, one token": (lambda: seeded(lambda: nn.Embedding(30, 12)), (7,)),
}


def layer_input(kind):
    shape = LAYERS[kind][1]
    if kind.startswith("embedding"):
        return seeded(lambda: torch.randint(0, 30, shape), 3)
    return seeded(lambda: torch.randn(shape), 3)


def one_by_one(layer, x, names, dy=None):
    """y through `set_adapter`, one forward per sample; with dy also dx and the gradient of every adapter."""
    leaves = [*([x] if x.is_floating_point() else []), *layer.hra_u.values()]
    ys, grads = [], [torch.zeros_like(leaf) for leaf in leaves]
    for sample, name in enumerate(names):
        layer.set_adapter([] if name == BASE else [name])
        layer.hra_u.requires_grad_(dy is not None)
        one = slice(sample, sample + 1)
        ys.append(layer(x[one]))
        if dy is not None and ys[-1].requires_grad:
            found = torch.autograd.grad(ys[-1], leaves, dy[one], allow_unused=True)
            grads = [total if grad is None else total + grad for total, grad in zip(grads, found, strict=True)]
    layer.set_adapter(["default"])
    return torch.cat(ys) if dy is None else [torch.cat(ys), *grads]


@pytest.mark.parametrize("kind", LAYERS)
def test_each_sample_has_its_adapter(kind):
    """Against a float64 copy of the layer, one sample at a time: y, dx and du of every adapter."""
    layer = mixed_layer(LAYERS[kind][0]())
    exact_layer = copy.deepcopy(layer).double()
    x = layer_input(kind)
    x.requires_grad_(x.is_floating_point())
    layer.requires_grad_(True)
    y = layer(x, adapter_names=NAMES)
    plain = layer.base_layer(x)
    assert torch.equal(y[[1, 5]], plain[[1, 5]]) and relative(y, plain) > 0.1
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [*([x] if x.requires_grad else []), *layer.hra_u.values()], dy)
    exact_x = x.detach().double().requires_grad_() if x.requires_grad else x
    exact = one_by_one(exact_layer, exact_x, NAMES, dy.double())
    assert relative(y, exact[0]) < FLOAT32
    assert all(relative(one, other) < FLOAT32 for one, other in zip(got, exact[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear, sequences", "conv"])
def test_dtypes(kind, dtype):
    make, shape = LAYERS[kind]
    layer = mixed_layer(make().to(dtype))
    x = torch.randn(shape).to(dtype)
    y = layer(x, adapter_names=NAMES)
    assert y.dtype == dtype and torch.equal(y[[1, 5]], layer.base_layer(x)[[1, 5]])
    exact = one_by_one(copy.deepcopy(layer).double(), x.double(), NAMES)
    assert relative(y, exact) < rounding(75, 7, dtype)


def test_under_autocast():
    layer = mixed_layer(linear())
    x = torch.randn(7, 5, 48)
    exact = one_by_one(layer, x, NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, adapter_names=NAMES)
        assert y.dtype == torch.bfloat16 and torch.equal(y[[1, 5]], layer.base_layer(x)[[1, 5]])
    assert relative(y, exact) < rounding(48, 7, torch.bfloat16)


def test_untrained_adapters_are_the_base_layer_bit_for_bit():
    model = adapt(nn.Sequential(linear()), targets=["0"], init_weights=True)
    model.add_adapter("b", config(targets=["0"], init_weights=True, r=6))
    layer = model.eval().base_model.model[0]
    x = torch.randn(4, 5, 48)
    assert torch.equal(layer(x, adapter_names=["b", "default", BASE, "b"]), layer.base_layer(x))


def test_a_broken_adapter_harms_its_own_samples_only():
    layer = mixed_layer(linear())
    x = torch.randn(7, 5, 48)
    expected = layer(x, adapter_names=NAMES)
    set_u(layer, torch.full((48, 3), float("nan")), "b")
    y = layer(x, adapter_names=NAMES)
    assert y[[0, 4]].isnan().all()
    assert torch.equal(y[[1, 2, 3, 5, 6]], expected[[1, 2, 3, 5, 6]])


class Count(TorchDispatchMode):
    """How many operators run."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear, sequences", "conv"])
def test_one_grouped_pass_however_many_adapters(kind, monkeypatch):
    make, shape = LAYERS[kind]
    model = adapt(nn.Sequential(make()), targets=["0"])
    for i in range(6):
        model.add_adapter(f"a{i}", config(targets=["0"], r=2 + i % 3))
    layer = model.eval().base_model.model[0]
    # on a CPU the factor cache compares values, one comparison an adapter; not a launch on a GPU
    monkeypatch.setattr(torch, "equal", lambda a, b: True)
    x = torch.randn(shape)
    calls = []
    for names in (["a0", BASE] + ["a1"] * 5, [f"a{i}" for i in range(6)] + [BASE]):
        with torch.no_grad():
            layer(x, adapter_names=names)
            with Count() as count:
                layer(x, adapter_names=names)
        calls.append(count.calls)
    assert calls[0] == calls[1] < 40


def test_layers_that_cannot_mix_say_so():
    layer = mixed_layer(seeded(lambda: PadsItself(3, 8, 3)))
    with pytest.raises(NotImplementedError, match=r"adapter_names.*not supported by layer '0' \(HRAConv2d over PadsIt"):
        layer(torch.randn(2, 3, 7, 7), adapter_names=["b", BASE])
    layer = mixed_layer(conv2d(3))
    with pytest.raises(ValueError, match=r"input of layer '0'.*must be \(B, C, \.\.\.\), got \(3, 7, 7\)"):
        layer(torch.randn(3, 7, 7), adapter_names=["b", BASE, "b"])


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_changes_of_the_adapters_are_seen():
    layer = mixed_layer(linear())
    x = torch.randn(7, 48)
    with torch.inference_mode():  # what is kept from here must not poison a later backward
        assert relative(layer(x, adapter_names=NAMES), one_by_one(layer, x, NAMES)) < rounding(48, 7)
    for name in ("b", "gs"):
        set_u(layer, torch.randn_like(layer.hra_u[name]), name)
        assert relative(layer(x, adapter_names=NAMES), one_by_one(layer, x, NAMES)) < rounding(48, 7)
    layer.requires_grad_(True)
    layer(x, adapter_names=NAMES).sum().backward()
    torch.optim.AdamW(layer.hra_u.values(), lr=0.1).step()
    assert relative(layer(x, adapter_names=NAMES), one_by_one(layer, x, NAMES)) < rounding(48, 7)
    for names in (["gs"] * 7, [BASE] * 6 + ["b"], NAMES[::-1]):
        assert relative(layer(x, adapter_names=names), one_by_one(layer, x, names)) < rounding(48, 7)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(how):
    layer = mixed_layer(linear())
    x = torch.randn(7, 48)
    expected = layer(x, adapter_names=NAMES)
    other = how(layer)
    assert torch.equal(other(x, adapter_names=NAMES), expected)
    set_u(other, torch.randn(48, 3), "b")
    assert torch.equal(layer(x, adapter_names=NAMES), expected)
    assert not torch.equal(other(x, adapter_names=NAMES), expected)


# --- whole models, and PEFT's rules -----------------------------------------------------------------------------------


@pytest.fixture
def model():
    """`b` is on two of the three layers."""
    model = adapt(seeded(Net))
    seeded(lambda: model.add_adapter("b", config(targets=["conv", "lin1"], r=3)), 7)
    return model.eval()


def test_model(model):
    x = images()
    y = model(x, adapter_names=["b", "default", BASE, "b"])
    with model.disable_adapter():
        base = model(x)
    model.set_adapter("b")
    b = model(x)
    model.set_adapter("default")
    default = model(x)
    assert relative(y[[0, 3]], b[[0, 3]]) < FLOAT32 and relative(y[1], default[1]) < FLOAT32
    assert torch.equal(y[2], base[2])
    assert torch.equal(model(x), default)  # the names were for that call
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=["b"] * 4), base)


def test_rules(model):
    x = images()
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): other, third"):
        model(x, adapter_names=["third", "default", "other", BASE])
    with pytest.raises(ValueError, match="the same as the number of inputs, but got 3 and 4 respectively"):
        model(x, adapter_names=["default", "b", BASE])
    with pytest.raises(TypeError, match="Got adapter names of type <class 'str'>, expected a list of str"):
        model(x, adapter_names="default")
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(x, adapter_names=["default", "b", BASE, BASE])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model(x, adapter_names=["default", "b", BASE, BASE])


def test_no_hook_is_left_behind_by_an_error(model):
    """PEFT's LoRA leaves its hooks, and with them the names, on the model."""
    x = images()
    expected = model(x)
    with pytest.raises(ValueError, match="number of inputs"):
        model(x, adapter_names=["b"])
    assert torch.equal(model(x), expected)


def test_threads_share_a_model(model):
    """Inference servers: each call has names of its own, or none."""
    x = images()
    asked = [["b", "default", BASE, "b"], [BASE, "b", "b", "default"], ["default"] * 4, None] * 8
    with torch.no_grad():
        expected = [model(x, adapter_names=names) for names in asked]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(torch.no_grad()(lambda names: model(x, adapter_names=names)), asked))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_modules_to_save():
    model = adapt(seeded(Net), targets=["lin0"], modules_to_save=["lin1"])
    model.add_adapter("b", config(targets=["lin0"], modules_to_save=["lin1"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save.b" in name:
                p.copy_(torch.randn_like(p))
    model.eval()
    x = images(3)
    y = model(x, adapter_names=["b", BASE, "default"])
    model.set_adapter("b")
    assert relative(y[0], model(x)[0]) < FLOAT32
    model.set_adapter("default")
    assert relative(y[2], model(x)[2]) < FLOAT32
    with model.disable_adapter():
        assert relative(y[1], model(x)[1]) < rounding(48, 7)


def language_model(kind):
    small = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 63, "pad_token_id": 0}
    if kind == "llama":
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        base, targets = LlamaForCausalLM(LlamaConfig(**small, **size, initializer_range=0.5)), ["q_proj", "down_proj"]
    else:
        size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        base, targets = T5ForConditionalGeneration(T5Config(**small, **size)), ["q", "v", "wo"]
    model = adapt(base, targets=targets, task_type="CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM")
    model.add_adapter("b", config(targets=targets, r=3))
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(kind, num_beams):
    model = seeded(lambda: language_model(kind))
    ids = seeded(lambda: torch.randint(2, 60, (4, 6)), 5)
    names = ["b", BASE, "default", "b"]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": num_beams, "do_sample": False}
    got = model.generate(input_ids=ids, adapter_names=names, **settings)
    for sample, name in enumerate(names):
        one = ids[sample : sample + 1]
        if name == BASE:
            with model.disable_adapter():
                expected = model.generate(input_ids=one, **settings)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=one, **settings)
        assert torch.equal(got[sample], expected[0]), name
    model.set_adapter("default")
    logits = model(input_ids=ids, adapter_names=names, **({} if kind == "llama" else {"labels": ids})).logits
    other = model(input_ids=ids, **({} if kind == "llama" else {"labels": ids})).logits
    assert relative(logits[2], other[2]) < FLOAT32 and relative(logits[0], other[0]) > 1e-3
