"""How methods are timed against one another: shuffled rounds in one process, until the time is up.

Every method is measured in rounds: each round runs each of them once, in an order shuffled anew, so that a disturbance
or a slow drift of the machine hits all of them alike. A ratio is taken within each round and its median reported, with
the 20th and 80th percentile. Methods far slower than the rest sit out most rounds, so that they do not eat the others'
time; how many rounds each ran is reported. A round in which other processes held this one up is repeated.
"""

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Wait for what was started on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HeldUp:
    """How long this process was ready to run and was not let, from Linux's counters; elsewhere nothing is seen."""

    DISTURBED = 0.05
    """A round counts as disturbed when its threads together waited, or were stolen from, for more of it than this."""

    def __init__(self) -> None:
        self._last = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        held = 0.0
        for path in Path("/proc/self/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # the thread has ended
                held += int(path.read_text().split()[1]) / 1e9
        stat = Path("/proc/stat")
        if stat.exists():
            held += int(stat.read_text().split()[8]) / os.sysconf("SC_CLK_TCK")  # what the hypervisor gave to others
        return time.perf_counter(), held

    def disturbed(self) -> bool:
        """Whether it happened since the last call (or since this object was made)."""
        last, self._last = self._last, self._read()
        wall, held = (now - before for now, before in zip(self._last, last, strict=True))
        return held > self.DISTURBED * wall


@dataclass
class Rounds:
    """`taken` is {name: {round: seconds}}; `disturbed` of the rounds had other processes in them all the same."""

    taken: dict[str, dict[int, float]]
    rounds: int
    repeated: int
    disturbed: int


def interleave(
    samplers: dict[str, Callable[[], float]],
    floor: str | None,
    seconds: float,
    min_rounds: int | None = None,
    max_rounds: int = 200,
    advance: Callable[[float], None] = lambda fraction: None,
) -> Rounds:
    """Measure in shuffled rounds over about `seconds`; the floor runs in every round, everything in at least 5, or in
    3 where one call takes over a second.

    A round disturbed by other processes is thrown away and repeated, until as many have been repeated as are wanted or
    time is up.
    """
    cost = {}
    for name, sample in samplers.items():
        start = time.perf_counter()
        if not hasattr(sample, "cost"):
            sample()
        cost[name] = getattr(sample, "cost", time.perf_counter() - start)
    share = seconds / max(len(samplers), 1)
    least = {name: min_rounds or (3 if cost[name] > 1 else 5) for name in samplers}
    count = {name: max(least[name], min(max_rounds, int(share / cost[name]))) for name in samplers}
    rounds = max(count.values(), default=0)
    if floor in count:
        count[floor] = rounds
    order = random.Random(0)
    result = Rounds({name: {} for name in samplers}, rounds, 0, 0)
    deadline = time.perf_counter() + 1.5 * seconds
    clock = HeldUp()
    for k in range(rounds):
        # a variant with fewer rounds than the rest takes part at even distances
        due = [name for name in samplers if (k + 1) * count[name] // rounds > k * count[name] // rounds]
        while True:
            sampled = {name: samplers[name]() for name in order.sample(due, len(due))}
            disturbed = clock.disturbed()
            if not disturbed or result.repeated == rounds or time.perf_counter() > deadline:
                break
            result.repeated += 1
        result.disturbed += disturbed
        for name, value in sampled.items():
            result.taken[name][k] = value
        advance((k + 1) / rounds)
    return result


def summary(values: Iterable[float]) -> dict:
    """{median, p20, p80, rounds}."""
    values = sorted(values)
    pick = lambda q: values[round(q * (len(values) - 1))]  # noqa: E731
    return {"median": statistics.median(values), "p20": pick(0.2), "p80": pick(0.8), "rounds": len(values)}


def ratio_to_floor(taken: dict[int, float], floor: dict[int, float]) -> dict:
    """`summary` of the ratios within each round."""
    return summary(seconds / floor[k] for k, seconds in taken.items())
