"""Layers as functions and as modules against the merged weight, and every error they owe."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hra_kernels import hra_conv2d, hra_linear, hra_weight, ops, reference
from hra_kernels.backends import cpu as cpu_backend
from hra_kernels.factors import join_factors
from hra_kernels.nn import HRAConv2d, HRALinear
from hra_kernels.testing.tolerance import relative, rounding

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def merged_weight(weight, us, flags):
    q = torch.eye(weight[0].numel(), dtype=torch.float64)
    for u, apply_gs in zip(us, flags, strict=True):
        u = u.double()
        q = q @ reference.explicit_chain(u, apply_gs)
    return (weight.double().flatten(1) @ q).reshape(weight.shape)


def gradients(y, dy, inputs):
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("flags", [(False,), (True,), (False, True, False)], ids=str)
def test_linear_is_the_merged_weight(flags):
    x, w, bias, dy = (
        torch.randn(*s, generator=generator(), dtype=torch.float64) for s in ((5, 7, 20), (12, 20), (12,), (5, 7, 12))
    )
    us = [torch.randn(20, r, generator=generator(r), dtype=torch.float64, requires_grad=True) for r in (4, 3, 2)][
        : len(flags)
    ]
    inputs = (x.requires_grad_(), w.requires_grad_(), bias.requires_grad_())
    got = gradients(hra_linear(x, w, us, bias, apply_gs=flags), dy, (*inputs, *us))
    factors = [reference.wy_factor(u, flag) for u, flag in zip(us, flags, strict=True)]
    q = reference.dense(*join_factors(factors))
    exact = gradients(F.linear(x, w @ q, bias), dy, (*inputs, *us))
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(hra_weight(w, us, apply_gs=flags), merged_weight(w, us, flags))


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_conv2d_is_the_merged_weight(options):
    layer = nn.Conv2d(4, 6, **options).double()
    u = torch.randn(layer.weight[0].numel(), 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 12, 13, generator=generator(), dtype=torch.float64, requires_grad=True)
    adapted = HRAConv2d(layer, r=3)
    adapted.hra_u.data.copy_(u)
    plain = copy.deepcopy(layer)
    plain.weight.data.copy_(merged_weight(layer.weight, [u], [False]))
    y = adapted(x)
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(adapted(x[0]), plain(x[0]))
    torch.testing.assert_close(adapted.merged()(x), plain(x))
    dy = torch.randn(y.shape, generator=generator(1), dtype=torch.float64)
    got = torch.autograd.grad(y, (x, adapted.hra_u), dy)
    weight = (layer.weight.flatten(1) @ reference.dense(*reference.wy_factor(u))).reshape(layer.weight.shape)
    exact = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(got, torch.autograd.grad(exact, (x, u), dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modules_start_as_their_base_layer_bit_for_bit(dtype):
    for base, x in [
        (nn.Linear(48, 24).to(dtype), torch.randn(9, 48, dtype=dtype)),
        (nn.Conv2d(4, 6, 3, padding=1).to(dtype), torch.randn(2, 4, 9, 9, dtype=dtype)),
    ]:
        module = (HRALinear if isinstance(base, nn.Linear) else HRAConv2d)(base, r=8)
        assert torch.equal(module(x), base(x))
        assert module.hra_u.dtype == torch.float32 and not base.weight.requires_grad


def test_merging_16_bits_rounds_once():
    w, u = torch.randn(64, 96).bfloat16(), torch.randn(96, 8)
    exact = merged_weight(w, [u], [False])
    error = (hra_weight(w, u).double() - exact).abs()
    half_ulp = 2.0**-8 * exact.abs().log2().floor().exp2()
    # half an ulp, and what float32 arithmetic may add
    assert (error <= half_ulp + rounding(96, 8) * exact.abs().max()).all()


def test_merge_and_unmerge_drift_stays_bounded():
    w, u = torch.randn(64, 96, generator=generator()), torch.randn(96, 8, generator=generator(1))
    again = w
    for _ in range(100):
        again = hra_weight(hra_weight(again, u), u, inverse=True)
    assert relative(again, w) < rounding(96, 8, layers=200)


def test_merged_refuses_what_is_not_finite_and_changes_nothing():
    module = HRALinear(nn.Linear(8, 4), r=2)
    before = module.base_layer.weight.clone()
    module.hra_u.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="hra_u must be finite"):
        module.merged()
    assert torch.equal(module.base_layer.weight, before)


def test_modules_copy_pickle_and_train():
    module = HRALinear(nn.Linear(16, 8), r=4)
    x, target = torch.randn(64, 16), torch.randn(64, 8)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    y = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    torch.testing.assert_close(module.merged()(x), y)


@pytest.mark.parametrize("r", [1, 3])
def test_odd_rank_starts_one_reflection_away(r):
    module = HRALinear(nn.Linear(16, 8), r=r)
    x = torch.randn(4, 16)
    last = torch.zeros(16, r)
    last[:, -1] = module.hra_u.detach()[:, -1]
    torch.testing.assert_close(module(x), hra_linear(x, module.base_layer.weight, last, module.base_layer.bias))
    assert not torch.allclose(module(x), module.base_layer(x))


def test_no_reflections_is_the_base_layer():
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(hra_linear(x, w, torch.empty(8, 0)), F.linear(x, w))


X, W, U = torch.randn(3, 8), torch.randn(5, 8), torch.randn(8, 4)
IMAGE, FILTERS = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 2, 2)
V, T = reference.wy_factor(U)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: hra_linear(X, W, torch.randn(7, 4)), ValueError, r"hra_linear: u must be \(D, R\).*D = 8.*\(7, 4\)"),
        (lambda: hra_linear(X, W, torch.randn(8)), ValueError, r"hra_linear: u must be \(D, R\).*\(8,\)"),
        (lambda: hra_linear(X, W, []), ValueError, "hra_linear: u .* empty sequence"),
        (lambda: hra_linear(X, W, [U, U], apply_gs=[True]), ValueError, "apply_gs must have one flag for each"),
        (lambda: hra_linear(X[:, :7], W, U), ValueError, r"hra_linear: x must be \(\.\.\., D\).*8.*\(3, 7\)"),
        (lambda: hra_linear(torch.tensor(1.0), W, U), ValueError, r"hra_linear: x must be"),
        (lambda: hra_linear(X, W[0], U), ValueError, r"hra_linear: w must be \(N, D\), got shape \(8,\)"),
        (lambda: hra_linear(X.double(), W, U), TypeError, "hra_linear: x must have w's dtype .*float32.*float64"),
        (lambda: hra_linear(X, W, U.to(torch.int32)), TypeError, "u must be float32, float64.*got int32"),
        (lambda: hra_linear(X.to(torch.complex64), W.to(torch.complex64), U), TypeError, "x must be .*got complex64"),
        (lambda: hra_weight(W[0], U), ValueError, r"hra_weight: w must be .*\(8,\)"),
        (lambda: hra_conv2d(IMAGE, FILTERS, torch.randn(9, 2)), ValueError, r"hra_conv2d: u must .*12.*\(9, 2\)"),
        (lambda: hra_conv2d(IMAGE, FILTERS, torch.randn(12, 2), groups=3), NotImplementedError, "groups must be 1.*3"),
        (lambda: hra_conv2d(IMAGE[:, :2], FILTERS, torch.randn(12, 2)), ValueError, r"x must be \(B, C, H, W\).*3"),
        (lambda: hra_conv2d(IMAGE, W, U), ValueError, r"hra_conv2d: w must be \(N, C, kh, kw\)"),
        (lambda: ops.reflect(X, V[:, :7], T), ValueError, r"reflect: v must be \(R, D\) with D = .*8.*\(4, 7\)"),
        (lambda: ops.reflect(X, V, T[:3]), ValueError, r"reflect: t must be \(R, R\) with R = .*4.*\(3, 4\)"),
        (lambda: ops.reflect(X, V.double(), T), TypeError, "reflect: v must be .*float32 for .*float32 x.*float64"),
        (lambda: ops.reflect(X, V.to("meta"), T), ValueError, "reflect: v must be on x's device cpu, got meta"),
        (lambda: ops.wy_factor(torch.randn(3)), ValueError, r"wy_factor: u must be \(D, R\), got shape \(3,\)"),
        (lambda: HRALinear(nn.Linear(4, 4), r=0), ValueError, "HRALinear: r must be a positive integer, got 0"),
        (lambda: HRALinear(nn.Conv2d(3, 3, 1)), TypeError, "base_layer must be an nn.Linear, got Conv2d"),
        (lambda: HRAConv2d(nn.Linear(3, 3)), TypeError, "base_layer must be an nn.Conv2d, got Linear"),
        (lambda: HRAConv2d(nn.Conv2d(4, 4, 3, groups=2)), NotImplementedError, "groups must be 1, got 2"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def test_backend_by_name():
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'fast'"), ops.use_backend("fast"):
        pass
    for name, reason in ops.backend_report().items():
        if reason:
            with (
                pytest.raises(RuntimeError, match=f"backend '{name}' was asked for and is not available"),
                ops.use_backend(name),
            ):
                pass
        else:
            unsupported = ops.BACKENDS[name].why_unsupported
            served = [device for device in DEVICES if unsupported(device, torch.float32, 4) is None]
            with ops.use_backend(name):
                assert {ops.select_backend(device, torch.float32, 4) for device in served} == {name}


def test_more_columns_than_the_kernels_take_go_to_the_reference():
    assert ops.select_backend(torch.device("cpu"), torch.float32, cpu_backend.BACKEND.max_rank + 1) == "reference"
    x, u = torch.randn(3, 20), torch.randn(20, cpu_backend.BACKEND.max_rank + 1)
    q = reference.explicit_chain(u.double())
    assert relative(ops.reflect_chain(x, [u], [False]), x.double() @ q) < rounding(20, u.shape[1])
