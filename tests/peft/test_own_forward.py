"""Base layers, and modules around them, that use a weight in another way than calling `nn.Linear` does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hra_kernels.peft.export import lora_state
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import adapt, linear, seeded


class Grouped(nn.Linear):
    """x (..., G, D) to (..., G, N / G): a block of rows for each group, as in grouped output projections."""

    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x, self.weight.view(x.shape[-2], -1, self.in_features))


class Clipped(nn.Linear):
    def forward(self, x):
        return F.linear(x.clamp(-0.5, 0.5), self.weight, self.bias)


class Normed(nn.Linear):
    """A classifier of cosines."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Transposed(nn.Linear):
    def forward(self, x):
        return x @ self.weight


class ClippedConv1D(Conv1D):
    def forward(self, x):
        return super().forward(x.clamp(-0.5, 0.5))


class TanhEmbedding(nn.Embedding):
    def forward(self, tokens):
        return torch.tanh(super().forward(tokens))


def replaced():
    """nn.Linear, its forward replaced on the instance."""
    base = nn.Linear(12, 12)
    base.forward = lambda x: F.linear(x.clamp(-0.5, 0.5), base.weight, base.bias)
    return base


class Named(nn.Linear):
    """A subclass without a forward of its own."""


CASES = {
    "Grouped": (lambda: Grouped(12, 24, bias=False), torch.randn(5, 3, 12)),
    "Clipped": (lambda: Clipped(12, 12), torch.randn(5, 12)),
    "Normed": (lambda: Normed(12, 12), torch.randn(5, 12)),
    "Transposed": (lambda: Transposed(12, 12), torch.randn(5, 12)),
    "ClippedConv1D": (lambda: ClippedConv1D(12, 12), torch.randn(5, 12)),
    "TanhEmbedding": (lambda: TanhEmbedding(11, 12), torch.arange(5)),
    "Linear": (replaced, torch.randn(5, 12)),
}


@pytest.mark.parametrize("kind", CASES)
def test_own_forward_is_neither_merged_nor_exported(kind):
    """The forward is the base layer's own of the reflected input; W Q in it would be another function of x."""
    make, x = CASES[kind]
    model = adapt(nn.Sequential(linear(12, 12), seeded(make)), targets=["0", "1"])
    net = model.base_model.model
    expected = net[1](x)
    before = [layer.weight.clone() for layer in net]
    for call in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True), model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=rf"layer '1' .*{kind} with a forward of its own"):
            call()
    assert not net[0].merged and all(torch.equal(layer.weight, old) for layer, old in zip(net, before, strict=True))
    with pytest.raises(NotImplementedError, match=r"layer '1' .* cannot be exported.*not be linear.*Run the adapter"):
        lora_state(model)
    assert torch.equal(net[1](x), expected)


def test_subclass_without_a_forward():
    model = adapt(nn.Sequential(seeded(lambda: Named(12, 12))), targets=["0"])
    x = torch.randn(5, 12)
    plain = model(x)
    lora_state(model)
    model.merge_adapter()
    assert relative(model(x), plain) < rounding(12, 4, layers=2)


def test_hook_of_accelerate():
    """It replaces forward on the instance, and calls what it replaced."""
    hooks = pytest.importorskip("accelerate.hooks")
    for base in (nn.Linear(12, 12), Clipped(12, 12)):
        model = adapt(nn.Sequential(base), targets=["0"])
        hooks.add_hook_to_module(model.base_model.model[0].base_layer, hooks.ModelHook())
        if isinstance(base, Clipped):
            with pytest.raises(NotImplementedError, match="Clipped with a forward of its own"):
                model.merge_adapter()
        else:
            model.merge_adapter()


# --- nn.TransformerEncoderLayer ---------------------------------------------------------------------------------------


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


ENCODER = rounding(32, 4, layers=12)


@pytest.mark.parametrize("how", ["no_grad", "frozen", "inference_mode"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_in_evaluation(how, norm_first):
    """Its fast path reads linear1.weight and linear2.weight without calling the layers."""
    model = adapt(seeded(lambda: encoder(norm_first)), targets=["linear1", "linear2"])
    x = torch.randn(3, 5, 16)
    expected = model.train()(x).detach()  # no dropout, and no fast path
    model.eval()
    if how == "frozen":
        model.requires_grad_(False)
        assert relative(model(x), expected) < ENCODER
    else:
        with getattr(torch, how)():
            assert relative(model(x), expected) < ENCODER


@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["linear1", "linear2"]])
def test_encoder_with_padding(targets):
    """Then the encoder makes nested tensors of a batch, in evaluation."""
    model = adapt(seeded(encoder), targets=targets)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 1:] = True
    expected = model.train()(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        y = model.eval()(x, src_key_padding_mask=padding)
    assert relative(y[~padding], expected[~padding]) < ENCODER
    assert not y[padding].any()


def test_encoder_merged_disabled_unloaded():
    base = seeded(encoder).eval()
    model = adapt(base, targets=["linear1", "linear2"]).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        plain, adapted = base(x), model(x)
        model.merge_adapter()
        assert relative(model(x), adapted) < ENCODER
        with model.disable_adapter():  # from the merged state, which the first forward undoes
            assert relative(model(x), plain) < ENCODER
        assert relative(model(x), adapted) < ENCODER
        assert torch.equal(model.unload()(x), plain)  # on the fast path again
