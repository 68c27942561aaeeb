"""PEFT's HRA configuration with what PEFT's own has not: `target_parameters` and `ensure_weight_tying`."""

from dataclasses import dataclass, field

import peft


@dataclass
class HRAConfig(peft.HRAConfig):
    """`peft.HRAConfig` and two more fields; without them it is the same, and so is its file.

    Args:
        target_parameters: names of parameters to adapt, (N, D) or the fused experts of a mixture, (experts, N, D):
            "experts.gate_up_proj", matched by their ends. `target_modules` may then be left out. PEFT's own HRA cannot
            load such an adapter.
        ensure_weight_tying: whether layers with tied weights (token embeddings and output layer), in `target_modules`
            or `modules_to_save`, stay tied: they share one `hra_u`, so both have W Q. As PEFT's LoRA has it.
    """

    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters (not modules) to adapt, such as fused expert weights."}
    )

    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Whether layers with tied weights share their vectors, and so stay tied."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensure_weight_tying:
            self.modules_to_tie = self.target_modules_to_tie = None  # what PEFT finds in the model
        if self.target_parameters and self.target_modules is None:
            self.target_modules = set()  # else PEFT chooses modules by the model's architecture

    def to_dict(self) -> dict:
        """As PEFT's; the fields that PEFT's own HRA does not know only where they are set."""
        settings = super().to_dict()
        for name in ("target_parameters", "ensure_weight_tying"):
            if not settings[name]:
                del settings[name]
        return settings
