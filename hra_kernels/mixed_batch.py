"""A batch whose samples go through different chains of reflections, in one grouped pass.

    y[s] = x[s] - (x[s] v_cᵀ) m_c v_c,   c = chains[s],   m = tᵀ if transpose else t

The factors of all chains lie side by side, `v (C, R, D)` and `t (C, R, R)` (`factors.stack_factors`); each sample
gathers its own and batched matrix products do the rest: as many launches, and per sample as much work, for a hundred
chains as for one. A sample meets no factor but its own, so NaN in one chain stays with the samples of that chain, and a
sample without a chain is copied bit for bit.

Backward is `reference.reflect_bwd` sample by sample; the gradients of v and t add up over the samples of a chain.
Saved: x, the factors, and x vᵀ (S, L, R). A 16-bit x is widened a block of samples at a time, never as a whole.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hra_kernels import reference
from hra_kernels.checks import check_dtype
from hra_kernels.factors import factor_dtype
from hra_kernels.functional import conv, in_autocast_dtype
from hra_kernels.ops import differentiable_backward, wants_graph, wants_plain_ops

_BLOCK = 2**22
"""Elements of x, or of gathered v, in one block: 16 MiB of float32."""


def _blocks(samples: int, length: int, width: int, rank: int) -> Iterator[tuple[slice, slice]]:
    """(samples, rows) that cover x (S, L, D): several samples a block, or several blocks a sample."""
    many = max(1, _BLOCK // max(1, max(length, rank) * width))
    rows = max(1, _BLOCK // max(1, width))
    for start in range(0, samples, many):
        for row in range(0, length, rows):
            yield slice(start, start + many), slice(row, row + rows)


class _ReflectMixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, t, chains, samples, transpose):
        y = torch.empty_like(x) if samples is None else x.clone()
        p = v.new_empty(len(chains), x.shape[1], v.shape[1])
        for some, rows in _blocks(len(chains), x.shape[1], x.shape[2], v.shape[1]):
            own, chain = some if samples is None else samples[some], chains[some]
            y[own, rows], p[some, rows] = reference.reflect_fwd(x[own, rows], v[chain], t[chain], transpose)
        ctx.transpose = transpose
        ctx.save_for_backward(x, v, t, p, chains, samples)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, v, t, p, chains, samples = ctx.saved_tensors
        if wants_graph():
            plain = lambda x, v, t: (reference.reflect_mixed(x, v, t, chains, samples, ctx.transpose),)  # noqa: E731
            return *differentiable_backward(plain, (x, v, t), ctx.needs_input_grad[:3], (dy,)), None, None, None
        dx = torch.empty_like(dy) if samples is None else dy.clone()
        dv, dt = torch.zeros_like(v), torch.zeros_like(t)
        for some, rows in _blocks(len(chains), x.shape[1], x.shape[2], v.shape[1]):
            own, chain = some if samples is None else samples[some], chains[some]
            dx[own, rows], some_dv, some_dt = reference.reflect_bwd(
                dy[own, rows], x[own, rows], v[chain], t[chain], p[some, rows], ctx.transpose
            )
            dv.index_add_(0, chain, some_dv)
            dt.index_add_(0, chain, some_dt)
        grads = zip((dx, dv, dt), ctx.needs_input_grad[:3], strict=True)
        return *(grad if need else None for grad, need in grads), None, None, None


def _check(x: Tensor, v: Tensor, t: Tensor, chains: Tensor, samples: Tensor | None) -> None:
    check_dtype("reflect_mixed", "x", x)
    if x.dim() < 2:
        raise ValueError(f"reflect_mixed: x must be (B, ..., D), one sample an entry, got shape {tuple(x.shape)}")
    if v.dim() != 3 or v.shape[2] != x.shape[-1]:
        raise ValueError(
            f"reflect_mixed: v must be (C, R, D) with D = x.shape[-1] = {x.shape[-1]}, got shape {tuple(v.shape)}"
        )
    if t.shape != (v.shape[0], v.shape[1], v.shape[1]):
        raise ValueError(f"reflect_mixed: t must be (C, R, R) = {(*v.shape[:2], v.shape[1])}, got {tuple(t.shape)}")
    wanted = factor_dtype(x.dtype)
    for name, tensor in (("v", v), ("t", t)):
        if tensor.dtype != wanted:
            raise TypeError(f"reflect_mixed: {name} must be {wanted} for {x.dtype} x, got {tensor.dtype}")
    for name, index in (("chains", chains), ("samples", samples)):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
            raise ValueError(f"reflect_mixed: {name} must be (S,) int64, got {tuple(index.shape)} {index.dtype}")
    count = x.shape[0] if samples is None else samples.shape[0]
    if chains.shape[0] != count:
        raise ValueError(f"reflect_mixed: chains must name one chain for each of {count} samples, got {len(chains)}")


def reflect_mixed(
    x: Tensor, v: Tensor, t: Tensor, chains: Tensor, samples: Tensor | None = None, transpose: bool = False
) -> Tensor:
    """Each sample through a chain of its own: x[s] Q_c, or x[s] Q_cᵀ if transpose, for Q_c = I - v_cᵀ t_c v_c.

    Args:
        x: (B, ..., D), float32, float64, bfloat16 or float16, on any device; B samples.
        v: (C, R, D), float32, or float64 for a float64 x: C chains of at most R reflections, padded with zero rows.
        t: (C, R, R), v's dtype.
        chains: (S,) int64 on x's device, from 0 to C - 1.
        samples: (S,) int64 on x's device without repetitions: those that chains speaks of. None: all, in order.

    Returns:
        (B, ..., D) in x's dtype; products accumulate in v's dtype. Samples not named are x's own bits. Differentiable
        in x, v and t. These are PyTorch's matrix products: `torch.backends.cuda.matmul.allow_tf32` applies to them.

    Raises:
        TypeError, ValueError: dtype or shape does not fit.
    """
    _check(x, v, t, chains, samples)
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    if wants_plain_ops() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        y = reference.reflect_mixed(rows, v, t, chains, samples, transpose)
    else:
        y = _ReflectMixed.apply(rows, v, t, chains, samples, transpose)
    return y.reshape(x.shape)


def conv_correction_mixed(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    t: Tensor,
    chains: Tensor,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """conv(x[s], W Q_c) - conv(x[s], W) for each sample s and its chain c = chains[s].

    Args:
        x: (S, C, ...), one to three spatial dimensions: the samples that have a chain.
        w: (N, C, ...).
        v, t, chains: as in `reflect_mixed`, with D the product of w's dimensions after the first.
        stride, padding, dilation, padding_mode: as in `nn.Conv2d`.

    Returns:
        (S, N, ...). The samples become the groups of one convolution, each with its own R filters.
    """
    x = in_autocast_dtype(x)
    filters = v[chains].reshape(-1, *w.shape[1:]).to(x.dtype)
    back = (-(w.flatten(1).to(v.dtype) @ v.mT @ t)).to(x.dtype)[chains]
    grouped = x.reshape(1, -1, *x.shape[2:])
    p = conv(grouped, filters, None, stride, padding, dilation, padding_mode, groups=len(x))
    p = p.reshape(len(x), v.shape[1], *p.shape[2:])
    return (back @ p.flatten(2)).reshape(len(x), -1, *p.shape[2:])
