"""The vectors of the adapters of one layer: their shapes, how they start, and what is said about each."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn

from hra_kernels.soft import init_short_


class AdapterVectors(HRALayer):
    """PEFT's HRA layer with a side and an ε for each adapter."""

    hra_side: dict[str, str]
    hra_eps: dict[str, float]

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
