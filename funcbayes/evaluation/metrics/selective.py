"""Selective prediction: the error of the predictions that one is most certain of."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.metrics.streaming import StreamingMetric


class RiskCoverage(NamedTuple):
    """The curve of a predictor that may abstain, from few predictions to all.

    Attributes:
        coverage: share of inputs predicted, 1/batch to 1, `[batch]`, float64.
        risk: mean loss of them, the most certain inputs first, `[batch]`, float64.
    """

    coverage: Float[Tensor, " batch"]
    risk: Float[Tensor, " batch"]


def risk_coverage(
    scores: Float[Tensor, " batch"],
    losses: Float[Tensor, " batch"] | Int[Tensor, " batch"] | Bool[Tensor, " batch"],
) -> RiskCoverage:
    """Mean loss of the k inputs with the lowest scores, for every k.

    Args:
        scores: uncertainty of each input, higher means less certain: `Predictive.entropy`, a
            standard deviation, or one minus the largest probability.
        losses: loss of each prediction, such as `probs.argmax(-1) != targets` or a squared
            error.

    Returns:
        The curve. Inputs of equal score have no order: among them the risk is the mean over
        all orders, so the curve does not depend on how the data are sorted.

    Raises:
        TypeError: `scores` is not a floating-point tensor, or `losses` is complex or no tensor.
        ValueError: either is empty, not finite, or not `[batch]`.

    Source:
        Geifman and El-Yaniv (2017), arXiv:1705.08500, section 2.
    """
    return _risk_coverage(*_checked(scores, losses))


def aurc(
    scores: Float[Tensor, " batch"],
    losses: Float[Tensor, " batch"] | Int[Tensor, " batch"] | Bool[Tensor, " batch"],
) -> float:
    """Area under the risk–coverage curve: how well a score sorts the losses; lower is better.

    Args:
        scores: uncertainty of each input; higher means less certain.
        losses: loss of each prediction.

    Returns:
        The mean over k of the mean loss of the k most certain inputs, in units of the loss.
        A score that says nothing gives the mean loss.

    Raises:
        TypeError: `scores` is not a floating-point tensor, or `losses` is complex or no tensor.
        ValueError: either is empty, not finite, or not `[batch]`.

    Source:
        Geifman, Uziel and El-Yaniv (2019), arXiv:1805.08206, section 2.
    """
    return risk_coverage(scores, losses).risk.mean().item()


class _Selective(StreamingMetric):
    """Keeps the score and the loss of all inputs: no curve follows from sums."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_list("scores")
        self.add_list("losses")

    def update(
        self,
        scores: Float[Tensor, " batch"],
        losses: Float[Tensor, " batch"] | Int[Tensor, " batch"] | Bool[Tensor, " batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `risk_coverage`."""
        scores, losses = _checked(scores, losses)
        self.append(scores=scores, losses=losses)

    def _curve(self) -> RiskCoverage:
        return _risk_coverage(self.gathered("scores"), self.gathered("losses"))


class RiskCoverageCurve(_Selective):
    """Streaming `risk_coverage`; it keeps two numbers for each input.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def compute(self) -> RiskCoverage:
        """The curve of all data so far."""
        return self._curve()


class AURC(_Selective):
    """Streaming `aurc`; it keeps two numbers for each input.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def compute(self) -> Tensor:
        """The area of all data so far, float64 `[]`."""
        return self._curve().risk.mean()


def mean_over_ties(keys: Tensor, values: Tensor) -> Tensor:
    """Replaces values by the mean over those of equal key.

    Args:
        keys: sorted, `[batch]`.
        values: `[batch]`.

    Returns:
        What each place holds on average over all orders that leave the keys sorted, `[batch]`.
    """
    _, group, counts = keys.unique_consecutive(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts)).index_add_(0, group, values)
    return (sums / counts)[group]


def _risk_coverage(scores: Tensor, losses: Tensor) -> RiskCoverage:
    scores, order = scores.sort()
    losses = mean_over_ties(scores, losses[order])
    num = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    return RiskCoverage(coverage=num / len(scores), risk=losses.cumsum(0) / num)


def _checked(scores: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    scores = checks.checked_scores(scores, "scores")
    if not isinstance(losses, Tensor) or losses.is_complex():
        raise TypeError(
            f"`losses` is {checks.kind(losses)}, expected a tensor of numbers or of booleans"
        )
    if losses.shape != scores.shape:
        raise ValueError(
            f"`losses` has shape {tuple(losses.shape)}, expected {tuple(scores.shape)}: "
            "one loss for each score"
        )
    if not losses.isfinite().all():
        raise ValueError("`losses` holds NaN or infinite numbers, expected finite ones")
    return scores, losses.detach().double()
