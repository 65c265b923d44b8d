"""Pictures of class probabilities: calibration, detection and selective prediction."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from funcbayes.evaluation import metrics, uncertainty
from funcbayes.evaluation.plots.layout import Page, draw_line, label_lines, one_panel
from funcbayes.evaluation.plots.style import BLUE, MUTED, VERMILION, array, percent
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator


def reliability_diagrams(
    predictions: Mapping[str, tuple[Tensor, Tensor]],
    *,
    num_bins: int = 10,
    panel: str | None = None,
) -> Figure:
    """Accuracy against confidence, one panel a method, with the share of each bin below.

    Args:
        predictions: from a method's name to its `(probs, targets)`: predictive probabilities
            `[batch, classes]` and class indices `[batch]`.
        num_bins: bins of equal width between 0 and 1. The calibration error in a panel's
            corner has 15, as in `metrics.expected_calibration_error`.
        panel: the one method to draw, without title and legend, on the axes that all share.

    Returns:
        A figure; a bar reaches the accuracy of its bin, the hatching the mean confidence.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: `predictions` is empty or without `panel`, or probabilities or targets do
            not fit.

    Source:
        Guo et al. (2017), arXiv:1706.04599, figure 1.
    """
    page = Page(predictions, panel=panel, height=2.8, title="Reliability")
    centers, width = (np.arange(num_bins) + 0.5) / num_bins, 0.92 / num_bins
    for name, cell in page.cells():
        probs, targets = predictions[name]
        error = metrics.expected_calibration_error(probs, targets)
        bins = uncertainty.reliability_bins(probs, targets, num_bins=num_bins)
        confidence, accuracy, counts = (x.detach().cpu().numpy() for x in bins)
        filled = counts > 0
        grid = cell.subgridspec(2, 1, height_ratios=(3.2, 1), hspace=0.1)
        upper = page.figure.add_subplot(grid[0])
        lower = page.figure.add_subplot(grid[1], sharex=upper)

        upper.plot([0, 1], [0, 1], color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        upper.bar(
            centers[filled],
            accuracy[filled],
            width,
            facecolor=(BLUE, 0.35),
            edgecolor=BLUE,
            linewidth=1,
            zorder=2,
        )
        upper.bar(
            centers[filled],
            (confidence - accuracy)[filled],
            width,
            bottom=accuracy[filled],
            facecolor="none",
            edgecolor=VERMILION,
            hatch="/////",
            linewidth=1,
            zorder=3,
        )
        page.finish(upper, name, note=f"ECE {100 * error:.1f} %", y="accuracy")
        upper.set(xlim=(0, 1), ylim=(0, 1.02))
        upper.tick_params(labelbottom=False)
        lower.bar(centers, counts / counts.sum(), width, color=MUTED, zorder=2)
        page.finish(lower, name, x="confidence", y="share", titled=False)
        lower.set(ylim=(0, 1))
        lower.set_yticks([0, 0.5, 1])
        for axes in (upper, lower):
            axes.yaxis.set_major_formatter(percent)
    page.legend(
        Patch(facecolor=(BLUE, 0.35), edgecolor=BLUE, label="accuracy of the bin"),
        Patch(facecolor="none", edgecolor=VERMILION, hatch="/////", label="gap to confidence"),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), label="calibrated"),
    )
    return page.figure


def ood_histograms(
    scores: Mapping[str, tuple[Tensor, Tensor]],
    *,
    label: str = "predictive entropy (nats)",
    upper: float | None = None,
    panel: str | None = None,
) -> Figure:
    """Scores of in- and out-of-distribution inputs, one panel a method, on common axes.

    Args:
        scores: from a method's name to its `(in_scores, out_scores)`, each `[inputs]`;
            higher means stranger.
        label: what the score is, with its unit.
        upper: right end of the axis, log(classes) for an entropy; None takes the largest
            score.
        panel: the one method to draw, without title and legend, on the axes that all share.

    Returns:
        A figure; the bars of each histogram sum to 100 %. The vertical axis is a square
        root, which shows a tail beside a peak.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: `scores` is empty or without `panel`, or a method's scores are empty or
            not finite.
    """
    page = Page(scores, panel=panel, height=2.0, title="In- against out-of-distribution")
    if upper is None:
        upper = max(float(part.max()) for pair in scores.values() for part in pair)
    edges = np.linspace(0, upper or 1.0, 25)
    for name, cell in page.cells():
        axes = page.figure.add_subplot(cell)
        inside, outside = (_histogram(part, edges) for part in scores[name])
        axes.stairs(inside, edges, fill=True, color=BLUE, alpha=0.3, zorder=2)
        axes.stairs(inside, edges, color=BLUE, linewidth=1.3, zorder=4)
        axes.stairs(
            outside, edges, fill=True, facecolor="none", edgecolor=VERMILION, hatch="////", zorder=3
        )
        axes.stairs(outside, edges, color=VERMILION, linewidth=1.3, zorder=4)
        found = metrics.detection(*scores[name])
        note = f"AUROC {found.auroc:.3f}, FPR95 {100 * found.fpr95:.0f} %"
        page.finish(axes, name, note=note, x=label, y="share of inputs (root scale)")
        axes.set_yscale("function", functions=(_root, np.square))
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))
        axes.set_yticks([0, 0.05, 0.2, 0.5, 1])
        axes.yaxis.set_major_formatter(percent)
    page.legend(
        Patch(facecolor=(BLUE, 0.3), edgecolor=BLUE, label="in-distribution"),
        Patch(facecolor="none", edgecolor=VERMILION, hatch="////", label="out-of-distribution"),
    )
    return page.figure


def risk_coverage_curves(
    predictions: Mapping[str, tuple[Tensor, Tensor]], *, label: str = "error rate"
) -> Figure:
    """Mean loss of the predictions that a method is most certain of, one line a method.

    Args:
        predictions: from a method's name to its `(scores, losses)`, each `[batch]`, as in
            `metrics.risk_coverage`: higher scores are less certain.
        label: what the mean loss is; an error rate is shown as percent.

    Returns:
        A figure; the right end of a line is the mean loss of all inputs.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: `predictions` is empty, or scores or losses do not fit.

    Source:
        Geifman and El-Yaniv (2017), arXiv:1705.08500, section 2.
    """
    figure, axes = one_panel(predictions)
    ends, highest = {}, 0.0
    for i, (name, (scores, losses)) in enumerate(predictions.items()):
        coverage, risk = (array(x) for x in metrics.risk_coverage(scores, losses))
        draw_line(axes, i, coverage, risk)
        ends[name] = (1.0, float(risk[-1]))
        # One confident mistake is a peak of 100 % at the left end: leave it to the margin.
        highest = max(highest, float(risk[coverage >= 0.1].max()))
    axes.set(xlim=(0, 1), ylim=(0, 1.08 * highest or 0.01))
    axes.set_xlabel("share of inputs kept, most certain first")
    axes.set_ylabel(f"{label} of those kept")
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if label == "error rate":
        axes.yaxis.set_major_formatter(percent)
    label_lines(axes, ends)
    return figure


def _histogram(scores: Tensor, edges: np.ndarray) -> np.ndarray:
    # A rounding error above log(classes) belongs to the last bin.
    values = array(scores).clip(edges[0], edges[-1])
    return np.histogram(values, edges)[0] / len(values)


def _root(share: np.ndarray) -> np.ndarray:
    # matplotlib probes a little below zero.
    return np.sqrt(np.clip(share, 0, None))
