"""What PEFT's own HRA gets wrong or refuses in convolutions, one test per defect, as in `test_defects.py`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hra_kernels.reference import explicit_chain
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import PadsItself, conv2d, layer_of, seeded

FLOAT32 = rounding(150, 4)


def check_conv(conv, shape=(2, 3, 11, 9), **settings):
    """Forward, gradient of u and x, merge; against F.conv2d's own module with the explicit chain's weight."""
    layer = layer_of(conv, **settings)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    du, dx = torch.autograd.grad(y, [layer.hra_u["default"], x], dy)

    u = layer.hra_u["default"].detach().double().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    weight = conv.weight.detach().double()
    merged = (weight.flatten(1) @ explicit_chain(u)).reshape(weight.shape)
    exact = torch.func.functional_call(conv.double(), {"weight": merged}, (exact_x,))
    exact_du, exact_dx = torch.autograd.grad(exact, [u, exact_x], dy.double())
    conv.float()
    assert y.shape == exact.shape
    assert relative(y, exact) < FLOAT32 and relative(du, exact_du) < FLOAT32 and relative(dx, exact_dx) < FLOAT32
    layer.merge()
    assert relative(layer(x), exact) < FLOAT32


@pytest.mark.parametrize("kernel", [(3, 5), (1, 4), (5, 2)])
def test_conv_non_square_kernel(kernel):
    check_conv(conv2d(kernel))


@pytest.mark.parametrize(
    "geometry", [{"stride": (2, 1)}, {"padding": (2, 1)}, {"dilation": (1, 2)}, {"stride": 2, "padding": (0, 2)}]
)
def test_conv_stride_padding_dilation(geometry):
    check_conv(conv2d(3, **geometry))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 5)])
def test_conv_padding_same_valid(padding, kernel):
    check_conv(conv2d(kernel, padding=padding))


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_conv_padding_mode(mode, padding):
    check_conv(conv2d((5, 3), padding=padding, padding_mode=mode))


def test_conv_channels_last_merge():
    conv = conv2d(3, padding=1)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    check_conv(conv)
    layer = layer_of(conv)
    before = layer.weight.clone()
    layer.merge()
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_conv_unbatched():
    layer = layer_of(conv2d(3, padding=1))
    x = torch.randn(3, 7, 7)
    assert relative(layer(x), layer(x[None])[0]) < FLOAT32


class PadsInConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


@pytest.mark.parametrize("kind", [PadsItself, PadsInConvForward])
def test_conv_own_forward(kind):
    conv = seeded(lambda: kind(3, 8, 3, stride=2))
    check_conv(conv, shape=(2, 3, 8, 8))
    calls = []
    layer = layer_of(conv)
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 3, 8, 8))
    assert calls == [1]


def test_conv_groups():
    with pytest.raises(NotImplementedError, match=r"not support Conv2d layers with groups > 1 \(got groups=3\)"):
        layer_of(nn.Conv2d(3, 6, 3, groups=3))
