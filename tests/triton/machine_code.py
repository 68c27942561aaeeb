"""Every launch the Triton backend makes, compiled to machine code for GPUs that are not here.

    python -m tests.triton.machine_code [--target sm_90] [--kernel reflect]      prints one line per kernel and target

The backend's own launchers run on meta tensors and are overheard: signature, alignment and tile sizes are what a GPU
would be given, so no list of configurations can go stale.
"""

import argparse
import concurrent.futures
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hra_kernels.backends import triton as triton_backend
from hra_kernels.backends import triton_factor_kernels, triton_kernels, triton_launch, tuning
from tests.triton import products, wgmma
from tests.triton.loops import Loop, machine_loops, steady_loops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
"""Bytes of shared memory one program may have, from the makers' published limits."""

MATRIX = r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA|QMMA|UTC\w*MMA)|v_mfma_"
WIDE = r"\b(?:LDG|STG|LDGSTS)\b[.\w]*\.128|(?:global|buffer)_(?:load|store)_dwordx4"
SPILL = r"\b(?:LDL|STL)\b|scratch_(?:load|store)"


@dataclass(frozen=True)
class Launch:
    """What `triton.compile` needs to know of one launch; hashable, so that equal launches are compiled once."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def is_16_bit(self) -> bool:
        return not {"*bf16", "*fp16"}.isdisjoint(kind for _, kind in self.signature)

    def __str__(self) -> str:
        constants = dict(self.constants)
        sizes = " ".join(
            f"{name}={constants[name]}"
            for name in sorted(constants)
            if name.isupper() and name not in ("PRECISION", "V_SCALE")
        )
        kinds = dict(self.signature)
        main = next((name for name in ("x_ptr", "dy_ptr", "u_ptr") if name in kinds), self.signature[0][0])
        return f"{self.kernel} {kinds[main]} {sizes} " + " ".join(f"{name[4:]}={value}" for name, value in self.options)


_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class _Overheard:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel, found: dict):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, **arguments):
        options = tuple((name, arguments.pop(name)) for name in ("num_warps", "num_stages") if name in arguments)
        signature, constants, aligned = [], [], []
        for i, parameter in enumerate(self.kernel.params):
            value = arguments.pop(parameter.name)
            kind = "constexpr"
            if isinstance(value, torch.Tensor):
                kind = _TYPES[value.dtype]
                aligned.append(i)
            elif isinstance(value, int) and not parameter.is_constexpr and (value != 1 or parameter.do_not_specialize):
                kind = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.append(i)
            elif isinstance(value, float) and not parameter.is_constexpr:
                kind = "fp32"
            if kind == "constexpr":
                constants.append((parameter.name, value))
            signature.append((parameter.name, kind))
        assert not arguments, arguments
        name = self.kernel.fn.__name__
        self.found.setdefault(Launch(name, tuple(signature), tuple(constants), tuple(aligned), options))


def launches_of(call: Callable[[], None], target: str = "sm_90") -> list[Launch]:
    """Every distinct launch that `call` makes, with the table of `target` and as on it."""
    found: dict[Launch, None] = {}
    backend = mock.patch.multiple(
        triton_launch,
        is_amd=lambda: TARGETS[target].backend == "hip",
        kernels=lambda: _overhear(triton_kernels, found),
        factor_kernels=lambda: _overhear(triton_factor_kernels, found),
    )
    with backend, mock.patch.object(tuning, "architecture", lambda: target):
        triton_launch.forget_plans()
        call()
        triton_launch.forget_plans()
    return list(found)


def launches(target: str) -> list[Launch]:
    """Every distinct launch over shapes that reach every line of the table that `tuning` has for `target`."""

    def call():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for rank in (8, 16, 32, 64, 128):
                for M, D in tuning.SHAPES_OF_EVERY_LINE:
                    call_reflect(M, D, rank, dtype)
        for rank in (8, 32, 256):
            for apply_gs in (False, True):
                call_factor(4096, rank, apply_gs)

    return launches_of(call, target)


def _overhear(module, found):
    kernels = {name: _Overheard(kernel, found) for name, kernel in vars(module).items() if name.endswith("_kernel")}
    return mock.Mock(**kernels)


def call_reflect(M: int, D: int, R: int, dtype: torch.dtype) -> None:
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, v, t, p = empty(M, D, dtype=dtype), empty(R, D), empty(R, R), empty(M, R)
    triton_backend.BACKEND.reflect_fwd(x, v, t, True)
    if dtype == torch.bfloat16:  # the same kernel without p
        triton_backend.BACKEND.reflect_dx(x, v, t, True)
    triton_backend.BACKEND.reflect_bwd(x, x, v, t, p, True)
    triton_backend.BACKEND.chain_bwd(x, x, empty(D, R), v, t, p, True, False)
    triton_backend.BACKEND.weight_side_bwd(x, x, v, t)


def call_factor(D: int, R: int, apply_gs: bool) -> None:
    u = torch.empty(D, R, device="meta")
    v, t = torch.empty(R, D, device="meta"), torch.empty(R, R, device="meta")
    triton_backend.BACKEND.wy_factor(u, apply_gs)
    triton_backend.BACKEND.wy_factor_bwd(v, t, u, v, t, apply_gs)


def _listed(values: Iterable) -> str:
    return ",".join(map(str, values))


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch on one target shows."""

    launch: Launch
    target: str
    shared: int
    registers: int
    stack: int
    spills: int
    matrix: str
    wide: int
    overwritten: int
    transposed: int
    loops: tuple[Loop, ...]
    barriers: tuple[int, ...]
    """In each steady loop, as `loops`."""

    def waits(self) -> str:
        """The least number of copies that stay on their way in each steady loop."""
        return _listed(min(loop.outstanding, default="-") for loop in self.loops)

    def problems(self) -> list[str]:
        """Why this launch must not ship; empty where it may."""
        found = []
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.target]} are there")
        if self.spills or self.stack:
            found.append(f"{self.spills} spill instructions, {self.stack} bytes of stack")
        if self.launch.kernel in MATRIX_KERNELS and not self.matrix:
            found.append("no matrix instruction")
        if self.launch.kernel in MATRIX_KERNELS and not self.wide:
            found.append("no 16-byte access")
        if self.overwritten:
            found.append(f"{self.overwritten} instructions write registers that a running wgmma uses")
        if self.transposed:
            found.append(f"{self.transposed} products take another one's result, transposed in registers")
        if self.launch.is_16_bit():  # arithmetic binds the others
            found += [problem for loop in self.loops for problem in loop.problems()]
            many = dict(self.launch.constants).get("BLOCK_R", 0) > 16
            if many and self.launch.kernel in SWEEPS and any(len(loop.conversions) > 1 for loop in self.loops):
                found.append("v is split in the loop")  # the one conversion is y's
        return found


MATRIX_KERNELS = {
    "reflect_kernel", "project_kernel", "backward_rows_kernel", "backward_columns_kernel", "combine_kernel",
    "product_kernel",
}  # fmt: skip

SWEEPS = {"reflect_kernel", "project_kernel", "backward_rows_kernel"}
"""Their loops read v, which beyond 16 columns comes in halves."""


def _disassemble(cubin: bytes) -> tuple[str, int, int]:
    """(SASS, registers, bytes of stack)"""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], **run).stdout
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], **run).stdout
    return sass, int(re.search(r"REG:(\d+)", usage).group(1)), int(re.search(r"STACK:(\d+)", usage).group(1))


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile one launch for one target and read its machine code."""
    module = triton_kernels if hasattr(triton_kernels, launch.kernel) else triton_factor_kernels
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        getattr(module, launch.kernel),
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    if target.startswith("sm_"):
        assembly, registers, stack = _disassemble(compiled.asm["cubin"])
        spills = len(re.findall(SPILL, assembly))
    else:
        assembly = compiled.asm["amdgcn"]
        registers, stack, spills = (
            int(re.search(rf"\.{field}:\s+(\d+)", assembly).group(1))
            for field in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
    loops, barriers = [], []
    if target.startswith("sm_") and launch.kernel in MATRIX_KERNELS:
        loops = steady_loops(compiled.asm["ttgir"])
        barriers = [sum(n for name, n in loop.items() if name.startswith("BAR")) for loop in machine_loops(assembly)]
    matrix = Counter(re.findall(MATRIX, assembly)).most_common(1)
    return Compiled(
        launch, target, compiled.metadata.shared, registers, stack, spills,
        f"{matrix[0][0].rstrip('_')} x {matrix[0][1]}" if matrix else "", len(re.findall(WIDE, assembly)),
        len(wgmma.overwritten(assembly)), len(products.of_transposed_products(compiled.asm["ttir"])),
        tuple(loops), tuple(barriers),
    )  # fmt: skip


def _compile_pair(pair: tuple[Launch, str]) -> Compiled:
    return compile_launch(*pair)


def compile_all(targets: list[str], kernels: str = "", workers: int = 2) -> list[Compiled]:
    """Every launch on every target."""
    pairs = [(launch, target) for target in targets for launch in launches(target) if kernels in launch.kernel]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_compile_pair, pairs, chunksize=4))


def table(results: list[Compiled]) -> str:
    """Aligned lines, one per launch and target."""
    width = max(len(str(result.launch)) for result in results)
    lines = [f"{'launch':{width}}  target  regs  shared  stack  spills  16-byte  waits  barriers  matrix instructions"]
    for result in results:
        lines.append(
            f"{result.launch!s:{width}}  {result.target:6}  {result.registers:4}  {result.shared:6}  {result.stack:5}"
            f"  {result.spills:6}  {result.wide:7}  {result.waits():5}  {_listed(result.barriers):8}"
            f"  {result.matrix:20} {'; '.join(result.problems())}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--kernel", default="")
    arguments = parser.parse_args()
    results = compile_all(arguments.target or list(TARGETS), arguments.kernel)
    print(table(results))
    failed = sum(bool(result.problems()) for result in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
