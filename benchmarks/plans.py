"""A cell of the benchmark: one job, done in several ways."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks import peers
from benchmarks.limits import Work
from benchmarks.models import Setting
from benchmarks.peers import BASELINE

CLASS = "class"
AUTO = "auto"
FUNCTION = "function"
DECOMPOSED = "with eigenvalues"
STEP = "step"
ACTIVATION = "activation"
STRATEGIES = ("vmap", "loop", "threads")
# The first is the baseline of the others: what arithmetic of another width costs and gains.
FORMATS = ("float32", "bfloat16", "float16", "float64")
# The sides that are ours: they must run and agree with the baseline. The last stands for
# all of a cell's where it could not even be built.
OURS = (CLASS, AUTO, FUNCTION, DECOMPOSED, STEP, ACTIVATION, *STRATEGIES, *FORMATS, "funcbayes")
# The ways that only somebody who asks for them gets: they may be slow.
BY_NAME = (*STRATEGIES, *FORMATS)
# What a user of the functions gets who asks for nothing; a cell has one of them.
DEFAULTS = (AUTO, FUNCTION, STEP)
# The baseline where the original classes lack the job.
LOOP = "plain loop"


class Side(NamedTuple):
    """One way of doing a cell's job.

    Attributes:
        call: what is timed.
        value: takes what `call` returned to the tensors that `Plan.agree` compares; not
            timed. None: there is nothing to compare.
    """

    call: Callable[[], Any]
    value: Callable[[Any], Any] | None = None


@dataclass
class Plan:
    """A cell that is ready to run.

    Attributes:
        baseline: the side that ratios are taken to; None where there is no loop to compare
            with, only other libraries.
        sides: by name, the baseline (where it is installed) first.
        absent: sides that cannot run here, and why.
        agree: how two values differ, or None where they are of one and the same quantity.
        secondary: sides that may be timed in fewer rounds.
        rivals: other libraries, the fastest of which is a second thing to compare with.
        work: what the job cannot do without, where that is known.
        error: takes what a side returned to its errors by name, where the exact result is known.
    """

    baseline: str | None = BASELINE
    sides: dict[str, Side] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    agree: Callable[[Any, Any], str | None] | None = None
    secondary: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    work: Work | None = None
    error: Callable[[Any], dict[str, float]] | None = None

    def add_peer(self, name: str, module: str, make: Callable[[Any], Side]) -> None:
        """Adds a side of another library, or the reason why there is none."""
        peer, reason = peers.load(module)
        if peer is None:
            self.absent[name] = reason
            return
        try:
            self.sides[name] = make(peer)
        except Exception as error:
            self.absent[name] = peers.one_line(error)


@dataclass(frozen=True)
class Cell:
    """A job.

    Attributes:
        name: group, method, model and size, joined by slashes.
        plan: builds it for a device, and for a toy size, which the tests use.
        seconds: time to spend on it.
        in_quick: whether a quick run has it.
        in_full_only: whether only a full run has it.
        memory: sides whose peak memory is measured, each in its own process.
    """

    name: str
    plan: Callable[[Setting], Plan]
    seconds: float
    in_quick: bool = True
    in_full_only: bool = False
    memory: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        return self.name.split("/")[0]
