"""The Triton backend's calls through Triton's own JIT, up to Hopper's machine code, on a machine without a GPU.

    python -m tests.triton.jit

`machine_code` compiles the shapes that are tuned for; this compiles what the JIT makes of the others: it turns
sizes and strides of 1 into constants, and asks whether others, and addresses, are multiples of 16. Nothing is launched.
"""

from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from hra_kernels import ops
from hra_kernels.backends import triton as triton_backend
from hra_kernels.testing.cases import Case, make_inputs

CASES = [
    Case(1, 1, 1), Case(2, 1, 3), Case(3, 2, 1), Case(1, 16, 1), Case(5, 1, 16), Case(16, 16, 16), Case(7, 8, 17),
    Case(1, 5, 7), Case(7, 48, 33), Case(1, 3, 65), Case(2, 1001, 129), Case(64, 64, 2, apply_gs=True),
    Case(3, 2, 1, apply_gs=True), Case(9, 40, 20, transpose=False),
]  # fmt: skip
LARGEST_GRID = (2**31 - 1, 65535, 65535)


class Hopper:
    """What the JIT asks of a driver before a launch."""

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def main() -> None:
    compiled: set[tuple] = set()
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        assert all(1 <= size <= most for size, most in zip(grid, LARGEST_GRID, strict=False)), (self.fn.__name__, grid)
        compiled.add((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options).hash))

    driver.set_active(Hopper())
    with (
        mock.patch.object(jit.JITFunction, "run", compile_only),
        mock.patch.multiple(triton_backend.BACKEND, why_unavailable=lambda: None, why_unsupported=lambda *_: None),
        ops.use_backend("triton"),
    ):
        for case in CASES:
            for dtype, aligned in ((torch.bfloat16, True), (torch.float32, False)):
                x, u, dy = make_inputs(case, dtype)
                if not aligned:
                    x = torch.zeros(case.M, case.D + 3, dtype=dtype)[:, 1 : 1 + case.D]
                    u = u.mT.contiguous().mT
                x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
                ops.reflect_chain(x, [u], [case.apply_gs], transpose=case.transpose).backward(dy)
    print(f"{len(compiled)} kernels compiled, of {len({name for name, _ in compiled})} sources")


if __name__ == "__main__":
    main()
