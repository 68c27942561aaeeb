"""PEFT's HRA configuration with what PEFT's own has not: sides, ε, `target_parameters`, `ensure_weight_tying`."""

from dataclasses import dataclass, field

import peft

from hra_kernels.soft import check_side, rule


@dataclass
class HRAConfig(peft.HRAConfig):
    """`peft.HRAConfig` and more fields; without them it is the same, and so is its file.

    Args:
        target_parameters: names of parameters to adapt, (N, D) or the fused experts of a mixture, (experts, N, D):
            "experts.gate_up_proj", matched by their ends. `target_modules` may then be left out. PEFT's own HRA cannot
            load such an adapter.
        ensure_weight_tying: whether layers with tied weights (token embeddings and output layer), in `target_modules`
            or `modules_to_save`, stay tied: they share one `hra_u`, so both have W Q. As PEFT's LoRA has it.
        side: "input" for W Q, or "output" for Qᵀ W, linear layers only: y = (base_layer(x) - b) Q + b.
        eps: reflect along u / sqrt(|u|² + eps), which is near the identity while u is short and not orthogonal. Where
            `init_weights` is True, it starts there, with independent columns. Not with `apply_GS`. The authors' code
            for language models has side="output", eps=1e-4.

    PEFT's own HRA refuses to load an adapter with `side` or `eps`: its vectors have one more dimension.
    """

    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters (not modules) to adapt, such as fused expert weights."}
    )

    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Whether layers with tied weights share their vectors, and so stay tied."}
    )

    side: str = field(default="input", metadata={"help": "'input' for W Q, 'output' for QᵀW."})

    eps: float = field(default=0.0, metadata={"help": "Reflect along u / sqrt(|u|² + eps)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_side("HRAConfig", self.side)
        rule("HRAConfig", self.apply_GS, self.eps)
        if self.target_parameters and (self.side != "input" or self.eps):
            raise ValueError("HRAConfig: target_parameters have side='input' and eps=0 only")
        if self.ensure_weight_tying:
            self.modules_to_tie = self.target_modules_to_tie = None  # what PEFT finds in the model
        if self.target_parameters and self.target_modules is None:
            self.target_modules = set()  # else PEFT chooses modules by the model's architecture

    def to_dict(self) -> dict:
        """As PEFT's; the fields that PEFT's own HRA does not know only where they are set."""
        settings = super().to_dict()
        for name in ("target_parameters", "ensure_weight_tying", "eps"):
            if not settings[name]:
                del settings[name]
        if self.side == "input":
            del settings["side"]
        return settings
