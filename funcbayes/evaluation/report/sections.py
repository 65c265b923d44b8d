"""The pictures of a report, with the words that go with them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from funcbayes.evaluation import metrics, plots
from funcbayes.evaluation.plots import Points, Surface
from funcbayes.evaluation.plots.style import MARKERS
from funcbayes.evaluation.report import svg
from funcbayes.evaluation.report.content import Prediction, Report


class Picture(NamedTuple):
    """One picture.

    Attributes:
        label: the method's, "" where all are in one picture.
        note: its figure, beside the label.
        alt: what it shows, in words.
        image: the picture.
    """

    label: str
    note: str
    alt: str
    image: svg.Image


class Section(NamedTuple):
    """Pictures of one kind.

    `legend` holds (kind of the swatch, its colour, text) or, where the swatch is a character,
    ("", character, text).
    """

    anchor: str
    title: str
    reading: str
    legend: list[tuple[str, str, str]]
    wide: bool
    pictures: list[Picture]


def sections(report: Report) -> Iterator[Section]:
    """The pictures that fit the task and the inputs, of methods with finite predictions.

    Args:
        report: what to show.
    """
    predictions = {m.label: m.prediction for m in report.methods if is_finite(m.prediction)}
    if not predictions:
        return
    surfaces = {name: p.surface for name, p in predictions.items() if p.surface is not None}
    inputs = {surface.points.shape[1] for surface in surfaces.values()}
    if report.task == "classification":
        if inputs == {2}:
            yield _maps(report, surfaces)
        yield _reliability(predictions)
        if any(p.ood_total is not None for p in predictions.values()):
            yield _detection(predictions)
        yield _risk_coverage(predictions)
    else:
        if inputs == {1} and report.points is not None:
            yield _bands(report, surfaces)
        elif inputs == {2}:
            yield _maps(report, surfaces)
        moments = {name: (p.mean, p.total, p.targets) for name, p in predictions.items()}
        if inputs != {1}:
            yield _observed(report, moments)
        yield _interval_coverage(moments)


def is_finite(prediction: Prediction) -> bool:
    """Whether training did not diverge: what did has figures in the table, and no pictures."""
    tensors = (*prediction[:5], *(prediction.surface or ()))
    return all(bool(x.isfinite().all()) for x in tensors if x is not None)


def _reliability(predictions: dict[str, Prediction]) -> Section:
    pairs = {name: (p.mean, p.targets) for name, p in predictions.items()}
    pictures = []
    for name, (probs, targets) in pairs.items():
        error = f"{100 * metrics.expected_calibration_error(probs, targets):.1f} %"
        confidence = f"{100 * float(probs.max(-1).values.double().mean()):.1f} %"
        accuracy = f"{100 * metrics.accuracy(probs, targets):.1f} %"
        alt = (
            f"Reliability diagram of {name}: mean confidence {confidence}, accuracy {accuracy}, "
            f"expected calibration error {error}."
        )
        figure = plots.reliability_diagrams(pairs, panel=name)
        pictures.append(Picture(name, f"ECE {error}", alt, svg.image(figure)))
    return Section(
        anchor="calibration",
        title="Calibration",
        reading="Test predictions are gathered by their confidence. A bar is as high as the "
        "share of them that is right, and the hatching reaches to their mean confidence: "
        "hatching above a bar is overconfidence, hatching inside it is excess caution. Below "
        "is the share of the predictions in each bin; a bin with few of them says little.",
        legend=[
            ("bar", "blue", "accuracy of the bin"),
            ("hatch", "vermilion", "gap to its confidence"),
            ("dashes", "muted", "calibrated"),
        ],
        wide=False,
        pictures=pictures,
    )


def _detection(predictions: dict[str, Prediction]) -> Section:
    scores = {n: (p.total, p.ood_total) for n, p in predictions.items() if p.ood_total is not None}
    classes = next(iter(predictions.values())).mean.shape[1]
    pictures = []
    for name, pair in scores.items():
        found = metrics.detection(*pair)
        note = f"AUROC {found.auroc:.3f}, FPR95 {100 * found.fpr95:.1f} %"
        medians = [f"{float(part.double().median()):.2f}" for part in pair]
        alt = (
            f"Histograms of the predictive entropy of {name}: median {medians[0]} nats on test "
            f"inputs, {medians[1]} nats on held-out classes; {note}."
        )
        figure = plots.ood_histograms(scores, upper=math.log(classes), panel=name)
        pictures.append(Picture(name, note, alt, svg.image(figure)))
    return Section(
        anchor="ood",
        title="Out-of-distribution detection",
        reading="Predictive entropy of test inputs and of inputs whose class was held out of "
        "the training. The less the two histograms overlap, the better the entropy tells what "
        "the network has never seen. The vertical axis is a square root, so that a tail shows "
        "beside a peak; the horizontal axis ends at the entropy of a uniform guess.",
        legend=[
            ("bar", "blue", "test inputs"),
            ("hatch", "vermilion", "held-out classes"),
        ],
        wide=False,
        pictures=pictures,
    )


def _risk_coverage(predictions: dict[str, Prediction]) -> Section:
    pairs = {n: (p.total, p.mean.argmax(-1) != p.targets) for n, p in predictions.items()}
    areas = (f"{name} {100 * metrics.aurc(*pair):.2f} %" for name, pair in pairs.items())
    return Section(
        anchor="selective",
        title="Error rate when uncertain inputs are left out",
        reading="Test inputs are sorted by predictive entropy, and only the most certain share "
        "is kept. At the right end everything is kept: that is the error rate. The faster a "
        "line falls to the left, the better the entropy points at mistakes; among few inputs "
        "one mistake makes a jump.",
        legend=[],
        wide=True,
        pictures=[
            Picture(
                label="",
                note="",
                alt=f"Risk–coverage curves. Area under each: {', '.join(areas)}.",
                image=svg.image(plots.risk_coverage_curves(pairs)),
            )
        ],
    )


def _interval_coverage(moments: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Section:
    at_90 = (
        f"{name} {100 * float(((y - mean).abs() <= 1.6449 * std).double().mean()):.0f} %"
        for name, (mean, std, y) in moments.items()
    )
    return Section(
        anchor="intervals",
        title="Calibration of the intervals",
        reading="For each level, the share of test targets that the central interval of that "
        "level holds, less the level. On the dashed line a 90 % interval holds 90 % of the "
        "targets; above it intervals are too wide, below it too narrow. Inside the grey band "
        "the difference may be chance: it holds 95 % of what a calibrated method would show on "
        "as many data.",
        legend=[("bar", "grey", "chance"), ("dashes", "muted", "calibrated")],
        wide=True,
        pictures=[
            Picture(
                label="",
                note="",
                alt="Coverage of central intervals less their level. Targets inside the 90 % "
                f"interval: {', '.join(at_90)}.",
                image=svg.image(plots.interval_coverage_curves(moments)),
            )
        ],
    )


def _observed(report: Report, moments: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Section:
    target = report.data.get("target") or "target"
    pictures = []
    for name, (mean, std, targets) in moments.items():
        figure = plots.observed_against_predicted(moments, label=target, panel=name)
        inside = float(((targets - mean).abs() <= 1.6449 * std).double().mean())
        note = f"{100 * inside:.0f} % inside"
        alt = f"Observed against predicted {target} of {name}: {note} the 90 % interval."
        pictures.append(Picture(name, note, alt, svg.image(figure)))
    return Section(
        anchor="observed",
        title="Observed against predicted",
        reading="Each test datum at its predicted mean and its observed target, with the "
        "central 90 % interval of the prediction. An interval that does not reach the diagonal "
        "misses its target: that should happen to one datum in ten, and intervals should be "
        "long where the errors are large. Of more than 200 data, 200 are drawn.",
        legend=[
            ("dot", "blue", "inside its 90 % interval"),
            ("", "✖", "outside"),
            ("dashes", "muted", "exact"),
        ],
        wide=False,
        pictures=pictures,
    )


def _bands(report: Report, surfaces: dict[str, Surface]) -> Section:
    assert report.points is not None
    points = _thinned(report.points)
    labels = (_feature(report, 0), report.data.get("target") or "target")
    pictures = []
    for name, surface in surfaces.items():
        figure = plots.regression_bands(surfaces, points, labels=labels, panel=name)
        widest = float(surface.points[surface.epistemic.argmax(), 0])
        alt = (
            f"Mean of {name} over {labels[0]} with 90 % bands. The epistemic standard deviation "
            f"runs from {float(surface.epistemic.min()):.3g} to "
            f"{float(surface.epistemic.max()):.3g}, the largest at {labels[0]} = {widest:.3g}."
        )
        pictures.append(Picture(name, "", alt, svg.image(figure)))
    return Section(
        anchor="bands",
        title="Predictions over the input",
        reading="The inner band holds the mean with 90 % probability: it shows what the "
        "network does not know, and should open where there are no data. The outer band holds "
        "a new target; it adds the noise of the data.",
        legend=[
            ("line", "blue", "mean"),
            ("inner", "blue", "epistemic"),
            ("band", "blue", "total"),
            ("dot", "ink", "training data"),
        ],
        wide=False,
        pictures=pictures,
    )


def _maps(report: Report, surfaces: dict[str, Surface]) -> Section:
    points = None if report.points is None else _thinned(report.points)
    is_classification = report.task == "classification"
    classes = report.data["classes"] if is_classification else ()
    unit = "nats" if is_classification else "std"
    pictures = []
    for name, surface in surfaces.items():
        figure = plots.uncertainty_maps(
            surfaces,
            points,
            label=unit,
            upper=math.log(surface.mean.shape[1]) if is_classification else None,
            names=(_feature(report, 0), _feature(report, 1)),
            classes=classes,
            panel=name,
        )
        alt = (
            f"Maps of the uncertainty of {name}: total up to {float(surface.total.max()):.2g}, "
            f"epistemic up to {float(surface.epistemic.max()):.2g} {unit}."
        )
        pictures.append(Picture(name, "", alt, svg.image(figure)))
    meaning = (
        "predictive entropy on the left, its epistemic part (mutual information) on the right. "
        "The white line is where the most probable class changes"
        if is_classification
        else "standard deviation of a new target on the left, of its mean (epistemic) on the right"
    )
    return Section(
        anchor="maps",
        title="Uncertainty over the inputs",
        reading=f"Dark is certain, bright is uncertain: {meaning}. The total should be bright "
        "where the data are ambiguous, the epistemic part where there are none. All maps have "
        "one colour scale.",
        legend=[("", MARKERS[i % len(MARKERS)][1], c) for i, c in enumerate(classes)],
        wide=False,
        pictures=pictures,
    )


def _thinned(points: Points, limit: int = 300) -> Points:
    """At most `limit` of the data, evenly: more would hide the picture and fill the file."""
    step = math.ceil(len(points.inputs) / limit)
    return Points(points.inputs[::step], points.targets[::step])


def _feature(report: Report, index: int) -> str:
    features = report.data.get("features") or ()
    return features[index] if index < len(features) else f"input {index + 1}"
