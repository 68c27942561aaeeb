"""One command for everything that needs a GPU: build, test, sanitize, tune, benchmark, profile, verdict.

    python -m bench.gpu.run --out FOLDER                        every stage that has not passed yet
    python -m bench.gpu.run --out FOLDER --stages build test    these
    python -m bench.gpu.run --out FOLDER --rehearse             the same on a CPU, in little

Made for a bare machine (CUDA image with torch, triton, nvcc, cmake, ninja, pybind11, scikit-build-core, peft, pytest,
hypothesis, transformers; no network) that is lent for minutes: a call ends within --seconds, what it did is kept under
build/gpu, and the next call goes on from there. Only the standard library is needed to start. The machine's settings
are read, never changed. What it lacks (diffusers, for the UNet) may lie unpacked in a folder on PYTHONPATH. Where the
tree comes without its history, --commit names what it is.

FOLDER gets verdict.md, state.json, results.tar.gz (JSON, plots, logs), tuning.py, counters.ncu-rep and three plots.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import COMMIT_VARIABLE
from bench.gpu.session import ROOT, OutOfTime, Session, StageFailed
from bench.gpu.stages import STAGES, WAVES, restore_tables
from bench.gpu.verdict import pack


def run_stage(session: Session, name: str, again: bool) -> None:
    """Run one stage and note how it went."""
    entry = session.state.setdefault(name, {})
    if again:
        entry.clear()
    before = entry.get("seconds", 0.0)
    start = time.monotonic()
    print(f"=== {name} ({session.left():.0f} s left)", flush=True)
    try:
        entry["summary"] = STAGES[name](session)
        entry["status"] = "passed"
    except OutOfTime as error:
        entry["status"], entry["summary"] = "unfinished", str(error)
    except StageFailed as error:
        entry["status"], entry["summary"] = "failed", str(error)
    except Exception as error:  # a fault of the stage itself: the others may still be worth their time
        entry["status"], entry["summary"] = "failed", f"{type(error).__name__}: {error}"
    entry["seconds"] = before + time.monotonic() - start
    print(f"    {name}: {entry['status']}: {entry['summary'][:400]}", flush=True)


def name_commit(given: str | None) -> None:
    """Tell the benchmark which commit this is.

    Raises:
        ValueError: neither git nor `given` says.
    """
    known = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode == 0
    if not known and not given:
        raise ValueError("there is no git history here: name the commit with --commit")
    if not known:
        os.environ[COMMIT_VARIABLE] = given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes back")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="default: all that have not passed")
    parser.add_argument("--seconds", type=float, default=570, help="end within this time (default 570)")
    parser.add_argument("--again", action="store_true", help="forget what these stages found before")
    parser.add_argument("--commit", help="what this tree is, where there is no git history")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    options = parser.parse_args()
    session = Session(options.rehearse, time.monotonic() + options.seconds)
    state_path = session.work / "state.json"
    if state_path.exists():
        session.state = json.loads(state_path.read_text())
    if session.state.setdefault("rehearse", options.rehearse) != options.rehearse:
        kept = "a rehearsal" if session.state["rehearse"] else "a real run"
        parser.error(f"{session.work} holds {kept}; remove it first")
    try:
        name_commit(options.commit)
    except ValueError as error:
        parser.error(str(error))
    restore_tables(session)
    asked = options.stages or list(STAGES)

    def due(name: str) -> bool:
        passed = session.state.get(name, {}).get("status") == "passed"
        return name in asked and (options.stages is not None or options.again or not passed)

    for wave in WAVES:
        names = [name for name in wave if due(name)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: run_stage(session, name, options.again), names))
        session.work.mkdir(parents=True, exist_ok=True)
        state_path.write_text(json.dumps(session.state) + "\n")
        if "build" in names and session.state["build"]["status"] != "passed":
            break  # nothing after it would mean anything
    pack(session, options.out)
    return 1 if any(session.state.get(name, {}).get("status") != "passed" for name in asked) else 0


if __name__ == "__main__":
    sys.exit(main())
