"""The paper's regularizer, λ Σ ‖I - ûᵀû‖_F over layers, with û the unit columns of u (arXiv 2405.17484).

As in the authors' code it is the Frobenius norm itself, not its square; they use λ = 1e-4, and λ = ∞ is `apply_GS`.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hra_kernels.partition import gathered, held, whole


def orthogonality_penalty(us: Iterable[Tensor]) -> Tensor:
    """Σ ‖I - ûᵀû‖_F over several u (D, R): a scalar to be multiplied by λ and added to the loss. Differentiable.

    Layers of equal shape are computed together, in a handful of launches however many there are. A zero column counts
    as orthogonal to the others and short by one, without gradient. Columns of any scale; float32 at least.

    Raises:
        ValueError: us is empty, or one of them is not (D, R).
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for u in us:
        if u.dim() != 2:
            raise ValueError(f"orthogonality_penalty: each u must be (D, R), got shape {tuple(u.shape)}")
        groups[tuple(u.shape), u.device, u.dtype].append(u)
    if not groups:
        raise ValueError("orthogonality_penalty: us must hold at least one (D, R) tensor, got none")
    penalties = []
    for group in groups.values():
        stacked = torch.stack(group)
        stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        with torch.autocast(stacked.device.type, enabled=False):
            largest = stacked.detach().abs().amax(1, keepdim=True)
            stacked = stacked / torch.where(largest > 0, largest, 1)
            norm = torch.linalg.vector_norm(stacked, dim=1, keepdim=True)
            unit = stacked / torch.where(norm > 0, norm, 1)
            identity = torch.eye(unit.shape[2], dtype=unit.dtype, device=unit.device)
            penalties.append(torch.linalg.matrix_norm(identity - unit.mT @ unit).sum())
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()


def model_orthogonality_penalty(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """`orthogonality_penalty` over every HRA layer of a model: PEFT's, this package's for PEFT, and `hra_kernels.nn`'s.

    Args:
        model: any module.
        adapter_name: with PEFT, which adapter; by default each layer's active ones.

    Under FSDP2 and DeepSpeed ZeRO-3 the vectors are gathered, with gradient; every rank must come here.

    Raises:
        ValueError: no layer has such an adapter.
        RuntimeError: FSDP1 has the vectors in parts (it gathers those of its root alone for longer than a forward).
    """
    us: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        u = held(module, "hra_u")
        if isinstance(u, nn.ParameterDict):
            names = module.active_adapters if adapter_name is None else [adapter_name]
            us.update((f"{module_name}.hra_u.{name}", held(u, name)) for name in names if name in u)
        elif isinstance(u, Tensor):
            us[f"{module_name}.hra_u"] = u
    if not us:
        wanted = "active adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        raise ValueError(f"model_orthogonality_penalty: the model must have HRA layers with an {wanted}, it has none")
    with gathered(us.values()):
        chains: list[Tensor] = []
        for name, parameter in us.items():
            u = whole(parameter, "model_orthogonality_penalty", name)
            if u.dim() == 3 and u.shape[1] == 1:  # (N, 1, R): on the output side, or with eps
                u = u.flatten(0, 1)
            chains += [u] if u.dim() == 2 else u.unbind(0)  # (D, R), or a chain for each expert, (E, D, R)
        return orthogonality_penalty(chains)
