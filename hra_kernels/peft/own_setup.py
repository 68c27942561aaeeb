"""How a layer of this package comes about over a base layer that PEFT's own HRA layers do not know."""

from typing import Any

import torch
from peft.tuners.hra.layer import HRALayer
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from hra_kernels.factor_cache import FactorCache


class OwnSetup(nn.Module, HRALayer):
    """`__init__` and `update_layer` of PEFT's HRA layers, for any base layer. Listed after `ReflectionLayer`.

    A subclass supplies `_vector_shape`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int = 0, **settings: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.hra_r: dict[str, int] = {}
        self.hra_apply_GS: dict[str, bool] = {}
        self.hra_u = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs: dict[str, Any] = {}
        self.in_features, self.out_features = self._sizes()
        self._factors = FactorCache()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, **settings)

    def _sizes(self) -> tuple[int, int]:
        """in_features and out_features, as PEFT names them."""
        return _get_in_out_features(self.get_base_layer())

    def _vector_shape(self) -> tuple[int, ...]:
        """The shape of `hra_u` without its last dimension, r."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, r: int, config: Any = None, **fields: Any) -> None:
        """Add an adapter. PEFT 0.20 and newer hand over the whole config, 0.19 its fields."""
        settings = fields if config is None else vars(config)
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self.hra_r[adapter_name] = r
        self.hra_apply_GS[adapter_name] = settings["apply_GS"]
        self.hra_u[adapter_name] = nn.Parameter(torch.empty(*self._vector_shape(), r))
        if settings["init_weights"]:
            self.reset_hra_parameters(adapter_name)
        else:
            self.reset_hra_parameters_random(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=settings.get("inference_mode", False))

    def __repr__(self) -> str:
        return "hra." + nn.Module.__repr__(self)
