"""DreamBooth: a diffusion model learns a subject of a few pictures; by default a generator of digits, crossed sevens.

As in the authors' scripts the attention layers of the UNet are adapted, and pictures of the class, which the model
itself draws, keep the class as it was (prior preservation). The default generator is small and trained here once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from hra_kernels.recipes import RecipeError, digits, dreambooth, images, job, similarity
from hra_kernels.recipes.application import Settings
from hra_kernels.recipes.base import Batch
from hra_kernels.recipes.image_application import IMAGE_OPTIONS, Example, ImageApplication, open_base
from hra_kernels.recipes.options import ADAPTER, COMMON_BUT_LENGTH, MODEL, TRAINING, option, positive, resolve
from hra_kernels.recipes.saving import save_evaluation, written_whole

EXTRA = "images"
DEFAULTS = {
    "rank": 8,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    "penalty": 0.0,
    "bias": "none",
    "batch_size": 1,
    "lr": 1e-4,
    "token": dreambooth.TOKEN,
    "class_images": 200,
    "prior_weight": 1.0,
    "sampling_steps": 50,
    "guidance": 7.5,
    "samples": 4,
    "seed": 0,
    "out": Path("runs/subject"),
}
# chosen on pictures of noise other than the test's: at 2e-2 65 % of other digits are kept, at 1e-2 90 % (120 steps);
# a stronger guidance leaves few digits that the judge can read, of sevens before training 40 % at 2.0, 82 % at 1.4
DIGITS = {"batch_size": 8, "lr": 1e-2, "class_images": 64, "sampling_steps": 20, "guidance": 1.4, "samples": 8}
QUICK = {"class_images": 16, "sampling_steps": 10, "samples": 4}
PRESETS = {  # of the official script, which the defaults follow, and of the paper's appendix B
    "script": {"steps": 2005, "lr": 1e-4, "rank": 8},
    "paper": {"steps": 2000, "lr": 7e-6, "rank": 7},
}
STEPS, DIGITS_STEPS, QUICK_STEPS = 2005, 240, 10
DRAWN, QUICK_DRAWN = 100, 10  # pictures of the subject, and as many of other digits: a share is off by 5 % or less
CLASS_NUMBERS = 2**42

EPILOG = f"""\
examples:
  hra-kernels train subject                              a generator of digits, trained here once, learns crossed sevens
  hra-kernels train subject --quick                      a shorter generator, {QUICK_STEPS} steps
  hra-kernels train subject --model stable-diffusion-v1-5/stable-diffusion-v1-5 --data dreambooth/dataset \\
      --class-idx 3 --prompt-idx 0 --class-data class_data/bowl
  hra-kernels train subject --model ./sd --data ./my-cup --subject-class cup --prompt "a qwe cup on the beach"
  hra-kernels eval subject --images runs/subject/samples --data dreambooth/dataset --class-idx 3 --prompt-idx 0
  torchrun --nproc-per-node 2 -m hra_kernels.cli train subject --batch-size 2

--model takes a Stable Diffusion by name or folder. --data takes a folder of pictures of one subject, or with
--class-idx the dataset of DreamBooth. Pictures of the class are read from --class-data, and drawn where there are none.
"""

_SUBJECT = (
    option(MODEL, "--data", "the subject's pictures (default: crossed sevens)", metavar="FOLDER"),
    option(MODEL, "--class-idx", "one of DreamBooth's 30 subjects, in the folder of all", type=int, metavar="0..29"),
    option(MODEL, "--prompt-idx", "one of its 25 prompts, for samples (default: 0)", type=int, metavar="0..24"),
    option(MODEL, "--subject-class", "noun for the class of your own subject", metavar="NOUN"),
    option(MODEL, "--token", "the subject's name in prompts", metavar="WORD"),
    option(MODEL, "--prompt", "for samples, in place of --prompt-idx", metavar="TEXT"),
)
OPTIONS = (
    option(MODEL, "--model", "Stable Diffusion (default: a small one, trained here)", metavar="NAME_OR_FOLDER"),
    *_SUBJECT,
    option(MODEL, "--class-data", "the class's pictures; filled where it is empty", type=Path, metavar="FOLDER"),
    option(MODEL, "--class-images", "pictures of the class to draw", type=positive(int), metavar="N"),
    option(ADAPTER, "--preset", "settings of the official script or of the paper's appendix B", choices=[*PRESETS]),
    option(TRAINING, "--prior-weight", "of the class's pictures in the loss", type=positive(float), metavar="W"),
    *IMAGE_OPTIONS,
    *COMMON_BUT_LENGTH,
)  # fmt: skip

EVAL_DEFAULTS = {
    "token": dreambooth.TOKEN,
    "dino": "facebook/dino-vits16",
    "clip": "openai/clip-vit-large-patch14",
    "lpips": "vgg",
    "out": Path("runs/subject-eval"),
}
EVAL_OPTIONS = (
    option(MODEL, "--images", "generated pictures, or a folder of them for each epoch", type=Path, metavar="FOLDER",
           required=True),
    *_SUBJECT,
    option("evaluation", "--dino", "model for DINO", metavar="NAME_OR_FOLDER"),
    option("evaluation", "--clip", "model for CLIP-I and CLIP-T", metavar="NAME_OR_FOLDER"),
    option("evaluation", "--lpips", "network of LPIPS", choices=["vgg", "alex", "squeeze"]),
    option("evaluation", "--out", "folder for the results", type=Path, metavar="DIR"),
)  # fmt: skip


def _said(arguments: argparse.Namespace) -> tuple[Path | None, str, str]:
    """(folder of the subject's pictures, its class, the prompt for samples)."""
    token = arguments.token
    if arguments.class_idx is not None:
        subject = dreambooth.picked("--class-idx", arguments.class_idx, dreambooth.SUBJECTS)
        if not arguments.data:
            raise RecipeError("--class-idx: expected with --data, the folder with DreamBooth's subjects")
        text = dreambooth.picked("--prompt-idx", arguments.prompt_idx or 0, subject.prompts(token))
        return Path(arguments.data) / subject.folder, subject.noun, arguments.prompt or text
    if arguments.prompt_idx is not None:
        raise RecipeError("--prompt-idx: expected with --class-idx, whose prompts it numbers")
    if arguments.data:
        if not arguments.subject_class:
            raise RecipeError(f"--data {arguments.data}: expected with --subject-class or --class-idx")
        noun = arguments.subject_class
        return Path(arguments.data), noun, arguments.prompt or f"a {token} {noun}"
    seven = digits.NAMES[digits.CROSSED]
    return None, seven, arguments.prompt or digits.prompt(seven, token)


class Subject(ImageApplication):
    """A row of the training data is a picture of the subject with one of its class."""

    class_examples: Sequence[Example]

    def collate(self, rows: list[dict]) -> Batch:
        found, numbers, weights = [], [], []
        for row in rows:
            number = row["number"]
            for examples, weight in ((self.examples["train"], 1.0), (self.class_examples, self.arguments.prior_weight)):
                found.append(examples[number % len(examples)])
                numbers.append(2 * number + len(numbers) % 2)
                weights.append(2 * weight)  # the loss is the sum of the two means
        return self.batch(found, numbers, weights=weights)


class CrossedSevens(Subject):
    """Judged by a classifier that knows crossed sevens, and by EfficientNet's features."""

    judge: digits.Judge
    similarity: similarity.Metric

    def last(self, model: nn.Module) -> dict[str, float]:
        count = QUICK_DRAWN if self.arguments.quick else DRAWN
        others = [Example(self.examples["train"][0].picture, digits.prompt(name)) for name in digits.NAMES]
        others = [others[number % len(others)] for number in range(count)]
        drawn, kept = self.sample(model, self.shown[:1] * count), self.sample(model, others)
        title = "after" if self.drawn else "before"
        if len(self.drawn) < 4:  # not a rival's
            self.drawn += [
                (f"{title}: {self.shown[0].prompt}", drawn[:10]),
                (f"{title}: {others[0].prompt}, ..., without the subject's name", kept[:10]),
            ]
        right = self.judge.classes(kept) == torch.arange(count) % len(digits.NAMES)
        return {
            "crossed sevens drawn": (self.judge.classes(drawn) == digits.Judge.CROSSED).float().mean().item(),
            "other digits kept": right.float().mean().item(),
            "similarity": self.similarity(drawn, [each.picture for each in self.examples["test"]], ""),
        }


def _class_examples(app: Subject, noun: str) -> list[Example]:
    """From --class-data, or drawn by the model before it is adapted."""
    arguments, text, base = app.arguments, f"a photo of {noun}", app.base
    folder = arguments.class_data
    if folder and folder.is_dir() and any(path.suffix.lower() in images.SUFFIXES for path in folder.iterdir()):
        return [Example(path, text) for path in images.listed(folder, "--class-data")]
    numbers = range(CLASS_NUMBERS, CLASS_NUMBERS + arguments.class_images)
    drawing = arguments.sampling_steps, arguments.guidance, None, arguments.resolution
    drawn = base.sample(base.model(), [text] * len(numbers), numbers, *drawing)
    if folder and job.first_process():
        with written_whole(folder) as partial:
            for number, picture in enumerate(drawn):
                images.save(picture, partial / f"{number:04d}.png")
    return [Example(picture, text) for picture in drawn]


def _settings(arguments: argparse.Namespace, steps: int) -> Settings:
    checks = 2 if arguments.quick else 5
    return Settings(steps, 0, schedule="constant", checks=checks, weight_decay=1e-2, clip=1.0)


def _steps(arguments: argparse.Namespace) -> int:
    if arguments.quick:
        return arguments.steps or QUICK_STEPS
    return arguments.steps or (DIGITS_STEPS if arguments.model is None else STEPS)


def open_application(arguments: argparse.Namespace) -> Subject:
    """Raises RecipeError: the model or the pictures are not what the options say."""
    own = [DIGITS] if arguments.model is None else []
    preset = PRESETS.get(arguments.preset, {})
    resolve(arguments, preset, QUICK if arguments.quick else {}, *own, DEFAULTS)
    folder, noun, prompt = _said(arguments)
    if (arguments.model is None) != (folder is None):
        raise RecipeError("--model, --data: expected both, or neither for the default generator and its digits")
    base, recipe = open_base(arguments)
    text = f"a photo of {arguments.token} {noun}"
    if folder is None:
        parts = {part: list(digits.load()[part].pictures) for part in ("subject", "validation", "test")}
        kind, parts["train"] = CrossedSevens, parts.pop("subject")
    else:
        listed = images.listed(folder, "--data")
        images.read(listed[0], arguments.resolution, base.channels)  # refuses now
        kind, parts = Subject, dict.fromkeys(("train", "validation", "test"), listed)
    examples = {part: [Example(picture, text) for picture in found] for part, found in parts.items()}
    steps = _steps(arguments)
    app = kind(arguments, base, {part: examples[part] for part in ("train", "validation", "test")}, steps)
    app.settings = _settings(arguments, steps)
    app.shown = [Example(examples["train"][0].picture, prompt)] * arguments.samples
    app.class_examples = _class_examples(app, noun)
    app.described = {"class pictures": [str(len(app.class_examples))], "prompts": [text, prompt]}
    if folder is None:
        app.source = "crossed sevens of MNIST"
        app.judge, app.similarity = digits.judge(), similarity.efficientnet()
        right = " and ".join(f"{100 * value:.0f} % of {name}" for name, value in digits.judged(app.judge).items())
        app.notes = (
            f"The generator ({recipe.steps} steps) is self-trained, on digits without crossed sevens. The judge is a "
            f"small classifier, right on {right} that it has not seen; similarity is the mean cosine of features of "
            "EfficientNet-Lite0 with those of held-out crossed sevens.",
        )
    else:
        app.source = str(folder)
        app.notes = ("Validation and test are the subject's own pictures; `eval subject` judges the samples.",)
    return app


def train(arguments: argparse.Namespace) -> int:
    return job.main(open_application, arguments)


# --- evaluation -------------------------------------------------------------------------------------------------------


def _metrics(arguments: argparse.Namespace, console: Console) -> dict[str, similarity.Metric]:
    """Those whose packages and models are there; of each other one line says why not."""
    found = {}
    makers = {
        "DINO": lambda: {"DINO": similarity.dino(arguments.dino)},
        "CLIP": lambda: similarity.clip(arguments.clip),
        "LPIPS": lambda: {"LPIPS": similarity.lpips(arguments.lpips)},
        "EfficientNet": lambda: {"EfficientNet": similarity.efficientnet()},
    }
    for name, make in makers.items():
        try:
            found |= make()
        except (RecipeError, ImportError) as error:
            console.print(f"{name} left out: {str(error).splitlines()[0]}")
    if not found:
        raise RecipeError("eval subject: expected at least one metric's model, got none")
    return found


def _epochs(folder: Path) -> dict[str, list[Tensor]]:
    """The pictures of each epoch, or of the folder itself."""
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {
        path.name: [images.read(each, None, 3) for each in images.listed(path, "--images")]
        for path in below or [folder]
    }


def evaluate(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """The metrics of every epoch and the epoch that the authors' rule picks: printed, and in --out."""
    console = console or Console(highlight=False)
    resolve(arguments, EVAL_DEFAULTS)
    folder, _, prompt = _said(arguments)
    if folder is None:
        subject = list(digits.load()["test"].pictures)
    else:
        subject = [images.read(path, None, 3) for path in images.listed(folder, "--data")]
    epochs = _epochs(arguments.images)
    metrics = _metrics(arguments, console)
    found = {
        epoch: {name: metric(pictures, subject, prompt) for name, metric in metrics.items()}
        for epoch, pictures in epochs.items()
    }
    for epoch, row in found.items():
        console.print(f"{epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    best = list(found)[similarity.chosen_epoch(list(found.values()))]
    console.print(f"chosen: {best}, by the largest sum of metrics over their ranges")
    results = {"job": "subject", "images": str(arguments.images), "prompt": prompt, "epochs": found, "chosen": best}
    save_evaluation(arguments.out, results)
    return 0
