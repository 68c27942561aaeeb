"""The one look of every plot: palette, fonts, and SVG files that are equal where the numbers are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

INK, MUTED, GRID = "#22303c", "#7b8894", "#e3e8ec"
OURS, OTHER, FLOOR = "#0b8a8f", "#a9b4bd", INK
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "hra_kernels",
    "svg.fonttype": "none",
}


@contextmanager
def figure(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, source: str = "", **options: object
) -> Iterator[list[Axes]]:
    """Axes of one figure, row by row; saved as SVG on leaving, with the numbers' `source` in its corner.

    Args:
        options: what else `plt.subplots` takes.
    """
    with plt.rc_context(RC):
        drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
        try:
            yield list(axes.flat)
            if source:
                drawn.supxlabel(source, fontsize=7.5, color=MUTED, x=0.995, ha="right")
            # no date: equal numbers give equal files
            drawn.savefig(path, facecolor="white", metadata={"Date": None})
        finally:
            plt.close(drawn)
