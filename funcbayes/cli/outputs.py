"""The files that `funcbayes compare` writes, each in one step.

`results.json` holds, as JSON without NaN (null stands for it):

- `command`: the command line that makes the same figures; `configuration`: its options;
  `complete`: whether all methods and seeds are there; `created`: when, ISO 8601.
- `task`, `seeds`, and `data`: name, rows of each split, classes, features, notes.
- `versions` and `machine`.
- `methods`: from a name to `metrics`, `metrics_of_mutual_information` (out-of-distribution
  figures with mutual information as the score in place of entropy), `seconds` and `memory`,
  each figure as `{"values": one a seed, "mean": …, "std": …}` (sample standard deviation,
  null for one seed), and `choices`: one dictionary a seed of what the validation split chose.
  Metrics are those of `funcbayes.evaluation.report.METRICS`, as fractions, nats or units of
  the target; `seconds` has `train`, `predict` and, where weights are sampled, `predict_loop`;
  `memory` is in bytes.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from funcbayes.cli.config import Configuration
from funcbayes.cli.errors import UsageError
from funcbayes.evaluation import plots
from funcbayes.evaluation.report import Prediction, Report, write_html
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.figure import Figure


def make_folder(output: Path) -> None:
    """Makes the folder, and those above it.

    Raises:
        UsageError: it is a file, or cannot be made or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"argument --output: '{error.filename}' is a file, expected a folder: name another one"
        ) from error
    except OSError as error:
        raise UsageError(
            f"argument --output: '{output}' cannot be made ({error.strerror}): name another folder"
        ) from error
    if not os.access(output, os.W_OK):
        raise UsageError(f"argument --output: '{output}' cannot be written to: name another folder")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step, so that an interrupt leaves the old one or the new one."""
    _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(
    path: Path,
    report: Report,
    configuration: Configuration,
    by_information: Mapping[str, Mapping[str, list[float]]],
) -> None:
    """Writes `results.json`.

    Args:
        path: where.
        report: what was finished.
        configuration: what was asked for.
        by_information: for each method its figures with mutual information as the score.
    """
    content = {
        "command": report.command,
        "complete": report.complete,
        "created": report.created,
        "configuration": configuration._asdict(),
        "task": report.task,
        "seeds": report.seeds,
        "data": report.data,
        "versions": report.versions,
        "machine": report.machine,
        "methods": {
            method.name: {
                "metrics": _summaries(method.metrics),
                "metrics_of_mutual_information": _summaries(by_information[method.name]),
                "seconds": _summaries(method.seconds),
                "memory": _summary(method.memory),
                "choices": method.choices,
            }
            for method in report.methods
        },
    }
    write_text(path, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def write_report(output: Path, report: Report) -> list[str]:
    """Writes `report.html` and the pictures that the data have.

    Args:
        output: the folder.
        report: with at least one method.

    Returns:
        The names of the files.
    """
    write_html(output / "report.html", report)
    written = ["report.html"]
    finite = {m.label: m.prediction for m in report.methods if _is_finite(m.prediction)}
    for name, draw in _pictures(report, finite) if finite else ():
        figure = draw()
        _replace(output / name, lambda part, figure=figure: figure.savefig(part, format="png"))
        written.append(name)
    return written


def _pictures(
    report: Report, found: dict[str, Prediction]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    surfaces = {name: p.surface for name, p in found.items() if p.surface is not None}
    inputs = next((s.points.shape[1] for s in surfaces.values()), 0)
    names = [*report.data["features"], "", ""]
    target = report.data.get("target") or "target"
    if report.task == "classification":
        probs = {name: (p.mean, p.targets) for name, p in found.items()}
        yield "reliability.png", lambda: plots.reliability_diagrams(probs)
        ood = {n: (p.total, p.ood_total) for n, p in found.items() if p.ood_total is not None}
        if ood:
            largest = math.log(len(report.data["classes"]))
            yield "ood.png", lambda: plots.ood_histograms(ood, upper=largest)
        if inputs == 2:
            upper = math.log(len(report.data["classes"]))
            yield (
                "uncertainty.png",
                lambda: plots.uncertainty_maps(
                    surfaces,
                    report.points,
                    upper=upper,
                    names=(names[0], names[1]),
                    classes=report.data["classes"],
                ),
            )
        return
    moments = {name: (p.mean, p.total, p.targets) for name, p in found.items()}
    yield "predictions.png", lambda: plots.observed_against_predicted(moments, label=target)
    yield "intervals.png", lambda: plots.interval_coverage_curves(moments)
    points = report.points
    if inputs == 1 and points is not None:
        labels = (names[0], target)
        yield "uncertainty.png", lambda: plots.regression_bands(surfaces, points, labels=labels)
    elif inputs == 2:
        yield (
            "uncertainty.png",
            lambda: plots.uncertainty_maps(
                surfaces, points, label=target, names=(names[0], names[1])
            ),
        )


def _is_finite(prediction: Prediction) -> bool:
    tensors = (*prediction[:5], *(prediction.surface or ()))
    return all(bool(x.isfinite().all()) for x in tensors if x is not None)


def _summaries(figures: Mapping[str, list[float]]) -> dict[str, Any]:
    return {name: _summary(values) for name, values in figures.items()}


def _summary(values: list[float]) -> dict[str, Any]:
    finite = all(map(math.isfinite, values))
    return {
        "values": values,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 and finite else None,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return value


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise UsageError(
            f"argument --output: '{path}' cannot be written ({error.strerror}): make room, or name "
            "another folder"
        ) from error
    finally:
        # After an interrupt or a full disk; otherwise it is gone already.
        part.unlink(missing_ok=True)
