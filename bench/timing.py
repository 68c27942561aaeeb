"""How time and memory are taken.

Time    Every variant is warmed up, then measured in rounds: each round runs each variant once, in an order shuffled
        anew, so that a disturbance or a slow drift of the machine hits all of them alike. A ratio is taken within each
        round and its median reported, with the 20th and 80th percentile. Variants far slower than the rest sit out
        most rounds, so that they do not eat the others' time; how many rounds each ran is reported. A round in which
        other processes held this one up is repeated.
Inputs  are made before; parameters are touched (their version changes, their values do not) before every call, outside
        the clock, so that nothing computed from parameters can be carried from one call to the next: each call is the
        first micro-batch after an optimizer step.
GPU     Several input sets, together at least twice the L2 cache, are cycled through. All of them are captured in one
        CUDA graph; what waits for the GPU, or cannot be captured for another reason, is queued behind a sleeping kernel
        so that the host's gaps are not timed. `host_seconds` is the other number: plain calls from Python, with the
        host's work.
Memory  is the peak of what the call itself allocates (on a CPU as the profiler sees PyTorch's allocator), and what
        autograd keeps between forward and backward.
"""

import contextlib
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WARM_UP_S = 0.2
MIN_SAMPLE_S = 1e-3
SLEEP_CYCLES = 20_000_000
"""About 10 ms of GPU time: long enough to queue the calls of one sample behind it."""
HOST_SAMPLE_S = 0.1
"""A call that takes longer is not waiting for the host."""


@dataclass
class Variant:
    """Something to time: `run(i)` works on input set i, `touch()` comes before it, outside the clock."""

    run: Callable[[int], object]
    touch: Callable[[], None] = lambda: None


def touch_parameters(parameters: Iterable[Tensor]) -> Callable[[], None]:
    """A `Variant.touch` that gives each parameter a new version and the same values."""
    parameters = list(parameters)

    def touch() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0)

    return touch


# --- clocks: turn a variant into a function that takes one sample, in seconds a call ---------------------------------


def cpu_sampler(variant: Variant, sets: int) -> Callable[[], float]:
    def once(i: int) -> float:
        variant.touch()
        start = time.perf_counter()
        variant.run(i)
        return time.perf_counter() - start

    spent, fastest = 0.0, math.inf
    for i in range(1000):
        seconds = once(i % sets)
        spent, fastest = spent + seconds, min(fastest, seconds)
        if spent > WARM_UP_S:
            break
    calls = sets * max(1, math.ceil(MIN_SAMPLE_S / fastest / sets))
    sample = lambda: sum(once(i % sets) for i in range(calls)) / calls  # noqa: E731
    sample.cost = calls * fastest
    return sample


def _waits_for_gpu(run: Callable[[], object]) -> bool:
    """Whether `run` brings a value to the host. A capture must not find out: a broken one leaves PyTorch's stream,

    allocator and random numbers in it, for all that comes after in this process.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """`run`, which has run before, as a graph; None where it cannot be one."""
    if _waits_for_gpu(run):
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        # the outer context restores the stream, which torch.cuda.graph does not where ending the capture fails
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def cuda_sampler(variant: Variant, sets: int) -> Callable[[], float]:
    def all_sets() -> None:
        for i in range(sets):
            variant.run(i)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP_S:
            variant.touch()
            all_sets()
            torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    variant.touch()
    graph = _captured(all_sets)
    replay = graph.replay if graph else all_sets

    def timed(passes: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        variant.touch()
        torch.cuda.synchronize()
        if not graph:
            torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        for _ in range(passes):
            replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / passes / sets

    passes = max(1, math.ceil(MIN_SAMPLE_S / max(timed(1) * sets, 1e-7)))
    sample = lambda: timed(passes)  # noqa: E731
    sample.method = "graph" if graph else "queued"
    return sample


def sampler(variant: Variant, device: torch.device, sets: int = 1) -> Callable[[], float]:
    return (cuda_sampler if device.type == "cuda" else cpu_sampler)(variant, sets)


def wall_sampler(variant: Variant, device: torch.device) -> Callable[[], float]:
    """Samples of one call as a training loop sees it: host work included, the device drained at the end."""
    if device.type != "cuda":
        return cpu_sampler(variant, 1)
    for _ in range(3):
        variant.run(0)
    torch.cuda.synchronize()

    def sample() -> float:
        variant.touch()
        torch.cuda.synchronize()
        start = time.perf_counter()
        variant.run(0)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample


def host_seconds(variant: Variant, device: torch.device) -> float:
    """Seconds a call from Python, host overhead included, kernels overlapping with it as in a real loop."""

    def sample(calls: int) -> float:
        variant.touch()
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            variant.run(0)
        _synchronize(device)
        return (time.perf_counter() - start) / calls

    first = sample(1)
    if first > HOST_SAMPLE_S:
        return first
    calls = min(20, math.ceil(HOST_SAMPLE_S / first))
    return statistics.median(sample(calls) for _ in range(5))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many input sets to cycle through: on a GPU enough to flush its L2, on a CPU one.

    On a CPU a layer's input has just been written by the layer before it, and is as warm as the caches allow.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, math.ceil(2 * cache / max(bytes_each, 1))))


# --- rounds -----------------------------------------------------------------------------------------------------------


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


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory `run`, which has run before, holds at once on top of what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_storages(forward: Callable[[], object], without: Iterable[Tensor]) -> dict[int, int]:
    """{address: bytes} of the storages autograd keeps for backward, without those of the tensors in `without`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    sizes: dict[int, int] = {}
    kept = []  # holds every packed tensor, so that no storage is freed and its address seen twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sizes
