"""Small models and the explicit chain in float64, for the tests of the PEFT drop-in."""

import copy

import torch
import torch.nn.functional as F
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn

import hra_kernels.peft
from hra_kernels import reference
from hra_kernels.peft.layer import ReflectionLayer
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


class Experts(nn.Module):
    """A fused weight (E, N, D): every expert's output for every input."""

    def __init__(self, experts: int = 3, out: int = 5, features: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out, features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def seeded(make, seed: int = 0):
    """make() under a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def images(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs of `Net`, always the same."""
    return seeded(lambda: torch.randn(batch, 3, 8, 8), 11).to(dtype)


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


def layers_of(model: nn.Module) -> list[ReflectionLayer]:
    """All of this package's layers."""
    return [module for module in model.modules() if isinstance(module, ReflectionLayer)]


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


def dense_power(q: Tensor, power: float) -> Tensor:
    """Q^power by the eigenvalues of the dense matrix, on their principal branch."""
    if power in (1, -1):
        return q if power == 1 else q.mT
    values, vectors = torch.linalg.eig(q)
    return (vectors @ torch.diag(values**power) @ torch.linalg.inv(vectors)).real


def exact_forward(model: nn.Module, adapters, x: Tensor) -> Tensor:
    """`Net` in float64 with W Q_1 Q_2 ... of these adapters as its weights; a pair (adapter, w) is Q^w."""
    net, plain = model.base_model.model, Net().double()
    with torch.no_grad():
        for layer_name in ALL_LAYERS:
            layer, target = getattr(net, layer_name), getattr(plain, layer_name)
            rows = layer.get_base_layer().weight.double().flatten(1)
            for one in adapters:
                name, power = one if isinstance(one, tuple) else (one, 1)
                if name in layer.hra_u:
                    rows = rows @ dense_power(dense_q(layer.hra_u[name], layer.hra_apply_GS[name]), power)
            target.weight.copy_(rows.reshape(target.weight.shape))
            if layer.bias is not None:
                target.bias.copy_(layer.bias)
        return plain(x.double())


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
