"""What PyTorch does around the operators: gradcheck, double backward, torch.func, compile, export, checkpointing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import lowering
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.checkpoint import checkpoint

from bench.timing import saved_storages
from hra_kernels import hra_linear, ops, reflect, reflect_chain, wy_factor
from hra_kernels.testing.tolerance import relative, rounding

FLAGS = [(False,), (True,), (False, True)]


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors that name no device are made on the one under test."""
    with device:
        yield


def leaves(flags, D=10, R=3, dtype=torch.float64):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    x = torch.randn(4, D, dtype=dtype, generator=generator, requires_grad=True)
    us = [torch.randn(D, R - i, dtype=dtype, generator=generator, requires_grad=True) for i in range(len(flags))]
    return x, us


def chain(flags, transpose=True):
    return lambda x, *us: reflect_chain(x, us, flags, transpose=transpose)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("transpose", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradcheck_and_gradgradcheck(on_backend, device, flags, transpose):
    if ops.BACKENDS[on_backend].why_unsupported(device, torch.float64, 3):
        pytest.skip(f"{on_backend} leaves float64 to the reference")
    x, us = leaves(flags, D=6)
    assert torch.autograd.gradcheck(chain(flags, transpose), (x, *us))
    assert torch.autograd.gradgradcheck(chain(flags, transpose), (x, *us))


@pytest.mark.parametrize("apply_gs", [False, True])
def test_gradcheck_of_the_factor_alone(apply_gs):
    _, (u,) = leaves((apply_gs,))
    assert torch.autograd.gradcheck(lambda u: wy_factor(u, apply_gs), (u,))
    assert torch.autograd.gradgradcheck(lambda u: wy_factor(u, apply_gs), (u,))


def test_only_the_gradients_asked_for_are_computed():
    x, (u,) = leaves((False,))
    for need_x, need_u in [(True, False), (False, True)]:
        x.grad = u.grad = None
        reflect_chain(x.requires_grad_(need_x), [u.requires_grad_(need_u)], [False]).sum().backward()
        assert (x.grad is not None) == need_x and (u.grad is not None) == need_u
    with torch.no_grad():
        assert reflect_chain(x, [u], [False]).grad_fn is None


def test_saved_for_backward_is_x_and_little_more():
    M, D, R = 512, 256, 8
    x = torch.randn(M, D, requires_grad=True)
    w, u = torch.randn(64, D), torch.randn(D, R, requires_grad=True)
    saved = saved_storages(lambda: hra_linear(x, w, u), [w, u])
    assert saved.pop(x.data_ptr()) == x.nbytes
    assert sum(saved.values()) <= 4 * (M + D + R) * R


def test_backward_with_only_x_wanted_saves_no_x():
    x, u = torch.randn(512, 256, requires_grad=True), torch.randn(256, 8)
    assert sum(saved_storages(lambda: reflect_chain(x, [u], [False]), []).values()) < 4 * 256 * 8 * 2


def test_a_parameter_changed_before_backward_is_an_error():
    x, (u,) = leaves((False,))
    y = reflect_chain(x, [u], [False])
    with torch.no_grad():
        u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_two_backwards_through_one_factor():
    x, (u,) = leaves((False,))
    factor = ops.chain_factor([u], [False], torch.float64)
    for _ in range(2):  # two micro-batches: the first frees its graph
        reflect_chain(x, [u], [False], factor).sum().backward()
    once = u.grad / 2
    u.grad = None
    reflect_chain(x, [u], [False]).sum().backward()
    torch.testing.assert_close(u.grad, once)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_func_transforms(flags):
    x, us = leaves(flags)
    x, us = x.detach(), [u.detach() for u in us]
    f = chain(flags)
    xs = torch.randn(5, 4, 10, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda x: f(x, *us))(xs), torch.stack([f(x, *us) for x in xs]))
    weigh = torch.randn_like(x)  # |y|² does not depend on an orthogonal map
    grad = torch.func.grad(lambda u: (weigh * f(x, u, *us[1:])).sum())(us[0])
    u = us[0].clone().requires_grad_()
    (weigh * f(x, u, *us[1:])).sum().backward()
    assert relative(grad, u.grad) < rounding(10, 7, torch.float64)
    tangent = torch.randn_like(us[0])
    y, dy = torch.func.jvp(lambda u: f(x, u, *us[1:]), (us[0],), (tangent,))
    near = (f(x, us[0] + 1e-6 * tangent, *us[1:]) - f(x, us[0] - 1e-6 * tangent, *us[1:])) / 2e-6
    torch.testing.assert_close(dy, near, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(y, f(x, *us))


ARGUMENTS = {
    "wy_factor_fwd": "u no",
    "wy_factor_many": "us no",
    "wy_factor_bwd": "dv dt u v t no",
    "reflect_fwd": "x v t yes",
    "reflect_dx": "dy v t yes",
    "reflect_bwd": "dy x v t p yes",
    "chain": "x u yes no",
    "chain_fwd": "x u yes no",
    "chain_bwd": "dy x u v t p yes no",
    "weight_side_bwd": "dy x v t",
}


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(on_backend, op, dtype):
    shapes = {"us": (2, 32, 4), "u": (32, 4), "v": (4, 32), "dv": (4, 32), "t": (4, 4), "dt": (4, 4), "p": (6, 4)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()} | {"yes": True, "no": False}
    values |= {name: torch.randn(6, 32).to(dtype) for name in ("x", "dy")}
    torch.library.opcheck(getattr(torch.ops.hra, op).default, [values[name] for name in ARGUMENTS[op].split()])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_is_one_graph_for_every_batch_size(compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    w = torch.randn(24, 32)
    u = torch.randn(32, 8, requires_grad=True)

    def layer(x, u):
        return hra_linear(x, w, u).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    bound = rounding(32, 8, layers=2)  # forward and back
    for M in (6, 7, 64, 33):
        x = torch.randn(M, 32, requires_grad=True)
        results = []
        for function in (compiled, layer):
            y = function(x, u)
            grads = torch.autograd.grad(y.square().sum(), (x, u))
            results.append((y, *grads))
        for got, eager in zip(*results, strict=True):
            assert relative(got, eager) < bound
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_keeps_the_operators_where_ci_is_set(monkeypatch, dynamic):
    monkeypatch.setenv("CI", "true")  # an operator with a decomposition (ours: for ONNX) is an error to Inductor then
    for name in ("wy_factor_fwd", "reflect_fwd", "reflect_dx"):
        lowering.lowerings.pop(getattr(torch.ops.hra, name).default, None)
    torch._dynamo.reset()
    x, (u,) = leaves((False,), dtype=torch.float32)
    with fresh_inductor_cache():
        compiled = torch.compile(chain((False,)), fullgraph=True, dynamic=dynamic)
        got = torch.autograd.grad(compiled(x, u).sum(), (x, u))
        with torch.no_grad():
            assert relative(compiled(x, u), chain((False,))(x, u)) < rounding(*u.shape)
    for grad, eager in zip(got, torch.autograd.grad(chain((False,))(x, u).sum(), (x, u)), strict=True):
        assert relative(grad, eager) < rounding(*u.shape, layers=2)


def test_compiled_operator_is_bitwise_the_eager_one():
    torch._dynamo.reset()
    x, (u,) = leaves((False,), dtype=torch.float32)
    compiled = torch.compile(chain((False,)), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, chain((False,))):
        y = function(x, u)
        results.append((y, *torch.autograd.grad(y, (x, u), torch.ones_like(y) * x.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(24, 32), requires_grad=False)
            self.u = torch.nn.Parameter(torch.randn(32, 8))

        def forward(self, x):
            return hra_linear(x, self.w, self.u)

    layer, x = Layer(), torch.randn(5, 32)
    # strict, PyTorch 2.6 has no dynamic shapes in an autograd.Function
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("M", min=2)}}, strict=False)
    for M in (5, 9):
        x = torch.randn(M, 32)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_trace():
    x, (u,) = leaves((False,), dtype=torch.float32)
    module = torch.nn.Module()
    module.u = torch.nn.Parameter(u.detach())
    module.forward = lambda x: reflect_chain(x, [module.u], [False])
    other = torch.randn(7, 10)
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad:
            traced = torch.jit.trace(module, (x.detach(),))
            torch.testing.assert_close(traced(other), reflect_chain(other, [u], [False]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    x, (u,) = leaves((False,))
    plain = torch.autograd.grad(chain((False,))(x, u).cos().sum(), (x, u))
    saved = checkpoint(chain((False,)), x, u, use_reentrant=use_reentrant)
    for kept in (x, u):
        kept.grad = None
    saved.cos().sum().backward()
    torch.testing.assert_close((x.grad, u.grad), plain)


def test_autocast_casts_as_the_linear_layer_would(device):
    x, w, u = torch.randn(6, 32), torch.randn(24, 32), torch.randn(32, 8, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = hra_linear(x, w, u)
        direct = torch.nn.functional.linear(reflect_chain(x.bfloat16(), [u], [False], transpose=True), w)
    assert y.dtype == torch.bfloat16 and torch.equal(y, direct)
    y.sum().backward()
    assert u.grad.dtype == torch.float32 and u.grad.abs().sum() > 0


def test_reflect_accepts_one_to_four_dimensions():
    v, t = wy_factor(torch.randn(16, 4))
    rows = torch.randn(24, 16)
    flat = reflect(rows, v, t)
    for shape in [(24, 16), (2, 12, 16), (2, 3, 4, 16)]:
        assert torch.equal(reflect(rows.reshape(shape), v, t), flat.reshape(shape))
    torch.testing.assert_close(reflect(rows[0], v, t), flat[0])
