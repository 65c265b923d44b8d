"""Runs a cell and puts what was measured into plain data."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from funcbayes import __version__
from funcbayes.cli.bench.jobs import DEFAULT, LOOP, STRATEGIES, Cell, Plan
from funcbayes.cli.bench.timing import Timings, in_turn, one_line

# Seconds a cell, after its warm-up.
BUDGET = 1.5
QUICK_BUDGET = 0.2


def measure(cell: Cell, device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Times all sides of a cell.

    Args:
        cell: what to time.
        device: where it runs.
        quick: few rounds, and of funcbayes the default strategy only.

    Returns:
        `job`, `network`, `batch` and `sides`: for each `seconds` and `ratio` (to the plain
        loop, round by round; above 1 is faster), both with median, quartiles and number of
        rounds; `differs` says how a side's result differs from the plain loop's, and `failed`
        why a side could not run.
    """
    where = {"job": cell.job, "network": cell.network, "batch": cell.batch}
    with _untouched_generators(device):
        try:
            plan = cell.plan()
        except Exception as error:
            return {**where, "sides": {DEFAULT: {"failed": one_line(error)}}}
        sides = {
            name: _finished(call, device)
            for name, call in plan.sides.items()
            if not (quick and name in STRATEGIES)
        }
        timings = in_turn(
            sides,
            budget=QUICK_BUDGET if quick else BUDGET,
            min_rounds=3,
            max_rounds=30,
            secondary=STRATEGIES,
        )
    return {**where, "sides": {name: _side(plan, timings, name) for name in sides}}


@contextlib.contextmanager
def _untouched_generators(device: torch.device) -> Iterator[None]:
    """The loop's dropout draws from torch's global generator: the same masks every time."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        if devices:
            torch.cuda.manual_seed(0)
        yield


def _finished(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call, and on CUDA the wait until its work is done."""
    if device.type != "cuda":
        return call

    def call_and_wait() -> Any:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return call_and_wait


def _side(plan: Plan, timings: Timings, name: str) -> dict[str, Any]:
    if name in timings.failures:
        return {"failed": timings.failures[name]}
    side: dict[str, Any] = {"seconds": timings.of(name).as_data()}
    if name == LOOP or LOOP not in timings.seconds:
        return side
    side["ratio"] = timings.ratio(name, LOOP).as_data()
    difference = plan.differ(timings.outputs[name], timings.outputs[LOOP])
    return side if difference is None else {**side, "differs": difference}


def losses(cells: list[dict[str, Any]]) -> list[str]:
    """Where the default was slower than the plain loop, one sentence each.

    A strategy that someone must ask for by name may be slow; what is chosen may not.
    """
    return [
        f"{_where(cell)}: {_text(cell['sides'][DEFAULT]['ratio'])} times the plain loop's speed"
        for cell in cells
        if is_slower(cell["sides"][DEFAULT])
    ]


def is_slower(side: dict[str, Any]) -> bool:
    """Whether a side was slower than the plain loop, by as many decimals as are shown."""
    return "ratio" in side and round(side["ratio"]["median"], 2) < 1


def complaints(cells: list[dict[str, Any]]) -> list[str]:
    """The sides that failed or computed something else than the plain loop, one sentence each."""
    lines = []
    for cell in cells:
        for name, side in cell["sides"].items():
            if "failed" in side:
                lines.append(f"{_where(cell)}, {name}: could not run: {side['failed']}")
            if "differs" in side:
                lines.append(f"{_where(cell)}, {name}: differs: {side['differs']}")
    return lines


def _where(cell: dict[str, Any]) -> str:
    return f"{cell['job']}, {cell['network']}, batch {cell['batch']}"


def _text(ratio: dict[str, float]) -> str:
    return f"{digits(ratio['median'])} [{digits(ratio['q1'])}–{digits(ratio['q3'])}]"


def digits(number: float) -> str:
    """Three digits and two decimals at most, or all digits before the point."""
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def environment() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    return {
        "funcbayes": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }


def load_average() -> float | None:
    """Programs that ran at once in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
