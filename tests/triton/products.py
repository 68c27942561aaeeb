"""Products of matrices in Triton's first intermediate code: whether one takes the transpose of another's result.

Triton 3.4.0 to 3.7.0 gave wrong numbers on Hopper for `tl.dot(tl.trans(a), b)` where a is itself a product, held in
registers. What has been loaded may be transposed.
"""

import re
from collections.abc import Iterable

DEFINITION = re.compile(r"(%\w+)(?::(\d+))? = \"?([\w.]+)\"?(.*)")
NAME = re.compile(r"%\w+(?:#\d+)?")


class _Values:
    """What each value is defined by and made of. A name may be used again once its region is closed."""

    def __init__(self):
        self.operations: list[str] = []
        self.made_of: list[set[int]] = []
        self.regions: list[dict[str, int]] = [{}]

    def define(self, name: str, operation: str, operands: Iterable[str] = ()) -> int:
        self.operations.append(operation)
        self.made_of.append(self.of(operands))
        self.regions[-1][name] = len(self.operations) - 1
        return self.regions[-1][name]

    def of(self, names: Iterable[str]) -> set[int]:
        found = ([region[name] for region in self.regions[::-1] if name in region] for name in names)
        return {values[0] for values in found if values}

    def reached(self, starts: set[int], operation: str) -> set[int]:
        """Values of this operation that others are made of."""
        seen, left = set(), list(starts)
        while left:
            value = left.pop()
            if value not in seen:
                seen.add(value)
                left += self.made_of[value]
        return {value for value in seen if self.operations[value] == operation}


def of_transposed_products(ttir: str) -> list[str]:
    """The products whose first operand is the transpose of another one's result; memory is not looked through."""
    values, products = _Values(), []
    owners: list[list[set[int]]] = []  # of each open region: for each value that it yields, what becomes of it
    for line in ttir.splitlines():
        text, owner = line.strip(), []
        if text.startswith("}"):
            values.regions.pop()
            owner = owners.pop()
        if text.startswith("scf.yield"):
            for value, targets in zip(NAME.findall(text), owners[-1], strict=False):
                for target in targets:
                    values.made_of[target] |= values.of([value])
        defined = DEFINITION.match(text)
        if defined:
            name, count, operation, rest = defined.groups()
            names = [f"{name}#{k}" for k in range(int(count))] if count else [name]
            carried = (
                re.findall(r"(%\w+) = (%[\w#]+)", rest.partition("iter_args")[2]) if operation == "scf.for" else []
            )
            operands = () if operation in ("tt.load", "scf.for") else NAME.findall(rest)
            owner = [{values.define(result, operation, operands)} for result in names]
            if operation == "tt.dot":
                products.append((text, values.of(operands[:1])))
        if text.endswith("{"):
            values.regions.append({})
            owners.append(owner)
            if defined:
                for (argument, first), targets in zip(carried, owner, strict=False):
                    initial = values.of([first])
                    targets.add(values.define(argument, "argument"))
                    values.made_of[values.regions[-1][argument]] |= initial
    return [
        text
        for text, first in products
        if any(values.reached({t}, "tt.dot") for t in values.reached(first, "tt.trans"))
    ]
