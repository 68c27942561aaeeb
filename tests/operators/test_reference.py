"""The specification against mathematics: explicit reflections, autograd and float64, no kernel involved."""

import pytest
import torch

from hra_kernels import reference
from hra_kernels.factors import join_factors
from hra_kernels.testing.cases import CASES, explicit, make_inputs, make_u
from hra_kernels.testing.tolerance import orthogonality, rounding


@pytest.mark.parametrize("apply_gs", [False, True], ids=["chain", "gs"])
@pytest.mark.parametrize("R", [1, 2, 3, 7, 8, 12])
def test_factor_is_the_chain(R, apply_gs):
    u = make_u(40, R, "random", torch.Generator().manual_seed(R)).double()
    q = reference.dense(*reference.wy_factor(u, apply_gs))
    torch.testing.assert_close(q, reference.explicit_chain(u, apply_gs), rtol=0, atol=rounding(40, R, torch.float64))


@pytest.mark.parametrize("R", [1, 2, 5, 8])
def test_factor_is_the_plain_compact_form(R):
    u = torch.randn(30, R, dtype=torch.float64, generator=torch.Generator().manual_seed(R))
    plain = torch.eye(30, dtype=torch.float64) - u @ reference.plain_wy(u) @ u.mT
    torch.testing.assert_close(
        reference.dense(*reference.wy_factor(u)), plain, rtol=0, atol=rounding(30, R, torch.float64)
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.M * case.D * case.R < 2**21], ids=str)
def test_closed_form_gradients_equal_autograd(case):
    x, u, dy = make_inputs(case, torch.float64)
    exact = explicit(x, u, dy, case, torch.float64)
    v, t = reference.wy_factor(u, case.apply_gs)
    y, p = reference.reflect_fwd(x, v, t, case.transpose)
    dx, dv, dt = reference.reflect_bwd(dy, x, v, t, p, case.transpose)
    du = reference.wy_factor_bwd(dv, dt, u, v, t, case.apply_gs)
    for name, got in {"y": y, "dx": dx, "du": du}.items():
        # columns 1e-5 apart lose five digits of the *explicit* gradient through Gram-Schmidt and cancellation
        atol = 1e-9 * exact[name].abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
        assert ((got - exact[name]).abs() <= atol).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", ["random", "paired_step", "near_parallel", "zero_columns", "scales", "spike"])
def test_factor_is_orthogonal(columns, dtype):
    for seed in range(3):
        u = make_u(300, 8, columns, torch.Generator().manual_seed(seed)).to(dtype)
        for apply_gs in (False, True):
            v, t = reference.wy_factor(u, apply_gs)
            q = reference.dense(v.double(), t.double())
            error = (q.mT @ q - torch.eye(300, dtype=torch.float64)).abs().max().item()
            assert error < orthogonality(u, v, t, apply_gs)


def test_factor_does_not_depend_on_scale():
    u = make_u(512, 8, "random", torch.Generator().manual_seed(0))
    scaled = u * torch.logspace(-30, 30, 8)
    for apply_gs in (False, True):
        plain, wide = (reference.dense(*reference.wy_factor(one, apply_gs)) for one in (u, scaled))
        assert (plain - wide).abs().max() < rounding(512, 8)


def test_gram_schmidt_with_more_columns_than_features_reflects_everything():
    u = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    q = reference.dense(*reference.wy_factor(u, apply_gs=True))
    torch.testing.assert_close(q, -torch.eye(5), rtol=0, atol=rounding(5, 9))


def test_gram_schmidt_of_equal_columns_reflects_once():
    u = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    v, t = reference.wy_factor(u, apply_gs=True)
    assert t.diagonal().tolist() == [2, 0] * 4
    torch.testing.assert_close(v[::2] @ v[::2].mT, torch.eye(4), rtol=0, atol=rounding(50, 4))
    assert not v[1::2].any()


@pytest.mark.parametrize("apply_gs", [False, True], ids=["chain", "gs"])
def test_zero_column_has_zero_gradient_and_no_effect(apply_gs):
    u = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u[:, 2] = 0
    v, t = reference.wy_factor(u, apply_gs)
    rest = u[:, [0, 1, 3, 4]]
    torch.testing.assert_close(reference.dense(v, t), reference.dense(*reference.wy_factor(rest, apply_gs)))
    du = reference.wy_factor_bwd(torch.randn_like(v), torch.randn_like(t), u, v, t, apply_gs)
    assert du.isfinite().all() and not du[:, 2].any()


def test_several_chains_join_to_their_product():
    generator = torch.Generator().manual_seed(0)
    us = [torch.randn(25, r, dtype=torch.float64, generator=generator) for r in (3, 2, 5)]
    flags = [False, True, False]
    product = torch.eye(25, dtype=torch.float64)
    for u, flag in zip(us, flags, strict=True):
        product = product @ reference.explicit_chain(u, flag)
    factor = join_factors([reference.wy_factor(u, flag) for u, flag in zip(us, flags, strict=True)])
    torch.testing.assert_close(reference.dense(*factor), product, rtol=0, atol=rounding(25, 10, torch.float64))


def test_odd_chain_has_determinant_minus_one():
    for R in (1, 2, 3, 4):
        u = torch.randn(10, R, dtype=torch.float64, generator=torch.Generator().manual_seed(R))
        determinant = torch.linalg.det(reference.dense(*reference.wy_factor(u)))
        assert determinant.item() == pytest.approx((-1) ** R)
