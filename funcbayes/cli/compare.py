"""`funcbayes compare`: every method on one data set, in one table."""

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcbayes import __version__
from funcbayes.cli import table
from funcbayes.cli.data import DATA, Splits
from funcbayes.cli.errors import UsageError
from funcbayes.cli.methods import LIKELIHOOD, METHODS, Fitted, Task
from funcbayes.cli.networks import SmallConvNet
from funcbayes.core import random
from funcbayes.core.random import Key
from funcbayes.evaluation import metrics, plots
from funcbayes.extras import needs_extra
from funcbayes.posteriors import Empirical
from funcbayes.prediction import Predictive, predict

with needs_extra("report"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Configuration(NamedTuple):
    """What determines the figures.

    Attributes:
        data: name of the data set.
        methods: names of the methods, without the plain network.
        samples: posterior samples a prediction.
        seed: of splits, weights and draws.
        epochs: passes over the training split.
        ood_classes: classes held out of the training.
    """

    data: str
    methods: tuple[str, ...]
    samples: int
    seed: int
    epochs: int
    ood_classes: tuple[int, ...]


class Evaluation(NamedTuple):
    """One method's part of the report.

    Attributes:
        figures: what goes into `results.json`.
        probs: predictive probabilities of the test split, `[images, classes]`.
        in_scores: predictive entropy of each test image.
        out_scores: predictive entropy of each held-out image.
    """

    figures: dict[str, Any]
    probs: Tensor
    in_scores: Tensor
    out_scores: Tensor


def run(configuration: Configuration, *, output: Path) -> int:
    """Trains, predicts, and writes the report.

    Args:
        configuration: what to compare.
        output: folder for `results.json` and the pictures.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; what was finished is then written.

    Raises:
        UsageError: the held-out classes do not fit the data, or `output` cannot be written.
    """
    key = random.key(configuration.seed)
    try:
        data = DATA[configuration.data](
            ood_classes=configuration.ood_classes, key=random.fold_in(key, 0)
        )
    except ValueError as error:
        raise UsageError(f"argument --ood-classes: {error}") from error
    _make_folder(output)

    console = Console()
    console.print(
        f"[bold]{configuration.data}[/]: {len(data.train.targets)} images train, "
        f"{len(data.validation.targets)} validate, {len(data.test.targets)} test; held out: "
        f"{len(data.ood)} of class {', '.join(map(str, configuration.ood_classes))}",
        highlight=False,
    )
    done: dict[str, Evaluation] = {}
    complete = False
    # Ctrl-C ends the loop and not the report: what is finished is worth a table and pictures.
    with contextlib.suppress(KeyboardInterrupt):
        for name, evaluation in _evaluations(configuration, data, key):
            done[name] = evaluation
            _write_json(output / "results.json", _report(configuration, data, done))
        complete = True
    if done:
        console.print(table.render({name: e.figures for name, e in done.items()}))
        _draw(output, data, done)
        written = ", ".join(sorted(path.name for path in output.iterdir()))
        console.print(f"[bold]{output}[/]: {written}", highlight=False, soft_wrap=True)
    if not complete:
        console.print(
            f"Interrupted: finished {len(done)} of {1 + len(configuration.methods)} methods.",
            highlight=False,
        )
    return 0 if complete else 130


def _evaluations(
    configuration: Configuration, data: Splits, key: Key
) -> Iterator[tuple[str, Evaluation]]:
    """Fits and evaluates the plain network, then each method."""

    def make_net() -> SmallConvNet:
        return SmallConvNet(len(data.classes))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.seed(random.fold_in(key, 1)))
        net = make_net()
    names = ("plain", *configuration.methods)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with progress:
        bars = {name: progress.add_task(name, total=None, start=False) for name in names}
        for name in names:
            bar = bars[name]
            progress.start_task(bar)
            # By its place in the table of all methods: leaving one out does not move another.
            method_key = random.fold_in(random.fold_in(key, 2), list(METHODS).index(name))
            fit_key, predict_key = random.split(method_key)

            def begin(total: int, bar: Any = bar) -> None:
                progress.update(bar, total=total)

            def tick(*_: object, bar: Any = bar) -> None:
                progress.advance(bar)

            task = Task(
                data=data,
                make_net=make_net,
                net=net,
                epochs=configuration.epochs,
                num_samples=configuration.samples,
                key=fit_key,
                begin=begin,
                tick=tick,
            )
            start = time.perf_counter()
            with _one_thread():
                fitted = METHODS[name](task)
            seconds = time.perf_counter() - start
            yield name, _evaluate(fitted, data, predict_key, train_seconds=seconds)
            progress.stop_task(bar)


def _evaluate(fitted: Fitted, data: Splits, key: Key, *, train_seconds: float) -> Evaluation:
    def predictive(images: Tensor, strategy: Any = "auto") -> Predictive:
        return predict(
            fitted.model,
            fitted.posterior,
            images,
            key=key,
            num_samples=fitted.num_samples,
            likelihood=LIKELIHOOD,
            strategy=strategy,
        )

    images, targets = data.test
    test, ood = predictive(images), predictive(data.ood)
    fit = metrics.classification(test.mean, targets)
    by_entropy = metrics.detection(test.entropy, ood.entropy)
    # One network knows no difference of opinion; what is left is rounding.
    single = isinstance(fitted.posterior, Empirical) and fitted.posterior.num_members == 1
    by_information = (
        None
        if single
        else metrics.detection(test.mutual_information, ood.mutual_information)._asdict()
    )
    figures = {
        "metrics": {**fit._asdict(), **by_entropy._asdict()},
        "metrics_of_mutual_information": by_information,
        "choices": fitted.choices,
        "seconds": {
            "train": train_seconds,
            "predict": _seconds(lambda: predictive(images)),
            "predict_loop": _seconds(lambda: predictive(images, "loop")),
        },
    }
    return Evaluation(figures, test.mean, test.entropy, ood.entropy)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Trains on one core, so that the figures do not depend on how many there are.

    Layers as small as these gain nothing by a second thread, and lose much by one that
    waits for a busy core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Any, *, repeats: int = 3) -> float:
    """Median time of a call that has run before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _make_folder(output: Path) -> None:
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


def _report(
    configuration: Configuration, data: Splits, done: dict[str, Evaluation]
) -> dict[str, Any]:
    return {
        "configuration": configuration._asdict(),
        "data": {
            "classes": data.classes,
            "train": len(data.train.targets),
            "validation": len(data.validation.targets),
            "test": len(data.test.targets),
            "out_of_distribution": len(data.ood),
        },
        "versions": {
            "funcbayes": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scikit-learn", "torchmetrics")},
        },
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "methods": {name: evaluation.figures for name, evaluation in done.items()},
    }


def _write_json(path: Path, report: dict[str, Any]) -> None:
    # In one step, so that an interrupt leaves the old file or the new one, never half of it.
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(path)


def _draw(output: Path, data: Splits, done: dict[str, Evaluation]) -> None:
    predictions = {name: (e.probs, data.test.targets) for name, e in done.items()}
    scores = {name: (e.in_scores, e.out_scores) for name, e in done.items()}
    largest = torch.tensor(float(len(data.classes))).log().item()
    plots.reliability_diagrams(predictions).savefig(output / "reliability.png")
    plots.ood_histograms(scores, upper=largest).savefig(output / "ood.png")
