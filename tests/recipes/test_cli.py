"""The command line: help, the environment report, and errors that say what to do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hra_kernels import cli, ops
from hra_kernels.recipes import RecipeError, packages


def run(*arguments, **options):
    command = [sys.executable, "-m", "hra_kernels.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["env"],
        ["fetch"],
        ["train"],
        ["train", "nlu"],
        ["train", "math"],
        ["eval", "math"],
        ["generate"],
        ["verify"],
        ["export"],
    ],
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: hra-kernels" + "".join(f" {name}" for name in arguments))


@pytest.mark.parametrize("arguments", [["train", "nlu"], ["train", "math"], ["eval", "math", "--model", "."]])
def test_results_have_a_folder(arguments):
    pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")
    name = arguments[1] if arguments[0] == "train" else f"{arguments[1]}-eval"
    assert cli.build_parser().parse_args(arguments).out == Path("runs", name)


def test_help_of_the_main_job_names_its_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "nlu", "--help"])
    said = capsys.readouterr().out
    options = "model data text label rank target-modules apply-gs steps lr seed quick threads out"
    assert [name for name in options.split() if f"--{name}" not in said] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["brew"], "invalid choice: 'brew'"),
        (["train", "nlu", "--rank", "0"], "--rank: invalid positive integer value: '0'"),
        (["train", "nlu", "--lr", "nan"], "--lr: invalid positive number value: 'nan'"),
        (["train", "nlu", "--steps", "1.5"], "--steps: invalid positive integer value: '1.5'"),
        (
            ["train", "nlu", "--seed", str(2**70)],
            "--seed: expected an integer of 64 bits, got '1180591620717411303424'",
        ),
        (["fetch", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_env_json():
    done = run("env", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backends"] == ops.backend_report()
    assert found["backends"]["reference"] is None
    assert found["torch_threads"] >= 1
    assert set(found) >= {"hra_kernels", "python", "torch", "peft", "peft_support", "nvcc", "gpus", "cpu_isa"}


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(["env"], marks=pytest.mark.slow), ["verify", "--backend", "reference"]],
    ids=lambda words: words[0],
)
def test_output_that_nobody_reads(arguments):
    """As in `| head`: the reader has left before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hra_kernels.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in done.stderr and "BrokenPipeError" not in done.stderr


def test_env_text_gives_every_backend_and_why_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(ops, "backend_report", lambda: {"reference": None, "cuda": "no GPU that PyTorch can use"})
    assert cli.main(["env"]) == 0
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines() if line.startswith("backend")]
    assert lines == [["backend", "reference", "yes"], ["backend", "cuda", "no: no GPU that PyTorch can use"]]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["rich", "peft", "transformers", "matplotlib"])
def test_core_install(missing):
    """Without the extras, `env` runs and `train` says which pip command brings what it lacks."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from hra_kernels import cli
assert cli.main(["env"]) == 0
sys.exit(cli.main(["train", "nlu"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "pip install 'hra-kernels[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_fetch_offline_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RecipeError, match="hra-kernels fetch nlu") as refused:
        packages.fetch(packages.MOVIE_SENTENCES)
    assert "vaderSentiment==2.5" in str(refused.value)
    assert list((tmp_path / "hra-kernels").iterdir()) == []


def test_fetch_that_cannot_be_unpacked_is_one_line(monkeypatch, tmp_path, capsys):
    """An archive cut short, and a cache folder below a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages, "find", lambda package: None)

    def cut_short(package, folder):
        (folder / "cut.whl").write_bytes(b"PK")
        return folder / "cut.whl"

    monkeypatch.setattr(packages, "_download", cut_short)
    for cache in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        capsys.readouterr()
        assert cli.main(["fetch", "nlu"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "set XDG_CACHE_HOME" in err
    assert list((tmp_path / "hra-kernels").iterdir()) == []


def test_a_damaged_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = tmp_path / "hra-kernels" / packages.MOVIE_SENTENCES.target
    target.parent.mkdir()
    target.write_text("1\t0.9\tsomething else\n")
    assert packages.find(packages.MOVIE_SENTENCES) is None
