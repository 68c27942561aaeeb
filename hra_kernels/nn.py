"""Modules for people without PEFT: a frozen layer and the reflections that adapt it."""

import copy

import torch
from torch import Tensor, nn

from hra_kernels.factor_cache import FactorCache, KeepsFactors
from hra_kernels.factors import factor_dtype
from hra_kernels.functional import hra_conv2d, hra_linear, hra_weight
from hra_kernels.soft import check_side, init_short_, rule


class _HRALayer(KeepsFactors):
    def __init__(
        self, base_layer: nn.Module, r: int, apply_gs: bool, init_weights: bool, side: str = "input", eps: float = 0.0
    ) -> None:
        super().__init__()
        check_side(type(self).__name__, side)
        self._rule = rule(type(self).__name__, apply_gs, eps)
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"{type(self).__name__}: r must be a positive integer, got {r!r}")
        self.base_layer = base_layer.requires_grad_(False)
        self.r = r
        self.apply_gs, self.side, self.eps = apply_gs, side, eps
        weight = base_layer.weight
        features = weight.shape[0] if side == "output" else weight[0].numel()
        wide = factor_dtype(weight.dtype)
        self.hra_u = nn.Parameter(torch.empty(features, r, dtype=wide, device=weight.device))
        self.reset_parameters(init_weights)
        self._factors = FactorCache()

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draw `hra_u` anew: pairs of equal columns (the layer is the base layer, bit for bit) or independent ones.

        Columns are independent too with `apply_gs`, which has no use for equal ones, and so the layer then starts away
        from the base layer; the last column of an odd r stands alone, and a single reflection is never the identity.
        With `eps`, `init_weights` draws independent columns so short that the layer is near the base layer.
        """
        if self.eps and init_weights:
            init_short_(self.hra_u, self.eps)
            return
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.hra_u, a=5**0.5)
            if init_weights and not self.apply_gs:
                pairs = self.r // 2
                self.hra_u[:, 1 : 2 * pairs : 2] = self.hra_u[:, 0 : 2 * pairs : 2]

    def _chain(self, x: Tensor) -> dict:
        self.look_for_hooks()
        factor = self._factors.get([self.hra_u], [self._rule], x.dtype)
        return {"apply_gs": self._rule, "factor": factor}

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base layer with the reflections in its weight: same outputs, no adapter.

        Raises:
            ValueError: `hra_u` or the merged weight is not finite; nothing has been changed.
        """
        if not self.hra_u.isfinite().all():
            raise ValueError(f"{type(self).__name__}.merged: hra_u must be finite, it holds NaN or infinity")
        weight = hra_weight(self.base_layer.weight, self.hra_u, apply_gs=self._rule, side=self.side)
        if not weight.isfinite().all():
            raise ValueError(f"{type(self).__name__}.merged: the merged weight must be finite, it is not")
        layer = copy.deepcopy(self.base_layer)
        layer.weight.copy_(weight)
        return layer

    def extra_repr(self) -> str:
        extras = f", side={self.side!r}, eps={self.eps}" if self.side != "input" or self.eps else ""
        return f"r={self.r}, apply_gs={self.apply_gs}{extras}"


class HRALinear(_HRALayer):
    """A frozen `nn.Linear` adapted by r Householder reflections: y = x (W H_1 ... H_r)ᵀ + b.

    Args:
        base_layer: the layer to adapt; it is frozen in place and kept, its weight is never changed.
        r: number of reflections; even, so that the layer can start as the base layer.
        apply_gs: orthonormalize the columns of `hra_u` first.
        init_weights: start as the base layer (with eps: near it).
        side: "input", or "output" for y = x (Qᵀ W)ᵀ + b with Q = H_1 ... H_r.
        eps: reflect along u / sqrt(|u|² + eps); not with apply_gs. The authors' code for language models has
            side="output", eps=1e-4.

    The trainable parameter is `hra_u` (in_features, r), or (out_features, r) on the output side, float32 (float64 over
    a float64 layer).

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 8,
        apply_gs: bool = False,
        init_weights: bool = True,
        side: str = "input",
        eps: float = 0.0,
    ) -> None:
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"HRALinear: base_layer must be an nn.Linear, got {type(base_layer).__name__}")
        super().__init__(base_layer, r, apply_gs, init_weights, side, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        base = self.base_layer
        return hra_linear(x, base.weight, self.hra_u, base.bias, side=self.side, **self._chain(x))


class HRAConv2d(_HRALayer):
    """A frozen `nn.Conv2d` whose weight, flattened to (out_channels, in_channels kh kw), is adapted like `HRALinear`'s.

    Args: as `HRALinear`, with any kernel shape, stride, padding, padding mode and dilation; groups must be 1.
    """

    def __init__(self, base_layer: nn.Conv2d, r: int = 8, apply_gs: bool = False, init_weights: bool = True) -> None:
        if not isinstance(base_layer, nn.Conv2d):
            raise TypeError(f"HRAConv2d: base_layer must be an nn.Conv2d, got {type(base_layer).__name__}")
        if base_layer.groups != 1:
            raise NotImplementedError(f"HRAConv2d: groups must be 1, got {base_layer.groups}")
        super().__init__(base_layer, r, apply_gs, init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) or unbatched, as the base layer takes it."""
        base = self.base_layer
        geometry = (base.stride, base.padding, base.dilation, base.groups, base.padding_mode)
        return hra_conv2d(x, base.weight, self.hra_u, base.bias, *geometry, **self._chain(x))
