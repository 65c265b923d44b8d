"""Runs a cell and puts what was measured into plain data."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import floor_of, goals_of, rival_floor_of
from benchmarks.memory import peak_memory
from benchmarks.models import Setting
from benchmarks.plans import FUNCTION, OURS, STRATEGIES, Cell, Plan
from funcbayes.cli.bench.timing import Timings, in_turn, one_line

ROOT = Path(__file__).resolve().parent.parent


def run(
    cell: Cell, device: torch.device, *, quick: bool = False, toy: bool = False
) -> dict[str, Any]:
    """Times all sides of a cell on a device, which must be the current one: the clock waits for it.

    Returns:
        `name`, `baseline`, `work` (operations and bytes, or None), `goals` and `sides`: for each
        `seconds` and `ratio` (to the baseline; above 1 is faster), both with median, quartiles
        and number of rounds, and the `floor` of the ratio; `rival` (for ours: the fastest other
        library, the ratio to it, and its floor); `error` by name, where the exact
        result is known; or, for a side that was not timed, `absent`.
        `disagrees` says where a side computed something else than the baseline.
    """
    try:
        plan = cell.plan(Setting(device, toy))
    except Exception as error:
        return {
            "name": cell.name,
            "baseline": None,
            "work": None,
            "goals": [],
            "sides": {"funcbayes": {"absent": one_line(error)}},
        }
    sides = {
        name: side.call for name, side in plan.sides.items() if not (quick and name in STRATEGIES)
    }
    timings = in_turn(
        sides,
        budget=0 if toy else cell.seconds * (0.2 if quick else 1),
        min_rounds=1 if toy else 3 if quick else 5,
        secondary=plan.secondary,
    )
    return {
        "name": cell.name,
        "baseline": plan.baseline,
        "work": None if plan.work is None else plan.work._asdict(),
        # Those that there are come from prototypes on a CPU.
        "goals": [g._asdict() for g in goals_of(cell.name) if device.type == "cpu"],
        "sides": {
            name: _side(cell, plan, timings, name)
            for name in [*plan.sides, *plan.absent]
            if name in sides or name in plan.absent
        },
    }


def _side(cell: Cell, plan: Plan, timings: Timings, name: str) -> dict[str, Any]:
    reason = plan.absent.get(name) or timings.failures.get(name)
    if reason is not None:
        return {"absent": reason}
    side: dict[str, Any] = {"seconds": timings.of(name).as_data(), "ratio": None}
    if plan.baseline in timings.seconds and name != plan.baseline:
        side["ratio"] = timings.ratio(name, plan.baseline).as_data()
        side["floor"] = floor_of(cell.name, name)
    if plan.error is not None:
        side["error"] = {k: float(f"{v:.2g}") for k, v in plan.error(timings.outputs[name]).items()}
    reference = plan.baseline if plan.baseline in timings.outputs else FUNCTION
    complaint = _complaint(plan, timings, name, reference)
    if complaint:
        side["disagrees"] = complaint
    # A library that is fast at computing something else is no rival.
    rivals = [
        rival
        for rival in plan.rivals
        if rival in timings.seconds and not _complaint(plan, timings, rival, reference)
    ]
    if name in OURS and rivals:
        fastest = min(rivals, key=lambda rival: timings.of(rival).median)
        side["rival"] = {
            "name": fastest,
            "ratio": timings.ratio(name, fastest).as_data(),
            "floor": rival_floor_of(cell.name, name),
        }
    return side


def _complaint(plan: Plan, timings: Timings, name: str, reference: str) -> str | None:
    value = plan.sides[name].value
    if plan.agree is None or value is None or name == reference:
        return None
    if reference not in timings.outputs:
        return None
    expected = plan.sides[reference].value(timings.outputs[reference])
    return plan.agree(value(timings.outputs[name]), expected)


def memory(cell: Cell, side: str, device: torch.device) -> float | None:
    """Peak megabytes of one call, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "--device", str(device)]
    command += ["--memory-of", cell.name, side]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        return None
    return json.loads(child.stdout.splitlines()[-1])


def memory_here(cell: Cell, side: str, device: torch.device) -> float | None:
    """What `memory` has its process do."""
    megabytes = peak_memory(cell.plan(Setting(device)).sides[side].call, device)
    return None if megabytes is None else round(megabytes, 1)


def failures(cells: list[dict[str, Any]]) -> list[str]:
    """What `--check` fails for.

    A side of ours that did not run or that disagrees with the baseline; and a ratio that is
    under its floor even at its upper quartile, so by more than the rounds differed.
    """
    lines = []
    for cell in cells:
        for name, side in cell["sides"].items():
            where = f"{cell['name']}, {name}"
            if name not in OURS:
                continue
            if "absent" in side:
                lines.append(f"{where}: did not run: {side['absent']}")
                continue
            if "disagrees" in side:
                lines.append(f"{where}: disagrees with the reference: {side['disagrees']}")
            rival = side.get("rival") or {}
            for against, ratio, floor in (
                ("the plain loop", side["ratio"], side.get("floor")),
                (rival.get("name"), rival.get("ratio"), rival.get("floor")),
            ):
                if ratio is not None and floor is not None and ratio["q3"] < floor:
                    lines.append(
                        f"{where}: {ratio['median']:.3g} times the speed of {against}"
                        f" (quartiles {ratio['q1']:.3g} to {ratio['q3']:.3g}), floor {floor:g}"
                    )
    return lines


def unchecked(cells: list[dict[str, Any]]) -> list[str]:
    """Cells with no ratio, for want of the baseline: no floor can hold or fail there."""
    return [
        cell["name"]
        for cell in cells
        if cell["baseline"] and "seconds" not in cell["sides"].get(cell["baseline"], {})
    ]
