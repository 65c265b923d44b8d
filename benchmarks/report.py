"""What was measured, as a JSON file and as tables to read."""

import json
import math
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import limits, plots
from benchmarks.cells import NUM_SAMPLES
from benchmarks.peers import BASELINE
from benchmarks.plans import BY_NAME, CLASS, DEFAULTS, OURS
from benchmarks.running import ROOT, failures, unchecked
from funcbayes.cli.bench.running import environment as machine

SCHEMA = 2
CPU = torch.device("cpu")
PEERS = (
    "incerto",
    "laplace-torch",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "posteriors",
    "asdfghjkl",
)
TITLES = {
    "predict": f"Prediction with sampled weights, {NUM_SAMPLES} samples",
    "kronecker": f"Samples of a Kronecker-factored Laplace posterior, {NUM_SAMPLES} samples",
    "precision": f"Formats: {NUM_SAMPLES} samples, and the largest errors against float64",
    "vi-step": "Variational inference: one step of Adam on the loss of 5 draws",
    "swag-update": "SWAG: one iterate taken into the moments",
    "dropout": f"Monte Carlo dropout, {NUM_SAMPLES} samples",
    "fisher": "Diagonal empirical Fisher of one batch",
    "ggn": "Diagonal of the exact GGN of one batch",
    "kfac": "Kronecker factors of the exact GGN of one batch",
    "linearized": "Linearised predictive: means and covariances of the outputs",
    "ensemble-predict": "Ensembles: prediction",
    "ensemble-step": "Ensembles: one optimizer step of all members, batch of 64",
    "ensemble-fit": "Ensembles: training on ten batches of 64, from start to end",
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment(device: torch.device) -> dict[str, Any]:
    """The commit, the machine and the versions that the figures belong to.

    `tf32` says for which float32 operations the device may round to TF32; None on CPU.
    """
    tf32 = {
        "matrix products": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "convolutions": torch.backends.cudnn.conv.fp32_precision == "tf32",  # pyright: ignore[reportAttributeAccessIssue]
    }
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "funcbayes", "benchmarks")),
        **machine(),
        "device": device_name(device),
        "tf32": tf32 if device.type == "cuda" else None,
        "peers": {name: _version(name) for name in PEERS},
    }


def _git(*arguments: str) -> str | None:
    try:
        child = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return child.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def collect(
    cells: list[dict[str, Any]],
    *,
    quick: bool,
    device: torch.device = CPU,
    machine_limits: dict[str, float] | None = None,
    curves: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "limits": machine_limits,
        "growth": curves or [],
        "geometric_means": geometric_means(cells),
        "environment": environment(device),
        "settings": {"quick": quick, "num_samples": NUM_SAMPLES, "baseline": BASELINE},
        "failures": failures(cells),
        "without_baseline": unchecked(cells),
        "cells": cells,
    }


def geometric_means(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the ratios to the original classes, over all cells: of the default sides, and the class.

    Returns:
        By side `mean` and the number of `cells`.
    """
    means = {}
    for label, names in (("functions", DEFAULTS), (CLASS, (CLASS,))):
        logs = [
            math.log(side["ratio"]["median"])
            for cell in cells
            if cell["baseline"] == BASELINE
            for side in [next((cell["sides"][n] for n in names if n in cell["sides"]), {})]
            if side.get("ratio")
        ]
        if logs:
            means[label] = {"mean": math.exp(sum(logs) / len(logs)), "cells": len(logs)}
    return means


def write(results: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    plots.ratios(results["cells"], folder / "ratios.png")
    if results["growth"]:
        plots.growth(results["growth"], folder / "growth.png")
    data, tables = folder / "benchmarks.json", folder / "benchmarks.md"
    data.write_text(json.dumps(results, indent=1) + "\n")
    tables.write_text(markdown(results))
    return data, tables


def markdown(results: dict[str, Any]) -> str:
    """The tables: every ratio, the losses first and by name."""
    env, cells = results["environment"], results["cells"]
    peers = ", ".join(f"{n} {v or '(not installed)'}" for n, v in env["peers"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Ratios to the plain loop of {BASELINE}'s classes (above 1: funcbayes is faster), the "
        "sides in turn in one process: median of the rounds' ratios [quartiles] · median "
        "milliseconds. `class` is the class interface, `auto`, `vmap`, `loop` and `threads` are "
        "`predict` with that strategy.",
        "",
        f"Commit {(env['commit'] or 'unknown')[:12]}"
        + (" with uncommitted changes" if env["uncommitted_changes"] else "")
        + f"; Python {env['python']}, torch {env['torch']}, {_device(env)}{env['threads']} threads "
        f"on {env['cpu']} ({env['capability']}); {peers}."
        + (" A quick run: few rounds." if results["settings"]["quick"] else ""),
        "",
        *_summary(results),
        *_losses(cells),
        *_floors(results),
        *_goals(cells),
    ]
    groups = dict.fromkeys(cell["name"].split("/")[0] for cell in cells)
    for group in groups:
        lines += ["", f"## {TITLES.get(group, group)}", ""]
        in_group = [c for c in cells if c["name"].split("/")[0] == group]
        lines += _table(in_group, results["limits"])
    lines += _growth(results["growth"])
    return "\n".join(lines) + "\n"


def _device(env: dict[str, Any]) -> str:
    if env["tf32"] is None:
        return ""
    rounded = " and ".join(name for name, allowed in env["tf32"].items() if allowed)
    return f"{env['device']} (float32 with TF32 in {rounded or 'nothing'}), "


def _summary(results: dict[str, Any]) -> list[str]:
    lines = [
        f"Geometric mean of the ratios, {label}: {found['mean']:.2f} over {found['cells']} cells."
        for label, found in results["geometric_means"].items()
    ]
    found = results["limits"]
    if found:
        lines.append(
            f"Limits in this run: {found['operations'] / 1e9:.0f} GFLOP/s (best of matrix products "
            f"and a convolution, float32), {found['bytes'] / 1e9:.1f} GB/s (copy, read and "
            "written). `of limit` is the least time for the matrix operations and for moving the "
            "parameters once, over what the default took; drawing noise, elementwise work and "
            "calls are in the denominator only."
        )
    return ["\n\n".join(lines), ""] if lines else []


def _goals(cells: list[dict[str, Any]]) -> list[str]:
    """What was reached beside what was meant to be, the misses first."""
    rows = []
    for cell in cells:
        for goal in cell["goals"]:
            side = cell["sides"].get(goal["side"], {})
            ratio = (
                (side.get("rival") or {}).get("ratio") if goal["to_rival"] else side.get("ratio")
            )
            if ratio:
                to = side["rival"]["name"] if goal["to_rival"] else cell["baseline"]
                name = f"{cell['name']}, {goal['side']} to {to}"
                rows.append((ratio["median"] / goal["floor"], name, ratio["median"], goal))
    if not rows:
        return []
    missed = sum(share < 1 for share, *_ in rows)
    lines = ["", "## Goals", "", f"{missed} of {len(rows)} not reached.", ""]
    lines += ["| cell | reached | floor | aim |", "| --- | --- | --- | --- |"]
    for share, name, ratio, goal in sorted(rows, key=lambda row: row[0]):
        reached = f"{ratio:.2f}" if share >= 1 else f"**{ratio:.2f}**"
        lines.append(f"| {name} | {reached} | {goal['floor']:g} | {goal['aim']:g} |")
    return lines


def _growth(curves: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for curve in curves:
        sides = list(curve["slopes"])
        lines += ["", f"## Time against {curve['name']}: {curve['title']}", ""]
        lines += [f"| {curve['name']} | {' | '.join(sides)} |", "| --- |" + " --- |" * len(sides)]
        for point in curve["points"]:
            known = [point["seconds"].get(side) for side in sides]
            entries = [
                point.get("left_out", "–") if s is None else f"{1e3 * s:.3g} ms" for s in known
            ]
            lines.append(f"| {point['size']} | {' | '.join(entries)} |")
        slopes = ["–" if s is None else f"{s:.2f}" for s in curve["slopes"].values()]
        lines.append(f"| exponent, upper half | {' | '.join(slopes)} |")
    return lines


def _losses(cells: list[dict[str, Any]]) -> list[str]:
    lost = [
        f"- {cell['name']}, {name}: {side['ratio']['median']:.2f}"
        for cell in cells
        for name, side in cell["sides"].items()
        if name in OURS and name not in BY_NAME
        if side.get("ratio") and side["ratio"]["median"] < 1
    ]
    rivals = [
        f"- {cell['name']}, {name}: {side['rival']['ratio']['median']:.2f} of the speed of "
        f"{side['rival']['name']}"
        for cell in cells
        for name, side in cell["sides"].items()
        if side.get("rival") and side["rival"]["ratio"]["median"] < 1
    ]
    lines = ["## Slower than the plain loop", "", *(lost or ["Nothing."])]
    if any(side.get("rival") for cell in cells for side in cell["sides"].values()):
        lines += ["", "## Slower than the fastest other library", "", *(rivals or ["Nothing."])]
    return lines


def _floors(results: dict[str, Any]) -> list[str]:
    lines = ["", "## Failures", "", *(f"- {line}" for line in results["failures"])]
    if not results["failures"]:
        lines.append("None.")
    if results["without_baseline"]:
        missing = ", ".join(results["without_baseline"])
        lines += ["", f"No ratio, since {BASELINE} did not run: {missing}."]
    return lines


def _table(cells: list[dict[str, Any]], machine: dict[str, float] | None) -> list[str]:
    sides = list(dict.fromkeys(name for cell in cells for name in cell["sides"]))
    floors = any(s.get("floor") for c in cells for s in c["sides"].values())
    rivals = any(s.get("rival") for c in cells for s in c["sides"].values())
    memory = any("memory_mb" in c for c in cells)
    bounded = machine is not None and any(c["work"] for c in cells)
    columns = ["cell", *sides]
    columns += (
        ["of limit"] * bounded
        + ["floor"] * floors
        + ["to fastest library"] * rivals
        + ["peak MB"] * memory
    )
    rows = [columns, ["---"] * len(columns)]
    for cell in cells:
        row = [cell["name"].partition("/")[2]]
        row += [_entry(cell["sides"].get(side)) for side in sides]
        if machine is not None and bounded:
            row.append(_of_limit(cell, machine))
        if floors:
            values = {s["floor"] for s in cell["sides"].values() if s.get("floor")}
            row.append(f"{max(values):g}" if values else "")
        if rivals:
            found = [s["rival"] for s in cell["sides"].values() if s.get("rival")]
            best = max(found, key=lambda r: r["ratio"]["median"], default=None)
            row.append(f"{best['ratio']['median']:.2f} ({best['name']})" if best else "")
        if memory:
            used = cell.get("memory_mb", {})
            row.append("; ".join(f"{s} {m:.0f}" for s, m in used.items() if m is not None))
        rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def _of_limit(cell: dict[str, Any], machine: dict[str, float]) -> str:
    side = next((cell["sides"][name] for name in DEFAULTS if name in cell["sides"]), {})
    if not cell["work"] or "seconds" not in side:
        return ""
    least = limits.seconds(limits.Work(**cell["work"]), machine)
    return f"{100 * least / side['seconds']['median']:.0f} %"


def _entry(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    if "absent" in side:
        return "– " + side["absent"].replace("|", "/")[:60]
    text = f"{1e3 * side['seconds']['median']:.3g} ms"
    if side["ratio"]:
        r = side["ratio"]
        text = f"{r['median']:.2f} [{r['q1']:.2f}–{r['q3']:.2f}] · {text}"
    for name, error in side.get("error", {}).items():
        text += f" · {name} {error:.1g} off"
    return text + (" (disagrees)" if "disagrees" in side else "")
