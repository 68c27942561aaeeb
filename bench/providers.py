"""What is compared at the level of a layer: each method wraps a frozen Linear or Conv2d through its public interface.

The HRA family computes one function, `y = base(x Qᵀ)`, from the same `u`, and is checked against the explicit chain in
float64. The other methods compute functions of their own; each is checked against itself in float64.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLOOR = "frozen"


class Unavailable(Exception):
    """A provider cannot serve a case; the message says why."""


def reason(error: Exception) -> str:
    """Why there is no time, for a row: what one method fails of, the others may outlive."""
    if isinstance(error, Unavailable):
        return f"not available: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Provider:
    """A method: a PEFT config (`peft(rank)` gives its class name and arguments) or a module (`wrap(base, rank)`).

    `hra` says that it computes the chain of a `u` (D, R), `ours` that it is this package's integration into PEFT.
    """

    name: str
    label: str
    peft: Callable[[int], tuple[str, dict]] | None = None
    wrap: Callable[[nn.Module, int], nn.Module] | None = None
    hra: bool = False
    ours: bool = False

    def build(self, base: nn.Module, rank: int) -> nn.Module:
        """`base` adapted: PEFT's tuner layer, or the wrapping module."""
        if self.peft is None:
            return self.wrap(base, rank) if self.wrap else base
        return self.build_model(OneLayer(base), ["layer"], rank).base_model.model.layer

    def build_model(self, model: nn.Module, targets: list[str], rank: int) -> nn.Module:
        """`model`, frozen, with the layers whose names end in one of `targets` adapted; it may change in place."""
        model.requires_grad_(False)
        if self.peft is not None:
            return self._get_peft_model(model, targets, rank)
        if self.wrap is not None:
            for path, layer in list(model.named_modules()):
                if any(path == target or path.endswith(f".{target}") for target in targets):
                    parent, _, child = path.rpartition(".")
                    setattr(model.get_submodule(parent), child, self.wrap(layer, rank))
        return model

    def _get_peft_model(self, model: nn.Module, targets: list[str], rank: int) -> nn.Module:
        import peft

        class_name, arguments = self.peft(rank)
        try:
            config = getattr(peft, class_name)(target_modules=targets, **arguments)
            with warnings.catch_warnings(), peft_hra(self.ours):
                warnings.simplefilter("ignore")
                return peft.get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError, ZeroDivisionError) as error:
            raise Unavailable(f"PEFT's {class_name}: {error}") from error


class OneLayer(nn.Module):
    """The smallest model PEFT adapts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def peft_hra(ours: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, PEFT builds our HRA layers or, whatever was switched on before, its own."""
    try:
        import hra_kernels.peft as integration
    except (ImportError, RuntimeError) as error:
        if ours:
            raise Unavailable(str(error)) from error
        return contextlib.nullcontext()  # it never was switched on
    return integration.enabled() if ours else integration.disabled()


# --- the HRA family ---------------------------------------------------------------------------------------------------


def ours_nn(base: nn.Module, rank: int) -> nn.Module:
    from hra_kernels.nn import HRAConv2d, HRALinear

    return (HRAConv2d if isinstance(base, nn.Conv2d) else HRALinear)(base, rank)


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
        torch._dynamo.reset()  # or the ninth shape in a process is refused
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


def _hra_config(rank: int) -> tuple[str, dict]:
    return "HRAConfig", {"r": rank}


PROVIDERS = [
    Provider(FLOOR, "frozen layer"),
    Provider("ours", "hra_kernels", peft=_hra_config, hra=True, ours=True),
    Provider("ours-nn", "hra_kernels.nn", wrap=ours_nn, hra=True),
    Provider("wy-eager", "compact WY, eager", wrap=PlainWY, hra=True),
    Provider("wy-compile", "compact WY, torch.compile", wrap=CompiledWY, hra=True),
    Provider("peft-hra", "PEFT HRA", peft=_hra_config, hra=True),
    Provider("torch-householder", "torch-householder", wrap=TorchHouseholder, hra=True),
    Provider("lora", "PEFT LoRA", peft=lambda rank: ("LoraConfig", {"r": rank})),
    Provider("oft", "PEFT OFT v2", peft=lambda rank: ("OFTConfig", {"r": 0, "oft_block_size": 32})),
    Provider("boft", "PEFT BOFT", peft=lambda rank: ("BOFTConfig", {"boft_block_size": 4})),
    Provider("loha", "PEFT LoHa", peft=lambda rank: ("LoHaConfig", {"r": rank})),
    Provider("lokr", "PEFT LoKr", peft=lambda rank: ("LoKrConfig", {"r": rank})),
    Provider(
        "adalora",
        "PEFT AdaLoRA",
        peft=lambda rank: ("AdaLoraConfig", {"init_r": rank, "target_r": rank, "total_step": 1000}),
    ),
    Provider("householder-product", "linalg.householder_product", wrap=HouseholderProduct),
]
BY_NAME = {provider.name: provider for provider in PROVIDERS}
