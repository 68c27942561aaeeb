"""Compiled graphs of adapted layers hold no factor: it is kept outside, and never stale."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from hra_kernels import factor_cache, kept_chain, ops
from hra_kernels.nn import HRALinear
from hra_kernels.testing.tolerance import relative, rounding

D, R, M = 16, 4, 5
BOUND = rounding(D, R, layers=2)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def layer_and_input(apply_gs=False):
    torch.manual_seed(0)
    return HRALinear(nn.Linear(D, 8), r=R, apply_gs=apply_gs, init_weights=False), torch.randn(M, D)


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(HRALinear(nn.Linear(D, D), r=R, init_weights=False) for _ in range(3)))


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def operators_of(graphs):
    return sorted(str(node.target) for graph in graphs for node in graph.graph.nodes if "hra." in str(node.target))


def recorder():
    """A backend that runs the graphs which autograd leaves of a model, and the list it collects them in."""
    graphs = []
    keep = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    return aot_autograd(fw_compiler=keep), graphs


def test_no_factor_in_the_graphs(device):
    model, x = stack().to(device), torch.randn(M, D, device=device)
    backend, graphs = recorder()
    function = compiled(model, backend)
    with torch.no_grad():
        function(x)
    assert operators_of(graphs) == ["hra.chain.default"] * 3
    graphs.clear()
    function(x.requires_grad_()).sum().backward()
    assert operators_of(graphs) == ["hra.chain_bwd.default"] * 3 + ["hra.chain_fwd.default"] * 3


def results(function, layer, x):
    """Without gradient, with it, and the gradients."""
    with torch.no_grad():
        first = function(x)
    x = x.clone().requires_grad_()
    y = function(x)
    return [first, y, *torch.autograd.grad(y.square().sum(), (x, layer.hra_u))]


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_computed_once_and_as_in_eager_mode(computed, compiler, apply_gs):
    layer, x = layer_and_input(apply_gs)
    expected = results(layer, layer, x)
    function = compiled(layer, compiler)
    del computed[:]
    for _ in range(3):
        for got, wanted in zip(results(function, layer, x), expected, strict=True):
            assert relative(got, wanted) < BOUND
    assert len(computed) == 1


CHANGES = {
    "load_state_dict": lambda layer: layer.load_state_dict(layer_and_input()[0].state_dict() | {"hra_u": new()}),
    "new parameter": lambda layer: setattr(layer, "hra_u", nn.Parameter(new())),
    "new data": lambda layer: setattr(layer.hra_u, "data", new()),
    "through .data": lambda layer: layer.hra_u.data.copy_(new()),
    "one element": lambda layer: layer.hra_u.data[-1, -1].mul_(3),
    "in place": lambda layer: torch.no_grad()(layer.hra_u.copy_)(new()),
    "double": lambda layer: layer.double(),
    "swap_tensors": lambda layer: torch.utils.swap_tensors(layer.hra_u, nn.Parameter(new())),
}


def new():
    return torch.randn(D, R)


def error_after(change, trains=False):
    """Of a compiled layer, called before and after; and how far the change took its results."""
    layer, x = layer_and_input()
    function = compiled(layer)
    with torch.set_grad_enabled(trains):
        for _ in range(2):
            before = function(x).detach()
        gc.collect()  # swap_tensors wants no graph that holds the parameter
        CHANGES[change](layer)
        x = x.to(layer.hra_u.dtype)
        after = function(x).detach()
    return relative(after, layer.merged()(x)), relative(after, before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_change_is_seen(change, trains):
    error, distance = error_after(change, trains)
    assert error < BOUND and (change == "double" or distance > 1000 * BOUND)


@pytest.mark.parametrize(
    "rule", [lambda u: u.data_ptr(), lambda u: (u.data_ptr(), u._version)], ids=["address", "version"]
)
def test_planted_rules_are_found_out(rule, monkeypatch):
    kept = {}

    def planted(u, apply_gs):
        if rule(u) not in kept:
            kept[rule(u)] = ops.chain_factor([u], [apply_gs])
        return kept[rule(u)]

    monkeypatch.setattr(kept_chain, "factor_of_memory", planted)
    assert error_after("through .data")[0] > 1000 * BOUND


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_follows_the_optimizer_in_one_graph(computed, optimizer):
    model = stack()
    other, x, dy = copy.deepcopy(model), torch.randn(M, D), torch.randn(M, D)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(model, counter)
    steps = [(one, optimizer(one.parameters(), lr=0.1)) for one in (function, other)]
    for step in range(1, 5):
        for run, stepper in steps:
            stepper.zero_grad()
            for _ in range(2):
                run(x).backward(dy)
            stepper.step()
        with torch.no_grad():
            assert relative(function(x), other(x)) < 10 * step * BOUND
        assert len(computed) == 6 * (1 + step), "three by each, in the first forward after a step"
    assert counter.frame_count == 2, "one with gradient, one without"


def run_and_rewrite(layer, x):
    """As a graph: it uses u, writes it, and uses it again."""
    first = layer(x)
    layer.hra_u.mul_(torch.arange(1.0, 1 + R))
    layer.hra_u[1:] -= layer.hra_u[:-1].clone()
    return first, layer(x)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("rule", ["values", "on a GPU"])
def test_a_graph_that_writes_u_itself(compiler, rule, monkeypatch):
    if rule == "on a GPU":
        monkeypatch.setattr(factor_cache, "_values_are_at_hand", lambda us: False)
    layer, x = layer_and_input()
    other = copy.deepcopy(layer)
    function, plain = torch.compile(run_and_rewrite, backend=compiler, fullgraph=True), compiled(layer, compiler)
    with torch.no_grad():
        for _ in range(3):
            for got, wanted in zip(function(layer, x), run_and_rewrite(other, x), strict=True):
                assert relative(got, wanted) < 10 * BOUND
            for again in (plain, layer):
                assert relative(again(x), wanted) < 10 * BOUND


def test_nothing_is_kept_where_values_are_not_at_hand(monkeypatch):
    monkeypatch.setattr(factor_cache, "_values_are_at_hand", lambda us: False)
    layer, x = layer_and_input()
    before = dict(factor_cache._of_memory)
    for _ in range(2):
        y = torch.ops.hra.chain(x, layer.hra_u, True, False)
        assert relative(y, ops.reflect_chain(x, [layer.hra_u.detach()], [False], transpose=True)) < BOUND
        layer.hra_u.data.copy_(new())
    assert factor_cache._of_memory == before


def test_results_may_be_written_to():
    """A compiler reuses the memory of an operator's results."""
    layer, x = layer_and_input()
    expected = torch.ops.hra.chain_fwd(x, layer.hra_u, True, False)
    kept = [tensor.clone() for tensor in expected]
    for tensor in expected:
        tensor.fill_(torch.nan)
    again = torch.ops.hra.chain_fwd(x, layer.hra_u, True, False)
    assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))


def test_parameters_in_one_storage(computed):
    """As FSDP's flat parameters, and an optimizer's buffers."""
    flat = torch.randn(2 * D, R)
    us = [nn.Parameter(part) for part in flat.split(D)]
    x = torch.randn(M, D)
    for _ in range(3):
        for u in us:
            y = torch.ops.hra.chain(x, u, True, False)
            assert relative(y, ops.reflect_chain(x, [u.detach()], [False], transpose=True)) < BOUND
    assert len(computed) == 2


def test_no_parameter_is_kept_alive_and_no_factor_for_long():
    def use():
        u = torch.randn(D, R)
        torch.ops.hra.chain(torch.randn(M, D), u, True, False)
        return torch.multiprocessing.reductions.StorageWeakRef(u.untyped_storage())

    first = use()
    assert first.expired()
    use()
    assert sum(ref.expired() for ref, _ in factor_cache._of_memory.values()) <= 1, "the last one"


def test_a_write_while_the_factor_is_computed_is_seen(monkeypatch):
    """By another thread: factor and kept values belong together all the same."""
    layer, x = layer_and_input()
    function = compiled(layer)
    compute = ops.BACKENDS["reference"].wy_factor

    def interrupted(u, apply_gs):
        factor = compute(u, apply_gs)
        monkeypatch.setattr(ops.BACKENDS["reference"], "wy_factor", compute)
        layer.hra_u.data.copy_(new())
        return factor

    with ops.use_backend("reference"), torch.no_grad():
        function(x)
        layer.hra_u.data.copy_(new())
        monkeypatch.setattr(ops.BACKENDS["reference"], "wy_factor", interrupted)
        function(x)
        assert relative(function(x), layer.merged()(x)) < BOUND


def test_threads_share_the_factors():
    model, x = stack(), torch.randn(M, D)
    function = compiled(model)
    layers = list(model)
    with torch.no_grad():
        function(x)
        for _ in range(10):
            for layer in layers:
                layer.hra_u.data.copy_(new())
            expected = model(x)
            together = threading.Barrier(4)

            def call(_):
                together.wait()  # noqa: B023 - of this round, which waits for its threads
                with torch.no_grad():
                    return function(x)

            with ThreadPoolExecutor(4) as pool:
                assert all(relative(y, expected) < 3 * BOUND for y in pool.map(call, range(4)))
