"""Where PEFT's own HRA is right, ours agrees with it, to what rounding explains.

Never at the initialization, where pairs of reflections cancel and a layer that does nothing would pass.
"""

import copy

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn

import hra_kernels.peft
from hra_kernels.testing.tolerance import rounding
from tests.peft.models import Net, adapt, seeded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDING = {dtype: 2**0.5 * rounding(96, 10, dtype, layers=3) for dtype in DTYPES}  # both are off
"""16-bit: PEFT multiplies in float32 and rounds the output, we round x Qᵀ too, and the base layer rounds as it does."""


def distance(got, expected):
    """Relative Frobenius distance."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


def step_away(*models):
    """One large, equal, optimizer-like step in every adapter."""
    with torch.random.fork_rng(), torch.no_grad():
        for model in models:
            torch.manual_seed(3)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape).to(parameter.dtype)


def results(model, x, dy):
    y = model(x)
    grads = torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad], dy)
    return y.detach(), *grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_outputs_and_gradients(dtype, init_weights, autocast_adapter_dtype):
    base = seeded(Net).to(dtype)
    settings = {"r": 8, "init_weights": init_weights, "target_modules": ["conv", "lin0", "lin1"]}

    def build():
        return get_peft_model(copy.deepcopy(base), HRAConfig(**settings), autocast_adapter_dtype=autocast_adapter_dtype)

    theirs = seeded(build, 1)
    with hra_kernels.peft.enabled():
        ours = seeded(build, 1)
    step_away(ours, theirs)
    x, dy = torch.randn(16, 3, 8, 8).to(dtype), torch.randn(16, 5).to(dtype)
    pairs = zip(results(ours, x, dy), results(theirs, x, dy), strict=True)
    # 16-bit vectors: PEFT's own reflections are not orthogonal to better than 2e-2
    loose = 4 if not autocast_adapter_dtype and dtype in (torch.bfloat16, torch.float16) else 1
    for got, expected in pairs:
        assert got.dtype == expected.dtype and distance(got, expected) < loose * ROUNDING[dtype]


def test_gram_schmidt():
    ours, theirs = (adapt(seeded(Net), ours=side, apply_GS=True, r=6) for side in (True, False))
    step_away(ours, theirs)
    x, dy = torch.randn(16, 3, 8, 8), torch.randn(16, 5)
    for got, expected in zip(results(ours, x, dy), results(theirs, x, dy), strict=True):
        assert distance(got, expected) < ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    base = seeded(Net).to(dtype)
    ours, theirs = adapt(base), adapt(base, ours=False)
    x, dy = torch.randn(16, 3, 8, 8), torch.randn(16, 5)
    exact = results(adapt(base.float()), x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = results(ours, x, dy), results(theirs, x, dy)
    for one, other, truth in zip(got, expected, exact, strict=True):
        assert distance(one, truth) < max(1.5 * distance(other, truth), rounding(96, 10, torch.bfloat16, layers=3))


def test_merged_weights():
    ours, theirs = (adapt(seeded(Net), ours=side) for side in (True, False))
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    for (name, one), (other, two) in zip(merged.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other and distance(one, two) < ROUNDING[torch.float32]


@pytest.mark.parametrize("active", [["default", "b"], ["b", "default"]])
def test_several_adapters(active):
    models = []
    for side in (True, False):
        model = adapt(seeded(Net), ours=side)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model.add_adapter("b", HRAConfig(r=6, init_weights=False, target_modules=["conv", "lin1"]))
        model.base_model.set_adapter(active)
        models.append(model)
    x, dy = torch.randn(16, 3, 8, 8), torch.randn(16, 5)
    for got, expected in zip(*(results(model, x, dy) for model in models), strict=True):
        assert distance(got, expected) < ROUNDING[torch.float32]


def train(model, optimizer_class, steps=40):
    """The losses of a small regression, PEFT's initialization and all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    target = torch.randn(64, 5, generator=generator)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        batch = slice(16 * (step % 4), 16 * (step % 4) + 16)
        loss = nn.functional.mse_loss(model(x[batch]), target[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_loss_curve(optimizer_class):
    """From PEFT's paired initialization the two sides train alike, step for step."""
    ours, theirs = (
        train(adapt(seeded(Net), ours=side, r=8, init_weights=True), optimizer_class) for side in (True, False)
    )
    assert torch.allclose(ours, theirs, rtol=1e-3)
    assert (ours[-4:].mean() - ours[:4].mean()).abs() > 1e-3 * ours[0]  # it does learn


def test_micro_batches_share_a_factor(computed):
    """Gradient accumulation: the factor is computed once per step, and the gradients add up to the full batch's."""
    model = adapt(seeded(Net))
    x, dy = torch.randn(12, 3, 8, 8), torch.randn(12, 5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    full = torch.autograd.grad(model(x), parameters, dy)
    for start in range(0, 12, 4):
        model(x[start : start + 4]).backward(dy[start : start + 4])
    assert computed == [1, 1, 1]  # one for each layer
    for parameter, expected in zip(parameters, full, strict=True):
        assert distance(parameter.grad, expected) < ROUNDING[torch.float32]
    torch.optim.SGD(parameters, lr=0.1).step()
    model(x)
    assert computed == [1] * 6
