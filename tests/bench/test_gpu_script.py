"""The GPU script without a GPU: its commands parse, its steps end, resume and say why they cannot run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import __main__ as cli
from bench import shapes
from bench.gpu import build, counters, machine
from bench.gpu import run as gpu
from bench.gpu.stages import LIMIT, ROOT, TO_BE_CONTINUED, Stage, Step, stages
from bench.gpu.stages import pytest as gpu_pytest


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path / "work", time.monotonic() + 60)


def python(name, code, seconds=30, **options):
    return Step(name, [sys.executable, "-c", code], seconds, least=1, **options)


def run(session, *steps, together=False, again=False):
    gpu.run_stage(session, Stage("stage", list(steps), together), again)
    return session.state["steps"]


@pytest.mark.parametrize("rehearse", [True, False])
@pytest.mark.parametrize("level", cli.LEVELS)
def test_every_benchmark_command_is_one_the_benchmark_understands(level, rehearse, tmp_path):
    stage = next(stage for stage in stages(tmp_path, rehearse) if stage.name == level)
    assert stage.steps
    for step in stage.steps:
        options = cli.build_parser().parse_args(step.command[3:])
        assert not hasattr(options, "shapes") or shapes.parse(options.shapes)
        assert options.missing and options.out == tmp_path / "results"


def test_the_order_and_the_limits(tmp_path):
    planned = stages(tmp_path, False)
    names = [stage.name for stage in planned]
    wanted = ["build", "smoke", "correctness", "op", "first", "counters", "tune", "layer", "model", "numerics"]
    assert [name for name in names if name in wanted] == wanted
    assert all(0 < step.seconds <= 400 for stage in planned for step in stage.steps)
    smoke, correctness = (next(stage for stage in planned if stage.name == name) for name in ("smoke", "correctness"))
    assert smoke.together and all(step.seconds <= 60 for step in smoke.steps)
    assert correctness.together  # one that hangs costs the others nothing
    sanitize = next(stage for stage in planned if stage.name == "sanitize")
    assert {step.name.split()[0] for step in sanitize.steps if step.advisory} == {"racecheck"}
    assert {step.name.split()[0] for step in sanitize.steps if not step.advisory} == {"memcheck", "synccheck"}


def test_a_hang_ends_at_its_limit_with_all_it_started_and_spares_the_rest(session, tmp_path):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    found = run(session, python("hang", child, seconds=2), python("next", "print('fine')"))
    assert found["stage/hang"]["status"] == "failed" and "did not end within 2 s" in found["stage/hang"]["summary"]
    assert found["stage/next"]["status"] == "passed"
    assert ended((tmp_path / "pid").read_text())


def test_a_test_that_hangs_ends_its_process(session, tmp_path):
    """It holds the interpreter's lock, as a call that waits for the GPU may: no signal's handler ever runs."""
    if int(pytest.__version__.split(".")[0]) < 9:
        pytest.skip("pytest has no faulthandler_exit_on_timeout")
    code = "import ctypes\ndef test_fine(): pass\ndef test_hang(): ctypes.PyDLL(None).sleep(50)\n"
    (tmp_path / "test_hang.py").write_text(code)
    step = gpu_pytest("hang", 40, str(tmp_path / "test_hang.py"), "-c", "/dev/null", workers=1, each=1, least=1)
    found = run(session, step)["stage/hang"]
    assert found["status"] == "failed" and found["seconds"] < 30
    assert "Timeout (" in found["summary"] and "in test_hang" in found["summary"]


def test_the_facts_name_triton_and_every_assembler_that_it_brings():
    """Some releases have made wrong code."""
    pytest.importorskip("triton")
    found = machine.facts(torch.device("cpu"))
    versions = found["assemblers"]
    assert found["triton"] and "ptxas" in versions and all(text.startswith("V") for text in versions.values())


def ended(pid: str) -> bool:
    state = Path("/proc", pid, "stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_what_a_killed_call_left_running_ends_when_the_next_begins(session, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    pid = tmp_path / "pid"
    child = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
        f"start_new_session=True); open({str(pid)!r}, 'w').write(str(p.pid))"
    )
    run(session, python("leaves", child))
    assert not ended(pid.read_text())
    gpu.end_leftovers()
    deadline = time.monotonic() + 10
    while not ended(pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(pid.read_text())


def test_a_process_that_cannot_be_killed_is_not_waited_for(session, monkeypatch):
    """One in the GPU's driver, say."""
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    monkeypatch.setattr(gpu, "KILLED_S", 0.2)
    begun = time.monotonic()
    found = run(session, python("hang", "import time; time.sleep(10)", seconds=1))
    assert found["stage/hang"]["summary"] == "did not end within 1 s" and time.monotonic() - begun < 8


def test_every_step_comes_home_as_soon_as_it_has_ended(session):
    home = []
    stage = Stage("stage", [python("first", "print(1)"), python("second", "print(2)")])
    gpu.run_stage(session, stage, False, lambda: home.append(set(session.state["steps"])))
    assert home == [{"stage/first"}, {"stage/first", "stage/second"}]


def test_what_the_end_of_a_call_cut_off_goes_on_in_the_next(session):
    session.deadline = time.monotonic() + gpu.MARGIN_S + 2
    found = run(session, python("long", "import time; time.sleep(30)", seconds=60), python("after", "print(1)"))
    assert found["stage/long"]["status"] == found["stage/after"]["status"] == "unfinished"
    session.deadline = time.monotonic() + 60
    found = run(session, python("long", "print('done')"), python("after", "print(1)"))
    assert found["stage/long"]["status"] == found["stage/after"]["status"] == "passed"


def test_what_is_done_in_parts_is_unfinished(session):
    assert run(session, python("part", f"exit({TO_BE_CONTINUED})"))["stage/part"]["status"] == "unfinished"


def test_passed_and_failed_steps_are_not_run_again_unless_asked(session, tmp_path):
    code = f"open({str(tmp_path / 'log')!r}, 'a').write('x')"
    steps = python("once", code), python("broken", code + "; exit(1)")
    for again in (False, False, True):
        run(session, *steps, again=again)
    assert (tmp_path / "log").read_text() == "xxxx"


def test_a_step_says_why_it_cannot_run_and_an_advisory_one_fails_nothing(session):
    found = run(
        session,
        python("tool", "print(1)", needs=("no-such-tool",)),
        Step("missing", ["/no/such/program"], 30, least=1),
        python("race", "print('ERROR SUMMARY: 3 hazards'); exit(99)", says="ERROR SUMMARY.*", advisory=True),
        python("gate", "print('ERROR SUMMARY: 3 errors'); exit(99)", says="ERROR SUMMARY.*"),
        together=True,
    )
    assert found["stage/tool"] == {"status": "cannot run", "summary": "no-such-tool not on the PATH"}
    assert found["stage/missing"]["status"] == "failed" and "FileNotFoundError" in found["stage/missing"]["summary"]
    assert found["stage/race"]["status"] == "advisory" and "3 hazards" in found["stage/race"]["summary"]
    assert found["stage/gate"]["status"] == "failed" and "3 errors" in found["stage/gate"]["summary"]


def test_a_test_run_that_tested_nothing_is_a_failure(session, tmp_path):
    (tmp_path / "test_skipped.py").write_text("import pytest\n@pytest.mark.skip\ndef test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path / "test_skipped.py"), "-c", "/dev/null"]
    says = next(step for stage in stages(tmp_path, True) for step in stage.steps if "pytest" in step.command).says
    found = run(session, Step("tests", [*command, "--rootdir", str(tmp_path)], 60, least=1, says=says))
    assert found["stage/tests"]["status"] == "failed" and "1 skipped" in found["stage/tests"]["summary"]


def test_what_the_build_left_is_checked_whatever_the_state_says(session, tmp_path):
    module = tmp_path / "module"
    step = python("modules", f"open({str(module)!r}, 'w')", unless=f"open({str(module)!r})")
    run(session, step)
    module.unlink()  # another machine, with the state of this one
    assert run(session, step)["stage/modules"]["status"] == "passed" and module.exists()
    assert run(session, step)["stage/modules"]["summary"] == "was there already"


def test_state_results_and_tables_come_home_and_are_resumed_from(session, tmp_path):
    planned = [Stage("stage", [python("first", "print('done')"), python("second", "print(2)")])]
    run(session, planned[0].steps[0])
    case = {"case": {"name": "s"}, "rows": [{"label": "m", "why": None, "ratio": {"median": 1.5}}]}
    host = {"case": {"name": "h"}, "rows": [{"label": "m", "seconds": {"median": 2e-5}}]}
    results = {f"results/{name}.json": json.dumps({"runs": [one]}) for name, one in (("layer", case), ("host", host))}
    for name, text in (results | {"tune/table/sm_90.json": "{}"}).items():
        (session.work / name).parent.mkdir(parents=True, exist_ok=True)
        (session.work / name).write_text(text)
    home = tmp_path / "home"
    text = gpu.pack(session, planned, home)
    assert {path.name for path in home.iterdir()} == {"verdict.md", "state.json", "results.tar.gz", "sm_90.json"}
    assert "m 1.500" in text and "m 20 us" in text and "**stage/second**: not run" in text
    other = gpu.Session(tmp_path / "fresh", time.monotonic() + 60)
    gpu.resume(other, home)
    assert json.loads((other.work / "state.json").read_text()) == session.state
    assert (other.work / "results" / "layer.json").exists() and (other.work / "tune/table/sm_90.json").exists()
    with pytest.raises(ValueError, match=r"expected a folder with a state\.json"):
        gpu.resume(other, tmp_path / "nothing")
    archive = (home / "results.tar.gz").read_bytes()
    (home / "results.tar.gz").write_bytes(archive[: len(archive) // 2])
    with pytest.raises(ValueError, match="expected the whole of"):
        gpu.resume(other, home)
    (other.work / "state.json").write_text('{"steps":')
    with pytest.raises(ValueError, match="expected the state of a call in"):
        gpu.read_state(other)


def test_what_was_found_of_another_commit_is_dropped_and_not_resumed(session, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(gpu.COMMIT_VARIABLE, "")
    run(session, python("fine", "print(1)"))
    (session.work / "results").mkdir()
    gpu.name_commit(session, "first")
    gpu.name_commit(session, "first", resumed=True)
    assert session.state["steps"] and (session.work / "results").exists()
    with pytest.raises(ValueError, match="expected what a call left of second, got first's"):
        gpu.name_commit(session, "second", resumed=True)
    gpu.name_commit(session, "second")
    assert session.state == {"commit": "second"} and not (session.work / "results").exists()


def test_modules_of_other_sources_than_the_trees_are_built_anew(monkeypatch, tmp_path):
    pytest.importorskip("hra_kernels._native")
    source, built_from = tmp_path / "csrc" / "kernel.cu", tmp_path / "built-from"
    source.parent.mkdir()
    source.write_text("right")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(RuntimeError, match="not known to be built from these"):
        build.check(built_from, cuda=False)
    built_from.write_text(build.digest())
    build.check(built_from, cuda=False)
    source.write_text("mended")
    with pytest.raises(RuntimeError, match="not known to be built from these"):
        build.check(built_from, cuda=False)


@pytest.mark.parametrize("rehearse", [True, False])
def test_no_state_alone_lets_the_build_be_skipped(rehearse, tmp_path):
    (step,) = next(stage for stage in stages(tmp_path, rehearse) if stage.name == "build").steps
    assert step.unless and subprocess.run([sys.executable, "-c", step.unless], cwd=ROOT).returncode != 0


def test_a_tree_without_history_must_be_named_with_and_without_git(session, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(gpu.COMMIT_VARIABLE, raising=False)
    for path in (os.environ["PATH"], str(tmp_path)):  # the second has no git
        monkeypatch.setenv("PATH", path)
        session.state.pop("commit", None)
        with pytest.raises(ValueError, match="name the commit with --commit"):
            gpu.name_commit(session, None)
        gpu.name_commit(session, "abc123")
        gpu.name_commit(session, None)  # the state knows
        assert os.environ[gpu.COMMIT_VARIABLE] == "abc123"


def test_the_table_of_an_architecture_is_written_and_read(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from bench.gpu import tune
    from hra_kernels.backends import tuning

    monkeypatch.setattr(tuning, "architecture", lambda: "sm_90")  # whose shipped table may be a tuned one
    key, shape, tile = ("reflect", 2, 8), tune.RANGES[1][2], [64, 64, 8, 2]
    log = {
        "a": {"key": key, "shape": shape, "best": tile, "tried": [{"choice": tile, "seconds": 2e-5}]},
        "b": {"key": ("forward", 8), "shape": [8192, 4096], "best": 2048, "tried": [{"choice": 2048, "seconds": 2e-5}]},
    }
    content = json.loads(tune.table(log, "sm_90", "GPU"))
    assert content["measured_on"] == "GPU" and "20.0 us at 8192 x 2048" in [row["why"] for row in content["tiles"]]
    tiles, slices = tuning.read_tiles(content["tiles"]), tuning.read_slices(content["slices"])
    shipped = tuning.read_tiles(json.loads((tuning.TABLES / "sm_90.json").read_text())["tiles"])
    assert set(tiles) == {key} | set(shipped) and set(slices) == set(tuning.SLICES)
    sizes = [size for _, _, size in tune.RANGES]
    before = {name: [tuning.select_config(*key, *size, name) for size in sizes] for name in ("sm_90", "sm_120")}
    monkeypatch.setitem(tuning.CONFIGS, "sm_90", tuning.CONFIGS[tuning.DEFAULT] | tiles)
    before["sm_90"][sizes.index(shape)] = tuning.LaunchConfig(*tile)
    assert before == {name: [tuning.select_config(*key, *size, name) for size in sizes] for name in before}
    for width in (*tune.WIDTHS, 20000):
        expected = 2048 if width == 4096 else tuning.select_slice("forward", 8, width)
        assert next(size for most_d, size in slices["forward", 8] if most_d >= width) == expected


@pytest.mark.parametrize("outcome", ["right", "wrong", "hangs"])
def test_a_table_stays_in_place_only_if_its_tiles_pass_in_time(outcome, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from bench.gpu import tune

    def tests(command, timeout, **_):
        assert "shipped_tiles" in command and timeout < tune.TEST_S and path.read_text() == "new"
        if outcome == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int(outcome == "wrong"))

    path = tmp_path / "sm_90.json"
    path.write_text("old")
    monkeypatch.setattr(tune.tuning, "TABLES", tmp_path)
    monkeypatch.setattr(subprocess, "run", tests)
    assert tune.put_in_place("new", "sm_90") is (outcome == "right")
    assert path.read_text() == ("new" if outcome == "right" else "old")


def test_tuning_is_told_how_long_it_has(session, tmp_path):
    planned = stages(tmp_path, False)
    (tune,) = next(stage for stage in planned if stage.name == "tune").steps
    assert tune.command[tune.command.index("--seconds") + 1] == LIMIT
    session.deadline = time.monotonic() + gpu.MARGIN_S + 20
    step = Step("tell", [sys.executable, "-c", "import sys; print(sys.argv)", LIMIT], 300, least=1)
    assert int(run(session, step)["stage/tell"]["summary"].split("'")[-2]) in range(10, 21)


def test_a_rank_takes_the_smallest_line_that_serves_it():
    from hra_kernels.backends import tuning

    tables = {("k", 2, rank): [(tuning.WIDE, tuning.WIDE, rank)] for rank in (8, 16, 64)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "CONFIGS", {tuning.DEFAULT: tables})
        found = [tuning.select_config("k", 2, rank, 5, 5) for rank in (1, 8, 9, 16, 17, 64, 200)]
        with pytest.raises(KeyError, match="no tile for k with 4 bytes"):
            tuning.select_config("k", 4, 8, 5, 5)
    assert found == [8, 8, 16, 16, 64, 64, 64]


def test_the_search_finds_the_fastest_right_configuration():
    pytest.importorskip("triton")
    from bench.gpu import tune
    from hra_kernels.backends.tuning import LaunchConfig

    def measure(config):
        if config.num_warps == 8:
            return 1e-9, 0.5  # fastest of all, and wrong
        if config.block_d == 256:
            return None, float("nan")  # does not run
        return 1e-3 * (1 + abs(config.block_m - 64) + config.num_stages), 1e-3

    prepared = []
    best, log = tune.search(measure, LaunchConfig(16, 64, 4, 3), 60, prepared.extend)
    assert (best.block_m, best.num_warps, best.num_stages) == (64, 4, 1)
    assert [LaunchConfig(*entry["choice"]) for entry in log[1:]] == prepared


def test_the_fastest_right_slice_is_found(monkeypatch):
    pytest.importorskip("triton")
    from bench.gpu import tune
    from hra_kernels.backends import tuning

    seconds = {512: 3.0, 1024: 2.95, 2048: 1.0}  # 1024 is not worth it
    errors = {512: 1e-3, 1024: 1e-3, 2048: 0.5}  # 2048 is wrong

    class Fake:
        def __init__(self, *arguments):
            pass

        def measure(self):
            size = tuning.select_slice("forward", 8, 4096)
            return seconds[size], errors[size]

    monkeypatch.setattr(tune, "Bench", Fake)
    monkeypatch.setitem(tuning.SLICES, ("forward", 8), [(tuning.WIDE, 512)])
    best, log = tune.search_slices(None, ("forward", 8), (8192, 4096), "cpu")
    assert best == 512 and [entry["choice"] for entry in log] == [512, 1024, 2048]
    errors[2048] = 1e-3
    assert tune.search_slices(None, ("forward", 8), (8192, 4096), "cpu")[0] == 2048


def ncu_row(number, kernel, range_name, metric, unit, value):
    return ",".join(f'"{field}"' for field in (number, "7", kernel, range_name, "Section", metric, unit, value))


CLUSTER = "void hra::cuda::<unnamed>::cluster_fwd_kernel<hra::bf16, 8, 512>(Arguments<T1>)"
RANGE = '""<default domain>:hra/cuda/reflect_fwd/8192x4096r8:none:none""'
NCU = [
    "==PROF== Connected to process 7",
    '"ID","Process ID","Kernel Name","thread Domain","Section Name","Metric Name","Metric Unit","Metric Value"',
    ncu_row("0", CLUSTER, RANGE, "Duration", "us", "51.20"),
    ncu_row("0", CLUSTER, "", "DRAM Throughput", "%", "88.1"),
    ncu_row("1", "_reflect_kernel", "hra/triton/reflect_fwd/8192x4096r8", "Duration", "us", "60.1"),
]


def test_the_profilers_table_becomes_one_line_per_kernel():
    lines = counters.summarize("\n".join(NCU))
    assert len(lines) == 2
    assert lines[0].split()[:2] == ["cuda/reflect_fwd/8192x4096r8", "cluster_fwd_kernel"]
    assert "time 51.20 us, DRAM 88.1 %" in lines[0]
    assert lines[1].split()[:2] == ["triton/reflect_fwd/8192x4096r8", "_reflect_kernel"]
    assert counters.summarize("==ERROR== no permission") == []


def test_starting_needs_the_standard_library_alone():
    command = [sys.executable, "-S", "-m", "bench.gpu.run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--rehearse" in done.stdout, done.stderr
