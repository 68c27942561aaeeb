"""`hra_linear` on both sides against the explicit chain in float64, and when it takes the weight side."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.timing import saved_storages
from hra_kernels import hra_linear, ops, reference, weight_side
from hra_kernels.testing.cases import CASES, SMALL_CASES, make_inputs, unit_columns
from hra_kernels.testing.tolerance import assert_accurate, violations

INPUT_CASES = [case for case in CASES if case.transpose]
OUTPUTS = 24
FLAGS = [(False,), (True,), (False, True, False)]
RANKS = (4, 3, 2)


@pytest.fixture(params=[True, False], ids=["weight side", "input side"])
def side(request, monkeypatch):
    """The side that hra_linear takes, whatever the shapes: whether it is the weight side."""
    monkeypatch.setattr(weight_side, "pays", lambda *_: request.param)
    return request.param


@pytest.fixture
def on_weight_side(monkeypatch):
    monkeypatch.setattr(weight_side, "pays", lambda *_: True)


def is_weight_side(y):
    return type(y.grad_fn).__name__ == "_LinearBackward"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit_linear(x, w, u, dy, case, dtype):
    """y, dx and du of y = x (W Q)ᵀ by autograd through the explicit chain, all of it in `dtype`."""
    unit, scale = unit_columns(u, dtype)
    x = x.detach().to(dtype).requires_grad_()
    y = F.linear(reference.explicit_chain(unit, case.apply_gs, x, True), w.to(dtype))
    dx, du = torch.autograd.grad(y, (x, unit), dy.to(dtype), materialize_grads=True)
    return {"y": y.detach(), "dx": dx, "du": du.double() / scale}


def linear_inputs(case, dtype):
    x, u, _ = make_inputs(case, dtype)
    w = (randn(OUTPUTS, case.D, seed=1) / case.D**0.5).to(dtype)
    return x.requires_grad_(), w, u.requires_grad_(), randn(case.M, OUTPUTS, seed=2).to(dtype)


@functools.cache
def linear_answers(case, dtype):
    """Inputs, the exact answer and the naive one: every backend's, and both sides'."""
    inputs = linear_inputs(case, dtype)
    return inputs, explicit_linear(*inputs, case, torch.float64), explicit_linear(*inputs, case, dtype)


def linear_results(x, w, u, dy, case):
    y = hra_linear(x, w, u, apply_gs=case.apply_gs)
    dx, du = torch.autograd.grad(y, (x, u), dy)
    return y, {"y": y.detach(), "dx": dx, "du": du}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", INPUT_CASES, ids=str)
def test_accuracy(on_backend, case, dtype, side, device):
    if on_backend == "triton" and device.type == "cpu" and case not in SMALL_CASES:
        pytest.skip("interpreted here, and this case is large")
    reason = ops.BACKENDS[on_backend].why_unsupported(device, dtype, case.R, case.D)
    if reason:
        pytest.skip(reason)
    inputs, exact, naive = linear_answers(case, dtype)
    y, got = linear_results(
        *(tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in inputs), case
    )
    assert is_weight_side(y) == side
    assert_accurate({name: tensor.cpu() for name, tensor in got.items()}, naive, exact, dtype, case.R)


@pytest.mark.parametrize("needs_bias", [True, False])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.usefixtures("on_weight_side")
def test_is_the_merged_weight(flags, needs_bias):
    x, w, dy = randn(5, 7, 20).requires_grad_(), randn(12, 20), randn(5, 7, 12)
    bias = randn(12).requires_grad_(needs_bias)
    us = [randn(20, r, seed=r).requires_grad_() for r, _ in zip(RANKS, flags, strict=False)]
    wanted = [x, *us, *([bias] if needs_bias else [])]
    y = hra_linear(x, w, us, bias, apply_gs=flags)
    assert is_weight_side(y)
    merged = w
    for u, apply_gs in zip(us, flags, strict=True):
        merged = merged @ reference.explicit_chain(u, apply_gs)
    exact = F.linear(x, merged, bias)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(exact, wanted, dy))


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.usefixtures("on_weight_side")
def test_gradients_that_are_not_wanted(needs_x):
    x, w = randn(9, 20).requires_grad_(needs_x), randn(12, 20)
    us = [randn(20, 2).requires_grad_(), randn(20, 3)]
    hra_linear(x, w, us).sum().backward()
    assert (x.grad is not None) == needs_x and us[0].grad is not None and us[1].grad is None


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.usefixtures("on_weight_side")
def test_second_derivatives(flags):
    x, w, bias = randn(4, 6).requires_grad_(), randn(3, 6), randn(3).requires_grad_()
    us = [randn(6, 2, seed=i).requires_grad_() for i in range(len(flags))]
    assert torch.autograd.gradgradcheck(
        lambda x, bias, *us: hra_linear(x, w, list(us), bias, apply_gs=flags).square(), (x, bias, *us)
    )


@pytest.mark.usefixtures("on_weight_side")
def test_saves_x_and_little_more():
    M, D, R = 512, 256, 8
    x, w, u = torch.randn(M, D, requires_grad=True), torch.randn(64, D), torch.randn(D, R, requires_grad=True)
    saved = saved_storages(lambda: hra_linear(x, w, u), [w, u])
    assert saved.pop(x.data_ptr()) == x.nbytes
    assert sum(saved.values()) <= 4 * (D + R) * R


@pytest.mark.parametrize("changed", ["w", "u"])
@pytest.mark.usefixtures("on_weight_side")
def test_a_tensor_changed_before_backward_is_an_error(changed):
    tensors = {"w": randn(12, 20), "u": randn(20, 2).requires_grad_()}
    y = hra_linear(randn(9, 20), **tensors)
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.usefixtures("on_weight_side")
def test_checkpoint(use_reentrant):
    x, w, u = randn(9, 20).requires_grad_(), randn(12, 20), randn(20, 2).requires_grad_()
    f = lambda x, u: hra_linear(x, w, u).cos()  # noqa: E731
    plain = torch.autograd.grad(f(x, u).sum(), (x, u))
    checkpoint(f, x, u, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close((x.grad, u.grad), plain)


@pytest.mark.usefixtures("on_weight_side")
def test_backward_under_autocast():
    x, w, u = (randn(*s).float().requires_grad_(s != (12, 20)) for s in ((9, 20), (12, 20), (20, 2)))
    y = hra_linear(x, w, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dx, du = torch.autograd.grad(y.sum(), (x, u))
    assert dx.dtype == du.dtype == torch.float32


@pytest.mark.usefixtures("on_weight_side")
def test_what_stays_on_the_input_side():
    x, w, u = randn(9, 20).requires_grad_(), randn(12, 20), randn(20, 2).requires_grad_()
    assert is_weight_side(hra_linear(x, w, u))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_weight_side(hra_linear(x.float(), w.float(), u))
    assert not is_weight_side(hra_linear(x, w.clone().requires_grad_(), u))
    assert not is_weight_side(hra_linear(x, w, u, eps=1e-4))
    assert not is_weight_side(hra_linear(x, w, randn(12, 2).requires_grad_(), side="output"))
    assert not is_weight_side(hra_linear(x, w, u.detach()))
    with torch.no_grad():
        assert hra_linear(x, w, u).grad_fn is None
    compiled = torch.compile(hra_linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, u), hra_linear(x, w, u))
    y, tangent = torch.func.jvp(lambda x: hra_linear(x, w, u), (x.detach(),), (x.detach(),))
    torch.testing.assert_close(y, tangent)


@pytest.mark.parametrize("dtype, ratio", [(torch.float32, 2), (torch.float64, 2), (torch.bfloat16, 3)], ids=str)
def test_shapes_decide(dtype, ratio):
    def chosen(outputs, rows):
        w, u = torch.empty(outputs, 256, dtype=dtype), torch.empty(256, 8)
        return weight_side.pays(torch.empty(2, rows // 2, 256, dtype=dtype), w, [u])

    if ops.backend_report()["cpu"] is None:
        assert chosen(512, 512 * ratio) and not chosen(512, 512 * ratio - 2)
        assert chosen(8, 512) and not chosen(8, 510)
    with ops.use_backend("reference"):
        assert not chosen(512, 512 * ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_decide_on_a_gpu(dtype, monkeypatch):
    """A tenth less of 6 M D elements: from M = 20/7 N on; and 100 us at 3 TB/s."""
    chosen = SimpleNamespace(name="triton")
    monkeypatch.setattr(weight_side, "choose", lambda *_: chosen)

    def pays(rows, outputs, width=4096):
        x, w = (torch.empty(size, width, dtype=dtype, device="meta") for size in (rows, outputs))
        return weight_side.pays(x, w, [torch.empty(width, 8)])

    rows = 20 * 4096
    assert pays(rows, 7 * 4096) and not pays(rows - 1, 7 * 4096)
    least = 3 * 10**8 / dtype.itemsize / 4096  # rows of 4096, of which each row of x saves two, one of W costs four
    assert pays(int(least / 2 + 3), 1) and not pays(int(least / 2), 1)
    chosen.name = "cuda"
    assert not pays(rows, 7 * 4096)


@pytest.mark.skipif(ops.backend_report()["cpu"] is not None, reason="the CPU backend is not built")
def test_is_taken_of_itself():
    x, w, u = torch.randn(4, 256, 256), torch.randn(128, 256), torch.randn(256, 8, requires_grad=True)
    assert is_weight_side(hra_linear(x, w, u)) and not is_weight_side(hra_linear(x[:1], w, u))


def wrong_side_of_w(w, v, t):
    return torch.ops.hra.reflect_dx(w, v, t, False)


def reflected_in_forward_only():
    calls = []

    def reflected(w, v, t):
        calls.append(w)
        return w if len(calls) > 1 else torch.ops.hra.reflect_dx(w, v, t, True)

    return reflected


@pytest.mark.parametrize("bug", [wrong_side_of_w, reflected_in_forward_only()], ids=["W Qᵀ", "W in backward"])
@pytest.mark.usefixtures("on_weight_side")
def test_the_rule_rejects(bug, monkeypatch):
    case = next(case for case in INPUT_CASES if case.M >= 128 and case.R == 8)
    inputs, exact, naive = linear_answers(case, torch.float32)
    assert not violations(linear_results(*inputs, case)[1], naive, exact, torch.float32, case.R)
    monkeypatch.setattr(weight_side, "_reflected", bug)
    assert violations(linear_results(*inputs, case)[1], naive, exact, torch.float32, case.R)
