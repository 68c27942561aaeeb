"""What the registered operators reject, in the same words on every backend."""

import pytest
import torch

from hra_kernels import ops

M, D, R = 4, 6, 2
SHAPES = {name: (M, D) for name in ("x", "dy", "dx")} | {name: (R, R) for name in ("t", "dt")}
SHAPES |= {"us": (3, D, R), "u": (D, R), "v": (R, D), "dv": (R, D), "p": (M, R)}
ARGUMENTS = {
    "wy_factor_fwd": ("u",),
    "wy_factor_many": ("us",),
    "wy_factor_bwd": ("dv", "dt", "u", "v", "t"),
    "reflect_fwd": ("x", "v", "t"),
    "reflect_dx": ("dy", "v", "t"),
    "reflect_bwd": ("dy", "x", "v", "t", "p"),
    "chain": ("x", "u"),
    "chain_fwd": ("x", "u"),
    "chain_bwd": ("dy", "x", "u", "v", "t", "p"),
    "weight_side_bwd": ("dx", "x", "v", "t"),
}
FLAGS = {op: (False, False) if op.startswith("chain") else (False,) for op in ARGUMENTS} | {"weight_side_bwd": ()}


def arguments(op, device, **changes):
    tensors = {name: torch.ones(SHAPES[name], device=device) for name in ARGUMENTS[op]}
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    return *tensors.values(), *FLAGS[op]


def columns_apart(tensor):
    return tensor.mT.contiguous().mT


WRONG = [
    ("wy_factor_fwd", "u", lambda u: u[0], ValueError, r"u must be \(D, R\), got shape \(2,\)"),
    ("wy_factor_fwd", "u", torch.Tensor.int, TypeError, "u must be float32, float64, .* got int32"),
    ("wy_factor_many", "us", lambda us: us[0], ValueError, r"us must be \(L, D, R\), got shape \(6, 2\)"),
    ("wy_factor_many", "us", torch.Tensor.int, TypeError, "us must be float32, float64, .* got int32"),
    ("wy_factor_bwd", "u", lambda u: u[0], ValueError, r"u must be \(D, R\), got shape \(2,\)"),
    ("wy_factor_bwd", "u", lambda u: u[:5], ValueError, r"dv must have shape \(2, 5\), got \(2, 6\)"),
    ("wy_factor_bwd", "dv", lambda dv: dv[:1], ValueError, r"dv must have shape \(2, 6\), got \(1, 6\)"),
    ("wy_factor_bwd", "dt", lambda dt: dt[:, :1], ValueError, r"dt must have shape \(2, 2\), got \(2, 1\)"),
    ("wy_factor_bwd", "v", lambda v: v[:, :5], ValueError, r"v must have shape \(2, 6\), got \(2, 5\)"),
    ("wy_factor_bwd", "t", lambda t: t[0], ValueError, r"t must have shape \(2, 2\), got \(2,\)"),
    ("wy_factor_bwd", "t", torch.Tensor.double, TypeError, "t must be torch.float32, got torch.float64"),
    ("wy_factor_bwd", "v", lambda v: v.to("meta"), ValueError, "v must be on .*, got meta"),
    ("reflect_bwd", "dy", lambda dy: dy[:3], ValueError, r"dy must have shape \(4, 6\), got \(3, 6\)"),
    ("reflect_bwd", "dy", torch.Tensor.half, TypeError, "dy must be torch.float32, got torch.float16"),
    ("reflect_bwd", "dy", columns_apart, ValueError, r"dy must be \(M, D\) with contiguous rows"),
    ("reflect_bwd", "dy", lambda dy: dy.to("meta"), ValueError, "dy must be on .*, got meta"),
    ("reflect_bwd", "p", lambda p: p[:3], ValueError, r"p must have shape \(4, 2\), got \(3, 2\)"),
    ("reflect_bwd", "p", torch.Tensor.double, TypeError, "p must be torch.float32, got torch.float64"),
    ("weight_side_bwd", "dx", lambda dx: dx[:3], ValueError, r"dx must have shape \(4, 6\), got \(3, 6\)"),
    ("weight_side_bwd", "dx", torch.Tensor.half, TypeError, "dx must be torch.float32, got torch.float16"),
    ("weight_side_bwd", "dx", columns_apart, ValueError, r"dx must be \(M, D\) with contiguous rows"),
    ("weight_side_bwd", "dx", lambda dx: dx.to("meta"), ValueError, "dx must be on .*, got meta"),
]
for _op in ("chain", "chain_fwd"):
    WRONG += [
        (_op, "u", lambda u: u[0], ValueError, r"u must be \(D, R\), got shape \(2,\)"),
        (_op, "u", lambda u: u[:5], ValueError, r"v must be \(R, D\) with D = x.* = 6, got shape \(2, 5\)"),
        (_op, "u", torch.Tensor.double, TypeError, "v must be torch.float32 for torch.float32 .*torch.float64"),
        (_op, "x", torch.Tensor.int, TypeError, "x must be float32, float64, .* got int32"),
        (_op, "x", lambda x: x[0], ValueError, r"x must be \(M, D\) with contiguous rows, got shape \(6,\)"),
        (_op, "x", columns_apart, ValueError, r"x must be \(M, D\) with contiguous rows, .*strides \(1, 4\)"),
        (_op, "x", lambda x: x.to("meta"), ValueError, "v must be on x's device meta, got"),
    ]
WRONG += [
    ("chain_bwd", "u", lambda u: u[:5], ValueError, r"u must have shape \(6, 2\), got \(5, 2\)"),
    ("chain_bwd", "dy", lambda dy: dy[:3], ValueError, r"dy must have shape \(4, 6\), got \(3, 6\)"),
    ("chain_bwd", "p", torch.Tensor.double, TypeError, "p must be torch.float32, got torch.float64"),
    ("chain_bwd", "dy", columns_apart, ValueError, r"dy must be \(M, D\) with contiguous rows"),
]
for _op, _x in (
    ("reflect_fwd", "x"), ("reflect_dx", "dy"), ("reflect_bwd", "x"), ("chain_bwd", "x"), ("weight_side_bwd", "x")
):  # fmt: skip
    WRONG += [
        (_op, "v", lambda v: v[:, :5], ValueError, rf"v must be \(R, D\) with D = {_x}.* = 6, got shape \(2, 5\)"),
        (_op, "v", lambda v: v[0], ValueError, r"v must be \(R, D\) .* got shape \(6,\)"),
        (_op, "t", lambda t: t[:1], ValueError, r"t must be \(R, R\) with R = v.shape\[0\] = 2, got shape \(1, 2\)"),
        (_op, "v", torch.Tensor.bfloat16, TypeError, "v must be torch.float32 for torch.float32 .*torch.bfloat16"),
        (_op, "t", torch.Tensor.double, TypeError, "t must be torch.float32 for torch.float32 .*torch.float64"),
        (_op, "v", lambda v: v.to("meta"), ValueError, f"v must be on {_x}'s device .*, got meta"),
        (_op, _x, torch.Tensor.int, TypeError, f"{_x} must be float32, float64, .* got int32"),
        (_op, _x, columns_apart, ValueError, rf"{_x} must be \(M, D\) with contiguous rows, .*strides \(1, 4\)"),
    ]
for _op, _x in (("reflect_fwd", "x"), ("reflect_dx", "dy")):
    WRONG += [
        (_op, _x, lambda x: x.sum(), ValueError, f"{_x} must have at least one dimension"),
        (_op, _x, lambda x: x[0], ValueError, rf"{_x} must be \(M, D\) with contiguous rows, got shape \(6,\)"),
    ]


@pytest.mark.parametrize("op, name, change, error, message", WRONG)
def test_registered_operators_reject(on_backend, device, op, name, change, error, message):
    with pytest.raises(error, match=f"^{op}: {message}"):
        getattr(torch.ops.hra, op)(*arguments(op, device, **{name: change}))


@pytest.mark.parametrize("op", ARGUMENTS)
def test_what_a_forced_backend_does_not_serve(on_backend, device, op):
    """Tensors that agree with each other and not with the backend: it says which of their properties."""
    backend = ops.BACKENDS[on_backend]
    why = backend.why_factor_unsupported if op.startswith("wy_factor") else backend.why_unsupported
    for dtype, rank in [(torch.float64, R), (torch.float32, 1 + (backend.max_rank or R))]:
        if why(device, dtype, rank) is None:
            continue
        shapes = {name: [rank if size == R else size for size in shape] for name, shape in SHAPES.items()}
        tensors = [torch.ones(shapes[name], device=device, dtype=dtype) for name in ARGUMENTS[op]]
        with pytest.raises(RuntimeError, match=f"backend '{on_backend}' was asked for and cannot serve this call: it"):
            getattr(torch.ops.hra, op)(*tensors, *FLAGS[op])


@pytest.mark.parametrize("op", ARGUMENTS)
def test_compilation_rejects_as_eager_does(op):
    """The shapes that tracing computes with are checked too."""
    name = "v" if "v" in ARGUMENTS[op] else ARGUMENTS[op][-1]
    tensors = arguments(op, "meta", **{name: lambda tensor: tensor[0]})
    with pytest.raises(ValueError, match=f"{op}: {name} must"):
        getattr(torch.ops.hra, op)(*tensors)
