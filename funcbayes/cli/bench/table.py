"""The timings of one job as a table for the terminal."""

from typing import Any

from funcbayes.cli.bench.jobs import DEFAULT, TITLES
from funcbayes.cli.bench.running import digits, is_slower
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from rich import box
    from rich.table import Table
    from rich.text import Text


def render(cells: list[dict[str, Any]]) -> Table:
    """A table with one row a cell: the plain loop in milliseconds, the others as ratios to it.

    Args:
        cells: from `measure`, all of one job.
    """
    sides = list(dict.fromkeys(name for cell in cells for name in cell["sides"]))
    table = Table(
        title=TITLES[cells[0]["job"]],
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        # 80 columns hold it.
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("network", no_wrap=True)
    for heading in ("batch", *sides):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        entries = [_entry(cell["sides"].get(name), name) for name in sides]
        table.add_row(cell["network"], str(cell["batch"]), *entries)
    return table


def _entry(side: dict[str, Any] | None, name: str) -> Text:
    if side is None:
        return Text()
    if "failed" in side:
        return Text("failed", "red")
    if "ratio" not in side:  # the plain loop itself, or one beside a loop that failed
        return _figure(side["seconds"], 1000, " ms", "bold" if name == DEFAULT else "")
    slower, differs = is_slower(side), "differs" in side
    style = "red" if slower or differs else "bold" if name == DEFAULT else ""
    entry = _figure(side["ratio"], 1, "×", style)
    # In words and not by colour alone, which a pipe or a file has not.
    entry.append("\nslower" * slower + "\ndiffers" * differs, "red")
    return entry


def _figure(spread: dict[str, float], scale: float, unit: str, style: str) -> Text:
    median, q1, q3 = (digits(scale * spread[name]) for name in ("median", "q1", "q3"))
    return Text.assemble((f"{median}{unit}", style), (f"\n{q1}–{q3}", "dim"))
