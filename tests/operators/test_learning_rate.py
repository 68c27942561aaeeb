"""What the advice on learning rates rests on: a norm of u is a learning rate, and nothing else."""

import torch

from hra_kernels import hra_linear


def train(u, rate, optimizer, steps=10, **options):
    """The losses of a few steps."""
    generator = torch.Generator().manual_seed(1)
    x, w, target = (torch.randn(*shape, generator=generator) for shape in ((24, 32), (16, 32), (24, 16)))
    u = u.clone().requires_grad_()
    stepper = optimizer([u], lr=rate, **options)
    losses = []
    for _ in range(steps):
        loss = (hra_linear(x, w, u) - target).square().mean()
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_norm_of_u_is_a_learning_rate():
    u = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    adam = train(u, 0.01, torch.optim.Adam, eps=0.0)
    assert adam[-1] < adam[0]
    assert train(4 * u, 0.04, torch.optim.Adam, eps=0.0) == adam
    assert train(u, 0.04, torch.optim.Adam, eps=0.0) != adam
    sgd = train(u, 0.5, torch.optim.SGD)
    assert train(4 * u, 8.0, torch.optim.SGD) == sgd
    assert train(4 * u, 2.0, torch.optim.SGD) != sgd
