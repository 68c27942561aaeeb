"""Small models and the explicit chain in float64, for the tests of the PEFT drop-in."""

import copy

import torch
import torch.nn.functional as F
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn

import hra_kernels.peft
from hra_kernels import reference
from hra_kernels.testing.tolerance import relative  # noqa: F401  for the tests beside this file


class Net(nn.Module):
    """A convolution and two linear layers, (B, 3, 8, 8) to (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.lin0 = nn.Linear(96, 12)
        self.lin1 = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(torch.tanh(self.conv(x)).flatten(1))))


ALL_LAYERS = ("conv", "lin0", "lin1")


def seeded(make, seed: int = 0):
    """make() under a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def config(targets=ALL_LAYERS, **settings) -> HRAConfig:
    """An HRAConfig away from the identity (r=4, independent columns) unless told otherwise."""
    return HRAConfig(
        **{
            "r": 4,
            "init_weights": False,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            **settings,
        }
    )


def adapt(model: nn.Module, ours: bool = True, seed: int = 1, **settings) -> nn.Module:
    """A copy of the model in a PeftModel built by this package or by PEFT; the same seed gives the same hra_u."""

    def build():
        return get_peft_model(copy.deepcopy(model), config(**settings))

    if not ours:
        return seeded(build, seed)
    with hra_kernels.peft.enabled():
        return seeded(build, seed)


def layer_of(base: nn.Module, **settings) -> nn.Module:
    """This package's PEFT layer over a copy of one base layer."""
    return adapt(nn.Sequential(base), targets=["0"], **settings).base_model.model[0]


def set_u(layer: nn.Module, u: Tensor, adapter: str = "default") -> None:
    """Put these vectors into a layer, in its own dtype."""
    with torch.no_grad():
        layer.hra_u[adapter].copy_(u)


def dense_q(u: Tensor, apply_gs: bool = False) -> Tensor:
    """Q (D, D) by the explicit chain in float64, without gradient."""
    return reference.explicit_chain(u.detach().double(), apply_gs)


def merged_weight(layer: nn.Module, *adapters: str) -> Tensor:
    """W Q_1 Q_2 ... in float64, of the base weight as it is now."""
    weight = layer.get_base_layer().weight.detach().double()
    rows = weight.flatten(1)
    for name in adapters or layer.active_adapters:
        rows = rows @ dense_q(layer.hra_u[name], layer.hra_apply_GS[name])
    return rows.reshape(weight.shape)


def linear(features=48, out=20, dtype=torch.float32, seed=0, **settings) -> nn.Linear:
    """A base layer, the same for the same seed."""
    return seeded(lambda: nn.Linear(features, out, **settings), seed).to(dtype)


def conv2d(*args, **settings) -> nn.Conv2d:
    """A base layer of 3 to 8 channels, always the same."""
    return seeded(lambda: nn.Conv2d(3, 8, *args, **settings))


class PadsItself(nn.Conv2d):
    """As EfficientNet's: pads in its own forward, then convolves without padding."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)
