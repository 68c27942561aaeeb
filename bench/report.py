"""Tables from result files: on screen, and as the marked blocks of README.md."""

import re

from rich.console import Console
from rich.table import Table


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


def error_text(error: dict | None) -> str:
    return f"{max(error.values()):.0e}" if error else ""


def spread_text(value: dict, text) -> str:
    return f"{text(value['median'])} ({text(value['p20'])} to {text(value['p80'])})"


def _cells(row: dict) -> dict[str, str]:
    """A row's columns as text; a row without a time says why in its place."""
    cells = {"method": row["label"], "error": error_text(row.get("error"))}
    if row.get("why"):
        return cells | {"time": row["why"][:60]}
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
    return cells | {key: "0" if value == 0 else f"{value:.1e}" for key, value in row.get("values", {}).items()}


def show(runs: list[dict], console: Console) -> None:
    """Print one aligned table a run."""
    for run in runs:
        rows = [_cells(row) for row in run["rows"]]
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


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def fill_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- bench:NAME --> and <!-- /bench:NAME --> replaced.

    Raises:
        ValueError: the text has no such pair of markers.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README: expected the markers {begin} and {end}, found none")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
