"""The GPU script without a GPU: its command lines parse, its stages resume, its launch table is Python."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import __main__ as cli
from bench import shapes
from bench.gpu import commands, counters, stages, verdict
from bench.gpu import run as gpu
from bench.gpu.session import MARGIN_S, OutOfTime, Session, StageFailed


@pytest.fixture
def session(tmp_path):
    return Session(rehearse=True, deadline=time.monotonic() + 60, work=tmp_path / "work")


@pytest.mark.parametrize("rehearse", [True, False])
@pytest.mark.parametrize("level", cli.LEVELS)
def test_every_benchmark_command_is_one_the_benchmark_understands(level, rehearse):
    found = commands.benchmarks(level, rehearse)
    assert found
    for arguments in found:
        options = cli.build_parser().parse_args([level, *arguments, "--device", "cpu", "--out", "x"])
        assert not hasattr(options, "shapes") or shapes.parse(options.shapes)


def test_a_stage_out_of_time_goes_on_where_it_stopped(session, monkeypatch):
    done = []

    def stage(session):
        entry = session.state["machine"].setdefault("done", [])
        for part in "abc":
            if part in entry:
                continue
            if len(done) == 2 and part == "c":
                done.append("pause")
                raise OutOfTime("no time for c")
            done.append(part)
            entry.append(part)
        return "all"

    monkeypatch.setitem(stages.STAGES, "machine", stage)
    gpu.run_stage(session, "machine", again=False)
    assert session.state["machine"]["status"] == "unfinished"
    gpu.run_stage(session, "machine", again=False)
    assert session.state["machine"]["status"] == "passed" and done == ["a", "b", "pause", "c"]


def test_a_failing_command_fails_its_stage_with_what_it_said(session):
    with pytest.raises(StageFailed, match="status 3: the reason"):
        session.python("machine", "-c", "import sys; print('the reason'); sys.exit(3)")


def test_a_command_that_does_not_end_runs_out_of_time(session):
    session.deadline = time.monotonic() + MARGIN_S + 1.5
    with pytest.raises(OutOfTime, match="did not end in time"):
        session.python("machine", "-c", "import time; time.sleep(30)", least=1)


def test_a_test_run_that_tested_nothing_is_a_failure(session, tmp_path):
    (tmp_path / "test_skipped.py").write_text("import pytest\n@pytest.mark.skip\ndef test_it(): pass\n")
    with pytest.raises(StageFailed, match="nothing was tested: 1 skipped"):
        session.pytest("test", str(tmp_path / "test_skipped.py"), "-c", "/dev/null", "--rootdir", str(tmp_path))


def test_packed_files_are_few_and_the_verdict_names_every_stage(session, tmp_path):
    session.state["build"] = {"status": "passed", "summary": "built", "seconds": 1.0}
    session.results.mkdir(parents=True)
    (session.results / "layer.json").write_text(
        json.dumps({"runs": [{"case": {"name": "s"}, "rows": [{"label": "m", "why": None, "ratio": {"median": 1.5}}]}]})
    )
    for name in verdict.PLOTS:
        (session.results / name).write_bytes(b"plot")
    verdict.pack(session, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) <= 8
    text = (tmp_path / "out" / "verdict.md").read_text()
    assert all(f"**{name}**" in text for name in stages.STAGES) and "m 1.500" in text and "Rehearsal" in text


def test_the_launch_tables_are_written_as_python():
    pytest.importorskip("triton")
    from bench.gpu import tune
    from hra_kernels.backends import tuning

    keys = [key for key in tuning.CONFIGS if key[0] in tune.KERNELS]
    shape, wanted = tune.RANGES[1][2], tuning.LaunchConfig(64, 64, 8, 2)
    choice = list(dataclasses.astuple(wanted))
    log = {
        str(key): {"key": key, "shape": shape, "best": choice, "tried": [{"choice": choice, "seconds": 2e-5}]}
        for key in keys
    }
    for key in tuning.SLICES:
        log[str(key)] = {"key": key, "shape": [8192, 4096], "best": 2048, "tried": [{"choice": 2048, "seconds": 2e-5}]}
    source = tune.module(log, "GPU")
    assert "NOT YET MEASURED" not in source and "on GPU where" in source and "20.0 us at 8192 x 4096" in source
    written = {"__name__": "hra_kernels.written"}
    exec(compile(source, "tuning.py", "exec"), written)
    sizes = [shape for _, _, shape in tune.RANGES]
    for key, lines in tuning.CONFIGS.items():
        if key not in keys:
            assert [(m, d, dataclasses.astuple(config)) for m, d, config in lines] == [
                (m, d, dataclasses.astuple(config)) for m, d, config in written["CONFIGS"][key]
            ]
            continue
        for point in sizes:
            expected = wanted if point == shape else tuning.select_config(*key, *point)
            assert dataclasses.astuple(written["select_config"](*key, *point)) == dataclasses.astuple(expected)
    for key in tuning.SLICES:
        for width in (*tune.WIDTHS, 20000):
            expected = 2048 if width == 4096 else tuning.select_slice(*key, width)
            assert written["select_slice"](*key, width) == expected
    assert tune.module({}, None) == Path(tuning.__file__).read_text()


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
    best, log = tune.search_slices(None, ("forward", 8), (8192, 4096), "cpu")
    assert best == 512 and [entry["choice"] for entry in log] == [512, 1024, 2048]
    errors[2048] = 1e-3
    assert tune.search_slices(None, ("forward", 8), (8192, 4096), "cpu")[0] == 2048


def test_every_stage_has_its_turn():
    assert [name for wave in stages.WAVES for name in wave] == list(stages.STAGES)


def test_a_faulty_stage_spares_the_others(session, monkeypatch):
    monkeypatch.setitem(stages.STAGES, "machine", lambda session: 1 / 0)
    gpu.run_stage(session, "machine", again=False)
    assert session.state["machine"]["status"] == "failed" and "ZeroDivisionError" in session.state["machine"]["summary"]


def test_a_test_run_that_skips_a_backend_is_a_failure(session, monkeypatch):
    session.rehearse = False
    session.state["test"] = {}
    monkeypatch.setattr(stages, "backends", lambda session: ["cuda"])
    monkeypatch.setattr(Session, "pytest", lambda self, *arguments: "20 passed, 300 skipped in 1.00s")
    with pytest.raises(StageFailed, match="cuda: only 20 passed, 300 skipped"):
        stages.test_backend(session)


def test_a_benchmark_goes_on_with_what_is_missing_in_the_next_call(session, monkeypatch):
    session.state["bench-layer"] = {}
    ran = []
    monkeypatch.setattr(Session, "python", lambda self, log, *arguments, **options: ran.append(arguments))
    assert stages.STAGES["bench-layer"](session) == "1 commands"
    assert "--missing" in ran[0] and str(session.results) in ran[0]


def test_tuned_tables_are_put_back(session, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "hra_kernels").mkdir()
    stages.restore_tables(session)
    assert not (tmp_path / "hra_kernels" / "tuning.py").exists()
    session.work.mkdir()
    (session.work / "tuning.py").write_text("tuned")
    stages.restore_tables(session)
    assert (tmp_path / "hra_kernels" / "tuning.py").read_text() == "tuned"


def test_a_tree_without_history_must_be_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(gpu.COMMIT_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="name the commit with --commit"):
        gpu.name_commit(None)
    monkeypatch.setenv(gpu.COMMIT_VARIABLE, "")
    gpu.name_commit("abc123")
    assert os.environ[gpu.COMMIT_VARIABLE] == "abc123"


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


def test_the_profilers_table_becomes_a_line_a_kernel():
    lines = counters.summarize("\n".join(NCU))
    assert len(lines) == 2
    assert lines[0].split()[:2] == ["cuda/reflect_fwd/8192x4096r8", "cluster_fwd_kernel"]
    assert "time 51.20 us, DRAM 88.1 %" in lines[0]
    assert lines[1].split()[:2] == ["triton/reflect_fwd/8192x4096r8", "_reflect_kernel"]
    assert counters.summarize("==ERROR== no permission") == []


def test_starting_needs_the_standard_library_alone():
    command = [sys.executable, "-S", "-m", "bench.gpu.run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=stages.ROOT)
    assert done.returncode == 0 and "--rehearse" in done.stdout, done.stderr
