"""Hypothesis looks for shapes, strides, dtypes and values that break a backend or its agreement with mathematics."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hra_kernels import ops, reference
from hra_kernels.factors import factor_dtype
from hra_kernels.testing.cases import DTYPES, Case, explicit, explicit_weight_side, naive
from hra_kernels.testing.tolerance import condition, rounding, violations

PROFILE = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PARALLEL = [
    (32915, 2, ["negated repeat", "tiny", "nearly repeat", "huge"], False),
    (14990, 2, ["tiny", "huge", "nearly repeat", "random"], False),
    (56631, 1, ["nearly repeat", "huge"], True),
    (53346, 1, ["repeat", "huge"], False),
    (57712, 3, ["tiny", "random"], False),
]
"""(seed, rows, columns, transpose) in two dimensions, which leave so little room that rounding costs most."""
COLUMNS = st.sampled_from(["random", "zero", "repeat", "negated repeat", "nearly repeat", "tiny", "huge", "one entry"])


@st.composite
def chains(draw, max_features=70, max_rank=20):
    """(generator, D, one kind of column for each of R columns, power-of-ten scale of each)"""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    features = draw(st.integers(2, max_features))
    kinds = draw(st.lists(COLUMNS, min_size=1, max_size=max_rank))
    return generator, features, kinds


def make_hostile_u(generator, features, kinds):
    columns = []
    for kind in kinds:
        column = torch.randn(features, generator=generator)
        before = columns[-1] if columns else column
        if kind == "zero":
            column = torch.zeros(features)
        elif kind in ("repeat", "negated repeat"):
            column = before if kind == "repeat" else -before
        elif kind == "nearly repeat":
            column = before + 1e-6 * before.abs().max() * column
        elif kind in ("tiny", "huge"):
            column = column * (1e-30 if kind == "tiny" else 1e30)
        elif kind == "one entry":
            column = torch.nn.functional.one_hot(torch.tensor(1), features) * 3.0
        columns.append(column)
    return torch.stack(columns, 1)


def reflected(x, u, dy, case, device):
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in (x, u)]
    y = ops.reflect_chain(leaves[0], [leaves[1]], [False], transpose=case.transpose)
    y.backward(dy.to(device))
    return {"y": y.detach().cpu(), "dx": leaves[0].grad.cpu(), "du": leaves[1].grad.cpu()}


def skip_without_float32(backend, device):
    reason = ops.BACKENDS[backend].why_unsupported(device, torch.float32, 8)
    if reason:
        pytest.skip(reason)


@PROFILE
@given(data=st.data())
def test_any_chain(on_backend, device, data):
    generator, features, kinds = data.draw(chains())
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = data.draw(st.integers(0, 40))
    transpose = data.draw(st.booleans())
    case = Case(rows, features, len(kinds), transpose=transpose)
    if ops.BACKENDS[on_backend].why_unsupported(device, dtype, case.R):
        return
    u = make_hostile_u(generator, features, kinds).to(factor_dtype(dtype))
    padding = data.draw(st.integers(0, 3))
    x, dy = (torch.randn(rows, features + padding, generator=generator).to(dtype)[:, padding:] for _ in range(2))
    assert_agrees(reflected(x, u, dy, case, device), x, u, dy, case, explicit)


@PROFILE
@given(data=st.data())
def test_any_chain_on_the_weight_side(on_backend, device, data):
    generator, features, kinds = data.draw(chains())
    dtype = data.draw(st.sampled_from(DTYPES))
    rows = data.draw(st.integers(0, 40))
    case = Case(rows, features, len(kinds))
    if ops.BACKENDS[on_backend].why_unsupported(device, dtype, case.R):
        return
    u = make_hostile_u(generator, features, kinds).to(factor_dtype(dtype))
    padding = data.draw(st.integers(0, 3))
    x, dx = (torch.randn(rows, features + padding, generator=generator).to(dtype)[:, padding:] for _ in range(2))
    v, t = torch.ops.hra.wy_factor_fwd(u.to(device), False)
    dv, dt = torch.ops.hra.weight_side_bwd(dx.to(device), x.to(device), v, t)
    du = torch.ops.hra.wy_factor_bwd(dv, dt, u.to(device), v, t, False)
    assert_agrees({"du": du.cpu()}, x, u, dx, case, explicit_weight_side)


def assert_agrees(got, x, u, dy, case, answer):
    """Finite, and by the accuracy rule what `answer` gives."""
    dtype = x.dtype
    assert all(tensor.isfinite().all() for tensor in got.values())
    exact, plain = answer(x, u, dy, case), naive(x, u, dy, case, dtype, answer)
    # the columns' scales differ by 60 orders of magnitude: each column's gradient is judged on its own scale
    scale = torch.linalg.vector_norm(u.double(), dim=0)
    for results in (got, exact, plain):
        results["du"] = results["du"].double() * torch.where(scale > 0, scale, 1)
    # a lone reflection over few features has a gradient that cancels to nothing; its size is |x| |dy|
    floor = torch.linalg.vector_norm(x.double()) * torch.linalg.vector_norm(dy.double())
    exact["du"] = torch.cat([exact["du"], floor.expand(1, case.R)])
    for results in (got, plain):
        results["du"] = torch.cat([results["du"], floor.expand(1, case.R)])
    parallel = condition(*reference.wy_factor(u.double(), False))
    assert not violations(got, plain, exact, dtype, case.R, max(1.0, parallel))


@pytest.mark.parametrize("seed, rows, kinds, transpose", PARALLEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_that_are_parallel_by_accident(on_backend, device, dtype, seed, rows, kinds, transpose):
    case = Case(rows, 2, len(kinds), transpose=transpose)
    if ops.BACKENDS[on_backend].why_unsupported(device, dtype, case.R):
        pytest.skip(f"{on_backend} does not serve {dtype}")
    generator = torch.Generator().manual_seed(seed)
    u = make_hostile_u(generator, 2, kinds).to(dtype)
    x, dy = (torch.randn(rows, 2, generator=generator).to(dtype) for _ in range(2))
    assert_agrees(reflected(x, u, dy, case, device), x, u, dy, case, explicit)


@PROFILE
@given(chain=chains())
def test_gram_schmidt_of_anything_is_orthogonal_and_has_finite_gradients(on_backend, device, chain):
    skip_without_float32(on_backend, device)
    generator, features, kinds = chain
    u = make_hostile_u(generator, features, kinds).to(device).requires_grad_()
    x = torch.eye(features, device=device, requires_grad=True)
    y = ops.reflect_chain(x, [u], [True])
    q = y.detach().double().cpu()
    # each side of qᵀq is a float32 result
    assert (q.mT @ q - torch.eye(features, dtype=torch.float64)).abs().max() < 2 * rounding(features, len(kinds))
    y.backward(torch.randn(features, features, generator=generator).to(device))
    assert u.grad.isfinite().all() and x.grad.isfinite().all()


@PROFILE
@given(chain=chains(max_rank=9), scales=st.lists(st.integers(-25, 25), min_size=9, max_size=9))
def test_the_map_does_not_depend_on_scale(on_backend, device, chain, scales):
    skip_without_float32(on_backend, device)
    generator, features, kinds = chain
    u = make_hostile_u(generator, features, [kind for kind in kinds if kind not in ("tiny", "huge")] or ["random"])
    factor = 10.0 ** torch.tensor(scales[: u.shape[1]], dtype=torch.float32)
    x = torch.randn(5, features, generator=generator)
    plain, scaled = (ops.reflect_chain(x.to(device), [one.to(device)], [False]).cpu() for one in (u, u * factor))
    # multiplying by a power of ten rounds each entry of u once, by eps / 2: a reflection changes by 2 eps |x|
    allowed = 2 * u.shape[1] * torch.finfo(torch.float32).eps + 2 * rounding(features, u.shape[1])
    assert ((plain - scaled).abs().amax(1) <= allowed * torch.linalg.vector_norm(x, dim=1)).all()
