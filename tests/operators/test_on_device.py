"""Training as users do it, on the GPU where there is one: PEFT models, graphs, streams, compilation, mixed precision.

Results are compared with the same model in float64 on the CPU, whose layers are the explicit chain's or PEFT's own.
"""

import copy

import pytest
import torch
from torch import nn

from hra_kernels import ops
from hra_kernels.nn import HRALinear
from hra_kernels.regularizer import orthogonality_penalty
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import adapt, linear, merged_weight

FEATURES, OUT, ROWS = 48, 20, 33
FLOAT32 = rounding(FEATURES, 8, layers=2)


def stack(dtype=torch.float32):
    """Two linear layers, so that a gradient has to pass through an adapted one."""
    return nn.Sequential(linear(FEATURES, FEATURES, dtype), nn.Tanh(), linear(FEATURES, OUT, dtype, seed=1))


def batch(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, n, generator=generator).to(device, dtype) for n in (FEATURES, OUT)]


def train(model, batches, steps=3):
    """The trained vectors and the losses of a few steps of SGD."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for step in range(steps):
        x, target = batches[step % len(batches)]
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*parameters, *losses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peft_model_trains_as_pefts_own_does_in_float64(device, dtype):
    model = adapt(stack(dtype), targets=["0", "2"]).to(device)
    exact = adapt(stack(dtype), ours=False, targets=["0", "2"]).double()
    with torch.no_grad():  # the same start in both: PEFT's draws it in the base layer's dtype
        pairs = zip(*([p for p in m.parameters() if p.requires_grad] for m in (model, exact)), strict=True)
        for ours, theirs in pairs:
            theirs.copy_(ours)
    got = train(model, [batch(device, dtype, seed) for seed in range(2)])
    wanted = train(exact, [[part.double() for part in batch("cpu", dtype, seed)] for seed in range(2)])
    bound = rounding(FEATURES, 4, dtype, layers=2 * 3)  # two layers, three steps
    assert all(relative(one.cpu(), other) < bound for one, other in zip(got, wanted, strict=True))


def test_merge_save_and_move(device, tmp_path):
    model = adapt(stack(), targets=["0", "2"]).to(device)
    x, _ = batch(device)
    y = model(x)
    layer = model.base_model.model[0]
    wanted = merged_weight(layer)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    assert relative(layer.get_base_layer().weight, wanted) < FLOAT32 and relative(model(x), y) < FLOAT32
    model.unmerge_adapter()
    assert relative(model.cpu()(x.cpu()), y.cpu()) < FLOAT32, "a factor kept for one device served another"
    assert torch.equal(model.to(device)(x), y)
    fresh = adapt(stack(), seed=7, targets=["0", "2"]).to(device)
    fresh.load_adapter(tmp_path, "default")
    assert torch.equal(fresh(x), y)


def test_mixed_batch(device):
    model = adapt(nn.Sequential(linear(FEATURES, OUT)), targets=["0"]).to(device).eval()
    model.add_adapter("second", model.peft_config["default"])
    x, _ = batch(device)
    names = [["default", "second", "__base__"][i % 3] for i in range(ROWS)]
    y = model(x, adapter_names=names)
    for name in ("default", "second"):
        model.set_adapter(name)
        chosen = [i for i, one in enumerate(names) if one == name]
        assert relative(y[chosen], model(x)[chosen]) < FLOAT32
    assert torch.equal(y[2::3], model.base_model.model[0].base_layer(x)[2::3])


def test_autocast_and_gradient_scaling(device):
    model = adapt(stack(), targets=["0", "2"]).to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    x, target = batch(device)
    exact = torch.autograd.grad((model(x) - target).square().mean(), [model.base_model.model[0].hra_u["default"]])[0]
    with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16):
        loss = (model(x) - target).square().mean()
    scaler.scale(loss).backward()
    got = model.base_model.model[0].hra_u["default"].grad / scaler.get_scale()
    assert got.dtype == torch.float32 and relative(got, exact) < rounding(FEATURES, 4, torch.bfloat16, layers=2)


def test_the_regularizer(device):
    u = torch.randn(FEATURES, 8, generator=torch.Generator().manual_seed(0))
    leaves = [u.to(device, copy=True).requires_grad_(), u.double().requires_grad_()]
    for leaf in leaves:
        orthogonality_penalty([leaf]).backward()
    assert relative(leaves[0].grad.cpu(), leaves[1].grad) < FLOAT32


def test_compiled_model(device):
    torch._dynamo.reset()
    model = adapt(stack(), targets=["0", "2"]).to(device)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    got, wanted = (train(one, [batch(device)]) for one in (compiled, twin))
    assert all(relative(one, other) < FLOAT32 for one, other in zip(got, wanted, strict=True))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
def test_a_training_step_in_a_graph(on_backend, device):
    """Captured once and replayed, with new values in the same tensors: the steps run one by one.

    Called eagerly before and between replays too, which move no version: it has the factor of its present vectors.
    """
    if device.type == "cpu":
        pytest.skip(f"{on_backend} serves the CPU")
    served = ops.BACKENDS[on_backend].why_unsupported(device, torch.float32, 8) is None
    dtype = torch.float32 if served else torch.bfloat16
    eager = HRALinear(linear(FEATURES, OUT, dtype).to(device), r=8)
    with torch.no_grad():
        eager.hra_u.copy_(torch.randn(FEATURES, 8, generator=torch.Generator().manual_seed(0)))
    captured = copy.deepcopy(eager)
    batches = [batch(device, dtype, seed) for seed in range(4)]

    def step(layer, x, target):
        loss = (layer(x) - target).square().mean()
        (grad,) = torch.autograd.grad(loss, [layer.hra_u])
        with torch.no_grad():
            layer.hra_u.sub_(grad, alpha=0.5)
        return loss

    start = captured.hra_u.detach().clone()
    static = [part.clone() for part in batches[0]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured, *static)
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        captured.hra_u.copy_(start)
    captured(static[0])  # an eager call's factor, kept when the capture begins
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, *static)
    for parts in batches:
        for to, part in zip(static, parts, strict=True):
            to.copy_(part)
        graph.replay()
        torch.testing.assert_close(loss, step(eager, *parts))
        torch.testing.assert_close(captured.hra_u, eager.hra_u)
        torch.testing.assert_close(captured(parts[0]), eager(parts[0]))


@needs_gpu
def test_a_factor_is_not_read_before_another_stream_has_written_it():
    layer = HRALinear(linear(2048, 64).to("cuda"), r=8)
    x = torch.randn(8, 2048, device="cuda")
    stream = torch.cuda.Stream()
    for seed in range(20):
        u = torch.randn(2048, 8, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad():
            layer.hra_u.copy_(u)
        torch.cuda.synchronize()
        torch.cuda._sleep(10_000_000)  # what the first call launches waits behind this
        y = layer(x)
        with torch.cuda.stream(stream):
            other = layer(x)
        torch.cuda.synchronize()
        assert torch.equal(y, other)
