"""The figures of a classifier: accuracy, calibration, and out-of-distribution detection.

They take predictive probabilities (`Predictive.mean` with a categorical likelihood) or
scores, check values as well as shapes, and return Python numbers. Needs the extra `report`.

The out-of-distribution score of an input is `Predictive.entropy`, or
`Predictive.mutual_information` for its epistemic part: higher means stranger.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.evaluation import uncertainty
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from sklearn.metrics import roc_auc_score, roc_curve
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
    )


class ClassificationMetrics(NamedTuple):
    """How well predictive probabilities fit the targets.

    Attributes:
        accuracy: share of right predictions.
        nll: mean negative log likelihood, nats.
        brier: mean squared distance from the one-hot targets, 0 to 2.
        ece: expected calibration error, 0 to 1.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


class DetectionMetrics(NamedTuple):
    """How well a score tells out-of-distribution inputs from in-distribution ones.

    Attributes:
        auroc: area under the ROC curve; 0.5 is guessing.
        fpr95: share of out-of-distribution inputs accepted where 95 % of the others are.
    """

    auroc: float
    fpr95: float


def classification(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], *, num_bins: int = 15
) -> ClassificationMetrics:
    """Accuracy, negative log likelihood, Brier score and calibration error at once.

    Args:
        probs: predictive probabilities `[batch, classes]`.
        targets: class indices `[batch]`.
        num_bins: bins of the calibration error.

    Returns:
        The four figures.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, or a target
            is no class.
    """
    return ClassificationMetrics(
        accuracy=accuracy(probs, targets),
        nll=negative_log_likelihood(probs, targets),
        brier=brier_score(probs, targets),
        ece=expected_calibration_error(probs, targets, num_bins=num_bins),
    )


def detection(
    in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]
) -> DetectionMetrics:
    """AUROC and FPR95 at once.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        The two figures.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.
    """
    return DetectionMetrics(auroc(in_scores, out_scores), fpr95(in_scores, out_scores))


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
    probs, targets = _checked(probs, targets)
    # "micro" counts data; the default of torchmetrics averages over classes.
    return multiclass_accuracy(probs, targets, probs.shape[1], average="micro").item()


def negative_log_likelihood(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> float:
    """Mean negative log likelihood of the targets.

    Args:
        probs: predictive probabilities `[batch, classes]`; 0 counts as the smallest normal
            number of the dtype.
        targets: class indices `[batch]`.

    Returns:
        Nats a datum.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit, rows of `probs` are no distributions, or a target
            is no class.
    """
    _checked(probs, targets)
    # Not the checked double: the floor is that of the dtype in which probabilities underflowed.
    return uncertainty.negative_log_likelihood(probs, targets).item()


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
    """
    return uncertainty.brier_score(*_checked(probs, targets)).item()


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
        Guo et al. (2017), arXiv:1706.04599, equation 3.
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` is {num_bins}, expected at least 1 (15 is usual)")
    probs, targets = _checked(probs, targets)
    # torchmetrics computes in float32 and would put a confidence of 1 into a bin of its own.
    probs = probs.clamp_max(1 - torch.finfo(torch.float32).eps)
    return multiclass_calibration_error(probs, targets, probs.shape[1], n_bins=num_bins).item()


def auroc(in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]) -> float:
    """Probability that an out-of-distribution input scores above an in-distribution one.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        Area under the ROC curve, 0 to 1; ties count one half.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.
    """
    is_outside, scores = _labelled_scores(in_scores, out_scores)
    return float(roc_auc_score(is_outside, scores))


def fpr95(in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]) -> float:
    """False positive rate at 95 % true positive rate; in-distribution inputs are the positives.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        Share of out-of-distribution inputs accepted by the strictest threshold that accepts
        at least 95 % of the in-distribution ones.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.

    Source:
        Liang et al. (2018), arXiv:1706.02690, section 4.3.
    """
    is_outside, scores = _labelled_scores(in_scores, out_scores)
    # Every threshold is wanted: a curve without its collinear points can step over 95 %.
    fpr, tpr, _ = roc_curve(1 - is_outside, -scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def _checked(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Checks values on top of shapes and dtypes; gives float64 probabilities, int64 targets."""
    uncertainty.check_floating(probs, "probs")
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(
            f"`probs` has shape {tuple(probs.shape)}, expected [batch, classes], neither of them "
            "0: average posterior samples over their axis first"
        )
    uncertainty.check_targets(targets, len(probs))
    double = probs.detach().double()
    # Half a unit in the last place of each class.
    tolerance = max(1e-4, probs.shape[1] * torch.finfo(probs.dtype).eps)
    sums = double.sum(-1)
    is_distribution = (double >= 0).all(-1) & ((sums - 1).abs() <= tolerance)
    if not is_distribution.all():
        row = int((~is_distribution).nonzero()[0])
        raise ValueError(
            f"row {row} of `probs` sums to {sums[row].item():.4g} with smallest entry "
            f"{double[row].min().item():.4g}, expected probabilities that sum to 1: "
            "apply softmax to logits, and look for NaN"
        )
    if targets.min() < 0 or targets.max() >= probs.shape[1]:
        raise ValueError(
            f"`targets` lie between {targets.min().item()} and {targets.max().item()}, expected "
            f"0 to {probs.shape[1] - 1}, the column indices of `probs`"
        )
    return double, targets.detach().long()


def _labelled_scores(in_scores: Tensor, out_scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    for name, scores in (("in_scores", in_scores), ("out_scores", out_scores)):
        uncertainty.check_floating(scores, name)
        if scores.ndim != 1 or not len(scores):
            raise ValueError(
                f"`{name}` has shape {tuple(scores.shape)}, expected [inputs], at least one: "
                "one score for each input, such as `Predictive.entropy`"
            )
        if not scores.isfinite().all():
            raise ValueError(f"`{name}` holds NaN or infinite scores, expected finite ones")
    scores = torch.cat([in_scores.detach().double().cpu(), out_scores.detach().double().cpu()])
    is_outside = np.repeat([0, 1], [len(in_scores), len(out_scores)])
    return is_outside, scores.numpy()
