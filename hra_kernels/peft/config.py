"""PEFT's HRA configuration with what PEFT's own has not: `target_parameters`."""

from dataclasses import dataclass, field

import peft


@dataclass
class HRAConfig(peft.HRAConfig):
    """`peft.HRAConfig` and `target_parameters`; without them it is the same, and so is its file.

    Args:
        target_parameters: names of parameters to adapt, (N, D) or the fused experts of a mixture, (experts, N, D):
            "experts.gate_up_proj", matched by their ends. `target_modules` may then be left out. PEFT's own HRA cannot
            load such an adapter.
    """

    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters (not modules) to adapt, such as fused expert weights."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_parameters and self.target_modules is None:
            self.target_modules = set()  # else PEFT chooses modules by the model's architecture

    def to_dict(self) -> dict:
        """As PEFT's; `target_parameters` only where there are some."""
        settings = super().to_dict()
        if not self.target_parameters:
            del settings["target_parameters"]
        return settings
