"""What result files say, as pages: `bench/results/README.md`, and the block of the repository's README.

Every section names the machine, versions and commit of its numbers, and says where other methods do better.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from bench import numerics, record
from bench.screen import number_text
from hra_kernels.measuring.text import bytes_text, markdown_table, seconds_text, significant

OURS, FLOOR = "ours", "frozen"
BEGIN, END = "<!-- bench:results -->", "<!-- /bench:results -->"
REFERENCES, COMPILED = ("reference", "compiled reference"), ("cpu", "triton", "cuda")
"""Backends in plain PyTorch, and those of kernels."""
TOLD = {
    "nlu": ("accuracy",),
    "math": ("answer loss",),
    "subject": ("crossed sevens drawn", "other digits kept"),
    "control": ("edge F1", "edge IoU"),
}
"""What each job's training is to change, or to leave; the rest is on the job's own page."""
README_METHODS = ("ours", "lora", "oft", "peft-hra")


def source(meta: dict) -> str:
    """Where numbers come from, in one line."""
    threads = meta["cpu"]["threads"]
    machine = meta["gpu"]["name"] if meta["gpu"] else f"{meta['cpu']['name']}, {threads} thread{'s'[: threads > 1]}"
    commit = (meta["commit"] or "unknown")[:9] + (" with changes" if meta["dirty"] else "")
    return f"{machine} · torch {meta['versions']['torch']} · PEFT {meta['versions']['peft']} · commit {commit}"


def provenance(runs: list[dict]) -> str:
    """One line: where these runs were taken, and how many of their rounds were disturbed."""
    sources = dict.fromkeys(source(run["meta"]) for run in runs)
    disturbed = sum(run.get("rounds", {}).get("disturbed", 0) for run in runs)
    rounds = sum(run.get("rounds", {}).get("rounds", 0) for run in runs)
    busy = f" Other processes disturbed {disturbed:,} of {rounds:,} rounds." if disturbed else ""
    return f"*{'; '.join(sources)}.{busy}*"


# --- ratios -----------------------------------------------------------------------------------------------------------


def _median(row: dict) -> float:
    return row["ratio"]["median"] if "ratio" in row else math.inf


def _over(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else significant(ratio)


def _by_provider(run: dict) -> dict[str, dict]:
    return {row["provider"]: row for row in run["rows"]}


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    return _over(_median(row)) if "ratio" in row else (row["why"] or "").split(":")[0]


def _ratio_table(runs: list[dict], more: Callable[[list[dict]], list[str]], header: list[str]) -> str:
    """Methods and cases, the ratio to the floor in the cells; `more(rows)` adds to each method what `header` names.

    The longer of the two goes down the page.
    """
    labels = {row["provider"]: row["label"] for run in runs for row in run["rows"]}
    by_run = [_by_provider(run) for run in runs]

    def middle(provider: str) -> float:
        ratios = [_median(rows[provider]) for rows in by_run if "ratio" in rows.get(provider, {})]
        return statistics.median(ratios) if ratios else math.inf

    table = [["", *(run["case"]["name"] for run in runs), "median", *header]]
    for provider in sorted(labels, key=middle):
        rows = [rows.get(provider) for rows in by_run]
        label = f"**{labels[provider]}**" if provider == OURS else labels[provider]
        center = _over(middle(provider)) if middle(provider) < math.inf else ""
        table.append([label, *map(_ratio, rows), center, *more([row for row in rows if row])])
    if len(runs) > len(labels):
        table = [list(column) for column in zip(*table, strict=True)]
    return markdown_table(table[0], table[1:])


def _better(rows: dict[str, dict], value: Callable[[dict], float | None], text: Callable[[float], str]) -> list[str]:
    """Methods whose printed value is smaller than ours; the floor and our own module do not count."""
    ours = value(rows[OURS]) if OURS in rows else None
    others = {name: value(row) for name, row in rows.items() if name not in (FLOOR, OURS, "ours-nn")}
    found = [
        f"{rows[name]['label']} {text(other)}"
        for name, other in others.items()
        if ours is not None and other is not None and other < ours and text(other) != text(ours)
    ]
    return [f"{', '.join(found)} against our {text(ours)}"] if found else []


def losses(
    what: str, runs: list[dict], value: Callable[[dict], float | None], text: Callable[[float], str] = _over
) -> str:
    """In which cases other methods do better than ours, `what` naming the comparison."""
    lost = [f"{run['case']['name']}: {found}" for run in runs for found in _better(_by_provider(run), value, text)]
    return f"**{what}**: {'; '.join(lost) or 'no method in any case'}."


def time_losses(runs: list[dict]) -> str:
    return losses("Faster than ours", runs, lambda row: row["ratio"]["median"] if "ratio" in row else None)


# --- sections ---------------------------------------------------------------------------------------------------------


def _layer_section(runs: list[dict]) -> str:
    def more(rows: list[dict]) -> list[str]:
        saved = [row["saved_beyond_x_bytes"] for row in rows if "saved_beyond_x_bytes" in row]
        worst = [max(row["error"].values()) for row in rows if row.get("error")]
        return [bytes_text(max(saved)) if saved else "", f"{max(worst):.0e}" if worst else ""]

    def less_kept(group: list[dict]) -> str:
        return losses("Less memory kept than ours", group, lambda row: row.get("saved_beyond_x_bytes"), bytes_text)

    groups: dict[tuple[str, int], list[dict]] = {}
    for run in runs:
        groups.setdefault((run["case"]["dtype"], run["case"]["rank"]), []).append(run)
    tables = []
    for (dtype, rank), group in groups.items():
        table = _ratio_table(group, more, ["kept", "error"])
        tables.append("\n\n".join([f"{dtype}, R = {rank}:", table, time_losses(group), less_kept(group)]))
    return (
        "Forward and backward over the frozen layer alone. Shapes are rows x in x out; an empty cell was not measured. "
        "*kept* is the memory kept for backward beyond x, the most of all shapes; *error* is the worst relative error "
        "against float64.\n\n" + "\n\n".join(tables)
    )


def _model_section(runs: list[dict]) -> str:
    def rate_and_peak(row: dict | None) -> str:
        if row is None or "ratio" not in row:
            return ""
        return f"{significant(row['per_second'])} {row['unit']}/s, {bytes_text(row['peak_bytes'])}"

    labels = {row["provider"]: row["label"] for run in runs for row in run["rows"]}
    by_run = [_by_provider(run) for run in runs]
    cells = [[label, *(rate_and_peak(rows.get(name)) for rows in by_run)] for name, label in labels.items()]
    return (
        "The time of a step over the frozen model's:\n\n"
        + _ratio_table(runs, lambda rows: [], [])
        + f"\n\n{time_losses(runs)}"
        + "\n\nIts rate, and the most memory it holds beyond the model's own:\n\n"
        + markdown_table(["", *(run["case"]["name"] for run in runs)], cells)
    )


def _op_section(runs: list[dict]) -> str:
    operators = ["reflect_fwd", "reflect_dx", "reflect_bwd"]
    shapes = list(dict.fromkeys(run["case"]["name"] for run in runs))
    found: dict[tuple, dict[str, dict[str, float]]] = {}
    for run in runs:
        for row in run["rows"]:
            if "of_bound" in row:
                setting = (row["provider"], run["case"]["dtype"], str(run["case"]["rank"]))
                found.setdefault(setting, {}).setdefault(run["case"]["name"], {})[row["op"]] = row["of_bound"]

    def cell(shares: dict[str, float]) -> str:
        if not shares:
            return ""
        return " / ".join(f"{100 * shares[name]:.0f}" if name in shares else "-" for name in operators)

    lines = [[*setting, *(cell(by_shape.get(name, {})) for name in shapes)] for setting, by_shape in found.items()]
    lost = [
        f"{provider} at {name}, {dtype}, R = {rank}, {operator}"
        for (provider, dtype, rank), by_shape in found.items()
        if provider in REFERENCES
        for name, shares in by_shape.items()
        for operator, share in shares.items()
        if any(
            share > found[other, dtype, rank].get(name, {}).get(operator, math.inf)
            for other in COMPILED
            if (other, dtype, rank) in found
        )
    ]
    return (
        "Share of the copy bound, per cent: forward / dx only / backward. The first two numbers of a shape are rows x "
        "features.\n\n"
        + markdown_table(["backend", "dtype", "R", *shapes], lines)
        + f"\n\n**Faster than a compiled backend**: {'; '.join(lost) or 'no plain PyTorch in any case'}."
    )


def _scaling_section(runs: list[dict]) -> str:
    return f"Forward and backward over the frozen layer alone, one size varied at a time.\n\n{time_losses(runs)}"


def _numerics_section(runs: list[dict]) -> str:
    parts = []
    for run in runs:
        rows = [row for row in run["rows"] if row.get("values")]
        keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
        cells = [
            [row["label"], *(number_text(row["values"][key]) if key in row["values"] else "-" for key in keys)]
            for row in rows
        ]
        by_provider = {row["provider"]: row for row in rows}
        lost = [
            f"{key}: {found}"
            for key in keys
            for found in _better(by_provider, lambda row, key=key: row["values"].get(key), number_text)
        ]
        name = run["case"]["name"]
        lost = f"**Smaller than ours**: {'; '.join(lost) or 'no method in any case'}."
        parts.append(f"{numerics.MEANING.get(name, name)}\n\n{markdown_table(['', *keys], cells)}\n\n{lost}")
    return "\n\n".join(parts)


def _host_section(runs: list[dict]) -> str:
    labels = {row["provider"]: row["label"] for run in runs for row in run["rows"]}

    def cell(row: dict | None) -> str:
        if row is None or "beyond" not in row:
            return ""
        ratio = f" ({row['over_lora']['median']:.2f})" if "over_lora" in row else ""
        return seconds_text(row["beyond"]["median"]) + ratio

    cells = [[label, *(cell(_by_provider(run).get(name)) for run in runs)] for name, label in labels.items()]
    return (
        "Time of the host for one adapted layer beyond the frozen one, and its ratio to PEFT's LoRA:\n\n"
        + markdown_table(["", *(run["case"]["name"] for run in runs)], cells)
    )


def _gains(job: str, metric: str, runs: list[dict]) -> list[str]:
    """A row: the metric before and after in every run, the mean gain with its deviation, and LoRA's of the same."""
    found = [{row["label"]: row["values"].get(metric) for row in run["rows"]} for run in runs]
    before, after = ([row[name] for row in found] for name in ("before: pretrained", "after"))
    gains = [one - other for one, other in zip(after, before, strict=True)]
    spread = f" ± {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
    alike = [row["LoRA, PEFT, trained alike"] for row in found if "LoRA, PEFT, trained alike" in row]
    cells = [f"{run['case']['seed']}: {b:.3f}, {a:.3f}" for run, b, a in zip(runs, before, after, strict=True)]
    lora = ", ".join(f"{value:.3f}" for value in alike)
    return [f"`{job}`: {metric}", "; ".join(cells), f"{statistics.mean(gains):+.3f}{spread}", lora]


def _applications_section(runs: list[dict]) -> str:
    rows, times = [], []
    for job, metrics in TOLD.items():
        same = sorted((run for run in runs if run["case"]["name"] == job), key=lambda run: run["case"]["seed"])
        if same:
            rows += [_gains(job, metric, same) for metric in metrics]
            whole = [run for run in same if run["seconds"]]
            minutes = (f"{run['seconds'] / 60:.1f}" + " with the comparison" * run["compared"] for run in whole)
            times += [f"`{job}` {', '.join(minutes)}"] if whole else []
    header = ["the test split", "seed: before, after", "gain, mean ± deviation over seeds", "LoRA alike, after"]
    return (
        "`hra-kernels train JOB --seed SEED` with its defaults: small models and data that packages carry, so not the "
        "paper's numbers.\n\n"
        + markdown_table(header, rows)
        + f"\n\nMinutes of a run beside other work, the first image job's with its generator: {'; '.join(times)}."
    )


SECTIONS: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "layer": ("One adapted layer", _layer_section),
    "op": ("The operators", _op_section),
    "model": ("A whole training step", _model_section),
    "scaling": ("Scaling", _scaling_section),
    "numerics": ("Numerics", _numerics_section),
    "host": ("Time of the host", _host_section),
    "applications": ("The paper's four applications, at toy size", _applications_section),
}


def _plots(folder: Path, stem: str, root: Path) -> list[str]:
    plots = sorted(path for path in folder.glob(f"{stem}*") if path.suffix in (".svg", ".png"))
    return [f"![{plot.stem}]({plot.relative_to(root)})" for plot in plots]


def _machines(results: Path) -> list[tuple[Path, dict[str, list[dict]]]]:
    """(folder, {level: runs}) of every machine that has results."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        files = {path.stem: record.load(path)["runs"] for path in sorted(folder.glob("*.json"))}
        if files:
            found.append((folder, {level: files[level] for level in SECTIONS if level in files}))
    return found


def results_page(results: Path) -> str:
    """The page of all results: for every machine one section per level, and the summaries of training jobs."""
    parts = ["# Results", "Written by `python -m bench report` from the JSON files beside it; what a case and a column "
             "are is said in `bench/`."]  # fmt: skip
    for folder, levels in _machines(results):
        parts.append(f"## {folder.name}")
        for level, runs in levels.items():
            title, section = SECTIONS[level]
            parts += [f"### {title}", provenance(runs), section(runs), *_plots(folder, level, results)]
        for page in sorted(folder.glob("*.md")):  # the summary that a training job writes
            parts += [f"### `hra-kernels {page.stem.replace('-', ' ')}`", page.read_text().strip()]
            parts += _plots(folder, page.stem, results)
    return "\n\n".join(parts) + "\n"


def readme_block(results: Path, root: Path) -> str:
    """README's share: the figure of one adapted layer and a small table, of the machine that was measured last.

    Args:
        root: the folder of README, which links are relative to.
    """
    measured = []
    for folder, levels in _machines(results):
        runs = [run for run in levels.get("layer", []) if "ratio" in _by_provider(run).get(OURS, {})]
        if runs:
            measured.append((max(run["meta"]["date"] for run in runs), folder, runs))
    parts = []
    for _, folder, runs in sorted(measured)[-1:]:
        rows = []
        for name in README_METHODS:
            found = [_by_provider(run)[name] for run in runs if "ratio" in _by_provider(run).get(name, {})]
            if found:
                ratios = sorted(map(_median, found))
                spread = f"{_over(statistics.median(ratios))} ({_over(ratios[0])} to {_over(ratios[-1])})"
                cells = [found[0]["label"], spread, bytes_text(max(row["saved_beyond_x_bytes"] for row in found))]
                rows.append([f"**{cell}**" for cell in cells] if name == OURS else cells)
        header = ["one adapted layer, forward and backward", "time over the frozen layer", "memory kept for backward"]
        parts += [*_plots(folder, "layer-cost", root), markdown_table(header, rows), provenance(runs)]
    path = (results / "README.md").relative_to(root)
    return "\n\n".join([*parts, f"All results, and where other methods do better: [{path}]({path})."])


def fill(text: str, content: str) -> str:
    """`text` with what stands between README's two markers replaced.

    Raises:
        ValueError: the text has no such pair of markers.
    """
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"README: expected the markers {BEGIN} and {END}, found {'one' if found else 'none'} of them")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"
