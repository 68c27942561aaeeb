"""The answer of a solution in words, and whether two answers are equal, as the official evaluations decide it."""

import re
from fractions import Fraction
from typing import Literal

MARK = "The answer is:"
Kind = Literal["number", "expression"]
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+")


def answer_of(solution: str) -> str | None:
    """What stands behind the last mark, on its line, without a closing dot; None without a mark."""
    if MARK not in solution:
        return None
    lines = solution.rsplit(MARK, 1)[1].strip().splitlines()
    return lines[0].strip().rstrip(".").strip() if lines else ""


def number_of(text: str | None) -> Fraction | None:
    """The first number in the text, with commas for thousands, a decimal point, or as a fraction a/b."""
    found = _NUMBER.search(text or "")
    if not found:
        return None
    try:
        return Fraction(found.group().replace(",", ""))
    except (ValueError, ZeroDivisionError):  # 1.5/2 is no number of a school book
        return None


def equal(found: str | None, wanted: str, kind: Kind) -> bool:
    """As numbers (GSM8K), or as mathematical expressions by math-verify (MATH); None is never equal.

    Raises:
        ModuleNotFoundError: an expression, and math-verify is not installed.
    """
    if found is None:
        return False
    if kind == "number":
        number = number_of(found)
        return number is not None and number == number_of(wanted)
    if "".join(found.split()) == "".join(wanted.split()):
        return True
    from math_verify import parse, verify

    return bool(verify(parse(f"${wanted}$"), parse(f"${found}$")))
