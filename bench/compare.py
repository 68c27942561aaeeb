"""`--base REF`: the same measurement of two commits, this working tree and REF, a ratio of the two beside each method.

Both are built as users build them, into folders of their own, and measured by this tree's benchmark in turns: base,
head, base, head, each with half the measuring time. A REF from before the package had what this benchmark imports
is measured by its own. What is compared is the ratio to the floor, which does not care what the machine did meanwhile.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import record

TURNS = 2
_WITHOUT_EDITABLE = (
    "import runpy, sys;"
    "sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith('_editable')];"
    "import hra_kernels, os;"
    "assert hra_kernels.__file__.startswith(os.getcwd()), 'another hra_kernels is in the way: ' + hra_kernels.__file__;"
    "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
)
"""`python -m bench` with the hra_kernels of the current folder, also where one is installed in editable mode."""

MISSING = "ModuleNotFoundError: No module named 'hra_kernels."
"""What Python says where this tree's benchmark meets a package from before its modules."""


def _run(command: list[str], **options: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed with {done.returncode}:\n{done.stdout}{done.stderr}")


def _install(source: Path, target: Path, console: Console) -> None:
    """Build `source` and put its hra_kernels into `target`, beside a bench and tests that run there."""
    build = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    _run([*build, "-C", f"build-dir={target}-build", "--target", str(target), str(source)])
    _copy_benchmark(record.ROOT, target)
    try:
        _bench(target, ["--help"])
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
        console.print("this tree's benchmark does not run on the older package: its own measures it")
        _copy_benchmark(source, target)


def _copy_benchmark(source: Path, target: Path) -> None:
    for name in ("bench", "tests"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("results", "__pycache__"))


def _bench(folder: Path, arguments: list[str]) -> None:
    """`python -m bench` in `folder`, with the hra_kernels and the benchmark that stand there."""
    _run([sys.executable, "-c", _WITHOUT_EDITABLE, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": ""})


def _median_ratios(files: list[Path]) -> dict[tuple[str, str, str], float]:
    """{(case, provider, label): median of the turns' ratios}."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for path in files:
        for run in record.load(path)["runs"]:
            settings = [str(run["case"][key]) for key in ("dtype", "rank") if key in run["case"]]
            for row in run["rows"]:
                if "ratio" in row:
                    key = (" ".join([run["case"]["name"], *settings]), row.get("op", row["provider"]), row["label"])
                    found.setdefault(key, []).append(row["ratio"]["median"])
    return {key: statistics.median(values) for key, values in found.items()}


def compare(ref: str, level: str, arguments: list[str], seconds: float, console: Console) -> dict:
    """Measure REF and the working tree in turns, print and return {base, head, rows}.

    Args:
        arguments: the level's command line, without --base, --seconds and --out.

    Raises:
        RuntimeError: REF is unknown, does not build, or a measurement fails.
    """
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        tree = scratch / "tree"
        _run(["git", "-C", str(record.ROOT), "worktree", "add", "--detach", str(tree), ref])
        try:
            console.print(f"building {ref} and the working tree ...")
            _install(tree, scratch / "base", console)
            _install(record.ROOT, scratch / "head", console)
            commit = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True)
        finally:
            _run(["git", "-C", str(record.ROOT), "worktree", "remove", "--force", str(tree)])
        files: dict[str, list[Path]] = {"base": [], "head": []}
        for turn in range(TURNS):
            for side, paths in files.items():
                console.print(f"turn {turn + 1} of {TURNS}: {side}")
                out = scratch / f"{side}-{turn}"
                measuring = ["--seconds", str(seconds / TURNS), "--out", str(out), "--no-plots"]
                _bench(scratch / side, [level, *arguments, *measuring])
                paths.append(out / f"{level}.json")
        base, head = _median_ratios(files["base"]), _median_ratios(files["head"])
    rows = [
        {"case": key[0], "provider": key[1], "label": key[2], "base": base[key], "head": head[key]}
        for key in head
        if key in base
    ]
    table = Table(title=f"{level}: ratio to the floor, {ref} and the working tree", title_justify="left")
    for name in ("case", "method", ref, "working tree", "change"):
        table.add_column(name, justify="left" if name in ("case", "method") else "right", no_wrap=True)
    for row in rows:
        change = f"{100 * (row['head'] / row['base'] - 1):+.1f} %"
        table.add_row(row["case"], row["label"], f"{row['base']:.3f}", f"{row['head']:.3f}", change)
    console.print(table)
    return {"base": commit.stdout.strip(), "rows": rows}


def save(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
