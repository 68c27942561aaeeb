"""PEFT's layer on the weight side: the same training, and only where the base layer is a product and nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hra_kernels import ops, weight_side
from tests.peft.models import adapt, seeded

pytestmark = pytest.mark.usefixtures("on_weight_side")


@pytest.fixture
def on_weight_side(monkeypatch):
    monkeypatch.setattr(weight_side, "pays", lambda *_: True)


def taken(y):
    return type(y.grad_fn).__name__ == "_LinearBackward"


def network():
    return nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))


def adapted(ours=True, **settings):
    return adapt(seeded(network), ours, targets=["0", "2"], **settings)


def losses(model):
    """Of a small regression."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 3, 32, generator=generator), torch.randn(64, 3, 8, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("settings", [{}, {"init_weights": True}, {"apply_GS": True}, {"bias": "all"}], ids=str)
def test_losses_are_those_of_peft(settings):
    ours, theirs = adapted(**settings), adapted(ours=False, **settings)
    assert taken(ours(torch.randn(5, 32)))
    found = losses(ours)
    assert found[-1] < found[0]
    torch.testing.assert_close(found, losses(theirs), rtol=1e-5, atol=0)


def both_sides(model, monkeypatch, x):
    """y and the gradients of all that asks for one, on either side."""
    found = []
    for side in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(weight_side, "pays", lambda *_, side=side: side)
            y = model(x)
        assert taken(y) == side
        found.append([y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])])
    return found


@pytest.mark.filterwarnings("ignore:HRA adapter")
def test_several_adapters(monkeypatch):
    model = adapt(nn.Sequential(seeded(lambda: nn.Linear(32, 24).double())), targets=["0"])
    model.add_adapter("second", seeded(lambda: model.peft_config["default"], 2))
    model.base_model.set_adapter(["default", "second"])
    got, expected = both_sides(model, monkeypatch, torch.randn(5, 32, dtype=torch.float64))
    torch.testing.assert_close(got, expected)


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def parametrized(base):
    parametrize.register_parametrization(base, "weight", nn.Identity())


def forward_of_its_own(base):
    base.forward = lambda x: 2 * nn.Linear.forward(base, x)


CHANGES = {
    "forward hook": lambda base: base.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda base: base.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda base: base.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda base: base.register_full_backward_pre_hook(lambda *_: None),
    "accelerate's hook": lambda base: setattr(base, "_hf_hook", None),
    "parametrization": parametrized,
    "forward of the instance": forward_of_its_own,
    "trained weight": lambda base: base.weight.requires_grad_(),
    "another dtype": lambda base: base.double(),
    "subclass": lambda base: setattr(base, "__class__", OwnForward),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_layer_that_is_more_than_a_product(change):
    model = adapt(nn.Sequential(seeded(lambda: nn.Linear(32, 24))), targets=["0"])
    base, x = model.base_model.model[0].base_layer, torch.randn(5, 32)
    assert taken(model(x))
    CHANGES[change](base)
    assert not taken(model(x))


def test_hooks_see_the_reflected_input():
    model = adapt(nn.Sequential(seeded(lambda: nn.Linear(32, 24))), targets=["0"])
    layer, x, seen = model.base_model.model[0], torch.randn(5, 32), []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    model(x)
    expected = ops.reflect_chain(x, [layer.hra_u["default"]], [False], transpose=True)
    assert torch.equal(seen[0], expected)


def test_hooks_on_every_module():
    model = adapt(nn.Sequential(seeded(lambda: nn.Linear(32, 24))), targets=["0"])
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not taken(model(torch.randn(5, 32)))
    finally:
        handle.remove()


def test_where_no_gradient_or_another_dtype_is_asked_for():
    model, x = adapt(nn.Sequential(seeded(lambda: nn.Linear(32, 24))), targets=["0"]), torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(model(x))
    with torch.no_grad():
        assert model(x).grad_fn is None
    model.base_model.merge_adapter()
    assert not taken(model(x.requires_grad_()))


def test_an_input_that_does_not_fit_is_the_same_error():
    model = adapt(nn.Sequential(seeded(lambda: nn.Linear(32, 24))), targets=["0"])
    with pytest.raises(ValueError, match=r"v must be \(R, D\) with D = x.shape\[-1\] = 31"):
        model(torch.randn(5, 31))
