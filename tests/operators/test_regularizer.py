"""λ Σ ‖I - ûᵀû‖_F against its definition, in value and gradient."""

import pytest
import torch
from torch import nn

from hra_kernels.nn import HRALinear
from hra_kernels.regularizer import model_orthogonality_penalty, orthogonality_penalty
from hra_kernels.testing.tolerance import rounding


def by_definition(us):
    total = 0
    for u in us:
        unit = u / u.norm(dim=0)
        total = total + torch.linalg.matrix_norm(torch.eye(u.shape[1], dtype=u.dtype) - unit.mT @ unit)
    return total


def random_us(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]


def test_definition_and_gradient():
    us = random_us((20, 4), (20, 4), (30, 4), (20, 3))
    value = orthogonality_penalty(us)
    torch.testing.assert_close(value, by_definition(us))
    torch.testing.assert_close(torch.autograd.grad(value, us), torch.autograd.grad(by_definition(us), us))
    assert torch.autograd.gradcheck(lambda *us: orthogonality_penalty(us), us)


def test_pairs_of_equal_columns_are_one_short_each():
    u = torch.linalg.qr(torch.randn(20, 3))[0].repeat_interleave(2, 1)
    assert orthogonality_penalty([u]).item() == pytest.approx(6**0.5, rel=rounding(u.shape[0], u.shape[1]))


def test_orthonormal_columns_cost_nothing_and_have_a_finite_gradient():
    u = torch.eye(6)[:, :3].clone().requires_grad_()
    value = orthogonality_penalty([u])
    value.backward()
    assert value.item() == 0 and u.grad.isfinite().all()


def test_zero_columns_and_scale():
    u = random_us((20, 4))[0].detach().float()
    scaled = (u * torch.tensor([1e-30, 1e30, 1.0, 1e-10])).requires_grad_()
    torch.testing.assert_close(orthogonality_penalty([scaled]), orthogonality_penalty([u]))
    with_zero = torch.cat([u, torch.zeros(20, 1)], 1).requires_grad_()
    value = orthogonality_penalty([with_zero])
    value.backward()
    assert value.item() == pytest.approx(
        (orthogonality_penalty([u]).item() ** 2 + 1) ** 0.5, rel=rounding(u.shape[0], u.shape[1])
    )
    assert with_zero.grad.isfinite().all() and not with_zero.grad[:, 4].any()


def test_sixteen_bit_parameters_and_autocast():
    u = random_us((20, 4))[0].detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_penalty([u]), orthogonality_penalty([u.float()]))


def test_over_a_model_it_drives_columns_apart():
    torch.manual_seed(0)
    model = nn.Sequential(HRALinear(nn.Linear(16, 16), r=4), nn.ReLU(), HRALinear(nn.Linear(16, 4), r=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with torch.no_grad():
        for layer in (model[0], model[2]):  # equal columns are a stationary point
            layer.hra_u += 1e-2 * torch.randn_like(layer.hra_u)
    start = model_orthogonality_penalty(model).item()
    for _ in range(100):
        optimizer.zero_grad()
        model_orthogonality_penalty(model).backward()
        optimizer.step()
    assert model_orthogonality_penalty(model).item() < 0.2 * start


def test_over_peft():
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(net, peft.HRAConfig(r=2, target_modules=["0", "1"], init_weights=False))
    us = [module.hra_u["default"] for module in model.modules() if hasattr(module, "hra_u")]
    torch.testing.assert_close(model_orthogonality_penalty(model), orthogonality_penalty(us))
    with pytest.raises(ValueError, match="an adapter 'other', it has none"):
        model_orthogonality_penalty(model, "other")


def test_errors():
    with pytest.raises(ValueError, match=r"each u must be \(D, R\), got shape \(3,\)"):
        orthogonality_penalty([torch.randn(3)])
    with pytest.raises(ValueError, match="at least one"):
        orthogonality_penalty([])
    with pytest.raises(ValueError, match="HRA layers with an active adapter, it has none"):
        model_orthogonality_penalty(nn.Linear(2, 2))


def test_a_wrapped_layer_counts_once():
    """Wrappers hand on what the layer has: a compiled block, FSDP's modules."""
    layer = HRALinear(nn.Linear(12, 8), r=4)
    wrapped = nn.Sequential(torch.compile(layer))
    assert torch.equal(model_orthogonality_penalty(wrapped), model_orthogonality_penalty(layer))


def test_a_parametrized_vector_counts():
    layer = HRALinear(nn.Linear(12, 8), r=4)
    expected = 0.5 * layer.hra_u.detach() + layer.hra_u.detach().roll(1, 1)

    class Mixed(nn.Module):
        def forward(self, u):
            return 0.5 * u + u.roll(1, 1)

    nn.utils.parametrize.register_parametrization(layer, "hra_u", Mixed(), unsafe=True)
    assert torch.equal(model_orthogonality_penalty(layer), orthogonality_penalty([expected]))


def test_under_torch_func():
    layer = HRALinear(nn.Linear(12, 8), r=4)
    nn.init.normal_(layer.hra_u)
    model_orthogonality_penalty(layer).backward()

    def penalty(u):
        with nn.utils.stateless._reparametrize_module(layer, {"hra_u": u}):
            return model_orthogonality_penalty(layer)

    assert torch.equal(torch.func.grad(penalty)(layer.hra_u.detach()), layer.hra_u.grad)
