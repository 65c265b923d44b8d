"""The ratios under which a cell may not fall, and what prototypes reached."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from benchmarks.plans import AUTO, CLASS, DECOMPOSED, FUNCTION


class Floor(NamedTuple):
    """A least ratio for some sides of all cells whose name fits."""

    cells: str
    sides: tuple[str, ...]
    ratio: float


FLOORS = (
    Floor("predict/*", (CLASS, AUTO), 1.0),
    Floor("dropout/resnet-w16/*", (CLASS, AUTO), 12.0),
    Floor("fisher/mlp/*", (CLASS, FUNCTION), 20.0),
)
"""To the plain loop."""

RIVAL_FLOORS = (
    Floor("fisher/*", (FUNCTION,), 1.0),
    Floor("ggn/*", (FUNCTION,), 1.0),
    Floor("kfac/*", (FUNCTION, DECOMPOSED), 1.0),
    Floor("linearized/*", (FUNCTION,), 1.0),
)
"""To the fastest other library."""

# What prototypes reached before the library was written: nothing fails by it, the report
# shows it beside what is reached now.
PROTOTYPES = {
    "predict/*/mlp/N=1": 3.9,
    "predict/*/mlp/N=16": 3.1,
    "predict/*/mlp/N=128": 2.4,
    "predict/*/mlp/N=1024": 1.6,
    "predict/*/lenet/N=1": 2.9,
    "predict/*/lenet/N=16": 2.8,
    "predict/*/lenet/N=128": 3.3,
    "predict/*/resnet-w16/N=1": 4.7,
    "predict/*/resnet-w16/N=16": 3.7,
    "predict/*/resnet-w16/N=64": 1.7,
    "predict/*/transformer/N=1": 4.7,
    "predict/*/transformer/N=16": 2.5,
    "predict/*/transformer/N=128": 1.4,
    "predict/*/resnet-w64/N=1": 2.3,
    "dropout/mlp/N=1": 6.7,
    "dropout/mlp/N=16": 4.2,
    "dropout/mlp/N=128": 2.1,
    "dropout/mlp/N=1024": 2.0,
    "dropout/lenet/N=1": 9.0,
    "dropout/lenet/N=16": 7.9,
    "dropout/lenet/N=64": 5.8,
    "dropout/resnet-w16/N=1": 22.0,
    "dropout/resnet-w16/N=16": 23.0,
    "dropout/resnet-w16/N=64": 21.0,
    "dropout/transformer/N=1": 3.5,
    "dropout/transformer/N=16": 2.4,
    "dropout/transformer/N=128": 1.35,
    "fisher/mlp/*": 27.7,
    "fisher/lenet/*": 3.4,
    "fisher/resnet-w16/*": 4.3,
    "fisher/transformer/*": 3.3,
    "ensemble-predict/small-mlp/M=20/N=1": 1.9,
    "ensemble-predict/small-mlp/M=20/N=16": 1.9,
    "ensemble-predict/small-mlp/M=20/N=128": 1.35,
    "ensemble-predict/lenet/M=20/N=16": 2.7,
    "ensemble-step/small-mlp/M=5/*": 2.9,
    "ensemble-step/small-mlp/M=20/*": 8.8,
    "ensemble-step/lenet/M=20/*": 1.25,
}


def floor_of(cell: str, side: str) -> float | None:
    """The highest floor to the plain loop that holds for a side of a cell."""
    return _highest(FLOORS, cell, side)


def rival_floor_of(cell: str, side: str) -> float | None:
    """The same to the fastest other library."""
    return _highest(RIVAL_FLOORS, cell, side)


def _highest(floors: Sequence[Floor], cell: str, side: str) -> float | None:
    fitting = [f.ratio for f in floors if side in f.sides and fnmatchcase(cell, f.cells)]
    return max(fitting, default=None)


def prototype_of(cell: str) -> float | None:
    return next((r for pattern, r in PROTOTYPES.items() if fnmatchcase(cell, pattern)), None)
