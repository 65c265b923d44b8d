"""What a report is made of."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

from funcbayes.evaluation.plots import Points, Surface


class Prediction(NamedTuple):
    """What one method predicts on the test split of the first seed.

    Attributes:
        targets: class indices, or targets in their own units, `[test]`.
        mean: probabilities `[test, classes]`, or means in units of the target `[test]`.
        total: predictive entropy in nats, or standard deviation of a new target, `[test]`.
        epistemic: mutual information in nats, or standard deviation of the mean, `[test]`.
        ood_total: predictive entropy of the held-out inputs `[held out]`, None without them.
        surface: predictions over a grid, None for more than two inputs.
    """

    targets: Tensor
    mean: Tensor
    total: Tensor
    epistemic: Tensor
    ood_total: Tensor | None
    surface: Surface | None


class MethodReport(NamedTuple):
    """One method's part of the report.

    Attributes:
        name: short name, as on the command line: "swag".
        label: name for readers: "SWAG".
        metrics: from a name of `METRICS` to one value a seed, as fractions and not percent;
            a metric that does not apply is absent.
        seconds: "train", "predict" and "predict_loop", one value a seed each.
        memory: peak bytes that one prediction allocates, one value a seed.
        choices: what the validation split chose, one dictionary a seed.
        prediction: of the first seed.
    """

    name: str
    label: str
    metrics: dict[str, list[float]]
    seconds: dict[str, list[float]]
    memory: list[float]
    choices: list[dict[str, Any]]
    prediction: Prediction


class Report(NamedTuple):
    """All that the HTML file shows.

    Attributes:
        task: "classification" or "regression".
        data: "name" (str), "rows" (dict from the name of a split to its number of rows),
            "classes" (labels as text), "features" (names, none for images), "target" (its
            name, may be absent) and "notes" (sentences on what was guessed, dropped,
            standardised or encoded).
        command: the command line that makes this report again.
        seeds: the seeds that were asked for.
        complete: whether every method and seed was run.
        methods: in the order to show.
        points: training data for data with one or two inputs, otherwise None.
        versions: from package to version.
        machine: from property to value.
        created: date and time, ISO 8601.
    """

    task: Literal["classification", "regression"]
    data: dict[str, Any]
    command: str
    seeds: list[int]
    complete: bool
    methods: list[MethodReport]
    points: Points | None
    versions: dict[str, str]
    machine: dict[str, Any]
    created: str
