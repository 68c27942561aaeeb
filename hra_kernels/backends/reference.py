"""The `reference` backend: the specification itself, on any device, in any dtype, with any number of columns."""

from torch import Tensor

from hra_kernels import reference
from hra_kernels.backends.base import Backend


class ReferenceBackend(Backend):
    """Plain PyTorch."""

    name = "reference"

    def why_unavailable(self) -> str | None:
        """None."""
        return None

    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        return reference.wy_factor(u, apply_gs)

    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        return reference.wy_factor_bwd(dv, dt, u, v, t, apply_gs)

    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        return reference.reflect_fwd(x, v, t, transpose)

    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        return reference.reflect_dx(dy, v, t, transpose)

    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.reflect_bwd(dy, x, v, t, p, transpose)


BACKEND = ReferenceBackend()
