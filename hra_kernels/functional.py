"""Adapted layers as functions: a frozen weight times a chain of Householder reflections, W' = W Q or Qᵀ W.

hra_linear   y = x W'ᵀ = (x Qᵀ) Wᵀ            input side: the weight is never touched, its gradient never formed
             y = x (W Q)ᵀ                     the same from the weight side: in training, where that is faster
             y = (x Wᵀ) Q                     output side, W' = Qᵀ W
hra_conv2d   y = conv(x, W) - conv1x1(conv(x, v), (W vᵀ) t)    output side, with v as R extra filters
hra_weight   W Q                              weight side: for merging
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_kernels import kept_chain, weight_side  # noqa: F401 - kept_chain registers what compiled graphs call
from hra_kernels.ops import attach_factor, chain_factor, in_factor_dtype, is_eager, reflect, reflect_chain
from hra_kernels.soft import Rule, Soft, bias_correction, check_side, inverse_factor, rule

Factor = tuple[Tensor, Tensor]


def _chains(
    op: str,
    u: Tensor | Sequence[Tensor],
    apply_gs: bool | Sequence[bool],
    features: int,
    eps: float | Sequence[float] = 0,
) -> tuple[list[Tensor], list[Rule]]:
    """us and one rule each, from one chain or several."""
    us = [u] if isinstance(u, Tensor) else list(u)
    flags = [apply_gs] * len(us) if isinstance(apply_gs, (bool, Soft)) else list(apply_gs)
    each = list(eps) if isinstance(eps, (list, tuple)) else [eps] * len(us)
    if not us:
        raise ValueError(f"{op}: u must be a (D, R) tensor or a non-empty sequence of them, got an empty sequence")
    if len(flags) != len(us):
        raise ValueError(f"{op}: apply_gs must have one flag for each of the {len(us)} chains, got {len(flags)}")
    if len(each) != len(us):
        raise ValueError(f"{op}: eps must be one number, or one for each of the {len(us)} chains, got {len(each)}")
    for one in us:
        if one.dim() != 2 or one.shape[0] != features:
            raise ValueError(f"{op}: u must be (D, R) with D = {features}, got shape {tuple(one.shape)}")
    return us, [gs if isinstance(gs, Soft) else rule(op, gs, one) for gs, one in zip(flags, each, strict=True)]


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x as the matrix product that follows will see it, so that the reflections move no more bytes than it does."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check_dtypes(op: str, x: Tensor, w: Tensor) -> None:
    if x.dtype != w.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: x must have w's dtype {w.dtype} outside autocast, got {x.dtype}")


def _check_matrix(op: str, x: Tensor, w: Tensor) -> None:
    _check_dtypes(op, x, w)
    if w.dim() != 2:
        raise ValueError(f"{op}: w must be (N, D), got shape {tuple(w.shape)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"{op}: x must be (..., D) with D = w.shape[1] = {w.shape[1]}, got shape {tuple(x.shape)}")


def hra_linear(
    x: Tensor,
    w: Tensor,
    u: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    apply_gs: bool | Sequence[bool] = False,
    factor: Factor | None = None,
    side: str = "input",
    eps: float | Sequence[float] = 0,
) -> Tensor:
    """`F.linear(x, w @ Q, bias)` with Q = H_1 ... H_R, without forming Q (arXiv 2405.17484, eq. 4).

    Or `F.linear(x, Qᵀ @ w, bias)`, as the authors' code for language models has it, together with eps = 1e-4.

    Args:
        x: (..., D).
        w: (N, D), x's dtype; float32, float64, bfloat16 or float16. Under autocast x is cast as `F.linear` would.
        u: (D, R) raw vectors, (N, R) on the output side, or several such for Q_1 Q_2 ...; any floating dtype
            (float32 is what HRA trains).
        bias: (N,).
        apply_gs: Gram-Schmidt first; one flag, or one per chain.
        factor: `ops.chain_factor` of u where the caller kept it.
        side: "input" for w Q, "output" for Qᵀ w.
        eps: reflect along u / sqrt(|u|² + eps), which is near the identity for short u and not orthogonal
            (`hra_kernels.soft`); one number, or one per chain. Not with apply_gs.

    Returns:
        (..., N). Differentiable in x, u, bias, and in w if it asks for it. Saves x and O((M + D) R) more.
        Reflects x, or w where that trains faster (`weight_side.pays`): results differ in rounding only.

    Raises:
        TypeError, ValueError: dtype, shape or device does not fit.
    """
    _check_matrix("hra_linear", x, w)
    check_side("hra_linear", side)
    if side == "output":
        us, flags = _chains("hra_linear", u, apply_gs, w.shape[0], eps)
        return reflect_output(F.linear(x, w, bias), bias, us, flags, factor)
    us, flags = _chains("hra_linear", u, apply_gs, w.shape[1], eps)
    if is_eager(x, w, *us) and weight_side.serves(x, w, us, flags):
        return weight_side.linear(x, w, bias, us, flags, factor)
    return F.linear(reflect_chain(in_autocast_dtype(x), us, flags, factor, transpose=True), w, bias)


def reflect_output(
    y: Tensor, bias: Tensor | None, us: Sequence[Tensor], rules: Sequence[Rule], factor: Factor | None = None
) -> Tensor:
    """(y - b) Q + b for the output y (..., N) of a layer with bias b: its weight W (N, D) replaced by Qᵀ W."""
    if bias is None:
        return reflect_chain(y, us, rules, factor)
    v, t = attach_factor(in_factor_dtype(us, y.dtype), rules, factor)
    return reflect(y, v, t) + bias_correction(bias, v, t).to(y.dtype)


def hra_weight(
    w: Tensor,
    u: Tensor | Sequence[Tensor],
    *,
    apply_gs: bool | Sequence[bool] = False,
    factor: Factor | None = None,
    inverse: bool = False,
    side: str = "input",
    eps: float | Sequence[float] = 0,
) -> Tensor:
    """W Q, or W Q⁻¹ if inverse: the weight with the reflections merged into it, or taken out again.

    Args:
        w: (N, ...): everything after the first dimension is flattened to D, as HRA does for convolutions.
        u, apply_gs, factor, side, eps: as in `hra_linear`; Qᵀ W, or its inverse, on the output side.

    Returns:
        A new tensor of w's shape and dtype; computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: dtype, shape or device does not fit; the inverse of a soft chain does not exist.
    """
    if w.dim() < 2:
        raise ValueError(f"hra_weight: w must be (N, D) or (N, C, kh, kw), got shape {tuple(w.shape)}")
    rows = w.flatten(1)
    check_side("hra_weight", side)
    if side == "output":
        rows = rows.mT
    us, rules = _chains("hra_weight", u, apply_gs, rows.shape[1], eps)
    if inverse and any(isinstance(rule, Soft) for rule in rules):
        v, t = inverse_factor(*(factor or chain_factor(us, rules, rows.dtype)))
        rows = reflect(rows, v, t)
    else:
        rows = reflect_chain(rows, us, rules, factor, transpose=inverse)
    return (rows.mT if side == "output" else rows).reshape(w.shape)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Geometry = int | Sequence[int]


def conv_correction(
    x: Tensor,
    w: Tensor,
    factor: Factor,
    stride: Geometry = 1,
    padding: str | Geometry = 0,
    dilation: Geometry = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """conv(x, W Q) - conv(x, W) for Q = I - vᵀ t v: R filters v, then a 1 x 1 convolution back to the N channels.

    W Q - W = -(W vᵀ) t v has rank R, so this costs R / N of the layer's own convolution.

    Args:
        w: (N, C, k), (N, C, kh, kw) or (N, C, kd, kh, kw).
    """
    v, t = factor
    filters = v.reshape(-1, *w.shape[1:])
    back = -(w.flatten(1).to(v.dtype) @ v.transpose(-2, -1) @ t)
    x = in_autocast_dtype(x)
    filters, back = filters.to(x.dtype), back.to(x.dtype)
    p = conv(x, filters, None, stride, padding, dilation, padding_mode)
    return _CONV[w.dim() - 2](p, back.reshape(*back.shape, *[1] * (w.dim() - 2)))


def _each(value: Geometry, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Geometry,
    padding: str | Geometry,
    dilation: Geometry,
    padding_mode: str,
    groups: int = 1,
) -> Tensor:
    """The convolution of w's number of spatial dimensions, in any of `nn.Conv2d`'s padding modes."""
    if padding_mode != "zeros":
        x = F.pad(x, _explicit_padding(w, padding, dilation), mode=padding_mode)
        padding = 0
    return _CONV[w.dim() - 2](x, w, bias, stride, padding, dilation, groups)


def _explicit_padding(w: Tensor, padding: str | Geometry, dilation: Geometry) -> list[int]:
    """[left, right, top, bottom, ...], as `nn.Conv2d` pads for the modes that `F.conv2d` does not know."""
    dimensions = w.dim() - 2
    if padding == "valid":
        return [0] * (2 * dimensions)
    amounts = (None,) * dimensions if padding == "same" else _each(padding, dimensions)
    sides = []
    for size, step, amount in zip(w.shape[:1:-1], _each(dilation, dimensions)[::-1], amounts[::-1], strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2] if amount is None else [amount, amount]
    return sides


def hra_conv2d(
    x: Tensor,
    w: Tensor,
    u: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    apply_gs: bool | Sequence[bool] = False,
    factor: Factor | None = None,
) -> Tensor:
    """`F.conv2d(x, (w.flatten(1) @ Q).reshape(w.shape), bias, ...)` without forming Q or the adapted weight.

    Args:
        x: (B, C, H, W) or (C, H, W).
        w: (N, C, kh, kw), any kernel shape; D = C kh kw.
        u: (D, R) raw vectors, or several such.
        bias: (N,).
        stride, padding, dilation, padding_mode: as in `nn.Conv2d`, "same" and "valid" included.
        groups: only 1; HRA's reflections mix all input channels.
        apply_gs, factor: as in `hra_linear`.

    Returns:
        What the convolution returns. Differentiable in x, u, bias, and in w if it asks for it.

    Raises:
        NotImplementedError: groups > 1.
        TypeError, ValueError: dtype, shape or device does not fit.
    """
    if groups != 1:
        raise NotImplementedError(f"hra_conv2d: groups must be 1 (HRA mixes all input channels), got {groups}")
    if w.dim() != 4:
        raise ValueError(f"hra_conv2d: w must be (N, C, kh, kw), got shape {tuple(w.shape)}")
    if x.dim() not in (3, 4) or x.shape[-3] != w.shape[1]:
        raise ValueError(f"hra_conv2d: x must be (B, C, H, W) with C = {w.shape[1]}, got shape {tuple(x.shape)}")
    _check_dtypes("hra_conv2d", x, w)
    us, flags = _chains("hra_conv2d", u, apply_gs, w[0].numel())
    us = in_factor_dtype(us, w.dtype)
    geometry = (stride, padding, dilation, padding_mode)
    correction = conv_correction(x, w, attach_factor(us, flags, factor), *geometry)
    return conv(x, w, bias, *geometry) + correction
