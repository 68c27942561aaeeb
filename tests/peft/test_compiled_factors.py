"""Compiled PeftModels on a GPU, by the rule that holds there: one operator for all factors of one shape, at entry.

What graphs on a CPU do is in tests/operators/test_kept_chain.py.
"""

import copy
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from bench.host import triton_without_launches
from bench.providers import Unavailable
from hra_kernels import factor_cache
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import adapt, config, layers_of, seeded
from tests.peft.test_transforms import COMPILES_PEFT

pytestmark = [COMPILES_PEFT, pytest.mark.slow]
BOUND = rounding(16, 4, layers=8)


class Net(nn.Module):
    """Four layers of one shape, two of them in a block, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.a, self.b, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)
        self.between = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.b(self.between(self.a(self.block(x))))))


TARGETS = ("block.0", "block.2", "a", "b", "last", "head")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(factor_cache, "_values_are_at_hand", lambda us: False)


@pytest.fixture
def model():
    return adapt(seeded(Net), targets=TARGETS)


def compiled(model, fullgraph=True):
    """The compiled model, and the operators of its graphs."""
    found = Counter()

    def count(graph, _):
        found.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "hra." in str(node.target))
        return make_boxed_func(graph)

    return torch.compile(model, fullgraph=fullgraph, backend=aot_autograd(fw_compiler=count)), found


def rewrite(layer):
    """As a kernel of somebody else's does: no version moves."""
    layer.hra_u["default"].data.copy_(torch.randn_like(layer.hra_u["default"]))


def error_of(function, model, x):
    """Against a copy of the model, which has no factor of its own yet."""
    with torch.no_grad():
        return relative(function(x), copy.deepcopy(model)(x))


def test_one_operator_for_each_shape(model):
    function, found = compiled(model)
    x = torch.randn(5, 16)
    assert error_of(function, model, x) < BOUND
    assert found == {"wy_factor_many": 1, "wy_factor_fwd": 1, "reflect_dx": 6}, "five of (16, 4), and one of (24, 4)"
    found.clear()
    inputs = [u for u in model.parameters() if u.requires_grad]
    factor_cache.forget_factors(model)
    grads = [torch.autograd.grad(run(x).square().sum(), inputs) for run in (function, model)]
    assert all(relative(one, other) < 10 * BOUND for one, other in zip(*grads, strict=True))
    assert found == {"wy_factor_many": 1, "wy_factor_fwd": 1, "reflect_fwd": 6, "chain_bwd": 6}


def test_launches():
    """On the Triton path: four a layer and step, one in inference, and three for all factors of one shape."""
    model = adapt(seeded(Net), targets=TARGETS[:4])
    x = torch.randn(5, 16)
    try:
        with triton_without_launches() as launches:
            function, _ = compiled(model)
            for trains, alone in ((True, 4), (False, 1)):
                with torch.set_grad_enabled(trains):
                    for _ in range(2):
                        launches.clear()
                        y = function(x)
                        if trains:
                            y.sum().backward()
                assert launches.total() == 4 * alone + 3, launches
    except Unavailable as why:
        pytest.skip(str(why))


def test_follows_its_parameters_in_one_graph(model):
    function, _ = compiled(model)
    counters = torch._dynamo.utils.counters
    x = torch.randn(5, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    function(x)
    counters.clear()
    for _ in range(3):
        function(x).square().sum().backward()
        optimizer.step()
        for layer in layers_of(model):
            rewrite(layer)
        factor_cache.forget_factors(model)
        assert relative(function(x), model(x)) < BOUND
    assert not counters["stats"]["unique_graphs"]


def test_follows_the_active_adapter(model):
    model.add_adapter("other", config(TARGETS))
    function, _ = compiled(model)
    x, seen = torch.randn(5, 16), []
    for active in (["default"], ["other"], ["default", "other"], ["default"]):
        model.base_model.set_adapter(active)
        assert error_of(function, model, x) < BOUND
        seen.append(function(x))
    assert torch.equal(seen[0], seen[3]) and relative(seen[0], seen[1]) > 1000 * BOUND


@pytest.mark.parametrize("hooked, alone", [("a", 1), ("block", 2), ("", 6)], ids=["layer", "block", "model"])
def test_parameters_that_a_hook_brings(model, hooked, alone):
    """A layer whose vectors may change after the model's entry computes its own factor."""
    module = model.base_model.model.get_submodule(hooked)
    late = layers_of(module)

    def bring(*_):
        for layer in late:
            layer.hra_u["default"].data.mul_(torch.arange(1.0, 5.0))

    handle = module.register_forward_pre_hook(bring)
    function, found = compiled(model)
    x = torch.randn(5, 16)
    with torch.no_grad():
        got = function(x)
        handle.remove()
        assert relative(got, copy.deepcopy(model)(x)) < BOUND, "with the vectors that the hook left"
    assert found["chain"] == len(late) == alone


def test_a_hook_of_the_container_of_vectors(model):
    """FSDP2 may wrap it."""
    model.base_model.model.a.hra_u.register_forward_pre_hook(lambda *_: None)
    function, found = compiled(model)
    assert error_of(function, model, torch.randn(5, 16)) < BOUND and found["chain"] == 1


def test_a_break_of_the_graph_leaves_nothing_behind(model):
    """What is computed at entry belongs to that forward; a layer that is called by itself computes its own."""
    net = model.base_model.model
    net.between = torch.compiler.disable(lambda x: x.clone())
    function, _ = compiled(model, fullgraph=False)
    alone, x = torch.compile(net.b, backend="aot_eager"), torch.randn(5, 16)
    for _ in range(3):
        assert error_of(function, model, x) < BOUND
        assert all(layer._factors.given is None for layer in layers_of(model))
        for layer in layers_of(model):
            rewrite(layer)
        assert error_of(alone, net.b, x) < BOUND


def test_an_error_in_the_forward_leaves_nothing_behind(model):
    net = model.base_model.model
    function, _ = compiled(model, fullgraph=False)

    def fail(x):
        raise RuntimeError("between")

    net.between = torch.compiler.disable(fail)
    with pytest.raises(RuntimeError, match="between"), torch.no_grad():
        function(torch.randn(5, 16))
    assert all(layer._factors.given is None for layer in layers_of(model))
    net.between = lambda x: x
    assert error_of(function, model, torch.randn(5, 16)) < BOUND


def test_planted_factor_that_outlives_its_forward(model, monkeypatch):
    """If `computed_at_entry` left what it has, the next call of a layer by itself would be stale, and found out."""
    layer = model.base_model.model.b
    u = layer.hra_u["default"]
    layer._factors.given = (u, False, factor_cache.chain_factor([u], [False]))
    rewrite(layer)
    assert error_of(torch.compile(layer, backend="aot_eager"), layer, torch.randn(5, 16)) > 1000 * BOUND
