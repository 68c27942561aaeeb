"""Plots from result files, as SVG beside them."""

import math
import statistics
from contextlib import AbstractContextManager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter

from bench.report import source
from hra_kernels.measuring import style
from hra_kernels.measuring.style import FLOOR, INK, MUTED, OTHER, OURS

WY, WY_COMPILED = "#7a6fb0", "#a79fd0"
COLORS = {
    "frozen": FLOOR,
    "ours": OURS,
    "ours-nn": "#5fb8bb",
    "wy-eager": WY,
    "wy-compile": WY_COMPILED,
    "peft-hra": "#d1495b",
    "lora": "#e09f3e",
    "oft": "#8a9a5b",
    "copy": FLOOR,
    "cpu": OURS,
    "cuda": OURS,
    "triton": "#2f6690",
    "reference": WY,
    "compiled reference": WY_COMPILED,
}
MARKERS = "osD^vP*X"


def color(provider: str) -> str:
    return COLORS.get(provider, OTHER)


def _figure(
    folder: Path, name: str, meta: dict, size: tuple[float, float], panels: int = 1
) -> AbstractContextManager[list[Axes]]:
    """Axes of one figure beside one another, with the machine and the commit in its corner."""
    return style.figure(folder / f"{name}.svg", size, columns=panels, source=source(meta))


def _times(value: float, _: object = None) -> str:
    digits = 2 if value < 1.995 else 1 if value < 9.95 else 0
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + "×" if digits else f"{value:.0f}×"


def _log_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Round ticks that do not run into one another; 1 is always among them."""
    apart = math.log(limits[1] / limits[0]) / 14
    chosen = [1.0]
    for step in (1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000):
        if step <= limits[1] and math.log(step / chosen[-1]) > apart:
            chosen.append(step)
    axis.set_ticks(chosen)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(_times))


def _by_provider(runs: list[dict], key: str) -> dict[str, tuple[str, list[tuple[int, dict]]]]:
    """{provider: (label, [(run's index, row)])} of the rows that have `key`, best median first."""
    found: dict[str, tuple[str, list]] = {}
    for index, run in enumerate(runs):
        for row in run["rows"]:
            if row.get(key) is not None:
                found.setdefault(row["provider"], (row["label"], []))[1].append((index, row))
    weigh = lambda row: row[key]["median"] if isinstance(row[key], dict) else row[key]  # noqa: E731
    return dict(sorted(found.items(), key=lambda item: statistics.median(weigh(row) for _, row in item[1][1])))


def _rows_axis(axes: Axes, methods: dict) -> None:
    axes.set_yticks(range(len(methods)), [label for label, _ in methods.values()])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    for tick, name in zip(axes.get_yticklabels(), methods, strict=True):
        if name.startswith("ours"):
            tick.set_color(OURS)
            tick.set_fontweight("bold")


def cost(folder: Path, name: str, title: str, runs: list[dict]) -> None:
    """Cost over the floor by method: one mark per case, a bar at their median."""
    methods = {key: value for key, value in _by_provider(runs, "ratio").items() if key != "frozen"}
    with _figure(folder, name, runs[0]["meta"], (8.6, 1.5 + 0.36 * len(methods))) as (axes,):
        axes.set_xscale("log")
        for y, (method, (_, rows)) in enumerate(methods.items()):
            middle = statistics.median(row["ratio"]["median"] for _, row in rows)
            axes.barh(y, middle - 1, left=1, height=0.62, color=color(method), alpha=0.35, linewidth=0)
            axes.text(middle * 1.02, y - 0.36, _times(middle), fontsize=7.5, color=MUTED, va="center", zorder=4)
            for index, row in rows:
                ratio = row["ratio"]
                axes.plot([ratio["p20"], ratio["p80"]], [y, y], color=color(method), linewidth=1.2, zorder=2)
                axes.plot(ratio["median"], y, MARKERS[index % 8], color=color(method), markersize=5.5, zorder=3)
        axes.axvline(1, color=FLOOR, linewidth=1.4)
        _rows_axis(axes, methods)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.97), high * 1.06)
        _log_ticks(axes.xaxis, axes.get_xlim())
        axes.set_title(title)
        axes.set_xlabel("time over the frozen layer's (= 1)", color=MUTED)
        for index, run in enumerate(runs):
            axes.plot([], [], MARKERS[index % 8], color=MUTED, markersize=5.5, label=run["case"]["name"])
        axes.legend(loc="upper right", fontsize=8)


def memory(folder: Path, name: str, title: str, runs: list[dict]) -> None:
    """What each method keeps for backward beyond x, by case."""
    methods = {key: value for key, value in _by_provider(runs, "saved_beyond_x_bytes").items() if key != "frozen"}
    with _figure(folder, name, runs[0]["meta"], (8.6, 1.5 + 0.36 * len(methods))) as (axes,):
        axes.set_xscale("log")
        for y, (method, (_, rows)) in enumerate(methods.items()):
            sizes = [max(row["saved_beyond_x_bytes"], 1) / 2**20 for _, row in rows]
            axes.plot([min(sizes), max(sizes)], [y, y], color=color(method), linewidth=5, alpha=0.35)
            for (index, _), size in zip(rows, sizes, strict=True):
                axes.plot(size, y, MARKERS[index % 8], color=color(method), markersize=5.5)
        _rows_axis(axes, methods)
        axes.set_title(title)
        axes.set_xlabel("MiB kept for backward, without x and parameters", color=MUTED)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for index, run in enumerate(runs):
            axes.plot([], [], MARKERS[index % 8], color=MUTED, markersize=5.5, label=run["case"]["name"])
        axes.legend(loc="upper right", fontsize=8)


def roofline(folder: Path, name: str, title: str, runs: list[dict]) -> None:
    """Percent of the copy bound, by operator, backend and case."""
    operators = ["reflect_fwd", "reflect_dx", "reflect_bwd"]
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        for row in run["rows"]:
            if "of_bound" in row:
                setting = f"{run['case']['dtype']}, R = {run['case']['rank']}"
                groups.setdefault((setting, row["provider"]), {}).setdefault(row["op"], []).append(row["of_bound"])
    settings = list(dict.fromkeys(setting for setting, _ in groups))
    with _figure(folder, name, runs[0]["meta"], (3.1 * len(settings) + 1, 3.6), len(settings)) as panels:
        for axes, setting in zip(panels, settings, strict=True):
            backends = [backend for other, backend in groups if other == setting]
            width = 0.8 / len(backends)
            for b, backend in enumerate(backends):
                for o, operator in enumerate(operators):
                    values = [100 * value for value in groups[setting, backend].get(operator, [])]
                    if values:
                        x = o + (b + 0.5) * width - 0.4
                        label = backend if o == 0 else None
                        axes.bar(x, statistics.median(values), width * 0.9, color=color(backend), label=label)
                        axes.plot([x] * len(values), values, "o", color=INK, markersize=2, alpha=0.6)
            axes.axhline(100, color=FLOOR, linewidth=1.2)
            axes.set_xticks(range(3), ["forward", "dx only", "backward"])
            axes.grid(axis="x", visible=False)
            axes.set_title(setting, fontsize=10)
            axes.set_ylim(0, 135)
        panels[0].set_ylabel("% of the copy bound", color=MUTED)
        panels[-1].legend(fontsize=8, loc="upper right", ncols=2)
        panels[0].figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)


def scaling(folder: Path, name: str, title: str, runs: list[dict]) -> None:
    """Cost over the frozen layer against M, D, R and the number of layers."""
    sweeps = list(dict.fromkeys(run["case"]["sweep"] for run in runs))
    names = {"M": "rows M", "D": "features D = N", "R": "reflections R", "layers": "adapted layers"}
    with _figure(folder, name, runs[0]["meta"], (3.2 * len(sweeps) + 1, 3.7), len(sweeps)) as panels:
        for axes, sweep in zip(panels, sweeps, strict=True):
            points = sorted(
                (run for run in runs if run["case"]["sweep"] == sweep), key=lambda run: run["case"]["value"]
            )
            for method, (label, rows) in _by_provider(points, "ratio").items():
                if method == "frozen":
                    continue
                rows = sorted(rows, key=lambda item: item[0])
                at = [points[index]["case"]["value"] for index, _ in rows]
                middle, low, high = ([row["ratio"][key] for _, row in rows] for key in ("median", "p20", "p80"))
                weight = 2.4 if method == "ours" else 1.4
                axes.plot(at, middle, "o-", color=color(method), label=label, linewidth=weight, markersize=4)
                axes.fill_between(at, low, high, color=color(method), alpha=0.15, linewidth=0)
            axes.axhline(1, color=FLOOR, linewidth=1.2)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            values = [point["case"]["value"] for point in points]
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xticks([], minor=True)
            _log_ticks(axes.yaxis, axes.get_ylim())
            axes.set_xlabel(names[sweep], color=MUTED)
        panels[0].set_ylabel("time over the frozen layer's", color=MUTED)
        panels[-1].legend(fontsize=8)
        panels[0].figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)


def draw(folder: Path, level: str, runs: list[dict]) -> list[Path]:
    """Every plot of a level's file that its runs allow; the files' paths."""
    timed = [run for run in runs if any("ratio" in row for row in run["rows"])]
    if level == "layer" and timed:
        rank = f"R = {timed[0]['case']['rank']}, {timed[0]['case']['dtype']}"
        cost(folder, "layer-cost", f"One adapted layer, forward + backward ({rank})", timed)
        memory(folder, "layer-memory", f"Memory kept for backward ({rank})", timed)
    elif level == "model" and timed:
        cost(folder, "model-cost", "A whole training step", timed)
    elif level == "op" and timed:
        roofline(folder, "op-roofline", "The operators against a copy of x", timed)
    elif level == "scaling" and timed:
        scaling(folder, "scaling", "One adapted Linear, forward + backward", timed)
    return sorted(folder.glob(f"{level}*.svg"))
