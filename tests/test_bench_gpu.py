"""The GPU script without a GPU: its command lines parse, its stages resume, its launch table is Python."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("rich")
pytest.importorskip("peft")

from bench import __main__ as cli
from bench import shapes
from bench.gpu import run as gpu


@pytest.fixture
def session(tmp_path, monkeypatch):
    for name in ("WORK", "RESULTS", "LOGS"):
        monkeypatch.setattr(gpu, name, tmp_path / name.lower())
    return gpu.Session(rehearse=True, deadline=time.monotonic() + 60)


@pytest.mark.parametrize("rehearse", [True, False])
@pytest.mark.parametrize("level", cli.LEVELS)
def test_every_benchmark_command_is_one_the_benchmark_understands(level, rehearse):
    commands = gpu.bench_commands(gpu.Session(rehearse, 0.0), level)
    assert commands
    for arguments in commands:
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
                raise gpu.OutOfTime("no time for c")
            done.append(part)
            entry.append(part)
        return "all"

    monkeypatch.setitem(gpu.STAGES, "machine", stage)
    gpu.run_stage(session, "machine", again=False)
    assert session.state["machine"]["status"] == "unfinished"
    gpu.run_stage(session, "machine", again=False)
    assert session.state["machine"]["status"] == "passed" and done == ["a", "b", "pause", "c"]


def test_a_failing_command_fails_its_stage_with_what_it_said(session):
    with pytest.raises(gpu.StageFailed, match="status 3: the reason"):
        session.python("machine", "-c", "import sys; print('the reason'); sys.exit(3)")


def test_a_command_that_does_not_end_runs_out_of_time(session):
    session.deadline = time.monotonic() + gpu.MARGIN_S + 1.5
    with pytest.raises(gpu.OutOfTime, match="did not end in time"):
        session.python("machine", "-c", "import time; time.sleep(30)", least=1)


def test_a_test_run_that_tested_nothing_is_a_failure(session, tmp_path):
    (tmp_path / "test_skipped.py").write_text("import pytest\n@pytest.mark.skip\ndef test_it(): pass\n")
    with pytest.raises(gpu.StageFailed, match="nothing was tested: 1 skipped"):
        gpu.pytest(session, "test", str(tmp_path / "test_skipped.py"), "-c", "/dev/null", "--rootdir", str(tmp_path))


def test_packed_files_are_few_and_the_verdict_names_every_stage(session, tmp_path):
    session.state["build"] = {"status": "passed", "summary": "built", "seconds": 1.0}
    gpu.RESULTS.mkdir(parents=True)
    (gpu.RESULTS / "layer.json").write_text(
        json.dumps({"runs": [{"case": {"name": "s"}, "rows": [{"label": "m", "why": None, "ratio": {"median": 1.5}}]}]})
    )
    for name in gpu.PLOTS:
        (gpu.RESULTS / name).write_bytes(b"plot")
    gpu.pack(session, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) <= 8
    text = (tmp_path / "out" / "verdict.md").read_text()
    assert all(f"**{name}**" in text for name in gpu.STAGES) and "m 1.500" in text and "Rehearsal" in text


def test_the_launch_table_is_written_as_python():
    pytest.importorskip("triton")
    from bench.gpu import tune
    from hra_kernels import tuning

    key = next(key for key in tuning.CONFIGS if key[0] in tune.KERNELS)
    shape = tune.RANGES[1][2]
    wanted = tuning.LaunchConfig(64, 64, 8, 2)
    names = {"LaunchConfig": tuning.LaunchConfig}
    exec(tune.table({key: {shape: dataclasses.astuple(wanted)}}), names)
    table = names["CONFIGS"]
    assert set(table) == set(tuning.CONFIGS)
    assert all(table[other] == tuning.CONFIGS[other] for other in table if other != key)
    found = {point: next(c for m, d, c in table[key] if point[0] <= m and point[1] <= d) for _, _, point in tune.RANGES}
    assert found[shape] == wanted
    for point in found:
        assert point == shape or found[point] == tuning.select_config(*key, *point)


def test_the_search_finds_the_fastest_right_configuration():
    pytest.importorskip("triton")
    from bench.gpu import tune
    from hra_kernels.tuning import LaunchConfig

    class Fake:
        key = ("reflect", 2, 16)

        def measure(self, config):
            if config.num_warps == 8:
                return 1e-9, 0.5  # fastest of all, and wrong
            if config.block_d == 256:
                return None, float("nan")  # does not run
            return 1e-3 * (1 + abs(config.block_m - 64) + config.num_stages), 1e-3

    best, log = tune.search(Fake(), LaunchConfig(16, 64, 4, 3), 60)
    assert (best.block_m, best.num_warps, best.num_stages) == (64, 4, 1)
    assert all(len(entry["config"]) == 4 for entry in log)


def test_starting_needs_the_standard_library_alone():
    source = gpu.__file__
    code = f"import runpy, sys; sys.argv = ['run.py', '--help']; runpy.run_path({source!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--rehearse" in done.stdout
