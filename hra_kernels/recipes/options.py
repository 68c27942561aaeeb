"""The options of the jobs, as tables: what all take, and how the command line reads one. Imports nothing heavy."""

import argparse
import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOBS = Path(__file__).parent / "jobs"


@dataclass(frozen=True)
class Option:
    """One option of the command line; `settings` are argparse's own."""

    group: str
    flag: str
    help: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def option(group: str, flag: str, help: str, **settings: Any) -> Option:
    return Option(group, flag, help, settings)


def positive(kind: type) -> type:
    """An argparse type: a finite number of this kind (int or float) above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {'integer' if kind is int else 'number'}"
    return parse


def _seed(text: str) -> int:
    # further values are none that PyTorch takes
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits, got {text!r}")
    return value


def _strength(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, or inf, got {text!r}")
    return value


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


MODEL, ADAPTER, TRAINING = "model and data", "adapter", "training"

COMMON_BUT_LENGTH = (
    option(ADAPTER, "--rank", "reflections per layer", type=positive(int), metavar="R"),
    option(
        ADAPTER,
        "--target-modules",
        "layers to adapt, comma-separated; 'all-linear' for every Linear",
        type=_names,
        metavar="NAMES",
    ),
    option(ADAPTER, "--apply-gs", "Gram-Schmidt: reflect along orthogonal vectors", action="store_true"),
    option(
        ADAPTER,
        "--lambda",
        "strength of the orthogonality penalty; inf is --apply-gs",
        dest="penalty",
        type=_strength,
        metavar="L",
    ),
    option(TRAINING, "--steps", "optimizer steps", type=positive(int), metavar="N"),
    option(TRAINING, "--batch-size", "examples per step, over all processes", type=positive(int), metavar="N"),
    option(TRAINING, "--lr", "peak learning rate", type=positive(float), metavar="RATE"),
    option(TRAINING, "--seed", "of splits, head, adapter and order", type=_seed, metavar="N"),
    option(TRAINING, "--quick", "fewer steps and examples", action="store_true"),
    option(TRAINING, "--threads", "CPU threads (default: PyTorch's choice)", type=positive(int), metavar="N"),
    option(TRAINING, "--no-compare", "leave out the other methods and the timing", action="store_true"),
    option(TRAINING, "--resume", "go on from the checkpoints of an interrupted run in --out", action="store_true"),
    option(TRAINING, "--out", "folder for the results", type=Path, metavar="DIR"),
)
LENGTH = option(MODEL, "--max-length", "cut longer inputs", type=positive(int), metavar="TOKENS")
COMMON = (LENGTH, *COMMON_BUT_LENGTH)


def add(parser: argparse.ArgumentParser, options: Sequence[Option], defaults: Mapping[str, Any]) -> None:
    """Give the parser these options. `defaults` are shown, and filled in by `resolve`: a preset may come between."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in options:
        name = each.settings.get("dest", each.flag.lstrip("-").replace("-", "_"))
        default = defaults.get(name)
        shown = ",".join(default) if isinstance(default, list) else default
        text = each.help if default is None else f"{each.help} (default: {shown})"
        group = groups.setdefault(each.group, parser.add_argument_group(each.group))
        # where results go is asked for before presets are read, and is in none
        final = {"default": default} if isinstance(default, Path) else {}
        group.add_argument(each.flag, help=text, **final, **each.settings)


def resolve(arguments: argparse.Namespace, *layers: Mapping[str, Any]) -> None:
    """Fill what was not given from the first of the layers that has it."""
    for layer in layers:
        for name, value in layer.items():
            if getattr(arguments, name, None) is None:
                setattr(arguments, name, value)
    if getattr(arguments, "penalty", None) == float("inf"):
        arguments.penalty, arguments.apply_gs = 0.0, True


def _read(path: Path) -> ast.Module:
    """A job's file, not imported."""
    return ast.parse(path.read_text(encoding="utf-8"))


def jobs(function: str = "train") -> dict[str, str]:
    """Name and first sentence of every job that has this function: one file each in the folder `jobs`."""
    found = {}
    for path in sorted(JOBS.glob("[a-z]*.py")):
        tree = _read(path)
        if any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body):
            said = ast.get_docstring(tree) or path.stem
            found[path.stem] = said.split("\n\n")[0].replace("\n", " ").rstrip(".")
    return found


def extra(job: str) -> str:
    """The extra of this package with what the job imports: its EXTRA, or `train`."""
    for node in _read(JOBS / f"{job}.py").body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["EXTRA"]:
            return ast.literal_eval(node.value)
    return "train"
