"""The main job: its data, its pictures, and the whole of it in little."""

import argparse
import json
import random
import statistics

import pytest
import torch

pytest.importorskip("peft", reason="the recipes need hra-kernels[train]")
pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")

from rich.console import Console

import hra_kernels.peft
from hra_kernels import cli
from hra_kernels.recipes import RecipeError, packages, text_data
from hra_kernels.recipes import job as skeleton
from hra_kernels.recipes.jobs import nlu
from hra_kernels.testing.tolerance import rounding

FLOAT32 = rounding(1536, 8, layers=36)
"""MiniLM-L6, whose logits and losses are about 1."""


@pytest.fixture(scope="module")
def default_data():
    absent = [package for package in packages.RECIPE_PACKAGES["nlu"] if packages.find(package) is None]
    if absent:
        pytest.skip(f"not fetched: {', '.join(map(str, absent))}; run: hra-kernels fetch nlu")


def write(path, rows, separator=","):
    path.write_text("\n".join(separator.join(row) for row in rows) + "\n")
    return path


def labeled(count, start=0):
    return [(f"sentence number {i}", "even" if i % 2 == 0 else "odd") for i in range(start, start + count)]


# --- data -------------------------------------------------------------------------------------------------------------


def assert_disjoint(splits):
    keys = [{example.key for example in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, keys)) == len(keys[0] | keys[1] | keys[2])
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == list(map(len, keys))


def test_movie_sentences(default_data):
    splits = text_data.movie_sentences(seed=0)
    assert_disjoint(splits)
    assert splits.classes == ["negative", "positive"]
    assert (len(splits.validation), len(splits.test)) == (1000, 1000)
    # 10,072 sentences have a mean score at least half a point from zero; two of them occur twice
    assert len(splits.train) == 10_070 - 2000
    assert 0.4 < splits.majority() < 0.6
    assert text_data.movie_sentences(seed=0) == splits
    assert text_data.movie_sentences(seed=1).test != splits.test


def test_one_file_is_split_without_a_sentence_in_common(tmp_path):
    repeated = [(text.upper() + "  ", label) for text, label in labeled(20)]
    rows = labeled(60) + repeated
    random.Random(0).shuffle(rows)
    path = write(tmp_path / "mine.csv", [("text", "label"), *rows])
    splits = text_data.load(path, seed=3)
    assert_disjoint(splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (48, 6, 6)


def test_a_folder_keeps_its_own_splits(tmp_path):
    write(tmp_path / "train.tsv", [("label", "review"), *[(b, a) for a, b in labeled(10)]], "\t")
    with open(tmp_path / "dev.jsonl", "w") as stream:
        for text, label in labeled(4, start=8):  # two of them are in train as well
            stream.write(json.dumps({"review": text, "label": label}) + "\n")
    write(tmp_path / "test.csv", [("review", "label"), *labeled(3, start=11)])  # the first is in dev as well
    splits = text_data.load(tmp_path, seed=0, text="review")
    assert_disjoint(splits)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 3, 3)


def test_classes_that_are_numbers_come_in_their_order(tmp_path):
    rows = [(f"s{i}", str(i % 12)) for i in range(600)]
    splits = text_data.load(write(tmp_path / "a.csv", [("text", "label"), *rows]), seed=0)
    assert splits.classes == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("absent.csv", None, {}, "no such file"),
        ("a.parquet", "", {}, "expected a .csv, .tsv, .jsonl file or a folder, got .parquet"),
        (
            "a.csv",
            "sentence,label\nhello,1\n",
            {},
            "line 2: no column 'text' (--text); the columns are sentence, label",
        ),
        ("a.csv", "text,label\nhello,\n", {}, "line 2: expected a value in column 'label' (--label), got an empty one"),
        ("a.csv", "text,label\nhello,1\n", {"pair": "b"}, "no column 'b' (--text-pair)"),
        ("a.jsonl", '{"text": "a", "label": 1}\nnot json\n', {}, "line 2: expected a JSON object"),
        ("a.jsonl", "[1, 2]\n", {}, "line 1: expected a JSON object, got list"),
        ("a.csv", "text,label\nhello,1\n", {}, "expected at least 30 different sentences"),
        ("a.csv", "text,label\n" + "".join(f"s{i},same\n" for i in range(50)), {}, "got 1 distinct labels"),
        ("a.csv", "text,label\n" + "".join(f"s{i},{i / 7}\n" for i in range(300)), {}, "expected 2 to 200 classes"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, options, said):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError) as refused:
        text_data.load(path, seed=0, **options)
    assert said in str(refused.value)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(RecipeError, match="expected UTF-8"):
        text_data.load(tmp_path / "a.csv", seed=0)


def test_a_folder_without_a_split_says_which(tmp_path):
    write(tmp_path / "train.csv", [("text", "label"), *labeled(40)])
    with pytest.raises(RecipeError, match=r"expected one validation file, .*, got train.csv"):
        text_data.load(tmp_path, seed=0)


# --- the job ----------------------------------------------------------------------------------------------------------


def options(*arguments) -> argparse.Namespace:
    return cli.build_parser().parse_args(["train", "nlu", *map(str, arguments)])


def silent() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def job(default_data, tmp_path_factory):
    """The job in little: enough steps to learn something, a few to time."""
    out = tmp_path_factory.mktemp("nlu")
    assert not hra_kernels.peft.is_enabled()
    results = skeleton.run(nlu.open_application, options("--quick", "--batch-size", 16, "--out", out), silent())
    assert not hra_kernels.peft.is_enabled()
    return results, out


@pytest.mark.slow
def test_job_learns(job):
    results, _ = job
    found = {name: row["accuracy"] for name, row in results["test"].items()}
    # 0.08 is 2.8 standard errors of a guess on 300 sentences
    assert found.pop("after") > max(found.values()) + 0.08
    assert statistics.mean(results["losses"][-5:]) < statistics.mean(results["losses"][:5])
    kept = dict(results["validation"])[results["kept_step"]]
    assert kept == max(dict(results["validation"]).values())


@pytest.mark.slow
def test_job_saved_what_it_trained(job):
    """Loaded, merged, and loaded with PEFT's own layers: the same answers. Zero would mean that nothing was learned."""
    results, _ = job
    for name, found in results["saved"].items():
        assert found["max_difference"] < FLOAT32, name
        assert found["accuracy"] == results["test"]["after"]["accuracy"], name
    assert results["largest_loss_difference_from_peft_hra"] < FLOAT32


@pytest.mark.slow
def test_job_leaves_its_results(job):
    results, out = job
    names = {path.name for path in out.iterdir()}
    pictures = {"loss.svg", "cost.svg"}
    assert names == {"adapter", "merged", "lora", "results.json", "summary.md"} | pictures
    assert f"{results['times_faster_than_peft_hra']:.1f} times faster" in (out / "summary.md").read_text()
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["environment"]["torch"] == torch.__version__
    assert len(results["step_cost"]) == 5
    assert all(cost["steps"] >= 5 and cost["p20_s"] <= cost["median_s"] for cost in results["step_cost"].values())


@pytest.mark.slow
def test_job_on_own_data_and_layers(default_data, tmp_path):
    """Three classes, Gram-Schmidt, two kinds of layer: the adapter is there and nothing else was trained."""
    rows = [(f"{word} {i}", word) for i in range(40) for word in ("red", "green", "blue")]
    data = write(tmp_path / "mine.tsv", [("said", "color"), *rows], "\t")
    chosen = ["--data", data, "--text", "said", "--label", "color", "--target-modules", "query,value", "--apply-gs"]
    results = skeleton.run(
        nlu.open_application, options(*chosen, "--rank", 4, "--steps", 3, "--no-compare", "--out", tmp_path), silent()
    )
    assert results["data"]["classes"] == ["blue", "green", "red"]
    assert results["parameters"]["trained"] == 12 * 384 * 4 + 3 * 384 + 3
    assert all(found["max_difference"] < FLOAT32 for found in results["saved"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target-modules", "query,qvery"], "expected names of Linear layers (classifier, dense, key, query, value)"),
        (["--model", "./no-such-folder"], "--model ./no-such-folder: expected a model name or folder"),
    ],
)
def test_bad_model_options_are_named(default_data, tmp_path, arguments, said):
    with pytest.raises(RecipeError) as refused:
        skeleton.run(nlu.open_application, options(*arguments, "--out", tmp_path), silent())
    assert said in str(refused.value)


def test_no_folder_for_results(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="--out"):
        skeleton.run(nlu.open_application, options("--out", tmp_path / "file"), silent())
