"""Products of matrices in Triton's first intermediate code: whether one takes the transpose of another's result.

Triton 3.4.0 to 3.7.0 gave wrong numbers on Hopper for `tl.dot(tl.trans(a), b)` where a is itself a product, held in
registers. What has been loaded may be transposed.
"""

import re

DEFINITION = re.compile(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
NAME = re.compile(r"%\w+(?:#\d+)?")


def _sources(ttir: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The operation that defines each value, and the values that it is made of; memory is not looked through."""
    operations: dict[str, str] = {}
    made_of: dict[str, set[str]] = {}
    open_regions: list[tuple[str, list[str]]] = []  # (what the region yields to, its carried values)
    for line in ttir.splitlines():
        defined = DEFINITION.match(line)
        result, carried = "", []
        if defined:
            result, operation, rest = defined.groups()
            operations[result] = operation
            if operation == "scf.for":
                pairs = re.findall(r"(%\w+) = (%[\w#]+)", rest.partition("iter_args")[2])
                carried = [name for name, _ in pairs]
                for name, first in pairs:
                    made_of.setdefault(name, set()).add(first)
            elif operation != "tt.load":
                made_of.setdefault(result, set()).update(NAME.findall(rest))
        elif line.lstrip().startswith("scf.yield"):
            result, carried = open_regions[-1]
            for k, value in enumerate(NAME.findall(line)):
                for name in (result, f"{result}#{k}", *carried[k : k + 1]):
                    made_of.setdefault(name, set()).add(value)
            continue
        if line.lstrip().startswith("}"):
            closed = open_regions.pop()
            if "else" in line:
                result, carried = closed
        if line.endswith("{"):
            open_regions.append((result, carried))
    return operations, made_of


def of_transposed_products(ttir: str) -> list[str]:
    """The products whose first operand is the transpose of another one's result."""
    operations, made_of = _sources(ttir)

    def reached(starts: set[str], operation: str) -> set[str]:
        """Values of this operation that others are made of."""
        seen, left = set(), list(starts)
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += made_of.get(name, ())
        return {name for name in seen if operations.get(name) == operation}

    found = []
    for line in ttir.splitlines():
        product = re.match(r"\s*(%\w+) = tt\.dot (%[\w#]+),", line)
        if product:
            transposes = reached({product[2]}, "tt.trans")
            if any(reached(made_of[transpose], "tt.dot") for transpose in transposes):
                found.append(line.strip())
    return found
