"""Pictures of predictions over one or two inputs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.plots.layout import Page, write_above
from funcbayes.evaluation.plots.style import (
    BLACK,
    BLUE,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    WHITE,
    array,
    shortened,
)
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
    from scipy.special import ndtri


class Surface(NamedTuple):
    """Predictions over the inputs that a picture shows, for data with one or two inputs.

    Attributes:
        points: inputs in raw units: `[points, 1]`, rising, or `[side * side, 2]`, the points
            of a square grid in any order.
        mean: means in units of the target `[points]`, or probabilities `[points, classes]`.
        total: standard deviation of a new target, or predictive entropy in nats, `[points]`.
        epistemic: the part that more data would remove: standard deviation of the mean, or
            mutual information in nats, `[points]`.
    """

    points: Tensor
    mean: Tensor
    total: Tensor
    epistemic: Tensor


class Points(NamedTuple):
    """Data to draw on top of a `Surface`, in raw units.

    Attributes:
        inputs: `[rows, 1]` or `[rows, 2]`.
        targets: class indices, or targets in their own units, `[rows]`.
    """

    inputs: Tensor
    targets: Tensor


def regression_bands(
    surfaces: Mapping[str, Surface],
    points: Points,
    *,
    level: float = 0.9,
    labels: tuple[str, str] = ("input", "target"),
    panel: str | None = None,
) -> Figure:
    """Mean and central intervals over one input, one panel a method, with the training data.

    Args:
        surfaces: from a method's name to its predictions, `points` `[points, 1]`.
        points: training data, inputs `[rows, 1]`.
        level: probability that the bands hold.
        labels: names of the input and of the target.
        panel: the one method to draw, without title and legend, on the axes that all share.

    Returns:
        A figure; the inner band holds the mean, the outer one a new target, both as normal
        distributions.

    Raises:
        ValueError: `surfaces` is empty or without `panel`, `level` is not between 0 and 1, or
            there is not one input.
    """
    checks.check_level(level)
    page = Page(surfaces, panel=panel, height=2.2, title="Mean and bands")
    times = ndtri((1 + level) / 2)
    _check_inputs(points.inputs, "points.inputs", columns=1)
    known, targets = array(points.inputs)[:, 0], array(points.targets)
    curves = {}
    for name, surface in surfaces.items():
        _check_inputs(surface.points, f"surfaces[{name!r}].points", columns=1)
        arrays = (array(x) for x in (surface.points[:, 0], *surface[1:]))
        x, mean, total, epistemic = arrays
        curves[name] = (x, mean, times * total, times * epistemic)
    low = min(targets.min(), *((mean - total).min() for _, mean, total, _ in curves.values()))
    high = max(targets.max(), *((mean + total).max() for _, mean, total, _ in curves.values()))
    for name, cell in page.cells():
        axes = page.figure.add_subplot(cell)
        x, mean, total, epistemic = curves[name]
        axes.fill_between(x, mean - total, mean + total, color=BLUE, alpha=0.16, linewidth=0)
        for edge in (mean - total, mean + total):
            axes.plot(x, edge, color=BLUE, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.fill_between(x, mean - epistemic, mean + epistemic, color=BLUE, alpha=0.4, linewidth=0)
        axes.plot(x, mean, color=BLUE, linewidth=1.8)
        axes.plot(
            known,
            targets,
            linestyle="none",
            marker="o",
            markersize=2.8,
            markerfacecolor=INK,
            markeredgecolor=PAPER,
            markeredgewidth=0.35,
            zorder=4,
        )
        page.finish(axes, name, x=labels[0], y=labels[1])
        margin = 0.04 * (high - low)
        axes.set(xlim=(x[0], x[-1]), ylim=(low - margin, high + margin))
    percent = f"{100 * level:.3g} %"
    page.legend(
        Line2D([], [], color=BLUE, linewidth=1.8, label="mean"),
        Patch(facecolor=(BLUE, 0.5), label=f"{percent} band of the mean (epistemic)"),
        Patch(
            facecolor=(BLUE, 0.16), edgecolor=BLUE, linestyle="--", label="of a new target (total)"
        ),
        Line2D([], [], color=INK, marker="o", markersize=2.8, linestyle="none", label="data"),
    )
    return page.figure


def uncertainty_maps(
    surfaces: Mapping[str, Surface],
    points: Points | None = None,
    *,
    label: str = "nats",
    upper: float | None = None,
    names: tuple[str, str] = ("first input", "second input"),
    classes: Sequence[str] = (),
    panel: str | None = None,
) -> Figure:
    """Total and epistemic uncertainty over two inputs, one pair of maps a method.

    Args:
        surfaces: from a method's name to its predictions, `points` `[side * side, 2]`.
        points: training data to draw on top, inputs `[rows, 2]`.
        label: unit of the uncertainties.
        upper: end of the common colour scale, log(classes) for an entropy; None takes the
            largest uncertainty.
        names: of the inputs.
        classes: of a classification; each has its own marker. Empty in a regression.
        panel: the one method to draw, without title and legend, on the scale that all share.

    Returns:
        A figure; all maps have one colour scale, and a line marks where the most probable
        class changes.

    Raises:
        ValueError: `surfaces` is empty or without `panel`, or the points are not those of a
            square grid.
    """
    page = Page(
        surfaces,
        panel=panel,
        height=1.6,
        width=3.7,
        max_columns=2,
        top_alone=0.32,
        title="Uncertainty maps",
    )
    for name, surface in surfaces.items():
        _check_inputs(surface.points, f"surfaces[{name!r}].points", columns=2)
    if upper is None:
        upper = max(float(surface.total.max()) for surface in surfaces.values())
    for name, cell in page.cells():
        surface = surfaces[name]
        at = array(surface.points)
        side = math.isqrt(len(at))
        if side * side != len(at):
            raise ValueError(
                f"`surfaces[{name!r}].points` has {len(at)} points, expected those of a square "
                "grid: side × side of them"
            )
        # Rows from below, whichever input varies fastest.
        order = np.lexsort((at[:, 0], at[:, 1])).reshape(side, side)
        x, y = at[order[0], 0], at[order[:, 0], 1]
        half_x, half_y = (x[-1] - x[0]) / (side - 1) / 2, (y[-1] - y[0]) / (side - 1) / 2
        extent = (x[0] - half_x, x[-1] + half_x, y[0] - half_y, y[-1] + half_y)
        # The last column is left to the tick labels of the colour bar.
        grid = cell.subgridspec(1, 4, width_ratios=(1, 1, 0.05, 0.1), wspace=0.12)
        image: Any = None
        for column, (kind, values) in enumerate(
            (("total", surface.total), ("epistemic", surface.epistemic))
        ):
            axes = page.figure.add_subplot(grid[column])
            image = axes.imshow(
                array(values)[order],
                extent=extent,
                origin="lower",
                aspect="auto",
                interpolation="none",
                cmap="viridis",
                vmin=0,
                vmax=upper,
            )
            if surface.mean.ndim == 2:
                _draw_boundary(axes, x, y, array(surface.mean)[order])
            if points is not None:
                _draw_points(axes, points, num_classes=len(classes))
            y_label = "" if column else names[1]
            page.finish(axes, name, x=names[0], y=y_label, titled=not column)
            write_above(axes, kind)
            axes.grid(visible=False)
            axes.set(xlim=extent[:2], ylim=extent[2:])
            axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(labelleft=not column)
        bar = page.figure.colorbar(image, cax=page.figure.add_subplot(grid[2]))
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(colors=MUTED, labelsize=8, length=3)
        bar.ax.set_title(shortened(label, 20), color=MUTED, fontsize=8, pad=5)
    if points is not None and classes:
        page.legend(*(_class_marker(i, name) for i, name in enumerate(classes)))
    return page.figure


def _draw_boundary(axes: Axes, x: np.ndarray, y: np.ndarray, probs: np.ndarray) -> None:
    """Lines where the most probable class changes."""
    for i in range(probs.shape[-1]):
        others = np.delete(probs, i, axis=-1).max(-1)
        lead = probs[..., i] - others
        if lead.min() < 0 < lead.max():
            axes.contour(x, y, lead, levels=[0], colors=WHITE, linewidths=1)


def _draw_points(axes: Axes, points: Points, *, num_classes: int) -> None:
    at, targets = array(points.inputs), array(points.targets)
    for i in range(max(num_classes, 1)):
        part = at[targets == i] if num_classes else at
        handle = _class_marker(i, "")
        handle.set_data(part[:, 0], part[:, 1])
        axes.add_line(handle)


def _class_marker(i: int, name: str) -> Line2D:
    face, edge = ((WHITE, BLACK), (BLACK, WHITE))[i % 2]
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=MARKERS[i % len(MARKERS)][0],
        markersize=4,
        markerfacecolor=face,
        markeredgecolor=edge,
        markeredgewidth=0.6,
        label=shortened(name, 20),
    )


def _check_inputs(inputs: Tensor, name: str, *, columns: int) -> None:
    if inputs.ndim != 2 or inputs.shape[1] != columns or len(inputs) < 2:
        raise ValueError(
            f"`{name}` has shape {tuple(inputs.shape)}, expected [points, {columns}] with at "
            "least 2 points"
        )
