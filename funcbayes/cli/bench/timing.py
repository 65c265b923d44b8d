"""Times several ways of doing one thing, in turn, in one process."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.benchmark import timer

# Seconds: GNU's OpenMP lets its threads spin for about eight milliseconds.
_REST = 0.01


class Spread(NamedTuple):
    """Median and quartiles of a sample.

    Attributes:
        median: its median.
        q1: its lower quartile.
        q3: its upper quartile.
        rounds: how many there are.
    """

    median: float
    q1: float
    q3: float
    rounds: int

    def as_data(self) -> dict[str, float | int]:
        """For a JSON file: to four digits."""
        digits = {name: float(f"{x:.4g}") for name, x in self._asdict().items()}
        return {**digits, "rounds": self.rounds}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of numbers."""
    q1, median, q3 = np.quantile(np.asarray(values), (0.25, 0.5, 0.75)).tolist()
    return Spread(median, q1, q3, len(values))


class Timings(NamedTuple):
    """Seconds of every side in every round; NaN where a side sat a round out.

    Attributes:
        seconds: seconds by side, one entry a round.
        failures: what a side raised while it warmed up; it was not timed then.
        outputs: what each side's first call returned.
    """

    seconds: dict[str, list[float]]
    failures: dict[str, str]
    outputs: dict[str, Any]

    def of(self, side: str) -> Spread:
        """Seconds of a side, over the rounds that it took part in."""
        return spread([t for t in self.seconds[side] if t == t])

    def ratio(self, side: str, baseline: str) -> Spread:
        """How many times faster than the baseline, round by round."""
        pairs = zip(self.seconds[baseline], self.seconds[side], strict=True)
        # NaN is the one number that differs from itself.
        return spread([base / ours for base, ours in pairs if base == base and ours == ours])


def in_turn(
    sides: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
    secondary: Sequence[str] = (),
) -> Timings:
    """Calls the sides A B C A B C … and times every call.

    The machine's clock drifts by more than the effects that are looked for, so the sides
    are compared within a round, never run by run. Each round begins with another side, so
    that no side always finds the caches that the same neighbour left.

    After every call the cores come to rest: torch's threads go on waiting for work, at full
    speed, for some milliseconds that would be the next side's.

    Args:
        sides: what to call. A side that raises is reported in `failures` and left out.
        budget: seconds to spend after the warm-up, which is two calls of each side (one
            where that takes more than a twentieth of the budget).
        min_rounds: rounds to do even where they do not fit in the budget.
        max_rounds: rounds after which to stop though the budget is not spent.
        secondary: sides that sit out from the fourth round on (or where `min_rounds` is
            reached earlier, then) once their calls have taken more than an equal share of
            the budget.

    Returns:
        The seconds of every call.
    """
    failures: dict[str, str] = {}
    outputs: dict[str, Any] = {}
    active: list[str] = []
    for name, side in sides.items():
        try:
            start = timer()
            outputs[name] = side()
            if timer() - start < budget / 20:
                side()
        except Exception as error:
            failures[name] = one_line(error)
        else:
            active.append(name)

    seconds: dict[str, list[float]] = {name: [] for name in active}
    spent = dict.fromkeys(active, 0.0)
    share = budget / max(len(active), 1)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(max_rounds if active else 0):
            late = i >= min_rounds
            enough = i >= min(min_rounds, 3)
            resting = {s for s in active if enough and s in secondary and spent[s] > share}
            next_round = sum(spent[s] / i for s in active if s not in resting) if late else 0.0
            if late and sum(spent.values()) + next_round > budget:
                break
            for name in active[i % len(active) :] + active[: i % len(active)]:
                if name in resting:
                    seconds[name].append(float("nan"))
                    continue
                _rest()
                start = timer()
                sides[name]()
                seconds[name].append(timer() - start)
                spent[name] += seconds[name][-1]
    finally:
        if was_enabled:
            gc.enable()
    return Timings(seconds, failures, outputs)


def _rest() -> None:
    # Not by sleep, after which this core would have to wake up.
    until = time.perf_counter() + _REST
    while time.perf_counter() < until:
        pass


def one_line(error: Exception) -> str:
    """What an exception says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}".removesuffix(": ")
