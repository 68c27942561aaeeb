"""The factor is computed once per parameter version: how often, and never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hra_kernels import factor_cache, ops
from hra_kernels.backends import cpu as cpu_backend
from hra_kernels.factor_cache import FactorCache
from hra_kernels.nn import HRALinear


@pytest.fixture
def computed(monkeypatch):
    """A list with one entry for each factor computed."""
    calls = []
    monkeypatch.setattr(
        factor_cache, "chain_factor", lambda us, *rest: calls.append(len(us)) or ops.chain_factor(us, *rest)
    )
    return calls


def layer_and_input():
    torch.manual_seed(0)
    return HRALinear(nn.Linear(16, 8), r=4), torch.randn(5, 16)


def test_micro_batches_share_a_factor(computed):
    layer, x = layer_and_input()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(1, 4):
        for _ in range(3):
            layer(x).sum().backward()
        optimizer.step()
        assert len(computed) == step


def test_generation_shares_a_factor(computed):
    layer, x = layer_and_input()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(5):
                layer(x[:1])
    assert len(computed) == 1
    layer(x).sum().backward()  # a factor first made under inference_mode serves training too


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(HRALinear(nn.Linear(16, 8), r=4).state_dict()),
        lambda layer: setattr(layer, "hra_u", nn.Parameter(torch.randn(16, 4))),
        lambda layer: setattr(layer.hra_u, "data", torch.randn(16, 4)),
        lambda layer: layer.double(),
    ],
    ids=["load_state_dict", "new parameter", "new data", "double"],
)
def test_a_change_is_seen(change):
    layer, x = layer_and_input()
    layer(x)
    change(layer)
    x = x.to(layer.hra_u.dtype)
    torch.testing.assert_close(layer(x), layer.merged()(x))


class PointerOptimizer(torch.optim.Optimizer):
    """Writes through `.data`, as optimizers with kernels of their own do: no version counter moves."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


def test_an_optimizer_that_moves_no_version_is_seen():
    layer, x = layer_and_input()
    optimizer = PointerOptimizer([layer.hra_u])
    layer(x).square().sum().backward()
    version = layer.hra_u._version
    optimizer.step()
    assert layer.hra_u._version == version
    torch.testing.assert_close(layer(x), layer.merged()(x))


def test_clear():
    layer, x = layer_and_input()
    layer(x)
    layer.hra_u.data.copy_(torch.randn(16, 4))
    layer._factors.clear()
    torch.testing.assert_close(layer(x), layer.merged()(x))


def test_copies_and_pickles_are_empty(computed):
    cache, u = FactorCache(), torch.randn(16, 4)
    cache.get([u], [False], u.dtype)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other.get([u], [False], u.dtype)
    assert len(computed) == 3


def test_flags_and_dtype_belong_to_the_factor():
    cache, u = FactorCache(), torch.randn(16, 4)
    plain = cache.get([u], [False], torch.float32)
    schmidt = cache.get([u], [True], torch.float32)
    assert not torch.equal(plain[1], schmidt[1])
    assert cache.get([u], [True], torch.float64)[0].dtype == torch.float64


@pytest.fixture
def batches(monkeypatch):
    """The reference with factors in groups; a list with the shape of each group."""
    shapes = []

    def wy_factor_many(us, apply_gs):
        shapes.append(tuple(us.shape))
        return cpu_backend.BACKEND.wy_factor_many(us, apply_gs)

    monkeypatch.setattr(ops.BACKENDS["reference"], "wy_factor_many", wy_factor_many)
    monkeypatch.setattr(ops.BACKENDS["reference"], "shares_launches", True)
    return shapes


def test_refill_computes_layers_of_one_shape_together(computed, batches):
    """Stale factors come in groups and are those that each layer would compute; fresh ones are left alone."""
    torch.manual_seed(0)
    us = [torch.randn(D, 4, requires_grad=True) for D in (16, 24, 16, 16, 24, 24)]
    layers = [(FactorCache(), [u], [False]) for u in us[:4]]
    layers.append((FactorCache(), us[4:], [False, True]))  # two adapters on one layer
    factor_cache.refill(layers)
    assert not batches, "nothing to share on a backend that has no groups"
    with ops.use_backend("reference"):
        factor_cache.refill(layers)
        assert sorted(batches) == [(2, 24, 4), (3, 16, 4)]
        for cache, members, apply_gs in layers:
            found = cache.get(members, apply_gs, torch.float32)
            for got, expected in zip(found, ops.chain_factor(members, apply_gs), strict=True):
                assert torch.equal(got, expected) and not got.requires_grad
        assert not computed
        factor_cache.refill(layers)
        with torch.no_grad():
            us[0].add_(1)
        factor_cache.refill(layers)
        assert len(batches) == 2, "one stale layer computes its own"
        cache, members, apply_gs = layers[0]
        expected = ops.chain_factor(members, apply_gs)
        assert torch.equal(cache.get(members, apply_gs, torch.float32)[0], expected[0]) and computed == [1]


def test_a_peft_model_refills_once_a_step(computed, batches):
    peft = pytest.importorskip("peft")
    import hra_kernels.peft

    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with hra_kernels.peft.enabled():
        model = peft.get_peft_model(base, peft.HRAConfig(r=4, target_modules=["0", "1", "2"], init_weights=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 16)
    with ops.use_backend("reference"):
        for step in range(1, 4):
            expected = copy.deepcopy(model).base_model.model(x)
            del computed[:]
            for _ in range(2):
                y = model(x)
                assert torch.equal(y, expected)
                y.square().sum().backward()
            assert batches == [(3, 16, 4)] * step and not computed
            optimizer.step()
