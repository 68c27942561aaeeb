"""HRA over a parameter rather than a layer: the fused expert weights of a mixture (PEFT's `target_parameters`).

    experts (E, N, D), or (E, D, N) where their module says `is_transposed`:    W_e <- W_e Q_e, one chain an expert

The module that holds the parameter uses it as it likes, so the reflections go to the weight: one grouped pass over it a
forward (`hra_kernels.mixed_batch`), and one more weight in memory meanwhile, as with PEFT's LoRA.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from hra_kernels.factors import factor_dtype, join_factors, stack_factors
from hra_kernels.functional import hra_weight
from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.ops import attach_factor, chain_factor, in_factor_dtype
from hra_kernels.peft.base_weight import MERGEABLE, fingerprint
from hra_kernels.peft.layer import ReflectionLayer
from hra_kernels.peft.merge import Factor, Merged, reflect_rows
from hra_kernels.peft.offload import is_offloaded
from hra_kernels.peft.own_setup import OwnSetup


class ParamWrapper(ReflectionLayer, OwnSetup, nn.Module):
    """HRA over one parameter of a module: (E, N, D), (E, D, N) or (N, D). `hra_u` is (E, D, r) or (D, r).

    Wrappers of several parameters of one module are nested; PEFT finds them by the name of this class.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, parameter_name: str, **settings: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, **settings)

    # --- the parameter

    def parameter(self) -> Tensor:
        """The base parameter, as its module has it now."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _rows(self, weight: Tensor) -> Tensor:
        """(E, N, D) or (N, D), or back: a view."""
        transposed = weight.dim() == 3 and getattr(self.get_base_layer(), "is_transposed", False)
        return weight.mT if transposed else weight

    def _sizes(self) -> tuple[int, int]:
        parameter = self.parameter()
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            raise NotImplementedError(
                f"HRA cannot adapt the parameter {self.parameter_name!r} of {type(self.get_base_layer()).__name__}: "
                f"supported are floating-point (N, D) and (experts, N, D), got {tuple(parameter.shape)} of "
                f"{parameter.dtype}"
            )
        rows = self._rows(parameter)
        return rows.shape[-1], rows.shape[-2]

    def _vector_shape(self) -> tuple[int, ...]:
        return (*self.parameter().shape[:-2], self.in_features)

    @contextmanager
    def _as_one_matrix(self, adapter_name: str) -> Iterator[None]:
        """PEFT's initializations know (D, r); rows are independent in them, whichever expert's."""
        u = self.hra_u[adapter_name]
        self.hra_u[adapter_name] = nn.Parameter(u.detach().flatten(0, -2))
        yield
        u = self.hra_u[adapter_name].detach()
        self.hra_u[adapter_name] = nn.Parameter(u.reshape(*self._vector_shape(), u.shape[-1]))

    def reset_hra_parameters(self, adapter_name: str) -> None:
        """As `ReflectionLayer.reset_hra_parameters`, for each expert."""
        with self._as_one_matrix(adapter_name):
            super().reset_hra_parameters(adapter_name)

    def reset_hra_parameters_random(self, adapter_name: str) -> None:
        """Independent columns for each expert."""
        with self._as_one_matrix(adapter_name):
            super().reset_hra_parameters_random(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        parameter, u = self.parameter(), self.hra_u[adapter_name]
        if not u.is_meta:
            self.hra_u[adapter_name] = nn.Parameter(u.detach().to(device or parameter.device, parameter.dtype))

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> Tensor:
        """Not for parameters: a dense Q for each expert has no use in PEFT."""
        raise NotImplementedError(f"{self.describe()} has a chain for each expert and no single Q")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's `convert_to_lora` knows layers only."""
        return False

    # --- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module with the active adapters' reflections in this parameter; the arguments are the module's own."""
        if kwargs.get("adapter_names") is not None:  # what comes here are tokens, not samples
            return self._mixed_forward(x, kwargs["adapter_names"])
        return super().forward(x, *args, **kwargs)

    def _cast_for_base(self, x: Tensor) -> Tensor:
        return x

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[bool], *args: Any, **kwargs: Any) -> Tensor:
        if is_offloaded(self.get_base_layer()):  # its hook would load the plain weight over ours
            raise NotImplementedError(
                f"HRA: {self.describe()} is offloaded, which is not supported for target_parameters; keep it loaded, "
                "or merge the adapter first"
            )
        parameter = self.parameter()
        rows = self._rows(parameter)
        if rows.dim() == 2:
            adapted = hra_weight(rows, us, apply_gs=apply_gs)
        else:
            chains = zip(*(u.unbind(0) for u in in_factor_dtype(us, rows.dtype)), strict=True)
            v, t = stack_factors([attach_factor(chain, apply_gs) for chain in chains])
            adapted = reflect_mixed(rows, v, t, torch.arange(len(rows), device=rows.device))
        path = next(name for name, one in self.base_layer.named_parameters() if one is parameter)
        return functional_call(self.base_layer, {path: self._rows(adapted)}, (x, *args), kwargs)

    # --- merging

    def require_mergeable(self, names: list[str]) -> None:
        """As `merge.require_mergeable`."""
        parameter = self.parameter()
        if type(parameter.detach()) is not Tensor or parameter.dtype not in MERGEABLE or parameter.is_meta:
            raise NotImplementedError(
                f"HRA cannot merge into {self.describe()}: the parameter {self.parameter_name!r} is a "
                f"{type(parameter).__name__} of {parameter.dtype} on {parameter.device}. Supported are plain, loaded "
                "float32, float64, bfloat16 and float16 parameters; run the adapter unmerged."
            )
        for name in names:
            if not self.hra_u[name].isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its hra_u holds NaN "
                    f"or infinity. The weight of {self.describe()} is unchanged."
                )

    def _expert_factors(self, names: list[str]) -> list[Factor]:
        dtype, device = self.parameter().dtype, self.parameter().device
        apply_gs = [self.hra_apply_GS[name] for name in names]
        vectors = [self.hra_u[name].to(device) for name in names]
        chains = zip(*(u.unbind(0) if u.dim() == 3 else [u] for u in vectors), strict=True)
        return [chain_factor(us, apply_gs, dtype) for us in chains]

    def _reflected(self, weight: Tensor, merges: list[list[Factor]], inverse: bool) -> Tensor:
        """A new tensor like `weight`, one expert after the other through all merges."""
        adapted, rows = torch.empty_like(weight), self._rows(weight)
        matrices, results = (one.unbind(0) if one.dim() == 3 else [one] for one in (rows, self._rows(adapted)))
        dtype = factor_dtype(weight.dtype)
        for matrix, result, factors in zip(matrices, results, zip(*merges, strict=True), strict=True):
            moved = [(v.to(weight.device, dtype), t.to(weight.device, dtype)) for v, t in factors]
            result.copy_(reflect_rows(matrix, join_factors(moved), inverse))
        return adapted

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `ReflectionLayer.merge`, expert by expert."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hra_u]
        if not names:
            return
        self.require_mergeable(names)
        parameter, before = self.parameter(), self._merged
        start, pending = parameter.data, [self._expert_factors(names)]
        original, merges = start, pending
        if before is not None:
            merges = [*before.factors, *pending]
            original = before.original if before.fingerprint == fingerprint(parameter) else None
            if original is not None:  # one rounding for all: start again from the original
                start, pending = original.to(parameter.device), merges
        merged = self._reflected(start, pending, inverse=False)
        if not all(expert.isfinite().all() for expert in merged):
            raise ValueError(
                f"NaNs detected in the merged weights of {self.describe()}: the base weight is not finite, or the "
                "result is out of its dtype's range. It is unchanged."
            )
        parameter.data = merged
        self._merged = Merged(original, fingerprint(merged), merges)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """As `ReflectionLayer.unmerge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        parameter, state = self.parameter(), self._merged
        if state.original is not None and state.fingerprint == fingerprint(parameter):
            parameter.data = state.original.to(parameter.device)
        else:
            parameter.data = self._reflected(parameter.data, state.factors, inverse=True)
        self._merged = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """For PEFT: the base module, with what is in this wrapper and in those nested below it merged or dropped."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer
