"""A base layer's weight as merging and exporting see it: floating-point rows (N, ...), whatever the layer stores.

PlainWeight       nn.Linear, convolutions, nn.Embedding; transformers' Conv1D, whose weight is transposed
ShardedWeight     the same as DTensors, under FSDP2 or tensor parallelism
QuantizedWeight   what PEFT's quantization backends can dequantize and requantize: bitsandbytes, HQQ, torchao
ParameterWeight   a parameter of any module, such as the fused experts of a mixture: (N, D), or one (N, D) per expert

And where a weight is between two forwards: accelerate keeps it elsewhere (`cpu_offload`, `disk_offload`, `device_map`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hra_kernels.partition import is_whole
from hra_kernels.peft.sharded import is_sharded

try:
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend
    from peft.utils.quantization_utils import QuantizationBackend
except ImportError:  # PEFT 0.19
    QuantizationBackend = resolve_quantization_backend = None

MERGEABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**22
"""Elements in a block of rows: 16 MiB of float32."""


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads this module's own parameters around its forward, and only then."""
    # vars finds it missing sooner than getattr; PyTorch 2.8 compiles no vars
    hook = getattr(module, "_hf_hook", None) if torch.compiler.is_compiling() else vars(module).get("_hf_hook")
    return getattr(hook, "offload", False)


def runs_on(module: nn.Module) -> torch.device | None:
    """The device that accelerate loads this module's parameters to; None where it does not."""
    return torch.device(module._hf_hook.execution_device) if is_offloaded(module) else None


def loaded(module: nn.Module) -> AbstractContextManager[None]:
    """The module's own parameters in memory; they go back afterwards. For use of parameters outside a forward."""
    # no generator where nothing is to be done: PyTorch 2.6 cannot trace one
    return _loaded(module) if is_offloaded(module) else nullcontext()


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, torch.empty(0))


def _no_torchao_configuration() -> None:
    raise NotImplementedError("the torchao configuration of the model is not known")


def quantization_of(base: nn.Module, requantize: Callable[[], Any] | None = None) -> "QuantizationBackend | None":
    """PEFT's quantization backend for a base layer; None where the layer is not quantized, or PEFT has none that runs.

    Args:
        requantize: torchao only, and only to merge: the model's `TorchAoConfig.get_apply_tensor_subclass`.
    """
    if resolve_quantization_backend is None or _is_no_format(base):
        return None
    try:
        return resolve_quantization_backend(base, get_apply_tensor_subclass=requantize or _no_torchao_configuration)
    except ImportError:  # PEFT imports what another release of the package had: 0.20 does, with torchao 0.18
        return None


def _is_no_format(base: nn.Module) -> bool:
    """Whether nothing in this layer is quantized: then PEFT need not import every package that could have done it."""
    weight = getattr(base, "weight", None)
    kinds = nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, Conv1D
    return isinstance(base, kinds) and type(weight) is nn.Parameter and weight.dtype in MERGEABLE


def is_torchao(base: nn.Module) -> bool:
    """Whether torchao quantized this layer."""
    return type(getattr(base, "weight", None)).__module__.startswith("torchao.")


def torchao_configuration(model: nn.Module) -> Callable[[], Any] | None:
    """How a model that transformers loaded with a `TorchAoConfig` was quantized; None for any other."""
    if resolve_quantization_backend is None:
        return None
    return get_quantization_kwargs(model).get("get_apply_tensor_subclass")


def why_not_mergeable(base: nn.Module, requantize: Callable[[], Any] | None = None) -> str | None:
    """Why a base layer's weight cannot be merged into, or None where it can; `requantize` as in `quantization_of`."""
    backend = quantization_of(base, requantize)
    weight = getattr(base, "weight", None)
    if getattr(weight, "is_meta", False):
        return "its base weight is not loaded (meta device)"
    if backend is not None:
        if not backend.supports_merge:
            return f"its base layer is quantized with {backend.backend_name}, whose weights PEFT cannot write"
        if is_torchao(base) and requantize is None:
            return (
                "its torchao weight can be quantized again only with the model's own configuration: load the model "
                "through transformers with quantization_config=TorchAoConfig(...)"
            )
        return None
    if isinstance(weight, nn.Parameter) and is_plain(weight) and not is_whole(weight):
        return (
            "its base weight is partitioned: gather it around the merge, with FSDP.summon_full_params (FSDP1) or "
            "deepspeed.zero.GatheredParameters (DeepSpeed ZeRO-3)"
        )
    if is_sharded(base) and weight.dtype not in MERGEABLE:
        return f"its base weight is a DTensor of {weight.dtype}"
    if not isinstance(weight, Tensor):
        return f"its base layer is a {type(base).__name__} without a weight tensor (quantized?)"
    if not is_sharded(base) and not is_plain(weight):
        return f"its base weight is a {type(weight).__name__} of {weight.dtype} (quantized?)"
    if has_own_forward(base):
        return (
            f"its base layer is a {type(base).__name__} with a forward of its own, in which reflecting the weight may "
            "be another thing than reflecting the input, on which the adapter was trained"
        )
    return None


def has_own_forward(base: nn.Module) -> bool:
    """Whether a linear layer or an embedding runs another forward than its kind's: then W Q there may mean anything.

    Not counted are accelerate's hook, which only moves tensors, and an embedding that scales its output, as its
    attribute `embed_scale` says. Quantized layers, whose packages know their weight, are not to be asked about, nor
    convolutions, where the adapter itself is W Q in their own forward.
    """
    kind = next((kind for kind in (nn.Linear, Conv1D, nn.Embedding) if isinstance(base, kind)), None)
    if kind is None or (kind is nn.Embedding and hasattr(base, "embed_scale")):
        return False
    forward = getattr(base, "_old_forward", base.forward)
    return getattr(forward, "__func__", None) is not kind.forward


def is_plain(weight: Any) -> bool:
    """Whether this is a floating-point tensor; a quantized weight is another kind of tensor, or one of integers."""
    return isinstance(weight, Tensor) and type(weight.detach()) is Tensor and weight.dtype in MERGEABLE


def readable_weight(layer: HRALayer, where: str, requantize: Callable[[], Any] | None = None) -> "Weight | None":
    """The weight of a layer's base layer, or None where it cannot be had as floating-point rows.

    Args:
        layer: PEFT puts another base layer into it where a format wants that (HQQ).
        where: what errors call the layer.
        requantize: as in `quantization_of`.
    """
    base = layer.get_base_layer()
    backend = quantization_of(base, requantize)
    if backend is not None:
        return QuantizedWeight(layer, backend, where) if backend.supports_merge else None
    weight = getattr(base, "weight", None)
    if is_sharded(base):
        return ShardedWeight(weight, isinstance(base, Conv1D), where)
    return PlainWeight(weight, isinstance(base, Conv1D), where) if is_plain(weight) else None


class Weight:
    """What the kinds of weights share: `dtype` and `device` of the rows, and `where`, what errors call the layer."""

    def __init__(self, dtype: torch.dtype, device: torch.device, where: str) -> None:
        self.dtype, self.device, self.where = dtype, device, where

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of the rows (N, ...), or of vectors (D, r), that belong to one chain each."""
        return [tensor]


class PlainWeight(Weight):
    """A floating-point parameter: (N, ...), or `transposed`, as in transformers' Conv1D (D, N). Written in place."""

    def __init__(self, parameter: Tensor, transposed: bool, where: str) -> None:
        super().__init__(parameter.dtype, parameter.device, where)
        self._weight, self._transposed = parameter, transposed

    def read(self, kept: Tensor | None = None) -> Tensor:
        """(N, ...), no copy; those of `kept`, which `write` gave, where it is given."""
        weight = self._weight.detach() if kept is None else kept.to(self.device)
        return weight.mT if self._transposed else weight

    def write(self, rows: Tensor) -> Tensor:
        """Put rows in, and return what `restore` takes to bring the bits before back.

        Args:
            rows: (N, ...) of the weight's dtype, in memory of their own, where the bits before are kept from now on.
        """
        with self._writable():
            now = self.read()
            for block in row_blocks(now):
                before = now[block].clone()
                now[block] = rows[block]
                rows[block] = before
        return rows.mT if self._transposed else rows

    def restore(self, kept: Tensor) -> None:
        """Put back what `write` gave, on the device where the weight is now."""
        with self._writable():
            self._weight.detach().copy_(kept)

    def fingerprint(self) -> tuple:
        """Equal for equal bits; writes through `.data` leave no other trace."""
        return fingerprint(self._weight)

    def _writable(self) -> torch.inference_mode:
        return torch.inference_mode(self._weight.is_inference())


class ShardedWeight(PlainWeight):
    """`PlainWeight` as a DTensor. Every rank must come here; each gathers the weight of this layer."""

    def read(self, kept: Tensor | None = None) -> Tensor:
        """(N, ...), whole; those of `kept`, which `write` gave, where it is given."""
        from torch.distributed.tensor import DTensor

        weight = self._weight.detach()
        if kept is not None:
            mesh, placements, shape = weight.device_mesh, weight.placements, weight.shape
            kept = kept.to(self.device)
            weight = DTensor.from_local(kept, mesh, placements, run_check=False, shape=shape, stride=weight.stride())
        whole = weight.full_tensor()
        return whole.mT if self._transposed else whole

    def write(self, rows: Tensor) -> Tensor:
        """rows: (N, ...) of the weight's dtype, the same on every rank. A copy of this rank's shard is returned."""
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = self._weight.device_mesh, self._weight.placements
        whole = rows.mT.contiguous() if self._transposed else rows
        whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        before = self._weight.detach().to_local().clone()
        self.restore(whole.redistribute(placements=placements).to_local())
        return before

    def restore(self, kept: Tensor) -> None:
        """Put back what `write` gave, in place: FSDP2 holds on to the shard's memory."""
        self._weight.detach().to_local().copy_(kept)

    def fingerprint(self) -> tuple:
        """Equal for equal bits, the same on every rank."""
        return fingerprint(self.read())


class ParameterWeight(PlainWeight):
    """A parameter (N, D), or (E, N, D) with a chain for each expert; stored as (E, D, N) where `transposed`."""

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of the rows (N, D), or of the vectors (D, r), of each expert."""
        return tensor.unbind(0) if tensor.dim() == 3 else [tensor]


class QuantizedWeight(Weight):
    """The weight of a quantized linear layer. Whoever changes it by other means while merged is not noticed."""

    def __init__(self, layer: HRALayer, backend: "QuantizationBackend", where: str) -> None:
        base = layer.get_base_layer()
        super().__init__(torch.float32, (base.W_q if hasattr(base, "W_q") else base.weight).device, where)
        self._layer, self._backend = layer, backend

    def read(self, kept: dict[str, Any] | None = None) -> Tensor:
        """(N, D), dequantized, in the dtype that the format dequantizes to; of `kept`, from `write`, where it is given.

        Raises:
            NotImplementedError: the weight has a format that its package cannot dequantize, or is not quantized yet.
        """
        if kept is not None:
            now = self._keep()
            self.restore(kept)
            try:
                return self.read()
            finally:
                self.restore(now)
        base = self._layer.get_base_layer()
        if _is_packed_for_cpu(base):
            base = copy.deepcopy(base)
            unpack_for_cpu(base)
        try:
            return self._backend.get_base_weight(base).detach()
        except Exception as error:
            raise NotImplementedError(
                f"HRA: PEFT's {self._backend.backend_name} backend could not dequantize the weight of "
                f"{self.where} (not quantized yet?): {error}"
            ) from error

    def write(self, rows: Tensor) -> dict[str, Any]:
        """Quantize rows (N, D) as the layer's weight was, and return what `restore` takes; no copy.

        Raises:
            ValueError: what the quantized weight stands for is not finite; the weight is as it was.
        """
        kept = self._keep()
        try:
            self._quantize(rows)
        except BaseException:
            self.restore(kept)
            raise
        return kept

    def _quantize(self, rows: Tensor) -> None:
        base = self._layer.get_base_layer()
        self._backend.set_base_weight(self._layer, rows)
        written = self._layer.get_base_layer()
        if written is not base:  # HQQ: another layer, which PEFT makes without the bias
            written.bias = base.bias
            written.train(base.training)
        if not self.read().isfinite().all():
            raise ValueError(f"the weight of {self.where} must be finite after quantization, it is not")

    def _keep(self) -> dict[str, Any]:
        base = self._layer.get_base_layer()
        kept = {"base": base, "weight": getattr(base, "weight", None)}
        # PEFT's bitsandbytes backends write into the attributes of the weight they replace, and into the layer's state
        kept["weight attributes"] = dict(vars(kept["weight"])) if kept["weight"] is not None else {}
        kept["state"] = {name: copy.copy(vars(base)[name]) for name in ("state", "quant_state") if name in vars(base)}
        return kept

    def restore(self, kept: dict[str, Any]) -> None:
        """Put back what `write` gave, on the device where the weight is now."""
        if kept["weight"] is None:
            self._layer.base_layer = kept["base"]
            return
        base = self._layer.get_base_layer()
        weight, device = kept["weight"], self.device
        vars(weight).update(kept["weight attributes"])
        vars(base).update(kept["state"])
        if weight.device != device:
            moved = weight.to(device)
            weight = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
            state = getattr(base, "state", None)
            for name in ("CB", "SCB"):
                if getattr(state, name, None) is not None:
                    setattr(state, name, getattr(state, name).to(device))
        base.weight = weight

    def fingerprint(self) -> tuple:
        """Always the same: bitsandbytes repacks a weight whenever it likes, so its bits say nothing."""
        return ("quantized",)


def _is_packed_for_cpu(base: nn.Module) -> bool:
    return getattr(getattr(getattr(base, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def unpack_for_cpu(base: nn.Module) -> None:
    """Undo what bitsandbytes does to a 4-bit weight on a CPU in its first forward without gradient.

    In that packing the layer has no gradient with respect to its input and PEFT dequantizes it to noise.
    """
    if _is_packed_for_cpu(base):
        base.state_dict()  # bitsandbytes saves, and leaves, the weight unpacked
        state = base.weight.quant_state
        if state.absmax.dim() == 2:  # and, in 0.50, scales that are not nested as they were packed
            state.absmax = state.absmax.mT.flatten().float()


def row_blocks(weight: Tensor) -> list[slice]:
    """Slices of rows of about `_BLOCK` elements."""
    rows = max(1, _BLOCK // max(1, weight[0].numel())) if weight.numel() else 1
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def fingerprint(weight: Tensor) -> tuple:
    """Equal for equal bits; writes through `.data` leave no other trace."""
    bits = _INTEGERS[weight.element_size()]
    total, start = torch.zeros((), dtype=torch.int64, device=weight.device), 0
    for rows in row_blocks(weight):
        values = weight.detach()[rows].flatten().view(bits).to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + values.numel()) + 1, 2, device=weight.device)
        total += (values * odd).sum()
        start += values.numel()
    return tuple(weight.shape), weight.dtype, int(total)
