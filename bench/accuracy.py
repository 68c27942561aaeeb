"""The check before the clock: no time is taken of a layer whose results are wrong.

The HRA family is held to the project's one accuracy rule (hra_kernels/testing/tolerance.py), for y, dx and du, against
the explicit chain in float64. Methods with a function of their own are compared with their own float64 copy; for them
it is a guard against NaN, tf32 and the like, with one bound per dtype.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.providers import Provider, hra_parameter
from hra_kernels import reference
from hra_kernels.testing import tolerance

OWN_BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest relative Frobenius error of a method against itself in float64: far above rounding, far below tf32's 3e-4 in
float32."""


def gradients(layer: nn.Module, x: Tensor, parameters: list[Tensor], dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(y, [dx, *dparameters]) of one forward and backward."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), list(torch.autograd.grad(y, [x, *parameters], dy))


def explicit_layer(base: nn.Module, x: Tensor, u: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, dx and du of the adapted layer, one reflection of the weight at a time, all of it in `dtype`."""
    u = u.detach().to(dtype).requires_grad_()
    x = x.detach().to(dtype).requires_grad_()
    weight = reference.explicit_chain(u, x=base.weight.detach().to(dtype).flatten(1))
    bias = base.bias.detach().to(dtype) if base.bias is not None else None
    if isinstance(base, nn.Conv2d):
        y = F.conv2d(x, weight.view_as(base.weight), bias, base.stride, base.padding, base.dilation)
    else:
        y = F.linear(x, weight, bias)
    dx, du = torch.autograd.grad(y, (x, u), dy.to(dtype))
    return {"y": y.detach(), "dx": dx, "du": du}


class LayerCheck:
    """Checks adapted layers of one case; the float64 answer and the naive chain are computed once."""

    def __init__(self, base: nn.Module, x: Tensor, u: Tensor, dy: Tensor) -> None:
        self.base, self.x, self.u, self.dy = base, x, u, dy
        self._answers: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def __call__(self, provider: Provider, layer: nn.Module) -> tuple[dict[str, float], str | None]:
        """({tensor: relative Frobenius error}, None or what is wrong)."""
        if provider.hra:
            return self._against_chain(layer)
        return self._against_itself(layer)

    def _against_chain(self, layer: nn.Module) -> tuple[dict[str, float], str | None]:
        if self._answers is None:
            inputs = (self.base, self.x, self.u, self.dy)
            self._answers = explicit_layer(*inputs, torch.float64), explicit_layer(*inputs, self.x.dtype)
        exact, naive = self._answers
        y, (dx, du) = gradients(layer, self.x, [hra_parameter(layer)], self.dy)
        got = {"y": y, "dx": dx, "du": du}
        wrong = tolerance.violations(got, naive, exact, self.x.dtype, self.u.shape[1])
        relative = {name: tolerance.errors(tensor, exact[name])["frobenius"] for name, tensor in got.items()}
        return relative, "; ".join(wrong) or None

    def _against_itself(self, layer: nn.Module) -> tuple[dict[str, float], str | None]:
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        twin = copy.deepcopy(layer).double()
        twins = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        y, grads = gradients(layer, self.x, parameters, self.dy)
        exact_y, exact_grads = gradients(twin, self.x.double(), twins, self.dy.double())
        relative = {"y": _relative(y, exact_y), "dx": _relative(grads[0], exact_grads[0])}
        if parameters:
            relative["du"] = _relative(
                *(torch.cat([grad.double().flatten() for grad in part[1:]]) for part in (grads, exact_grads))
            )
        return relative, beyond(relative, OWN_BOUND[self.x.dtype])


def _relative(got: Tensor, exact: Tensor) -> float:
    return tolerance.errors(got, exact)["frobenius"]


def beyond(relative: dict[str, float], bound: float) -> str | None:
    """What exceeds `bound`, or None; NaN exceeds."""
    wrong = [f"{name}: error {error:.1e} exceeds {bound:.0e}" for name, error in relative.items() if not error <= bound]
    return "; ".join(wrong) or None
