"""The losses of a training with our layers and with PEFT's own HRA, on the same batches, through the same Trainer."""

import importlib

import pytest
import torch

pytest.importorskip("peft", reason="the recipes need hra-kernels[train]")
pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")

from rich.console import Console

import hra_kernels.peft
from hra_kernels import cli
from hra_kernels.recipes import options, trainer
from tests.recipes import tiny

DRAWING = "--samples 1 --sampling-steps 1"
SUBJECT = f"--subject-class cup --class-images 2 {DRAWING}"
JOBS = {
    "nlu": (tiny.save_base, tiny.save_sentences, "data.csv", ""),
    "math": (tiny.save_llama, tiny.save_problems, "data.jsonl", ""),
    "subject": (
        tiny.save_stable_diffusion,
        tiny.save_pictures,
        "cup",
        SUBJECT,
    ),
    "control": (tiny.save_stable_diffusion, tiny.save_controlled, "data.jsonl", DRAWING),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_losses_are_those_of_pefts_own_hra(name, tmp_path):
    if options.extra(name) == "images":
        pytest.importorskip("diffusers", reason="the image jobs need hra-kernels[images]")
        pytest.importorskip("cv2", reason="the image jobs need hra-kernels[images]")
    job = importlib.import_module(f"hra_kernels.recipes.jobs.{name}")
    save_model, save_data, file, more = JOBS[name]
    named = {
        "--model": save_model(tmp_path / "base"),
        "--data": save_data(tmp_path / file),
        "--steps": 10,
        "--batch-size": 8,
        "--lr": 0.03,
        "--lambda": 0.01,
    }
    words = ["train", name, *(str(word) for pair in named.items() for word in pair), *more.split()]
    losses = []
    for layers in (hra_kernels.peft.enabled, hra_kernels.peft.disabled):
        arguments = cli.build_parser().parse_args(words)
        app = job.open_application(arguments)
        with layers():
            assert hra_kernels.peft.is_enabled() is (layers is hra_kernels.peft.enabled)
            config = app.base.hra_config(arguments.rank, arguments.target_modules, apply_gs=False)
            model = app.base.adapted(config)
            before = app.outputs(model, "test")
            model, training = trainer.fit(app, model, tmp_path / layers.__name__, Console(quiet=True), "", None)
        assert (app.outputs(model, "test") - before).abs().max() > 1e-2  # the reflections do something
        losses.append(torch.tensor(training.losses))
    ours, pefts = losses
    assert len(ours) == 10
    assert ((ours - pefts).abs() / pefts).max() < 1e-5
