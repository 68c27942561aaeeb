"""Bugs planted into the Triton kernels' own source: the accuracy rule must reject each, under Triton's interpreter.

pytest -s tests/triton/test_planted.py      also prints what gave them away
"""

import importlib.util
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hra_kernels import reference
from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import triton_factor_kernels, triton_kernels, triton_launch
from hra_kernels.testing.cases import Case, explicit, make_inputs, naive
from hra_kernels.testing.tolerance import relative, rounding, violations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="the edited kernels run on CPU tensors, in Triton's interpreter",
    ),
]

TRITON = triton_backend.BACKEND
RANDOM = Case(130, 300, 8)
STEP = Case(130, 300, 8, "paired_step")
MANY = Case(130, 140, 17)


@dataclass(frozen=True)
class Bug:
    """One edit of the kernels' source, and the inputs on which the accuracy rule must reject it."""

    name: str
    old: str
    new: str
    case: Case = RANDOM
    dtype: torch.dtype = torch.float32


BUGS = [
    Bug("does nothing", "y = (x.to(tl.float32) - acc)", "y = (x.to(tl.float32) - 0 * acc)"),
    Bug("all zeros", "y = (x.to(tl.float32) - acc)", "y = 0 * (x.to(tl.float32) - acc)"),
    Bug(
        "factors reversed",
        "s = tl.dot(p, m, input_precision=PRECISION)",
        "s = tl.dot(p, tl.trans(m), input_precision=PRECISION)",
    ),
    Bug(
        "triangular factor dropped",
        "later = (offs_k > second) & (offs_k < R)",
        "later = offs_k < 0",
    ),
    Bug("off-diagonal Gram dropped", "z1 = tl.sum(", "z1 = 0 * tl.sum("),
    Bug("factor off by 0.1%", "t_ptrs, t.to(tl.float32)", "t_ptrs, 1.001 * t.to(tl.float32)"),
    Bug("last feature masked", "mask_d = offs_d < D", "mask_d = offs_d < D - 1"),
    Bug("last row masked", "mask_m = offs_m < M", "mask_m = offs_m < M - 1"),
    Bug(
        "last column of u masked",
        "offs_r, mask_r, is_hi = _rank_offsets(R, ",
        "offs_r, mask_r, is_hi = _rank_offsets(R - 1, ",
    ),
    Bug("plain tf32", "PRECISION)", '"tf32")'),
    Bug(
        "lo of v dropped",
        "return hi, (a - hi.to(tl.float32)).to(dtype)",
        "return hi, (0 * a).to(dtype)",
        RANDOM,
        torch.float16,
    ),
    Bug(
        "hi and lo halves of p not added",
        "p = _fold(p, BLOCK_M, BLOCK_R)",
        "p = tl.max(tl.reshape(p, (BLOCK_M, 2, BLOCK_R // 2)), axis=1)",
        RANDOM,
        torch.bfloat16,
    ),
    Bug(
        "halves overlap",
        "return v, tl.load(v_ptrs + tl.cast(R, tl.int64) * D,",
        "return v, tl.load(v_ptrs + tl.cast(R - 1, tl.int64) * D,",
        MANY,
        torch.bfloat16,
    ),
    Bug(
        "float16 taken for bfloat16", "halves_ptr + 2 * tl.cast(R,", "halves_ptr + 0 * tl.cast(R,", MANY, torch.float16
    ),
    Bug(
        "dt transposed",
        "offsets = (offs_k * stride_ti)[:, None] + (offs_j * stride_tj)[None, :]",
        "offsets = (offs_k * stride_tj)[:, None] + (offs_j * stride_ti)[None, :]",
    ),
    Bug("dt not negated", "-acc_dm", "acc_dm"),
    Bug("dv without x", "acc_dv = _transposed_product(qm_t, x, is_hi, acc_dv, SPLIT, PRECISION)", "acc_dv += 0.0"),
    Bug("dv without dy", "acc_dv = _transposed_product(s_t, dy, is_hi, acc_dv, SPLIT, PRECISION)", "acc_dv += 0.0"),
    Bug("dx not reflected", "dx = (dy.to(tl.float32) - acc)", "dx = (dy.to(tl.float32) - 0 * acc)"),
    Bug("last partial sum lost", "for part in range(0, num_parts)", "for part in range(0, num_parts - 1)"),
    Bug("a split ends one row early", "mask_m = offs_m < end", "mask_m = offs_m < end - 1"),
    Bug(
        "du without the Gram's derivative",
        "acc_a += w_a[:, None] * v\n        acc_b += w_b[:, None] * v",
        "acc_a += 0.0\n        acc_b += 0.0",
    ),
    Bug("du without the pair's term", "acc_a += ((above - below) / phi)[:, None] * v.to(tl.float64)", "acc_a += 0.0"),
    Bug("du of a pair not mixed", "acc_a -= tl.where(has_both[:, None], acc_b, 0.0)", "acc_a -= 0.0"),
    Bug("partial sums of dv lost", "for part in range(0, num_parts):", "for part in range(0, 1):"),
    Bug("no pair but the first", "first = 2 * (pair * BLOCK_P +", "first = 2 * (0 * BLOCK_P +"),
    Bug(
        "ds not transposed", "t = tl.load(t_ptr + offs_j * R + k, mask_j", "t = tl.load(t_ptr + k * R + offs_j, mask_j"
    ),
    Bug("du unscaled", "acc_a * scale_a[:, None]", "acc_a * 2 * scale_a[:, None]"),
    Bug(
        "Gram in float32",
        "acc += tl.sum(a[:, None, :] * b[None, :, :], axis=2)",
        "acc += tl.sum((a[:, None, :] * b[None, :, :]).to(tl.float32).to(tl.bfloat16).to(tl.float32), axis=2)",
    ),
]


def plant(bug: Bug, directory: Path, monkeypatch) -> int:
    """Put edited copies of the kernel modules in the backend's hands; returns the number of edits."""
    edits = 0
    for module, getter in ((triton_factor_kernels, "factor_kernels"), (triton_kernels, "kernels")):
        source = Path(module.__file__).read_text()
        edits += source.count(bug.old)
        path = directory / f"{module.__name__.rsplit('.', 1)[1]}_{next(_numbers)}.py"
        path.write_text(source.replace(bug.old, bug.new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, planted)
        spec.loader.exec_module(planted)
        if module is triton_kernels:  # it has taken a function from the module as it is
            planted.chain_bwd_share = triton_launch.factor_kernels().chain_bwd_share
        monkeypatch.setattr(triton_launch, getter, lambda planted=planted: planted)
    triton_launch.forget_plans()
    return edits


_numbers = itertools.count()


def chain_violations(case: Case, dtype: torch.dtype, rounded_u: bool = False) -> list[str]:
    x, u, dy = make_inputs(case, dtype)
    exact, plain = explicit(x, u, dy, case), naive(x, u, dy, case, dtype)
    v, t = TRITON.wy_factor(u.bfloat16().float() if rounded_u else u, case.apply_gs)
    y, p = TRITON.reflect_fwd(x, v, t, case.transpose)
    dx, dv, dt = TRITON.reflect_bwd(dy, x, v, t, p, case.transpose)
    du = TRITON.wy_factor_bwd(dv, dt, u, v, t, case.apply_gs)
    at_once = TRITON.chain_bwd(dy, x, u, v, t, p, case.transpose, case.apply_gs)
    results = [{"y": y, "dx": dx, "du": du}, {"y": y, "dx": at_once[0], "du": at_once[1]}]
    return [found for result in results for found in violations(result, plain, exact, dtype, case.R)]


@pytest.mark.parametrize("case, dtype", sorted({(bug.case, bug.dtype) for bug in BUGS}, key=str), ids=str)
def test_kernels_pass_where_bugs_are_planted(case, dtype):
    assert not chain_violations(case, dtype)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_rejected(bug, tmp_path, monkeypatch, record_property):
    assert plant(bug, tmp_path, monkeypatch) >= 1, "the kernels no longer contain the line this bug changes"
    found = chain_violations(bug.case, bug.dtype)
    print(f"planted: {bug.name} ({bug.dtype!s}): {found[0] if found else 'NOT FOUND'}")
    assert found


NINE, SEVENTEEN = Case(65, 100, 9), Case(65, 100, 17)
FLOAT32_RESULTS = [
    Bug(
        "s not scaled for float16", "tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)", "(bits & 0) + (127 << 23)", NINE
    ),
    Bug("lo of v not multiplied by x, R > 8", "acc = tl.dot(x, tl.trans(lo), acc)", "acc = acc + 0.0", NINE),
    Bug("the same, R > 16", "acc = tl.dot(x, tl.trans(lo), acc)", "acc = acc + 0.0", SEVENTEEN),
    Bug("no lo among the halves", "halves_ptr + size + offs, lo", "halves_ptr + size + offs, 0 * lo", SEVENTEEN),
]


@pytest.mark.parametrize("bug", FLOAT32_RESULTS, ids=lambda bug: bug.name)
def test_bug_in_a_float32_result_is_rejected(bug, tmp_path, monkeypatch):
    """p and dv of float16 tensors are right to float32, also for a t that makes s smaller than float16 holds.

    The rule for y and du allows what rounding to float16 costs, behind which these hide.
    """
    M, D, R = bug.case.M, bug.case.D, bug.case.R
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(M, D, generator=generator).half() for _ in range(2))
    v, t = torch.randn(R, D, generator=generator) / 10, 1e-9 * torch.randn(R, R, generator=generator)
    exact_p = reference.reflect_fwd(x.double(), v.double(), t.double())[1]
    exact_dv = reference.reflect_bwd(dy.double(), x.double(), v.double(), t.double(), exact_p)[1]

    def error():
        p = TRITON.reflect_fwd(x, v, t, False)[1]
        dv = TRITON.reflect_bwd(dy, x, v, t, p, False)[1]
        pairs = ((p, exact_p), (dv, exact_dv))
        return max(relative(got, exact) for got, exact in pairs)

    right = error()
    assert plant(bug, tmp_path, monkeypatch) >= 1
    wrong = error()
    print(f"planted: {bug.name}: relative error {wrong:.1e}, {right:.1e} without")
    assert right < rounding(D, R) < wrong


WEIGHT_SIDE = [
    Bug(
        "s by m transposed",
        "_load_m(m_ptr, stride_mi, stride_mj, offs_k",
        "_load_m(m_ptr, stride_mj, stride_mi, offs_k",
    ),
    Bug("q by m", "mt = _load_m(m_ptr, stride_mj, stride_mi,", "mt = _load_m(m_ptr, stride_mi, stride_mj,"),
    Bug("dt not negated", "-acc_dm", "acc_dm"),
    Bug(
        "halves of p not added",
        "p = _fold(p, BLOCK_M, BLOCK_R)",
        "p = tl.max(tl.reshape(p, (BLOCK_M, 2, BLOCK_R // 2)), axis=1)",
        RANDOM,
        torch.bfloat16,
    ),
]


@pytest.mark.parametrize("bug", WEIGHT_SIDE, ids=lambda bug: bug.name)
def test_bug_of_the_weight_side_is_rejected(bug, tmp_path, monkeypatch):
    """dv and dt are right to float32; some more where hi and lo of a bfloat16 pair have 16 bits together."""
    x, u, dx = make_inputs(bug.case, bug.dtype)
    v, t = reference.wy_factor(u)
    exact = reference.weight_side_bwd(*(tensor.double() for tensor in (dx, x, v, t)))
    bound = rounding(bug.case.D, bug.case.R) if bug.dtype == torch.float32 else 2.0**-16

    def error():
        return max(relative(got, one) for got, one in zip(TRITON.weight_side_bwd(dx, x, v, t), exact, strict=True))

    assert error() < bound
    assert plant(bug, tmp_path, monkeypatch) >= 1
    assert error() > bound


def test_u_rounded_to_16_bits_is_rejected():
    assert chain_violations(STEP, torch.bfloat16, rounded_u=True)
