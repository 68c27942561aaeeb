"""From an application to its page: train, save, load, merge, export, time, draw. The same for every job.

Validation picks the step whose adapter is kept; test is looked at twice, before training and after. Then the adapter is
saved, loaded into a fresh model, merged, exported as LoRA, and loaded with PEFT's own HRA layers; each time the test
outputs must agree. Last, a training step is timed beside the other ways to train the model.
"""

import argparse
import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

import hra_kernels.peft
from hra_kernels import env, ops
from hra_kernels.recipes import plots, reason, refusing, step_cost, summary, trainer
from hra_kernels.recipes.application import Application
from hra_kernels.recipes.saving import cannot_write, written_whole

COST_ROUNDS, QUICK_COST_ROUNDS = 11, 5
COST_SECONDS = 90  # no further round is begun after this

OURS, PEFT_HRA, LORA = "HRA, hra_kernels", "HRA, PEFT", "LoRA, PEFT"
FLOOR, HEAD_ONLY = "frozen, gradient through it", "frozen, head only"

# what a job leaves in --out, besides adapter/, merged/ and lora/
RESULTS = ("results.json", "summary.md", "loss.png", "loss.svg", "cost.png", "cost.svg")


@contextlib.contextmanager
def _interrupted(state: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C inside the `with` block say what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (state(),)
        raise


def first_process() -> bool:
    """Of torchrun's processes; true without it."""
    return os.environ.get("RANK", "0") == "0"


def _adapted(app: Application, lora: bool = False) -> PeftModel:
    chosen = app.arguments
    if lora:
        return app.base.adapted(app.base.lora_config(chosen.rank, chosen.target_modules))
    return app.base.adapted(app.base.hra_config(chosen.rank, chosen.target_modules, chosen.apply_gs, **app.layer))


def _train(app: Application, model: PeftModel, folder: Path, console: Console, title: str, resume: str | None):
    """`trainer.fit`; a full disk is one sentence and leaves no checkpoint that is not whole."""
    try:
        return trainer.fit(app, model, folder, console, title, resume)
    except Exception as error:
        trainer.left_by_interruption(folder)
        if cannot_write(error):
            with written_whole(app.arguments.out):
                raise OSError(getattr(error, "errno", None), reason(error)) from error
        raise


def _fit(app: Application, console: Console, folder: Path) -> tuple[PeftModel, trainer.Training, dict[str, Any]]:
    """The trained model, how it went, and what results.json says of that."""
    arguments = app.arguments
    resume = trainer.checkpoint_to_resume(arguments, folder)
    model = _adapted(app)
    trainable, total = model.get_nb_trainable_parameters()
    parameter = next(model.parameters())
    with refusing(ops.BACKEND_VARIABLE):
        backend = ops.select_backend(parameter.device, parameter.dtype, arguments.rank)
    console.print(f"model   {app.base.name}, {total / 1e6:.1f} M parameters, {trainable:,} trained")
    console.print(f"data    {app.source}: " + ", ".join(f"{n} {part}" for part, n in app.sizes.items()))
    console.print(
        f"HRA     r = {arguments.rank} on {', '.join(arguments.target_modules)}; backend {backend}, "
        f"{torch.get_num_threads()} threads"
    )
    for note in app.notes:
        console.print(f"note    {note}")
    before = app.metrics(app.outputs(model, "test"), "test") | app.last(model)
    console.print(f"before  test {app.main.name} {app.main.text(before[app.main.name])}\n")
    model, training = _train(app, model, folder, console, "training", resume)
    results = {
        "job": arguments.job,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "run"},
        "model": app.base.name,
        "parameters": {"total": total, "trained": trainable},
        "data": {"source": app.source, **app.described, **app.sizes},
        "notes": list(app.notes),
        "backend": backend,
        "steps": app.settings.steps,
        "main_metric": app.main.name,
        "test": {**app.reference, "before: pretrained": before},
        "kept_step": training.kept_step,
        "validation": training.checks,
        "losses": training.losses,
        "training_seconds": training.seconds,
        "environment": env.report(),
    }
    return model, training, results


def _compare_saved(app: Application, folder: Path, model: PeftModel, trained: Tensor) -> dict[str, dict[str, float]]:
    """Test metrics and largest difference from the trained model's outputs, of every way to use what was saved."""

    def compared(other) -> dict[str, float]:
        outputs = app.outputs(other, "test")
        return {**app.metrics(outputs, "test"), "max_difference": trainer.largest_difference(outputs, trained)}

    model.save_pretrained(folder / "adapter")
    found, base = {}, app.base
    with hra_kernels.peft.enabled():
        hra_kernels.peft.export_lora(model, folder / "lora")
        loaded = base.saved_adapter(folder / "adapter")
        found["loaded into a fresh model"] = compared(loaded)
        merged = loaded.merge_and_unload()
        found["merged, no adapter left"] = compared(merged)
        base.save_merged(merged, folder / "merged")
    found["exported, loaded as LoRA"] = compared(base.saved_adapter(folder / "lora"))
    if not app.layer:
        with hra_kernels.peft.disabled():
            found["loaded with PEFT's own HRA"] = compared(base.saved_adapter(folder / "adapter"))
    return found


def _rivals(app: Application, console: Console, folder: Path) -> dict[str, dict[str, float]]:
    """Test metrics of LoRA, trained with the same settings on the same batches, by every process."""
    found = {}
    for name in () if app.arguments.no_compare else app.rivals:
        model, _ = _train(app, _adapted(app, lora=True), folder, console, name, None)
        if first_process():
            trainer.forget_checkpoints(folder)
        found[f"{name}, trained alike"] = app.metrics(app.outputs(model, "test"), "test") | app.last(model)
    return found


def methods(app: Application, state: dict[str, Tensor]) -> list[step_cost.Method]:
    """The ways to train the model: HRA's two go on from `state`, since at the start every reflection cancels."""
    with hra_kernels.peft.enabled():
        hra = [step_cost.Method(OURS, _adapted(app), app.loss)]
    if not app.layer:
        with hra_kernels.peft.disabled():
            hra.append(step_cost.Method(PEFT_HRA, _adapted(app), app.loss))
    for method in hra:
        set_peft_model_state_dict(method.model, state)
    frozen = {FLOOR: step_cost.frozen(app.base, app.heads, through=True)}
    if app.heads:
        frozen = {HEAD_ONLY: step_cost.frozen(app.base, app.heads, through=False), **frozen}
    found = [step_cost.Method(name, model, app.loss) for name, model in frozen.items()]
    return [*found, hra[0], step_cost.Method(LORA, _adapted(app, lora=True), app.loss), *hra[1:]]


def _time(app: Application, console: Console, state: dict[str, Tensor]) -> dict[str, Any]:
    """The comparison of a training step's cost, printed, and as it stands in results.json."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rounds = QUICK_COST_ROUNDS if app.arguments.quick else COST_ROUNDS
    order = list(trainer.SimilarLengths(app.train, app.batch_size, app.arguments.seed + 1))
    starts = range(0, min(len(order), rounds * app.batch_size), app.batch_size)
    batches = [app.collate([app.train[i] for i in order[start : start + app.batch_size]]) for start in starts]
    timed = methods(app, state)
    with Progress(TextColumn("timing"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("", total=rounds + len(timed))
        step_cost.measure(timed, batches, rounds, COST_SECONDS, lambda: progress.advance(task))
    named = {method.name: method for method in timed}
    seconds = {method.name: method.median() for method in timed}
    console.print(_cost_table(timed))
    found = {
        "load_average_before_timing": load,
        "step_cost": {method.name: method.summary() for method in timed},
        "over_floor": seconds[OURS] / seconds[FLOOR],
    }
    if PEFT_HRA not in named:
        return found
    difference = step_cost.largest_loss_difference(named[OURS], named[PEFT_HRA])
    faster = seconds[PEFT_HRA] / seconds[OURS]
    console.print(
        f"\n[bold]{faster:.1f} times faster than PEFT's HRA[/bold], on the same batches with the same losses "
        f"(largest relative difference {difference:.1e})"
    )
    return found | {
        "times_faster_than_peft_hra": faster,
        "largest_loss_difference_from_peft_hra": difference,
    }


def _table(headings: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _metric_table(app: Application, results: dict[str, Any]) -> Table:
    others = [name for name in results["test"]["after"] if name != app.main.name]
    table = _table(["test split", app.main.name, *others, f"max {app.output} difference"])
    for name, found in {**results["test"], **results["saved"]}.items():
        difference = f"{found['max_difference']:.1e}" if "max_difference" in found else ""
        more = [f"{found[other]:.3f}" if other in found else "" for other in others]
        table.add_row(name, app.main.text(found[app.main.name]), *more, difference, style=("", "bold")[name == "after"])
    return table


def _cost_table(timed: list[step_cost.Method]) -> Table:
    table = _table(["training step", "median", "over the floor"])
    floor = next(method for method in timed if method.name == FLOOR).median()
    for method in timed:
        note = " (the floor)" if method.name == FLOOR else ""
        row = method.name + note, f"{1e3 * method.median():.0f} ms", f"{method.median() / floor:.2f} x"
        table.add_row(*row, style="bold" if method.name == OURS else "")
    return table


def _draw(app: Application, training: trainer.Training, results: dict[str, Any], folder: Path) -> None:
    title = f"HRA r = {app.arguments.rank} on {app.base.name}, {app.source}"
    reference = {name: found[app.main.name] for name, found in app.reference.items() if app.main.name in found}
    plots.plot_training(folder, title, training.losses, training.checks, training.kept_step, app.main, reference)
    if "step_cost" in results:
        seconds = [(name, cost["median_s"]) for name, cost in results["step_cost"].items()]
        plots.plot_cost(folder, "One training step", seconds, OURS, FLOOR)


def _report(app: Application, console: Console, training, results: dict[str, Any], state: dict[str, Tensor]) -> None:
    """The rest of the page: the table, the other methods, the timing, the pictures."""
    arguments, out = app.arguments, app.arguments.out
    results["test"] |= _rivals(app, console, out / "checkpoints")
    console.print()
    console.print(_metric_table(app, results))
    if not arguments.no_compare:
        console.print()
        results |= _time(app, console, state)
    results["seconds"] = time.monotonic() - app.started
    with written_whole(out) as folder:
        _draw(app, training, results, folder)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "summary.md").write_text(summary.markdown(results, app.main, app.output, OURS, FLOOR))
        written = " ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"\n{results['seconds']:.0f} s in all. In {out}: adapter/ merged/ lora/ {written}")


def run(open_application: Callable[[argparse.Namespace], Application], arguments, console: Console) -> dict[str, Any]:
    """The whole job; what it measured, as it stands in results.json. Under torchrun, every process but the first only
    trains, and gives an empty dictionary.

    Adapter, merged model and LoRA are written as soon as they are known to give the trained model's answers, the
    results at the end; each is there whole or not at all.
    """
    started = time.monotonic()
    first = first_process()
    console.quiet = console.quiet or not first
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out
    if first:
        with written_whole(out):  # refuses now, not after the training
            pass
    checkpoints = out.resolve() / "checkpoints"
    app = open_application(arguments)
    app.started = started
    with _interrupted(lambda: trainer.left_by_interruption(checkpoints)):
        with hra_kernels.peft.enabled():
            model, training, results = _fit(app, console, checkpoints)
        if not first:
            _rivals(app, console, checkpoints)
            return {}
        outputs = app.outputs(model, "test")
        results["test"]["after"] = app.metrics(outputs, "test") | app.last(model)
        state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
        with written_whole(out, forgetting=RESULTS) as folder:
            results["saved"] = _compare_saved(app, folder, model, outputs)
            app.draw(folder, checkpoints)
        trainer.forget_checkpoints(checkpoints)
    with _interrupted(lambda: f"{out} holds adapter/, merged/ and lora/ of this run, but no results"):
        _report(app, console, training, results, state)
    return results


def main(open_application: Callable[[argparse.Namespace], Application], arguments: argparse.Namespace) -> int:
    run(open_application, arguments, Console(highlight=False))
    return 0
