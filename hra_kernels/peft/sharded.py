"""HRA over layers whose weight is sharded over processes (a DTensor): tensor parallelism and FSDP2.

Tensor parallelism (ColwiseParallel, RowwiseParallel and the like). The layer's own hooks bring x into the layout that
its weight wants, and only then is it known how x is sharded. So the reflections go in as one more hook, behind those.
`hra_u` is whole on every rank, and so is its gradient:

    x replicated                  each rank reflects it, with the compiled kernels
    x sharded along the features  v is sharded alike; p = x vᵀ adds up over the ranks: (M, R) numbers travel, not (M, D)
    x sharded otherwise           each rank reflects its part; the gradient of u adds up over the ranks

The last two are PyTorch's own products on DTensors.

FSDP2 gathers weights and vectors before a forward, which so is like any other; merging wants the shards.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hra_kernels import reference
from hra_kernels.factor_cache import FactorCache
from hra_kernels.ops import attach_factor, in_factor_dtype, reflect_chain
from hra_kernels.partition import weight_of, whole


def is_sharded(base: nn.Module) -> bool:
    """Whether the layer's weight is a DTensor."""
    weight = weight_of(base)
    return type(weight) is not nn.Parameter and hasattr(weight, "device_mesh")


def whole_vectors(us: Sequence[Tensor], where: str = "HRA") -> list[Tensor]:
    """The same tensors, gathered from all ranks where FSDP2 has sharded them. Every rank must come here.

    Args:
        where: what errors call the layer.

    Raises:
        RuntimeError: FSDP1 or DeepSpeed ZeRO-3 has them in parts at present.
    """
    return [whole(u, where, "hra_u") for u in us]


def call_base(base: nn.Module, reflect: Callable[[Tensor], Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer of x, with `reflect` applied to its input after all of its own forward pre-hooks."""
    hook = base.register_forward_pre_hook(lambda _, inputs: (reflect(inputs[0]), *inputs[1:]))
    try:
        return base(x, *args, **kwargs)
    finally:
        hook.remove()


def reflect(x: Tensor, us: list[Tensor], apply_gs: list[bool], cache: FactorCache) -> Tensor:
    """x Qᵀ for x (..., D), a DTensor sharded or replicated in any way, or a plain one; placed as x is."""
    factor = cache.get(us, apply_gs, x.dtype)
    if not hasattr(x, "device_mesh"):
        return reflect_chain(x, us, apply_gs, factor, transpose=True)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, whole = x.device_mesh, [Replicate()] * x.device_mesh.ndim
    if all(p.is_replicate() for p in x.placements):
        y = reflect_chain(x.to_local(), us, apply_gs, factor, transpose=True)
        return DTensor.from_local(y, mesh, whole, run_check=False)
    v, t = attach_factor(in_factor_dtype(us, x.dtype), apply_gs, factor)
    v, t = (DTensor.from_local(tensor, mesh, whole, run_check=False) for tensor in (v, t))
    v = v.redistribute(placements=[Shard(1) if p.is_shard(x.dim() - 1) else Replicate() for p in x.placements])
    y, _ = reference.reflect_fwd(x if x.dim() > 1 else x[None], v, t, True)  # DTensors have no vector times matrix
    return y.reshape(x.shape).redistribute(placements=x.placements)


def give_back_gathered_weights(model: nn.Module) -> None:
    """Have FSDP2 drop the whole weights that it gathered for a forward: what lasts, and can be changed, is the shards.

    FSDP2 keeps those of its root module until the next backward, and the root can be a module around `model`.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    inside = set(model.modules())
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule) and not inside.isdisjoint(module.modules()):
            module.reshard()
