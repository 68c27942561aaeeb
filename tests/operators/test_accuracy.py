"""Every backend against the explicit chain in float64, forward and every gradient, by the one accuracy rule.

Also what must hold exactly: the identity at HRA's initialization, repeatability, untouched inputs, views as inputs.
"""

import functools

import pytest
import torch

from hra_kernels import ops, reference
from hra_kernels.factors import factor_dtype
from hra_kernels.testing.cases import (
    CASES,
    DTYPES,
    SMALL_CASES,
    Case,
    explicit,
    explicit_weight_side,
    make_inputs,
    make_u,
)
from hra_kernels.testing.cases import naive as naive_chain
from hra_kernels.testing.tolerance import assert_accurate, violations

SLOW_BACKENDS = {"triton", "cuda-emulated"}
"""Where these run on a CPU, they interpret: they get the small cases."""


EVERY_BACKEND = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
"""Between them these reach every backend, and both widths of an element."""


@functools.cache
def inputs_and_answers(case, dtype, answer):
    """(x, u, dy), the exact answer and the naive one: every backend's, and slower than what is tested."""
    x, u, dy = make_inputs(case, dtype)
    return (x, u, dy), answer(x, u, dy, case), naive_chain(x, u, dy, case, dtype, answer)


def chain_results(x, u, dy, case):
    """y, dx and du through the public operators."""
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    y = ops.reflect_chain(x, [u], [case.apply_gs], transpose=case.transpose)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "du": u.grad}


def weight_side_du(x, u, dx, case):
    """du of y = x (W Q)ᵀ through the registered operators."""
    v, t = torch.ops.hra.wy_factor_fwd(u, case.apply_gs)
    dv, dt = torch.ops.hra.weight_side_bwd(dx, x, v, t)
    return torch.ops.hra.wy_factor_bwd(dv, dt, u, v, t, case.apply_gs)


def skip_unsupported(backend, device, dtype, case):
    if backend in SLOW_BACKENDS and device.type == "cpu" and case in CASES and case not in SMALL_CASES:
        pytest.skip(f"{backend} is interpreted here, and this case is large")
    reason = ops.BACKENDS[backend].why_unsupported(device, dtype, case.R, case.D)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chain(on_backend, case, dtype, device):
    skip_unsupported(on_backend, device, dtype, case)
    (x, u, dy), exact, naive = inputs_and_answers(case, dtype, explicit)
    got = chain_results(x.to(device), u.to(device), dy.to(device), case)
    assert_accurate({name: tensor.cpu() for name, tensor in got.items()}, naive, exact, dtype, case.R)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", [case for case in CASES if case.transpose], ids=str)
def test_weight_side(on_backend, case, dtype, device):
    skip_unsupported(on_backend, device, dtype, case)
    (x, u, dx), exact, naive = inputs_and_answers(case, dtype, explicit_weight_side)
    got = {"du": weight_side_du(x.to(device), u.to(device), dx.to(device), case).cpu()}
    assert_accurate(got, naive, exact, dtype, case.R)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(130, 264, 7), (33, 100, 32), (1, 64, 8)], ids=str)
def test_reflect_alone(on_backend, shape, transpose, dtype, device):
    """reflect's own gradients, for v and t that are no chain's factor."""
    M, D, R = shape
    skip_unsupported(on_backend, device, dtype, Case(M, D, R))
    generator = torch.Generator().manual_seed(0)
    wide = factor_dtype(dtype)
    x, dy = (torch.randn(M, D, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(R, D, generator=generator).to(wide) / D**0.5
    t = torch.randn(R, R, generator=generator).to(wide)

    def run(x, dy, v, t):
        y, p = reference.reflect_fwd(x, v, t, transpose)
        return dict(zip(("y", "dx", "dv", "dt"), (y, *reference.reflect_bwd(dy, x, v, t, p, transpose)), strict=True))

    exact = run(x.double(), dy.double(), v.double(), t.double())
    # the naive version rounds v and t to x's dtype; float64 sums the features in another order instead
    order = torch.randperm(D, generator=generator) if dtype == torch.float64 else torch.arange(D)
    naive = run(x[:, order], dy[:, order], v[:, order].to(dtype).to(wide), t.to(dtype).to(wide))
    naive = {name: tensor if name == "dt" else tensor[:, torch.argsort(order)] for name, tensor in naive.items()}
    leaves = [tensor.to(device).requires_grad_() for tensor in (x, v, t)]
    y = ops.reflect(*leaves, transpose)
    y.backward(dy.to(device))
    got = dict(zip(("y", "dx", "dv", "dt"), (y.detach(), *(leaf.grad for leaf in leaves)), strict=True))
    assert_accurate({name: tensor.cpu() for name, tensor in got.items()}, naive, exact, dtype, R)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("chains", [1, 2])
def test_identity_at_initialization_is_exact(on_backend, chains, dtype, device):
    """Pairs of equal columns: bit for bit the identity, also where x is zero or far smaller than its neighbors."""
    skip_unsupported(on_backend, device, dtype, Case(64, 96, 8))
    generator = torch.Generator().manual_seed(0)
    us = [
        torch.randn(96, 4, generator=generator, dtype=factor_dtype(dtype)).repeat_interleave(2, 1)
        for _ in range(chains)
    ]
    x = torch.randn(64, 96, generator=generator).to(dtype)
    x[:, ::5] = 0
    x[:, 1::5] *= 1e-4
    for transpose in (False, True):
        y = ops.reflect_chain(x.to(device), [u.to(device) for u in us], [False] * chains, transpose=transpose)
        assert torch.equal(y.cpu(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("R", [8, 20])
def test_what_one_step_learns_is_applied(on_backend, R, dtype, device):
    """One optimizer step of 1e-4 a coordinate away from the initialization: the update's direction survives.

    Every second feature of x is zero, so that there y is the update itself and not lost in the rounding of x + update.
    """
    skip_unsupported(on_backend, device, dtype, Case(256, 264, R))
    generator = torch.Generator().manual_seed(0)
    u = make_u(264, R, "paired_step", generator)
    v, t = reference.wy_factor(u.double())
    q = reference.dense(v, t)
    x = torch.randn(256, 264, generator=generator).to(dtype)
    x[:, ::2] = 0
    exact = (x.double() @ q.mT - x.double())[:, ::2]
    got = ops.reflect_chain(x.to(device), [u.to(device)], [False], transpose=True).cpu().double()[:, ::2]
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0).item()
    assert cosine > 0.999, cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_repeated_runs_are_bitwise_equal(on_backend, device, dtype):
    case, repeats = (Case(131, 264, 8), 3) if device.type == "cpu" else (Case(8192, 4096, 8), 10)
    skip_unsupported(on_backend, device, dtype, case)
    x, u, dy = (tensor.to(device) for tensor in make_inputs(case, dtype))

    def run():
        return {**chain_results(x, u, dy, case), "weight side du": weight_side_du(x, u, dy, case)}

    first = run()
    for _ in range(repeats):
        again = run()
        assert all(torch.equal(first[name], again[name]) for name in first)


@EVERY_BACKEND
def test_inputs_are_untouched_and_views_serve(on_backend, device, dtype):
    case = Case(33, 100, 7)
    skip_unsupported(on_backend, device, dtype, case)
    inputs, exact, naive = inputs_and_answers(case, dtype, explicit)
    _, exact_weight, naive_weight = inputs_and_answers(case, dtype, explicit_weight_side)
    x, u, dy = (tensor.to(device) for tensor in inputs)
    wide_x, wide_dy = (torch.randn(size, device=device).to(dtype) for size in ((33, 333), (40, 100)))
    wide_x[:, 111:211], wide_dy[5:38] = x, dy
    column_u = u.mT.contiguous().mT
    kept = [wide_x.clone(), wide_dy.clone(), column_u.clone()]
    for views in [
        (wide_x[:, 111:211], column_u, wide_dy[5:38]),
        (x.mT.contiguous().mT, u, dy.mT.contiguous().mT),
        (x[:, None].expand(33, 2, 100)[:, 0], u, dy),
    ]:
        got = {name: tensor.cpu() for name, tensor in chain_results(*views, case).items()}
        assert_accurate(got, naive, exact, dtype, case.R)
        strided = [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (views[0], views[2])]
        got = {"du": weight_side_du(strided[0], views[1], strided[1], case).cpu()}
        assert_accurate(got, naive_weight, exact_weight, dtype, case.R)
    assert all(torch.equal(now, before) for now, before in zip([wide_x, wide_dy, column_u], kept, strict=True))


@EVERY_BACKEND
def test_expanded_gradient(on_backend, device, dtype):
    """The gradient of a sum has stride 0 everywhere."""
    case = Case(12, 40, 4)
    skip_unsupported(on_backend, device, dtype, case)
    x, u, _ = (tensor.to(device) for tensor in make_inputs(case, dtype))
    ones = torch.ones(12, 40, device=device, dtype=dtype)
    by_hand = chain_results(x, u, ones, case)
    by_sum = chain_results(x, u, ones[0, 0].expand(12, 40), case)
    assert all(torch.equal(by_hand[name], by_sum[name]) for name in by_hand)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 40, 4), (3, 40, 0), (3, 0, 4), (0, 0, 0)], ids=str)
def test_empty(on_backend, shape, device, dtype):
    M, D, R = shape
    case = Case(M, D, R)
    skip_unsupported(on_backend, device, dtype, case)
    x, u, dy = (torch.randn(size, device=device).to(dtype) for size in ((M, D), (D, R), (M, D)))
    got = chain_results(x, u, dy, case)
    assert torch.equal(got["y"], x) and torch.equal(got["dx"], dy)
    assert got["du"].shape == (D, R) and not got["du"].any()
    assert not weight_side_du(x, u.to(factor_dtype(dtype)), dy, case).any()


EMPTY_VIEWS = {
    "columns apart": lambda: torch.randn(6, 10).T[10:],
    "every other": lambda: torch.randn(0, 12)[:, ::2],
    "expanded": lambda: torch.randn(1, 6).expand(3, 1, 6)[:, 1:],
    "permuted": lambda: torch.randn(6, 3, 0).permute(1, 2, 0),
    "any": lambda: torch.empty_strided((0, 6), (7, 5)),
}


@pytest.mark.parametrize("view", EMPTY_VIEWS.values(), ids=EMPTY_VIEWS)
def test_an_empty_batch_has_any_strides(on_backend, device, view):
    """As the last slice of a loop over chunks, or the gradient of one: nothing to read, so nothing to refuse."""
    if ops.BACKENDS[on_backend].why_unsupported(device, torch.float32, 2):
        pytest.skip("float32 is not served")
    u = torch.ones(6, 2, device=device, requires_grad=True)
    for x, dy in ((view(), torch.empty(view().shape)), (torch.empty(view().shape), view())):
        x = x.to(device).requires_grad_()
        y = ops.reflect_chain(x, [u], [False])
        y.backward(dy.to(device))
        assert y.shape == x.grad.shape == x.shape and not u.grad.any()
        assert ops.reflect_chain(x.detach(), [u.detach()], [False]).shape == x.shape


@EVERY_BACKEND
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "u", "u, Gram-Schmidt"])
def test_non_finite_shows(on_backend, where, value, device, dtype):
    """What is not finite must not vanish: one bad entry of u spoils every row, one of x its own row and no other."""
    skip_unsupported(on_backend, device, dtype, Case(5, 40, 4))
    x, u, _ = (tensor.to(device) for tensor in make_inputs(Case(5, 40, 4), dtype))
    (x if where == "x" else u)[3, 2] = value
    bad = ~ops.reflect_chain(x, [u], ["Gram" in where], transpose=True).isfinite().all(1)
    assert bad.tolist() == ([False, False, False, True, False] if where == "x" else [True] * 5)


def test_the_rule_allows_two_roundings_of_an_entry_that_happens_to_be_representable():
    """Those of a layer, before its reflections and after; the largest entry of a row may need none."""
    exact = torch.full((1, 1024), 0.3, dtype=torch.float64)
    exact[0, 0] = 2.0
    got, last_place = exact.bfloat16(), 2 * torch.finfo(torch.bfloat16).eps
    for places, right in ((1, True), (2, False)):
        got[0, 0] = 2.0 + places * last_place
        assert (not violations({"y": got}, {"y": exact}, {"y": exact}, torch.bfloat16, rank=1)) is right
