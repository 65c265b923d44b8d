"""The figures of all methods as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from funcbayes.extras import needs_extra

with needs_extra("report"):
    from rich import box
    from rich.table import Table

# Key, heading, format, and whether more is better.
_METRICS = (
    ("accuracy", "acc.", "{:.1%}", True),
    ("nll", "NLL", "{:.3f}", False),
    ("brier", "Brier", "{:.3f}", False),
    ("ece", "ECE", "{:.1%}", False),
    ("auroc", "AUROC", "{:.3f}", True),
    ("fpr95", "FPR95", "{:.1%}", False),
)


def render(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with one row a method; the best of each column is bold.

    Args:
        figures: from a method's name to its part of `results.json`.
    """
    table = Table(
        # 80 columns hold it.
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_style="dim",
        caption="NLL in nats. AUROC and FPR95: test images against held-out classes by entropy. "
        "SWAG, Laplace, VI and dropout start from the plain network, whose training is not "
        "counted again. Loop: one forward pass a sample instead of a batched one.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for _, heading, _, _ in _METRICS:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("train", "predict", "loop"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = {
        name: (max if more_is_better else min)(f["metrics"][name] for f in figures.values())
        for name, _, _, more_is_better in _METRICS
    }
    for method, part in figures.items():
        cells = []
        for name, _, layout, _ in _METRICS:
            text = layout.format(part["metrics"][name])
            # Compared as printed: equal figures are equally good.
            cells.append(f"[bold]{text}[/]" if text == layout.format(best[name]) else text)
        seconds = part["seconds"]
        predict, loop = seconds["predict"], seconds["predict_loop"]
        table.add_row(
            method,
            *cells,
            f"{seconds['train']:.1f} s",
            f"{1000 * predict:.0f} ms",
            f"{1000 * loop:.0f} ms",
        )
    return table
