"""The tasks of GLUE: columns, classes, metrics, where the files are, and the settings of the authors."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hra_kernels.recipes import RecipeError, refusing
from hra_kernels.recipes.text_data import SUFFIXES, Example, rows_of

HUB_NAME = "nyu-mll/glue"
MODEL = "microsoft/deberta-v3-base"
TARGETS = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]
"""Every linear layer of every block of DeBERTa; output.dense is the attention's as well."""


@dataclass(frozen=True)
class Task:
    """Columns of the sentences; classes in the numbers' order, none for a regression; the metric that comes first."""

    columns: Sequence[str]
    classes: Sequence[str]
    main: str
    dev: Sequence[str] = ("validation",)


_YES = ("entailment", "not_entailment")
TASKS = {
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        ("validation_matched", "validation_mismatched"),
    ),
    "sst2": Task(("sentence",), ("negative", "positive"), "accuracy"),
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
    "qnli": Task(("question", "sentence"), _YES, "accuracy"),
    "rte": Task(("sentence1", "sentence2"), _YES, "accuracy"),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
    "stsb": Task(("sentence1", "sentence2"), (), "correlation"),
}

# epochs, peak learning rate, warm-up steps, length
_SCRIPT = {
    "mnli": (8, 9e-4, 1000, 256),
    "sst2": (16, 1e-3, 500, 128),
    "cola": (28, 8e-4, 100, 64),
    "qqp": (10, 9e-4, 1000, 320),
    "qnli": (12, 1e-3, 500, 512),
    "rte": (20, 1e-3, 50, 320),
    "mrpc": (55, 2e-3, 50, 320),
    "stsb": (43, 3e-3, 50, 128),
}
# epochs and learning rate with λ = 0, and with λ = 1e-6
_PAPER = {
    "mnli": ((8, 1e-2), (5, 2e-3)),
    "sst2": ((10, 3e-3), (8, 2e-3)),
    "cola": ((34, 9e-3), (12, 2e-3)),
    "qqp": ((12, 8e-3), (11, 2e-3)),
    "qnli": ((12, 1e-2), (6, 2e-3)),
    "rte": ((11, 5e-3), (44, 1e-3)),
    "mrpc": ((60, 6e-3), (35, 1e-3)),
    "stsb": ((39, 5e-3), (30, 9e-4)),
}
PRESETS = ("script", "paper")


def preset(name: str, task: str, penalty: float) -> dict[str, float]:
    """{epochs, lr, warm_up, max_length, rank, batch_size} of the official script or of the paper's appendix B.

    The appendix has columns for λ = 0 and 1e-6: another positive λ takes the second, Gram-Schmidt (inf) the first.
    Warm-up and length are the script's in both.
    """
    epochs, lr, warm_up, length = _SCRIPT[task]
    if name == "paper":
        epochs, lr = _PAPER[task][0 < penalty < float("inf")]
    return {"epochs": epochs, "lr": lr, "warm_up": warm_up, "max_length": length, "rank": 8, "batch_size": 32}


def load(task: str, data: str | None) -> dict[str, list[Example]]:
    """Examples of train and of each dev split; from the hub, or a folder with the splits' files or with task/ in it.

    Raises:
        RecipeError: no such folder, a split's file is missing, or a line lacks a field or has another label.
    """
    splits = ("train", *TASKS[task].dev)
    if data is None:
        raw = {split: _with_datasets(HUB_NAME, name=task, split=split) for split in splits}
        return {split: _examples(f"{HUB_NAME} {task} {split}", rows, TASKS[task]) for split, rows in raw.items()}
    folder = Path(data)
    if not folder.is_dir():
        raise RecipeError(f"--data {data}: expected a folder with the files of GLUE's {task}, got none")
    folder = folder / task if (folder / task).is_dir() else folder
    return {split: _examples(str(path[0]), _rows(path), TASKS[task]) for split, path in _files(folder, splits).items()}


def _files(folder: Path, splits: Sequence[str]) -> dict[str, list[Path]]:
    """As the hub lays them out (train-00000-of-00001.parquet), or train.jsonl and so on."""
    found = {}
    for split in splits:
        paths = [folder / (split + suffix) for suffix in SUFFIXES if (folder / (split + suffix)).exists()]
        found[split] = paths or sorted(folder.glob(f"{split}-*.parquet"))
        if not found[split]:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"
            wanted = f"{split}{{{','.join(SUFFIXES)}}} or {split}-*.parquet"
            raise RecipeError(f"--data {folder}: expected {wanted}, got {there}")
    return found


def _rows(paths: Sequence[Path]) -> list[tuple[int, dict]]:
    if paths[0].suffix == ".parquet":
        return _with_datasets("parquet", data_files=[str(path) for path in paths], split="train")
    return rows_of(paths[0])


def _with_datasets(name: str, **options) -> list[tuple[int, dict]]:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise RecipeError(
            "Parquet files and the hub need the package 'datasets': pip install datasets (or give --data a folder with "
            f"{', '.join(SUFFIXES)} files)"
        ) from error
    with refusing(f"data set {name}"):
        return list(enumerate(datasets.load_dataset(name, **options), 1))


def _examples(source: str, rows: Sequence[tuple[int, Mapping]], task: Task) -> list[Example]:
    found = []
    for line, row in rows:
        missing = [name for name in (*task.columns, "label") if row.get(name) is None or str(row[name]).strip() == ""]
        if missing:
            there = ", ".join(map(str, row)) or "none"
            raise RecipeError(f"{source} line {line}: no value in field {missing[0]!r}; the fields are {there}")
        first, *second = (str(row[name]).strip() for name in task.columns)
        found.append(Example(first, second[0] if second else None, _label(source, line, row["label"], task)))
    if not found:
        raise RecipeError(f"{source}: expected examples, got none")
    return found


def _label(source: str, line: int, label, task: Task) -> str:
    text = str(label).strip()
    numbers = {str(number): name for number, name in enumerate(task.classes)}
    if text in task.classes or text in numbers:
        return numbers.get(text, text)
    if not task.classes:
        try:
            return str(float(text))
        except ValueError:
            pass
    wanted = "a number" if not task.classes else f"one of {', '.join(task.classes)}, or its number"
    raise RecipeError(f"{source} line {line}: expected as label {wanted}, got {text!r}")
