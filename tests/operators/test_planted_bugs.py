"""The tests tested: each planted bug must break the accuracy rule, and a correct implementation must not.

Bugs are planted into the reference's own functions. M >= 128 and R >= 7: smaller cases let some through by luck. Which
inputs reveal a bug is part of the table: at HRA's initialization the reflections cancel, so most bugs hide there, and
bfloat16 is too coarse for some. `MISSED` says which, and a change of it in either direction is a failure.
"""

import pytest
import torch

from hra_kernels import reference
from hra_kernels.testing.cases import Case, explicit, explicit_weight_side, make_inputs, naive
from hra_kernels.testing.tolerance import relative, rounding, violations

RANDOM = Case(128, 1000, 8)
WEIGHT = Case(130, 264, 7, transpose=False)
STEP = Case(130, 1000, 8, "paired_step")


def run(x, u, dy, case, *, forward=reference.reflect_fwd, backward=reference.reflect_bwd, factor=None, factor_bwd=None):
    factor = factor or reference.wy_factor
    factor_bwd = factor_bwd or reference.wy_factor_bwd
    v, t = factor(u, case.apply_gs)
    y, p = forward(x, v, t, case.transpose)
    dx, dv, dt = backward(dy, x, v, t, p, case.transpose)
    return {"y": y, "dx": dx, "du": factor_bwd(dv, dt, u, v, t, case.apply_gs)}


def nothing(x, v, t, transpose):
    return x.clone(), x.to(v.dtype) @ v.mT


def reversed_factors(x, v, t, transpose):
    return reference.reflect_fwd(x, v, t, not transpose)


def dropped_factor(u, apply_gs):
    v, _ = reference.wy_factor(u, apply_gs)
    return v, torch.diag(2 / v.square().sum(1).clamp_min(1e-30))


def masked_feature(x, v, t, transpose):
    masked = v.clone()
    masked[:, -1] = 0
    return reference.reflect_fwd(x, masked, t, transpose)


def masked_row(x, v, t, transpose):
    y, p = reference.reflect_fwd(x, v, t, transpose)
    return torch.cat([y[:-1], x[-1:]]), p


def scaled_factor(u, apply_gs):
    v, t = reference.wy_factor(u, apply_gs)
    return v, t * 1.001


def zeros(x, v, t, transpose):
    return torch.zeros_like(x), x.to(v.dtype) @ v.mT


def rounded_u(u, apply_gs):
    return reference.wy_factor(u.bfloat16().to(u.dtype), apply_gs)


def rounded_v(u, apply_gs):
    v, t = reference.wy_factor(u, apply_gs)
    return v.bfloat16().to(v.dtype), t


def rounded_product(x, v, t, transpose):
    """s = p m rounded to 16 bits before it multiplies v, with no low part kept."""
    m = t.mT if transpose else t
    p = x.to(v.dtype) @ v.mT
    return (x.to(v.dtype) - (p @ m).bfloat16().to(v.dtype) @ v).to(x.dtype), p


def du_without_gram(dv, dt, u, v, t, apply_gs):
    return reference.wy_factor_bwd(dv, torch.zeros_like(dt), u, v, t, apply_gs)


def du_without_rows(dv, dt, u, v, t, apply_gs):
    return reference.wy_factor_bwd(torch.zeros_like(dv), dt, u, v, t, apply_gs)


def du_doubled(dv, dt, u, v, t, apply_gs):
    return 2 * reference.wy_factor_bwd(dv, dt, u, v, t, apply_gs)


def dt_transposed(dy, x, v, t, p, transpose):
    dx, dv, dt = reference.reflect_bwd(dy, x, v, t, p, transpose)
    return dx, dv, dt.mT


def dv_without_x(dy, x, v, t, p, transpose):
    dx, _, dt = reference.reflect_bwd(dy, x, v, t, p, transpose)
    m = t.mT if transpose else t
    return dx, -(p @ m).mT @ dy.to(v.dtype), dt


def dx_unreflected(dy, x, v, t, p, transpose):
    return dy.clone(), *reference.reflect_bwd(dy, x, v, t, p, transpose)[1:]


def last_block_dropped(dy, x, v, t, p, transpose):
    """The sum over rows stops at a whole number of blocks of 64."""
    dx = reference.reflect_bwd(dy, x, v, t, p, transpose)[0]
    keep = (x.shape[0] - 1) // 64 * 64
    return dx, *reference.reflect_bwd(dy[:keep], x[:keep], v, t, p[:keep], transpose)[1:]


BUGS = {
    "correct": {},
    "does nothing": {"forward": nothing},
    "factors reversed": {"forward": reversed_factors},
    "triangular factor dropped": {"factor": dropped_factor},
    "last feature masked": {"forward": masked_feature},
    "last row masked": {"forward": masked_row},
    "factor off by 0.1%": {"factor": scaled_factor},
    "all zeros": {"forward": zeros},
    "u rounded to bfloat16": {"factor": rounded_u},
    "v rounded to bfloat16": {"factor": rounded_v},
    "s rounded to bfloat16": {"forward": rounded_product},
    "du without the Gram's derivative": {"factor_bwd": du_without_gram},
    "du without the rows' derivative": {"factor_bwd": du_without_rows},
    "du doubled": {"factor_bwd": du_doubled},
    "dt transposed": {"backward": dt_transposed},
    "dv without x": {"backward": dv_without_x},
    "dx not reflected": {"backward": dx_unreflected},
    "last row block not summed": {"backward": last_block_dropped},
}


def table(case: Case, dtype: torch.dtype) -> dict[str, bool]:
    """{bug: does the rule reject it}"""
    x, u, dy = make_inputs(case, dtype)
    exact, plain = explicit(x, u, dy, case), naive(x, u, dy, case, dtype)
    return {
        bug: bool(violations(run(x, u, dy, case, **planted), plain, exact, dtype, case.R))
        for bug, planted in BUGS.items()
    }


SUBTLE = {"factor off by 0.1%", "u rounded to bfloat16", "v rounded to bfloat16", "s rounded to bfloat16"}
HIDDEN_AT_START = {
    "does nothing",
    "factors reversed",
    "last row masked",
    "du without the Gram's derivative",
    "dt transposed",
    "dx not reflected",
}
"""What one step away from the initialization cannot show in 16 bits: the layer is still nearly the identity."""

MISSED = {
    (RANDOM, torch.float32): set(),
    (WEIGHT, torch.float32): set(),
    (STEP, torch.float32): {"s rounded to bfloat16"},
    (RANDOM, torch.bfloat16): SUBTLE,
    (WEIGHT, torch.bfloat16): SUBTLE,
    (STEP, torch.bfloat16): (SUBTLE | HIDDEN_AT_START) - {"u rounded to bfloat16"},
    (RANDOM, torch.float16): {"s rounded to bfloat16"},
    (WEIGHT, torch.float16): set(),
    (STEP, torch.float16): {"s rounded to bfloat16"} | HIDDEN_AT_START,
}


@pytest.mark.parametrize("case, dtype", MISSED, ids=str)
def test_the_rule_rejects(case, dtype):
    rejected = table(case, dtype)
    assert {bug for bug, found in rejected.items() if not found} == {"correct"} | MISSED[case, dtype]


def weight_side_dx_for_dy(dx, x, v, t):
    """The gradient that reaches x taken for the one that reaches x Qᵀ."""
    return reference.reflect_bwd(dx, x, v, t, x.to(v.dtype) @ v.mT, True)[1:]


def weight_side_swapped(dx, x, v, t):
    return reference.weight_side_bwd(x, dx, v, t)


def weight_side_unreflected_f(dx, x, v, t):
    """tᵀ F for tᵀ (I - g t) F."""
    dv, dt = reference.weight_side_bwd(dx, x, v, t)
    f = (dx.to(v.dtype) @ v.mT).mT @ x.to(v.dtype)
    return dv - t.mT @ (v @ v.mT) @ t @ f, dt


def weight_side_unreflected_e(dx, x, v, t):
    """t E for t (E - c tᵀ v)."""
    dv, dt = reference.weight_side_bwd(dx, x, v, t)
    c = (x.to(v.dtype) @ v.mT).mT @ (dx.to(v.dtype) @ v.mT)
    return dv - t @ c @ t.mT @ v, dt


def weight_side_dt_transposed(dx, x, v, t):
    dv, dt = reference.weight_side_bwd(dx, x, v, t)
    return dv, dt.mT


def weight_side_dt_unreflected(dx, x, v, t):
    dv, _ = reference.weight_side_bwd(dx, x, v, t)
    return dv, -((x.to(v.dtype) @ v.mT).mT @ (dx.to(v.dtype) @ v.mT)).mT


def weight_side_without_f(dx, x, v, t):
    dv, dt = reference.weight_side_bwd(dx, x, v, t)
    k = torch.eye(v.shape[0]) - v @ v.mT @ t
    return dv + t.mT @ k @ (dx.to(v.dtype) @ v.mT).mT @ x.to(v.dtype), dt


def weight_side_last_block(dx, x, v, t):
    keep = (x.shape[0] - 1) // 64 * 64
    return reference.weight_side_bwd(dx[:keep], x[:keep], v, t)


WEIGHT_SIDE_BUGS = {
    "correct": reference.weight_side_bwd,
    "dx for dy": weight_side_dx_for_dy,
    "x and dx swapped": weight_side_swapped,
    "F not reflected": weight_side_unreflected_f,
    "E not reflected": weight_side_unreflected_e,
    "dt transposed": weight_side_dt_transposed,
    "dt not reflected": weight_side_dt_unreflected,
    "dv without F": weight_side_without_f,
    "last row block not summed": weight_side_last_block,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [RANDOM, Case(130, 264, 7)], ids=str)
def test_the_rule_rejects_on_the_weight_side(case, dtype):
    x, u, dx = make_inputs(case, dtype)
    v, t = reference.wy_factor(u)
    exact = explicit_weight_side(x, u, dx, case)
    plain = naive(x, u, dx, case, dtype, explicit_weight_side)
    found = {bug: reference.wy_factor_bwd(*run(dx, x, v, t), u, v, t) for bug, run in WEIGHT_SIDE_BUGS.items()}
    assert [bug for bug in found if not violations({"du": found[bug]}, plain, exact, dtype, case.R)] == ["correct"]


def reflected(x, u):
    return reference.explicit_chain(u, x=x, transpose=True)


def tf32(x):
    """The 10 bits of the mantissa that matrix units read."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


LAYER_BUGS = {
    "does nothing": lambda x, u: x,
    "factor off by 0.1%": lambda x, u: x + 1.001 * (reflected(x, u) - x),
    "last feature masked": lambda x, u: torch.cat([reflected(x, u)[:, :-1], x[:, -1:]], 1),
    "x rounded to tf32": lambda x, u: reflected(tf32(x), u),
    "u rounded to bfloat16": lambda x, u: reflected(x, u.bfloat16().float()),
}


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("bug", [None, *LAYER_BUGS])
def test_layer_rule(bug, layers):
    """The rule for layers and models passes what float32 gives, and rejects a bug in one layer of several."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(96, 96, generator=generator) / 96**0.5 for _ in range(layers)]
    us = [torch.randn(96, 8, generator=generator) for _ in range(layers)]

    def run(x, us, bug=None):
        for i, (weight, u) in enumerate(zip(weights, us, strict=True)):
            x = LAYER_BUGS[bug](x, u) if bug and i == 0 else reflected(x, u)
            x = torch.tanh(x @ weight.to(x.dtype).mT)
        return x

    x = torch.randn(33, 96, generator=generator)
    error = relative(run(x, us, bug), run(x.double(), [u.double() for u in us]))
    assert (error < rounding(96, 8, layers=layers)) == (bug is None), error
