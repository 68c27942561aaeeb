"""Tables from result files: on screen, and as the marked blocks of README.md."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import record


def seconds_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def bytes_text(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def number_text(value: float | None) -> str:
    """A small number; None stands for NaN or infinity, which JSON does not have."""
    if value is None or not math.isfinite(value):
        return "NaN"
    return "0" if value == 0 else f"{value:.1e}"


def error_text(error: dict | None) -> str:
    return f"{max(error.values()):.0e}" if error else ""


def spread_text(value: dict, text) -> str:
    return f"{text(value['median'])} ({text(value['p20'])} to {text(value['p80'])})"


def _cells(row: dict, timed: bool) -> dict[str, str]:
    """A row's columns as text; a row without a time says why in its place."""
    cells = {"method": row["label"]} | ({"error": error_text(row.get("error"))} if timed else {})
    if row.get("why"):
        return cells | {"time" if timed else "values": row["why"][:60]}
    if "seconds" in row:
        cells["time"] = spread_text(row["seconds"], seconds_text)
    if "ratio" in row:
        cells["over floor"] = spread_text(row["ratio"], lambda x: f"{x:.3f}" if x < 10 else f"{x:.1f}")
    if "of_bound" in row:
        cells["of copy bound"] = f"{100 * row['of_bound']:.0f} %"
    if "host_seconds" in row:
        cells["with host"] = seconds_text(row["host_seconds"])
    if "per_second" in row:
        cells["rate"] = f"{row['per_second']:.4g} {row['unit']}/s"
    for key, name in (("saved_beyond_x_bytes", "saved beyond x"), ("peak_bytes", "peak")):
        if key in row:
            cells[name] = bytes_text(row[key])
    if "seconds" in row:
        cells["rounds"] = str(row["seconds"]["rounds"])
    return cells | {key: number_text(value) for key, value in row.get("values", {}).items()}


def show(runs: list[dict], console: Console) -> None:
    """Print one aligned table a run."""
    for run in runs:
        timed = not any("values" in row for row in run["rows"])
        rows = [_cells(row, timed) for row in run["rows"]]
        names = list(dict.fromkeys(name for row in rows for name in row))
        case = run["case"]
        settings = [f"{key} {case[key]}" for key in ("dtype", "rank") if key in case]
        disturbed = run.get("rounds", {}).get("disturbed", 0)
        if disturbed:
            settings.append(f"DISTURBED by other processes in {disturbed} of {run['rounds']['rounds']} rounds")
        table = Table(title=", ".join([case["name"], *settings]), title_justify="left")
        for name in names:
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row.get(name, "") for name in names))
        console.print(table)


# --- README ---------------------------------------------------------------------------------------------------------


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    if "ratio" not in row:
        return (row["why"] or "").split(":")[0]
    median = row["ratio"]["median"]
    return f"{median:.2f}" if median < 10 else f"{median:.1f}"


def _ratio_table(runs: list[dict], more: Callable[[list[dict]], list[str]], header: list[str]) -> str:
    """Methods and cases, the ratio to the floor in the cells; `more(rows)` adds to each method what `header` names.

    The longer of the two goes down the page.
    """
    labels = {row["provider"]: row["label"] for run in runs for row in run["rows"]}
    by_run = [{row["provider"]: row for row in run["rows"]} for run in runs]

    def weight(provider: str) -> float:
        ratios = [rows[provider]["ratio"]["median"] for rows in by_run if "ratio" in rows.get(provider, {})]
        return statistics.median(ratios) if ratios else math.inf

    table = [["", *(run["case"]["name"] for run in runs), "median", *header]]
    for provider in sorted(labels, key=weight):
        rows = [rows.get(provider) for rows in by_run]
        middle = f"{weight(provider):.2f}" if weight(provider) < math.inf else ""
        label = f"**{labels[provider]}**" if provider == "ours" else labels[provider]
        table.append([label, *map(_ratio, rows), middle, *more([row for row in rows if row])])
    if len(runs) > len(labels):
        table = [list(column) for column in zip(*table, strict=True)]
    return _markdown(table[0], table[1:])


def _groups(runs: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """`runs` by dtype and rank."""
    found: dict[tuple[str, int], list[dict]] = {}
    for run in runs:
        found.setdefault((run["case"]["dtype"], run["case"]["rank"]), []).append(run)
    return found


def _layer_block(runs: list[dict]) -> str:
    def more(rows: list[dict]) -> list[str]:
        saved = [row["saved_beyond_x_bytes"] for row in rows if "saved_beyond_x_bytes" in row]
        worst = [max(row["error"].values()) for row in rows if row.get("error")]
        return [bytes_text(max(saved)) if saved else "", f"{max(worst):.0e}" if worst else ""]

    tables = [
        f"{dtype}, R = {rank}:\n\n{_ratio_table(group, more, ['kept', 'error'])}"
        for (dtype, rank), group in _groups(runs).items()
    ]
    return (
        "One adapted layer, forward and backward over the frozen layer alone (shapes are rows x in x out; an empty "
        "cell was not measured; memory kept for backward beyond x, the most of all shapes; the worst relative error "
        "against float64).\n\n" + "\n\n".join(tables)
    )


def _model_block(runs: list[dict]) -> str:
    def rate_and_peak(row: dict | None) -> str:
        return (
            f"{row['per_second']:.3g} {row['unit']}/s, {bytes_text(row['peak_bytes'])}"
            if row and "ratio" in row
            else ""
        )

    labels = {row["provider"]: row["label"] for run in runs for row in run["rows"]}
    cells = [
        [label, *(rate_and_peak(next((r for r in run["rows"] if r["provider"] == name), None)) for run in runs)]
        for name, label in labels.items()
    ]
    return (
        "A whole training step over the frozen model's:\n\n"
        + _ratio_table(runs, lambda rows: [], [])
        + "\n\nIts rate, and the most memory it holds beyond the model's own:\n\n"
        + _markdown(["", *(run["case"]["name"] for run in runs)], cells)
    )


def _op_block(runs: list[dict]) -> str:
    """Share of the copy bound by backend and shape."""
    operators = ["reflect_fwd", "reflect_dx", "reflect_bwd"]
    shapes = list(dict.fromkeys(run["case"]["name"] for run in runs))
    found: dict[tuple, dict[str, dict[str, float]]] = {}
    for run in runs:
        for row in run["rows"]:
            if "of_bound" in row:
                setting = (row["provider"], run["case"]["dtype"], str(run["case"]["rank"]))
                found.setdefault(setting, {}).setdefault(run["case"]["name"], {})[row["op"]] = row["of_bound"]

    def cell(shares: dict[str, float]) -> str:
        return (
            " / ".join(f"{100 * shares[name]:.0f}" if name in shares else "-" for name in operators) if shares else ""
        )

    lines = [[*setting, *(cell(by_shape.get(name, {})) for name in shapes)] for setting, by_shape in found.items()]
    return (
        "The operators' share of the copy bound, per cent: forward / dx only / backward (rows x features are the "
        "first two numbers of a shape):\n\n" + _markdown(["backend", "dtype", "R", *shapes], lines)
    )


def _numerics_block(runs: list[dict]) -> str:
    lines = []
    providers = {row["provider"]: row["label"] for run in runs for row in run["rows"]}
    for run in runs:
        values = {row["provider"]: row.get("values", {}) for row in run["rows"]}
        for key in dict.fromkeys(key for found in values.values() for key in found):
            cells = [number_text(values[name][key]) if key in values.get(name, {}) else "-" for name in providers]
            lines.append([f"{run['case']['name']}, {key}", *cells])
    return "Numerics (what each quantity is: `bench/numerics.py`):\n\n" + _markdown(["", *providers.values()], lines)


BLOCKS = {"layer": _layer_block, "model": _model_block, "op": _op_block, "numerics": _numerics_block}


def _plots(folder: Path, level: str) -> list[str]:
    root = folder.parent.parent.parent
    return [f"![{plot.stem}]({plot.relative_to(root)})" for plot in sorted(folder.glob(f"{level}*.svg"))]


def results_section(results: Path, source: Callable[[dict], str]) -> str:
    """README's results: for every machine its tables and plots."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        files = {path.stem: record.load(path)["runs"] for path in sorted(folder.glob("*.json"))}
        if not files:
            continue
        sources = dict.fromkeys(source(run["meta"]) for runs in files.values() for run in runs)
        busy = [
            f"{run['case']['name']} ({level}): {run['rounds']['disturbed']} of {run['rounds']['rounds']}"
            for level, runs in files.items()
            for run in runs
            if run.get("rounds", {}).get("disturbed")
        ]
        busy = f" Rounds that other processes disturbed: {'; '.join(busy)}." if busy else ""
        parts.append(f"### {folder.name}\n\nMeasured on {'; '.join(sources)}.{busy}")
        for page in sorted(folder.glob("*.md")):  # the summary that a training job writes
            parts.append(f"`hra-kernels {page.stem.replace('-', ' ')}`: {page.read_text().strip()}")
            parts += _plots(folder, page.stem)
        for level in ("layer", "op", "model", "scaling", "numerics"):
            if level in files and level in BLOCKS:
                parts.append(BLOCKS[level](files[level]))
            parts += _plots(folder, level)
    return "\n\n".join(parts) or "No results yet."


def fill(text: str, content: str) -> str:
    """`text` with what stands between README's two markers replaced.

    Raises:
        ValueError: the text has no such pair of markers.
    """
    begin, end = "<!-- bench:results -->", "<!-- /bench:results -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README: expected the markers {begin} and {end}, found {'one' if found else 'none'} of them")
    return f"{before}{begin}\n{content}\n{end}{after}"
