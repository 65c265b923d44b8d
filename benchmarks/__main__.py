"""`python -m benchmarks`: times funcbayes beside the peers and writes what came out."""

import argparse
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import growth, limits, report, running
from benchmarks.cells import all_cells
from benchmarks.peers import BASELINE


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        metavar="SUBSTRING",
        action="append",
        help="only cells whose name contains it; may be given more than once",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, the main sides only")
    parser.add_argument(
        "--full", action="store_true", help="all cells, and how time grows with the sizes"
    )
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 where a ratio is under its floor by more than the measured spread, "
        "or where a side of ours fails or disagrees with the baseline",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for benchmarks.json and benchmarks.md; default benchmarks/results for a "
        "whole run, results/benchmarks for one with --quick or --only; in a folder of its own "
        "below that for another device than the CPU",
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("CELL", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = options.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the clock waits for the current device only

    cells = all_cells()
    if options.memory_of:
        name, side = options.memory_of
        cell = next(cell for cell in cells if cell.name == name)
        print(json.dumps(running.memory_here(cell, side, device)))
        return 0
    if options.only:
        cells = [cell for cell in cells if any(part in cell.name for part in options.only)]
        if not cells:
            parser.error(f"no cell's name contains {options.only}; --list prints all names")
    if options.quick:
        cells = [cell for cell in cells if cell.in_quick]
    if not (options.full or options.only):
        cells = [cell for cell in cells if not cell.in_full_only]
    if options.list:
        print(*(cell.name for cell in cells), sep="\n")
        return 0
    partial_run = options.quick or bool(options.only)
    # A partial run must not replace the tables of a whole one.
    default = "results/benchmarks" if partial_run else "benchmarks/results"
    output = options.output or running.ROOT / default / _below(device)

    # What peers make torch warn of, once for each of their sides.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Using a non-full backward hook")
    warnings.filterwarnings("ignore", message="Extension saving to", module="backpack")
    start = time.perf_counter()
    machine = limits.measure(device)._asdict()
    measured = []
    for i, cell in enumerate(cells):
        result = running.run(cell, device, quick=options.quick)
        if cell.memory and not options.quick and not options.no_memory:
            result["memory_mb"] = {side: running.memory(cell, side, device) for side in cell.memory}
        measured.append(result)
        print(f"[{i + 1}/{len(cells)}, {time.perf_counter() - start:.0f} s] {_summary(result)}")
        sys.stdout.flush()
    curves = [growth.run(curve, device) for curve in growth.CURVES] if options.full else []
    results = report.collect(
        measured, quick=options.quick, device=device, machine_limits=machine, curves=curves
    )
    data, tables = report.write(results, output)
    print(f"\nThe tables are in {tables}, the data in {data}")
    return _verdict(results, check=options.check)


def _device(text: str) -> torch.device:
    if not re.fullmatch("cpu|cuda(:[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"it is '{text}', expected cpu, cuda or cuda:N")
    device = torch.device(text)
    if device.type == "cpu":
        return device
    index = device.index or 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        there = f"the last device is cuda:{found - 1}" if found else "there is no CUDA device"
        raise argparse.ArgumentTypeError(f"it is '{text}', but {there} here")
    return torch.device("cuda", index)


def _below(device: torch.device) -> str:
    """The folder for a device below that for the CPU."""
    if device.type == "cpu":
        return ""
    return re.sub("[^a-z0-9]+", "-", report.device_name(device).lower()).strip("-")


def _summary(result: dict[str, Any]) -> str:
    parts = []
    for name, side in result["sides"].items():
        if "absent" in side:
            parts.append(f"{name} –")
        elif side["ratio"]:
            r = side["ratio"]
            loss = " SLOWER" if r["median"] < 1 else ""
            parts.append(f"{name} {r['median']:.3g}× [{r['q1']:.3g}–{r['q3']:.3g}]{loss}")
        else:
            parts.append(f"{name} {1e3 * side['seconds']['median']:.3g} ms")
    return f"{result['name']}: {', '.join(parts)}"


def _verdict(results: dict[str, Any], *, check: bool) -> int:
    for line in results["failures"]:
        print(f"FAILURE {line}")
    if results["without_baseline"]:
        print(f"{len(results['without_baseline'])} cells without a ratio: {BASELINE} did not run")
    if not check:
        return 0
    # Without the baseline nothing was checked, which is no reason to pass.
    return 1 if results["failures"] or results["without_baseline"] else 0


if __name__ == "__main__":
    sys.exit(main())
