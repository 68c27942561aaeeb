"""What the image jobs have in common: noised pictures as rows, the loss on held-out ones, pictures drawn on the way."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from hra_kernels.recipes import RecipeError, diffusion, digits, images, job
from hra_kernels.recipes.application import Application, Metric
from hra_kernels.recipes.base import Batch
from hra_kernels.recipes.diffusion import Generator
from hra_kernels.recipes.options import ADAPTER, MODEL, TRAINING, option, positive

TIMES = 4
"""Noise levels at which each held-out picture is looked at."""
HELD_OUT_NUMBERS, DRAWN_NUMBERS = 2**40, 2**41
SAMPLES = "samples"

IMAGE_OPTIONS = (
    option(MODEL, "--resolution", "side of the pictures (default: the model's)", type=positive(int), metavar="PIXELS"),
    option(ADAPTER, "--bias", "biases to train as well", choices=["none", "all", "hra"]),
    option(TRAINING, "--sampling-steps", "of DDIM, for pictures", type=positive(int), metavar="N"),
    option(TRAINING, "--guidance", "strength of the prompt in pictures", type=positive(float), metavar="S"),
    option(TRAINING, "--samples", "pictures at each validation", type=positive(int), metavar="N"),
)


@dataclass(frozen=True)
class Example:
    """A picture with its prompt, and what is to control it; files are read when they are needed."""

    picture: Tensor | Path
    prompt: str
    control: Tensor | Path | None = None


def picture_of(example: Example, side: int, channels: int) -> Tensor:
    """(channels, side, side), read where it is a file."""
    picture = example.picture
    return images.read(picture, side, channels) if isinstance(picture, Path) else picture


def open_base(arguments: argparse.Namespace, controlled: bool = False) -> tuple[Generator, digits.Recipe]:
    """The generator of --model, by default one of digits, trained now if it has not been, and the recipe of that one.

    --resolution becomes the generator's own where it is not given.

    Raises:
        RecipeError: there is none, or it wants a control picture and gets none.
    """
    recipe = digits.QUICK_GENERATOR if arguments.quick else digits.GENERATOR
    console = Console(highlight=False, quiet=not job.first_process())
    source = arguments.model or str(digits.generator(recipe, console))
    base = Generator.open(source, arguments.seed, controlled, trained_biases=arguments.bias)
    if base.control and not controlled:
        raise RecipeError(f"--model {source}: expected a model without control, got one that `train control` made")
    arguments.resolution = arguments.resolution or base.resolution
    return base, recipe


class ImageApplication(Application):
    """A diffusion model; its outputs are its predictions for noised pictures.

    Attributes:
        examples: `train`, `validation`, `test`.
        shown: what is drawn at each validation.
        drawn: (title, pictures) of the sheet before and after; `last` adds to it.
    """

    output: ClassVar[str] = "prediction"
    by_token: ClassVar[bool] = False
    rivals: ClassVar[Sequence[str]] = (job.LORA,)
    main = Metric("denoising loss", higher=False, percent=False)
    base: Generator

    def __init__(self, arguments: argparse.Namespace, base: Generator, examples: dict[str, list[Example]], steps: int):
        self.arguments, self.base, self.examples = arguments, base, examples
        self.sizes = {part: len(found) for part, found in examples.items()}
        self.train = [{"number": number} for number in range(steps * arguments.batch_size)]
        self.shown: list[Example] = []
        self.drawn: list[tuple[str, Tensor]] = []
        self._held_out: dict[str, list[Batch]] = {}

    # --- training -----------------------------------------------------------------------------------------------------

    def opened(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
        """Pictures (n, channels, H, W), and control pictures (n, 3, H, W), here None."""
        side, channels = self.arguments.resolution, self.base.channels
        return torch.stack([picture_of(each, side, channels) for each in examples]), None

    def batch(self, examples: Sequence[Example], numbers: Sequence[int], **rest) -> Batch:
        pictures, controls = self.opened(examples)
        texts = [each.prompt for each in examples]
        return self.base.batch(pictures, texts, numbers, controls=controls, **rest)

    def collate(self, rows: list[dict]) -> Batch:
        """Noise and times are of the row's number: the same in a resumed run, and for every method."""
        numbers = [row["number"] for row in rows]
        train = self.examples["train"]
        return self.batch([train[number % len(train)] for number in numbers], numbers)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return diffusion.loss(model, batch)

    # --- held-out pictures --------------------------------------------------------------------------------------------

    def held_out(self, part: str) -> list[Batch]:
        """Every held-out picture at TIMES noise levels, with noise that stays."""
        if part not in self._held_out:
            pairs = [(example, k) for example in self.examples[part] for k in range(TIMES)]
            ends = self.base.scheduler.config.num_train_timesteps
            found = []
            for start in range(0, len(pairs), diffusion.SAMPLED_AT_ONCE):
                some = pairs[start : start + diffusion.SAMPLED_AT_ONCE]
                times = [(2 * k + 1) * ends // (2 * TIMES) for _, k in some]
                numbers = range(HELD_OUT_NUMBERS + start, HELD_OUT_NUMBERS + start + len(some))
                found.append(self.batch([example for example, _ in some], numbers, times=times))
            self._held_out[part] = found
        return self._held_out[part]

    @torch.inference_mode()
    def outputs(self, model: nn.Module, part: str) -> Tensor:
        was_training, found, device = model.training, [], self.base.device
        model.eval()
        for batch in self.held_out(part):
            inputs = (batch[name].to(device) for name in ("sample", "timestep", "encoder_hidden_states"))
            found.append(model(*inputs).sample.float().cpu())
        model.train(was_training)
        return torch.cat(found)

    def metrics(self, outputs: Tensor, part: str) -> dict[str, float]:
        target = torch.cat([batch["target"] for batch in self.held_out(part)])
        return {self.main.name: (outputs - target).square().mean().item()}

    # --- pictures -----------------------------------------------------------------------------------------------------

    def sample(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """One picture of each prompt, the same noise every time."""
        arguments = self.arguments
        controls = self.opened(examples)[1] if self.base.control else None
        numbers = range(DRAWN_NUMBERS + self.base.seed, DRAWN_NUMBERS + self.base.seed + len(examples))
        prompts = [each.prompt for each in examples]
        drawing = arguments.sampling_steps, arguments.guidance, controls, arguments.resolution
        return self.base.sample(model, prompts, numbers, *drawing)

    def checked(self, model: nn.Module, step: int, folder: Path) -> None:
        for number, picture in enumerate(self.sample(model, self.shown)):
            images.save(picture, folder / SAMPLES / f"step-{step:06d}" / f"{number:02d}.png")

    def draw(self, folder: Path, checkpoints: Path) -> None:
        """samples/step-*/*.png with their sheet samples.png, and before-after.png."""
        shutil.copytree(checkpoints / SAMPLES, folder / SAMPLES)
        rows = []
        for step in sorted((folder / SAMPLES).iterdir()):
            pictures = [images.read(path, None, 3) for path in images.listed(step, SAMPLES)]
            rows.append((step.name.replace("step-", "step "), torch.stack(pictures)))
        images.sheet(rows, folder / "samples.png")
        if self.drawn:
            images.sheet(self.drawn, folder / "before-after.png")
