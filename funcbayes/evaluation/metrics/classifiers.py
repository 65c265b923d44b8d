"""Accuracy, proper scores and calibration of predictive probabilities."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.evaluation import uncertainty
from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.metrics.selective import aurc, mean_over_ties
from funcbayes.evaluation.metrics.streaming import MeanOverData, StreamingMetric


class ClassificationMetrics(NamedTuple):
    """How well predictive probabilities fit the targets.

    Attributes:
        accuracy: share of right predictions.
        nll: mean negative log likelihood, nats.
        brier: mean squared distance from the one-hot targets, 0 to 2.
        ece: expected calibration error, 0 to 1.
        aurc: area under the curve of error rate over coverage, where the predictions of the
            largest probability are made first; 0 to 1.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    aurc: float


def classification(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], *, num_bins: int = 15
) -> ClassificationMetrics:
    """Accuracy, proper scores, calibration error and risk–coverage area at once.

    Args:
        probs: predictive probabilities `[batch, classes]`.
        targets: class indices `[batch]`.
        num_bins: bins of the calibration error.

    Returns:
        The five figures.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, or a target
            is no class.
    """
    is_right = _is_right(probs, targets)
    return ClassificationMetrics(
        accuracy=is_right.mean().item(),
        nll=negative_log_likelihood(probs, targets),
        brier=brier_score(probs, targets),
        ece=expected_calibration_error(probs, targets, num_bins=num_bins),
        # Not 1 − confidence, which rounds unequal confidences below ½ to equal scores.
        aurc=aurc(-probs.detach().amax(-1), 1 - is_right),
    )


def accuracy(probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> float:
    """Share of inputs whose most probable class is the target.

    Args:
        probs: predictive probabilities `[batch, classes]`.
        targets: class indices `[batch]`.

    Returns:
        A number between 0 and 1.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, or a target
            is no class.
    """
    return _is_right(probs, targets).mean().item()


def negative_log_likelihood(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> float:
    """Mean negative log likelihood of the targets.

    Args:
        probs: predictive probabilities `[batch, classes]`; 0 counts as the smallest normal
            number of the dtype, in which it underflowed.
        targets: class indices `[batch]`.

    Returns:
        Nats a datum.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, or a target
            is no class.
    """
    return _log_losses(probs, targets).mean().item()


def brier_score(probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> float:
    """Mean squared distance of the probabilities from the one-hot targets.

    Args:
        probs: predictive probabilities `[batch, classes]`.
        targets: class indices `[batch]`.

    Returns:
        A number between 0 and 2 (the sum over classes, Brier's own scale).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, or a target
            is no class.

    Source:
        Brier (1950), doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    return _brier_scores(probs, targets).mean().item()


def expected_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], *, num_bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins of equal width.

    Args:
        probs: predictive probabilities `[batch, classes]`.
        targets: class indices `[batch]`.
        num_bins: bins between 0 and 1.

    Returns:
        A number between 0 and 1.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, a target is
            no class, or `num_bins` is below 1.

    Source:
        Guo et al. (2017), arXiv:1706.04599, equation 3; bins as in
        `uncertainty.reliability_bins`.
    """
    checks.check_num_bins(num_bins)
    return _gap_sums(probs, targets, num_bins).abs().sum().item() / len(probs)


def adaptive_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], *, num_bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins of equal numbers of predictions.

    Bins of equal width leave most of a confident network's predictions in the last one.

    Args:
        probs: predictive probabilities `[batch, classes]`.
        targets: class indices `[batch]`.
        num_bins: bins, whose sizes differ by at most one; with fewer data than bins each
            datum is one.

    Returns:
        A number between 0 and 1. Predictions of equal confidence that fall into two bins
        count in both with their mean accuracy: the order of the data does not matter.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, a target is
            no class, or `num_bins` is below 1.

    Source:
        Nguyen and O'Connor (2015), arXiv:1508.05154, section 3, with absolute gaps. Of the
        most probable class, as the expected calibration error; the score of this name of
        Nixon et al. (2019), arXiv:1904.01685, averages over all classes.
    """
    checks.check_num_bins(num_bins)
    confidence = checks.checked_probs(probs, targets)[0].amax(-1)
    return _adaptive_error(confidence, _is_right(probs, targets), num_bins).item()


class Accuracy(MeanOverData):
    """Streaming `accuracy`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def update(self, probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> None:
        """Adds a batch; arguments and errors are those of `accuracy`."""
        self.add(_is_right(probs, targets))


class NegativeLogLikelihood(MeanOverData):
    """Streaming `negative_log_likelihood`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(self, probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> None:
        """Adds a batch; arguments and errors are those of `negative_log_likelihood`."""
        self.add(_log_losses(probs, targets))


class BrierScore(MeanOverData):
    """Streaming `brier_score`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(self, probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> None:
        """Adds a batch; arguments and errors are those of `brier_score`."""
        self.add(_brier_scores(probs, targets))


class ExpectedCalibrationError(StreamingMetric):
    """Streaming `expected_calibration_error`; it keeps one sum for each bin.

    Args:
        num_bins: bins between 0 and 1.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: `num_bins` is below 1.
    """

    gap_sums: Tensor
    count: Tensor

    def __init__(self, *, num_bins: int = 15, **kwargs: Any) -> None:
        checks.check_num_bins(num_bins)
        super().__init__(**kwargs)
        self.num_bins = num_bins
        self.add_sum("gap_sums", num_bins)
        self.add_sum("count")

    def update(self, probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> None:
        """Adds a batch; arguments and errors are those of `expected_calibration_error`."""
        gap_sums = _gap_sums(probs, targets, self.num_bins)
        self.gap_sums = self.gap_sums + gap_sums.to(self.device)
        self.count = self.count + len(probs)

    def compute(self) -> Tensor:
        """The error of all data so far, float64 `[]`."""
        self.check_seen(int(self.count))
        return self.gap_sums.abs().sum() / self.count


class AdaptiveCalibrationError(StreamingMetric):
    """Streaming `adaptive_calibration_error`; it keeps two numbers for each input.

    Args:
        num_bins: bins of equal numbers of predictions.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: `num_bins` is below 1.
    """

    def __init__(self, *, num_bins: int = 15, **kwargs: Any) -> None:
        checks.check_num_bins(num_bins)
        super().__init__(**kwargs)
        self.num_bins = num_bins
        self.add_list("confidence")
        self.add_list("is_right")

    def update(self, probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> None:
        """Adds a batch; arguments and errors are those of `adaptive_calibration_error`."""
        is_right = _is_right(probs, targets)
        self.append(confidence=probs.detach().double().amax(-1), is_right=is_right)

    def compute(self) -> Tensor:
        """The error of all data so far, float64 `[]`."""
        kept = self.gathered("confidence"), self.gathered("is_right")
        return _adaptive_error(*kept, self.num_bins)


def _is_right(probs: Tensor, targets: Tensor) -> Tensor:
    probs, targets = checks.checked_probs(probs, targets)
    return (probs.argmax(-1) == targets).double()


def _log_losses(probs: Tensor, targets: Tensor) -> Tensor:
    double, targets = checks.checked_probs(probs, targets)
    picked = double.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -picked.clamp_min(torch.finfo(probs.dtype).tiny).log()


def _brier_scores(probs: Tensor, targets: Tensor) -> Tensor:
    probs, targets = checks.checked_probs(probs, targets)
    one_hot = torch.nn.functional.one_hot(targets, probs.shape[1])
    return (probs - one_hot).square().sum(-1)


def _gap_sums(probs: Tensor, targets: Tensor, num_bins: int) -> Tensor:
    """Σ (right − confidence) over the predictions of each bin, `[bins]`."""
    probs, targets = checks.checked_probs(probs, targets)
    bins = uncertainty.reliability_bins(probs, targets, num_bins=num_bins)
    return bins.counts * (bins.accuracy - bins.confidence)


def _adaptive_error(confidence: Tensor, is_right: Tensor, num_bins: int) -> Tensor:
    confidence, order = confidence.sort()
    gaps = mean_over_ties(confidence, is_right[order]) - confidence
    batch = len(gaps)
    bins = torch.arange(batch, device=gaps.device) * num_bins // batch
    return gaps.new_zeros(num_bins).index_add_(0, bins, gaps).abs().sum() / batch
