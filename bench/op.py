"""Level `op`: the operators alone, on every backend that runs here, against a copy of x.

The floor is `x.clone()`. A forward reads x and writes y, exactly a copy's traffic; a backward reads x and dy and writes
dx, one and a half times as much; the weight side's reads x and dx and writes nothing of their size. `of_bound` is that
bound over the time. The factor depends on u alone and has no such bound: its ratio says how much it adds.
"""

import argparse
import functools
from collections.abc import Callable

import torch

from bench import providers as catalog
from bench import record, shapes, timing
from bench.layer import DTYPES
from bench.record import Planned, Progress
from hra_kernels import ops, reference
from hra_kernels.factors import factor_dtype
from hra_kernels.measuring import stopwatch
from hra_kernels.testing import cases, tolerance

FLOOR = "copy"
TRAFFIC = {"reflect_fwd": 1.0, "reflect_dx": 1.0, "reflect_bwd": 1.5, "weight_side_bwd": 1.0}
"""Bytes each operator must move over those of a copy of x."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["standard"], help="MxDxN (N is not used), a shape, or a group")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument(
        "--backends", nargs="+", default=None, help="default: all that run here, and the compiled reference"
    )


class Inputs:
    """One input set of all operators."""

    def __init__(self, case: cases.Case, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        sizes = (case.M, case.D)
        self.x, self.dy = (torch.randn(sizes, generator=generator, device=device).to(dtype) for _ in range(2))
        u = cases.make_u(case.D, case.R, case.columns, torch.Generator().manual_seed(seed))
        self.u = u.to(device, factor_dtype(dtype))
        self.v, self.t = reference.wy_factor(self.u)
        self.p = reference.reflect_fwd(self.x, self.v, self.t, True)[1]
        self.dv, self.dt = torch.randn_like(self.v), torch.randn_like(self.t)


class Check:
    """The project's accuracy rule on the backend in force; the exact answers are computed once.

    For y, dx and du of a chain, and for dv and dt of the weight side.
    """

    def __init__(self, inputs: Inputs, case: cases.Case) -> None:
        self.inputs, self.case = inputs, case
        x, u, dy = inputs.x, inputs.u, inputs.dy
        self.exact, self.naive = (cases.explicit(x, u, dy, case, kind) for kind in (torch.float64, x.dtype))
        tensors = dy, x, inputs.v, inputs.t
        self.exact |= self._weight_side(reference, *(tensor.double() for tensor in tensors))
        rounded = (tensor.to(x.dtype) for tensor in tensors)
        self.naive |= self._weight_side(reference, *(tensor.to(inputs.v.dtype) for tensor in rounded))

    @staticmethod
    def _weight_side(functions: object, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("dv", "dt"), functions.weight_side_bwd(*tensors), strict=True))

    def __call__(self) -> tuple[dict[str, float], str | None]:
        """({tensor: relative Frobenius error}, None or what is wrong)."""
        x, u = (tensor.detach().requires_grad_() for tensor in (self.inputs.x, self.inputs.u))
        y = ops.reflect_chain(x, [u], [False], transpose=self.case.transpose)
        dx, du = torch.autograd.grad(y, (x, u), self.inputs.dy)
        of_weight_side = self._weight_side(torch.ops.hra, self.inputs.dy, x.detach(), self.inputs.v, self.inputs.t)
        got = {"y": y.detach(), "dx": dx, "du": du} | of_weight_side
        relative = {name: tolerance.errors(tensor, self.exact[name])["frobenius"] for name, tensor in got.items()}
        wrong = tolerance.violations(got, self.naive, self.exact, x.dtype, self.case.R)
        return relative, "; ".join(wrong) or None


def calls(functions: object) -> dict[str, Callable[[Inputs], object]]:
    """The operators of a backend (or of `torch.ops.hra`) as functions of an input set."""
    return {
        "reflect_fwd": lambda s: functions.reflect_fwd(s.x, s.v, s.t, True),
        "reflect_dx": lambda s: functions.reflect_dx(s.dy, s.v, s.t, True),
        "reflect_bwd": lambda s: functions.reflect_bwd(s.dy, s.x, s.v, s.t, s.p, True),
        "weight_side_bwd": lambda s: functions.weight_side_bwd(s.dy, s.x, s.v, s.t),
        "wy_factor_fwd": lambda s: functions.wy_factor_fwd(s.u, False),
        "wy_factor_bwd": lambda s: functions.wy_factor_bwd(s.dv, s.dt, s.u, s.v, s.t, False),
    }


class _CompiledReference:
    """The reference's reflect under torch.compile: how far a compiler gets with the same formula."""

    def __init__(self) -> None:
        torch._dynamo.reset()  # or the ninth shape in a process is refused
        compile_one = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        self.__dict__ |= {name: compile_one(getattr(reference, name)) for name in TRAFFIC}


def _on_backend(name: str, call: Callable[[Inputs], object], sets: list[Inputs]) -> Callable[[int], object]:
    def run(i: int) -> object:
        with torch.no_grad(), ops.use_backend(name):
            return call(sets[i])

    return run


def measure_case(case: dict, options: argparse.Namespace, progress: Progress) -> dict:
    """One table: the copy, then every operator on every backend."""
    device, dtype, rank = options.device, DTYPES[case["dtype"]], case["rank"]
    problem = cases.Case(case["M"], case["D"], rank)
    bytes_each = 3 * problem.M * problem.D * dtype.itemsize
    sets = [Inputs(problem, dtype, device, seed) for seed in range(timing.input_sets(bytes_each, device))]
    rows: dict[str, dict] = {FLOOR: {"provider": FLOOR, "label": "x.clone()", "op": FLOOR, "why": None}}
    samplers = {FLOOR: timing.sampler(timing.Variant(lambda i: sets[i].x.clone()), device, len(sets))}
    check = Check(sets[0], problem)
    backends = options.backends or [*record.backend_report(), "compiled reference"]
    for k, backend in enumerate(backends):
        progress(f"{case['name']} r{rank} {case['dtype']}: check {backend}", 0.5 * k / len(backends))
        error, why = None, record.backend_report().get(backend)
        why = why and f"not available: {why}"
        if why is None:
            forced = backend if backend != "compiled reference" else "reference"
            try:
                with ops.use_backend(forced):
                    error, wrong = check()
                why = wrong and f"wrong: {wrong}"
            except Exception as failure:
                why = catalog.reason(failure)
        if why is not None:
            rows[backend] = {"provider": backend, "label": f"all, {backend}", "op": "all", "why": why, "error": error}
            continue
        if backend == "compiled reference":
            operators = {name: call for name, call in calls(_CompiledReference()).items() if name in TRAFFIC}
        else:
            operators = calls(torch.ops.hra)
        for name, call in operators.items():
            key = f"{name} {backend}"
            row = {"provider": backend, "label": f"{name}, {backend}", "op": name, "why": None, "error": error}
            rows[key] = row
            timed = timing.Variant(_on_backend(forced, call, sets))
            try:
                timed.run(0)  # what compiles, compiles here
                samplers[key] = timing.sampler(timed, device, len(sets))
            except Exception as failure:
                row["why"] = catalog.reason(failure)
    result = stopwatch.interleave(
        samplers,
        FLOOR,
        options.seconds,
        advance=lambda done: progress(f"{case['name']} r{rank}: rounds", 0.5 + done / 2),
    )
    for key, samples in result.taken.items():
        row = rows[key]
        row["seconds"] = stopwatch.summary(samples.values())
        row["ratio"] = stopwatch.ratio_to_floor(samples, result.taken[FLOOR])
        if row["op"] in TRAFFIC:
            row["of_bound"] = TRAFFIC[row["op"]] / row["ratio"]["median"]
    return record.entry(case, device, options.seconds, list(rows.values()), result)


def plan(options: argparse.Namespace) -> list[Planned]:
    """One case per shape, rank and dtype."""
    found = [
        {"name": str(shape), "M": shape.M, "D": shape.D, "dtype": dtype, "rank": rank}
        for shape in shapes.parse(options.shapes)
        for rank in options.ranks
        for dtype in options.dtypes
    ]
    return [Planned(case, lambda progress, case=case: measure_case(case, options, progress)) for case in found]
