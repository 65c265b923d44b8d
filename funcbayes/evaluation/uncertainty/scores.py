"""Scores of predictive probabilities against targets: likelihood, Brier score, calibration."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.evaluation.uncertainty.common import (
    check_samples,
    check_targets,
    mean_log_probs,
    work_dtype,
)


class ReliabilityBins(NamedTuple):
    """Predictions gathered by their confidence, the largest class probability.

    Bin b holds the confidences in `[b / bins, (b + 1) / bins)`, the last one 1 as well.

    Attributes:
        confidence: mean confidence of each bin, `[bins]`; 0 where a bin is empty.
        accuracy: share of right predictions of each bin, `[bins]`; 0 where a bin is empty.
        counts: number of predictions of each bin, `[bins]`.
    """

    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    counts: Int[Tensor, " bins"]


def negative_log_likelihood(
    samples: Float[Tensor, "*samples batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    logits: bool = False,
) -> Float[Tensor, ""]:
    """Mean negative log likelihood of the targets under the mean probabilities.

    Args:
        samples: class probabilities `[samples, batch, classes]`, or their mean
            `[batch, classes]`. A mean of 0 counts as the smallest normal number of the
            dtype: a probability that underflowed does not make the score infinite.
        targets: class indices `[batch]`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        Nats a datum.

    Raises:
        TypeError: `samples` is not a floating-point tensor, or `targets` are not integers.
        ValueError: a shape does not fit.
    """
    samples = _with_sample_axis(samples)
    check_targets(targets, samples.shape[1])
    wide = samples.to(work_dtype(samples))
    if logits:
        log_mean = mean_log_probs(wide.log_softmax(-1))
    else:
        log_mean = wide.mean(0).clamp_min(torch.finfo(samples.dtype).tiny).log()
    return -log_mean.gather(-1, targets.long().unsqueeze(-1)).mean()


def brier_score(
    samples: Float[Tensor, "*samples batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    logits: bool = False,
) -> Float[Tensor, ""]:
    """Mean squared distance of the mean probabilities from the one-hot targets.

    Args:
        samples: class probabilities `[samples, batch, classes]`, or their mean
            `[batch, classes]`.
        targets: class indices `[batch]`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        Σ_c (p_c − y_c)², averaged over the batch: between 0 and 2.

    Raises:
        TypeError: `samples` is not a floating-point tensor, or `targets` are not integers.
        ValueError: a shape does not fit.

    Source:
        Brier (1950), doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2: the sum over
        classes, which is twice the score that some libraries give for two classes.
    """
    samples = _with_sample_axis(samples)
    check_targets(targets, samples.shape[1])
    probs = _mean_probs(samples, logits=logits)
    one_hot = torch.nn.functional.one_hot(targets.long(), probs.shape[-1])
    return (probs - one_hot).square().sum(-1).mean()


def reliability_bins(
    samples: Float[Tensor, "*samples batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    num_bins: int = 15,
    logits: bool = False,
) -> ReliabilityBins:
    """Confidence and accuracy of the predictions in bins of equal width.

    Args:
        samples: class probabilities `[samples, batch, classes]`, or their mean
            `[batch, classes]`.
        targets: class indices `[batch]`.
        num_bins: bins between 0 and 1.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        `(confidence, accuracy, counts)` of each bin.

    Raises:
        TypeError: `samples` is not a floating-point tensor, or `targets` are not integers.
        ValueError: a shape does not fit, or `num_bins` is below 1.
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` is {num_bins}, expected at least 1 (15 is usual)")
    samples = _with_sample_axis(samples)
    check_targets(targets, samples.shape[1])
    confidence, predicted = _mean_probs(samples, logits=logits).max(-1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidence.dtype, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1], right=True)
    in_bin = torch.nn.functional.one_hot(bins, num_bins).to(confidence.dtype)
    count = in_bin.sum(0)
    right = (predicted == targets).to(confidence.dtype)
    return ReliabilityBins(
        confidence=confidence @ in_bin / count.clamp_min(1),
        accuracy=right @ in_bin / count.clamp_min(1),
        counts=count.long(),
    )


def expected_calibration_error(
    samples: Float[Tensor, "*samples batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    num_bins: int = 15,
    logits: bool = False,
) -> Float[Tensor, ""]:
    """Mean gap between confidence and accuracy, weighted by the bins' counts.

    Args:
        samples: class probabilities `[samples, batch, classes]`, or their mean
            `[batch, classes]`.
        targets: class indices `[batch]`.
        num_bins: bins between 0 and 1.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        Σ_b counts_b |accuracy_b − confidence_b| / batch, between 0 and 1.

    Raises:
        TypeError: `samples` is not a floating-point tensor, or `targets` are not integers.
        ValueError: a shape does not fit, or `num_bins` is below 1.

    Source:
        Guo et al. (2017), arXiv:1706.04599, equation 3; bins closed below as in torchmetrics,
        where the paper closes them above.
    """
    bins = reliability_bins(samples, targets, num_bins=num_bins, logits=logits)
    gap = (bins.accuracy - bins.confidence).abs()
    return (bins.counts * gap).sum() / bins.counts.sum()


def _with_sample_axis(samples: Tensor) -> Tensor:
    if isinstance(samples, Tensor) and samples.ndim == 2:
        samples = samples.unsqueeze(0)
    check_samples(samples)
    return samples


def _mean_probs(samples: Tensor, *, logits: bool) -> Tensor:
    probs = samples.to(work_dtype(samples))
    return (probs.softmax(-1) if logits else probs).mean(0)
