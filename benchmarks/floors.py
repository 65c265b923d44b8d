"""The ratios under which a cell may not fall, and those that the library means to reach."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from benchmarks.plans import ACTIVATION, AUTO, CLASS, DECOMPOSED, FUNCTION, STEP


class Floor(NamedTuple):
    """A least ratio for some sides of all cells whose name fits."""

    cells: str
    sides: tuple[str, ...]
    ratio: float


FLOORS = (
    Floor("predict/*", (CLASS, AUTO), 1.0),
    Floor("dropout/resnet-w16/*", (CLASS, AUTO), 4.0),
    Floor("dropout/resnet-w16/N=*6*", (CLASS, AUTO), 8.0),
    # A loop over data takes 65 to 257 ms on this kind of machine, from day to day.
    Floor("fisher/mlp/*", (CLASS, FUNCTION), 8.0),
    Floor("swag-update/*", (FUNCTION,), 1.0),
    Floor("ensemble-step/*", (STEP,), 1.0),
    Floor("vi-step/*", (FUNCTION,), 1.0),
)
"""To the plain loop."""

RIVAL_FLOORS = (
    Floor("fisher/*", (FUNCTION,), 1.0),
    Floor("ggn/*", (FUNCTION,), 1.0),
    Floor("kfac/*", (FUNCTION, DECOMPOSED), 1.0),
    Floor("linearized/*", (FUNCTION,), 1.0),
    Floor("kronecker/*", (AUTO,), 1.0),
    Floor("vi-step/*", (FUNCTION,), 1.0),
)
"""To the fastest other library."""


class Goal(NamedTuple):
    """A ratio that the library means to reach in all cells whose name fits.

    Attributes:
        cells: pattern of names.
        side: which side's ratio.
        to_rival: whether it is taken to the fastest other library, not to the plain loop.
        floor: what prototypes reached.
        aim: what should be possible.
    """

    cells: str
    side: str
    to_rival: bool
    floor: float
    aim: float


def _goals(side: str, *rows: tuple[str, float, float], to_rival: bool = False) -> list[Goal]:
    return [Goal(cells, side, to_rival, floor, aim) for cells, floor, aim in rows]


GOALS = (
    *_goals(
        AUTO,
        ("predict/*/mlp/N=1", 3, 6),
        ("predict/*/mlp/N=128", 2, 3),
        ("predict/*/mlp/N=1024", 1.4, 2),
        ("predict/*/lenet/N=1", 2.3, 5),
        ("predict/*/lenet/N=16", 2.3, 4),
        ("predict/*/lenet/N=128", 2.5, 4),
        ("predict/*/resnet-w16/N=1", 3.5, 6),
        ("predict/*/resnet-w16/N=16", 3, 4),
        ("predict/*/resnet-w16/N=64", 1.4, 2),
        ("predict/*/resnet-w64/N=16", 1.3, 2),
        ("predict/*/transformer/N=1", 3.5, 6),
        ("predict/*/transformer/N=16", 2, 4),
        ("predict/*/transformer/N=128", 1.3, 2.5),
        ("dropout/mlp/N=128", 2, 6),
        ("dropout/lenet/N=64", 5, 8),
        ("dropout/resnet-w16/*", 15, 20),
        ("dropout/transformer/N=16", 2, 6),
        ("ensemble-predict/small-mlp/M=20/N=16", 1.8, 3),
        ("ensemble-predict/lenet/M=20/N=16", 2.3, 4),
    ),
    *_goals(
        ACTIVATION,
        ("predict/vi/mlp/N=1", 60, 100),
        ("predict/vi/mlp/N=16", 18, 30),
        ("predict/vi/mlp/N=128", 3.5, 6),
    ),
    *_goals(
        FUNCTION,
        ("fisher/mlp/*", 25, 35),
        ("fisher/lenet/*", 3, 5),
        ("fisher/resnet-w16/*", 4, 6),
        ("fisher/transformer/*", 3, 6),
    ),
    *_goals(
        FUNCTION,
        ("fisher/mlp/*", 1.5, 2),
        ("fisher/lenet/*", 3, 5),
        ("fisher/resnet-w16/*", 1.8, 3),
        ("fisher/transformer/*", 1.5, 3),
        ("ggn/mlp/*", 2, 3),
        ("ggn/lenet/*", 2, 4),
        ("linearized/diagonal/mlp/*", 300, 500),
        ("linearized/kronecker/mlp/*", 500, 1000),
        ("linearized/last-layer/mlp/*", 5, 50),
        to_rival=True,
    ),
    *_goals(DECOMPOSED, ("kfac/mlp/*", 4, 6), ("kfac/lenet/*", 10, 20), to_rival=True),
    *_goals(
        STEP,
        ("ensemble-step/small-mlp/M=5/*", 2.5, 4),
        ("ensemble-step/small-mlp/M=20/*", 7, 12),
        ("ensemble-step/lenet/M=20/*", 1.2, 2),
    ),
)
"""What the report compares with; nothing fails by them."""


def goals_of(cell: str) -> list[Goal]:
    """The goals for a cell."""
    return [goal for goal in GOALS if fnmatchcase(cell, goal.cells)]


def floor_of(cell: str, side: str) -> float | None:
    """The highest floor to the plain loop that holds for a side of a cell."""
    return _highest(FLOORS, cell, side)


def rival_floor_of(cell: str, side: str) -> float | None:
    """The same to the fastest other library."""
    return _highest(RIVAL_FLOORS, cell, side)


def _highest(floors: Sequence[Floor], cell: str, side: str) -> float | None:
    fitting = [f.ratio for f in floors if side in f.sides and fnmatchcase(cell, f.cells)]
    return max(fitting, default=None)
