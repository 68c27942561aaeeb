"""The vectors of the adapters of one layer: their shapes, how they start, and what is said about each."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn

from hra_kernels.peft.powers import PowerCache
from hra_kernels.soft import Rule, Soft, init_short_


class AdapterVectors(HRALayer):
    """PEFT's HRA layer with a side, an ε and a scale for each adapter."""

    hra_side: dict[str, str]
    hra_eps: dict[str, float]
    hra_scales: dict[str, list[float]]
    _powers: dict[str, PowerCache]

    def is_marked(self, name: str) -> bool:
        """Whether `hra_u` has a dimension of one before its last, which PEFT's own HRA refuses to load: it knows
        neither sides nor ε, and would read such an adapter as another one."""
        return self.hra_side[name] != "input" or self.hra_eps[name] != 0

    def vectors(self, name: str) -> Tensor:
        """The vectors of one adapter, (D, r), (N, r) on the output side, or (experts, D, r)."""
        u = self.hra_u._parameters.get(name)
        u = u if type(u) is nn.Parameter and not hasattr(u, "ds_id") else self.hra_u[name]
        return u.flatten(0, 1) if self.is_marked(name) and u.dim() == 3 else u

    def of_side(self, side: str, names: Sequence[str]) -> list[str]:
        """Those of these adapters that are on this side, in order."""
        return [name for name in names if self.hra_side[name] == side]

    def chain(self, names: Sequence[str]) -> tuple[list[Tensor], list[Rule]]:
        """Of these adapters, in order: their vectors, and what their reflections are along (`soft.Rule`).

        At a scale other than 1: the vectors of that power of the adapter.

        Raises:
            ValueError: the power is not defined.
        """
        us, apply_gs = [], []
        for name in names:
            gs, eps, scale = self.hra_apply_GS[name], self.hra_eps[name], self._scale_of(name)
            us.append(self.vectors(name) if scale == 1 else self._power(name, scale))
            apply_gs.append(Soft(eps) if eps else gs and scale == 1)
        return us, apply_gs

    def reset_hra_parameters(self, adapter_name: str) -> None:
        """PEFT's default initialization: pairs of equal columns, so that the layer starts as the base layer.

        With `apply_GS` there is no such start: Gram-Schmidt keeps one of each pair (the other depends on it), leaving
        r / 2 reflections, -1 on their span, and no gradient for the rest. Independent columns are drawn instead.
        With `eps` they are independent too, and so short that the layer starts near the base layer.
        """
        if self.hra_eps[adapter_name]:
            init_short_(self.vectors(adapter_name), self.hra_eps[adapter_name])
        elif self.hra_apply_GS[adapter_name]:
            warnings.warn(
                f"HRA adapter {adapter_name!r}: apply_GS=True cannot start from HRA's pairs of equal columns, of which "
                "Gram-Schmidt keeps one each; independent columns are drawn, so the layer does not start as the base "
                "layer (none with apply_GS can). Set init_weights=False to say that this is meant.",
                stacklevel=2,
            )
            self.reset_hra_parameters_random(adapter_name)
        else:
            with self._as_one_matrix(adapter_name):
                super().reset_hra_parameters(adapter_name)

    def reset_hra_parameters_random(self, adapter_name: str) -> None:
        """As PEFT's: independent columns."""
        with self._as_one_matrix(adapter_name):
            super().reset_hra_parameters_random(adapter_name)

    @contextmanager
    def _as_one_matrix(self, adapter_name: str) -> Iterator[None]:
        """PEFT's initializations know (D, r); rows are independent in them."""
        u = self.hra_u[adapter_name]
        shape = u.shape
        self.hra_u[adapter_name] = nn.Parameter(u.detach().flatten(0, -2))
        yield
        self.hra_u[adapter_name] = nn.Parameter(self.hra_u[adapter_name].detach().reshape(shape))

    # --- scales

    @property
    def r(self) -> dict[str, int]:
        """`hra_r`, under the name that PEFT's LoRA layers have for it and that clients read."""
        return self.hra_r

    def set_scale(self, adapter: str, scale: float) -> None:
        """Apply the power Q^scale of an adapter: 0 is the base layer, bit for bit, 1 the adapter, -1 its inverse.

        In between it is the geodesic of `add_weighted_adapter`. An adapter that the layer does not have is passed over.

        Raises:
            ValueError: the power is not defined, as for odd r or apply_GS but at -1, 0 and 1, and with eps but at 0
                and 1; nothing is changed.
        """
        if adapter in self.hra_r:
            self._set_scales(adapter, [float(scale)])

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of each active adapter; raises as `set_scale` does."""
        for name in self.active_adapters:
            if scale != 1 and name in self.hra_r:
                self._set_scales(name, [*self.hra_scales[name], float(scale)])

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`, exactly; without a scale, go back to 1. For each active adapter."""
        for name in self.active_adapters:
            if name not in self.hra_r or scale == 1:
                continue
            scales = [] if scale is None else list(self.hra_scales[name])
            if scale is not None and scale in scales:
                scales.reverse()
                scales.remove(scale)
                scales.reverse()
            elif scale is not None:
                scales.append(1 / scale)
            self.hra_scales[name] = scales

    def _scale_of(self, name: str) -> float:
        scales = self.hra_scales[name]
        return math.prod(scales) if scales else 1

    def _set_scales(self, name: str, scales: list[float]) -> None:
        before, self.hra_scales[name] = self.hra_scales[name], scales
        try:
            if not self.hra_u[name].is_meta:
                self.chain([name])
        except ValueError:
            self.hra_scales[name] = before
            raise

    def _power(self, name: str, scale: float) -> Tensor:
        if self.hra_eps[name]:
            if scale == 0:
                return torch.zeros_like(self.vectors(name))
            raise ValueError(
                f"HRA: {self.describe()}, adapter {name!r} at scale {scale:g}: with eps, a chain is not orthogonal "
                "and has no powers; its scales are 0 and 1"
            )
        powers = self._powers[name]
        powers.parameters_come_late = self._factors.parameters_come_late
        try:
            return powers.get(self.vectors(name), self.hra_apply_GS[name], scale)
        except ValueError as error:
            raise ValueError(f"HRA: {self.describe()}, adapter {name!r} at scale {scale:g}: {error}") from error
