"""How time and memory are taken.

Time    Every variant is warmed up, then measured in the rounds of `hra_kernels.measuring.stopwatch`.
Inputs  are made before; parameters are touched (the sign of their values changes, and so their version) before every
        call, outside the clock, so that nothing computed from parameters can be carried from one call to the next: each
        call is the first micro-batch after an optimizer step.
GPU     Several input sets, together at least twice the L2 cache, are cycled through. All of them are captured in one
        CUDA graph; what waits for the GPU, or cannot be captured for another reason, is queued behind a sleeping kernel
        so that the host's gaps are not timed. `host_seconds` is the other number: plain calls from Python, with the
        host's work.
Memory  is the peak of what the call itself allocates (on a CPU as the profiler sees PyTorch's allocator), and what
        autograd keeps between forward and backward.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_kernels.measuring.stopwatch import synchronize

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
    """A `Variant.touch` that gives each parameter other values, of the same magnitude, and a new version."""
    parameters = list(parameters)

    def touch() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.neg_()  # a version alone does not tell who compares values (`factor_cache`, on a CPU)

    return touch


# --- clocks: turn a variant into a function that takes one sample, in seconds per call -------------------------------


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
    """Seconds per call from Python, host overhead included, kernels overlapping with it as in a real loop."""

    def sample(calls: int) -> float:
        variant.touch()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            variant.run(0)
        synchronize(device)
        return (time.perf_counter() - start) / calls

    first = sample(1)
    if first > HOST_SAMPLE_S:
        return first
    calls = min(20, math.ceil(HOST_SAMPLE_S / first))
    return statistics.median(sample(calls) for _ in range(5))


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many input sets to cycle through: on a GPU enough to flush its L2, on a CPU one.

    On a CPU a layer's input has just been written by the layer before it, and is as warm as the caches allow.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, math.ceil(2 * cache / max(bytes_each, 1))))


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
