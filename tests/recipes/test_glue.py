"""`hra-kernels train nlu --task`: tiny DeBERTaV2, local files in the hub's layout; and the metrics."""

import json

import pytest
import torch

pytest.importorskip("peft", reason="the recipes need hra-kernels[train]")
pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")

from hra_kernels import cli
from hra_kernels.recipes import RecipeError, glue, metrics
from hra_kernels.testing.tolerance import rounding
from tests.recipes.tiny import save_deberta, save_glue

FLOAT32 = rounding(16, 8, layers=12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    save_deberta(folder / "deberta")
    for task in glue.TASKS:
        save_glue(folder / "data", task)
    return folder


def run(inputs, out, task, *more):
    named = {"--model": inputs / "deberta", "--data": inputs / "data", "--out": out, "--task": task, "--steps": 2}
    assert cli.main(["train", "nlu", *(str(word) for pair in named.items() for word in pair), *more]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("mnli", {"accuracy", "mismatched"}),
        ("cola", {"accuracy", "f1", "matthews"}),
        ("stsb", {"pearson", "spearman", "correlation"}),
    ],
)
def test_task(inputs, tmp_path, task, names):
    results = run(inputs, tmp_path, task, "--no-compare")
    after = results["test"]["after"]
    assert set(after) == names and results["main_metric"] in names
    assert all(saved["max_difference"] < FLOAT32 for saved in results["saved"].values())
    # six layers of each block, the head, and the pooler that DeBERTaV3's checkpoint lacks
    heads = max(1, len(glue.TASKS[task].classes)) * 17 + 16 * 16 + 16
    assert results["parameters"]["trained"] == 2 * 6 * 16 * 8 + heads


def test_losses_equal_pefts(inputs, tmp_path):
    assert run(inputs, tmp_path, "rte", "--quick")["largest_loss_difference_from_peft_hra"] < FLOAT32


def test_penalty_is_in_the_loss(inputs, tmp_path):
    """At the start columns come in equal pairs: ‖I - ÛᵀÛ‖ is far from zero, and no number of the model changes."""
    plain = run(inputs, tmp_path / "a", "rte", "--no-compare")
    strong = run(inputs, tmp_path / "b", "rte", "--no-compare", "--lambda", "0.01")
    # at least the four pairs' off-diagonal ones, sqrt(8) per layer
    assert strong["losses"][0] - plain["losses"][0] > 0.01 * 12 * 8**0.5 * 0.99


def test_presets():
    assert glue.preset("script", "cola", 0.0)["lr"] == 8e-4
    assert glue.preset("paper", "cola", 0.0) | {"epochs": 0} == glue.preset("script", "cola", 0.0) | {
        "epochs": 0,
        "lr": 9e-3,
    }
    assert [glue.preset("paper", "rte", penalty)["epochs"] for penalty in (0.0, 1e-6, 1e-5, float("inf"))] == [
        11,
        44,
        44,
        11,
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence": "a"}, "no value in field 'label'; the fields are sentence"),
        ({"text": "a", "label": 1}, "no value in field 'sentence'"),
        ({"sentence": "a", "label": 2}, "expected as label one of unacceptable, acceptable, or its number, got '2'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, said):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecipeError) as refused:
        glue.load("cola", str(tmp_path))
    assert "line 1" in str(refused.value) and said in str(refused.value)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(RecipeError, match="expected a folder with the files of GLUE's rte"):
        glue.load("rte", str(tmp_path / "absent"))
    save_glue(tmp_path, "mnli")
    (tmp_path / "mnli" / "validation_mismatched.jsonl").unlink()
    with pytest.raises(RecipeError, match="expected validation_mismatched"):
        glue.load("mnli", str(tmp_path))


def test_metrics_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 5, (200,), generator=generator).double()
    other = one + torch.randint(0, 5, (200,), generator=generator)
    assert metrics.pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic, rel=1e-12)
    assert metrics.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, rel=1e-12)
    assert metrics.pearson(one, torch.ones(200)) == 0


def test_f1_and_matthews_by_hand():
    labels, predicted = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])
    tp, fp, fn, tn = 2, 1, 1, 4
    assert metrics.f1(predicted, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert metrics.pearson(predicted, labels) == pytest.approx(matthews)
