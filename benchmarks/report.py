"""What was measured, as a JSON file and as tables to read."""

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cells import NUM_SAMPLES
from benchmarks.peers import BASELINE
from benchmarks.plans import OURS
from benchmarks.running import ROOT, failures, unchecked
from funcbayes.cli.bench.running import environment as machine

SCHEMA = 1
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
    "dropout": f"Monte Carlo dropout, {NUM_SAMPLES} samples",
    "fisher": "Diagonal empirical Fisher of one batch",
    "ggn": "Diagonal of the exact GGN of one batch",
    "kfac": "Kronecker factors of the exact GGN of one batch",
    "linearized": "Linearised predictive: means and covariances of the outputs",
    "ensemble-predict": "Ensembles: prediction",
    "ensemble-step": "Ensembles: one optimizer step of all members, batch of 64",
    "ensemble-fit": "Ensembles: training on ten batches of 64, from start to end",
}


def environment() -> dict[str, Any]:
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "funcbayes", "benchmarks")),
        **machine(),
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


def collect(cells: list[dict[str, Any]], *, quick: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "settings": {"quick": quick, "num_samples": NUM_SAMPLES, "baseline": BASELINE},
        "failures": failures(cells),
        "without_baseline": unchecked(cells),
        "cells": cells,
    }


def write(results: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
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
        + f"; Python {env['python']}, torch {env['torch']}, {env['threads']} threads on "
        f"{env['cpu']} ({env['capability']}); {peers}."
        + (" A quick run: few rounds." if results["settings"]["quick"] else ""),
        "",
        *_losses(cells),
        *_floors(results),
    ]
    groups = dict.fromkeys(cell["name"].split("/")[0] for cell in cells)
    for group in groups:
        lines += ["", f"## {TITLES.get(group, group)}", ""]
        lines += _table([c for c in cells if c["name"].split("/")[0] == group])
    return "\n".join(lines) + "\n"


def _losses(cells: list[dict[str, Any]]) -> list[str]:
    lost = [
        f"- {cell['name']}, {name}: {side['ratio']['median']:.2f}"
        for cell in cells
        for name, side in cell["sides"].items()
        # A strategy that someone must ask for by name may be slow; what is chosen may not.
        if name in OURS and name not in ("vmap", "loop", "threads")
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


def _table(cells: list[dict[str, Any]]) -> list[str]:
    sides = list(dict.fromkeys(name for cell in cells for name in cell["sides"]))
    floors = any(s.get("floor") for c in cells for s in c["sides"].values())
    rivals = any(s.get("rival") for c in cells for s in c["sides"].values())
    memory = any("memory_mb" in c for c in cells)
    columns = ["cell", *sides, "prototype"]
    columns += ["floor"] * floors + ["to fastest library"] * rivals + ["peak MB"] * memory
    rows = [columns, ["---"] * len(columns)]
    for cell in cells:
        row = [cell["name"].partition("/")[2]]
        row += [_entry(cell["sides"].get(side)) for side in sides]
        row.append(f"{cell['prototype']:g}" if cell["prototype"] else "")
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


def _entry(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    if "absent" in side:
        return "– " + side["absent"].replace("|", "/")[:60]
    text = f"{1e3 * side['seconds']['median']:.3g} ms"
    if side["ratio"]:
        r = side["ratio"]
        text = f"{r['median']:.2f} [{r['q1']:.2f}–{r['q3']:.2f}] · {text}"
    return text + (" (disagrees)" if "disagrees" in side else "")
