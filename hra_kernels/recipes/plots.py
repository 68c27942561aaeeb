"""The two pictures of a training job, as SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hra_kernels.measuring import style
from hra_kernels.measuring.style import FLOOR, MUTED, OTHER, OURS
from hra_kernels.measuring.text import seconds_text
from hra_kernels.recipes.application import Metric


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of up to `window` values ending at each one."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def plot_training(
    folder: Path,
    title: str,
    losses: Sequence[float],
    checks: Sequence[tuple[int, float]],
    chosen: int,
    metric: Metric,
    reference: Mapping[str, float],
) -> list[Path]:
    """Training loss by step over the validation metric at each (step, value) check, the chosen one marked.

    `reference` are values to compare with, drawn as dashed lines with their names.
    """
    path = folder / "loss.svg"
    with style.figure(path, (7.2, 5.6), rows=2, sharex=True, height_ratios=[3, 2]) as (top, bottom):
        steps = range(1, len(losses) + 1)
        top.plot(steps, losses, color=OTHER, linewidth=1, label="each step")
        window = max(1, len(losses) // 15)
        top.plot(steps, smoothed(losses, window), color=OURS, linewidth=2.2, label=f"mean of the last {window}")
        top.set_ylabel("training loss")
        top.set_ylim(bottom=0)
        top.set_title(title)
        top.legend(loc="lower left")
        scale = 100 if metric.percent else 1
        xs, ys = [step for step, _ in checks], [scale * value for _, value in checks]
        for name, value in reference.items():
            bottom.axhline(scale * value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right"}
            bottom.annotate(name, (xs[-1], scale * value), fontsize=9, color=MUTED, **place)
        bottom.plot(xs, ys, color=OURS, linewidth=2.2, marker="o", markersize=4.5)
        best = dict(checks)[chosen]
        bottom.plot([chosen], [scale * best], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=OURS)
        bottom.annotate(
            f"{metric.text(best)} at step {chosen}: kept",
            (chosen, scale * best),
            (0, -18),
            textcoords="offset points",
            ha="right" if chosen > xs[-1] / 2 else "left",
            fontsize=10,
        )
        bottom.margins(y=0.15)
        bottom.set_ylabel(f"validation {metric.name}" + (", %" if metric.percent else ""))
        bottom.set_xlabel("optimizer step")
    return [path]


def plot_cost(folder: Path, title: str, rows: Sequence[tuple[str, float]], ours: str, floor: str) -> list[Path]:
    """A bar for each (method, seconds per step), with its multiple of the floor's."""
    path = folder / "cost.svg"
    names, milliseconds = [name for name, _ in rows], [1e3 * value for _, value in rows]
    floor_ms = dict(zip(names, milliseconds, strict=True))[floor]
    with style.figure(path, (7.2, 0.5 * len(rows) + 1.4)) as (axes,):
        bars = axes.barh(names, milliseconds, height=0.62, color=[OURS if name == ours else OTHER for name in names])
        axes.axvline(floor_ms, color=FLOOR, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        for bar, value in zip(bars, milliseconds, strict=True):
            axes.annotate(
                f"{seconds_text(value / 1e3)}   {value / floor_ms:.2f} ×",
                (value, bar.get_y() + bar.get_height() / 2),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_xlabel(f"time per training step, ms (×: over “{floor}”)")
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
    return [path]
