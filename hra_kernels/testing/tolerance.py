"""The one accuracy rule of the project; no test has a tolerance of its own.

    allowed = max(k * error of the naive chain in x's dtype, 2 * error of merely rounding the exact answer)
              + 4 R eps32 * scale

`exact` is the explicit chain in float64 on the very same (low-precision) inputs. k is 1 for bfloat16 and float16, where
we accumulate in float32 and so must beat the naive chain, 4 for float32, and 8 for float64, whose Gram matrix has no
wider dtype to be computed in. The last term absorbs luck in tiny cases; its scale is max|exact| in the max norm and 1
in the relative Frobenius norm. The rule holds in both norms, for y and for every gradient: the Frobenius norm misses
one masked row, the max norm misses a small error everywhere.
"""

import torch
from torch import Tensor

NAIVE_FACTOR = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}


def errors(got: Tensor, exact: Tensor) -> dict[str, float]:
    """{norm: error} of `got`; NaN anywhere gives NaN."""
    difference = got.double() - exact
    if difference.numel() == 0:
        return {"max": 0.0, "frobenius": 0.0}
    size = torch.linalg.vector_norm(exact)
    return {
        "max": difference.abs().max().item(),
        "frobenius": (torch.linalg.vector_norm(difference) / torch.where(size > 0, size, 1)).item(),
    }


def allowed(naive: Tensor, exact: Tensor, dtype: torch.dtype, out_dtype: torch.dtype, rank: int) -> dict[str, float]:
    """{norm: allowed error} for a result of dtype `out_dtype` computed from a `dtype` x with `rank` reflections."""
    naive_errors, rounding = errors(naive, exact), errors(exact.to(out_dtype), exact)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale = {"max": exact.abs().max().item() if exact.numel() else 0.0, "frobenius": 1.0}
    factor = NAIVE_FACTOR[dtype]
    return {
        norm: max(factor * naive_errors[norm], 2 * rounding[norm]) + 4 * rank * unit * scale[norm] for norm in scale
    }


def violations(
    got: dict[str, Tensor], naive: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, rank: int
) -> list[str]:
    """One line for each tensor and norm that breaks the rule; empty where all is well."""
    found = []
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape, f"{name}: shape {tuple(tensor.shape)}, {tuple(exact[name].shape)} due"
        bounds = allowed(naive[name], exact[name], dtype, tensor.dtype, rank)
        for norm, error in errors(tensor, exact[name]).items():
            if not error <= bounds[norm]:  # so written that NaN fails
                found.append(f"{name}: {norm} error {error:.3e} exceeds {bounds[norm]:.3e}")
    return found


def assert_accurate(
    got: dict[str, Tensor], naive: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, rank: int
) -> None:
    """Assert the rule for every tensor in `got` by name."""
    found = violations(got, naive, exact, dtype, rank)
    assert not found, "; ".join(found)
