"""The registered operators, `torch.ops.hra`: schemas, and checks of their arguments before a backend is called.

Compilers, exporters, tracers and dispatch modes meet these; `hra_kernels.ops` has what is differentiable.
"""

import functools
import sys

import torch
from torch._decomp import register_decomposition

from hra_kernels import checks, reference
from hra_kernels.backends import choose
from hra_kernels.factors import factor_dtype

_library = torch.library.Library("hra", "DEF")
_library.define("wy_factor_fwd(Tensor u, bool apply_gs) -> (Tensor, Tensor)")
_library.define("wy_factor_many(Tensor us, bool apply_gs) -> (Tensor, Tensor)")
_library.define("wy_factor_bwd(Tensor dv, Tensor dt, Tensor u, Tensor v, Tensor t, bool apply_gs) -> Tensor")
_library.define("reflect_fwd(Tensor x, Tensor v, Tensor t, bool transpose) -> (Tensor, Tensor)")
_library.define("reflect_dx(Tensor dy, Tensor v, Tensor t, bool transpose) -> Tensor")
_library.define(
    "reflect_bwd(Tensor dy, Tensor x, Tensor v, Tensor t, Tensor p, bool transpose) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "chain_bwd(Tensor dy, Tensor x, Tensor u, Tensor v, Tensor t, Tensor p, bool transpose, bool apply_gs)"
    " -> (Tensor, Tensor)"
)
_library.define("chain(Tensor x, Tensor u, bool transpose, bool apply_gs) -> Tensor")
_library.define("chain_fwd(Tensor x, Tensor u, bool transpose, bool apply_gs) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define("weight_side_bwd(Tensor dx, Tensor x, Tensor v, Tensor t) -> (Tensor, Tensor)")


def _wy_factor_fwd(u, apply_gs):
    checks.check_u("wy_factor_fwd", u)
    return choose(u.device, u.dtype, u.shape[1], factor=True).wy_factor(u, apply_gs)


def _wy_factor_many(us, apply_gs):
    checks.check_us("wy_factor_many", us)
    return choose(us.device, us.dtype, us.shape[2], factor=True).wy_factor_many(us, apply_gs)


def _wy_factor_bwd(dv, dt, u, v, t, apply_gs):
    checks.check_wy_factor_bwd("wy_factor_bwd", dv, dt, u, v, t)
    return choose(u.device, u.dtype, u.shape[1], factor=True).wy_factor_bwd(dv, dt, u, v, t, apply_gs)


def _reflect_fwd(x, v, t, transpose):
    checks.check_factor("reflect_fwd", "x", x, v, t)
    checks.check_rows("reflect_fwd", "x", x)
    return choose(x.device, x.dtype, *v.shape).reflect_fwd(x, v, t, transpose)


def _reflect_dx(dy, v, t, transpose):
    checks.check_factor("reflect_dx", "dy", dy, v, t)
    checks.check_rows("reflect_dx", "dy", dy)
    return choose(dy.device, dy.dtype, *v.shape).reflect_dx(dy, v, t, transpose)


def _reflect_bwd(dy, x, v, t, p, transpose):
    checks.check_reflect_bwd("reflect_bwd", dy, x, v, t, p)
    checks.check_rows("reflect_bwd", "x", x)
    checks.check_rows("reflect_bwd", "dy", dy)
    return choose(x.device, x.dtype, *v.shape).reflect_bwd(dy, x, v, t, p, transpose)


def chain_bwd(dy, x, u, v, t, p, transpose, apply_gs):
    """dx and du, by the backend that has both, which may have one launch for them; unchecked."""
    backend = choose(x.device, x.dtype, *v.shape)
    factor_backend = choose(u.device, u.dtype, u.shape[1], factor=True)
    if factor_backend is backend:
        return backend.chain_bwd(dy, x, u, v, t, p, transpose, apply_gs)
    dx, dv, dt = backend.reflect_bwd(dy, x, v, t, p, transpose)
    return dx, factor_backend.wy_factor_bwd(dv, dt, u, v, t, apply_gs)


def _chain_bwd(dy, x, u, v, t, p, transpose, apply_gs):
    checks.check_chain_bwd("chain_bwd", dy, x, [u], v, t, p)
    checks.check_rows("chain_bwd", "x", x)
    checks.check_rows("chain_bwd", "dy", dy)
    return chain_bwd(dy, x, u, v, t, p, transpose, apply_gs)


def _weight_side_bwd(dx, x, v, t):
    checks.check_weight_side_bwd("weight_side_bwd", dx, x, v, t)
    checks.check_rows("weight_side_bwd", "x", x)
    checks.check_rows("weight_side_bwd", "dx", dx)
    return choose(x.device, x.dtype, *v.shape).weight_side_bwd(dx, x, v, t)


# Strides are checked where tensors are real: a compiler fixes them only when it is done.


def _stays_whole_in_inductor(operator: torch._ops.OpOverload) -> None:
    """Where CI is set in the environment, Inductor refuses to call an operator that has an entry in the table below."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and operator not in lowering.lowerings:
        lowering.make_fallback(operator, lowering.constrain_to_fx_strides, warn=False)


def _fake_wy_factor_fwd(u, apply_gs):
    _stays_whole_in_inductor(torch.ops.hra.wy_factor_fwd.default)
    checks.check_u("wy_factor_fwd", u)
    dtype = factor_dtype(u.dtype)
    return u.new_empty(u.shape[1], u.shape[0], dtype=dtype), u.new_empty(u.shape[1], u.shape[1], dtype=dtype)


def _fake_wy_factor_many(us, apply_gs):
    checks.check_us("wy_factor_many", us)
    (layers, size_d, rank), dtype = us.shape, factor_dtype(us.dtype)
    return us.new_empty(layers, rank, size_d, dtype=dtype), us.new_empty(layers, rank, rank, dtype=dtype)


def _fake_wy_factor_bwd(dv, dt, u, v, t, apply_gs):
    checks.check_wy_factor_bwd("wy_factor_bwd", dv, dt, u, v, t)
    return u.new_empty(u.shape)


def _fake_reflect_fwd(x, v, t, transpose):
    _stays_whole_in_inductor(torch.ops.hra.reflect_fwd.default)
    checks.check_factor("reflect_fwd", "x", x, v, t)
    return x.new_empty(x.shape), v.new_empty(x.shape[0], v.shape[0])


def _fake_reflect_dx(dy, v, t, transpose):
    _stays_whole_in_inductor(torch.ops.hra.reflect_dx.default)
    checks.check_factor("reflect_dx", "dy", dy, v, t)
    return dy.new_empty(dy.shape)


def _fake_reflect_bwd(dy, x, v, t, p, transpose):
    checks.check_reflect_bwd("reflect_bwd", dy, x, v, t, p)
    return dy.new_empty(dy.shape), v.new_empty(v.shape), t.new_empty(t.shape)


def _fake_chain_bwd(dy, x, u, v, t, p, transpose, apply_gs):
    checks.check_chain_bwd("chain_bwd", dy, x, [u], v, t, p)
    return dy.new_empty(dy.shape), u.new_empty(u.shape)


def _fake_weight_side_bwd(dx, x, v, t):
    checks.check_weight_side_bwd("weight_side_bwd", dx, x, v, t)
    return v.new_empty(v.shape), t.new_empty(t.shape)


def register(name, kernel, fake):
    """Serve the operator `name` by `kernel` on every device; `fake` gives a compiler its results' shapes."""
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hra::{name}", fake, lib=_library)


for _name, _kernel, _fake in [
    ("wy_factor_fwd", _wy_factor_fwd, _fake_wy_factor_fwd),
    ("wy_factor_many", _wy_factor_many, _fake_wy_factor_many),
    ("wy_factor_bwd", _wy_factor_bwd, _fake_wy_factor_bwd),
    ("reflect_fwd", _reflect_fwd, _fake_reflect_fwd),
    ("reflect_dx", _reflect_dx, _fake_reflect_dx),
    ("reflect_bwd", _reflect_bwd, _fake_reflect_bwd),
    ("chain_bwd", _chain_bwd, _fake_chain_bwd),
    ("weight_side_bwd", _weight_side_bwd, _fake_weight_side_bwd),
]:
    register(_name, _kernel, _fake)


def _decompose(operator, plain):
    @functools.wraps(plain)
    def decomposition(*args, **kwargs):
        _stays_whole_in_inductor(operator)  # where sizes are symbolic, this stands in for the fake
        return plain(*args, **kwargs)

    register_decomposition(operator)(decomposition)


# torch.onnx.export(dynamo=True) knows none of these operators and asks this table for others in their place
for _name, _plain in [
    ("wy_factor_fwd", reference.portable_factor),
    ("reflect_fwd", reference.reflect_fwd),
    ("reflect_dx", reference.reflect_dx),
]:
    _decompose(getattr(torch.ops.hra, _name).default, _plain)
