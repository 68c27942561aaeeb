"""Hopper's asynchronous matrix products (wgmma) in machine code: whether anything writes registers that they still use.

A wgmma may take its first operand from registers. It runs on while later instructions do, until a WARPGROUP.DEPBAR has
waited for it, and until then nothing may write those registers, nor its result's. Releases of Triton, and NVIDIA's
assembler before CUDA 13.3, have broken that where the products of several steps overlap: wrong numbers on H100 and H20.
What is required here is more than what failed there: nothing writes before the wait, whatever the hardware forgives.
"""

import re

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
NO_RESULT = ("ST", "BRA", "BAR", "WARP", "MEMBAR", "FENCE", "EXIT", "RED", "SYNCS", "CCTL", "LDGSTS", "LDGDEPBAR",
             "DEPBAR", "NOP", "UTMA", "ERRBAR", "BSYNC", "BSSY", "BREAK", "KILL", "RET", "CALL")  # fmt: skip


def _registers(operand: str, count: int) -> set[int]:
    found = re.match(r"-?\|?R(\d+)\b", operand)
    return set(range(int(found[1]), int(found[1]) + count)) if found else set()


def _written(opcode: str, operands: list[str]) -> set[int]:
    """Registers that an instruction other than a wgmma writes."""
    if opcode.startswith(NO_RESULT):
        return set()
    wide = {"128": 4, "64": 2}.get(next((part for part in opcode.split(".") if part in ("128", "64")), ""), 1)
    if ".WIDE" in opcode or opcode.startswith(("DADD", "DMUL", "DFMA", "I2F.F64", "F2F.F64")):
        wide = 2
    if opcode.startswith("LDSM"):
        wide = int(opcode[-1]) if opcode[-1].isdigit() else 1
    if opcode.startswith("HMMA"):
        wide = 4
    return _registers(operands[0], wide)


class _Running:
    """The wgmma that nothing has waited for: their registers, in groups, the oldest first."""

    def __init__(self):
        self.groups: list[set[int]] = []
        self.open: set[int] = set()  # of the group that no gsb0 has closed

    def registers(self) -> set[int]:
        return self.open.union(*self.groups)

    def step(self, opcode: str, operands: list[str]) -> set[int]:
        """What an instruction writes of the registers that are in use."""
        if opcode.startswith("HGMMA"):
            rows, cols, _ = map(int, re.search(r"(\d+)x(\d+)x(\d+)", opcode).groups())
            self.open |= _registers(operands[0], rows * cols // 128) | _registers(operands[1], 4)
            if operands[-1] == "gsb0":
                self.groups, self.open = [*self.groups, self.open], set()
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            allowed = int(operands[1], 16)
            self.groups = self.groups[-allowed:] if allowed else []
        else:
            return _written(opcode, operands) & self.registers()
        return set()


def overwritten(sass: str) -> list[str]:
    """The instructions, as `nvdisasm -c` prints them, that write a register which a wgmma before them may still use.

    A loop's body is read a second time with what runs at its end.
    """
    lines = sass.splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    found: dict[str, None] = {}
    running = _Running()

    def read(first: int, last: int, follow: bool) -> None:
        for i in range(first, last):
            parsed = INSTRUCTION.match(lines[i])
            if not parsed:
                continue
            opcode, operands = parsed[1], [word.strip() for word in parsed[2].split(",")]
            if running.step(opcode, operands):
                found[" ".join(lines[i].split())] = None
            target = re.search(r"\.L\w+", parsed[2]) if opcode == "BRA" else None
            if follow and target and labels.get(target[0], i) < i and running.registers():
                read(labels[target[0]], i, False)

    read(0, len(lines), True)
    return list(found)
