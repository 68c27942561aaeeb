"""`hra-kernels train nlu` where something goes wrong: bad files, Ctrl-C, kill, a full disk. A tiny model."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the recipes need hra-kernels[train]")
pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")

from hra_kernels import backends, cli
from hra_kernels.recipes import RecipeError, trainer
from hra_kernels.recipes import job as skeleton
from hra_kernels.recipes.saving import written_whole
from tests.recipes.tiny import save_base, save_sentences

RUN = {"adapter", "merged", "lora", "results.json", "summary.md"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with `base` and `data.csv`."""
    folder = tmp_path_factory.mktemp("inputs")
    save_base(folder / "base")
    save_sentences(folder / "data.csv")
    return folder


@pytest.fixture
def job(inputs, tmp_path):
    """The arguments of a short run; results go to tmp_path / "out"."""
    named = {"--model": inputs / "base", "--data": inputs / "data.csv", "--out": tmp_path / "out", "--steps": 2}
    return ["train", "nlu", "--no-compare", *(str(word) for pair in named.items() for word in pair)]


def said(capsys, arguments, status: int) -> str:
    """The one line on stderr with which the command ends."""
    capsys.readouterr()
    assert cli.main(arguments) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("hra-kernels: "), err
    return err


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix not in {".png", ".svg"}}


def test_a_second_run_replaces_the_first(job, tmp_path, capsys):
    assert cli.main(job) == 0
    (tmp_path / "out" / "mine.txt").write_text("kept")
    first = (tmp_path / "out" / "results.json").read_text()
    assert cli.main([*job, "--seed", "1"]) == 0
    assert contents(tmp_path / "out") == RUN | {"mine.txt"}
    assert (tmp_path / "out" / "results.json").read_text() != first


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_stopped_while_training(job, tmp_path, monkeypatch, capsys, number, status, name):
    """An earlier run's results stay, and nothing of this one is beside them."""
    assert cli.main(job) == 0
    before = (tmp_path / "out" / "results.json").read_text()
    monkeypatch.setattr(trainer.Trainer, "training_step", lambda *_: signal.raise_signal(number))
    handler = signal.getsignal(signal.SIGTERM)
    line = said(capsys, job, status)
    assert line == f"hra-kernels: {name}; nothing of this run is in {tmp_path / 'out'}\n"
    assert contents(tmp_path / "out") == RUN
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert signal.getsignal(signal.SIGTERM) is handler


def stop_at(monkeypatch, step: int) -> None:
    """Ctrl-C at the beginning of this step."""
    whole = trainer.Trainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return whole(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "training_step", training_step)


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "results.json").read_text())["losses"]


def test_resumed(job, tmp_path, monkeypatch, capsys):
    """The losses of an interrupted and resumed run are those of a whole one; dropout is drawn as it would have been."""
    out, longer = tmp_path / "out", [*job, "--steps", "6", "--batch-size", "16"]
    assert cli.main(longer) == 0
    whole = losses(out)
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        line = said(capsys, longer, 130)
    assert line == f"hra-kernels: interrupted; go on from step 4 with --resume, or delete {out / 'checkpoints'}\n"
    assert "go on with --resume, or delete that folder" in said(capsys, longer, 2)
    assert "rank was 8, is 4" in said(capsys, [*longer, "--resume", "--rank", "4"], 2)
    shutil.copytree(out / "checkpoints" / "checkpoint-4", out / "checkpoints" / "checkpoint-5")
    (out / "checkpoints" / "checkpoint-5" / "trainer_state.json").unlink()  # killed while it was written
    assert cli.main([*longer, "--resume"]) == 0
    assert losses(out) == whole
    assert contents(out) == RUN
    assert "expected checkpoints of an interrupted run" in said(capsys, [*longer, "--resume"], 2)


@pytest.mark.slow
def test_resumed_after_the_last_step(job, tmp_path, monkeypatch, capsys):
    out, longer = tmp_path / "out", [*job, "--steps", "4", "--batch-size", "16"]
    assert cli.main(longer) == 0
    whole = json.loads((out / "results.json").read_text())
    with monkeypatch.context() as patched:
        whole_fit = trainer.fit
        patched.setattr(trainer, "fit", lambda *arguments: (whole_fit(*arguments), signal.raise_signal(signal.SIGINT)))
        said(capsys, longer, 130)
    assert cli.main([*longer, "--resume"]) == 0
    resumed = json.loads((out / "results.json").read_text())
    for same in ("losses", "test", "kept_step"):
        assert resumed[same] == whole[same], same


def test_stopped_while_drawing(job, tmp_path, monkeypatch, capsys):
    """What was trained is there, and no results of an earlier run that could be taken for its own."""
    assert cli.main(job) == 0
    monkeypatch.setattr(skeleton.plots, "plot_training", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert "holds adapter/, merged/ and lora/ of this run, but no results" in said(capsys, job, 143)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "merged", "lora"}


@pytest.mark.parametrize(
    ("limit", "left"), [(2000, set()), (30_000, {"checkpoints"}), (150_000, {"adapter", "merged", "lora"})]
)
def test_full_disk(job, tmp_path, monkeypatch, capsys, limit, left):
    """Files that cannot grow beyond a limit: a checkpoint, the merged model, or a picture does not fit."""
    monkeypatch.setattr(
        skeleton.plots, "plot_training", lambda folder, *_: (folder / "loss.svg").write_bytes(bytes(200_000))
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = said(capsys, job, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"--out {tmp_path / 'out'}: cannot write this folder (" in line and "File too large" in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == left


def test_killed_while_writing(tmp_path):
    """Nothing half written has the name of a result; the next run clears what was left."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("old")
    code = f"""
import os, pathlib, signal
from hra_kernels.recipes.saving import written_whole
with written_whole(pathlib.Path({str(tmp_path)!r})) as folder:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    with written_whole(tmp_path, forgetting=["absent"]) as folder:
        assert list(folder.iterdir()) == []
        (folder / "adapter").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert list((tmp_path / "adapter").iterdir()) == []


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RecipeError, match=r"^mine$"), written_whole(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RecipeError("mine")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[1]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no_such_model"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x00" * 100),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"[1]"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:30]),
)
def test_a_damaged_model_is_one_line(inputs, job, tmp_path, capsys, name, content):
    base = shutil.copytree(inputs / "base", tmp_path / "base")
    (base / name).write_bytes(content)
    assert f"--model {base}" in said(capsys, [*job, "--model", str(base)], 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target-modules", ","], "--target-modules: expected names of Linear layers"),
        (["--seed", "-1"], None),
        (["--max-length", "1"], None),
        (["--text", "label", "--label", "text"], "got"),
        (["--rank", "64"], None),
    ],
)
def test_odd_options(job, capsys, options, named):
    """Each runs or is refused in one line."""
    if named is None:
        assert cli.main([*job, *options]) == 0
    else:
        assert named in said(capsys, [*job, *options], 2)


def test_data_that_is_no_table(job, tmp_path, capsys):
    (tmp_path / "zeros.csv").write_bytes(b"text,label\nA\x00B,1\n" + b"x" * 200_000 + b",1\n")
    (tmp_path / "folder.csv").mkdir()
    for name in ("zeros.csv", "folder.csv"):
        assert f"{tmp_path / name}" in said(capsys, [*job, "--data", str(tmp_path / name)], 2)


def test_a_backend_that_does_not_exist(job, monkeypatch, capsys):
    monkeypatch.setattr(backends, "_forced", "gpu")
    assert "backend: expected one of reference, cpu" in said(capsys, job, 2)
