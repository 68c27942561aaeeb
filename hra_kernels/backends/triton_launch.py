"""How the Triton backend launches a kernel, and what its launchers share.

`Launch` is a kernel with its grid and all of its arguments but the tensors, made once for each class of calls
(`planned`). Its first call goes through Triton's JIT, which binds arguments, looks at each, makes a key of them and
finds or compiles the kernel: as long, in Python, as all else that a layer's launch takes. Later calls hand that kernel
to the driver directly, as the JIT would, where nothing differs that the JIT looks at.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hra_kernels.backends.tuning import LaunchConfig

NEWEST_KNOWN = (3, 9)
"""From 3.4 to this release of Triton a compiled kernel is launched as `Launch` does; with others, by the JIT."""

ALIGNMENT = 16
"""The JIT asks whether an address is a multiple of this, and compiles another kernel where it is not."""


def kernels():
    from hra_kernels.backends import triton_kernels  # Triton may be missing, and importing it takes a while

    return triton_kernels


def factor_kernels():
    from hra_kernels.backends import triton_factor_kernels

    return triton_factor_kernels


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every tensor a kernel of this backend writes is allocated here."""
    return torch.empty(shape, dtype=dtype, device=device)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_above(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def is_amd() -> bool:
    return torch.version.hip is not None


def float32_precision() -> str:
    """How float32 tiles are multiplied: three passes of tf32 (1e-6 relative), on AMD by its float32 matrix units."""
    return "ieee" if is_amd() else "tf32x3"


def num_warps(config: LaunchConfig) -> int:
    """The same number of threads everywhere: AMD's warps (wavefronts) have 64 of them."""
    return max(1, config.num_warps // 2) if is_amd() else config.num_warps


# --- plans ------------------------------------------------------------------------------------------------------------


_plans: list[Callable] = []


def planned(plan: Callable) -> Callable:
    """Remember what `plan` returns for the last 1024 of its arguments: sizes, strides, dtypes, a device."""
    remembered = functools.lru_cache(maxsize=1024)(plan)
    _plans.append(remembered)
    return remembered


def forget_plans() -> None:
    """For who has changed what plans follow from: the tiles of `tuning`, kernels, Triton's driver."""
    for plan in _plans:
        plan.cache_clear()


# --- launches ---------------------------------------------------------------------------------------------------------


class Launch:
    """A launch of one kernel: call it with its tensors, by name and in the kernel's order.

    Args:
        kernel: whose parameters are tensors first.
        grid: of programs.
        device: where its tensors are.
        arguments: all others, by name; and Triton's options.
    """

    def __init__(self, kernel: Callable, grid: tuple[int, ...], device: torch.device, **arguments: object) -> None:
        self._kernel, self._grid, self._device, self._arguments = kernel, grid, device, arguments
        self._direct: _Direct | None = None

    def __call__(self, **tensors: Tensor) -> None:
        if self._direct is None or not self._direct.launch(tensors.values()):
            with on(self._device):
                compiled = self._kernel[self._grid](**tensors, **self._arguments)
                self._direct = _direct(self._kernel, self._grid, compiled, tensors, self._arguments)


class _Direct:
    """What the JIT has made of one launch, to be launched again without it."""

    def __init__(self, kernel, grid, compiled, device: int, tensors: dict[str, Tensor], rest: tuple) -> None:
        self._kernel, self._compiled, self._device, self._rest = kernel, compiled, device, rest
        self._grid = (*grid, 1, 1)[:3]
        self._dtypes = [tensor.dtype for tensor in tensors.values()]
        self._triton = _triton()

    def launch(self, tensors) -> bool:
        """Whether it was launched; False where the JIT might have launched anything else, or told anyone.

        Sizes, strides and constants are those of the launch that the JIT made.
        """
        driver = self._triton.driver.active
        device = driver.get_current_device()
        addresses = [tensor.data_ptr() for tensor in tensors]
        if (
            device != self._device
            or not _are_aligned(addresses)
            or [tensor.dtype for tensor in tensors] != self._dtypes
            or self._triton.is_watched(self._kernel)
        ):
            return False
        compiled = self._compiled
        run = compiled.run  # loads the kernel
        stream = driver.get_current_stream(device)
        run(*self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *self._rest)
        return True


def _are_aligned(addresses: list[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT == 0


def _direct(kernel, grid, compiled, tensors: dict[str, Tensor], arguments: dict[str, object]) -> _Direct | None:
    """None where this launch has to go through the JIT each time."""
    if compiled is None or _triton() is None or not isinstance(kernel, _triton().JITFunction):
        return None  # interpreted, or another release
    names = kernel.arg_names
    if names[: len(tensors)] != list(tensors):
        raise TypeError(f"{kernel.__name__} takes {names[: len(tensors)]}, got {list(tensors)}")
    if (
        compiled.metadata.target.backend != "cuda"  # AMD's kernels depend on the sizes of tensors too
        or _triton().is_watched(kernel)
        or not _are_aligned([tensor.data_ptr() for tensor in tensors.values()])
    ):
        return None
    rest = tuple(arguments[name] for name in names[len(tensors) :])
    return _Direct(kernel, grid, compiled, _triton().driver.active.get_current_device(), tensors, rest)


class _Triton:
    """What a direct launch needs of Triton's inside, as it is in the releases up to `NEWEST_KNOWN`."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.driver, self.JITFunction = driver, JITFunction
        self._runtime, self._compilation = knobs.runtime, knobs.compilation

    def is_watched(self, kernel) -> bool:
        """Whether somebody is to be told of launches (profilers), or kernels are to be compiled in another way."""
        runtime = self._runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(
            getattr(enter, "calls", enter)  # a chain of hooks from 3.5 on
            or getattr(leave, "calls", leave)
            or kernel.pre_run_hooks
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None)
            or getattr(self._compilation, "instrumentation_mode", None)
        )


@functools.cache
def _triton() -> _Triton | None:
    """None with a release whose inside may be another."""
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return _Triton() if release <= NEWEST_KNOWN else None
