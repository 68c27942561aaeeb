"""A UNet that also sees a control picture, through eight small convolutions as ControlNet's and the authors' code.

The picture comes with the latents, as further channels: 3 f² of them, f pixels being one position of a latent. So the
UNet is called as ever. What the convolutions make of it is added behind `conv_in`; at the start that is zero.
"""

from collections.abc import Sequence
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

CONTROL = "control_channels"
"""In a UNet's config.json: channels of its convolutions over the control picture."""


class ControlledInput(nn.Module):
    """In place of `conv_in`: (n, c + 3 f², h, w) to (n, features, h, w)."""

    def __init__(self, conv: nn.Conv2d, channels: Sequence[int], factor: int):
        super().__init__()
        self.conv, self.factor = conv, factor
        self.hint = ControlNetConditioningEmbedding(conv.out_channels, block_out_channels=tuple(channels))

    def forward(self, x: Tensor) -> Tensor:
        latents, control = x.split([self.conv.in_channels, x.shape[1] - self.conv.in_channels], 1)
        return self.conv(latents) + self.hint(pixel_shuffle(control, self.factor))


def channels_for(factor: int) -> tuple[int, ...]:
    """One halving for each power of two in `factor`; ControlNet's own for Stable Diffusion's 8."""
    return (16, 32, 96, 256)[: factor.bit_length()]


def hint_layers(channels: Sequence[int]) -> list[str]:
    """Ends of the names of the convolutions over the control picture, each with a weight of its own; none without."""
    blocks = [f"hint.blocks.{number}" for number in range(2 * (len(channels) - 1))]
    return ["hint.conv_in", *blocks, "hint.conv_out"] if channels else []


def with_control(unet: UNet2DConditionModel, channels: Sequence[int], factor: int) -> UNet2DConditionModel:
    """Change the UNet in place; its saved configuration says so."""
    unet.conv_in = ControlledInput(unet.conv_in, channels, factor)
    unet.register_to_config(**{CONTROL: list(channels)})
    return unet


def load_weights(unet: UNet2DConditionModel, folder: Path) -> None:
    """Those of a saved UNet with control, which diffusers' own `from_pretrained` would leave out."""
    unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
