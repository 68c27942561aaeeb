"""The factor is computed once per parameter version: how often, and never stale."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import hra_kernels
from hra_kernels import factor_cache, ops
from hra_kernels.backends import cpu as cpu_backend
from hra_kernels.factor_cache import FactorCache
from hra_kernels.nn import HRAConv2d, HRALinear
from hra_kernels.soft import Soft


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


class PointerOptimizer(torch.optim.Optimizer):
    """Writes through `.data`, as optimizers with kernels of their own do: no version counter moves."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                version = parameter._version
                parameter.data.add_(parameter.grad, alpha=-0.1)
                assert parameter._version == version


def step_without_a_version(layer):
    layer(torch.ones(1, 16)).square().sum().backward()
    PointerOptimizer([layer.hra_u]).step()


def write_in_place(layer):
    with torch.inference_mode():
        layer.hra_u.copy_(torch.randn(16, 4))


CHANGES = {
    "load_state_dict": lambda layer: layer.load_state_dict(HRALinear(nn.Linear(16, 8), r=4).state_dict()),
    "new parameter": lambda layer: setattr(layer, "hra_u", nn.Parameter(torch.randn(16, 4))),
    "new data": lambda layer: setattr(layer.hra_u, "data", torch.randn(16, 4)),
    "double": lambda layer: layer.double(),
    "a step": step_without_a_version,
    "in place": write_in_place,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("rule", ["values", "on_a_gpu"])
def test_a_change_is_seen(change, rule, request):
    if rule == "on_a_gpu":
        request.getfixturevalue(rule)
    layer, x = layer_and_input()
    layer(x)
    change(layer)
    x = x.to(layer.hra_u.dtype)
    torch.testing.assert_close(layer(x), layer.merged()(x))


def test_clear():
    layer, x = layer_and_input()
    layer(x)
    layer.hra_u.data.copy_(torch.randn(16, 4))
    layer._factors.clear()
    torch.testing.assert_close(layer(x), layer.merged()(x))


@pytest.mark.parametrize("before", [False, True], ids=["first", "changed"])
@pytest.mark.parametrize(
    "name, place, function",
    [("reference", ops.BACKENDS["reference"], "wy_factor"), ("cpu", cpu_backend._native, "wy_factor_fwd")],
)
def test_a_write_while_the_factor_is_computed_is_seen(monkeypatch, name, place, function, before):
    """By another thread, in a server that loads new weights: factor and kept values belong together all the same."""
    if ops.BACKENDS[name].why_unavailable():
        pytest.skip(f"backend {name} is not available here")
    layer, x = layer_and_input()
    compute = getattr(place, function)

    def interrupted(*args):
        monkeypatch.setattr(place, function, compute)
        factor = compute(*args)
        layer.hra_u.data.copy_(torch.randn(16, 4))
        return factor

    with ops.use_backend(name):
        if before:
            layer(x)
            layer.hra_u.data.copy_(torch.randn(16, 4))
        monkeypatch.setattr(place, function, interrupted)
        layer(x)
        assert getattr(place, function) is compute, "nothing was computed"
        torch.testing.assert_close(layer(x), layer.merged()(x))


@pytest.mark.parametrize("change", [torch.neg, lambda u: u[:8], lambda u: u[:, :2], lambda u: u.mT.contiguous().mT])
@pytest.mark.parametrize("rule", [False, True, Soft(1e-4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_changed_values_have_the_factor_of_new_ones(change, rule, dtype):
    u = torch.randn(16, 4, dtype=dtype)
    for wide in (torch.float32, torch.float64):
        cache = FactorCache()
        cache.get([u], [rule], wide)
        changed = change(u)
        found, expected = cache.get([changed], [rule], wide), ops.chain_factor([changed], [rule], wide)
        assert all(map(torch.equal, found, expected)) and found[0].dtype == wide
        assert cache.get([changed], [rule], wide) is found


def test_nothing_is_kept_of_inference_tensors(computed):
    cache, u = FactorCache(), torch.randn(16, 4)
    cache.get([u], [False], torch.float32)
    with torch.inference_mode():
        changed = -u
    for _ in range(2):
        cache.get([changed], [False], torch.float32)
    assert len(computed) == 3


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: torch.utils.swap_tensors(layer.hra_u, nn.Parameter(torch.randn(16, 4))),
        lambda layer: layer.load_state_dict(HRALinear(nn.Linear(16, 8), r=4).state_dict()),
        lambda layer: layer.double(),
    ],
    ids=["swap_tensors", "load_state_dict", "double"],
)
@pytest.mark.parametrize("rule", ["values", "on_a_gpu"])
def test_parameters_are_swapped_in_place(swapping, change, rule, request):
    if rule == "on_a_gpu":
        request.getfixturevalue(rule)
    layer, x = layer_and_input()
    layer(x)  # leaves no node of the graph behind that holds the parameter, as `swap_tensors` requires
    change(layer)
    x = x.to(layer.hra_u.dtype)
    torch.testing.assert_close(layer(x), layer.merged()(x))


# --- the rule on a GPU, where no values are compared ------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(factor_cache, "_values_are_at_hand", lambda us: False)
    monkeypatch.setattr(factor_cache, "_captured", set())


def write_unseen(layer):
    """As a replayed graph or another process's kernel writes: no version moves."""
    layer.hra_u.data.copy_(torch.randn_like(layer.hra_u))


KEPT_FOR = {
    "address": lambda buffer: (buffer[16:32], False),
    "version": lambda buffer: (buffer[:16].add_(0), False),
    "dtype": lambda buffer: (buffer[:16].view(torch.float16), False),
    "shape": lambda buffer: (buffer[:8], False),
    "strides": lambda buffer: (buffer.as_strided((16, 4), (1, 16)), False),
    "rule": lambda buffer: (buffer[:16], True),
    "storage": lambda buffer: (torch.from_numpy(buffer[:16].view(torch.int16).numpy()).view(torch.bfloat16), False),
}


@pytest.mark.parametrize("other", KEPT_FOR)
def test_what_a_kept_factor_belongs_to(on_a_gpu, computed, other):
    """Of vectors at one place, all but one thing the same."""
    cache, buffer = FactorCache(), torch.randn(32, 4).bfloat16()
    for _ in range(3):
        cache.get([buffer[:16]], [False], torch.bfloat16)
    assert len(computed) == 1
    u, rule = KEPT_FOR[other](buffer)
    for _ in range(3):
        cache.get([u], [rule], torch.bfloat16)
    assert len(computed) == 2


def test_another_stream_and_another_dtype_have_their_own_factor(on_a_gpu, computed, monkeypatch):
    """What one stream computes is not there yet for another."""
    cache, u = FactorCache(), torch.randn(16, 4)
    for count, stream, dtype in ((1, 0, torch.float32), (2, 7, torch.float32), (3, 7, torch.float64)):
        monkeypatch.setattr(factor_cache, "_stream_of", lambda u, stream=stream: stream)
        for _ in range(3):
            cache.get([u], [False], dtype)
        assert len(computed) == count


@pytest.mark.parametrize("hidden", ["inference tensor", "hooks", "captured by another"])
def test_what_was_kept_is_of_no_use_where_nothing_shows_writes(on_a_gpu, computed, monkeypatch, hidden):
    cache, u = FactorCache(), torch.randn(16, 4)
    cache.get([u], [False], u.dtype)
    with torch.inference_mode(hidden == "inference tensor"):
        if hidden == "inference tensor":
            u = torch.randn(16, 4)
        elif hidden == "hooks":
            cache.parameters_come_late = True
        else:
            capture(monkeypatch, lambda: FactorCache().get([u], [False], u.dtype))
            del computed[1:]
        for _ in range(2):
            cache.get([u], [False], u.dtype)
    assert len(computed) == 3


def test_another_tensor_at_the_address_of_a_freed_one(on_a_gpu):
    memory = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    layer, x = layer_and_input()
    for _ in range(20):
        layer.hra_u = nn.Parameter(torch.from_numpy(memory))  # the address and the version of the one before
        torch.testing.assert_close(layer(x), layer.merged()(x))
        del layer.hra_u
        memory[:] = np.random.default_rng(1).standard_normal(memory.shape)


def test_the_name_of_a_freed_storage_is_not_given_to_another(on_a_gpu, computed):
    cache, memory = FactorCache(), np.ones((16, 4), np.float32)
    cache.get([torch.from_numpy(memory)], [False], torch.float32)
    for count in range(2, 22):
        memory += 1
        cache.get([torch.from_numpy(memory)], [False], torch.float32)
        assert len(computed) == count


def test_the_cache_keeps_no_parameter_alive(on_a_gpu):
    """A gathered vector may be part of a buffer that holds a whole block's weights."""
    cache, buffer = FactorCache(), torch.randn(100, 4)
    storage = torch.multiprocessing.reductions.StorageWeakRef(buffer.untyped_storage())
    cache.get([buffer[:16]], [False], torch.float32)
    assert cache._entry is not None
    del buffer
    assert storage.expired()


@pytest.mark.parametrize("make", [lambda: HRALinear(nn.Linear(16, 8), r=4), lambda: HRAConv2d(nn.Conv2d(4, 8, 2), r=4)])
@pytest.mark.parametrize(
    "forget",
    [
        lambda layer: layer.train(),
        lambda layer: layer.eval(),
        lambda layer: layer.load_state_dict({}, strict=False),
        lambda layer: hra_kernels.forget_factors(nn.Sequential(layer)),
    ],
    ids=["train", "eval", "load_state_dict", "forget_factors"],
)
def test_what_forgets(on_a_gpu, make, forget):
    layer = make()
    x = torch.randn(5, 16) if isinstance(layer, HRALinear) else torch.randn(2, 4, 5, 5)
    layer(x)
    write_unseen(layer)
    forget(layer)
    torch.testing.assert_close(layer(x), layer.merged()(x))


def capture(monkeypatch, function):
    """Run it as `torch.cuda.graph` would."""
    with monkeypatch.context() as patch:
        patch.setattr(factor_cache, "_capturing", lambda: True)
        return function()


def test_eager_calls_between_replays_of_a_graph(on_a_gpu, monkeypatch):
    layer, x = layer_and_input()
    layer(x)
    capture(monkeypatch, lambda: layer(x))
    for _ in range(3):
        torch.testing.assert_close(layer(x), layer.merged()(x))
        write_unseen(layer)  # the replay
    torch.testing.assert_close(layer(x), layer.merged()(x))


def test_a_graph_of_the_optimizers_step_alone(on_a_gpu, monkeypatch):
    layer, x = layer_and_input()
    optimizer = torch.optim.SGD([layer.hra_u], lr=0.1)
    layer(x).square().sum().backward()
    capture(monkeypatch, optimizer.step)
    for _ in range(3):
        torch.testing.assert_close(layer(x), layer.merged()(x))
        write_unseen(layer)  # the replay
    torch.testing.assert_close(layer(x), layer.merged()(x))


def test_a_hook_that_brings_parameters(on_a_gpu, computed):
    layer, x = layer_and_input()
    layer(x)
    handle = layer.register_forward_pre_hook(lambda module, args: write_unseen(module))
    for _ in range(3):
        torch.testing.assert_close(layer(x), layer.merged()(x))
    handle.remove()
    del computed[:]
    for _ in range(3):
        layer(x)
    assert len(computed) == 1, "kept again once the hook is gone"


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


def small_model():
    """Three adapted layers, the first two of them in a block."""
    peft = pytest.importorskip("peft")
    import hra_kernels.peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 16))
    config = peft.HRAConfig(r=4, target_modules=["0.0", "0.1", "1"], init_weights=False)
    with hra_kernels.peft.enabled():
        return peft.get_peft_model(base, config)


@pytest.mark.parametrize("hooked", ["layers", "block"])
def test_parameters_that_arrive_after_the_models_entry(on_a_gpu, batches, hooked):
    """Gathered after the optimizer's step while the model already runs: by the layer's hook, or its block's."""
    model = small_model()
    block, last = model.base_model.model
    layers = [*block, last]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 16)
    pending = {}

    def arrive(module, _):
        for u in module.parameters():
            if u in pending:
                u.data.copy_(pending.pop(u))

    for module in layers if hooked == "layers" else [block, last]:
        module.register_forward_pre_hook(arrive)
    with ops.use_backend("reference"):
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            pending.update({layer.hra_u["default"]: torch.randn(16, 4) for layer in layers})
            y = model(x)
            assert not pending
            assert torch.equal(y, copy.deepcopy(model)(x)) and torch.equal(model(x), y)
    assert not batches


def test_layers_without_hooks_are_still_refilled_together(on_a_gpu, batches):
    model = small_model()
    model.base_model.model[1].register_forward_pre_hook(lambda *_: None)
    with ops.use_backend("reference"):
        model(torch.randn(5, 16))
    assert batches == [(2, 16, 4)]


def test_vectors_that_are_partitioned_wait_for_their_gather(batches):
    """As DeepSpeed ZeRO-3 leaves them between forwards."""
    us = [torch.randn(16, 4), torch.empty(0), torch.randn(16, 4)]
    layers = [(FactorCache(), [u], [False]) for u in us]
    with ops.use_backend("reference"):
        factor_cache.refill(layers)
    assert batches == [(2, 16, 4)] and layers[1][0]._entry is None


@pytest.mark.parametrize("mixed", [False, True])
def test_what_forgets_in_a_peft_model(on_a_gpu, mixed):
    model = small_model().eval()
    x = torch.randn(5, 16)
    named = {"adapter_names": ["default"] * 5} if mixed else {}
    for forget in (hra_kernels.forget_factors, nn.Module.train, lambda one: one.load_state_dict({}, strict=False)):
        model.eval()
        model(x, **named)
        for name, u in model.named_parameters():
            if "hra_u" in name:
                u.data.copy_(torch.randn(16, 4))
        forget(model)
        if not mixed or not model.training:
            torch.testing.assert_close(model(x, **named), copy.deepcopy(model)(x, **named))
