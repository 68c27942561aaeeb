"""Latent diffusion models in the hub's folder layout, as the image jobs use them.

    batch   n images, their latents z, noise e and times t, all drawn from the row's own number
    sample  z_t = sqrt(a_t) z + sqrt(1 - a_t) e              (n, c, h, w)
    loss    mean of weight * |unet(z_t, t, prompt) - target|², target e, or the velocity where the scheduler says so

A generator without an autoencoder works on pixels, 2 x 2 of them stacked as channels.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoTokenizer, CLIPTextModel

from hra_kernels.recipes import RecipeError, refusing
from hra_kernels.recipes.base import Base, Batch
from hra_kernels.recipes.control_input import CONTROL, channels_for, hint_layers, load_weights, with_control

PATCH = 2
"""Side of the square of pixels that is one position of a generator without an autoencoder."""
SAMPLED_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Generator(Base):
    """A frozen pipeline whose UNet is adapted.

    Attributes:
        control: channels of the layers that encode a control picture; none without control.
        trained_biases: none, all or hra, as PEFT's `bias`.
        known: prompts that were encoded.
    """

    scheduler: DDIMScheduler
    text_encoder: nn.Module
    vae: AutoencoderKL | None
    unet_config: dict[str, Any]
    control: Sequence[int] = ()
    trained_biases: str = "none"
    known: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str, seed: int, controlled: bool = False, **rest: Any) -> "Generator":
        """One whose UNet sees a control picture if `controlled`, or if it was saved so.

        Raises:
            RecipeError: diffusers finds no text-to-image pipeline of this name or in this folder.
        """
        if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "model_index.json")):
            raise RecipeError(f"--model {source}: expected a folder with the model_index.json of a pipeline, got none")
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
        with refusing(f"--model {source}: expected a Stable Diffusion model by name or folder, got"):
            latent = any(DiffusionPipeline.load_config(source).get("vae") or ())
            clipping = {"clip_sample": False} if latent else {}
            found = {
                "tokenizer": AutoTokenizer.from_pretrained(source, subfolder="tokenizer"),
                # the configurations of other schedulers do not say that latents are not to be clipped
                "scheduler": DDIMScheduler.from_pretrained(source, subfolder="scheduler", **clipping),
                "text_encoder": CLIPTextModel.from_pretrained(source, subfolder="text_encoder"),
                "vae": AutoencoderKL.from_pretrained(source, subfolder="vae") if latent else None,
                "unet_config": dict(UNet2DConditionModel.load_config(source, subfolder="unet")),
            }
        for name in ("text_encoder", "vae"):
            if found[name] is not None:
                found[name].requires_grad_(False).to(device).eval()
        generator = cls(source, None, seed, device, **found, **rest)
        control = found["unet_config"].get(CONTROL) or (channels_for(generator.factor) if controlled else ())
        return replace(generator, control=tuple(control), trained_whole=hint_layers(control))

    # --- the UNet -----------------------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        with refusing(f"--model {self.source}: expected the weights of a UNet2DConditionModel, got"):
            if self.unet_config.get(CONTROL):
                unet = with_control(UNet2DConditionModel.from_config(self.unet_config), self.control, self.factor)
                load_weights(unet, Path(self.source) / "unet")
            else:
                unet = UNet2DConditionModel.from_pretrained(self.source, subfolder="unet")
                if self.control:
                    torch.manual_seed(self.seed)
                    with_control(unet, self.control, self.factor)
        return unet.to(self.device).eval()

    def hra_config(self, *arguments: Any, **layer: Any):
        config = super().hra_config(*arguments, **layer)
        config.bias = {"hra": "hra_only"}.get(self.trained_biases, self.trained_biases)
        return config

    def lora_config(self, *arguments: Any):
        config = super().lora_config(*arguments)
        config.bias = {"hra": "lora_only"}.get(self.trained_biases, self.trained_biases)
        return config

    def let_gradient_through(self, model: nn.Module) -> None:
        model.conv_in.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def save_merged(self, model: nn.Module, folder: Path) -> None:
        """The whole pipeline; `StableDiffusionPipeline.from_pretrained` reads it where there is an autoencoder and no
        control."""
        model.save_pretrained(folder / "unet")
        save_pipeline(folder, self.tokenizer, self.scheduler, self.text_encoder, self.vae)

    # --- pictures, latents, prompts -----------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels per position of a latent, in each direction."""
        return PATCH if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.unet_config["in_channels"] // PATCH**2 if self.vae is None else self.vae.config.in_channels

    @property
    def resolution(self) -> int:
        return self.unet_config["sample_size"] * self.factor

    @torch.no_grad()
    def latents(self, pictures: Tensor, draw: Tensor) -> Tensor:
        """Of pictures (n, channels, H, W) in [0, 1], (n, c, h, w) on the CPU; `draw`: the autoencoder's noise."""
        pixels = 2 * pictures - 1
        if self.vae is None:
            return pixel_unshuffle(pixels, PATCH)
        found = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        drawn = found.mean + found.std * draw.to(found.mean)
        return (drawn * self.vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """(n, channels, H, W) in [0, 1], on the CPU."""
        if self.vae is None:
            pixels = pixel_shuffle(latents, PATCH)
        else:
            pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        """What the UNet attends to, (n, tokens, features), on the CPU."""
        return torch.cat([self._prompt(text) for text in texts])

    def _prompt(self, text: str) -> Tensor:
        if text not in self.known:
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            ids = self.tokenizer([text], max_length=self.tokenizer.model_max_length, **options)["input_ids"]
            self.known[text] = self.text_encoder(ids.to(self.device))[0].float().cpu()
        return self.known[text]

    def shape(self, pictures: Tensor) -> tuple[int, ...]:
        height, width = pictures.shape[-2:]
        channels = self.unet_config["out_channels"]
        return (len(pictures), channels, height // self.factor, width // self.factor)

    # --- training and sampling ----------------------------------------------------------------------------------------

    def batch(
        self,
        pictures: Tensor,
        texts: Sequence[str],
        numbers: Sequence[int],
        times: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        controls: Tensor | None = None,
    ) -> Batch:
        """Noised latents for `loss`, with noise (and times, where not given) drawn from each example's number."""
        draws, drawn_times = [], []
        shape = self.shape(pictures)[1:]
        for number in numbers:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            drawn_times.append(torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator))
            draws.append(torch.randn(2, *shape, generator=generator))
        noise, draw = torch.stack(draws, 1)
        timestep = torch.stack(drawn_times) if times is None else torch.tensor(times)
        latents = self.latents(pictures, draw)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return {
            "sample": self.with_controls(self.scheduler.add_noise(latents, noise, timestep), controls),
            "timestep": timestep,
            "encoder_hidden_states": self.prompts(texts),
            "target": self.scheduler.get_velocity(latents, noise, timestep) if velocity else noise,
            "weight": torch.ones(len(noise)) if weights is None else torch.tensor(weights),
        }

    def with_controls(self, latents: Tensor, controls: Tensor | None) -> Tensor:
        """Control pictures (n, 3, H, W) become further channels of the latents, as `ControlledInput` takes them."""
        if controls is None:
            return latents
        return torch.cat([latents, pixel_unshuffle(controls.to(latents), self.factor)], 1)

    @torch.inference_mode()
    def sample(
        self,
        model: nn.Module,
        texts: Sequence[str],
        numbers: Sequence[int],
        steps: int,
        guidance: float,
        controls: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Pictures (n, channels, size, size) in [0, 1] by DDIM with classifier-free guidance, each from its number."""
        was_training, found = model.training, []
        model.eval()
        for start in range(0, len(texts), SAMPLED_AT_ONCE):
            chosen = slice(start, start + SAMPLED_AT_ONCE)
            some = None if controls is None else controls[chosen]
            found.append(self._sample(model, texts[chosen], numbers[chosen], steps, guidance, some, size))
        model.train(was_training)
        return torch.cat(found)

    def _sample(self, model, texts, numbers, steps, guidance, controls, size) -> Tensor:
        side = (size or self.resolution) // self.factor
        shape = (self.unet_config["out_channels"], side, side)
        generators = [torch.Generator().manual_seed(number % 2**63) for number in numbers]
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        prompts = torch.cat([self.prompts([""] * len(texts)), self.prompts(texts)]).to(self.device)
        for time in scheduler.timesteps:
            inputs = self.with_controls(latents, controls)
            noise = model(torch.cat([inputs, inputs]), time.to(self.device), prompts).sample
            without, noise = noise.chunk(2)
            noise = without + guidance * (noise - without)
            latents = scheduler.step(noise, time, latents).prev_sample
        return self.pictures(latents)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Weighted mean of the squared errors, a scalar."""
    predicted = model(batch["sample"], batch["timestep"], batch["encoder_hidden_states"]).sample
    return ((predicted - batch["target"]).square().mean((1, 2, 3)) * batch["weight"]).mean()


def save_pipeline(folder: Path, tokenizer, scheduler, text_encoder, vae) -> None:
    """What belongs beside `unet` in a pipeline's folder."""
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    text_encoder.save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    if vae is not None:
        vae.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
