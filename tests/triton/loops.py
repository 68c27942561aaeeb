"""What the steady loops of compiled kernels do: read in Triton's own representation and in the machine code."""

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies matrices, as Triton hands it to LLVM."""

    outstanding: tuple[int, ...]
    """After each wait, the groups of copies that may still be on their way."""
    copies: int
    """Tiles copied to shared memory while the loop goes on."""
    blocking: tuple[str, ...]
    """Types of the tiles that are loaded where they are used."""
    conversions: tuple[str, ...]
    """Types of the float32 tiles that are rounded to 16 bits."""

    def problems(self) -> list[str]:
        """Why the loop waits for memory; empty where it does not."""
        found = []
        if 0 in self.outstanding:
            found.append("a wait for all copies")
        if not self.copies:
            found.append("no asynchronous copy")
        return found + [f"a load that blocks: {kind}" for kind in self.blocking]


def _innermost(ttgir: str) -> list[list[str]]:
    """The lines of each `scf.for` that holds no other."""
    lines, found, open_loops = ttgir.splitlines(), [], []
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            open_loops = [(start, depth, False) for start, depth, _ in open_loops] + [(number, indent, True)]
        elif open_loops and line.lstrip().startswith("}") and indent == open_loops[-1][1]:
            start, _, innermost = open_loops.pop()
            if innermost:
                found.append(lines[start:number])
    return found


def steady_loops(ttgir: str) -> list[Loop]:
    """The innermost loops that multiply matrices, in their order."""
    loops = []
    for lines in _innermost(ttgir):
        body = "\n".join(lines)
        if re.search(r"\btt\.dot\b|warp_group_dot\b|tc_gen5_mma\b", body):
            loops.append(
                Loop(
                    tuple(int(n) for n in re.findall(r"async_wait\b.*?num = (\d+)", body)),
                    len(re.findall(r"\bttg\.async_copy_global_to_local\b", body)),
                    tuple(re.findall(r"= tt\.load\b.*?: tensor<((?:\d+x){2}!tt\.ptr<\w+>)", body)),
                    tuple(re.findall(r"arith\.truncf\b.*?: tensor<((?:\d+x)+f32)\b", body)),
                )
            )
    return loops


def machine_loops(sass: str) -> list[Counter]:
    """Instructions by name of each innermost loop that multiplies matrices, of `nvdisasm -c`."""
    labels, code, spans = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)(.*)", line):
            code.append(instruction.group(1))
            target = re.search(r"\((\.L_x_\d+)\)", instruction.group(2))
            if instruction.group(1).startswith("BRA") and target and target.group(1) in labels:
                spans.append((labels[target.group(1)], len(code)))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    counts = [Counter(code[start:end]) for start, end in inner]
    return [count for count in counts if any(re.match(r"H\w*MMA|UTC\w*MMA", name) for name in count)]
