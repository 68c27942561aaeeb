"""The reflections along one layer's vectors as operators that find the factor themselves, for compiled graphs.

    chain        x Q, or x Qᵀ if transpose, for Q along the columns of u, without gradient
    chain_fwd    the same, and what its backward, `chain_bwd`, wants: p, v and t

A graph that computes the factor does so in every call. These operators are called while it runs, with the values that u
has then, whoever wrote them, the graph itself included; so a factor that was kept is validated as in eager mode
(`factor_cache.factor_of_memory`).
"""

from torch import Tensor

from hra_kernels import checks, operators
from hra_kernels.backends import choose
from hra_kernels.factor_cache import factor_of_memory
from hra_kernels.factors import factor_dtype


def _kept(op: str, x: Tensor, u: Tensor, apply_gs: bool) -> tuple[tuple[Tensor, Tensor], bool]:
    """(v, t), and whether they are kept, after all checks."""
    checks.check_u(op, u)
    checks.check_rows(op, "x", x)
    kept = factor_of_memory(u, apply_gs)
    v, t = kept or choose(u.device, u.dtype, u.shape[1], factor=True).wy_factor(u, apply_gs)
    checks.check_factor(op, "x", x, v, t)
    return (v, t), kept is not None


def _chain(x, u, transpose, apply_gs):
    (v, t), _ = _kept("chain", x, u, apply_gs)
    return choose(x.device, x.dtype, *v.shape).reflect_dx(x, v, t, not transpose)


def _chain_fwd(x, u, transpose, apply_gs):
    (v, t), is_kept = _kept("chain_fwd", x, u, apply_gs)
    y, p = choose(x.device, x.dtype, *v.shape).reflect_fwd(x, v, t, transpose)
    if is_kept:  # a compiler may write over results of an operator when it needs them no more
        v, t = v.clone(), t.clone()
    return y, p, v, t


def _fake_factor(op, x, u):
    checks.check_u(op, u)
    (size_d, rank), dtype = u.shape, factor_dtype(u.dtype)
    v, t = u.new_empty(rank, size_d, dtype=dtype), u.new_empty(rank, rank, dtype=dtype)
    checks.check_factor(op, "x", x, v, t)
    return v, t


def _fake_chain(x, u, transpose, apply_gs):
    _fake_factor("chain", x, u)
    return x.new_empty(x.shape)


def _fake_chain_fwd(x, u, transpose, apply_gs):
    v, t = _fake_factor("chain_fwd", x, u)
    return x.new_empty(x.shape), v.new_empty(x.shape[0], v.shape[0]), v, t


operators.register("chain", _chain, _fake_chain)
operators.register("chain_fwd", _chain_fwd, _fake_chain_fwd)
