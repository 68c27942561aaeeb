"""`reflect_chain` in eager mode, one node that calls the backend, against the registered operators it goes around."""

import pytest
import torch

from hra_kernels import ops, reflect_chain
from hra_kernels.testing.cases import DTYPES

FLAGS = [(False,), (True,), (False, True)]


def inputs(device, dtype, flags, shape=(3, 5, 24)):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *shape, generator=generator).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    us = [torch.randn(shape[-1], 4 - i, generator=generator).to(device, wide) for i in range(len(flags))]
    return x, dy, us


def results(x, dy, us, flags, transpose=True, need_x=True):
    x, us = x.detach().requires_grad_(need_x), [u.clone().requires_grad_() for u in us]
    y = reflect_chain(x, us, flags, transpose=transpose)
    with torch.no_grad():
        inference = reflect_chain(x, us, flags, transpose=transpose)
    return [y, inference, *torch.autograd.grad(y, [x, *us] if need_x else us, dy)]


def through_the_dispatcher(monkeypatch, *arguments, **named):
    with monkeypatch.context() as patch:
        patch.setattr(ops, "is_eager", lambda *_: False)
        return results(*arguments, **named)


def supported(backend, device, dtype):
    if ops.BACKENDS[backend].why_unsupported(device, dtype, 8):
        pytest.skip(f"{backend} does not serve {dtype}")


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_routes_agree_bit_for_bit(on_backend, device, dtype, flags, monkeypatch):
    supported(on_backend, device, dtype)
    x, dy, us = inputs(device, dtype, flags)
    for transpose in (False, True):
        for need_x in (False, True):
            direct = results(x, dy, us, flags, transpose, need_x)
            dispatched = through_the_dispatcher(monkeypatch, x, dy, us, flags, transpose, need_x)
            assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


@pytest.mark.parametrize("layout", ["one row", "no rows", "columns apart", "strided rows", "permuted", "expanded"])
def test_both_routes_agree_whatever_the_layout(on_backend, device, layout, monkeypatch):
    shape = {"one row": (24,), "no rows": (0, 24)}.get(layout, (5, 24))
    x, dy, us = inputs(device, torch.float32, (False,), shape)
    if layout == "columns apart":
        x, dy = x.mT.contiguous().mT, dy.mT.contiguous().mT
    elif layout == "strided rows":
        x = torch.cat([x, x], 1)[:, :24]
    elif layout == "permuted":
        x, dy = (torch.stack([one, 2 * one]).transpose(0, 1) for one in (x, dy))
    elif layout == "expanded":
        x, dy = x[:1].expand(5, 24), dy[:1].expand(5, 24)
    direct = results(x, dy, us, (False,))
    dispatched = through_the_dispatcher(monkeypatch, x, dy, us, (False,))
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))
    assert direct[0].shape == x.shape and direct[2].shape == x.shape


def test_both_routes_agree_under_autocast(on_backend, device, monkeypatch):
    x, dy, us = inputs(device, torch.float32, (False,))
    with torch.autocast(device.type, torch.bfloat16):
        direct = results(x, dy, us, (False,))
        dispatched = through_the_dispatcher(monkeypatch, x, dy, us, (False,))
    assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


def test_one_node_and_no_dispatch(device):
    x, dy, (u,) = inputs(device, torch.float32, (False,))
    x.requires_grad_(), u.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = reflect_chain(x, [u], [False], ops.chain_factor([u], [False]))
        y.backward(dy)
    nodes = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert [node.variable is leaf for node, leaf in zip(nodes, (x, u), strict=True)] == [True, True]
    assert not {event.name for event in profile.events() if event.name.startswith("hra::")}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.Tensor.int}, TypeError, "x must be float32"),
        ({"x": lambda x: x[..., :5]}, ValueError, r"v must be \(R, D\) with D = x.shape\[-1\] = 5"),
        ({"x": lambda x: x.to("meta")}, ValueError, "v must be on x's device meta"),
        ({"v": lambda v: v[0]}, ValueError, r"v must be \(R, D\)"),
        ({"v": torch.Tensor.double}, TypeError, "v must be torch.float32"),
        ({"t": lambda t: t[:1]}, ValueError, r"t must be \(R, R\)"),
        ({"t": torch.Tensor.bfloat16}, TypeError, "t must be torch.float32"),
        ({"u": lambda u: u[:5]}, ValueError, r"u must have shape \(24, 4\), got \(5, 4\)"),
        ({"u": lambda u: u[:, :3]}, ValueError, "v must have one row for each of the 3 columns of u, got 4"),
        ({"u": torch.Tensor.int}, TypeError, "u must be float32"),
        ({"u": lambda u: u.to("meta")}, ValueError, "u must be on .*, got meta"),
    ],
)
def test_what_is_rejected(device, change, error, message):
    x, _, (u,) = inputs(device, torch.float32, (False,))
    v, t = ops.chain_factor([u], [False])
    given = {"x": x, "v": v, "t": t, "u": u}
    given |= {name: function(given[name]) for name, function in change.items()}
    with pytest.raises(error, match=f"^reflect_chain: {message}"):
        reflect_chain(given["x"], [given["u"]], [False], (given["v"], given["t"]))


def test_what_hooks_on_saved_tensors_bring_is_checked(device):
    x, dy, (u,) = inputs(device, torch.float32, (False,))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor[:1]):
        y = reflect_chain(x, [u.requires_grad_()], [False])
    with pytest.raises(ValueError, match=r"^reflect_chain: "):
        y.backward(dy)
