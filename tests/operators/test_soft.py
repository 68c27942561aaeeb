"""Soft chains (eps) and the output side: every backend against the authors' layer, written out from its formula."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hra_kernels.nn
from hra_kernels import ops, soft
from hra_kernels.factors import factor_dtype
from hra_kernels.functional import hra_conv2d, hra_linear, hra_weight
from hra_kernels.reference import dense
from hra_kernels.soft import Soft
from hra_kernels.testing.cases import DTYPES, Case, naive
from hra_kernels.testing.tolerance import assert_accurate, relative, rounding, violations

EPS = 1e-4
KINDS = ["short", "threshold", "long", "pairs", "pairs_step", "zero_columns", "scales"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(kind, features, rank):
    """u (D, R) float32; norms are to be compared with sqrt(EPS) = 0.01."""
    u = torch.randn(features, rank, generator=generator(3)) / features**0.5
    if kind == "short":  # as the authors' code starts
        return u * 1e-3
    if kind == "threshold":  # where single reflections are nearly singular
        return u * 1e-2 * torch.linspace(0.5, 2, rank)
    if kind in ("pairs", "pairs_step"):
        u[:, 1::2] = u[:, 0 : 2 * (rank // 2) : 2]
        return u + (1e-4 * torch.randn(u.shape, generator=generator(4)) if kind == "pairs_step" else 0)
    if kind == "zero_columns":
        u[:, 1::3] = 0
    if kind == "scales":
        return u * torch.logspace(-12, 2, rank)  # the naive chain's squares in float16 go no further
    return u


def chain(x, u, eps, transpose=False):
    """One reflection at a time, as the authors' code for language models has it."""
    for column in reversed(u.unbind(1)) if transpose else u.unbind(1):
        unit = column / torch.sqrt((column**2).sum() + eps)
        x = x - 2 * torch.outer(x @ unit, unit)
    return x


def authors_q(u, eps):
    """Q = H_1 ... H_R."""
    return chain(torch.eye(u.shape[0], dtype=u.dtype), u, eps)


def authors_layer(x, w, u, bias, eps):
    """(base(x) - b) Q + b."""
    return F.linear(x, w) @ authors_q(u, eps) + (0 if bias is None else bias)


def results(function, x, u, dy, dtype):
    x, u = (tensor.detach().clone().to(dtype).requires_grad_() for tensor in (x, u))
    y = function(x, u)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "du": u.grad}


def authors_chain(x, u, dy, case, dtype=torch.float64):
    return results(lambda x, u: chain(x, u, EPS, case.transpose), x, u, dy, dtype)


@functools.cache
def answers(kind, dtype, transpose):
    """(inputs, the exact answer, the naive one in dtype)."""
    case = Case(130, 264, 7, transpose=transpose)
    x, dy = (torch.randn(case.M, case.D, generator=generator(seed)).to(dtype) for seed in (0, 1))
    u = vectors(kind, case.D, case.R).to(factor_dtype(dtype))
    return (x, u, dy), authors_chain(x, u, dy, case), naive(x, u, dy, case, dtype, authors_chain)


def ours(x, u, dy, eps, transpose, device="cpu"):
    x, u = (tensor.detach().clone().to(device).requires_grad_() for tensor in (x, u))
    y = ops.reflect_chain(x, [u], [Soft(eps)], transpose=transpose)
    y.backward(dy.to(device))
    return {"y": y.detach().cpu(), "dx": x.grad.cpu(), "du": u.grad.cpu()}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transpose", [False, True])
def test_soft_chain(on_backend, kind, transpose, dtype, device):
    reason = ops.BACKENDS[on_backend].why_unsupported(device, dtype, 7, 264)
    if reason:
        pytest.skip(reason)
    (x, u, dy), exact, plain = answers(kind, dtype, transpose)
    assert_accurate(ours(x, u, dy, EPS, transpose, device), plain, exact, dtype, 7)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e12])
def test_vectors_of_any_size(on_backend, size, device):
    """Where squares are out of float32's range: du is as exact as elsewhere."""
    (x, u, dy), _, _ = answers("long", torch.float32, False)
    u = u * size
    exact = results(lambda x, u: chain(x, u, EPS, False), x, u, dy, torch.float64)
    got = ours(x, u, dy, EPS, False, device)
    assert all(relative(got[name], exact[name]) < rounding(264, 7, layers=2) for name in got)


BUGS = {
    "correct": {},
    "eps forgotten": {"eps": 0.0},
    "eps by one percent": {"eps": 1.01 * EPS},
    "eps outside the root": {"outside": True},
    "reversed": {"reverse": True},
    "gradient of the plain chain": {"plain_gradient": True},
}
CAUGHT = {
    "short": set(BUGS) - {"correct"},
    "threshold": set(BUGS) - {"correct"},
    "long": set(BUGS) - {"correct", "eps by one percent"},  # |u|² is 1e4 eps there: one part in a million
}


@pytest.mark.parametrize("kind", CAUGHT)
def test_planted_bugs(kind):
    """Each bug breaks the accuracy rule in float32, and the correct chain does not."""
    (x, u, dy), exact, plain = answers(kind, torch.float32, False)

    def planted(eps=EPS, outside=False, reverse=False, plain_gradient=False):
        if outside:  # u / (|u| + eps)
            norm = torch.linalg.vector_norm(u, dim=0)
            found = results(lambda x, u: chain(x, u, 0.0, False), x, u, dy, torch.float64)
            scaled = u.double() / (norm.double() + eps)
            y = x.double()
            for column in scaled.unbind(1):
                y = y - 2 * torch.outer(y @ column, column)
            return {**found, "y": y}
        if plain_gradient:
            return {
                **ours(x, u, dy, eps, False),
                "du": results(lambda x, u: chain(x, u, 0, False), x, u, dy, x.dtype)["du"],
            }
        if eps == 0:
            return results(lambda x, u: chain(x, u, 0.0, False), x, u, dy, torch.float64)
        return ours(x, u, dy, eps, reverse)

    caught = {bug for bug, how in BUGS.items() if violations(planted(**how), plain, exact, torch.float32, 7)}
    assert caught == CAUGHT[kind]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("eps", [0.0, EPS, (EPS, 0.0, 1e-2)], ids=str)
def test_linear_is_the_authors_layer(eps, bias):
    """In float64: outputs and the gradients of x, u, w and bias; three chains with an eps each as their product."""
    x, w, dy = (torch.randn(*s, generator=generator(), dtype=torch.float64) for s in ((5, 7, 20), (12, 20), (5, 7, 12)))
    b = torch.randn(12, generator=generator(5), dtype=torch.float64) if bias else None
    each = eps if isinstance(eps, tuple) else (eps,)
    us = [vectors("threshold", 12, r).double() for r in (4, 3, 2)][: len(each)]
    inputs = [tensor.requires_grad_() for tensor in (x, w, *us, *([b] if bias else []))]
    q = torch.eye(12, dtype=torch.float64)
    for u, one in zip(us, each, strict=True):
        q = q @ authors_q(u, one)
    exact = F.linear(x, w) @ q + (b if bias else 0)
    got = hra_linear(x, w, us, b, side="output", eps=eps)
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(exact, inputs, dy))
    merged = hra_weight(w, us, side="output", eps=eps)
    torch.testing.assert_close(merged, q.T @ w)
    torch.testing.assert_close(F.linear(x, merged, b), exact)


def test_input_side_and_convolution():
    w, u = torch.randn(6, 20, generator=generator(), dtype=torch.float64), vectors("threshold", 20, 3).double()
    x = torch.randn(5, 20, generator=generator(1), dtype=torch.float64)
    q = authors_q(u, EPS)
    torch.testing.assert_close(hra_linear(x, w, u, eps=EPS), x @ (w @ q).T)
    torch.testing.assert_close(hra_weight(w, u, eps=EPS), w @ q)
    x, w = x.reshape(1, 1, 10, 10), w[:, :18].reshape(6, 2, 3, 3)
    u = u[:18]
    x = torch.cat([x, x.flip(2)], 1)
    adapted = (w.flatten(1) @ authors_q(u, EPS)).reshape(w.shape)
    torch.testing.assert_close(hra_conv2d(x, w, u, apply_gs=Soft(EPS)), F.conv2d(x, adapted))


def test_eps_zero_is_the_plain_chain_bit_for_bit(on_backend):
    x, w, u = torch.randn(9, 20), torch.randn(12, 20), torch.randn(20, 4)
    assert torch.equal(hra_linear(x, w, u, eps=0), hra_linear(x, w, u))
    assert torch.equal(hra_weight(w, u, eps=0.0, side="input"), hra_weight(w, u))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_pairs_on_the_output_side_are_the_identity_bit_for_bit(on_backend, dtype):
    x, w, b = (torch.randn(s, generator=generator()).to(dtype) for s in ((9, 20), (12, 20), (12,)))
    u = vectors("pairs", 12, 4)
    assert torch.equal(hra_linear(x, w, u, b, side="output"), F.linear(x, w, b))


def test_bias_is_taken_out_first():
    """A bias of 1000 leaves in the output what it puts in: nothing of it is reflected."""
    x, w, u = torch.randn(5, 20), torch.randn(12, 20), vectors("long", 12, 3)
    got = hra_linear(x, w, u, torch.full((12,), 1000.0), side="output", eps=EPS)
    exact = authors_layer(x.double(), w.double(), u.double(), 1000.0, EPS)
    assert relative(got, exact) < rounding(20, 3)


def test_transforms_and_compilation():
    x, w, b = torch.randn(5, 20), torch.randn(12, 20), torch.randn(12)
    u = vectors("threshold", 12, 4).requires_grad_()

    def layer(u):
        return hra_linear(x, w, u, b, side="output", eps=EPS)

    y = layer(u)
    (du,) = torch.autograd.grad(y.square().sum(), u)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(u)
    assert relative(compiled, y) < rounding(20, 4)
    assert relative(torch.autograd.grad(compiled.square().sum(), u)[0], du) < rounding(20, 4, layers=2)
    assert relative(torch.func.grad(lambda u: layer(u).square().sum())(u.detach()), du) < rounding(20, 4, layers=2)
    x, w, b = x[:2].double(), w.double(), b.double()
    assert torch.autograd.gradgradcheck(layer, u.detach().double().requires_grad_())


def test_inverse():
    w = torch.randn(12, 20, generator=generator(), dtype=torch.float64)
    us = [vectors("threshold", 12, 3).double() * 3, vectors("long", 12, 4).double()]
    for eps in (EPS, (EPS, 0.0)):
        adapted = hra_weight(w, us, side="output", eps=eps)
        torch.testing.assert_close(hra_weight(adapted, us, side="output", eps=eps, inverse=True), w)
    v, t = ops.wy_factor(us[1])
    torch.testing.assert_close(soft.inverse_factor(v, t)[1], t.T)  # a plain chain's inverse is its transpose
    assert relative(dense(*soft.inverse_factor(v, t)), dense(v, t).T) < rounding(12, 4, torch.float64)


def test_a_singular_chain_is_not_undone():
    u = torch.zeros(12, 1, dtype=torch.float64)
    u[3] = EPS**0.5
    with pytest.raises(ValueError, match="cannot be undone"):
        hra_weight(torch.randn(12, 20, dtype=torch.float64), u, side="output", eps=EPS, inverse=True)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf"), "1e-4", None])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps must be a finite number"):
        hra_linear(torch.randn(2, 4), torch.randn(3, 4), torch.randn(4, 2), eps=eps)


def test_bad_input():
    x, w, u = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 2)
    with pytest.raises(ValueError, match="side must be one of"):
        hra_linear(x, w, u, side="left")
    with pytest.raises(ValueError, match="side must be one of"):
        hra_weight(w, u, side="Output")
    with pytest.raises(ValueError, match="D = 4"):
        hra_linear(x, w, u)
    with pytest.raises(ValueError, match="D = 3"):
        hra_linear(x, w, torch.randn(4, 2), side="output")
    with pytest.raises(ValueError, match="eps must be 0 with Gram-Schmidt"):
        hra_linear(x, w, u, side="output", apply_gs=True, eps=EPS)
    with pytest.raises(ValueError, match="one for each of the 1 chains"):
        hra_linear(x, w, u, side="output", eps=[EPS, EPS])
    with pytest.raises(ValueError, match="side must be one of"):
        hra_kernels.nn.HRALinear(nn.Linear(4, 3), side="both")
    with pytest.raises(ValueError, match="eps must be 0 with Gram-Schmidt"):
        hra_kernels.nn.HRALinear(nn.Linear(4, 3), apply_gs=True, eps=EPS)


@pytest.mark.parametrize("eps", [0.0, EPS])
def test_module(eps):
    """Starts at, or near, the base layer; learns; is what it is merged into; the factor follows the steps."""
    torch.manual_seed(0)
    base = nn.Linear(20, 64)
    layer = hra_kernels.nn.HRALinear(base, r=4, side="output", eps=eps)
    assert layer.hra_u.shape == (64, 4) and ("side='output'" in repr(layer))
    x, target = torch.randn(16, 20), torch.randn(16, 64)
    start = relative(layer(x), base(x))
    assert start < (rounding(20, 4) if eps == 0 else 0.1)
    if eps:
        assert start > 0 and layer.hra_u.detach().norm(dim=0).max() < eps**0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        exact = authors_layer(x.double(), base.weight.double(), layer.hra_u.double(), base.bias.double(), eps)
        assert relative(layer(x), exact) < rounding(20, 4)
    assert losses[-1] < 0.95 * losses[0]
    assert relative(layer.merged()(x), layer(x)) < rounding(20, 4, layers=2)
    again = hra_kernels.nn.HRALinear(copy.deepcopy(base), r=4, side="output", eps=eps)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_a_zero_column_has_no_gradient(on_backend):
    """Exactly: columns that pad an adapter to a larger rank stay zero under any optimizer."""
    (x, u, dy), exact, _ = answers("zero_columns", torch.float32, False)
    du = ours(x, u, dy, EPS, False)["du"]
    zero = (u == 0).all(0)
    assert zero.any() and not du[:, zero].any() and du[:, ~zero].any() and not exact["du"][:, zero].any()


def test_vectors_in_16_bits(on_backend, device):
    """They are read as they are; the square root of eps is not rounded to their dtype."""
    x, u = torch.randn(9, 40, device=device), vectors("threshold", 40, 4).bfloat16().to(device)
    y, wide = (ops.reflect_chain(x, [one], [Soft(EPS)]) for one in (u, u.float()))
    assert torch.equal(y, wide)


def test_factors_of_many_layers():
    us = [vectors("threshold", 40, 4) * scale for scale in (1, 2, 3)]
    for (v, t), u in zip(ops.wy_factor_many(us, Soft(EPS)), us, strict=True):
        assert relative(dense(v, t), authors_q(u.double(), EPS)) < rounding(40, 4)
