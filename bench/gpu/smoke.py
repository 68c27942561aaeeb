"""One case of one kernel family against float64, in a process that may hang or crash alone: for `bench.gpu.run`."""

import argparse
import sys

import torch

from bench import op
from hra_kernels import ops
from hra_kernels.testing.cases import Case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("rank", type=int)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    case = Case(130, 1000, options.rank)
    inputs = op.Inputs(case, torch.bfloat16, torch.device(options.device), seed=0)
    with ops.use_backend(options.backend):
        errors, wrong = op.Check(inputs, case)()
    print(wrong or ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
