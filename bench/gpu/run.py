"""One command for everything that needs a GPU: build, smoke, correctness, benchmarks, counters, tuning, verdict.

    python -m bench.gpu.run --out FOLDER                        every step that has not passed yet
    python -m bench.gpu.run --out FOLDER --resume EARLIER       goes on from the files that an earlier call left
    python -m bench.gpu.run --out FOLDER --stages build smoke   these alone, again
    python -m bench.gpu.run --out FOLDER --rehearse             the same on a CPU, in little

A machine that is lent for 15 minutes has time for two calls, one right after the other:

    python3 -m bench.gpu.run --out FOLDER --commit HASH                  9.5 minutes, with the limit on commands at 10
    python3 -m bench.gpu.run --out FOLDER --commit HASH --seconds 170    what is left of the 15, less a minute

The first has correctness and the numbers that the targets are about; the second, like any later one, goes on where the
last ended. On another machine give it the FOLDER that came home, of the same commit, as --resume. After a mend (another
commit) everything runs again, the build too where sources changed; without one, --stages repeats what failed.

The steps are the list in `bench.gpu.stages`; this runs them with a log, a time limit and a place in the state each. A
call ends within --seconds; a step that its end cut off, or that was not begun, comes first in the next one. A step that
cannot run says why, and the rest goes on. One call at a time: it ends what is left of one before. Made for a bare
machine (torch, triton, nvcc, cmake, ninja, pybind11, scikit-build-core, peft, pytest, hypothesis, transformers, rich;
no network, perhaps no git) that may be gone tomorrow: what counts comes home in FOLDER after each step. Native modules
are built anew wherever they cannot be imported or are of other sources, whatever the state says. The machine's settings
are read, never changed. Only the standard library is needed to start. Where the tree comes without its history,
--commit names what it is.

FOLDER gets verdict.md, state.json, results.tar.gz (JSON, plots, logs, times of tuning), the launch table, and
counters.ncu-rep.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench import COMMIT_VARIABLE
from bench.gpu.stages import LIMIT, ROOT, TO_BE_CONTINUED, Stage, Step, stages

TABLES = ROOT / "hra_kernels" / "backends" / "launch_tables"
MARGIN_S = 15.0
"""Kept back at the end of a call for packing."""
KILLED_S = 5.0
"""A killed process that has not ended by then waits for the GPU's driver; nobody waits for it."""
MARK = "HRA_BENCH_GPU_STEP"
"""Every process of a step has it in its environment, and the tree it runs in."""


@dataclass
class Session:
    """One call: its deadline, and what all calls so far have found."""

    work: Path
    deadline: float
    rehearse: bool = False
    state: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def left(self) -> float:
        return self.deadline - MARGIN_S - time.monotonic()

    def note(self, step: str, **entry: object) -> None:
        """Keep what became of a step."""
        with self.lock:
            self.state.setdefault("steps", {})[step] = entry
            write_whole(self.work / "state.json", json.dumps(self.state, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A call may be killed at any time, and leaves what was there or `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def end_leftovers() -> None:
    """Kill what a call that was killed left running in this tree: it would be measured with what comes."""
    mark = f"{MARK}={ROOT}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def execute(
    command: list[str], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit status, or None where it did not end in time; output) of a command, which the log gets too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", MARK: str(ROOT)} | (environment or {})
    with log.open("w") as file:
        print("$", *command, file=file, flush=True)
        start = file.tell()
        # a session of its own, so that all it started ends with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=KILLED_S)
    with log.open(errors="replace") as file:
        file.seek(start)
        return status, file.read()


def last_lines(text: str, count: int = 1) -> str:
    lines = [line.strip() for line in text.splitlines() if any(letter.isalnum() for letter in line)]
    return " / ".join(lines[-count:])


def run_step(session: Session, stage: Stage, step: Step) -> None:
    """Run one step and note how it went: passed, failed, cannot run, advisory, or unfinished (goes on next time)."""
    key = f"{stage.name}/{step.name}"
    missing = [tool for tool in step.needs if shutil.which(tool) is None]
    if missing:
        session.note(key, status="cannot run", summary=f"{', '.join(missing)} not on the PATH")
        return
    log, start = session.work / "logs" / f"{stage.name}-{step.name.replace(' ', '-')}.log", time.monotonic()
    if step.unless and execute([sys.executable, "-c", step.unless], log, min(60, session.left()))[0] == 0:
        session.note(key, status="passed", summary="was there already")
        return
    limit = min(step.seconds, session.left())
    if limit < min(step.least, step.seconds):
        session.note(key, status="unfinished", summary=f"{session.left():.0f} s left, {step.least:.0f} wanted")
        return
    try:
        command = [part.replace(LIMIT, str(int(limit))) for part in step.command]
        status, output = execute(command, log, limit, step.environment)
    except OSError as error:
        status, output = 127, f"{type(error).__name__}: {error}"
    said = re.findall(step.says, output, re.MULTILINE) if step.says else [last_lines(output, 1 if status == 0 else 3)]
    summary = " / ".join(said)[-600:]
    if status is None and limit < step.seconds:
        verdict, summary = "unfinished", "the call ended"
    elif status is None:
        verdict, summary = "failed", f"did not end within {step.seconds:.0f} s"
    elif status == TO_BE_CONTINUED:
        verdict = "unfinished"
    elif status != 0:
        verdict, summary = "failed", f"status {status}: {summary or last_lines(output, 3)}"
    elif step.says and not said:
        verdict, summary = "failed", f"did not say {step.says!r}: {last_lines(output)}"
    else:
        verdict = "passed"
    if verdict == "failed" and step.advisory:
        verdict = "advisory"
    session.note(key, status=verdict, seconds=round(time.monotonic() - start, 1), summary=summary)
    print(f"    {key}: {verdict}: {summary[:300]}", flush=True)


def run_stage(session: Session, stage: Stage, again: bool, keep: Callable[[], object] = lambda: None) -> None:
    """Run the steps of a stage that are due; `keep` is called after each."""
    known = session.state.get("steps", {})
    due = [
        step
        for step in stage.steps
        if again or step.unless or known.get(f"{stage.name}/{step.name}", {}).get("status") in (None, "unfinished")
    ]
    if due:
        print(f"=== {stage.name} ({session.left():.0f} s left)", flush=True)
    with ThreadPoolExecutor(len(due) or 1 if stage.together else 1) as pool:
        list(pool.map(lambda step: (run_step(session, stage, step), keep()), due))


def resume(session: Session, folder: Path) -> None:
    """Take what an earlier call left in its output folder: state, results, tuned tables.

    Raises:
        ValueError: the folder has no state, or results that cannot be read.
    """
    if not (folder / "state.json").exists():
        raise ValueError(f"--resume: expected a folder with a state.json, got {folder}")
    archive = folder / "results.tar.gz"
    try:
        if archive.exists():
            with tarfile.open(archive) as opened:
                opened.extractall(session.work, filter="data")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"--resume: expected the whole of {archive}, got {type(error).__name__}: {error}") from error
    write_whole(session.work / "state.json", (folder / "state.json").read_text())


def read_state(session: Session) -> None:
    """Take the state that is in the work folder.

    Raises:
        ValueError: it is none.
    """
    path = session.work / "state.json"
    try:
        session.state = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"expected the state of a call in {path}, got {error}") from error


def name_commit(session: Session, given: str | None, resumed: bool = False) -> None:
    """Tell the benchmark which commit this is; what was found of another one says nothing of it, and is dropped.

    Raises:
        ValueError: neither git, nor `given`, nor an earlier call says; or what is `resumed` was another commit's.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    known = session.state.get("commit")
    commit = done.stdout.strip() if done and done.returncode == 0 else given or known
    if not commit:
        raise ValueError("there is no git history here: name the commit with --commit")
    if known not in (None, commit):
        if resumed:
            raise ValueError(f"--resume: expected what a call left of {commit}, got {known}'s")
        for name in ("results", "logs", "tune"):
            shutil.rmtree(session.work / name, ignore_errors=True)
        session.state = {}
    session.state["commit"] = os.environ[COMMIT_VARIABLE] = commit


def benchmark_lines(path: Path) -> list[str]:
    """Ours beside the others, one line per case."""
    lines = []
    for run in json.loads(path.read_text())["runs"]:
        found = [f"{row['label']} {row['ratio']['median']:.3f}" for row in run["rows"] if "ratio" in row]
        bounds = [f"{row['label']} {100 * row['of_bound']:.0f} %" for row in run["rows"] if "of_bound" in row]
        values = [f"{row['label']} {row['values']}" for row in run["rows"] if "values" in row]
        times = [f"{row['label']} {1e6 * row['seconds']['median']:.0f} us" for row in run["rows"] if "seconds" in row]
        wrong = [f"{row['label']}: {row['why'][:70]}" for row in run["rows"] if row.get("why")]
        settings = " ".join(f"{key} {run['case'][key]}" for key in ("dtype", "rank") if run["case"].get(key))
        lines.append(f"- {run['case']['name']} {settings}: " + "; ".join((bounds or found or values or times) + wrong))
    return lines


def verdict(session: Session, planned: list[Stage]) -> str:
    """What became of every step, and the numbers in short."""
    title = "# Rehearsal on a CPU: no number here says anything" if session.rehearse else "# Verdict of the GPU run"
    parts = [title, ""]
    for stage in planned:
        for step in stage.steps:
            entry = session.state.get("steps", {}).get(f"{stage.name}/{step.name}", {"status": "not run"})
            seconds = f" ({entry['seconds']:.0f} s)" if "seconds" in entry else ""
            parts.append(f"- **{stage.name}/{step.name}**: {entry['status']}{seconds}. {entry.get('summary', '')}")
    for path in sorted((session.work / "results").glob("*.json")):
        lines = benchmark_lines(path)
        meanings = {"op": "share of the copy bound", "numerics": "values", "host": "time"}
        meaning = meanings.get(path.stem, "time over the frozen layer's")
        parts += ["", f"## {path.stem}: {meaning}", "", *lines]
    counters = session.work / "results" / "counters.txt"
    if counters.exists():
        parts += ["", "## counters", "", *(f"    {line}" for line in counters.read_text().splitlines())]
    return "\n".join(parts) + "\n"


def pack(session: Session, planned: list[Stage], out: Path) -> str:
    """Everything that counts, as five files; the verdict."""
    with session.lock:
        text = verdict(session, planned)
        write_whole(out / "verdict.md", text)
        write_whole(out / "state.json", json.dumps(session.state, indent=1) + "\n")
        part = out / "results.tar.gz.part"
        with tarfile.open(part, "w:gz") as archive:
            for name in ("results", "logs", "tune"):
                if (session.work / name).exists():
                    archive.add(session.work / name, arcname=name)
        part.replace(out / "results.tar.gz")
        for extra in (*(session.work / "tune").glob("table/*.json"), session.work / "counters.ncu-rep"):
            if extra.exists():
                shutil.copy2(extra, out / extra.name)
    return text


def main() -> int:
    names = ", ".join(stage.name for stage in stages(Path(), rehearse=False))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes back")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="an earlier call's --out")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help=f"of {names}: these alone, whatever they found")
    parser.add_argument("--seconds", type=float, default=570, help="end within this time (default 570)")
    parser.add_argument("--commit", help="what this tree is, where there is no git history")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    options = parser.parse_args()
    session = Session(
        ROOT / "build" / ("rehearsal" if options.rehearse else "gpu"),
        time.monotonic() + options.seconds,
        options.rehearse,
    )
    planned = stages(session.work, options.rehearse)
    unknown = set(options.stages or []) - {stage.name for stage in planned}
    if unknown:
        parser.error(f"--stages: expected some of {names}, got {sorted(unknown)}")
    try:
        if options.resume:
            resume(session, options.resume)
        read_state(session)
        name_commit(session, options.commit, resumed=options.resume is not None)
    except ValueError as error:
        parser.error(str(error))
    for table in (session.work / "tune").glob("table/*.json"):
        if not options.rehearse:
            shutil.copy2(table, TABLES / table.name)  # the tree that comes with a call has the old one
    chosen = [stage for stage in planned if options.stages is None or stage.name in options.stages]
    end_leftovers()
    for stage in chosen:  # a call that is cut off has brought home what came before
        run_stage(session, stage, options.stages is not None, lambda: pack(session, planned, options.out))
    print(pack(session, planned, options.out)[-8000:])
    steps = session.state.get("steps", {})
    found = [steps.get(f"{stage.name}/{step.name}", {}).get("status") for stage in chosen for step in stage.steps]
    return 0 if all(status in ("passed", "advisory") for status in found) else 1


if __name__ == "__main__":
    sys.exit(main())
