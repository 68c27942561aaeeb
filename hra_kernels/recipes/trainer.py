"""transformers' Trainer with HRA's penalty, an application's own validation, and checkpoints that refuse or resume."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from peft import PeftModel, PeftType, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hra_kernels.recipes import RecipeError
from hra_kernels.recipes.application import Application
from hra_kernels.regularizer import model_orthogonality_penalty

POOL = 16
"""Batches of examples that are sorted by length together in training."""
UNCOMPARED = ("resume", "threads", "no_compare", "out", "run")
"""Options that a resumed run may have otherwise than the interrupted one."""
ARGUMENTS = "arguments.json"


class SimilarLengths(torch.utils.data.Sampler):
    """Each pass over the examples in a new order, drawn from the seed, with examples of similar length together.

    Similar means within the next POOL batches' worth of examples: padding to the longest of 32 random sentences of
    the default data would nearly double the tokens.
    """

    def __init__(self, rows: list[dict], batch_size: int, seed: int):
        self.lengths = [len(row.get("input_ids", ())) for row in rows]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        order, size = torch.randperm(len(self.lengths), generator=generator).tolist(), self.batch_size
        for start in range(0, len(order) - size + 1, POOL * size):
            pool = sorted(order[start : start + POOL * size], key=self.lengths.__getitem__)
            for number in torch.randperm(len(pool) // size, generator=generator).tolist():
                yield from pool[number * size : (number + 1) * size]


class Trainer(transformers.Trainer):
    """The loss plus λ times the penalty; validation is the application's, whole on every process."""

    def __init__(self, application: Application, model: PeftModel, arguments: transformers.TrainingArguments):
        self.application = application
        self.of_hra = model.active_peft_config.peft_type == PeftType.HRA  # a rival has no reflections
        self.penalty = application.arguments.penalty if self.of_hra else 0.0
        super().__init__(
            model,
            arguments,
            train_dataset=application.train,
            eval_dataset=application.train[:1],  # never read: `evaluate` is ours
            data_collator=application.collate,
        )
        self.remove_callback(transformers.PrinterCallback)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # accelerate shares models among GPUs and the like alone; a CPU's processes it leaves to DDP, without a word
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.application.by_token:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            loss, outputs = self.application.loss(model, inputs), None
        if self.penalty:
            loss = loss + self.penalty * model_orthogonality_penalty(model)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        model, application = self.accelerator.unwrap_model(self.model), self.application
        found = application.metrics(application.outputs(model, "validation"), "validation")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        if self.of_hra and self.is_world_process_zero():
            application.checked(model, self.state.global_step, Path(self.args.output_dir))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset=None):
        return SimilarLengths(self.application.train, self.application.batch_size, self.application.arguments.seed)


class Reporting(transformers.TrainerCallback):
    """The progress bar, a line for each validation, and a refusal when the loss is no number."""

    def __init__(self, application: Application, console: Console, title: str):
        self.application, self.losses = application, []
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self.task = self.progress.add_task("", said="")

    def on_train_begin(self, args, state, control, **_):
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                lr = self.application.arguments.lr
                raise RecipeError(
                    f"the loss became {logs['loss']} at step {state.global_step}; lower --lr (now {lr:g})"
                )
            self.losses.append(logs["loss"])
            recent = self.losses[-10:]
            self.progress.update(self.task, completed=state.global_step, said=f"loss {sum(recent) / len(recent):.3f}")

    def on_evaluate(self, args, state, control, metrics, **_):
        main = self.application.main
        if state.is_world_process_zero:
            self.progress.console.print(
                f"  step {state.global_step:4d}: validation {main.name} {main.text(metrics['eval_' + main.name])}"
            )


@dataclass(frozen=True)
class Training:
    """What happened during training, interruptions included; the model is left as it was at the kept step."""

    losses: list[float]
    checks: list[tuple[int, float]]
    kept_step: int
    seconds: float


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; the Trainer writes trainer_state.json last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[-1]))


def checkpoint_to_resume(arguments, folder: Path) -> str | None:
    """The checkpoint with which to go on, None to begin.

    Raises:
        RecipeError: there are checkpoints and no --resume, --resume and no checkpoints, or ones of another run.
    """
    there = _whole_checkpoints(folder)
    if not arguments.resume:
        if there:
            raise RecipeError(
                f"--out {folder.parent}: an interrupted run left {folder}; go on with --resume, or delete that folder"
            )
        return None
    if not there:
        raise RecipeError(f"--resume: expected checkpoints of an interrupted run in {folder}, got none")
    try:
        before = json.loads((folder / ARGUMENTS).read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"--resume: {folder / ARGUMENTS} does not read; delete {folder}") from error
    now = compared(arguments)
    other = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    if other:
        said = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in other)
        raise RecipeError(
            f"--resume: the interrupted run had other options ({said}); give the same, or delete {folder}"
        )
    return str(there[-1])


def compared(arguments) -> dict[str, Any]:
    values = {name: value for name, value in vars(arguments).items() if name not in UNCOMPARED}
    return json.loads(json.dumps(values, default=str))


def training_arguments(application: Application, folder: Path) -> transformers.TrainingArguments:
    settings, arguments = application.settings, application.arguments
    every = max(1, settings.steps // settings.checks)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if application.batch_size % processes:
        raise RecipeError(f"--batch-size: expected a multiple of {processes} processes, got {application.batch_size}")
    if settings.fsdp and processes == 1:
        raise RecipeError("--fsdp: expected several processes to share the model (torchrun --nproc-per-node), got one")
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=application.batch_size // processes,
        learning_rate=arguments.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warm_up,
        weight_decay=settings.weight_decay,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.clip,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=application.main.name,
        greater_is_better=application.main.higher,
        average_tokens_across_devices=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        fsdp=settings.fsdp,
        fsdp_config={"version": 2, "state_dict_type": "FULL_STATE_DICT"} if settings.fsdp else None,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=arguments.seed % 2**32,
        data_seed=arguments.seed % 2**32,
    )


def _finished(resume: str | None, steps: int) -> transformers.TrainerState | None:
    """The state of a checkpoint after the last step, from which the Trainer would make one more."""
    if resume is None:
        return None
    state = transformers.TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
    return state if state.global_step >= steps else None


def _whole(application: Application, model: PeftModel) -> PeftModel:
    """A fresh model with the adapter that FSDP has in parts. Every process must come here."""
    state = get_peft_model_state_dict(model)
    state = {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in state.items()}
    fresh = application.base.adapted(model.active_peft_config)
    set_peft_model_state_dict(fresh, state)
    return fresh


def fit(
    application: Application, model: PeftModel, folder: Path, console: Console, title: str, resume: str | None
) -> tuple[PeftModel, Training]:
    """Train on every process: the model as it was at the best validation, the same one unless FSDP has shared it."""
    arguments = training_arguments(application, folder)
    trainer = Trainer(application, model, arguments)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARGUMENTS).write_text(json.dumps(compared(application.arguments), indent=2))
    reporting = Reporting(application, console, title)
    trainer.add_callback(reporting)
    if state := _finished(resume, application.settings.steps):
        set_peft_model_state_dict(model, load_peft_weights(str(folder / Path(state.best_model_checkpoint).name)))
        seconds = 0.0
    else:
        with reporting.progress:
            seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
        state = trainer.state
        if application.settings.fsdp:
            model = _whole(application, model)
    trainer.accelerator.wait_for_everyone()  # the first process deletes the checkpoints that all have read
    model.eval()
    history, main = state.log_history, application.main.name
    checks = {entry["step"]: entry["eval_" + main] for entry in history if "eval_" + main in entry}
    best = max if application.main.higher else min
    kept = next(step for step, value in checks.items() if value == best(checks.values()))
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return model, Training(losses, list(checks.items()), kept, seconds)


def forget_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def left_by_interruption(folder: Path) -> str:
    """What an interruption leaves, for people; checkpoints that are not whole are removed."""
    there = _whole_checkpoints(folder)
    if not there:
        forget_checkpoints(folder)
        return f"nothing of this run is in {folder.parent}"
    for path in folder.glob("checkpoint-*"):
        if path not in there:
            forget_checkpoints(path)
    step = there[-1].name.rsplit("-", 1)[-1]
    return f"go on from step {step} with --resume, or delete {folder}"


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
