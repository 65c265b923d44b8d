"""`funcbayes bench`: how fast funcbayes is on this machine, beside plain Python loops.

The sides of a cell are timed in turn in one process, since a machine's clock drifts by more
than what is looked for; ratios are taken round by round; and a side's result is compared with
that of the plain loop.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from funcbayes.cli.bench.jobs import LOOP, NUM_MEMBERS, NUM_SAMPLES, all_cells
from funcbayes.cli.bench.running import complaints, environment, load_average, losses, measure
from funcbayes.cli.errors import UsageError

SCHEMA = 1

_DESCRIPTION = """\
Times prediction with a SWAG posterior and with dropout, the diagonal Fisher and an ensemble's
training step on three small networks, each beside the plain Python loop that does the same: one
forward pass a sample, one gradient a datum, one step a member.

Figures are medians over rounds, with quartiles below: milliseconds for the plain loop, and for
funcbayes how many times faster it is. Below 1 it is slower, and marked so. Let nothing else run
meanwhile.
"""

_EPILOG = """\
examples:
  funcbayes bench
      all cells and strategies; about a minute on two cores
  funcbayes bench --quick --device cpu
      few rounds and the default strategy only, in a quarter of that

what is written to the output folder:
  bench.json        every figure, with the machine and the versions they belong to
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the subcommand's parser its options and its texts."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, and the default strategy only"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto is CUDA where there is a device, else the CPU (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("funcbayes-results"),
        metavar="FOLDER",
        help="where bench.json goes; made if it is not there (default: %(default)s)",
    )


def run(*, quick: bool, device: str, output: Path) -> int:
    """Times all cells, prints a table for each job, and writes `bench.json`.

    Args:
        quick: few rounds, and the default strategy only.
        device: "auto", "cpu" or "cuda".
        output: folder for `bench.json`; made if it is not there.

    Returns:
        The exit code: 0; 1 where a side failed or computed something else than the plain loop;
        130 if Ctrl-C ended it early: what was finished is then written.

    Raises:
        UsageError: there is no CUDA device, or `output` cannot be written to.
        ModuleNotFoundError: an extra is missing; the message says how to install it.
    """
    # Not at the top: `--help` needs no rich.
    from rich.console import Console

    from funcbayes.cli.bench import table

    place = _device(device)
    _make_folder(output)
    console = Console()
    console.print(
        f"{LOOP} in milliseconds, funcbayes as a ratio to it (above 1 is faster): medians with"
        f" quartiles, on {place}.\n",
        highlight=False,
    )
    load = load_average()
    if load and load > (os.cpu_count() or 1) / 2:
        console.print(
            f"Other programs run here (load {load:.1f} on {os.cpu_count()} CPUs): figures may be"
            " far off, for both sides.\n",
            highlight=False,
        )
    start = time.perf_counter()
    cells: list[dict[str, Any]] = []
    complete = False
    with contextlib.suppress(KeyboardInterrupt):
        for _, group in groupby(all_cells(place), lambda cell: cell.job):
            first = len(cells)
            for cell in group:
                cells.append(measure(cell, place, quick=quick))
            console.print(table.render(cells[first:]))
        complete = True
    path = output / "bench.json"
    results = {
        "schema": SCHEMA,
        "complete": complete,
        "environment": {**environment(), "device": _name(place), "load": load},
        "settings": {"quick": quick, "num_samples": NUM_SAMPLES, "num_members": NUM_MEMBERS},
        "slower": losses(cells),
        "complaints": complaints(cells),
        "cells": cells,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    for line in (*_verdict(results), f"{time.perf_counter() - start:.0f} s; all figures: {path}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if not complete:
        return 130
    return 1 if results["complaints"] else 0


def _verdict(results: dict[str, Any]) -> Iterator[str]:
    if results["slower"]:
        yield "Slower than the plain loop by default:"
    elif results["complete"]:
        yield "Nothing that funcbayes does by default was slower than the plain loop."
    yield from (f"  {line}" for line in results["slower"])
    if results["complaints"]:
        yield "Failed, or computed something else than the plain loop:"
    yield from (f"  {line}" for line in results["complaints"])
    if not results["complete"]:
        yield f"Interrupted: finished {len(results['cells'])} cells."


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "argument --device: there is no CUDA device here: leave it out, or say cpu"
        )
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        taken = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "is a file" if taken else f"cannot be made ({error.strerror})"
        raise UsageError(
            f"argument --output: '{error.filename}' {reason}, expected a folder: name another one"
        ) from error
    if not os.access(output, os.W_OK):
        raise UsageError(f"argument --output: '{output}' cannot be written to: name another folder")
