"""What comes back from a call: a verdict to read, the state, and everything else in an archive."""

import json
import shutil
import tarfile
from pathlib import Path

from bench.gpu.session import Session
from bench.gpu.stages import STAGES

PLOTS = ("layer-cost.png", "layer-memory.png", "op-roofline.png")
LEVELS = ("op", "layer", "model", "numerics", "scaling")


def best_of(session: Session, level: str) -> list[str]:
    """Ours beside the others, a case a line."""
    path = session.results / f"{level}.json"
    if not path.exists():
        return []
    lines = []
    for run in json.loads(path.read_text())["runs"]:
        found = [f"{row['label']} {row['ratio']['median']:.3f}" for row in run["rows"] if "ratio" in row]
        wrong = [f"{row['label']}: {row['why'][:70]}" for row in run["rows"] if row.get("why")]
        bounds = [f"{row['label']} {100 * row['of_bound']:.0f} %" for row in run["rows"] if "of_bound" in row]
        values = [f"{row['label']} {row['values']}" for row in run["rows"] if "values" in row]
        settings = " ".join(f"{key} {run['case'][key]}" for key in ("dtype", "rank") if run["case"].get(key))
        lines.append(f"- {run['case']['name']} {settings}: " + "; ".join((bounds or found or values) + wrong))
    return lines


def verdict(session: Session) -> str:
    parts = [
        "# Rehearsal on a CPU: no number here says anything" if session.rehearse else "# Verdict of the GPU run",
        "",
    ]
    for name in STAGES:
        entry = session.state.get(name, {})
        seconds = f" ({entry['seconds']:.0f} s)" if "seconds" in entry else ""
        parts.append(f"- **{name}**: {entry.get('status', 'not run')}{seconds}. {entry.get('summary', '')}")
    for level in LEVELS:
        lines = best_of(session, level)
        if lines:
            meaning = {"op": "share of the copy bound", "numerics": "values"}.get(level, "time over the frozen layer's")
            parts += ["", f"## {level}: {meaning}", "", *lines]
    counters = session.results / "counters.txt"
    if counters.exists():
        parts += ["", "## profile", "", *(f"    {line}" for line in counters.read_text().splitlines())]
    return "\n".join(parts) + "\n"


def pack(session: Session, out: Path) -> None:
    """At most eight files, as few machines return more."""
    out.mkdir(parents=True, exist_ok=True)
    text = verdict(session)
    (out / "verdict.md").write_text(text)
    (out / "state.json").write_text(json.dumps(session.state, indent=1) + "\n")
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        for folder in (session.results, session.logs, session.work / "tune"):
            if folder.exists():
                archive.add(folder, arcname=folder.name)
    for extra in (session.work / "tuning.py", session.work / "counters.ncu-rep"):
        if extra.exists():
            shutil.copy2(extra, out / extra.name)
    for name in PLOTS:
        if (session.results / name).exists():
            shutil.copy2(session.results / name, out / name)
    print(text[-8000:])
