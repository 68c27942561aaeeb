"""A GPU that is not there: `with pretend_gpu():` runs the Python of every `device.type == "cuda"` branch on the CPU.

    HRA_BACKEND=reference python -m tests.bench.pretend_gpu layer --shapes 16x32x32    the benchmark's command line

Every tensor says that it is on the GPU, but for what was made on the host or brought there; torch.cuda answers like an
H100. Refused as on a GPU: operands on two devices, a host's generator for a GPU's tensor and, while a graph is
captured, waiting for the GPU. Times, memory and graphs mean nothing. A tensor whose Python object was lost on the way
(one that autograd saved, a parameter made of a host's tensor) counts as the GPU's: what is refused is wrong, what
passes may be.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hra_kernels import operators, ops

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)
_TO_HOST = {"cpu", "numpy"}
_WAITING = {
    "item",
    "tolist",
    "nonzero",
    "equal",
    "allclose",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
} | _TO_HOST
_ACROSS_DEVICES = {"_has_compatible_shallow_copy_type", "copy_", "__getitem__", "__setitem__", "__set__", "to"}
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 * 2**30,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    major=9,
    minor=0,
)


def _is_on_host(tensor: Tensor) -> bool:
    return hasattr(tensor, "made_on_host")


def _put(tensor: Tensor, on_host: bool) -> None:
    if on_host:
        tensor.made_on_host = True
    elif _is_on_host(tensor):
        del tensor.made_on_host


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


class _Devices(TorchFunctionMode):
    """Runs everything on the CPU and keeps count of what a GPU machine would have on its host."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing = self.waiting_is_an_error = False

    def wait(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.waiting_is_an_error:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, args, kwargs = getattr(function, "__name__", ""), list(args), dict(kwargs or {})
        if name == "__get__":
            found = function(*args, **kwargs)
            if isinstance(found, Tensor) and _is_on_host(args[0]):
                _put(found, on_host=True)
            return found
        given = _tensors([args, list(kwargs.values())])
        if name not in _ACROSS_DEVICES and len({_is_on_host(tensor) for tensor in given if tensor.dim()}) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got cuda:0 and cpu")
        target = kwargs.get("device")
        for i, value in enumerate(args):
            if isinstance(value, torch.device) or (name == "to" and isinstance(value, str)):
                target, args[i] = value, HOST
        if kwargs.get("device") is not None:
            kwargs["device"] = HOST
        if name == "to" and len(given) == 2:
            target = HOST if _is_on_host(given[1]) else GPU
        if name in _TO_HOST:
            target = HOST
        to_host = all(map(_is_on_host, given)) if target is None else torch.device(target).type == "cpu"
        if not to_host and not given and not getattr(kwargs.get("generator"), "on_gpu", True):
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
        moves = bool(given) and target is not None and to_host != _is_on_host(given[0])
        counts = name == "repeat_interleave" and len(given) == 2 and "output_size" not in kwargs
        if moves or counts or (name in _WAITING and not all(map(_is_on_host, given))):
            self.wait(name)
        if name == "tensor" and not to_host:
            self.wait("a copy from the host")
        result = function(*args, **kwargs)
        if moves and isinstance(result, Tensor):
            result = result.view_as(result)  # another object: where it was, the given one still is
        for tensor in _tensors(result):
            if not any(tensor is one for one in given):
                _put(tensor, to_host)
        return result


class _Generator(torch.Generator):
    def __new__(cls, device: object = HOST) -> "_Generator":
        generator = super().__new__(cls, HOST)
        generator.on_gpu = str(device).startswith("cuda")
        return generator


class _Stream:
    stream_id = cuda_stream = 0

    def __init__(self, devices: _Devices | None = None) -> None:
        self.devices = devices

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def is_capturing(self) -> bool:
        return self.devices.capturing


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


class _Graph:
    def replay(self) -> None:
        time.sleep(1e-4)


class _Watched:
    """A backend whose Python is watched too: below `torch.ops` no mode is active."""

    def __init__(self, backend: object, devices: _Devices) -> None:
        self.backend, self.devices = backend, devices

    def __getattr__(self, name: str):
        function = getattr(self.backend, name)

        def call(*args, **kwargs):
            with self.devices:
                return function(*args, **kwargs)

        return call


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    devices, choose, engine = _Devices(), ops.choose, torch.autograd._engine_run_backward
    stream = _Stream(devices)

    @contextlib.contextmanager
    def capture(graph: _Graph) -> Iterator[None]:
        devices.capturing = True
        try:
            yield
        finally:
            devices.capturing = False

    def run_backward(*args, **kwargs):
        with devices:  # autograd's functions are in Python, and no mode is active below `backward`
            return engine(*args, **kwargs)

    def set_sync_debug_mode(mode: str) -> None:
        devices.waiting_is_an_error = mode == "error"

    stubs = {"Stream": _Stream, "CUDAGraph": _Graph, "Event": _Event, "graph": capture}
    stubs |= {"set_sync_debug_mode": set_sync_debug_mode, "is_current_stream_capturing": lambda: devices.capturing}
    stubs |= {
        "synchronize": lambda device=None: devices.wait("synchronize"),
        "current_stream": lambda device=None: stream,
    }
    stubs |= dict.fromkeys(("stream", "device"), lambda chosen: contextlib.nullcontext())
    stubs |= dict.fromkeys(("_sleep", "reset_peak_memory_stats"), lambda *_: None)
    stubs |= dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda device=None: 0)
    stubs |= {"is_available": lambda: True, "get_device_properties": lambda device=None: H100}
    stubs |= {"get_device_name": lambda device=None: H100.name, "get_device_capability": lambda device=None: (9, 0)}
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        # a PyTorch built for CUDA, as optimizers ask, whether this one is or not
        built = {"current_accelerator": lambda check_available=False: GPU, "current_stream": lambda device=None: stream}
        stack.enter_context(mock.patch.multiple(torch.accelerator, **built))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        place = property(lambda tensor: HOST if _is_on_host(tensor) else GPU)
        stack.enter_context(mock.patch.object(Tensor, "device", place))
        stack.enter_context(mock.patch.object(Tensor, "is_cuda", property(lambda tensor: not _is_on_host(tensor))))
        for module in (ops, operators):
            watched = lambda *key, **of: _Watched(choose(*key, **of), devices)  # noqa: E731
            stack.enter_context(mock.patch.object(module, "choose", watched))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        stack.enter_context(devices)
        yield


if __name__ == "__main__":
    from bench import __main__ as bench
    from bench import networks, providers, timing

    # what is imported under the pretence would keep it
    providers.BY_NAME["ours"].build_model(networks.MODELS["llama-tiny"].build(), ["q_proj"], 2)
    timing.WARM_UP_S = 0.01
    with pretend_gpu():
        sys.exit(bench.main([*sys.argv[1:], "--device", "cuda"]))
