"""Result files: what they hold, and what they say about the machine and the code.

One JSON file per level in a folder per machine, `bench/results/<device>/<level>.json`:

    schema  1
    level   "op", "layer", "model", "numerics", "scaling" or "host"
    runs    a list, one entry per case; a case measured again replaces its entry
      case  its name, sizes, dtype, rank, ... (what identifies it)
      meta  commit, dirty, date, versions, device, threads, settings: see `describe`
      rounds  how many; how many were repeated because other processes ran, and how many were disturbed all the same
      rows  one per provider
        provider, label    key and printed name
        why                null, or why there is no time: not available here, or wrong
        error              {tensor: relative Frobenius error against float64}
        seconds, ratio     {median, p20, p80, rounds}; ratio is to the case's floor, round by round
        values             {name: number} of an untimed level; null is NaN
        anything else      the level's own columns (saved_bytes, peak_bytes, of_bound, per_second, ...)

A run's rows were measured in one process in interleaved rounds, so they may be compared with one another. Seconds of
two runs may not, ratios may with care.
"""

import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import COMMIT_VARIABLE
from hra_kernels import env, ops
from hra_kernels.measuring.stopwatch import Rounds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCHEMA = 1
Progress = Callable[[str, float], None]
"""Told what is going on, and which fraction is done."""
_PACKAGES = ("torch", "triton", "peft", "transformers", "diffusers", "torch-householder")


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return found
    if answer.returncode == 0:
        found |= dict(zip(query.split(","), [field.strip() for field in answer.stdout.split(",")], strict=False))
    return found


def backend_report() -> dict[str, str | None]:
    """`ops.backend_report()` without the names of this machine's files, which import errors mention."""
    return {name: reason and re.sub(r"\s*\(/[^)]*\)", "", reason) for name, reason in ops.backend_report().items()}


def describe(device: torch.device, settings: dict) -> dict:
    """The `meta` of a run: code, versions, machine, settings."""
    # results that are about to be committed are no reason to call the code they measure dirty
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md")
    return {
        "commit": _git("rev-parse", "HEAD") or os.environ.get(COMMIT_VARIABLE),
        "dirty": bool(changed) if changed is not None else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: env.version(name) for name in _PACKAGES},
        "device": device.type,
        "cpu": {
            "name": env.cpu_name(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpu": _gpu() if device.type == "cuda" else None,
        "backends": backend_report(),
        "settings": settings,
    }


@dataclass(frozen=True)
class Planned:
    """A case that a level is asked for: what identifies it in a result file, and how it is measured."""

    case: dict
    measure: Callable[[Progress], dict]
    """The case's `entry`."""


def entry(
    case: dict, device: torch.device, seconds: float | None, rows: list[dict], rounds: Rounds | None = None
) -> dict:
    """One entry of a file's `runs`."""
    run = {"case": case, "meta": describe(device, {"seconds": seconds}), "rows": rows}
    if rounds:
        run["rounds"] = {name: getattr(rounds, name) for name in ("rounds", "repeated", "disturbed")}
    return run


def folder_name(device: torch.device) -> str:
    """A folder name for this machine: cpu-<isa>-<threads>t or the GPU's name."""
    if device.type == "cuda":
        return "-".join(torch.cuda.get_device_name(device).lower().split())
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}-{torch.get_num_threads()}t"


def load(path: Path) -> dict:
    """A result file's content.

    Raises:
        ValueError: the file has another schema.
    """
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')!r}")
    return content


def _finite(value: object) -> object:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_measured(planned: list[Planned], path: Path) -> list[Planned]:
    """`planned` without the cases that the file at `path`, if there is one, already has."""
    known = [run["case"] for run in load(path)["runs"]] if path.exists() else []
    return [one for one in planned if json.loads(json.dumps(one.case)) not in known]


def save(path: Path, level: str, runs: Sequence[dict]) -> dict:
    """Write `runs` into the file, replacing the entries of the same cases, and return its whole content."""
    kept = load(path)["runs"] if path.exists() else []
    fresh = [run["case"] for run in runs]
    kept = [run for run in kept if run["case"] not in fresh]
    content = {"schema": SCHEMA, "level": level, "runs": [*kept, *_finite(runs)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content
