"""The losses of a training with our layers and with PEFT's own HRA, on the same batches, through the same Trainer."""

import pytest
import torch

pytest.importorskip("peft", reason="the recipes need hra-kernels[train]")
pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")

from rich.console import Console

import hra_kernels.peft
from hra_kernels import cli
from hra_kernels.recipes import trainer
from hra_kernels.recipes.jobs import math, nlu
from tests.recipes.tiny import save_base, save_llama, save_problems, save_sentences

JOBS = {
    "nlu": (nlu, save_base, save_sentences, "data.csv"),
    "math": (math, save_llama, save_problems, "data.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_losses_are_those_of_pefts_own_hra(name, tmp_path):
    job, save_model, save_data, file = JOBS[name]
    named = {
        "--model": save_model(tmp_path / "base"),
        "--data": save_data(tmp_path / file),
        "--steps": 10,
        "--batch-size": 8,
        "--lr": 0.03,
        "--lambda": 0.01,
    }
    words = ["train", name, *(str(word) for pair in named.items() for word in pair)]
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
