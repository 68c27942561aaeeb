"""`hra-kernels train math` and `eval math` with a tiny model, two processes, and how answers are compared."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("peft", reason="the recipes need hra-kernels[train]")
pytest.importorskip("rich", reason="the recipes need hra-kernels[train]")

from peft import get_peft_model
from safetensors.torch import load_file

import hra_kernels.peft
from hra_kernels import cli
from hra_kernels.recipes import answers
from hra_kernels.recipes.jobs import math
from hra_kernels.testing.tolerance import rounding
from tests.recipes.tiny import save_base, save_llama, save_problems

FLOAT32 = rounding(16, 8, layers=8)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The arguments of a short run."""
    folder = tmp_path_factory.mktemp("math")
    save_llama(folder / "base")
    save_problems(folder / "data.jsonl")
    named = {"--model": folder / "base", "--data": folder / "data.jsonl", "--steps": 3, "--batch-size": 4}
    return ["train", "math", *(str(word) for pair in named.items() for word in pair)]


def test_trained_saved_and_evaluated(job, tmp_path, capsys):
    assert cli.main([*job, "--quick", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["largest_loss_difference_from_peft_hra"] < FLOAT32
    assert all(saved["max_difference"] < FLOAT32 for saved in results["saved"].values())
    assert "LoRA, PEFT, trained alike" in results["test"]
    data = ["--data", job[job.index("--data") + 1], "--limit", "5", "--max-new-tokens", "4"]
    for source in ([str(tmp_path / "out" / "merged")], [job[3], "--adapter", str(tmp_path / "out" / "adapter")]):
        done = cli.main(["eval", "math", "--model", *source, *data, "--out", str(tmp_path / "eval")])
        assert done == 0
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert [row["wanted"].isdigit() for row in found["solutions"]] == 5 * [True]


@pytest.mark.slow
def test_official_layer(job, tmp_path):
    """The output side with ε, λ times the penalty of its unit columns; nothing of PEFT's own HRA to compare with."""
    rows = {}
    for penalty in ("0", "1e-4", "inf"):
        out = tmp_path / penalty
        command = [*job, "--preset", "official", "--lr", "1e-2", "--lambda", penalty, "--out", str(out)]
        assert cli.main([*command, *([] if penalty == "1e-4" else ["--no-compare"])]) == 0
        rows[penalty] = json.loads((out / "results.json").read_text())
        assert len(rows[penalty]["losses"]) == 3
        assert set(rows[penalty]["saved"]) == {
            "loaded into a fresh model",
            "merged, no adapter left",
            "exported, loaded as LoRA",
        }
        assert all(saved["max_difference"] < FLOAT32 for saved in rows[penalty]["saved"].values())
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert config["side"] == "output" and config.get("eps", 0) == (0 if penalty == "inf" else 1e-4)
        assert config["apply_GS"] is (penalty == "inf")
    plain, official = rows["0"], rows["1e-4"]
    assert plain["test"]["after"] != plain["test"]["before: pretrained"]
    assert set(official["step_cost"]) == {"frozen, gradient through it", "HRA, hra_kernels", "LoRA, PEFT"}
    assert "times_faster_than_peft_hra" not in official
    torch.manual_seed(0)
    with hra_kernels.peft.enabled():
        base = transformers.AutoModelForCausalLM.from_pretrained(job[3])
        names = ["q_proj", "v_proj"]
        torch.manual_seed(0)
        config = hra_kernels.peft.HRAConfig(r=8, target_modules=names, side="output", eps=1e-4)
        us = [p.detach().flatten(0, -2) for n, p in get_peft_model(base, config).named_parameters() if "hra_u" in n]
    units = [u / u.norm(dim=0) for u in us]
    penalty = sum(torch.linalg.matrix_norm(torch.eye(8) - unit.T @ unit) for unit in units)
    wanted = 1e-4 * penalty.item()
    assert official["losses"][0] - plain["losses"][0] == pytest.approx(wanted, rel=0.02)


PENALIZED = ["--quick", "--lambda", "0.01"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
INTERRUPTED = """
import signal, sys
from hra_kernels import cli
from hra_kernels.recipes import trainer

class Trainer(trainer.Trainer):
    def training_step(self, model, *rest):
        if self.args.fsdp:
            assert all(hasattr(u, "device_mesh") for name, u in model.named_parameters() if "hra_u" in name)
        if self.state.global_step == 2 and "--resume" not in sys.argv:
            signal.raise_signal(signal.SIGINT)
        return super().training_step(model, *rest)

trainer.Trainer = Trainer
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def one_process(job, tmp_path_factory):
    """The results of one process, and its adapter. Responses have several lengths, so that a mean per process is not
    the mean per token."""
    out = tmp_path_factory.mktemp("one")
    assert cli.main([*job, *PENALIZED, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text()), load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same(out, expected):
    """Losses, validation, the adapter, and LoRA trained alike are those of one process."""
    results, adapter = json.loads((out / "results.json").read_text()), expected[1]
    torch.testing.assert_close(
        torch.tensor(results["losses"]), torch.tensor(expected[0]["losses"]), rtol=FLOAT32, atol=0
    )
    for name in ("validation", "test"):
        assert results[name] == approximately(expected[0][name]), name
    assert all(saved["max_difference"] < FLOAT32 for saved in results["saved"].values())
    found = load_file(out / "adapter" / "adapter_model.safetensors")
    assert set(found) == set(adapter)
    for name, u in found.items():
        torch.testing.assert_close(u, adapter[name], rtol=0, atol=FLOAT32 * adapter[name].abs().max().item())


def approximately(value):
    if isinstance(value, dict):
        return {name: approximately(each) for name, each in value.items()}
    return [approximately(each) for each in value] if isinstance(value, list) else pytest.approx(value, rel=FLOAT32)


@pytest.mark.slow
def test_two_processes_train_as_one(job, one_process, tmp_path):
    command = [*LAUNCH, "-m", "hra_kernels.cli", *job, *PENALIZED, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, one_process)


@pytest.mark.slow
def test_fsdp_interrupted_and_resumed(job, one_process, tmp_path):
    """Every process holds a part of each vector, and the checkpoint is whole."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = [*LAUNCH, tmp_path / "interrupted.py", *job, *PENALIZED, "--fsdp", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "with --resume" in done.stderr, done.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", one_process)


def test_answer_losses_of_a_large_vocabulary():
    """One likely token and 50,000 others that add up to as much; the prompt's rows do not count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 50_000, generator=generator)
    logits[..., 0] = 11
    labels = torch.full((3, 9), -100)
    for row, count in enumerate((1, 4, 8)):
        labels[row, 9 - count :] = torch.randint(50_000, (count,), generator=generator)
    found = math._answer_losses(SimpleNamespace(logits=logits), {"labels": labels})
    chosen = logits.double().log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    said = labels[:, 1:] != -100
    exact = -(chosen * said).sum(1) / said.sum(1)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_batch_is_shared_by_all_processes(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    capsys.readouterr()
    assert cli.main([*job, "--out", str(tmp_path)]) == 2
    assert "--batch-size: expected a multiple of 3 processes, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--query", "question"], "line 1: no value in field 'question' (--query); the fields are query, response"),
        (["--max-length", "3"], "--max-length 3: expected room for an answer"),
        (["--data", "absent"], "--data absent"),
        (["--fsdp"], "--fsdp: expected several processes"),
        (["--model", "./absent"], "--model ./absent: expected a model name or folder"),
    ],
)
def test_bad_input_is_one_line(job, tmp_path, capsys, options, said):
    capsys.readouterr()
    assert cli.main([*job, "--out", str(tmp_path), *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_an_encoder_is_no_language_model(tmp_path, capsys, verb):
    model = str(save_base(tmp_path / "encoder"))
    capsys.readouterr()
    assert cli.main([verb, "math", "--model", model, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "expected a causal language model, got" in err and "of an encoder" in err


@pytest.mark.parametrize(
    ("solution", "wanted", "right"),
    [
        ("12 - 2 = 10. The answer is: 10", "10", True),
        ("The answer is: 9. No: The answer is: $1,234.00.", "1234", True),
        ("The answer is: 1/2", "0.5", True),
        ("The answer is: -3 apples\nThe answer", "-3", True),
        ("It is 10", "10", False),
        ("The answer is:", "10", False),
        ("The answer is: 11", "10", False),
        ("The answer is: 1/0", "10", False),
    ],
)
def test_numbers(solution, wanted, right):
    assert answers.equal(answers.answer_of(solution), wanted, "number") is right


@pytest.mark.parametrize(
    ("found", "wanted", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"\sqrt{2}", "2", False),
        ("( 1, 2 )", "(1,2)", True),
    ],
)
def test_expressions(found, wanted, right):
    pytest.importorskip("math_verify")
    assert answers.equal(found, wanted, "expression") is right
