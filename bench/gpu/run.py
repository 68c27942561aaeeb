"""One command for everything that needs a GPU: build, smoke, correctness, benchmarks, counters, tuning, verdict.

    python -m bench.gpu.run --out FOLDER                        every step that has not passed yet
    python -m bench.gpu.run --out FOLDER --resume EARLIER       goes on from the files that an earlier call left
    python -m bench.gpu.run --out FOLDER --stages build smoke   these alone, again
    python -m bench.gpu.run --out FOLDER --rehearse             the same on a CPU, in little

The steps are the list in `bench.gpu.stages`; this runs them with a log, a time limit and a place in the state each. A
call ends within --seconds; a step that its end cut off, or that was not begun, comes first in the next one. A step that
cannot run says why, and the rest goes on. Made for a bare machine (torch, triton, nvcc, cmake, ninja, pybind11,
scikit-build-core, peft, pytest, hypothesis, transformers; no network, perhaps no git) that may be gone tomorrow: what
counts comes home in FOLDER, and `--resume` starts from it. The native modules are built anew wherever they cannot be
imported, whatever the state says. The machine's settings are read, never changed. Only the standard library is needed
to start. Where the tree comes without its history, --commit names what it is.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench import COMMIT_VARIABLE
from bench.gpu.stages import ROOT, TO_BE_CONTINUED, Stage, Step, stages

TABLES = ROOT / "hra_kernels" / "backends" / "launch_tables"
MARGIN_S = 15.0
"""Kept back at the end of a call for packing."""


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
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / "state.json").write_text(json.dumps(self.state, indent=1) + "\n")


def execute(
    command: list[str], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit status, or None where it did not end in time; output) of a command, which the log gets too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"} | (environment or {})
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
            process.wait()
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
        status, output = execute(step.command, log, limit, step.environment)
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


def run_stage(session: Session, stage: Stage, again: bool) -> None:
    """Run the steps of a stage that are due."""
    known = session.state.get("steps", {})
    due = [
        step
        for step in stage.steps
        if again or step.unless or known.get(f"{stage.name}/{step.name}", {}).get("status") in (None, "unfinished")
    ]
    if due:
        print(f"=== {stage.name} ({session.left():.0f} s left)", flush=True)
    with ThreadPoolExecutor(len(due) or 1 if stage.together else 1) as pool:
        list(pool.map(lambda step: run_step(session, stage, step), due))


def resume(session: Session, folder: Path) -> None:
    """Take what an earlier call left in its output folder: state, results, tuned tables.

    Raises:
        ValueError: the folder has no state.
    """
    if not (folder / "state.json").exists():
        raise ValueError(f"--resume: expected a folder with a state.json, got {folder}")
    session.work.mkdir(parents=True, exist_ok=True)
    shutil.copy2(folder / "state.json", session.work / "state.json")
    if (folder / "results.tar.gz").exists():
        with tarfile.open(folder / "results.tar.gz") as archive:
            archive.extractall(session.work, filter="data")


def name_commit(session: Session, given: str | None) -> None:
    """Tell the benchmark which commit this is.

    Raises:
        ValueError: neither git, nor `given`, nor an earlier call says.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    if shutil.which("git") and subprocess.run(git, capture_output=True).returncode == 0:
        return
    session.state["commit"] = given or session.state.get("commit")
    if not session.state["commit"]:
        raise ValueError("there is no git history here: name the commit with --commit")
    os.environ[COMMIT_VARIABLE] = session.state["commit"]


def benchmark_lines(path: Path) -> list[str]:
    """Ours beside the others, one line per case."""
    lines = []
    for run in json.loads(path.read_text())["runs"]:
        found = [f"{row['label']} {row['ratio']['median']:.3f}" for row in run["rows"] if "ratio" in row]
        bounds = [f"{row['label']} {100 * row['of_bound']:.0f} %" for row in run["rows"] if "of_bound" in row]
        values = [f"{row['label']} {row['values']}" for row in run["rows"] if "values" in row]
        wrong = [f"{row['label']}: {row['why'][:70]}" for row in run["rows"] if row.get("why")]
        settings = " ".join(f"{key} {run['case'][key]}" for key in ("dtype", "rank") if run["case"].get(key))
        lines.append(f"- {run['case']['name']} {settings}: " + "; ".join((bounds or found or values) + wrong))
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
        meaning = {"op": "share of the copy bound", "numerics": "values"}.get(path.stem, "time over the frozen layer's")
        parts += ["", f"## {path.stem}: {meaning}", "", *lines]
    counters = session.work / "results" / "counters.txt"
    if counters.exists():
        parts += ["", "## counters", "", *(f"    {line}" for line in counters.read_text().splitlines())]
    return "\n".join(parts) + "\n"


def pack(session: Session, planned: list[Stage], out: Path) -> str:
    """Everything that counts, as five files; the verdict."""
    out.mkdir(parents=True, exist_ok=True)
    text = verdict(session, planned)
    (out / "verdict.md").write_text(text)
    (out / "state.json").write_text(json.dumps(session.state, indent=1) + "\n")
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        for name in ("results", "logs", "tune"):
            if (session.work / name).exists():
                archive.add(session.work / name, arcname=name)
    for extra in (*(session.work / "tune").glob("table/*.json"), session.work / "counters.ncu-rep"):
        if extra.exists():
            shutil.copy2(extra, out / extra.name)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes back")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="an earlier call's --out")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="these alone, whatever they found before")
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
        parser.error(f"--stages: expected some of {', '.join(stage.name for stage in planned)}, got {sorted(unknown)}")
    try:
        if options.resume:
            resume(session, options.resume)
        if (session.work / "state.json").exists():
            session.state = json.loads((session.work / "state.json").read_text())
        name_commit(session, options.commit)
    except ValueError as error:
        parser.error(str(error))
    for table in (session.work / "tune").glob("table/*.json"):
        if not options.rehearse:
            shutil.copy2(table, TABLES / table.name)  # the tree that comes with a call has the old one
    chosen = [stage for stage in planned if options.stages is None or stage.name in options.stages]
    for stage in chosen:
        run_stage(session, stage, again=options.stages is not None)
        pack(session, planned, options.out)  # a call that is cut off has brought home what came before
    print(pack(session, planned, options.out)[-8000:])
    steps = session.state.get("steps", {})
    found = [steps.get(f"{stage.name}/{step.name}", {}).get("status") for stage in chosen for step in stage.steps]
    return 0 if all(status in ("passed", "advisory") for status in found) else 1


if __name__ == "__main__":
    sys.exit(main())
