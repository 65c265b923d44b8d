"""Intervals of predictions of numbers: whether they hold what they claim, and how wide they are.

Arguments are `[batch]`, or of any one shape: scores are means over all entries.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.metrics.streaming import MeanOverData


def coverage(
    lower: Float[Tensor, "*batch"], upper: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> float:
    """Share of the targets inside their intervals, ends included.

    Args:
        lower: lower ends, `[batch]`; may be infinite.
        upper: upper ends, `[batch]`; may be infinite.
        targets: y, `[batch]`.

    Returns:
        A number between 0 and 1, to be compared with the level of the intervals.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, a target is not finite, or a lower end is above its upper.
    """
    return _is_covered(lower, upper, targets).mean().item()


def sharpness(lower: Float[Tensor, "*batch"], upper: Float[Tensor, "*batch"]) -> float:
    """Mean width of intervals.

    Args:
        lower: lower ends, `[batch]`; may be infinite.
        upper: upper ends, `[batch]`; may be infinite.

    Returns:
        In units of the target; of two predictions that cover alike the narrower is better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or a lower end is above its upper.
    """
    return _widths(lower, upper).mean().item()


def interval_score(
    lower: Float[Tensor, "*batch"],
    upper: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    level: float = 0.9,
) -> float:
    """Width of the intervals plus 2/α for each unit by which a target lies outside.

    Args:
        lower: lower ends, `[batch]`.
        upper: upper ends, `[batch]`.
        targets: y, `[batch]`.
        level: 1 − α, the probability that the intervals claim; in expectation the score is
            lowest at the α/2 and 1 − α/2 quantiles of y.

    Returns:
        In units of the target; lower is better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, a target is not finite, a lower end is above its upper, or
            `level` is not between 0 and 1.

    Source:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437, equation 43.
    """
    checks.check_level(level)
    excess = _excesses(lower, upper, targets).mean().item()
    return sharpness(lower, upper) + 2 / (1 - level) * excess


class Coverage(MeanOverData):
    """Streaming `coverage`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    # Neither more nor less is better: the level of the intervals is.
    higher_is_better = None

    def update(
        self,
        lower: Float[Tensor, "*batch"],
        upper: Float[Tensor, "*batch"],
        targets: Float[Tensor, "*batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `coverage`."""
        self.add(_is_covered(lower, upper, targets))


class Sharpness(MeanOverData):
    """Streaming `sharpness`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(self, lower: Float[Tensor, "*batch"], upper: Float[Tensor, "*batch"]) -> None:
        """Adds a batch; arguments and errors are those of `sharpness`."""
        self.add(_widths(lower, upper))


class IntervalScore(MeanOverData):
    """Streaming `interval_score`.

    Args:
        level: probability that the intervals claim.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: `level` is not between 0 and 1.
    """

    sum_of_widths: Tensor

    def __init__(self, *, level: float = 0.9, **kwargs: Any) -> None:
        checks.check_level(level)
        # Sums without the level in them: those of two levels may then be taken for the same.
        super().__init__("sum_of_excesses", **kwargs)
        self.add_sum("sum_of_widths")
        self.level = level

    def update(
        self,
        lower: Float[Tensor, "*batch"],
        upper: Float[Tensor, "*batch"],
        targets: Float[Tensor, "*batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `interval_score`."""
        self.add(_excesses(lower, upper, targets))
        self.sum_of_widths = self.sum_of_widths + _widths(lower, upper).sum().to(self.device)

    def compute(self) -> Tensor:
        """The mean over all data so far, float64 `[]`."""
        excess = super().compute()
        return self.sum_of_widths / self.count + 2 / (1 - self.level) * excess


def _is_covered(lower: Tensor, upper: Tensor, targets: Tensor) -> Tensor:
    lower, upper, targets = checks.checked_interval(lower, upper, targets)
    return ((lower <= targets) & (targets <= upper)).double()


def _widths(lower: Tensor, upper: Tensor) -> Tensor:
    lower, upper = checks.checked_ends(lower, upper)
    return upper - lower


def _excesses(lower: Tensor, upper: Tensor, targets: Tensor) -> Tensor:
    """How far each target lies outside its interval."""
    lower, upper, targets = checks.checked_interval(lower, upper, targets)
    return (lower - targets).clamp_min(0) + (targets - upper).clamp_min(0)
