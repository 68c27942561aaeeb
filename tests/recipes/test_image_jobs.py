"""The image jobs from beginning to end, with a tiny Stable Diffusion in a folder and a tiny generator of digits."""

import json
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers", reason="the image jobs need hra-kernels[images]")
pytest.importorskip("cv2", reason="the image jobs need hra-kernels[images]")
pytest.importorskip("rich", reason="the image jobs need hra-kernels[images]")

import diffusers

from hra_kernels import cli
from hra_kernels.recipes import digits, packages, trainer
from hra_kernels.testing.tolerance import rounding
from tests.recipes.tiny import save_controlled, save_pictures, save_stable_diffusion

pytestmark = pytest.mark.slow
FLOAT32 = rounding(128, 8, layers=24)
"""A UNet of two blocks, whose predictions and losses are about 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `sd`, a pipeline, `dreambooth/berry_bowl`, a subject, and `data.jsonl`, controlled pictures."""
    folder = tmp_path_factory.mktemp("jobs")
    save_stable_diffusion(folder / "sd")
    save_pictures(folder / "dreambooth" / "berry_bowl")
    save_controlled(folder / "data.jsonl")
    return folder


@pytest.fixture
def subject(folder):
    """The arguments of a short run."""
    named = {
        **{"--model": folder / "sd", "--data": folder / "dreambooth", "--class-idx": 3, "--prompt-idx": 20},
        **{"--class-data": folder / "bowls", "--class-images": 2, "--sampling-steps": 2, "--samples": 2},
        **{"--steps": 4, "--batch-size": 2, "--lr": 1e-2},
    }
    return ["train", "subject", *(str(word) for pair in named.items() for word in pair)]


@pytest.fixture
def control(folder):
    named = {
        **{"--model": folder / "sd", "--data": folder / "data.jsonl", "--sampling-steps": 2, "--samples": 2},
        **{"--steps": 4, "--batch-size": 4, "--lr": 1e-2},
    }
    return ["train", "control", *(str(word) for pair in named.items() for word in pair)]


def results(out):
    return json.loads((out / "results.json").read_text())


def test_subject(subject, folder, tmp_path):
    out = tmp_path / "out"
    assert cli.main([*subject, "--quick", "--lambda", "0.01", "--bias", "hra", "--out", str(out)]) == 0
    found = results(out)
    assert found["largest_loss_difference_from_peft_hra"] < FLOAT32
    assert len(found["saved"]) == 4
    assert all(saved["max_difference"] < 10 * FLOAT32 for saved in found["saved"].values())  # the largest of 12,288
    assert found["data"]["prompts"] == ["a photo of qwe bowl", "a red qwe bowl"]
    assert len(list((folder / "bowls").glob("*.png"))) == 2
    steps = sorted(path.name for path in (out / "samples").iterdir())
    assert steps == ["step-000002", "step-000004"] and (out / "samples.png").is_file()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out / "merged")
    assert pipeline("a red qwe bowl", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    # the adapter is the UNet's own
    from peft import PeftModel

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "sd", subfolder="unet")
    PeftModel.from_pretrained(unet, out / "adapter")


def test_subject_resumed(subject, tmp_path, monkeypatch):
    words = [*subject, "--no-compare", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    whole = results(tmp_path / "out")
    once = trainer.Trainer.training_step
    with monkeypatch.context() as patched:

        def training_step(self, *arguments):
            if self.state.global_step == 3:
                signal.raise_signal(signal.SIGINT)
            return once(self, *arguments)

        patched.setattr(trainer.Trainer, "training_step", training_step)
        assert cli.main(words) == 130
    assert cli.main([*words, "--resume"]) == 0
    resumed = results(tmp_path / "out")
    assert resumed["losses"] == whole["losses"] and resumed["test"] == whole["test"]
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 4


def test_control(control, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*control, "--quick", "--out", str(out)]) == 0
    found = results(out)
    assert found["largest_loss_difference_from_peft_hra"] < FLOAT32
    assert all(saved["max_difference"] < 10 * FLOAT32 for saved in found["saved"].values())
    assert set(found["test"]["after"]) == {"denoising loss", "edge IoU", "edge F1"}
    assert (out / "before-after.png").is_file()
    data = ["--data", str(folder / "data.jsonl"), "--sampling-steps", "2", "--out"]
    for name, source in {
        "merged": [out / "merged"],
        "adapter": [folder / "sd", "--adapter", out / "adapter"],
    }.items():
        words = ["generate", "control", "--model", *map(str, source), *data, str(tmp_path / name)]
        assert cli.main(words) == 0
    pictures = [sorted((tmp_path / name / "results").glob("*.png")) for name in ("merged", "adapter")]
    assert len(pictures[0]) == len(pictures[1]) == 4
    assert cli.main(["eval", "control", "--images", str(tmp_path / "merged"), "--out", str(tmp_path / "eval")]) == 0
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert scores["pictures"] == 4 and 0 < scores["IoU"] < scores["F1"] < 1


def launch(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "-m", "hra_kernels.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_processes(control, folder, tmp_path):
    """They have the losses of one, and draw the pictures that one would."""
    assert cli.main([*control, "--no-compare", "--out", str(tmp_path / "one")]) == 0
    launch(*control, "--no-compare", "--out", str(tmp_path / "two"))
    one, two = (torch.tensor(results(tmp_path / name)["losses"]) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=FLOAT32, atol=0)
    words = ["generate", "control", "--model", str(tmp_path / "one" / "merged"), "--data", str(folder / "data.jsonl")]
    words += ["--sampling-steps", "2", "--out"]
    assert cli.main([*words, str(tmp_path / "alone")]) == 0
    launch(*words, str(tmp_path / "shared"))
    alone = sorted(path.name for path in (tmp_path / "alone" / "results").iterdir())
    assert alone == sorted(path.name for path in (tmp_path / "shared" / "results").iterdir())


@pytest.fixture
def small_generator(monkeypatch, tmp_path):
    """Trained into a cache of its own, as the judge is."""
    absent = [package for package in packages.RECIPE_PACKAGES["subject"] if packages.find(package) is None]
    if absent:
        pytest.skip(f"not fetched: {', '.join(map(str, absent))}; run: hra-kernels fetch subject")
    cache = tmp_path / "cache" / "hra-kernels"
    cache.mkdir(parents=True)
    for package in packages.RECIPE_PACKAGES["subject"]:
        (cache / package.target).symlink_to(packages.find(package))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setattr(digits, "QUICK_GENERATOR", digits.Recipe(steps=2, widths=(8, 16), batch_size=4))
    monkeypatch.setattr(digits, "JUDGE_STEPS", 10)


@pytest.mark.parametrize("name", ["subject", "control"])
def test_default(small_generator, tmp_path, name):
    """A generator that has learned nothing, so only the way to the page."""
    out = tmp_path / "out"
    assert cli.main(["train", name, "--quick", "--steps", "2", "--out", str(out)]) == 0
    found = results(out)
    assert found["largest_loss_difference_from_peft_hra"] < FLOAT32
    wanted = {
        "subject": {"crossed sevens drawn", "other digits kept", "similarity"},
        "control": {"edge IoU", "edge F1"},
    }[name]
    for row in ("before: pretrained", "after", "LoRA, PEFT, trained alike"):
        assert set(found["test"][row]) == {"denoising loss", *wanted}
    assert (out / "before-after.png").is_file() and (out / "samples.png").is_file()
    assert all(f"| {metric} |" in (out / "summary.md").read_text() for metric in wanted)
    if name == "subject":
        samples = ["--images", str(out / "samples"), "--dino", "./absent", "--clip", "./absent"]
        assert cli.main(["eval", "subject", *samples, "--out", str(tmp_path / "eval")]) == 0
        scores = json.loads((tmp_path / "eval" / "eval.json").read_text())
        assert list(scores["epochs"]) == ["step-000001", "step-000002"] and scores["chosen"] in scores["epochs"]
        assert "EfficientNet" in scores["epochs"]["step-000002"]
