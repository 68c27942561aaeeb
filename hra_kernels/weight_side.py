"""The weight side of a frozen linear layer in training: W Q is formed in forward and again in backward, x not touched.

    input side    y = (x Qᵀ) Wᵀ     5 M D elements moved beyond the frozen layer's, forward and backward together
    weight side   y = x (W Q)ᵀ      4 N D + 2 M D: two reflections of W, and one read of x and of its gradient

for M rows of x, and W (N, D). Both save x and O((M + D) R) for backward, and W as the frozen layer does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_kernels import checks
from hra_kernels.backends import choose
from hra_kernels.ops import (
    as_rows,
    chain_factor,
    chain_factor_bwd,
    differentiable_backward,
    in_factor_dtype,
    reflect_chain,
    wants_graph,
)
from hra_kernels.soft import Rule, Soft

LEAST_ELEMENTS = 2**17
"""Of x. Below, what matters is the host's work, of which the weight side has more."""

LEAST_SHARE_SAVED, LEAST_BYTES_SAVED = 0.1, 3 * 10**8
"""Of what the input side moves on a GPU. The bytes are 100 us at 3 TB/s, an H100's copy: about as much as the weight
side's additional launches take, two reflections and some 15 of size R x R or R x D. By count, not measured."""


def pays(x: Tensor, w: Tensor, us: Sequence[Tensor]) -> bool:
    """Whether the weight side of x (..., D) and W (N, D) trains faster: the one place that decides.

    Bytes alone say from M = 4/3 N. Measured on a CPU, forward and backward: neither at M = N, the weight side from 2 N
    in float32 and from 3 N in bfloat16, which has the same arithmetic for half the bytes. On a GPU the bytes decide
    that Triton's kernels move. Other backends have no kernel for `weight_side_bwd`.
    """
    if x.numel() < LEAST_ELEMENTS or x.numel() < 2 * w.numel():  # neither rule below holds, and most layers end here
        return False
    backend = choose(x.device, x.dtype, sum(u.shape[1] for u in us), w.shape[1]).name
    if backend == "cpu":
        return x.numel() >= (2 if x.element_size() > 2 else 3) * w.numel()
    return backend == "triton" and _saves_bytes(x, w)


def _saves_bytes(x: Tensor, w: Tensor) -> bool:
    """Whether Triton's kernels move so many bytes less on the weight side, each of them at the speed of a copy.

    Input side: 2 M D forward; backward reads dy twice and x, and writes dx. Weight side: two reflections of W, and two
    reads of x and dx. What the caches save of the second reads is left out on both sides.
    """
    input_side = 6 * x.numel()
    saved = input_side - 4 * (w.numel() + x.numel())
    return saved >= LEAST_SHARE_SAVED * input_side and saved * x.element_size() >= LEAST_BYTES_SAVED


def serves(x: Tensor, w: Tensor, us: Sequence[Tensor], rules: Sequence[Rule]) -> bool:
    """Whether a layer, in eager mode (`is_eager(x, w, *us)`), should call `linear`: it pays, in training, where no
    gradient of W is wanted.

    Soft chains have no orthogonal Q. What does not fit W is left to the input side, whose errors say so.
    """
    return (
        torch.is_grad_enabled()
        and not w.requires_grad
        and pays(x, w, us)
        and x.dtype == w.dtype
        and x.device == w.device
        and x.shape[-1:] == w.shape[1:]
        and any(u.requires_grad for u in us)
        and not torch.is_autocast_enabled(x.device.type)
        and not any(isinstance(rule, Soft) for rule in rules)
    )


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    us: Sequence[Tensor],
    rules: Sequence[Rule],
    factor: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`F.linear(x, w @ Q, bias)`, differentiable in x, us and bias, where `serves` says so.

    Args: as of `functional.hra_linear`; rules and factor as of `ops.reflect_chain`.

    Memory: one tensor of w's size while forward runs, and again while backward does.
    """
    us = in_factor_dtype(us, w.dtype)
    v, t = factor = factor or chain_factor(us, rules, w.dtype)
    checks.check_chain("hra_linear", "w", w, v, t, us)
    return _Linear.apply(x, w, bias, factor, tuple(rules), *us)


class _Linear(torch.autograd.Function):
    """x, and the us behind a factor computed without gradient, as one node."""

    @staticmethod
    def forward(ctx, x, w, bias, factor, rules, *us):
        v, t = factor
        ctx.rules = rules
        ctx.save_for_backward(x, w, v, t, *us)
        return F.linear(x, _reflected(w, v, t), bias)

    @staticmethod
    def backward(ctx, dy):
        x, w, v, t, *us = ctx.saved_tensors
        need_dx, _, need_dbias, _, _, *needed = ctx.needs_input_grad
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if need_dbias else None
        if wants_graph():
            plain = lambda x, *us: (F.linear(reflect_chain(x, us, ctx.rules, transpose=True), w),)  # noqa: E731
            dx, *dus = differentiable_backward(plain, (x, *us), (need_dx, *needed), (dy,))
            return dx, None, dbias, None, None, *dus
        dx = (as_rows(dy) @ _reflected(w, v, t)).to(x.dtype)  # autocast around backward narrows it
        dv, dt = torch.ops.hra.weight_side_bwd(dx, as_rows(x), v, t)
        dus = chain_factor_bwd(torch.ops.hra.wy_factor_bwd, dv, dt, us, v, t, ctx.rules, needed)
        return dx.view(x.shape) if need_dx else None, None, dbias, None, None, *dus


def _reflected(w: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return torch.ops.hra.reflect_dx(as_rows(w), v, t, True)
