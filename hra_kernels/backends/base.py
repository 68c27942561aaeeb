"""The protocol of a backend: what it serves, and the operators it serves them with.

`hra_kernels.reference` specifies the operators. `ops` checks shapes, dtypes, devices and strides before it calls one:
a backend may rely on them, and on being asked only for what its `why_unsupported` lets through.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hra_kernels import reference


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} and {last}" if most else last


class Backend(ABC):
    """One way to compute the operators. M rows of D numbers, R columns; factors are float32, or float64 for float64."""

    name: str
    device_type: str | None = None
    """Of the tensors it serves, as in `torch.device.type`; None is any."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """Of x, dy and u; None is any."""
    max_rank: int | None = None
    """Largest R; None is any."""
    max_width: int | None = None
    """Largest D of reflections; None is any."""
    shares_launches = False
    """Whether `wy_factor_many` costs fewer launches than its factors one by one."""

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """None where it can run on this machine, else the reason."""

    def why_unsupported(
        self, device: torch.device, dtype: torch.dtype, rank: int, width: int | None = None
    ) -> str | None:
        """None where it reflects tensors of this device and dtype with this many columns, else the reason.

        Args:
            width: their D; None where it does not matter yet.
        """
        if self.device_type is not None and self.device_type != device.type:
            return f"it serves {self.device_type} tensors, got {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it serves {_names(self.dtypes)}, got {str(dtype).removeprefix('torch.')}"
        if self.max_rank is not None and rank > self.max_rank:
            return f"it serves up to {self.max_rank} columns, got {rank}"
        if self.max_width is not None and width is not None and width > self.max_width:
            return f"it serves D up to {self.max_width}, got {width}"
        return self._why_device_unsupported(device)

    def _why_device_unsupported(self, device: torch.device) -> str | None:
        """What the device lacks, beyond being of the right type."""
        return None

    def why_factor_unsupported(self, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
        """`why_unsupported` for the factors of u; a backend that has them from another one gives that one's answer."""
        return self.why_unsupported(device, dtype, rank)

    @abstractmethod
    def wy_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """v (R, D) and t (R, R) of u (D, R), any strides."""

    def copy_and_factor(self, u: Tensor, apply_gs: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A copy of u (D, R), and `wy_factor` of the copy, whatever is written to u meanwhile; without gradient."""
        copy = u.detach().clone()
        return copy, self.wy_factor(copy, apply_gs)

    def wy_factor_many(self, us: Tensor, apply_gs: bool) -> tuple[Tensor, Tensor]:
        """v (L, R, D) and t (L, R, R) of us (L, D, R): bit for bit each factor on its own."""
        factors = [self.wy_factor(u, apply_gs) for u in us]
        return torch.stack([v for v, _ in factors]), torch.stack([t for _, t in factors])

    @abstractmethod
    def wy_factor_bwd(self, dv: Tensor, dt: Tensor, u: Tensor, v: Tensor, t: Tensor, apply_gs: bool) -> Tensor:
        """du (D, R) in u's dtype; any strides."""

    @abstractmethod
    def reflect_fwd(self, x: Tensor, v: Tensor, t: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
        """y = x - (x vᵀ) m v (M, D) in x's dtype and p = x vᵀ (M, R); m = tᵀ if transpose else t.

        Rows of x are contiguous and any stride apart; v and t have any strides. So too below.
        """

    @abstractmethod
    def reflect_dx(self, dy: Tensor, v: Tensor, t: Tensor, transpose: bool) -> Tensor:
        """dx (M, D) of `reflect_fwd`, in dy's dtype: the same reflection with the other side's m."""

    @abstractmethod
    def reflect_bwd(
        self, dy: Tensor, x: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx (M, D) in dy's dtype, dv (R, D) and dt (R, R) of `reflect_fwd`, whose p this is."""

    def chain_bwd(
        self, dy: Tensor, x: Tensor, u: Tensor, v: Tensor, t: Tensor, p: Tensor, transpose: bool, apply_gs: bool
    ) -> tuple[Tensor, Tensor]:
        """dx (M, D) and du (D, R): `reflect_bwd`, then `wy_factor_bwd` of the dv and dt that it gives, bit for bit."""
        dx, dv, dt = self.reflect_bwd(dy, x, v, t, p, transpose)
        return dx, self.wy_factor_bwd(dv, dt, u, v, t, apply_gs)

    def weight_side_bwd(self, dx: Tensor, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """dv (R, D) and dt (R, R) of y = x (W Q)ᵀ from x and its gradient dx, both (M, D), in one pass over them.

        Unless a backend has a kernel for it, plain PyTorch, which copies 16-bit x and dx to the factor's dtype.
        """
        return reference.weight_side_bwd(dx, x, v, t)
