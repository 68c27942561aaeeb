"""PEFT's HRA layer over an embedding: y = base_layer(ids) Q, the reflections along the embedding dimension."""

from typing import Any

from torch import Tensor

from hra_kernels.mixed_batch import reflect_mixed
from hra_kernels.ops import reflect_chain
from hra_kernels.peft.layer import ReflectionLayer


class HRAEmbedding(ReflectionLayer):
    """PEFT's HRA layer over an `nn.Embedding` or a subclass of it; `hra_u` is (embedding_dim, r).

    The whole table is adapted, W Q, the row of `padding_idx` included (where it is zero it stays zero). What is
    reflected is what the base layer returns, so its own arguments, scaling and quantization are its own business; a
    forward of its own must be linear in the table.
    """

    def _vector_shape(self) -> tuple[int, ...]:
        return (self.get_base_layer().embedding_dim,)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's `convert_to_lora` has no keys for embeddings. `hra_kernels.peft.export_lora` has."""
        return False

    def _cast_for_base(self, x: Tensor) -> Tensor:
        return x

    def _adapted_forward(self, x: Tensor, us: list[Tensor], apply_gs: list[bool], *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        return reflect_chain(y, us, apply_gs, self._factors.get(us, apply_gs, y.dtype))

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        return reflect_mixed(y, *self._mixed_batch(adapter_names, y))
