"""Pictures of calibration and of out-of-distribution detection, one panel a method.

Every function returns a matplotlib `Figure` that belongs to no pyplot state, so nothing is
shown, nothing piles up and any number of threads may draw: write it with
`figure.savefig(path)`. Needs the extra `report`.
"""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from funcbayes.evaluation import metrics, uncertainty
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

_INK, _MUTED, _GRID = "#22262b", "#6b7280", "#e5e7eb"
# From the palette of Okabe and Ito: told apart by every kind of colour vision.
_BLUE, _ORANGE, _VERMILION = "#0072b2", "#e69f00", "#d55e00"

# Inches; the margins hold the title, the legend and the outer labels.
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 2.75, 0.75, 0.25, 1.05, 0.6
_BETWEEN_COLUMNS, _BETWEEN_ROWS = 0.5, 0.65
_MAX_COLUMNS = 3


def reliability_diagrams(
    predictions: Mapping[str, tuple[Tensor, Tensor]], *, num_bins: int = 10
) -> Figure:
    """Accuracy against confidence, one panel a method, with the share of each bin below.

    Args:
        predictions: from a method's name to its `(probs, targets)`: predictive probabilities
            `[batch, classes]` and class indices `[batch]`.
        num_bins: bins of equal width between 0 and 1. The calibration error in a panel's
            corner has 15, as in `metrics.expected_calibration_error`.

    Returns:
        A figure; a bar reaches the accuracy of its bin, the hatching the mean confidence.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: `predictions` is empty, or probabilities or targets do not fit.

    Source:
        Guo et al. (2017), arXiv:1706.04599, figure 1.
    """
    figure, panels = _panels(len(predictions), height=3.3, title="Reliability")
    bottom_row = _bottom_row(len(predictions))
    centers, width = (np.arange(num_bins) + 0.5) / num_bins, 0.92 / num_bins
    for i, (name, (probs, targets)) in enumerate(predictions.items()):
        error = metrics.expected_calibration_error(probs, targets)
        bins = uncertainty.reliability_bins(probs, targets, num_bins=num_bins)
        confidence, accuracy, counts = (x.detach().cpu().numpy() for x in bins)
        filled = counts > 0
        grid = panels[i].subgridspec(2, 1, height_ratios=(3.2, 1), hspace=0.1)
        upper = figure.add_subplot(grid[0])
        lower = figure.add_subplot(grid[1], sharex=upper)

        upper.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        upper.bar(centers[filled], accuracy[filled], width, color=_BLUE, zorder=2)
        upper.bar(
            centers[filled],
            (confidence - accuracy)[filled],
            width,
            bottom=accuracy[filled],
            facecolor="none",
            edgecolor=_VERMILION,
            hatch="/////",
            linewidth=0.8,
            zorder=3,
        )
        _style(upper, title=name, note=f"ECE {100 * error:.1f} %")
        upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="" if i % _MAX_COLUMNS else "accuracy")
        upper.tick_params(labelbottom=False)
        lower.bar(centers, counts / counts.sum(), width, color=_MUTED, zorder=2)
        _style(lower)
        lower.set(ylim=(0, 1), ylabel="" if i % _MAX_COLUMNS else "share")
        lower.set_xlabel("confidence" if i in bottom_row else "")
        lower.set_yticks([0, 0.5, 1])
        lower.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _legend(
        figure,
        [
            Patch(color=_BLUE, label="accuracy of the bin"),
            Patch(facecolor="none", edgecolor=_VERMILION, hatch="/////", label="gap to confidence"),
            Line2D([], [], color=_MUTED, linestyle=(0, (4, 3)), label="calibrated"),
        ],
    )
    return figure


def ood_histograms(
    scores: Mapping[str, tuple[Tensor, Tensor]],
    *,
    label: str = "predictive entropy (nats)",
    upper: float | None = None,
) -> Figure:
    """Scores of in- and out-of-distribution inputs, one panel a method, on common axes.

    Args:
        scores: from a method's name to its `(in_scores, out_scores)`, each `[inputs]`;
            higher means stranger.
        label: what the score is, with its unit.
        upper: right end of the axis, log(classes) for an entropy; None takes the largest
            score.

    Returns:
        A figure; the bars of each histogram sum to 100 %. The vertical axis is a square
        root, which shows a tail beside a peak.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: `scores` is empty, or a method's scores are empty or not finite.
    """
    figure, panels = _panels(len(scores), height=2.0, title="In- against out-of-distribution")
    found = {name: metrics.detection(*pair) for name, pair in scores.items()}
    if upper is None:
        upper = max(float(part.max()) for pair in scores.values() for part in pair)
    edges = np.linspace(0, upper or 1.0, 25)
    first: Axes | None = None
    for i, (name, pair) in enumerate(scores.items()):
        axes = figure.add_subplot(panels[i], sharex=first, sharey=first)
        first = first or axes
        for part, color in zip(pair, (_BLUE, _ORANGE), strict=True):
            # A rounding error above log(classes) belongs to the last bin.
            values = part.detach().double().cpu().numpy().clip(edges[0], edges[-1])
            share = np.histogram(values, edges)[0] / len(values)
            axes.stairs(share, edges, fill=True, color=color, alpha=0.35, zorder=2)
            axes.stairs(share, edges, color=color, linewidth=1.3, zorder=3)
        auroc, fpr95 = found[name]
        _style(axes, title=name, note=f"AUROC {auroc:.3f}, FPR95 {100 * fpr95:.0f} %")
        axes.set_yscale("function", functions=(_root, np.square))
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))
        axes.set_yticks([0, 0.05, 0.2, 0.5, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.set_xlabel(label if i in _bottom_row(len(scores)) else "")
        axes.set_ylabel("" if i % _MAX_COLUMNS else "share of inputs (root scale)")
    _legend(
        figure,
        [
            Patch(facecolor=(_BLUE, 0.35), edgecolor=_BLUE, label="in-distribution"),
            Patch(facecolor=(_ORANGE, 0.35), edgecolor=_ORANGE, label="out-of-distribution"),
        ],
    )
    return figure


def _root(share: np.ndarray) -> np.ndarray:
    # matplotlib probes a little below zero.
    return np.sqrt(np.clip(share, 0, None))


def _bottom_row(num: int) -> range:
    """The panels with none below them."""
    return range(max(0, num - _MAX_COLUMNS), num)


def _panels(num: int, *, height: float, title: str) -> tuple[Figure, list[SubplotSpec]]:
    """An empty figure and one grid cell for each of `num` panels."""
    if not num:
        raise ValueError("there is no method to draw, expected at least one")
    rows = math.ceil(num / _MAX_COLUMNS)
    # A single method keeps the room of two: the title and the legend need it.
    columns = max(2, min(num, _MAX_COLUMNS))
    inner_width = columns * _WIDTH + (columns - 1) * _BETWEEN_COLUMNS
    inner_height = rows * height + (rows - 1) * _BETWEEN_ROWS
    size = (_LEFT + inner_width + _RIGHT, _TOP + inner_height + _BOTTOM)
    figure = Figure(figsize=size, dpi=150, facecolor="white")
    figure.text(
        _LEFT / size[0],
        1 - 0.2 / size[1],
        title,
        va="top",
        color=_INK,
        fontsize=14,
        fontweight="bold",
    )
    grid = figure.add_gridspec(
        rows,
        columns,
        left=_LEFT / size[0],
        right=1 - _RIGHT / size[0],
        bottom=_BOTTOM / size[1],
        top=1 - _TOP / size[1],
        wspace=_BETWEEN_COLUMNS / _WIDTH,
        hspace=_BETWEEN_ROWS / height,
    )
    return figure, [grid[i // columns, i % columns] for i in range(num)]


def _legend(figure: Figure, handles: list) -> None:
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT / width, 1 - 0.45 / height),
        borderaxespad=0,
        borderpad=0,
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )


def _style(axes: Axes, *, title: str = "", note: str = "") -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=10.5, fontweight="bold", pad=5)
    axes.set_title(note, loc="right", color=_MUTED, fontsize=9, pad=5)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=8, length=3)
    axes.xaxis.label.set(color=_INK, fontsize=9)
    axes.yaxis.label.set(color=_INK, fontsize=9)
