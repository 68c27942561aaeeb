"""A result file's runs as aligned tables on the screen."""

import math

from rich.console import Console
from rich.table import Table

from hra_kernels.measuring.text import bytes_text, seconds_text, significant


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
    if "beyond" in row:
        cells["beyond frozen"] = spread_text(row["beyond"], seconds_text)
    if "over_lora" in row:
        cells["over LoRA"] = spread_text(row["over_lora"], lambda x: f"{x:.2f}")
    if "of_bound" in row:
        cells["of copy bound"] = f"{100 * row['of_bound']:.0f} %"
    if "host_seconds" in row:
        cells["with host"] = seconds_text(row["host_seconds"])
    if "per_second" in row:
        cells["rate"] = f"{significant(row['per_second'])} {row['unit']}/s"
    for key, name in (("saved_beyond_x_bytes", "saved beyond x"), ("peak_bytes", "peak")):
        if key in row:
            cells[name] = bytes_text(row[key])
    if "seconds" in row:
        cells["rounds"] = str(row["seconds"]["rounds"])
    return cells | {key: number_text(value) for key, value in row.get("values", {}).items()}


def show(runs: list[dict], console: Console) -> None:
    """Print one aligned table per run."""
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
