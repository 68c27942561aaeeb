"""The backends by name, and the one place that chooses between them."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch

from hra_kernels.backends import cpu, cuda, reference, triton
from hra_kernels.backends.base import Backend

BACKEND_VARIABLE = "HRA_BACKEND"

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (reference.BACKEND, cpu.BACKEND, triton.BACKEND, cuda.BACKEND)
}
_PREFERRED = {
    "cpu": ("cpu",),
    "cuda": ("triton",),  # `cuda` by name only until a GPU has verified it
}
"""For each type of device, who is asked in turn; the reference serves what none of them does."""

_forced: str | None = os.environ.get(BACKEND_VARIABLE) or None


def backend_report() -> dict[str, str | None]:
    """Each backend's name and why it is not available here, or None where it is."""
    return {name: backend.why_unavailable() for name, backend in BACKENDS.items()}


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operator inside the `with` block on one backend; None is the automatic choice.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not available here; the message says why.
    """
    global _forced
    _require_available(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _require_available(name: str | None) -> None:
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = BACKENDS[name].why_unavailable()
    if reason:
        raise RuntimeError(f"backend {name!r} was asked for and is not available: {reason}")


def choose(
    device: torch.device, dtype: torch.dtype, rank: int, width: int | None = None, *, factor: bool = False
) -> Backend:
    """The backend that reflects tensors of this device and dtype with this many columns.

    `HRA_BACKEND` or `use_backend` overrides the choice; a backend forced by name that cannot serve the tensors raises.

    Args:
        width: D of the tensors; None asks about some D.
        factor: the backend for the factor of such vectors u instead.
    """
    return _chosen(_forced, device, dtype, rank, width, factor)


@functools.cache  # three times in a layer's forward and backward; what a machine has does not change
def _chosen(
    forced: str | None, device: torch.device, dtype: torch.dtype, rank: int, width: int | None, factor: bool
) -> Backend:
    _require_available(forced)
    for name in _PREFERRED.get(device.type, ()) if forced is None else (forced,):
        backend = BACKENDS[name]
        missing = backend.why_unavailable()
        if missing:
            _warn_of_missing(name, missing)
            continue
        if factor:
            reason = backend.why_factor_unsupported(device, dtype, rank)
        else:
            reason = backend.why_unsupported(device, dtype, rank, width)
        if not reason:
            return backend
    if forced is not None:
        raise RuntimeError(f"backend {forced!r} was asked for and cannot serve this call: {reason}")
    return reference.BACKEND


def select_backend(device: torch.device, dtype: torch.dtype, rank: int, width: int | None = None) -> str:
    """The name of what `choose` chooses."""
    return choose(device, dtype, rank, width).name


@functools.cache  # once per process
def _warn_of_missing(name: str, reason: str) -> None:
    warnings.warn(
        f"hra_kernels runs on plain PyTorch, right but slower: backend {name!r} is not available: {reason}. "
        f"{BACKEND_VARIABLE}=reference asks for that without this warning.",
        stacklevel=2,
    )
