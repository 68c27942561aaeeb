"""How the Triton backend launches a kernel, and what its launchers share.

`Launches` are kernels with their grids and all of their arguments but the tensors, made once for each class of calls
(`planned`). The first call goes through Triton's JIT, which binds arguments, looks at each, makes a key of them and
finds or compiles the kernel: longer, in Python, than all else that a launch takes. Later calls hand the same kernels to
the driver themselves, as the JIT would, where nothing differs that it looks at.
"""

import contextlib
import copy
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hra_kernels.backends.tuning import LaunchConfig

_guards = torch._C._dynamo.guards

NEWEST_KNOWN = (3, 9)
"""From 3.4 to this release of Triton a compiled kernel is launched as `_Direct` does; with others, by the JIT."""

ALIGNMENT = 16
"""The JIT asks whether an address is a multiple of this, and compiles another kernel where it is not."""

LINE = 128
"""Bytes of a cache line, which no two scratch tensors share."""


def kernels():
    from hra_kernels.backends import triton_kernels  # Triton may be missing, and importing it takes a while

    return triton_kernels


def factor_kernels():
    from hra_kernels.backends import triton_factor_kernels

    return triton_factor_kernels


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every tensor a kernel of this backend writes is allocated here, or by `empty_like`."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(tensor: Tensor, *shape: int) -> Tensor:
    """`empty`, with the dtype and device of a tensor: past the dispatcher, as Inductor's code, with less to do.

    Args:
        shape: one size or two.
    """
    strides = (shape[1], 1) if len(shape) == 2 else (1,)
    if tensor.is_cpu:
        return _guards._empty_strided_cpu(shape, strides, tensor.dtype)
    if tensor.is_cuda and tensor.get_device() == torch._C._cuda_getDevice():
        return _guards._empty_strided_cuda(shape, strides, tensor.dtype)
    return tensor.new_empty(shape)


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
    """Remember what `plan` returns for the last 1024 of its arguments: sizes, strides, all dtypes, a device."""
    remembered = functools.lru_cache(maxsize=1024)(plan)
    _plans.append(remembered)
    return remembered


def forget_plans() -> None:
    """For who has changed what plans follow from: the tiles of `tuning`, kernels, Triton's driver."""
    for plan in _plans:
        plan.cache_clear()


# --- launches ---------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One launch of a kernel whose parameters are tensors first."""

    kernel: Callable
    grid: tuple[int, ...]
    tensors: dict[str, str]
    """Each parameter's tensor, by its name among those that `Launches` is called with and its scratch."""
    arguments: dict[str, object]
    """All other parameters, and Triton's options."""


class Launches:
    """What one call of an operator launches, one after the other: call it with its tensors, by name.

    Args:
        device: where its tensors are.
        launches: at least one.
        scratch: shape and dtype, by name, of tensors that are needed between the launches only.
    """

    def __init__(
        self, device: torch.device, launches: Sequence[Launch], scratch: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        self._device, self._launches, self._scratch = device, launches, scratch
        self._direct: _Direct | None = None

    def __call__(self, **tensors: Tensor) -> None:
        if self._direct is None or not self._direct.launch(tensors.values()):
            with on(self._device):
                self._through_jit(tensors)

    def _through_jit(self, tensors: dict[str, Tensor]) -> None:
        made = {name: empty(*of, self._device) for name, of in self._scratch.items()}
        found = tensors | made
        compiled = [
            kernel[grid](**{parameter: found[name] for parameter, name in named.items()}, **arguments)
            for kernel, grid, named, arguments in self._launches
        ]
        if _may_be_direct(self._launches, compiled, found.values()):
            self._direct = _Direct(self._device, self._launches, compiled, tensors, made)


class _Direct:
    """What the JIT has made of `Launches`, to be launched again without it."""

    def __init__(
        self, device: torch.device, launches: Sequence[Launch], compiled: list,
        tensors: dict[str, Tensor], scratch: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self._triton, self._like = _triton(), empty((0,), torch.float32, device)
        self._index = self._triton.driver.active.get_current_device()
        *self._offsets, size = _offsets(scratch.values())
        self._size = size // self._like.element_size()
        place = {name: i for i, name in enumerate((*tensors, *scratch))}
        self._steps = []
        for (kernel, grid, named, arguments), one in zip(launches, compiled, strict=True):
            pick = operator.itemgetter(*(place[name] for name in named.values()))
            rest = tuple(arguments[name] for name in kernel.arg_names[len(named) :])
            grid, handles = (*grid, 1, 1)[:3], (one.function, one.packed_metadata, None, None, None)  # nobody to tell
            launch, handles = _innermost(one.run, grid, handles, (*range(len(named)), *rest))
            self._steps.append((launch, grid, handles, pick, rest))
        self._kernels = [launch.kernel for launch in launches]

    def launch(self, tensors: Collection[Tensor]) -> bool:
        """Whether it was launched; False where the JIT might have launched anything else, or told anyone.

        It looks at addresses. Dtypes, sizes, strides and constants are those that it made its kernels for.
        """
        addresses = list(map(_address_of, tensors))
        driver = self._triton.driver.active
        device = driver.get_current_device()
        if device != self._index or not _are_aligned(addresses) or self._triton.is_watched(self._kernels):
            return False
        stream = driver.get_current_stream(device)
        if self._offsets:
            scratch = empty_like(self._like, self._size)
            start = scratch.data_ptr()
            addresses += map(start.__add__, self._offsets)
        for launch, grid, handles, pick, rest in self._steps:
            launch(*grid, stream, *handles, (*pick(addresses), *rest))
        return True


def _innermost(run: Callable, grid: tuple, handles: tuple, arguments: tuple) -> tuple[Callable, tuple]:
    """A function of (*grid, stream, *handles, arguments) that does what `run` does of them all, and its handles.

    `run` is Triton's launcher of a compiled kernel, and from about 3.7 on ends in a function in C that takes the
    arguments as one, after more handles. To call that one at once takes half the time.
    """
    given: list = []
    if getattr(run, "global_scratch_size", 1) == 0 and getattr(run, "profile_scratch_size", 0) == 0:
        launcher = copy.copy(run)
        launcher.launch = lambda *what: given.extend(what)
        launcher(*grid, 0, *handles, *arguments)
        if given[:4] == [*grid, 0] and given[-1] == arguments:
            return run.launch, tuple(given[4:-1])
    return lambda *what: run(*what[:-1], *what[-1]), handles


_address_of = Tensor.data_ptr


def _offsets(tensors: Iterable[Tensor]) -> list[int]:
    """Where each begins in a buffer that has room for all, in bytes, and the buffer's size."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + cdiv(tensor.nbytes, LINE) * LINE)
    return offsets


def _are_aligned(addresses: Iterable[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT == 0


def _may_be_direct(launches: Sequence[Launch], compiled: list, tensors: Iterable[Tensor]) -> bool:
    """Whether the JIT, given tensors like these, would do the same again."""
    triton = _triton()
    if triton is None or not all(isinstance(one, triton.CompiledKernel) for one in compiled):
        return False  # interpreted, or another release
    for kernel, _, named, _ in launches:
        if kernel.arg_names[: len(named)] != list(named):
            raise TypeError(f"{kernel.__name__} takes {kernel.arg_names[: len(named)]}, got {list(named)}")
    return (
        all(one.metadata.target.backend == "cuda" for one in compiled)  # AMD's depend on the sizes of tensors too
        and not triton.is_watched([launch.kernel for launch in launches])
        and _are_aligned(tensor.data_ptr() for tensor in tensors)
    )


class _Triton:
    """What a direct launch needs of Triton's inside, as it is in the releases up to `NEWEST_KNOWN`."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.compiler import CompiledKernel
        from triton.runtime import driver

        self.driver, self.CompiledKernel = driver, CompiledKernel
        self._runtime, self._compilation = knobs.runtime, knobs.compilation

    def is_watched(self, kernels: Iterable) -> bool:
        """Whether somebody is to be told of launches (profilers), or kernels are to be compiled in another way."""
        runtime = self._runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if (
            getattr(enter, "calls", enter)  # a chain of hooks from 3.5 on
            or getattr(leave, "calls", leave)
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None)
            or getattr(self._compilation, "instrumentation_mode", None)
        ):
            return True
        for kernel in kernels:  # noqa: SIM110 - `any` makes a generator
            if kernel.pre_run_hooks:
                return True
        return False


@functools.cache
def _triton() -> _Triton | None:
    """None with a release whose inside may be another."""
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return _Triton() if release <= NEWEST_KNOWN else None
