"""What is compared at the level of a layer: each method wraps a frozen Linear or Conv2d through its public interface.

The HRA family computes one function, `y = base(x Qᵀ)`, from the same `u`, and is checked against the explicit chain in
float64. The other methods compute functions of their own; each is checked against itself in float64.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLOOR = "frozen"


class Unavailable(Exception):
    """A provider cannot serve a case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """`build(base, rank)` gives the adapted layer; `hra` says that it computes the chain of `u` (`set_u` gives it)."""

    name: str
    label: str
    build: Callable[[nn.Module, int], nn.Module]
    hra: bool = False
    compiled: bool = False


class OneLayer(nn.Module):
    """The smallest model PEFT adapts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _peft_layer(base: nn.Module, config_name: str, **arguments: object) -> nn.Module:
    """The tuner layer that `get_peft_model` puts around `base`."""
    import peft

    try:
        config = getattr(peft, config_name)(target_modules=["layer"], **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(OneLayer(base), config).base_model.model.layer
    except (ValueError, TypeError, NotImplementedError, ZeroDivisionError) as error:
        raise Unavailable(f"PEFT's {config_name}: {error}") from error


# --- the HRA family ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stock_peft() -> Iterator[None]:
    """PEFT as released, also where `hra_kernels.peft` was switched on by somebody."""
    integration = sys.modules.get("hra_kernels.peft")
    switched_on = integration is not None and integration.is_enabled()
    if switched_on:
        integration.disable()
    try:
        yield
    finally:
        if switched_on:
            integration.enable()


def peft_hra(base: nn.Module, rank: int) -> nn.Module:
    with stock_peft():
        return _peft_layer(base, "HRAConfig", r=rank)


def ours_through_peft(base: nn.Module, rank: int) -> nn.Module:
    try:
        import hra_kernels.peft as integration
    except (ImportError, RuntimeError) as error:
        raise Unavailable(str(error)) from error
    with integration.enabled():
        return _peft_layer(base, "HRAConfig", r=rank)


class _LinearAdapter(nn.Module):
    """A Linear with `u` (D, R) beside it; subclasses transform its input."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise Unavailable("written for nn.Linear")
        self.base = base
        self.u = nn.Parameter(torch.randn(base.in_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.transform(x))


def ours_nn(base: nn.Module, rank: int) -> nn.Module:
    from hra_kernels.nn import HRAConv2d, HRALinear

    return (HRAConv2d if isinstance(base, nn.Conv2d) else HRALinear)(base, rank)


def plain_wy(x: Tensor, u: Tensor) -> Tensor:
    """x Qᵀ by the compact WY form in plain PyTorch: what PEFT's pull request 3185 does, on the input."""
    unit = u / torch.linalg.vector_norm(u, dim=0)
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    inverse = torch.triu(unit.mT @ unit, 1) + identity / 2
    t = torch.linalg.solve_triangular(inverse, identity, upper=True)
    wide = x.to(u.dtype)
    return (wide - (wide @ unit) @ t.mT @ unit.mT).to(x.dtype)


class PlainWY(_LinearAdapter):
    def transform(self, x: Tensor) -> Tensor:
        return plain_wy(x, self.u)


class CompiledWY(_LinearAdapter):
    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base, rank)
        self.compiled = torch.compile(lambda x, u: self.base(plain_wy(x, u)), fullgraph=True, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x, self.u)


class TorchHouseholder(_LinearAdapter):
    """The dense Q from torch-householder, block by block of the identity, and a matrix product."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base, rank)
        if base.in_features % rank:
            raise Unavailable(f"needs D % R = 0, got D = {base.in_features}, R = {rank}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch_householder import torch_householder_orgqr
        except Exception as error:  # its import compiles C++ where no wheel was built
            raise Unavailable(f"torch-householder: {type(error).__name__}: {error}".splitlines()[0]) from error
        self.orgqr = torch_householder_orgqr

    def transform(self, x: Tensor) -> Tensor:
        features, rank = self.u.shape
        blocks = features // rank
        identity = torch.eye(features, dtype=self.u.dtype, device=self.u.device)
        identity = identity.view(blocks, rank, features).mT.contiguous()
        columns = self.orgqr(self.u.expand(blocks, features, rank), eye=identity)
        q = columns.transpose(1, 2).reshape(features, features).mT
        return x @ q.mT.to(x.dtype)


class HouseholderProduct(_LinearAdapter):
    """torch.linalg.householder_product and a matrix product.

    Its vectors start with i zeros and a one, as LAPACK's do, so it cannot express every chain: a method of its own.
    """

    def transform(self, x: Tensor) -> Tensor:
        features, rank = self.u.shape
        below = torch.tril(self.u, -1)
        tau = 2 / (1 + below.square().sum(0))
        vectors = torch.cat([below, below.new_zeros(features, features - rank)], 1)
        q = torch.linalg.householder_product(vectors, tau)
        return x @ q.mT.to(x.dtype)


def set_u(layer: nn.Module, u: Tensor) -> None:
    """Give an adapted layer of the HRA family this `u`."""
    with torch.no_grad():
        hra_parameter(layer).copy_(u)


def hra_parameter(layer: nn.Module) -> nn.Parameter:
    """The (D, R) parameter of an adapted layer of the HRA family."""
    u = layer.hra_u if hasattr(layer, "hra_u") else layer.u
    return u["default"] if isinstance(u, nn.ParameterDict) else u


def scramble(layer: nn.Module, generator: torch.Generator) -> None:
    """Move every trainable parameter away from its initial value, where adapters are the identity and cheap to fake."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(0.02 * noise)


PROVIDERS = [
    Provider(FLOOR, "frozen layer", lambda base, rank: base),
    Provider("ours", "hra_kernels", ours_through_peft, hra=True),
    Provider("ours-nn", "hra_kernels.nn", ours_nn, hra=True),
    Provider("wy-eager", "compact WY, eager", PlainWY, hra=True),
    Provider("wy-compile", "compact WY, torch.compile", CompiledWY, hra=True, compiled=True),
    Provider("peft-hra", "PEFT HRA", peft_hra, hra=True),
    Provider("torch-householder", "torch-householder", TorchHouseholder, hra=True),
    Provider("lora", "PEFT LoRA", lambda base, rank: _peft_layer(base, "LoraConfig", r=rank)),
    Provider("oft", "PEFT OFT v2", lambda base, rank: _peft_layer(base, "OFTConfig", r=0, oft_block_size=32)),
    Provider("boft", "PEFT BOFT", lambda base, rank: _peft_layer(base, "BOFTConfig", boft_block_size=4)),
    Provider("loha", "PEFT LoHa", lambda base, rank: _peft_layer(base, "LoHaConfig", r=rank)),
    Provider("lokr", "PEFT LoKr", lambda base, rank: _peft_layer(base, "LoKrConfig", r=rank)),
    Provider(
        "adalora",
        "PEFT AdaLoRA",
        lambda base, rank: _peft_layer(base, "AdaLoraConfig", init_r=rank, target_r=rank, total_step=1000),
    ),
    Provider("householder-product", "linalg.householder_product", HouseholderProduct),
]
BY_NAME = {provider.name: provider for provider in PROVIDERS}
