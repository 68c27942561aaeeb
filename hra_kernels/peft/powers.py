"""Powers of a chain of reflections. Q is orthogonal, and

    Q^0      the identity, bit for bit
    Q^1      Q itself: its columns, bit for bit. (Gram-Schmidt: the orthonormal columns that it reflects along)
    Q^-1     the inverse: the same columns in reverse order
    Q^w      the rotation of every plane that Q rotates by θ, -π < θ < π, by w θ instead: the geodesic from I to Q

are chains of as many columns as Q. The last is not defined where Q turns something round by π: an odd number of
reflections does (determinant -1), and Gram-Schmidt.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hra_kernels.factor_cache import FactorCache, copied_values, validity_key
from hra_kernels.factors import factor_dtype
from hra_kernels.peft.sharded import whole_vectors
from hra_kernels.reference import wy_factor

_HALF_TURN = 1e-4
"""A rotation this close to π (in radians) has no direction that the float32 columns could tell."""


def padded(columns: Tensor, rank: int) -> Tensor:
    """With pairs of equal columns behind, which cancel, and a zero column where one is left over."""
    missing = rank - columns.shape[1]
    pairs = columns.new_ones(columns.shape[0], 2 * (missing // 2))
    return torch.cat([columns, pairs, columns.new_zeros(columns.shape[0], missing % 2)], 1)


def chain_power(u: Tensor, apply_gs: bool, weight: float) -> Tensor:
    """Columns (D, R) of the plain chain Q^weight, for Q the chain of u's columns.

    Args:
        u: (D, R), any floating dtype.
        apply_gs: whether Q is the chain of the Gram-Schmidt basis of u.
        weight: any finite number; see the head of this file for what it means.

    Returns:
        u's own dtype where columns are taken as they are, else the factor's: float32, or float64 for float64.

    Raises:
        ValueError: the power is not defined.
    """
    wide = factor_dtype(u.dtype)
    if weight == 0:
        return padded(u[:, :0], u.shape[1])
    if abs(weight) == 1:
        columns = wy_factor(u, apply_gs=True)[0].mT if apply_gs else u
        return columns if weight == 1 else columns.flip(1)
    v, t = wy_factor(u.double(), apply_gs)
    basis = torch.linalg.qr(v.mT).Q
    inside = basis.mT @ v.mT
    identity = torch.eye(len(inside), dtype=v.dtype, device=v.device)
    q = identity - inside @ t @ inside.mT  # Q on the span of its columns; elsewhere it is the identity
    if not math.isfinite(weight) or not q.isfinite().all():
        raise ValueError(f"the weight and hra_u must be finite, got {weight} and an hra_u with NaN or infinity")
    if torch.linalg.svdvals(identity + q).min() < _HALF_TURN:
        raise ValueError(
            f"its reflections turn a direction round (an odd number of them does, and apply_GS=True), so that the "
            f"power {weight} is not defined; the weights 1, -1 and 0 are"
        )
    # Cayley transform: skew-symmetric, and tan(θ / 2) tells all angles in (-π, π) apart
    tangents, vectors = torch.linalg.eigh(1j * torch.linalg.solve(identity + q, identity - q))
    columns = []
    for k in range(len(q) - len(q) // 2, len(q)):
        half = weight * math.atan(tangents[k])
        first, second = math.sqrt(2) * vectors[:, k].real, -math.sqrt(2) * vectors[:, k].imag
        if tangents[k] > 1e-12:
            columns += [math.cos(half) * first + math.sin(half) * second, first]
    chain = basis @ torch.stack(columns, 1) if columns else u.new_zeros(u.shape[0], 0)
    return padded(chain.to(wide), u.shape[1])


class _NoGradient(torch.autograd.Function):
    """Columns of a power, which pass no gradient on to the vectors: a backward that wants one is told so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, columns: Tensor, weight: float) -> Tensor:
        return columns.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.weight = inputs[2]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            f"HRA has no gradient through an adapter at scale {ctx.weight:g}; train at scale 1 (set_scale), "
            "or freeze it (requires_grad_(False))"
        )


class PowerCache(FactorCache):
    """The last power of one adapter's vectors, validated as a factor is. Copies and pickles are empty."""

    # eigenvectors and comparisons of values are no graph's business
    @torch.compiler.disable
    def get(self, u: Tensor, apply_gs: bool, weight: float) -> Tensor:
        """Columns of the plain chain Q^weight, as `chain_power`; the same tensor while nothing changes.

        Args:
            u: (D, R), or (E, D, R), a chain for each of E experts.

        Raises:
            ValueError: the power is not defined.
            NotImplementedError: under torch.export and torch.func; in a backward, where u wants a gradient.
        """
        if torch.jit.is_tracing() or not _has_values(u):
            raise NotImplementedError(
                f"HRA: an adapter at scale {weight:g} can be neither exported nor differentiated by torch.func; set it "
                "to scale 1, merge it, or make its power an adapter of its own (add_weighted_adapter)"
            )
        columns = self._columns(u, apply_gs, weight)
        return _NoGradient.apply(u, columns, weight) if torch.is_grad_enabled() and u.requires_grad else columns

    def _columns(self, u: Tensor, apply_gs: bool, weight: float) -> Tensor:
        if not self._may_keep([u]):
            return _power(whole_vectors([u])[0], apply_gs, weight)
        key = (weight, *validity_key([u], [apply_gs], u.dtype))
        columns = self._kept(key, [u])
        if columns is None:
            values = copied_values([u])
            columns = _power(values[0] if values else u, apply_gs, weight)
            self._keep(key, [u], values, columns)
        return columns


def _has_values(u: Tensor) -> bool:
    try:
        u.data_ptr()
    except RuntimeError:
        return False
    return True


def _power(u: Tensor, apply_gs: bool, weight: float) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        u = u.clone() if u.is_inference() else u  # what comes of it could not be saved for a later backward
        powers = [chain_power(chain, apply_gs, weight) for chain in (u.unbind(0) if u.dim() == 3 else [u])]
        return torch.stack(powers) if u.dim() == 3 else powers[0]
