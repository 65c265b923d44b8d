"""`funcbayes compare`: every method on one data set, in one table and one report."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funcbayes import __version__
from funcbayes.cli import data as datasets
from funcbayes.cli import methods, networks, outputs, table
from funcbayes.cli.config import Configuration, command_line, to_toml
from funcbayes.cli.data import Labelled, Splits
from funcbayes.cli.errors import UsageError
from funcbayes.cli.evaluate import Evaluation, evaluate
from funcbayes.cli.methods import STREAMS, Task
from funcbayes.cli.recipes import default_epochs
from funcbayes.core import random
from funcbayes.core.batching import is_out_of_memory
from funcbayes.core.random import Key
from funcbayes.evaluation.report import MethodReport, Points, Report
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

_LABELS = {
    "plain": "plain",
    "swag": "SWAG",
    "laplace": "Laplace",
    "laplace-head": "Laplace head",
    "laplace-diagonal": "Laplace diag.",
    "laplace-kronecker": "Laplace Kron.",
    "vi": "VI",
    "dropout": "dropout",
    "ensemble": "ensemble",
}
_PACKAGES = ("torch", "numpy", "pandas", "scikit-learn", "scipy", "torchmetrics")


def run(configuration: Configuration, *, output: Path) -> int:
    """Trains, predicts, and writes figures, pictures and the report.

    Args:
        configuration: what to compare.
        output: folder for the files.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; what was finished is then written.

    Raises:
        UsageError: an argument or the data do not fit, training diverged, or memory ran out;
            what was finished until then is written.
    """
    configuration = configuration._replace(device=str(_device(configuration.device)))
    data = _load(configuration, configuration.seed)
    if configuration.epochs is None:
        configuration = configuration._replace(epochs=default_epochs(data))
    _check_memory(configuration, data)
    outputs.make_folder(output)
    outputs.write_text(output / "config.toml", to_toml(configuration))

    console = Console()
    _introduce(console, configuration, data)
    done: dict[str, list[Evaluation]] = {}
    complete, failure = False, None

    def report() -> Report:
        return _report(configuration, data, done, output, complete=complete)

    def write_figures() -> None:
        by_information = {name: _gathered(done[name], _by_information) for name in done}
        path = output / "results.json"
        outputs.write_json(path, report(), configuration, by_information)

    def add(name: str, evaluation: Evaluation) -> None:
        done.setdefault(name, []).append(evaluation)
        write_figures()

    # Ctrl-C or an error ends the work and not the report: what is finished is worth one.
    try:
        _evaluate_all(configuration, data, add)
        complete = True
    except KeyboardInterrupt:
        pass
    except UsageError as error:
        failure = error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and "not enough memory" not in str(error):
            raise
        failure = UsageError(
            f"memory ran out with --samples {configuration.samples} on "
            f"{configuration.device}: pass fewer"
        )
    if done:
        write_figures()
        for part in table.render(report().methods):
            console.print(part)
        written = outputs.write_report(output, report())
        names = ", ".join(("results.json", "config.toml", *written))
        console.print(Text.assemble((str(output), "bold"), f": {names}"), soft_wrap=True)
    if failure is not None:
        raise failure
    if not complete:
        finished = sum(map(len, done.values()))
        wanted = configuration.seeds * (1 + len(configuration.methods))
        what = "methods" if configuration.seeds == 1 else "runs, one a method and seed"
        console.print(f"Interrupted: finished {finished} of {wanted} {what}.", highlight=False)
    return 0 if complete else 130


def _evaluate_all(
    configuration: Configuration, first: Splits, add: Callable[[str, Evaluation], None]
) -> None:
    """Goes through the seeds, and for each through the plain network and the methods."""
    names = ("plain", *configuration.methods)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with progress, _repeatable(configuration.device):
        bars = {name: progress.add_task(_LABELS[name], total=None, start=False) for name in names}
        for number in range(configuration.seeds):
            seed = configuration.seed + number
            for name, bar in bars.items():
                of_all = f", seed {seed}" if configuration.seeds > 1 else ""
                progress.reset(bar, start=False, total=None, description=_LABELS[name] + of_all)
            data = first if number == 0 else _load(configuration, seed)
            task = _task(configuration, data, random.key(seed))
            for name, bar in bars.items():
                progress.start_task(bar)
                # By a number of its own: leaving one out does not move another.
                method_key = random.fold_in(task.key, STREAMS[name])
                fit_key, predict_key = random.split(method_key)

                def begin(total: int, bar: Any = bar) -> None:
                    progress.update(bar, total=total)

                def tick(*_: object, bar: Any = bar) -> None:
                    progress.advance(bar)

                start = time.perf_counter()
                with _one_thread():
                    fitted = methods.fit(name, task._replace(key=fit_key, begin=begin, tick=tick))
                seconds = time.perf_counter() - start
                # A candidate that diverged has left steps out.
                steps = progress.tasks[bar].total or 1
                progress.update(bar, total=steps, completed=steps)
                add(name, evaluate(fitted, task.data, predict_key, train_seconds=seconds))
                if name == "plain":
                    # The others take over what was chosen for it.
                    task = task._replace(
                        weight_decay=fitted.choices["weight_decay"], likelihood=fitted.likelihood
                    )


def _load(configuration: Configuration, seed: int) -> Splits:
    data = datasets.load(
        configuration.data,
        target=configuration.target,
        task=configuration.task,
        ood_classes=configuration.ood_classes,
        key=random.fold_in(random.key(seed), 0),
    )
    device = torch.device(configuration.device)

    def moved(part: Labelled) -> Labelled:
        return Labelled(part.inputs.to(device), part.targets.to(device))

    return data._replace(
        train=moved(data.train),
        validation=moved(data.validation),
        test=moved(data.test),
        ood=None if data.ood is None else data.ood.to(device),
        grid=None if data.grid is None else data.grid.to(device),
    )


def _task(configuration: Configuration, data: Splits, key: Key) -> Task:
    """What the plain network starts from; its key is the parent of every method's."""

    def make_net() -> nn.Module:
        return networks.make(data).to(data.train.inputs.device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.seed(random.fold_in(key, 1)))
        net = make_net()
    assert configuration.epochs is not None
    return Task(
        data=data,
        make_net=make_net,
        net=net,
        weight_decay=0.0,
        likelihood=methods.likelihood_for(data),
        epochs=configuration.epochs,
        num_samples=configuration.samples,
        key=random.fold_in(key, 2),
        begin=lambda total: None,
        tick=lambda *_: None,
    )


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


def _repeatable(device: str) -> contextlib.AbstractContextManager[None]:
    """On CUDA, convolutions by algorithms that give the same sums every time."""
    if torch.device(device).type == "cpu":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True
    )


def _device(name: str) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if found else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        there = f"there are {found} CUDA devices, numbered from 0" if found else "there is no CUDA"
        raise UsageError(f"argument --device: it is '{name}', but {there}: pass --device cpu")
    return device


def _check_memory(configuration: Configuration, data: Splits) -> None:
    """Refuses more samples than can be kept, where a method keeps them all."""
    with torch.random.fork_rng(devices=[]):
        net = networks.make(data)
    # SWAG keeps its samples where each gets batch-norm statistics of its own.
    if "swag" not in configuration.methods or not list(net.buffers()):
        return
    one = sum(4 * parameter.numel() for parameter in net.parameters())
    device = torch.device(configuration.device)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    # Half: the noise of the draws takes as much again while they are made.
    most = int(there / 2 / one)
    if configuration.samples > most:
        needed = configuration.samples * one / 2**30
        raise UsageError(
            f"argument --samples: it is {configuration.samples}, and SWAG would keep as many "
            f"networks, {needed:.1f} GiB of memory: pass at most {most}, or other methods by "
            "--method"
        )


def _introduce(console: Console, configuration: Configuration, data: Splits) -> None:
    rows = _rows(data)
    kind = "rows" if data.features else "images"
    held_out = ""
    if data.ood is not None:
        names = ", ".join(configuration.ood_classes or ())
        held_out = f"; held out: {rows['held out']}" + (f" of {names}" if names else "")
    console.print(
        Text.assemble(
            (data.name, "bold"),
            f", {data.task}: {rows['train']} {kind} train, {rows['validation']} validate, "
            f"{rows['test']} test{held_out}; on {configuration.device}",
        )
    )
    for note in data.notes:
        console.print(Text(note, style="dim"))


def _rows(data: Splits) -> dict[str, int]:
    rows = {
        "train": len(data.train.targets),
        "validation": len(data.validation.targets),
        "test": len(data.test.targets),
    }
    return rows if data.ood is None else {**rows, "held out": len(data.ood)}


def _report(
    configuration: Configuration,
    data: Splits,
    done: dict[str, list[Evaluation]],
    output: Path,
    *,
    complete: bool,
) -> Report:
    device = torch.device(configuration.device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return Report(
        task=data.task,
        data={
            "name": data.name,
            "rows": _rows(data),
            "classes": list(data.classes),
            "features": list(data.features),
            "target": configuration.target,
            "notes": list(data.notes),
        },
        command=command_line(configuration, output),
        seeds=[configuration.seed + i for i in range(configuration.seeds)],
        complete=complete,
        methods=[
            MethodReport(
                name=method,
                label=_LABELS[method],
                metrics=_gathered(evaluations, lambda e: e.metrics),
                seconds=_gathered(evaluations, lambda e: e.seconds),
                memory=[e.memory for e in evaluations],
                choices=[e.choices for e in evaluations],
                prediction=evaluations[0].prediction,
            )
            for method, evaluations in done.items()
        ],
        points=_points(data),
        versions={
            "funcbayes": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        machine={
            "platform": platform.platform(),
            "device": f"{configuration.device}, {name}",
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _points(data: Splits) -> Points | None:
    """The training data in their own units, where they can be drawn."""
    if data.grid is None or data.input_mean is None or data.input_std is None:
        return None
    inputs = data.train.inputs.cpu() * data.input_std + data.input_mean
    targets = data.train.targets.cpu()
    if data.task == "regression":
        targets = targets.double() * data.target_std + data.target_mean
    return Points(inputs, targets)


def _by_information(evaluation: Evaluation) -> dict[str, float]:
    return evaluation.metrics_of_mutual_information


def _gathered(
    evaluations: list[Evaluation], figures: Callable[[Evaluation], dict[str, float]]
) -> dict[str, list[float]]:
    """One list a figure, with one value a seed."""
    return {name: [figures(e)[name] for e in evaluations] for name in figures(evaluations[0])}
