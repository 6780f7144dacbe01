"""What all pictures have in common: colours for colour-blind readers, letters for a phone.

A picture is ten inches wide with letters of 13 points and more. A phone that shows it in 390 pixels
shows such a letter in seven.

Colours: "Color Universal Design", Okabe and Ito (2008).
"""

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
YELLOW, BLUE, VERMILION, PURPLE = "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
STYLE = {
    "font.size": 14,
    "axes.titlesize": 15,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 13,
    "legend.framealpha": 0.8,
    "lines.linewidth": 2.5,
}
WIDTH, DPI = 10, 150  # inches, dots an inch
FEW = 40  # points that need no smoothing
LEAST_SPAN = 0.01  # of an axis: rounding errors are no curve


@contextlib.contextmanager
def picture(path: Path, mosaic: str, height: float) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A figure and its axes by letter, as of `subplot_mosaic`; written when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplot_mosaic(mosaic)
        yield figure, axes
        figure.savefig(path, dpi=DPI)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a twentieth of the values around each, over fewer at both ends.

    >>> smoothed([0.0, 3.0, 0.0, 3.0])
    [0.0, 3.0, 0.0, 3.0]
    """
    half = len(values) // 40
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def plot_smoothed(
    axis: Any, x: Sequence[float], y: Sequence[float], color: str, **how: Any
) -> None:
    """Pale points and their smoothed line, or of a few points a line; `how` is the line's."""
    if len(x) < FEW:
        axis.plot(x, y, marker="o", color=color, **how)
        return
    alpha = max(0.06, min(0.35, 40 / len(x)))
    axis.plot(x, y, "o", color=color, markersize=4, alpha=alpha, markeredgewidth=0)
    axis.plot(x, smoothed(y), color=color, **how)


def finish_steps(axis: Any, last: int) -> None:
    """A horizontal axis of steps: from 0 to the last one, ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(-0.03 * last, 1.03 * last)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel("step")


def finish_values(axis: Any, which: str = "y") -> None:
    """An axis of values: few ticks, no offset, and not so narrow that rounding errors fill it."""
    low, high = axis.get_ylim() if which == "y" else axis.get_xlim()
    if high - low < LEAST_SPAN:
        middle = (low + high) / 2
        limits = (middle - LEAST_SPAN, middle + LEAST_SPAN)
        (axis.set_ylim if which == "y" else axis.set_xlim)(*limits)
    axis.locator_params(axis=which, nbins=5)
    axis.ticklabel_format(axis=which, useOffset=False)


def say_instead(axis: Any, text: str) -> None:
    """A text in the place of an axis that has nothing to show."""
    axis.clear()
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center")


def finite(value: float | None) -> bool:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)
