"""Where panels, titles, legends and the names of lines go."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from funcbayes.evaluation.plots.style import INK, LINES, MUTED, PAPER, shortened, style_axes
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from sklearn.isotonic import isotonic_regression

# Inches; the margins of a page hold the title, the legend and the outer labels.
WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 2.75, 0.75, 0.25, 1.25, 0.6

_BETWEEN_COLUMNS, _BETWEEN_ROWS = 0.55, 0.85

MAX_COLUMNS = 3


class Page:
    """A grid of panels under a title and a legend, or one panel alone."""

    def __init__(
        self,
        methods: Mapping[str, Any],
        *,
        panel: str | None,
        height: float,
        title: str,
        width: float = WIDTH,
        max_columns: int = MAX_COLUMNS,
        top_alone: float = 0.12,
    ) -> None:
        _check_not_empty(methods)
        if panel is not None and panel not in methods:
            raise ValueError(f"`panel` is {panel!r}, expected one of {', '.join(methods)}")
        self._names = list(methods) if panel is None else [panel]
        self._alone = panel is not None
        num = len(self._names)
        rows = math.ceil(num / max_columns)
        # A single method keeps the room of two: the title and the legend need it.
        self._columns = 1 if self._alone else max(2, min(num, max_columns))
        left, right, top, bottom = (
            (0.62, 0.12, top_alone, 0.5) if self._alone else (_LEFT, _RIGHT, _TOP, _BOTTOM)
        )
        inner_width = self._columns * width + (self._columns - 1) * _BETWEEN_COLUMNS
        inner_height = rows * height + (rows - 1) * _BETWEEN_ROWS
        self._size = size = (left + inner_width + right, top + inner_height + bottom)
        self.figure = Figure(figsize=size, dpi=150, facecolor=PAPER)
        if not self._alone:
            at = (_LEFT / size[0], 1 - 0.2 / size[1])
            self.figure.text(*at, title, va="top", color=INK, fontsize=14, fontweight="bold")
        self._grid = self.figure.add_gridspec(
            rows,
            self._columns,
            left=left / size[0],
            right=1 - right / size[0],
            bottom=bottom / size[1],
            top=1 - top / size[1],
            wspace=_BETWEEN_COLUMNS / width,
            hspace=_BETWEEN_ROWS / height,
        )

    def cells(self) -> Iterator[tuple[str, SubplotSpec]]:
        """Each method to draw, with its place."""
        for i, name in enumerate(self._names):
            yield name, self._grid[i // self._columns, i % self._columns]

    def finish(
        self,
        axes: Axes,
        name: str,
        *,
        note: str = "",
        x: str = "",
        y: str = "",
        titled: bool = True,
    ) -> None:
        """Styles the axes; outer panels alone keep the labels of the axes."""
        i = self._names.index(name)
        style_axes(axes)
        if titled and not self._alone:
            title = shortened(name, 36)
            axes.set_title(title, loc="left", color=INK, fontsize=10.5, fontweight="bold", pad=18)
        if note and not self._alone:
            write_above(axes, note)
        axes.set_xlabel(shortened(x, 40) if i >= len(self._names) - self._columns else "")
        axes.set_ylabel("" if i % self._columns else shortened(y, 40))

    def legend(self, *handles: Patch | Line2D) -> None:
        """Puts the legend under the title; a panel alone has none."""
        if self._alone:
            return
        width, height = self._size
        self.figure.legend(
            handles=list(handles),
            loc="upper left",
            bbox_to_anchor=(_LEFT / width, 1 - 0.45 / height),
            borderaxespad=0,
            borderpad=0,
            ncols=min(len(handles), 6),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )


def write_above(axes: Axes, text: str) -> None:
    """Writes a note on top of the axes, on the left."""
    axes.annotate(
        text,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        color=MUTED,
        fontsize=9,
    )


def one_panel(methods: Mapping[str, Any]) -> tuple[Figure, Axes]:
    """Room for the lines of all methods, and for their names on the right."""
    _check_not_empty(methods)
    width, height = 4.6, max(2.7, 0.6 + 0.21 * len(methods))
    figure = Figure(figsize=(width, height), dpi=150, facecolor=PAPER)
    axes = figure.add_axes(
        (0.66 / width, 0.5 / height, (width - 2.2) / width, (height - 0.62) / height)
    )
    style_axes(axes)
    return figure, axes


def draw_line(axes: Axes, i: int, x: np.ndarray, y: np.ndarray) -> None:
    """Draws the line of the i-th method."""
    color, dashes, _ = LINES[i % len(LINES)]
    axes.plot(x, y, color=color, linestyle=dashes, linewidth=1.4, clip_on=True)


def label_lines(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Writes each line's name to the right of the axes, at the height of its point in `ends`."""
    low, high = axes.get_ylim()
    targets = np.array([(y - low) / (high - low) for _, y in ends.values()])
    order = np.argsort(targets, kind="stable")
    height = axes.bbox.height / axes.figure.dpi
    gap = 0.2 / height
    # The least squares shift that keeps the names a line apart and inside.
    steps = gap * np.arange(len(order))
    shifted = isotonic_regression(targets[order] - steps, y_min=0, y_max=max(1 - steps[-1], 0))
    names, points = list(ends), list(ends.values())
    for place, i in zip(shifted + steps, order, strict=True):
        color, dashes, marker = LINES[i % len(LINES)]
        x, y = points[i]
        axes.plot(
            x,
            y,
            marker=marker,
            markersize=5.5,
            color=color,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            clip_on=False,
            zorder=5,
        )
        axes.annotate(
            shortened(names[i], 18),
            xy=(x, y),
            xytext=(1.1, place),
            textcoords="axes fraction",
            va="center",
            color=INK,
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linestyle": dashes,
                "linewidth": 0.9,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def _check_not_empty(methods: Mapping[str, Any]) -> None:
    if not methods:
        raise ValueError("there is no method to draw, expected at least one")
