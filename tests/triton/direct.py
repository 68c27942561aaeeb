"""Launches made directly are those that Triton's JIT would make: the same kernels, grids and arguments, in order.

    python -m tests.triton.direct

Kernels are compiled for Hopper, on a machine without a GPU; where Triton's launcher would call the driver, its
arguments are kept.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import torch
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import triton_launch
from tests.triton.jit import Hopper

BACKEND = triton_backend.BACKEND
calls: list[tuple] = []


class Launcher(nvidia.CudaLauncher):
    """Triton's own up to the function in C that it ends in, which a direct launch calls at once."""

    arg_annotations, kernel_signature = "annotations", "signature"

    def __init__(self, kernel: CompiledKernel) -> None:
        vars(self).update(kernel.metadata._asdict(), launch=self.launch, kernel=kernel)
        vars(self).update(launch_pdl="pdl", launch_cooperative_grid="cooperative")

    def launch(self, *given) -> None:
        """Keep the call as one of `CompiledKernel.run`, with the handles that are not in those beside its metadata."""
        *handles, arguments = given
        place = handles.index(self.kernel.packed_metadata)
        metadata = tuple(handles[5 : place + 1] + handles[place + 4 :])
        assert {"annotations", "signature", "pdl", "cooperative"} <= set(map(str, metadata))
        calls.append((self.kernel, *handles[:5], metadata, *handles[place + 1 : place + 4], *arguments))


def kept(make) -> list[tuple]:
    """(kernel, *what the launcher was given) of each launch that `make` makes."""
    calls.clear()
    make()
    return list(calls)


def placed(direct: list[tuple], through_jit: list[tuple]) -> dict[int, torch.Tensor]:
    """Which tensor of the JIT's call each address of a direct call stands for; all else must be equal."""
    assert len(direct) == len(through_jit) > 0
    found: dict[int, torch.Tensor] = {}
    hooks_and_metadata = slice(7, 10)  # of the kernel, a grid of three, stream, handle, packed metadata, three more
    for ours, theirs in zip(direct, through_jit, strict=True):
        assert ours[0] is theirs[0] and ours[1:7] == theirs[1:7], (ours[:7], theirs[:7])
        assert ours[hooks_and_metadata] == (None, None, None) and len(ours) == len(theirs)
        for mine, other in zip(ours[10:], theirs[10:], strict=True):
            if isinstance(other, torch.Tensor):
                assert type(mine) is int and found.setdefault(mine, other) is other
            else:
                assert type(mine) is type(other) and mine == other
    return found


class Compared:
    """Stands in for `Launches.__call__`: each call through the JIT and directly, with the same tensors."""

    def __init__(self) -> None:
        self.count = 0
        self.call = triton_launch.Launches.__call__

    def __call__(self, launches, **tensors) -> None:
        self.call(launches, **tensors)  # by the JIT, unless it was made before
        assert launches._direct is not None
        direct = kept(lambda: self.call(launches, **tensors))
        through_jit = kept(lambda: launches._through_jit(tensors))
        found = placed(direct, through_jit)
        given = {tensor.data_ptr(): tensor for tensor in tensors.values()}
        scratch = sorted((address, one) for address, one in found.items() if address not in given)
        for address, tensor in found.items():
            assert given.get(address, tensor) is tensor
        for (address, tensor), (following, _) in itertools.pairwise(scratch):
            assert address + tensor.nbytes <= following
        assert all(address % triton_launch.ALIGNMENT == 0 for address, _ in scratch)
        if scratch:
            start, (end, last) = scratch[0][0], scratch[-1]
            assert end + last.nbytes - start <= 4 * launches._direct._size
        self.count += len(direct)


def tensors(M: int, D: int, R: int, dtype: torch.dtype, u_dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    x, dy = (torch.zeros(M, D, dtype=dtype) for _ in range(2))
    u, v, t, p = torch.zeros(D, R, dtype=u_dtype), torch.zeros(R, D), torch.zeros(R, R), torch.zeros(M, R)
    return SimpleNamespace(x=x, dy=dy, u=u, v=v, t=t, p=p)


def call_all(of: SimpleNamespace, transpose: bool = True) -> None:
    BACKEND.reflect_fwd(of.x, of.v, of.t, transpose)
    BACKEND.reflect_dx(of.dy, of.v, of.t, transpose)
    BACKEND.reflect_bwd(of.dy, of.x, of.v, of.t, of.p, transpose)
    BACKEND.chain_bwd(of.dy, of.x, of.u, of.v, of.t, of.p, transpose, False)
    BACKEND.weight_side_bwd(of.dy, of.x, of.v, of.t)


def compare() -> int:
    compared = Compared()
    with mock.patch.object(triton_launch.Launches, "__call__", lambda self, **tensors: compared(self, **tensors)):
        for shape in ((16, 64, 8), (300, 144, 8), (7, 33, 40), (5, 80, 70)):
            call_all(tensors(*shape, torch.float32))
        for u_dtype in (torch.float32, torch.bfloat16, torch.float32):  # one plan, other kernels
            call_all(tensors(16, 64, 8, torch.bfloat16, u_dtype))
        of = tensors(16, 64, 8, torch.float32)
        of.x = torch.zeros(16, 80)[:, 16:]
        of.u, of.t = of.u.mT.contiguous().mT, of.t.mT
        call_all(of, transpose=False)
    return compared.count


def is_direct(**changed) -> bool:
    """Whether a call, of tensors but for those given like each time, is made directly."""
    of = tensors(16, 64, 8, torch.float32)
    vars(of).update(changed)
    direct = triton_launch._Direct.launch
    answers = []
    patched = mock.patch.object(
        triton_launch._Direct, "launch", lambda self, given: answers.append(direct(self, given)) or answers[-1]
    )
    with patched:
        before = len(calls)
        BACKEND.reflect_fwd(of.x, of.v, of.t, True)
    assert len(calls) == before + 1
    return answers == [True]


def fall_back() -> None:
    """What the JIT looks at, and who wants to be told of launches, is left to the JIT."""
    assert not is_direct() and is_direct()
    aligned = calls[-1][0]
    assert not is_direct(x=torch.zeros(16 * 64 + 1)[1:].view(16, 64))
    assert calls[-1][0] is not aligned
    assert is_direct() and calls[-1][0] is aligned
    told = []
    enter = knobs.runtime.launch_enter_hook
    if enter is None:
        knobs.runtime.launch_enter_hook = told.append
    else:
        enter.add(told.append)
    assert not is_direct() and calls[-1][8] is not None and calls[-1][7] is not None
    if enter is None:
        knobs.runtime.launch_enter_hook = None
    else:
        enter.remove(told.append)
    assert is_direct()
    hooks = triton_launch.kernels().reflect_kernel.pre_run_hooks
    hooks.append(lambda *_, **__: told.append("before"))
    assert not is_direct() and told == ["before"]
    hooks.clear()
    assert is_direct()
    with mock.patch.object(Hopper, "get_current_device", lambda self: 1):
        assert not is_direct() and is_direct()
    assert not is_direct() and is_direct()
    with mock.patch.object(Hopper, "get_current_stream", lambda self, device=0: 77):
        assert is_direct() and calls[-1][4] == 77
    triton_launch.forget_plans()
    triton_launch._triton.cache_clear()
    with mock.patch.object(triton_launch, "NEWEST_KNOWN", (3, 3)):
        assert not is_direct() and not is_direct()
    triton_launch._triton.cache_clear()


def main() -> None:
    driver.set_active(Hopper())
    nothing = lambda self: None  # noqa: E731
    runs = [lambda kernel: lambda *given: calls.append((kernel, *given))]
    if hasattr(nvidia, "annotate_arguments"):  # its function in C takes a kernel's arguments as one
        runs.append(Launcher)
    for run in runs:
        triton_launch.forget_plans()
        # with a setter, for Triton 3.4 sets it
        run = property(run, lambda kernel, value: None)
        with (
            mock.patch.object(CompiledKernel, "_init_handles", nothing),
            mock.patch.object(CompiledKernel, "run", run, create=True),
        ):
            fall_back()
            if run.fget is Launcher:
                assert not is_direct()
                with mock.patch.object(nvidia.CudaLauncher, "__call__", None):
                    assert is_direct()
            print(f"{compare()} launches, as the JIT makes them")


if __name__ == "__main__":
    main()
