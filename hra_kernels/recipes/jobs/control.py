"""Pictures after a control picture (edges, segments, landmarks); by default edges of digits, by a small generator.

As in the authors' code eight small convolutions encode the control picture, trained whole, and HRA adapts the linear
layers of the UNet's attention and of its feed-forward's gate. The default generator is small and trained here once.
"""

import argparse
import os
import random
from pathlib import Path

import numpy
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import hra_kernels.peft
from hra_kernels.recipes import RecipeError, control_metrics, diffusion, digits, images, job, refusing
from hra_kernels.recipes.application import Settings
from hra_kernels.recipes.diffusion import Generator
from hra_kernels.recipes.image_application import IMAGE_OPTIONS, Example, ImageApplication, open_base, picture_of
from hra_kernels.recipes.options import ADAPTER, COMMON_BUT_LENGTH, MODEL, TRAINING, option, positive, resolve
from hra_kernels.recipes.saving import save_evaluation
from hra_kernels.recipes.text_data import rows_of

EXTRA = "images"
KINDS = ("canny", "segm", "landmark")
DEFAULTS = {
    "rank": 8,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
    "penalty": 0.0,
    "bias": "none",
    "batch_size": 8,
    "lr": 9e-4,
    "control": "canny",
    "sampling_steps": 50,
    "guidance": 9.0,
    "samples": 4,
    "seed": 0,
    "out": Path("runs/control"),
}
DIGITS = {"batch_size": 16, "lr": 3e-3, "sampling_steps": 20, "guidance": 2.0, "samples": 8}
QUICK = {"sampling_steps": 10, "samples": 4}
PRESETS = {  # the defaults are the official script's
    "script": {"lr": 9e-4, "batch_size": 8, "rank": 8},
    "paper": {"lr": 3e-5, "batch_size": 8, "rank": 8},
}
EPOCHS = {"canny": 11, "segm": 20, "landmark": 20}
DIGITS_STEPS, QUICK_STEPS = 250, 10
HELD_OUT, QUICK_HELD_OUT = 48, 8  # pictures of validation, and as many of test
WARM_UP = 0.05  # share of the default job's steps
GENERATED = ("results", "targets", "controls")

EPILOG = f"""\
examples:
  hra-kernels train control                              a generator of digits, trained here once, follows edges
  hra-kernels train control --quick                      a shorter generator, {QUICK_STEPS} steps
  hra-kernels train control --control segm --model stable-diffusion-v1-5/stable-diffusion-v1-5 --data ade20k
  torchrun --nproc-per-node 2 -m hra_kernels.cli generate control --model runs/control/merged --data ade20k
  hra-kernels eval control --images runs/control-pictures

--data takes a .jsonl file, or a folder with train.jsonl and val.jsonl. A line has `target`, a picture's path from the
file's folder, `prompt`, and `source`, the control picture's path; without it --control canny takes the target's edges.
"""

_DATA = (
    option(MODEL, "--data", "pictures with prompts and controls (default: digits)", metavar="FILE_OR_FOLDER"),
    option(MODEL, "--control", "what the control pictures are", choices=KINDS),
)
OPTIONS = (
    option(MODEL, "--model", "Stable Diffusion (default: a small one, trained here)", metavar="NAME_OR_FOLDER"),
    *_DATA,
    option(ADAPTER, "--preset", "settings of the official script or of the paper's appendix B", choices=[*PRESETS]),
    *IMAGE_OPTIONS,
    *COMMON_BUT_LENGTH,
    option(TRAINING, "--epochs", "passes over the data, instead of --steps", type=positive(float), metavar="N"),
)

GENERATE_DEFAULTS = {
    "control": "canny",
    "sampling_steps": 50,
    "guidance": 9.0,
    "seed": 0,
    "out": Path("runs/control-pictures"),
}
GENERATE_OPTIONS = (
    option(MODEL, "--model", "the merged model, or the base model", metavar="NAME_OR_FOLDER", required=True),
    option(MODEL, "--adapter", "an adapter's folder to load and merge first", metavar="FOLDER"),
    *_DATA,
    *(each for each in IMAGE_OPTIONS if each.flag in ("--resolution", "--sampling-steps", "--guidance")),
    option("generation", "--limit", "first N pictures", type=positive(int), metavar="N"),
    option("generation", "--seed", "of the noise", type=int, metavar="N"),
    option("generation", "--out", f"folder for {', '.join(GENERATED)}; what is there is kept", type=Path,
           metavar="DIR"),
)  # fmt: skip

EVAL_DEFAULTS = {"control": "canny", "classes": 150, "scale": 0.5, "out": Path("runs/control-eval")}
EVAL_OPTIONS = (
    option("evaluation", "--control", "what the control pictures are", choices=KINDS),
    option("evaluation", "--images", "canny: what `generate control` left", type=Path, metavar="FOLDER"),
    option("evaluation", "--predictions", "segm: maps of labels; landmark: .txt files with a point a line",
           type=Path, metavar="FOLDER"),
    option("evaluation", "--labels", "the true ones, with the same names", type=Path, metavar="FOLDER"),
    option("evaluation", "--classes", "segm: number of classes", type=positive(int), metavar="N"),
    option("evaluation", "--scale", "landmark: of the true points", type=positive(float), metavar="S"),
    option("evaluation", "--out", "folder for the results", type=Path, metavar="DIR"),
)  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def _read(path: Path, kind: str) -> list[Example]:
    found = []
    for line, row in rows_of(path):
        needed = ("target", "prompt") if kind == "canny" else ("source", "target", "prompt")
        for name in needed:
            if not str(row.get(name) or "").strip():
                there = ", ".join(map(str, row)) or "none"
                raise RecipeError(f"{path} line {line}: no value in field {name!r}; the fields are {there}")
        files = {name: path.parent / str(row[name]) for name in ("source", "target") if row.get(name)}
        for name, file in files.items():
            if not file.is_file():
                raise RecipeError(f"{path} line {line}: {name}: expected an image, got no file {file}")
        found.append(Example(files["target"], str(row["prompt"]), files.get("source")))
    if not found:
        raise RecipeError(f"{path}: expected lines with target and prompt, got none")
    return found


def _digits(part: str) -> list[Example]:
    found = digits.load()[part]
    return [Example(picture, digits.prompt(name)) for picture, name in zip(found.pictures, found.names, strict=True)]


def _held_out(data: str | None, kind: str, seed: int) -> tuple[list[Example], list[Example]]:
    """(examples to train on, examples held out)."""
    if data is None:
        held = _digits("held out")
        random.Random(seed).shuffle(held)  # the data is sorted by digit
        return _digits("train"), held
    path = Path(data)
    if path.is_dir():
        for name in ("train.jsonl", "val.jsonl"):
            if not (path / name).is_file():
                there = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
                raise RecipeError(f"--data {path}: expected train.jsonl and val.jsonl, got {there}")
        return _read(path / "train.jsonl", kind), _read(path / "val.jsonl", kind)
    found = _read(path, kind)
    if len(found) < 3:
        raise RecipeError(f"--data {path}: expected at least 3 lines to split, got {len(found)}")
    random.Random(seed).shuffle(found)
    count = max(2, min(2 * HELD_OUT, len(found) // 10))
    return found[count:], found[:count]


# --- training ---------------------------------------------------------------------------------------------------------


class Control(ImageApplication):
    """Pictures after controls; of edges it is told how well they are kept."""

    heads = ("conv_in.hint.",)

    def opened(self, examples):
        pictures, controls = [], []
        side, kind = self.arguments.resolution, self.arguments.control
        for each in examples:
            picture, control = opened(each, side, self.base.channels, kind)
            pictures.append(picture)
            controls.append(control)
        return torch.stack(pictures), torch.stack(controls)

    def last(self, model: nn.Module) -> dict[str, float]:
        tested = self.examples["test"]
        drawn = self.sample(model, tested)
        targets, controls = self.opened(tested)
        if not self.drawn:
            self.drawn = [("control", controls[:10]), ("picture it is of", targets[:10]), ("before", drawn[:10])]
        elif len(self.drawn) == 3:  # later ones are a rival's
            self.drawn.append(("after", drawn[:10]))
        if self.arguments.control != "canny":
            return {}
        pairs = [(images.edges(one), images.edges(other)) for one, other in zip(drawn, targets, strict=True)]
        return {f"edge {name}": value for name, value in control_metrics.mean_edge_scores(pairs).items()}


def opened(example: Example, side: int, channels: int, kind: str) -> tuple[Tensor, Tensor]:
    """The picture (channels, side, side) and its control (3, side, side)."""
    picture = picture_of(example, side, channels)
    if example.control is None:
        return picture, images.edges(picture)
    return picture, images.read(example.control, side, 3, nearest=kind == "segm")


def open_application(arguments: argparse.Namespace) -> Control:
    """Raises RecipeError: the model or the data are not what the options say."""
    preset = PRESETS.get(arguments.preset, {})
    own = [DIGITS] if arguments.model is None else []
    resolve(arguments, preset, QUICK if arguments.quick else {}, *own, DEFAULTS)
    if (arguments.model is None) != (arguments.data is None):
        raise RecipeError("--model, --data: expected both, or neither for the default generator and its digits")
    if arguments.data is None and arguments.control != "canny":
        raise RecipeError(f"--control {arguments.control}: expected with --model and --data; digits have edges alone")
    train, held = _held_out(arguments.data, arguments.control, arguments.seed)
    base, recipe = open_base(arguments, controlled=True)
    count = QUICK_HELD_OUT if arguments.quick else HELD_OUT
    examples = {"train": train, "validation": held[0::2][:count], "test": held[1::2][:count]}
    opened(train[0], arguments.resolution, base.channels, arguments.control)  # refuses now
    steps = _steps(arguments, len(train))
    app = Control(arguments, base, examples, steps)
    app.shown = examples["validation"][: arguments.samples]
    checks, warm_up = (2, 1) if arguments.quick else (5, max(1, round(WARM_UP * steps)) if own else 0)
    schedule = "cosine" if own else "constant"
    app.settings = Settings(steps, warm_up, schedule=schedule, checks=checks, weight_decay=1e-2, clip=1.0)
    app.source = f"{arguments.control} of " + (str(arguments.data) if arguments.data else "digits of MNIST")
    widths = ", ".join(map(str, base.control))
    notes = [f"The convolutions over the control picture ({widths} channels) are trained whole."]
    if own:
        notes.append(f"The generator ({recipe.steps} steps) is self-trained; edges are Canny's, at 28 x 28 pixels.")
    app.notes = tuple(notes)
    return app


def _steps(arguments: argparse.Namespace, count: int) -> int:
    if arguments.steps or arguments.quick:
        return arguments.steps or QUICK_STEPS
    if arguments.model is None and not arguments.epochs:
        return DIGITS_STEPS
    return max(1, round((arguments.epochs or EPOCHS[arguments.control]) * count / arguments.batch_size))


def train(arguments: argparse.Namespace) -> int:
    return job.main(open_application, arguments)


# --- generation -------------------------------------------------------------------------------------------------------


def _trained(arguments: argparse.Namespace) -> tuple[Generator, nn.Module]:
    base = Generator.open(arguments.model, arguments.seed, controlled=arguments.adapter is not None)
    if not base.control:
        raise RecipeError(f"--model {arguments.model}: expected a model that `train control` merged, or --adapter")
    if not arguments.adapter:
        return base, base.model()
    refused = refusing(f"--adapter {arguments.adapter}: expected an adapter of this model, got")
    with refused, hra_kernels.peft.enabled():
        model = PeftModel.from_pretrained(base.model(), arguments.adapter)
        if not model.active_peft_config.modules_to_save:
            raise RecipeError(
                f"--adapter {arguments.adapter}: expected one that `train control` saved, got one without layers for "
                "the control picture"
            )
        return base, model.merge_and_unload()


def generate(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """Pictures for the held-out controls, each of torchrun's processes drawing its share."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    console = console or Console(highlight=False, quiet=rank > 0)
    resolve(arguments, GENERATE_DEFAULTS)
    examples = _held_out(arguments.data, arguments.control, arguments.seed)[1][: arguments.limit]
    base, model = _trained(arguments)
    side = arguments.resolution or base.resolution
    folders = [arguments.out / name for name in GENERATED]
    numbers = [n for n in range(rank, len(examples), processes) if not (folders[0] / f"{n:06d}.png").is_file()]
    starts = range(0, len(numbers), diffusion.SAMPLED_AT_ONCE)
    for start in track(starts, "drawing", console=console):
        chosen = numbers[start : start + diffusion.SAMPLED_AT_ONCE]
        pairs = [opened(examples[n], side, base.channels, arguments.control) for n in chosen]
        controls = torch.stack([control for _, control in pairs])
        prompts, seeds = [examples[n].prompt for n in chosen], [arguments.seed * 1_000_003 + n for n in chosen]
        drawn = base.sample(model, prompts, seeds, arguments.sampling_steps, arguments.guidance, controls, side)
        for n, picture, (target, control) in zip(chosen, drawn, pairs, strict=True):
            # the result last: it says that the others are there
            for folder, each in zip(reversed(folders), (control, target, picture), strict=True):
                images.save(each, folder / f"{n:06d}.png")
    console.print(f"{len(examples)} pictures: {folders[0]}")
    return 0


# --- evaluation -------------------------------------------------------------------------------------------------------


def _paired(folder: Path, what: str, other: Path, suffixes: set[str]) -> list[tuple[Path, Path]]:
    """Files of one folder with those of the same name in another."""
    if folder is None or other is None or not folder.is_dir() or not other.is_dir():
        raise RecipeError(f"{what}: expected two folders, got {folder} and {other}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    missing = [path.name for path in found if not (other / path.name).is_file()]
    if missing or not found:
        lacks = missing[0] if missing else f"{', '.join(sorted(suffixes))} files"
        raise RecipeError(f"{what}: expected every file of {folder} in {other}, got no {lacks}")
    return [(path, other / path.name) for path in found]


def _confusion(found: Path, wanted: Path, classes: int) -> Tensor:
    one, other = images.labels(found), images.labels(wanted)
    if one.shape != other.shape:
        raise RecipeError(f"{found}: expected the size of {wanted}, {tuple(other.shape)}, got {tuple(one.shape)}")
    for path, each in ((found, one), (wanted, other[other != control_metrics.IGNORED])):
        if each.numel() and each.max() >= classes:
            raise RecipeError(f"{path}: expected labels below --classes {classes}, got {each.max()}")
    return control_metrics.confusion(one, other, classes)


def _points(path: Path) -> Tensor:
    with refusing(f"{path}: expected a point of two numbers on each line, got"):
        points = torch.from_numpy(numpy.loadtxt(path, ndmin=2)).float()
        if points.shape[1] < 2:
            raise ValueError(f"{points.shape[1]} on a line")
        return points[:, :2]


def _scores(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.control == "canny":
        if arguments.images is None:
            raise RecipeError("--images: expected the folder that `generate control` filled, got none")
        pairs = _paired(arguments.images / "results", "--images", arguments.images / "targets", images.SUFFIXES)
        found = [tuple(images.edges(images.read(path, None, 3)) for path in pair) for pair in pairs]
        return {**control_metrics.mean_edge_scores(found), "pictures": len(found)}
    what = "--predictions, --labels"
    if arguments.control == "segm":
        pairs = _paired(arguments.predictions, what, arguments.labels, images.SUFFIXES)
        counts = sum(_confusion(*pair, arguments.classes) for pair in pairs)
        return {**control_metrics.segment_scores(counts), "pictures": len(pairs)}
    distances = []
    for pair in _paired(arguments.predictions, what, arguments.labels, {".txt"}):
        found, wanted = map(_points, pair)
        if found.shape != wanted.shape:
            raise RecipeError(f"{pair[0]}: expected {len(wanted)} points as in {pair[1]}, got {len(found)}")
        distances.append(control_metrics.landmark_distance(found, arguments.scale * wanted))
    return {"distance": sum(distances) / len(distances), "pictures": len(distances)}


def evaluate(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """The metrics of the paper for one kind of control: printed, and in --out."""
    console = console or Console(highlight=False)
    resolve(arguments, EVAL_DEFAULTS)
    found = _scores(arguments)
    console.print(f"{arguments.control}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    save_evaluation(arguments.out, {"job": "control", "control": arguments.control, **found})
    return 0
