"""Runs of `hra-kernels train`, some seeds of each job, for the page of results: `python -m bench.applications DIR...`

Every DIR is what a run left in its --out. Their metrics go to `applications.json` in this machine's folder of
`bench/results/`, a run of the same job and seed replaced; the page and two pictures of seed 0 go beside it as
`train-JOB.md` and `train-JOB-*`. Then `python -m bench report` puts both on the page.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import record

LEVEL = "applications"
PAGES_SEED = 0


def entry(results: dict) -> dict:
    """One of the file's `runs`, from a run's results.json; `record` says what it holds."""
    arguments, where = results["arguments"], results["environment"]
    commit = where["commit"] or ""
    return {
        "case": {"name": results["job"], "seed": arguments["seed"]},
        "meta": {
            "commit": commit.removesuffix("-dirty") or None,
            "dirty": commit.endswith("-dirty"),
            "versions": {name: where[name] for name in ("torch", "peft")},
            "cpu": {"name": where["cpu"], "threads": where["torch_threads"]},
            "gpu": {"name": where["gpus"][0]} if where["gpus"] else None,
        },
        "steps": results["steps"],
        "seconds": None if arguments.get("resume") else results["seconds"],  # those of the last part alone
        "compared": not arguments["no_compare"],
        "rows": [{"provider": name, "label": name, "values": values} for name, values in results["test"].items()],
    }


def _keep_page(run: Path, folder: Path, job: str) -> None:
    pictures = ["cost.svg", "before-after.png" if (run / "before-after.png").exists() else "loss.svg"]
    shutil.copy(run / "summary.md", folder / f"train-{job}.md")
    for name in pictures:
        shutil.copy(run / name, folder / f"train-{job}-{name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.applications", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="what a run left in its --out")
    parser.add_argument("--out", type=Path, help="folder to write to (default: this machine's in bench/results/)")
    options = parser.parse_args(arguments)
    folder = options.out or record.RESULTS / record.folder_name(torch.device("cpu"))
    for run in options.runs:
        results = json.loads((run / "results.json").read_text())
        record.save(folder / f"{LEVEL}.json", LEVEL, [entry(results)])
        if results["arguments"]["seed"] == PAGES_SEED:
            _keep_page(run, folder, results["job"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
