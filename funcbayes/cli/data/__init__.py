"""Data sets of the command line, split into what trains, what chooses and what is reported."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from funcbayes.cli.data import bundled
from funcbayes.cli.data.files import load_file
from funcbayes.cli.data.splits import Kind, Labelled, ShuffledBatches, Splits
from funcbayes.cli.errors import UsageError
from funcbayes.core.random import KeyLike

__all__ = ["DATA", "Labelled", "ShuffledBatches", "Splits", "load"]

DATA: dict[str, Callable[..., Splits]] = {
    "digits": bundled.digits,
    "breast-cancer": bundled.breast_cancer,
    "diabetes": bundled.diabetes,
    "two-moons": bundled.two_moons,
    "gap": bundled.gap,
}
"""From the name on the command line to what loads it."""


def load(
    data: str,
    *,
    file: Path | None = None,
    target: str | None = None,
    task: Kind | None = None,
    ood_classes: Sequence[str] | None = None,
    key: KeyLike,
) -> Splits:
    """Loads a data set and splits it.

    Args:
        data: name of a bundled set, or the path of a file.
        file: a .csv or .npz file; None takes `data` for a path if it is no bundled set.
        target: the column of a .csv file to predict; None looks for one of a usual name.
        task: what a file's target is, classes or a number; None guesses.
        ood_classes: names of classes that are held out as out-of-distribution; None takes the
            data set's own choice, which for most is none.
        key: what the split (and a toy set) is drawn from.

    Raises:
        UsageError: there is no such data set, or the file does not give one; the message says
            why and what to do.
    """
    if file is None and data in DATA:
        for name, value in (("target", target), ("task", task)):
            if value is not None:
                raise UsageError(
                    f"argument --{name}: it is for files, and '{data}' has its own: leave it out"
                )
        return DATA[data](ood_classes=ood_classes, key=key)
    path = Path(data) if file is None else file
    # Without a dot or a slash it is a slip in a name, unless there is such a file.
    if file is not None or path.suffix or len(path.parts) > 1 or path.exists():
        return load_file(path, target=target, task=task, ood_classes=ood_classes, key=key)
    close = difflib.get_close_matches(data, DATA, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UsageError(
        f"there is no data set '{data}': {hint}choose from {', '.join(DATA)}, or give a .csv or "
        ".npz file"
    )
