"""The operators as functions, with autograd.

    reflect(x, v, t)            y = x - (x vᵀ) m v, m = t or tᵀ      saves x, p = x vᵀ (M x R), v, t
    wy_factor(u)                v, t of H_1 ... H_R = I - vᵀ t v     saves u, v, t
    reflect_chain(x, us, ...)   both, for the product of chains; what layers use

`attach_factor` makes the factor's graph node from a factor computed earlier, so one factor serves every micro-batch
between two optimizer steps while each micro-batch's graph is freed on its own.

Each operator is registered (`hra_kernels.operators`) and served by whichever backend `select_backend` names;
`hra_kernels.reference` is the specification of all of them. Double backward, forward-mode AD and `torch.func`
transforms run the reference's plain PyTorch instead. In eager mode `reflect_chain` is
one node of the graph, calls the backend itself and checks its arguments as the operators would: through the dispatcher,
and as a node each, reflections and factor take longer than small layers compute.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hra_kernels import checks, operators, reference
from hra_kernels.backends import BACKEND_VARIABLE, BACKENDS, backend_report, choose, select_backend, use_backend
from hra_kernels.factors import factor_dtype, join_factors, join_factors_bwd, split_factor
from hra_kernels.soft import Rule, Soft, extended, factor_bwd_by_rule, factor_by_rule

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "attach_factor",
    "backend_report",
    "chain_factor",
    "differentiable_backward",
    "factor_in_groups",
    "in_compiled_graph",
    "in_factor_dtype",
    "reflect",
    "reflect_chain",
    "select_backend",
    "use_backend",
    "wants_graph",
    "wants_plain_ops",
    "wy_factor",
    "wy_factor_many",
]

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that are what they seem, with a storage of their own."""

# --- autograd ---------------------------------------------------------------------------------------------------------


def wants_plain_ops() -> bool:
    """Where an autograd.Function cannot be: torch.func transforms, forward-mode AD. Or an operator of ours: ONNX."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return _traced_to_onnx()


def _traced_to_onnx() -> bool:
    """In torch.onnx.export(dynamo=False). The other exporter decomposes the operators (see above)."""
    return torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()


def differentiable_backward(
    function: Callable, inputs: Sequence[Tensor], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)` as a differentiable graph, for double backward."""
    with torch.enable_grad():
        # aliases cut the paths between inputs: one input may have been computed from another
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        outputs = function(*inputs)
        # a Gram-Schmidt factor's t is a constant, and a grad may be absent
        pairs = zip(outputs, grads, strict=True)
        used = [(output, grad) for output, grad in pairs if output.requires_grad and grad is not None]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in used], wanted, [grad for _, grad in used], create_graph=True, allow_unused=True
            )
        )
    return [next(found) if need else None for need in needed]


def _wants_gradient(*tensors: Tensor) -> bool:
    """`torch.jit.trace` records inference: its graphs have no place for a closed-form backward."""
    if not torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
        return False
    return any(t.requires_grad for t in tensors)


def wants_graph() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)  # PyTorch 2.6 does not say


def in_compiled_graph() -> bool:
    """Whether torch.compile traces: an exported program has no memory of its own between two calls."""
    return torch.compiler.is_compiling() and not _is_exporting()


def _has_rows(x: Tensor) -> bool:
    """Whether `as_rows` is a view for certain."""
    return x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)


def as_rows(x: Tensor) -> Tensor:
    """x as (M, D) with contiguous rows: a view wherever one exists."""
    if x.dim() == 2 and x.stride(1) == 1:  # most often, and no work
        return x
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not Size.numel(): it makes a symbolic size a constant
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def is_eager(*tensors: Tensor) -> bool:
    """Whether nobody watches operators on these: no compiler, tracer, transform, dispatch mode or tensor subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    for tensor in tensors:  # noqa: SIM110 - `all` makes a generator, and every layer passes here
        if type(tensor) not in PLAIN:
            return False
    return True


def _gradient_rows(dy: Tensor) -> Tensor:
    # while compiling, PyTorch 2.6 knows no strides of a gradient
    return dy.contiguous() if torch.compiler.is_compiling() else as_rows(dy)


def _plain_chain_factor(us: Sequence[Tensor], apply_gs: Sequence[Rule]) -> tuple[Tensor, Tensor]:
    """`chain_factor` in differentiable plain PyTorch."""
    wy_factor = reference.portable_factor if _traced_to_onnx() else reference.wy_factor
    return join_factors([factor_by_rule(wy_factor, u, gs) for u, gs in zip(us, apply_gs, strict=True)])


def _plain_chain(x: Tensor, us: Sequence[Tensor], apply_gs: Sequence[Rule], transpose: bool) -> Tensor:
    """`reflect_chain` in differentiable plain PyTorch."""
    v, t = _plain_chain_factor(us, apply_gs)
    return reference.reflect_fwd(as_rows(x), v, t, transpose)[0].reshape(x.shape)


class _Reflect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, v, t, transpose):
        y, p = torch.ops.hra.reflect_fwd(x, v, t, transpose)
        ctx.transpose = transpose
        needs_factor = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(v, t, *((x, p) if needs_factor else ()))
        return y

    @staticmethod
    def backward(ctx, dy):
        v, t, *x_and_p = ctx.saved_tensors
        need_dx, need_dv, need_dt, _ = ctx.needs_input_grad
        if not x_and_p:
            if wants_graph():
                return _reflect(dy, v, t, not ctx.transpose), None, None, None
            return torch.ops.hra.reflect_dx(_gradient_rows(dy), v, t, ctx.transpose), None, None, None
        x, p = x_and_p
        if wants_graph():
            plain = lambda x, v, t: reference.reflect_fwd(x, v, t, ctx.transpose)[:1]  # noqa: E731
            return *differentiable_backward(plain, (x, v, t), ctx.needs_input_grad[:3], (dy,)), None
        dy = _gradient_rows(dy)
        dx, dv, dt = torch.ops.hra.reflect_bwd(dy, x, v, t, p, ctx.transpose)
        return dx if need_dx else None, dv if need_dv else None, dt if need_dt else None, None


class _Factor(torch.autograd.Function):
    """Ties (v, t), computed without gradient, to the us they came from: one node, however old the factor is."""

    @staticmethod
    def forward(ctx, v, t, apply_gs, *us):
        ctx.apply_gs = apply_gs
        ctx.save_for_backward(v, t, *us)
        return v.detach(), t.detach()

    @staticmethod
    def backward(ctx, dv, dt):
        v, t, *us = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if wants_graph():
            plain = lambda *us: _plain_chain_factor(us, ctx.apply_gs)  # noqa: E731
            return None, None, None, *differentiable_backward(plain, us, needed, (dv, dt))
        return None, None, None, *chain_factor_bwd(torch.ops.hra.wy_factor_bwd, dv, dt, us, v, t, ctx.apply_gs, needed)


def chain_factor_bwd(
    wy_factor_bwd: Callable,
    dv: Tensor,
    dt: Tensor,
    us: Sequence[Tensor],
    v: Tensor,
    t: Tensor,
    apply_gs: Sequence[Rule],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the us that need one, from those of their joined factor."""
    factors, grads = [(v, t)], [(dv, dt)]
    if len(us) > 1:
        widths = [u.shape[1] for u in us]
        factors = split_factor(v, t, widths)
        grads = join_factors_bwd(dv, dt, v, t, widths)
    parts = zip(grads, us, factors, apply_gs, needed, strict=True)
    wy_factor = torch.ops.hra.wy_factor_fwd
    return [
        factor_bwd_by_rule(wy_factor, wy_factor_bwd, *grad, u, *factor, gs) if need else None
        for grad, u, factor, gs, need in parts
    ]


class _Chain(torch.autograd.Function):
    """`_Reflect` and `_Factor` as one node, in eager mode: x, and the us behind a factor computed without gradient."""

    @staticmethod
    def forward(ctx, x, factor, apply_gs, transpose, *us):
        v, t = factor
        y, p = choose(x.device, x.dtype, *v.shape).reflect_fwd(as_rows(x), v, t, transpose)
        ctx.apply_gs, ctx.transpose = apply_gs, transpose
        ctx.save_for_backward(x, v, t, p, *us)
        return y if x.dim() == 2 else y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, v, t, p, *us = ctx.saved_tensors
        need_dx, _, _, _, *needed = ctx.needs_input_grad
        if wants_graph():
            plain = lambda x, *us: (_plain_chain(x, us, ctx.apply_gs, ctx.transpose),)  # noqa: E731
            dx, *dus = differentiable_backward(plain, (x, *us), (need_dx, *needed), (dy,))
            return dx, None, None, None, *dus
        rows = as_rows(x)
        if is_eager(dy, x, v, t, p, *us):  # not in compiled autograd, or where hooks on saved tensors brought others
            dy = as_rows(dy)
            checks.check_chain_bwd("reflect_chain", dy, rows, us, v, t, p)
            dx, dus = _chain_bwd(dy, rows, us, v, t, p, ctx.transpose, ctx.apply_gs, needed)
        elif _is_plain(us, ctx.apply_gs):
            dx, du = torch.ops.hra.chain_bwd(_gradient_rows(dy), rows, us[0], v, t, p, ctx.transpose, ctx.apply_gs[0])
            dus = [du]
        else:
            dy = _gradient_rows(dy)
            dx, dv, dt = torch.ops.hra.reflect_bwd(dy, rows, v, t, p, ctx.transpose)
            dus = chain_factor_bwd(torch.ops.hra.wy_factor_bwd, dv, dt, us, v, t, ctx.apply_gs, needed)
        if not need_dx:
            dx = None
        elif x.dim() != 2:
            dx = dx.view(x.shape)
        return dx, None, None, None, *dus


class _CompiledChain(torch.autograd.Function):
    """`_Chain` in a compiled graph; without a factor the operator finds it itself (`hra_kernels.kept_chain`)."""

    @staticmethod
    def forward(ctx, x, v, t, apply_gs, transpose, u):
        if v is None:
            y, p, v, t = torch.ops.hra.chain_fwd(x, u, transpose, apply_gs[0])
        else:
            y, p = torch.ops.hra.reflect_fwd(x, v, t, transpose)
        ctx.apply_gs, ctx.transpose = apply_gs, transpose
        ctx.save_for_backward(x, v, t, p, u)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, v, t, p, u = ctx.saved_tensors
        dx, du = torch.ops.hra.chain_bwd(_gradient_rows(dy), x, u, v, t, p, ctx.transpose, ctx.apply_gs[0])
        return dx if ctx.needs_input_grad[0] else None, None, None, None, None, du


_apply_chain = super(torch.autograd.Function, _Chain).apply
"""`_Chain.apply` without its look for transforms of torch.func: `is_eager` has looked."""


def _is_plain(us, apply_gs):
    return len(us) == 1 and not isinstance(apply_gs[0], Soft)


def _chain_bwd(dy, x, us, v, t, p, transpose, apply_gs, needed):
    """dx, and the gradients of the us that need one, by the backend itself."""
    if _is_plain(us, apply_gs):
        dx, du = operators.chain_bwd(dy, x, us[0], v, t, p, transpose, apply_gs[0])
        return dx, [du]
    dx, dv, dt = choose(x.device, x.dtype, *v.shape).reflect_bwd(dy, x, v, t, p, transpose)

    def wy_factor_bwd(dv, dt, u, v, t, gs):
        chosen = choose(u.device, u.dtype, u.shape[1], factor=True)
        return chosen.wy_factor_bwd(dv, dt, u, v, t, gs)

    return dx, chain_factor_bwd(wy_factor_bwd, dv, dt, us, v, t, apply_gs, needed)


# --- public functions -------------------------------------------------------------------------------------------------


def wy_factor(u: Tensor, apply_gs: bool = False) -> tuple[Tensor, Tensor]:
    """(v, t) of the chain H_1 ... H_R = I - vᵀ t v of Householder reflections along u's columns.

    Args:
        u: (D, R), float32, float64, bfloat16 or float16; columns of any scale, zero columns reflect nothing.
        apply_gs: reflect along the Gram-Schmidt basis of u's columns instead (arXiv 2405.17484, λ = ∞).

    Returns:
        v (R, D) and t (R, R), float32 (float64 for a float64 u). Differentiable. See `reference.wy_factor`.

    Raises:
        TypeError, ValueError: u has another dtype or shape.
    """
    checks.check_u("wy_factor", u)
    return attach_factor([u], [apply_gs])


def chain_factor(
    us: Sequence[Tensor], apply_gs: Sequence[Rule], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(v, t) of Q_1 Q_2 ... for several chains, without gradient: what `reflect_chain` takes as `factor`.

    Args:
        us: one or more (D, R_i), as in `wy_factor`.
        apply_gs: one flag per chain; or, in its place, `soft.Soft(eps)`.
        dtype: of the tensor that will be reflected; float64 makes v and t float64.
    """
    for u in us:
        checks.check_u("chain_factor", u)
    with torch.no_grad():
        us = in_factor_dtype(us, dtype)
        # every layer comes here after every step of an optimizer: the dispatcher takes longer than a small factor
        wy_factor = _backend_factor if is_eager(*us) else torch.ops.hra.wy_factor_fwd
        return join_factors([factor_by_rule(wy_factor, u, gs) for u, gs in zip(us, apply_gs, strict=True)])


def _backend_factor(u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
    return choose(u.device, u.dtype, u.shape[1], factor=True).wy_factor(u, apply_gs)


def factor_in_groups(u: Tensor) -> bool:
    """Whether `wy_factor_many` shares launches between tensors like u."""
    return choose(u.device, u.dtype, u.shape[1], factor=True).shares_launches


def wy_factor_many(us: Sequence[Tensor], apply_gs: Rule = False) -> list[tuple[Tensor, Tensor]]:
    """`wy_factor` of each u, without gradient; us of one shape share their launches where the backend can batch.

    For the factors of a whole model, once per optimizer step: 200 adapted layers of three shapes cost the launches of
    three. Memory: one more copy of us.
    """
    if isinstance(apply_gs, Soft):
        long = wy_factor_many([extended(u, apply_gs.eps) for u in us])
        return [(v[:, : u.shape[0]].contiguous(), t) for (v, t), u in zip(long, us, strict=True)]
    groups: dict[tuple, list[int]] = {}
    for i, u in enumerate(us):
        checks.check_u("wy_factor_many", u)
        groups.setdefault((u.shape, u.dtype, u.device), []).append(i)
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for members in groups.values():
            # a compiler cannot look into the choice of a backend, and one without groups serves them too
            if len(members) > 1 and (in_compiled_graph() or factor_in_groups(us[members[0]])):
                stacked = torch.stack([us[i] for i in members])
                found = zip(*torch.ops.hra.wy_factor_many(stacked, apply_gs), strict=True)
            else:  # no copy of what nothing is shared with
                found = [torch.ops.hra.wy_factor_fwd(us[i], apply_gs) for i in members]
            factors.update(zip(members, found, strict=True))
    return [factors[i] for i in range(len(us))]


def in_factor_dtype(us: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """us such that their factor has `dtype`'s factor dtype; only a mixture with float64 needs a conversion."""
    wide = dtype == torch.float64
    for u in us:
        if (u.dtype == torch.float64) != wide:
            return [u if (u.dtype == torch.float64) == wide else u.to(factor_dtype(dtype)) for u in us]
    return us


def attach_factor(
    us: Sequence[Tensor], apply_gs: Sequence[Rule], factor: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`chain_factor`, differentiable in us. With `factor` given, only the graph is made: nothing is computed again."""
    if wants_plain_ops():
        return _plain_chain_factor(us, apply_gs)
    if factor is None:
        factor = chain_factor(us, apply_gs, us[0].dtype)
    if _wants_gradient(*us):
        return _Factor.apply(*factor, tuple(apply_gs), *us)
    return factor


def reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool = False) -> Tensor:
    """y = x - (x vᵀ) m v with m = tᵀ if transpose else t: x Qᵀ or x Q for Q = I - vᵀ t v.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16, on any device. Rows that are not contiguous are copied once.
        v: (R, D), float32, or float64 for a float64 x; rows of any scale.
        t: (R, R), v's dtype.

    Returns:
        (..., D) in x's dtype; products accumulate in v's dtype. Differentiable in x, v and t.

    Raises:
        TypeError, ValueError: dtype, shape or device does not fit.
    """
    checks.check_factor("reflect", "x", x, v, t)
    if x.dtype == torch.float16 and v.numel() and not wants_plain_ops():
        v, t = _near_one(v, t)
    return _reflect(x, v, t, transpose)


def _near_one(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same reflections with the rows of v scaled, exactly, so that their largest entries are in [0.5, 1).

    Where float16 meets v, kernels multiply in float16, which ends at 65504. Factors of `wy_factor` are near one as
    they are. Nothing waits for the device.
    """
    exponent = torch.frexp(v.detach().abs().amax(1)).exponent
    scale = torch.ldexp(v.new_ones(v.shape[0]), exponent)
    return v / scale[:, None], scale[:, None] * t * scale


def _reflect(x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
    rows = as_rows(x)
    if wants_plain_ops():
        y = reference.reflect_fwd(rows, v, t, transpose)[0]
    elif _wants_gradient(x, v, t):
        y = _Reflect.apply(rows, v, t, transpose)
    else:
        y = torch.ops.hra.reflect_dx(rows, v, t, not transpose)  # the same product, and no p to keep
    return y.reshape(x.shape)


def reflect_chain(
    x: Tensor,
    us: Sequence[Tensor],
    apply_gs: Sequence[Rule],
    factor: tuple[Tensor, Tensor] | None = None,
    transpose: bool = False,
    eager: bool | None = None,
) -> Tensor:
    """x Q, or x Qᵀ if transpose, for Q the product of several chains; differentiable in x and every u.

    Args:
        x: (..., D), as in `reflect`.
        us: one or more (D, R_i), as in `wy_factor`. Q = Q_1 Q_2 ...
        apply_gs: as in `chain_factor`.
        factor: `chain_factor(us, apply_gs, x.dtype)` where the caller kept it; it must belong to us as they are now.
        eager: `is_eager(x, *us)` where the caller has asked.

    Returns:
        (..., D) in x's dtype.
    """
    us = in_factor_dtype(us, x.dtype)
    if not (is_eager(x, *us) if eager is None else eager):
        if in_compiled_graph() and _is_plain(us, apply_gs) and type(us[0]) is torch.nn.Parameter:
            rows, u = as_rows(x), us[0]
            if _wants_gradient(u):
                return _CompiledChain.apply(rows, *(factor or (None, None)), apply_gs, transpose, u).reshape(x.shape)
            if factor is None and not _wants_gradient(x):
                return torch.ops.hra.chain(rows, u, transpose, apply_gs[0]).reshape(x.shape)
        v, t = attach_factor(us, apply_gs, factor)
        checks.check_factor("reflect_chain", "x", x, v, t)
        return _reflect(x, v, t, transpose)
    v, t = factor = factor or chain_factor(us, apply_gs, x.dtype)
    checks.check_chain("reflect_chain", "x", x, v, t, us)
    if torch.is_grad_enabled():
        if us[0].requires_grad or any(u.requires_grad for u in us):
            if _has_rows(x):
                return _apply_chain(x, factor, apply_gs, transpose, *us)
            return _apply_chain(as_rows(x), factor, apply_gs, transpose, *us).view(x.shape)
        if x.requires_grad:
            return _reflect(x, v, t, transpose)
    y = choose(x.device, x.dtype, *v.shape).reflect_dx(as_rows(x), v, t, not transpose)
    return y if x.dim() == 2 else y.view(x.shape)
