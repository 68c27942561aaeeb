"""Parameters that accelerate keeps elsewhere between forwards (`cpu_offload`, `disk_offload`, `device_map`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads this module's own parameters around its forward, and only then."""
    return getattr(getattr(module, "_hf_hook", None), "offload", False)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """The module's own parameters in memory; they go back afterwards. For use of parameters outside a forward."""
    if not is_offloaded(module):
        yield
        return
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, torch.empty(0))
