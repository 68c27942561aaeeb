"""The benchmark itself: that wrong results get no time, that rounds, ratios and bytes are what they are said to be."""

import argparse
import json
import math
import time

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import COMMIT_VARIABLE, applications, layer, model, op, providers, record, report, shapes, timing
from bench import __main__ as cli
from hra_kernels.measuring import stopwatch
from hra_kernels.measuring.text import significant
from hra_kernels.testing.tolerance import rounding

DEVICE = torch.device("cpu")
SHAPE = shapes.linear(24, 64, 32)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """Timed code runs as users run it; conftest's poisoning is for accuracy tests."""


def measure(chosen, shape=SHAPE):
    base = layer.make_base(shape, torch.float32, DEVICE)
    inputs = [layer.make_inputs(shape, torch.float32, DEVICE, 0)]
    case = {"name": str(shape), "dtype": "float32", "rank": 8}
    u = layer.make_u(shape.D, 8, DEVICE)
    run = layer.measure_case(case, base, inputs, u, chosen, 0.01, lambda text, done: None)
    return {row["provider"]: row for row in run["rows"]}


class Reversed(providers.PlainWY):
    def transform(self, x):
        return providers.plain_wy(x, self.u.flip(1))


class DoesNothing(providers.PlainWY):
    def transform(self, x):
        return x + 0 * self.u.sum()


class GradientOff(providers.PlainWY):
    def transform(self, x):
        return providers.plain_wy(x, self.u.detach() + 1.01 * (self.u - self.u.detach()))


class Poisoned(providers.PlainWY):
    def transform(self, x):
        return super().transform(x) * math.nan


@pytest.mark.parametrize("planted", [Reversed, DoesNothing, GradientOff, Poisoned])
def test_a_wrong_method_gets_no_time(planted):
    rows = measure([providers.BY_NAME["frozen"], providers.Provider("planted", "planted", wrap=planted, hra=True)])
    assert rows["planted"]["why"].startswith("wrong")
    assert "seconds" not in rows["planted"] and "ratio" not in rows["planted"]
    assert rows["frozen"]["ratio"]["median"] == 1


@pytest.mark.parametrize(
    "error, why",
    [(RuntimeError("no\n kernel"), "failed: RuntimeError: no kernel"), (torch.OutOfMemoryError(), "out of mem")],
)
def test_a_failing_method_spares_the_others(error, why):
    class Failing(providers.PlainWY):
        def transform(self, x):
            raise error

    rows = measure([providers.Provider("failing", "failing", wrap=Failing, hra=True), providers.BY_NAME["frozen"]])
    assert rows["failing"]["why"].startswith(why)
    assert rows["frozen"]["ratio"]["median"] == 1


@pytest.mark.parametrize("name", [provider.name for provider in providers.PROVIDERS if provider.name != "wy-compile"])
def test_every_method_is_right_and_timed(name):
    row = measure([providers.BY_NAME[name]])[name]
    if row["why"]:
        assert name == "torch-householder" and row["why"].startswith("not available"), row["why"]
    else:
        assert row["seconds"]["median"] > 0 and max(row["error"].values()) < rounding(SHAPE.D, 8)


@pytest.mark.slow
def test_every_shape_is_compiled(monkeypatch):
    compile_one = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_one(function, backend="eager", **options))
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (8, 16, 24):
            assert measure([providers.BY_NAME["wy-compile"]], shapes.linear(4, size, 8))["wy-compile"]["why"] is None
    with torch._dynamo.config.patch(recompile_limit=len(op.TRAFFIC)):  # they share a decorator, whose code is compiled
        for size in (8, 16, 24):
            case = {"name": "op", "M": 4, "D": size, "dtype": "float32", "rank": 2}
            options = argparse.Namespace(device=DEVICE, backends=["compiled reference"], seconds=0.05)
            assert not any(row["why"] for row in op.measure_case(case, options, lambda *_: None)["rows"])


def test_a_convolution_is_measured_and_linear_only_methods_say_so():
    chosen = [providers.BY_NAME[name] for name in ("frozen", "ours", "ours-nn", "wy-eager", "peft-hra")]
    rows = measure(chosen, shapes.conv2d("conv", 2, 4, 6, 5, 3))
    assert "not available: written for nn.Linear" in rows["wy-eager"]["why"]
    assert all("seconds" in rows[name] for name in ("frozen", "ours", "ours-nn", "peft-hra"))


def test_our_layer_is_ours_and_peft_hra_is_pefts():
    import hra_kernels.peft

    layers = {}
    for name in ("ours", "peft-hra"):
        with hra_kernels.peft.enabled():  # whatever the caller had switched on
            layers[name] = providers.BY_NAME[name].build(nn.Linear(8, 8), 2)
    assert type(layers["ours"]).__module__.startswith("hra_kernels.")
    assert type(layers["peft-hra"]).__module__.startswith("peft.")


def test_a_whole_model_that_ignores_its_adapters_is_refused():
    from bench.networks import MODELS

    spec = MODELS["llama-tiny"]
    torch.manual_seed(0)
    base = spec.build()
    batch = spec.batch(torch.Generator().manual_seed(0))
    check = model.ModelCheck(base, spec, 8, batch, torch.float32)
    for wrap, right in ((providers.PlainWY, True), (DoesNothing, False), (Reversed, False)):
        provider = providers.Provider("planted", "planted", wrap=wrap, hra=True)
        adapted = model.adapt(provider, base, spec, 8, DEVICE)
        wrong = check(provider, adapted, adapted)[1]
        assert (wrong is None) == right


def test_rounds_are_shared_and_the_slow_sit_out():
    def sampler(seconds):
        def sample():
            time.sleep(seconds)
            return seconds

        return sample

    samplers = {"floor": sampler(1e-4), "fast": sampler(1e-4), "slow": sampler(1e-2)}
    result = stopwatch.interleave(samplers, "floor", 0.05, min_rounds=4, max_rounds=20)
    assert len(result.taken["slow"]) == 4
    assert sorted(result.taken["floor"]) == list(range(result.rounds))
    assert stopwatch.ratio_to_floor(result.taken["slow"], result.taken["floor"])["median"] == pytest.approx(100)


def test_a_ratio_is_taken_within_its_round():
    drifting = {k: 1.0 + k for k in range(10)}
    twice = {k: 2 * seconds for k, seconds in drifting.items()}
    assert stopwatch.ratio_to_floor(twice, drifting) == {"median": 2, "p20": 2, "p80": 2, "rounds": 10}


def test_disturbed_rounds_are_repeated_and_counted(monkeypatch):
    answers = iter([True, True, False] + [False] * 3 + [True] * 100)
    monkeypatch.setattr(stopwatch.HeldUp, "disturbed", lambda self: next(answers))
    counter = iter(range(1000))
    result = stopwatch.interleave({"a": lambda: float(next(counter))}, "a", 60, min_rounds=5, max_rounds=5)
    assert (result.rounds, result.repeated, result.disturbed) == (5, 5, 1)
    assert next(iter(result.taken["a"].values())) == 3  # call 0 is the estimate, 1 and 2 were thrown away


def test_being_held_up_is_seen(monkeypatch):
    reads = iter([(0.0, 1.0), (1.0, 1.04), (2.0, 1.10)])
    monkeypatch.setattr(stopwatch.HeldUp, "_read", staticmethod(lambda: next(reads)))
    clock = stopwatch.HeldUp()
    assert not clock.disturbed()  # 40 ms of a second
    assert clock.disturbed()  # 60 ms of a second


def test_a_touched_parameter_has_a_new_version_and_other_values_of_its_size():
    u = nn.Parameter(torch.randn(3))
    before, version = u.detach().clone(), u._version
    timing.touch_parameters([u])()
    assert u._version > version and torch.equal(u.abs(), before.abs()) and not torch.equal(u, before)


def test_a_timed_call_computes_the_factor_anew(computed):
    layer_of_ours = layer.adapted(providers.BY_NAME["ours-nn"], nn.Linear(8, 6), torch.randn(8, 2))
    timed = layer.variant(layer_of_ours, [(torch.randn(3, 8), torch.randn(3, 6))])
    for _ in range(3):
        timed.touch()
        timed.run(0)
    assert len(computed) == 3


def test_saved_storages_count_storages_once_and_without_the_known():
    x, w = torch.randn(100, 10, requires_grad=True), torch.randn(100, 10, requires_grad=True)
    assert sum(timing.saved_storages(lambda: x * w, []).values()) == 8000
    assert timing.saved_storages(lambda: x * w, [w]) == {x.data_ptr(): 4000}
    assert timing.saved_storages(lambda: (x * x, x.view(10, 100) * w.view(10, 100)), [w]) == {x.data_ptr(): 4000}


def test_peak_bytes_sees_what_is_held_at_once():
    def run():
        a = torch.ones(2**18)
        b = torch.ones(2**19)
        del a
        return torch.ones(2**17) + b[: 2**17]

    assert timing.peak_bytes(run, DEVICE) == 4 * (2**18 + 2**19)


def test_result_files_replace_a_case_and_hold_no_nan(tmp_path):
    path = tmp_path / "x" / "layer.json"
    first, second = ({"case": {"name": name}, "rows": [{"values": {"a": math.nan}}]} for name in "ab")
    record.save(path, "layer", [first, second])
    record.save(path, "layer", [{"case": {"name": "a"}, "rows": []}])
    runs = {run["case"]["name"]: run for run in record.load(path)["runs"]}
    assert runs["a"]["rows"] == [] and runs["b"]["rows"][0]["values"]["a"] is None
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="expected schema 1, got 99"):
        record.load(path)


LEVELS = {
    "op": ["--shapes", "24x64x1", "--ranks", "4", "--dtypes", "float32", "--backends", "reference"],
    "layer": ["--shapes", "24x64x32", "--providers", "frozen", "ours", "lora"],
    "model": ["--models", "llama-tiny", "--modes", "eager", "checkpoint", "--providers", "frozen", "ours"],
    "numerics": ["--size", "64", "--measures", "orthogonality", "identity"],
    "scaling": ["--over", "layers", "--values", "2", "--providers", "frozen", "ours"],
    "host": ["--paths", "cpu", "--layers", "2", "--shape", "4x16x16"],
}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_leaves_a_file_a_table_and_plots(level, tmp_path, capsys):
    out = tmp_path / "bench" / "results" / "machine"
    arguments = [level, *LEVELS[level], "--seconds", "0.01", "--threads", "1", "--device", "cpu", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert ("x.clone()" if level == "op" else "hra_kernels") in capsys.readouterr().out
    content = record.load(out / f"{level}.json")
    meta = content["runs"][0]["meta"]
    assert content["level"] == level and meta["versions"]["torch"] and meta["cpu"]["threads"] == 1
    assert level in ("numerics", "host") or list(out.glob(f"{level}*.svg"))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:results -->\nstale\n<!-- /bench:results -->\nafter\n")
    assert cli.main(["report", "--results", str(out.parent), "--readme", str(readme)]) == 0
    filled = readme.read_text()
    assert filled.startswith("before\n") and filled.endswith("after\n") and "stale" not in filled
    assert ("time over the frozen layer" in filled) == (level == "layer")
    page = (out.parent / "README.md").read_text()
    assert f"### {report.SECTIONS[level][0]}" in page and page.count("commit") >= 1 and "e+" not in page


def test_a_case_that_fails_spares_the_others_and_missing_ones_can_be_asked_for(tmp_path, monkeypatch, capsys):
    measured = []

    def plan(options):
        def planned(name):
            def measure(progress):
                measured.append(name)
                if name == "b" and measured.count("b") == 1:
                    raise torch.OutOfMemoryError("too large")
                return {"case": {"name": name}, "rows": []}

            return record.Planned({"name": name}, measure)

        return [planned(name) for name in "abc"]

    monkeypatch.setattr(cli.layer, "plan", plan)
    monkeypatch.setattr(cli.screen, "show", lambda runs, console: None)
    arguments = ["layer", "--device", "cpu", "--no-plots", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "1 of 3 cases failed: b: OutOfMemoryError: too large" in capsys.readouterr().err
    assert cli.main([*arguments, "--missing"]) == 0
    assert measured == ["a", "b", "c", "b"]
    assert [run["case"]["name"] for run in record.load(tmp_path / "layer.json")["runs"]] == ["a", "c", "b"]


def test_readme_shows_the_machine_that_was_measured_last(tmp_path):
    for machine, day in (("a", 2), ("b", 1)):
        rows = [
            {"provider": name, "label": f"{name} on {machine}", "ratio": {"median": 1.1}, "saved_beyond_x_bytes": 0}
            for name in ("frozen", "ours")
        ]
        meta = record.describe(torch.device("cpu"), {}) | {"date": f"2026-11-0{day}"}
        record.save(tmp_path / machine / "layer.json", "layer", [{"case": {"name": "x"}, "meta": meta, "rows": rows}])
    text = report.readme_block(tmp_path, tmp_path)
    assert "ours on a" in text and "ours on b" not in text


def test_a_file_without_markers_is_left_alone():
    with pytest.raises(ValueError, match="expected the markers"):
        report.fill("no markers", "content")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shapes", "12x"], "shape: expected MxDxN"),
        (["layer", "--shapes", "0x4x4"], "shape: expected MxDxN"),
        (["layer", "--providers", "nobody"], "expected one of frozen"),
        (["layer", "--seconds", "-1"], "invalid positive number value: '-1'"),
        (["layer", "--missing"], "--missing: expected --out or --save"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_git_the_commit_is_what_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(COMMIT_VARIABLE, "abc123")
    meta = record.describe(DEVICE, {})
    assert meta["commit"] == "abc123" and meta["dirty"] is None


def test_runs_of_the_applications_become_a_table_and_pages(tmp_path):
    def results(seed, gain):
        values = {"denoising loss": 0.1, "edge F1": 0.25, "edge IoU": 0.5}
        after = values | {"edge F1": 0.25 + gain}
        test = {"before: pretrained": values, "LoRA, PEFT, trained alike": values, "after": after}
        where = {"commit": "abc-dirty", "torch": "2", "peft": "0", "cpu": "a CPU", "torch_threads": 1, "gpus": []}
        arguments = {"seed": seed, "no_compare": seed > 0}
        return {
            **{"job": "control", "arguments": arguments, "environment": where, "steps": 1, "seconds": 90.0},
            "test": test if seed == 0 else {name: test[name] for name in ("before: pretrained", "after")},
        }

    machine = tmp_path / "results" / "machine"
    for seed, gain in ((1, 0.0), (0, 0.25), (1, 0.125)):  # the last replaces the first
        run = tmp_path / str(seed)
        run.mkdir(exist_ok=True)
        (run / "results.json").write_text(json.dumps(results(seed, gain)))
        for name in ("summary.md", "cost.svg", "loss.svg", "before-after.png"):
            (run / name).write_text(f"{name} of {seed}")
        assert applications.main([str(run), "--out", str(machine)]) == 0
    assert sorted(path.name for path in machine.iterdir()) == [
        *("applications.json", "train-control-before-after.png", "train-control-cost.svg", "train-control.md"),
    ]
    page = report.results_page(machine.parent)
    assert "| `control`: edge F1 | 0: 0.250, 0.500; 1: 0.250, 0.375 | +0.188 ± 0.088 | 0.250 |" in page
    assert "`control` 1.5 with the comparison, 1.5." in page and "a CPU, 1 thread" in page
    assert "summary.md of 0\n\n![train-control-before-after](machine/train-control-before-after.png)" in page


def test_other_methods_that_do_better_are_named_and_equal_print_is_no_loss():
    def row(provider, ratio):
        return {"provider": provider, "label": provider.upper(), "ratio": {"median": ratio}}

    rows = [row("frozen", 1.0), row("ours", 1.204), row("ours-nn", 1.0), row("lora", 1.1), row("oft", 1.201)]
    runs = [{"case": {"name": "a"}, "rows": rows}, {"case": {"name": "b"}, "rows": [row("ours", 1.0), row("oft", 2.0)]}]
    assert report.time_losses(runs) == "**Faster than ours**: a: LORA 1.10 against our 1.20."
    assert report.time_losses(runs[1:]) == "**Faster than ours**: no method in any case."


@pytest.mark.parametrize(
    ("value", "text"),
    [(1780.4, "1,780"), (360.2, "360"), (2.7, "2.70"), (0.01234, "0.0123"), (2036, "2,040")],
)
def test_numbers_are_written_as_a_person_does(value, text):
    assert significant(value) == text
