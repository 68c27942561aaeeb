"""HRA over a parameter rather than a layer: the fused expert weights of a mixture (PEFT's `target_parameters`).

    experts (E, N, D), or (E, D, N) where their module says `is_transposed`:    W_e <- W_e Q_e, one chain an expert

The module that holds the parameter uses it as it likes, so the reflections go to the weight: one grouped pass over it a
forward (`hra_kernels.mixed_batch`), and one more weight in memory meanwhile, as with PEFT's LoRA.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hra_kernels.factors import stack_factors
from hra_kernels.functional import hra_weight
from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.ops import attach_factor, in_factor_dtype
from hra_kernels.peft.base_weight import ParameterWeight, is_plain, runs_on
from hra_kernels.peft.layer import ReflectionLayer


class ParamWrapper(ReflectionLayer):
    """HRA over one parameter of a module: (E, N, D), (E, D, N) or (N, D). `hra_u` is (E, D, r) or (D, r).

    Wrappers of several parameters of one module are nested; PEFT finds them by the name of this class.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, parameter_name: str, **settings: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, **settings)

    # --- the parameter

    def base_parameter(self) -> Tensor:
        """The parameter, as its module has it now."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def chain_to_refill(self) -> None:
        """None: factors of experts are not kept."""
        return None

    def _is_transposed(self) -> bool:
        return self.base_parameter().dim() == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def _rows(self, weight: Tensor) -> Tensor:
        """(E, N, D) or (N, D), or back: a view."""
        return weight.mT if self._is_transposed() else weight

    def _sizes(self) -> tuple[int, int]:
        parameter = self.base_parameter()
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            raise NotImplementedError(
                f"HRA cannot adapt the parameter {self.parameter_name!r} of {type(self.get_base_layer()).__name__}: "
                f"supported are floating-point (N, D) and (experts, N, D), got {tuple(parameter.shape)} of "
                f"{parameter.dtype}"
            )
        rows = self._rows(parameter)
        return rows.shape[-1], rows.shape[-2]

    def _vector_shape(self) -> tuple[int, ...]:
        return (*self.base_parameter().shape[:-2], self.in_features)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        parameter, u = self.base_parameter(), self.hra_u[adapter_name]
        if not u.is_meta:
            device = device or runs_on(self.get_base_layer()) or parameter.device
            self.hra_u[adapter_name] = nn.Parameter(u.detach().to(device, parameter.dtype))

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
        def adapt(parameter: Tensor) -> Tensor:
            if parameter.dim() == 2:
                return hra_weight(parameter, us, apply_gs=apply_gs)
            rows = self._rows(parameter)
            chains = zip(*(u.unbind(0) for u in in_factor_dtype(us, rows.dtype)), strict=True)
            v, t = stack_factors([attach_factor(chain, apply_gs) for chain in chains])
            return self._rows(reflect_mixed(rows, v, t, torch.arange(len(rows), device=rows.device)))

        return self._call_with(adapt, x, *args, **kwargs)

    # --- merging

    def readable_weight(self) -> ParameterWeight:
        """The parameter as rows of experts."""
        return ParameterWeight(self.base_parameter(), self._is_transposed(), self.describe())

    def why_not_mergeable(self) -> str | None:
        """As `ReflectionLayer.why_not_mergeable`."""
        parameter = self.base_parameter()
        if is_plain(parameter) and not parameter.is_meta:
            return None
        kind = f"{type(parameter).__name__} of {parameter.dtype} on {parameter.device}"
        return f"the parameter {self.parameter_name!r} is a {kind}"

    def is_loaded_to_merge(self) -> bool:
        """False: PEFT would load it, but not keep what was merged into it where wrappers are nested."""
        return False

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


def wrap_parameter(target: nn.Module, adapter_name: str, parameter_name: str, **settings: Any) -> ParamWrapper:
    """The wrapper of a parameter with one adapter more.

    Args:
        target: the module with the parameter, or the parameter's wrapper, or the wrapper of another parameter.
        settings: as in `ReflectionLayer.update_layer`.

    Returns:
        `target` itself where it is the parameter's wrapper, else a new one around it.
    """
    if not (isinstance(target, ParamWrapper) and target.parameter_name == parameter_name):
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, **settings)
    target.update_layer(adapter_name, **settings)
    return target
