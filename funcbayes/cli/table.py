"""The figures of all methods as tables for the terminal."""

from collections.abc import Iterator, Sequence

from funcbayes.evaluation.report import Cell, Column, MethodReport, columns
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from rich import box
    from rich.table import Table
    from rich.text import Text

_COST_NAMES = ("train", "predict", "predict_loop", "memory")
_READING = (
    "SWAG, Laplace, VI and dropout start from the plain network, whose training is not counted "
    "again. Laplace samples the last layer's weights; its other rows linearise the network. "
    "Loop: a prediction with one forward pass a sample in place of a batched one."
)
_LABELS = {"predict_loop": "loop", "interval_score": "int. score"}


def render(methods: Sequence[MethodReport]) -> Iterator[Table | Text]:
    """A table of what predictions are worth and one of what they cost, and how to read them.

    Each has room in 80 columns.

    Args:
        methods: at least one. The best of each column is bold; of several seeds there are
            the mean and, below it, the standard deviation.
    """
    found = columns(methods)
    figures = [column for column in found if column.name not in _COST_NAMES]
    costs = [column for column in found if column.name in _COST_NAMES]
    yield _table(methods, figures)
    yield _table(methods, costs)
    yield Text(_READING, style="dim")


def _table(methods: Sequence[MethodReport], found: list[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in found:
        label = _LABELS.get(column.name, column.metric.label)
        table.add_column(Text(f"{label}\n{column.unit}"), justify="right", no_wrap=True)
    for i, method in enumerate(methods):
        table.add_row(method.label, *(_cell(column.cells[i]) for column in found))
    return table


def _cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    if cell.spread:
        text.append(f"\n±{cell.spread}", style="dim")
    return text
