"""Constants that stand in Python, C++ and Triton alike: the copies say what `reference` and the backends say."""

import math
import re
from pathlib import Path

import pytest
import torch

from hra_kernels import reference
from hra_kernels.backends import cpu, cuda, triton_reflect

ROOT = Path(__file__).resolve().parents[2]
TRITON = "hra_kernels/backends/triton_factor_kernels.py"
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the kernels' sources beside the tests")


def read(path: str, pattern: str) -> list[float]:
    """The numbers in the groups of `pattern`, which must fit one place in the file."""
    text = (ROOT / path).read_text()
    (match,) = re.finditer(pattern, text)
    return [float.fromhex(number) if "0x" in number else float(number) for number in match.groups()]


def threshold(dtype: torch.dtype) -> int:
    """The smallest exponent of a norm that counts, where `reference` counts it and not the next."""
    exponent = math.frexp(torch.finfo(dtype).tiny * 2.0**20)[1]
    norms = torch.tensor([[2.0 ** (exponent - 1)], [2.0 ** (exponent - 2)]], dtype=dtype)
    assert reference._norm_exponent(norms)[1].tolist() == [True, False]
    return exponent


def test_gram_schmidt_tolerance():
    exponent = math.log2(reference.GS_RTOL)
    assert read("csrc/cpu/wy.cpp", r"kGsRtol = (0x1p-\d+);") == [reference.GS_RTOL]
    assert read(TRITON, r"GS_RTOL_SQUARED = tl.constexpr\(2\.0\*\*(-\d+)\)") == [2 * exponent]


def test_smallest_norm_that_counts():
    pattern = r"kThreshold = sizeof\(C\) == sizeof\(float\) \? (-\d+) : (-\d+);"
    assert read("csrc/cpu/wy_columns.h", pattern) == [threshold(torch.float32), threshold(torch.float64)]
    assert read(TRITON, r"MIN_EXPONENT = tl.constexpr\((-\d+)\)") == [threshold(torch.float32)]


def test_largest_ranks_and_dtype_codes():
    text = (ROOT / "csrc/hra.h").read_text()
    assert re.findall(r"kMaxRank = (\d+)[;,]", text) == [str(b.BACKEND.max_rank) for b in (cpu, cuda)]
    names = {"float32": "Float32", "float64": "Float64", "bfloat16": "BFloat16", "float16": "Float16"}
    for codes in (cpu._CODES, cuda._CODES):
        for dtype, code in codes.items():
            assert f"k{names[str(dtype).removeprefix('torch.')]} = {code}" in text


def test_scaled_v_fits_float16():
    """v is below 1 in size; Triton asks for less than 128, and scales it for float16: the largest stays finite."""
    assert 128 * triton_reflect.v_scale(torch.float16) <= 2.0**15 < torch.finfo(torch.float16).max
