"""`hra-kernels verify`: this machine's backends against float64, forward and gradients, by the one accuracy rule.

The cases are those of the tests (`hra_kernels.testing.cases`): random vectors, vectors one optimizer step away from
HRA's initialization, nearly parallel ones, zeros, extreme scales. None is the initialization itself: there the
reflections cancel, and a kernel that does nothing would pass.
"""

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hra_kernels import ops
from hra_kernels.testing import tolerance
from hra_kernels.testing.cases import CASES, DTYPES, Case, explicit, make_inputs, naive

_COLUMNS = "{:<9}  {:<6}  {:<8}  {:>5}  {:>13}  {}"
_HEADER = _COLUMNS.format("backend", "device", "dtype", "cases", "error/allowed", "verdict")


@dataclass
class Row:
    """What one backend did with one dtype.

    `worst` is the largest error over what the rule allows, of any case, tensor and norm: above 1 is wrong.
    """

    backend: str
    device: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def take(self, case: Case, ratios: dict[str, float]) -> None:
        """Add a case's ratios by tensor."""
        self.cases += 1
        self.worst = max(self.worst, *ratios.values())
        self.wrong += [
            f"{case}: {name} has {ratio:.3g} times the error allowed" for name, ratio in ratios.items() if ratio > 1
        ]

    def fail(self, case: Case, error: Exception) -> None:
        """Add a case that gave no result."""
        self.cases += 1
        self.worst = math.inf
        self.wrong.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())}")

    def as_json(self) -> dict[str, Any]:
        """The fields; `worst` is None where it is infinite, which JSON has no number for."""
        return asdict(self) | {"worst": self.worst if math.isfinite(self.worst) else None}

    def __str__(self) -> str:
        verdict = f"WRONG in {len(self.wrong)}: {self.wrong[0]}" if self.wrong else "right"
        return _COLUMNS.format(self.backend, self.device, self.dtype, self.cases, f"{self.worst:.3g}", verdict)


def _error_over_allowed(
    got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, rank: int
) -> dict[str, float]:
    """{tensor: error over allowed error, in the norm where that is larger}; infinity where the error is not finite."""
    found = {}
    for name, tensor in got.items():
        if tensor.shape != exact[name].shape:
            found[name] = math.inf
            continue
        allowed = tolerance.allowed(plain[name], exact[name], dtype, tensor.dtype, rank)
        ratios = [0.0]
        for norm, error in tolerance.errors(tensor, exact[name]).items():
            ratio = error / allowed[norm] if allowed[norm] else (math.inf if error else 0.0)
            ratios.append(ratio if ratio < math.inf else math.inf)  # so written that NaN is infinite
        found[name] = max(ratios)
    return found


def _run(backend: str, x: Tensor, u: Tensor, dy: Tensor, case: Case) -> dict[str, Tensor]:
    """y, dx and du of one backend, on the CPU."""
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    with ops.use_backend(backend):
        y = ops.reflect_chain(x, [u], [case.apply_gs], transpose=case.transpose)
        y.backward(dy)
    return {"y": y.detach().cpu(), "dx": x.grad.cpu(), "du": u.grad.cpu()}


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so that a kernel that leaves a hole is seen, not an earlier right answer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def verify(backends: Sequence[str], cases: Sequence[Case] = CASES) -> Iterator[Row]:
    """One row per dtype, backend and device, as soon as it is known.

    Args:
        backends: names of available backends; each runs on every device of this machine that it serves.
        cases: what to run; a case whose rank or dtype a backend does not serve is left out of its row.
    """
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    with _poisoned_memory():
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            rows = {(backend, device): Row(backend, device.type, name) for backend in backends for device in devices}
            for number, case in enumerate(cases, 1):
                _progress(f"{name}: case {number} of {len(cases)}")
                x, u, dy = make_inputs(case, dtype)
                exact, plain = explicit(x, u, dy, case), naive(x, u, dy, case, dtype)
                for (backend, device), row in rows.items():
                    if ops.BACKENDS[backend].why_unsupported(device, dtype, case.R):
                        continue
                    try:
                        got = _run(backend, x.to(device), u.to(device), dy.to(device), case)
                    except Exception as error:  # a kernel that does not launch is a result; the others are still wanted
                        row.fail(case, error)
                    else:
                        row.take(case, _error_over_allowed(got, plain, exact, dtype, case.R))
            _progress("")
            yield from (row for row in rows.values() if row.cases)


def _progress(said: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{said:<40}\r", end="", file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Check the backends of this machine against float64: forward and every gradient, in four dtypes. Prints one "
        "row per backend and dtype; exit status 1 if a value is wrong. Takes less than a minute on two cores; on a "
        "GPU, Triton compiles its kernels first."
    )
    parser.add_argument("--backend", choices=list(ops.BACKENDS), help="this backend only (default: all that run here)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def main(arguments: argparse.Namespace) -> int:
    """0: every value is right. 1: one is wrong. 2: the backend that was asked for does not run here."""
    reasons = {name: reason for name, reason in ops.backend_report().items() if arguments.backend in (None, name)}
    available = [name for name, reason in reasons.items() if reason is None]
    if arguments.backend and not available:
        print(
            f"hra-kernels: backend {arguments.backend} does not run here: {reasons[arguments.backend]}", file=sys.stderr
        )
        return 2
    rows = []
    if not arguments.json:
        print(_HEADER, flush=True)
    for row in verify(available):
        rows.append(row)
        if not arguments.json:
            print(row, flush=True)
    missing = {name: reason for name, reason in reasons.items() if reason}
    wrong = any(row.wrong for row in rows)
    if arguments.json:
        print(
            json.dumps(
                {"right": not wrong, "rows": [row.as_json() for row in rows], "not_available": missing}, indent=2
            )
        )
    else:
        for name, reason in missing.items():
            print(f"{name:<9}  not available: {reason}")
        print("A value is wrong." if wrong else "Every value is right.")
    return int(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hra_kernels.verify")
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
