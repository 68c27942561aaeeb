"""The two pictures of a training job, as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, PLAIN, SOFT, INK = "#1b6ca8", "#9aa5b1", "#c9d6e2", "#22303c"
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PLAIN,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "hra-kernels",
    "figure.dpi": 150,
}


def _save(figure, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        # no date in the SVG: equal numbers give equal files
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of up to `window` values ending at each one."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def plot_training(
    folder: Path,
    title: str,
    losses: Sequence[float],
    checks: Sequence[tuple[int, float]],
    chosen: int,
    majority: float,
) -> list[Path]:
    """Training loss by step over validation accuracy at each (step, accuracy) check, the chosen one marked."""
    with plt.rc_context(_STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 5.6), sharex=True, height_ratios=[3, 2])
        steps = range(1, len(losses) + 1)
        top.plot(steps, losses, color=SOFT, linewidth=1, label="each step")
        window = max(1, len(losses) // 15)
        top.plot(steps, smoothed(losses, window), color=OURS, linewidth=2.2, label=f"mean of the last {window}")
        top.set_ylabel("training loss")
        top.set_ylim(bottom=0)
        top.set_title(title)
        top.legend(frameon=False, loc="lower left")
        xs, ys = [step for step, _ in checks], [100 * value for _, value in checks]
        bottom.axhline(100 * majority, color=PLAIN, linewidth=1, linestyle=(0, (4, 3)))
        bottom.annotate(
            "always the most frequent class",
            (xs[-1], 100 * majority),
            (0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=PLAIN,
        )
        bottom.plot(xs, ys, color=OURS, linewidth=2.2, marker="o", markersize=4.5)
        best = dict(checks)[chosen]
        bottom.plot([chosen], [100 * best], marker="o", markersize=11, markerfacecolor="none", markeredgecolor=OURS)
        bottom.annotate(
            f"{100 * best:.1f} % at step {chosen}: kept",
            (chosen, 100 * best),
            (0, -18),
            textcoords="offset points",
            ha="right" if chosen > xs[-1] / 2 else "left",
            fontsize=10,
        )
        bottom.margins(y=0.15)
        bottom.set_ylabel("validation accuracy, %")
        bottom.set_xlabel("optimizer step")
        return _save(figure, folder, "loss")


def plot_cost(folder: Path, title: str, rows: Sequence[tuple[str, float]], ours: str, floor: str) -> list[Path]:
    """A bar for each (method, seconds per step), with its multiple of the floor's."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(rows) + 1.4))
        names, seconds = [name for name, _ in rows], [1e3 * value for _, value in rows]
        floor_ms = dict(zip(names, seconds, strict=True))[floor]
        bars = axes.barh(names, seconds, height=0.62, color=[OURS if name == ours else SOFT for name in names])
        axes.axvline(floor_ms, color=PLAIN, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        for bar, value in zip(bars, seconds, strict=True):
            axes.annotate(
                f"{value:.0f} ms   {value / floor_ms:.2f} ×",
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
        axes.tick_params(axis="y", length=0)
        axes.set_title(title)
        return _save(figure, folder, "cost")
