"""The figures of a comparison: their names, formats and explanations."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from funcbayes.evaluation.report.content import MethodReport


class Metric(NamedTuple):
    """How to read one figure.

    Attributes:
        label: short heading.
        name: in words.
        unit: "%" (a fraction that is shown as percent), "nats", "target" (the unit of the
            target), "seconds", "bytes", or "" (a plain number).
        better: "higher", "lower", the number that the best value is closest to, or None
            where the figure alone says nothing of better or worse.
        group: heading over neighbouring columns.
        description: what it measures, in a sentence or two.
    """

    label: str
    name: str
    unit: Literal["%", "nats", "target", "seconds", "bytes", ""]
    better: Literal["higher", "lower"] | float | None
    group: str
    description: str


_TEST, _OOD, _COST = "test split", "out of distribution", "cost"

METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "accuracy",
        "accuracy",
        "%",
        "higher",
        _TEST,
        "Share of test inputs whose most probable class is the right one.",
    ),
    "rmse": Metric(
        "RMSE",
        "root mean squared error",
        "target",
        "lower",
        _TEST,
        "Typical distance of the predicted mean from the target. It ignores the uncertainty.",
    ),
    "nll": Metric(
        "NLL",
        "negative log likelihood",
        "nats",
        "lower",
        _TEST,
        "Mean of −log p(target): a proper score that punishes confident mistakes most. For a "
        "regression p is a density in the target's unit, so that the score may be negative and "
        "only compares methods on the same data.",
    ),
    "brier": Metric(
        "Brier",
        "Brier score",
        "",
        "lower",
        _TEST,
        "Mean squared distance of the probabilities from the right class, summed over classes: "
        "0 is perfect, 2 the worst. A proper score that is milder on rare confident mistakes.",
    ),
    "ece": Metric(
        "ECE",
        "expected calibration error",
        "%",
        "lower",
        _TEST,
        "Mean gap between confidence and accuracy over 15 bins of confidence. On small test "
        "splits it is above 0 even for a calibrated method.",
    ),
    "aurc": Metric(
        "AURC",
        "area under the risk–coverage curve",
        "%",
        "lower",
        _TEST,
        "Error rate of the inputs kept when the least certain are left out, averaged over how "
        "many are kept: do mistakes come with a high entropy?",
    ),
    "crps": Metric(
        "CRPS",
        "continuous ranked probability score",
        "target",
        "lower",
        _TEST,
        "Distance of the predictive distribution from the target; the absolute error where "
        "the prediction is certain. A proper score.",
    ),
    "coverage": Metric(
        "coverage",
        "coverage of the 90 % interval",
        "%",
        0.9,
        _TEST,
        "Share of test targets inside the central 90 % interval. Below 90 % the method is "
        "overconfident, above it too cautious.",
    ),
    "width": Metric(
        "width",
        "mean width of the 90 % interval",
        "target",
        None,
        _TEST,
        "How much the central 90 % interval leaves open. Narrower is better only at the same "
        "coverage, so no value is marked.",
    ),
    "interval_score": Metric(
        "int. score",
        "interval score of the 90 % interval",
        "target",
        "lower",
        _TEST,
        "Width plus 20 times the distance by which targets fall outside: weighs narrow "
        "intervals against misses.",
    ),
    "auroc": Metric(
        "AUROC",
        "area under the ROC curve",
        "",
        "higher",
        _OOD,
        "Probability that an input of a held-out class has a higher predictive entropy than a "
        "test input: 0.5 is guessing, 1 perfect.",
    ),
    "aupr": Metric(
        "AUPR",
        "area under the precision–recall curve",
        "",
        "higher",
        _OOD,
        "Average precision when inputs of held-out classes are to be found by their entropy; "
        "guessing gives their share.",
    ),
    "fpr95": Metric(
        "FPR95",
        "false positive rate at 95 % true positives",
        "%",
        "lower",
        _OOD,
        "Share of held-out inputs that are accepted by the entropy threshold that accepts 95 % "
        "of the test inputs.",
    ),
}

# Those of `MethodReport.seconds`, and the memory.
_COSTS: dict[str, Metric] = {
    "train": Metric(
        "train",
        "training time",
        "seconds",
        "lower",
        _COST,
        "Fitting the method. Where it starts from the plain network, that network's training "
        "is not counted again.",
    ),
    "predict": Metric(
        "predict",
        "prediction time",
        "seconds",
        "lower",
        _COST,
        "Predicting the test split with every posterior sample.",
    ),
    "predict_loop": Metric(
        "loop",
        "prediction time of a loop",
        "seconds",
        "lower",
        _COST,
        "The same prediction with one forward pass a sample, one after another.",
    ),
    "memory": Metric(
        "memory",
        "memory of a prediction",
        "bytes",
        "lower",
        _COST,
        "Most memory that the prediction holds at a time, beyond the inputs and the posterior.",
    ),
}


class Cell(NamedTuple):
    """One figure of one method, ready to print.

    Attributes:
        value: mean over seeds, None where the figure does not apply.
        text: the value in the unit and with the decimals of its column; "–" for None.
        spread: standard deviation over seeds, likewise; "" with one seed.
        best: whether no method prints a better value, among two or more.
    """

    value: float | None
    text: str
    spread: str
    best: bool


class Column(NamedTuple):
    """One figure of all methods.

    Attributes:
        name: that of `METRICS`, "train", "predict", "predict_loop" or "memory".
        metric: how to read it.
        unit: what the cells are in: "%", "nats", "ms", "MiB"; "" for plain numbers and for
            the unit of the target.
        cells: one a method.
    """

    name: str
    metric: Metric
    unit: str
    cells: list[Cell]


def columns(methods: Sequence[MethodReport]) -> list[Column]:
    """The comparison as columns: metrics in the order of `METRICS`, then times and memory.

    Args:
        methods: at least one.

    Returns:
        The columns that at least one method fills. The spread over seeds is the sample
        standard deviation.

    Raises:
        ValueError: a figure is not in `METRICS`.
    """
    found = []
    for method in methods:
        if unknown := set(method.metrics) - set(METRICS):
            raise ValueError(
                f"method {method.name!r} has the figure {min(unknown)!r}, expected one of "
                f"{', '.join(METRICS)}"
            )
        found.append({**method.metrics, **method.seconds, "memory": method.memory})
    return [
        _column(name, metric, [figures.get(name) or [] for figures in found])
        for name, metric in (METRICS | _COSTS).items()
        if any(figures.get(name) for figures in found)
    ]


def _column(name: str, metric: Metric, values: list[list[float]]) -> Column:
    means = [statistics.fmean(v) if v else None for v in values]
    sizes = [abs(m) for m in means if m is not None and math.isfinite(m)]
    unit, scale, decimals = _layout(metric, sizes)
    layout = "{:.2e}" if decimals is None else f"{{:.{decimals}f}}"

    def show(value: float) -> str:
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "−∞" if value < 0 else "∞"
        return layout.format(value * scale).replace("-", "−")

    texts = [None if mean is None else show(mean) for mean in means]
    merits = [
        _merit(metric, float(layout.format(mean * scale)), scale)
        if mean is not None and math.isfinite(mean)
        else None
        for mean in means
    ]
    known = [merit for merit in merits if merit is not None]
    cells = [
        Cell(
            value=mean,
            text=text or "–",
            spread=show(statistics.stdev(v)) if len(v) > 1 and all(map(math.isfinite, v)) else "",
            # Compared as printed: figures that print alike are equally good.
            best=len(known) > 1 and merit is not None and merit == max(known),
        )
        for v, mean, text, merit in zip(values, means, texts, merits, strict=True)
    ]
    return Column(name, metric, unit, cells)


def _merit(metric: Metric, shown: float, scale: float) -> float | None:
    """Higher is better; None where the figure alone says nothing."""
    match metric.better:
        case None:
            return None
        case "higher":
            return shown
        case "lower":
            return -shown
        case best:
            # Rounded, since the difference of two printed numbers has a rounding error.
            return -round(abs(shown - best * scale), 9)


def _layout(metric: Metric, sizes: list[float]) -> tuple[str, float, int | None]:
    """Unit, factor and decimals of a column; decimals None for powers of ten."""
    largest, smallest = max(sizes, default=0), min((s for s in sizes if s), default=0)
    match metric.unit:
        case "%":
            return "%", 100, 1
        case "nats" | "":
            return metric.unit, 1, 3
        case "target":
            if largest and not 1e-3 <= largest < 1e6:
                return "", 1, None
            # Three digits of the smallest, at most three decimals beyond those of the largest.
            return "", 1, _decimals(smallest, digits=3, largest=largest)
        case "seconds":
            unit, scale = ("ms", 1e3) if largest < 1 else ("s", 1.0)
        case "bytes":
            unit, scale = ("KiB", 2.0**-10) if largest < 2**20 else ("MiB", 2.0**-20)
    return unit, scale, _decimals(smallest * scale, digits=2, largest=largest * scale)


def _decimals(smallest: float, *, digits: int, largest: float) -> int:
    if not smallest:
        return 0
    wanted = digits - 1 - math.floor(math.log10(smallest))
    return min(max(wanted, 0), max(0, 4 - math.floor(math.log10(largest))))
