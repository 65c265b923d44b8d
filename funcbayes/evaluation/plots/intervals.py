"""Pictures of the central intervals of a regression."""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.plots.layout import WIDTH, Page, draw_line, label_lines, one_panel
from funcbayes.evaluation.plots.style import (
    BLUE,
    MUTED,
    PAPER,
    VERMILION,
    array,
    percent,
    signed_percent,
)
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    from scipy.special import ndtri


def interval_coverage_curves(predictions: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Figure:
    """By how much central intervals hold more targets than their level, one line a method.

    Args:
        predictions: from a method's name to its `(mean, std, targets)`, each `[batch]`: the
            mean and the standard deviation of a new target, and the targets.

    Returns:
        A figure; above 0 intervals are too wide, below 0 too narrow, and the grey band holds
        95 % of what chance alone does at each level. Intervals are those of a normal
        distribution, from 5 % to 95 %.

    Raises:
        ValueError: `predictions` is empty, or shapes or values do not fit.

    Source:
        Kuleshov et al. (2018), arXiv:1807.00263, section 3.5, for central intervals; drawn as
        a difference, which separates lines that a plot against the diagonal does not.
    """
    figure, axes = one_panel(predictions)
    levels = np.linspace(0.05, 0.95, 91)
    ends, farthest, fewest = {}, 0.05, math.inf
    for i, (name, prediction) in enumerate(predictions.items()):
        mean, std, targets = _checked_moments(*prediction)
        times = ndtri((1 + levels) / 2)
        inside = np.abs(targets - mean) <= times[:, None] * std
        excess = inside.mean(1) - levels
        draw_line(axes, i, levels, excess)
        ends[name] = (levels[-1], float(excess[-1]))
        farthest, fewest = max(farthest, np.abs(excess).max()), min(fewest, len(targets))
    chance = 1.96 * np.sqrt(levels * (1 - levels) / fewest)
    axes.fill_between(levels, -chance, chance, color=MUTED, alpha=0.15, linewidth=0, zorder=0)
    axes.axhline(0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    limit = 1.15 * max(farthest, chance.max())
    axes.set(xlim=(0.05, 0.95), ylim=(-limit, limit))
    axes.set_xticks([0.05, 0.25, 0.5, 0.75, 0.95])
    axes.set_xlabel("level of the interval")
    axes.set_ylabel("share inside − level")
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(signed_percent)
    for y, text in ((0.98, "intervals too wide"), (0.02, "intervals too narrow")):
        axes.text(
            0.015,
            y,
            text,
            transform=axes.transAxes,
            va="top" if y > 0.5 else "bottom",
            color=MUTED,
            fontsize=8,
        )
    label_lines(axes, ends)
    return figure


def observed_against_predicted(
    predictions: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    *,
    level: float = 0.9,
    label: str = "target",
    max_points: int = 200,
    panel: str | None = None,
) -> Figure:
    """Targets against predicted means with central intervals, one panel a method.

    Args:
        predictions: from a method's name to its `(mean, std, targets)`, each `[batch]`: the
            mean and the standard deviation of a new target, and the targets.
        level: probability that an interval holds.
        label: name of the target.
        max_points: of more data, this many are drawn, evenly over the order of the means.
        panel: the one method to draw, without title and legend, on the axes that all share.

    Returns:
        A figure; an interval that misses the diagonal misses its target. Intervals are those
        of a normal distribution.

    Raises:
        ValueError: `predictions` is empty or without `panel`, `level` is not between 0 and 1,
            or shapes or values do not fit.
    """
    checks.check_level(level)
    page = Page(predictions, panel=panel, height=WIDTH, title="Observed against predicted")
    times = ndtri((1 + level) / 2)
    checked = {name: _checked_moments(*p) for name, p in predictions.items()}
    low = min(min(mean.min(), targets.min()) for mean, _, targets in checked.values())
    high = max(max(mean.max(), targets.max()) for mean, _, targets in checked.values())
    margin = 0.06 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    for name, cell in page.cells():
        axes = page.figure.add_subplot(cell)
        mean, std, targets = checked[name]
        inside = np.abs(targets - mean) <= times * std
        share = inside.mean()
        if len(mean) > max_points:
            even = np.linspace(0, len(mean) - 1, max_points).round().astype(int)
            drawn = np.argsort(mean, kind="stable")[even]
            mean, std, targets, inside = (x[drawn] for x in (mean, std, targets, inside))
        axes.plot(limits, limits, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        for part, color, marker in ((inside, BLUE, "o"), (~inside, VERMILION, "X")):
            axes.errorbar(
                mean[part],
                targets[part],
                xerr=times * std[part],
                linestyle="none",
                marker=marker,
                markersize=4 if marker == "o" else 5.5,
                color=color,
                markeredgecolor=PAPER,
                markeredgewidth=0.5,
                elinewidth=0.7,
                ecolor=(color, 0.35),
                zorder=2 if marker == "o" else 3,
            )
        note = f"{100 * share:.0f} % inside"
        page.finish(axes, name, note=note, x=f"predicted {label}", y=f"observed {label}")
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
    percent = f"{100 * level:.3g} %"
    page.legend(
        Line2D(
            [], [], color=BLUE, marker="o", markersize=4, label=f"inside the {percent} interval"
        ),
        Line2D([], [], color=VERMILION, marker="X", markersize=5.5, label="outside"),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), label="exact"),
    )
    return page.figure


def _checked_moments(mean: Tensor, std: Tensor, targets: Tensor) -> tuple[np.ndarray, ...]:
    for name, value in (("mean", mean), ("std", std), ("targets", targets)):
        if value.ndim != 1 or value.shape != targets.shape or not len(value):
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)} beside targets of shape "
                f"{tuple(targets.shape)}, expected [batch] for both, at least one datum"
            )
        if not value.isfinite().all():
            raise ValueError(f"`{name}` holds NaN or infinite values, expected finite ones")
    if (std < 0).any():
        raise ValueError(f"`std` has the entry {std.min().item():.4g}, expected none below 0")
    return array(mean), array(std), array(targets)
