"""Pictures of the results: ratios of every cell, and how cost grows."""

from pathlib import Path
from typing import Any

from benchmarks.peers import BASELINE
from benchmarks.plans import AUTO, DEFAULTS

_COLOURS = {AUTO: "#1f6fb2", BASELINE: "#b25a1f"}


def ratios(cells: list[dict[str, Any]], path: Path) -> bool:
    """Draws each cell's ratio to the plain loop with its quartiles; False where there is none."""
    import matplotlib.pyplot as plt  # its import takes longer than a cell

    rows = []
    for cell in cells:
        for name in DEFAULTS:
            side = cell["sides"].get(name, {})
            if side.get("ratio"):
                rows.append((cell["name"], side["ratio"]))
                break
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(8, 1 + 0.2 * len(rows)), layout="constrained")
    for i, (_, ratio) in enumerate(reversed(rows)):
        colour = "#1f6fb2" if ratio["median"] >= 1 else "#c0392b"
        axes.plot([ratio["q1"], ratio["q3"]], [i, i], color=colour, linewidth=2, alpha=0.5)
        axes.plot(ratio["median"], i, "o", color=colour, markersize=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("times the speed of the plain loop (median, quartiles)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def growth(curves: list[dict[str, Any]], path: Path) -> None:
    """Draws time against size, both logarithmic, with the fitted exponents."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(curves), figsize=(4.2 * len(curves), 3.6), layout="constrained", squeeze=False
    )
    for axis, curve in zip(axes[0], curves, strict=True):
        for side, colour in _COLOURS.items():
            known = [
                (p["size"], p["seconds"][side]) for p in curve["points"] if side in p["seconds"]
            ]
            if known:
                slope = curve["slopes"][side]
                label = side if slope is None else f"{side}, exponent {slope:.2f}"
                axis.loglog(
                    *zip(*known, strict=True), "o-", color=colour, label=label, markersize=4
                )
        axis.set_title(curve["title"], fontsize=9)
        axis.set_xlabel(curve["name"])
        axis.set_ylabel("seconds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
