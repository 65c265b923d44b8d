"""Uncertainty of posterior samples of class probabilities, and their scores.

Every function takes `samples` `[samples, batch, classes]`: the class probabilities of each
posterior sample, as `Predictive.samples` and the classes' `predict(..., return_samples=True)`
give them, or logits with `logits=True`. All are pure torch and pass through `vmap`, `grad` and
`torch.compile`, so they check shapes and dtypes and never values. Entropies are in nats;
float16 and bfloat16 are computed, and returned, in float32.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Decomposition(NamedTuple):
    """Total uncertainty of a prediction and its two parts, in nats, each `[batch]`.

    Attributes:
        total: entropy of the mean probabilities, H[E p].
        epistemic: mutual information of label and parameters, H[E p] − E H[p]: what more
            data would remove.
        aleatoric: expected entropy E H[p]: what stays whatever the parameters are.
    """

    total: Float[Tensor, " batch"]
    epistemic: Float[Tensor, " batch"]
    aleatoric: Float[Tensor, " batch"]


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


def predictive_entropy(
    samples: Float[Tensor, "samples batch classes"], *, logits: bool = False
) -> Float[Tensor, " batch"]:
    """Entropy of the mean probabilities: the total uncertainty.

    Args:
        samples: class probabilities `[samples, batch, classes]`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        H[E p] in nats, between 0 and log(classes), `[batch]`.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one.
    """
    return _entropy(_mean_log_probs(_log_probs(samples, logits=logits)))


def expected_entropy(
    samples: Float[Tensor, "samples batch classes"], *, logits: bool = False
) -> Float[Tensor, " batch"]:
    """Mean entropy of the samples: the aleatoric part.

    Args:
        samples: class probabilities `[samples, batch, classes]`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        E H[p] in nats, `[batch]`.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one.
    """
    return _entropy(_log_probs(samples, logits=logits)).mean(0)


def mutual_information(
    samples: Float[Tensor, "samples batch classes"], *, logits: bool = False
) -> Float[Tensor, " batch"]:
    """Mutual information of label and parameters (BALD): the epistemic part.

    Args:
        samples: class probabilities `[samples, batch, classes]`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        H[E p] − E H[p] in nats, `[batch]`; never negative, and 0 for one sample.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one.

    Source:
        Houlsby et al. (2011), arXiv:1112.5745, equation 2. Computed as the mean KL divergence
        of each sample from their mean, which equals the difference of entropies and does not
        cancel where the samples agree.
    """
    log_probs = _log_probs(samples, logits=logits)
    mean = _mean_log_probs(log_probs)
    # KL is not negative, its rounding error can be.
    return _expectation(log_probs, log_probs - _finite(mean)).mean(0).clamp_min(0)


def decompose(
    samples: Float[Tensor, "samples batch classes"], *, logits: bool = False
) -> Decomposition:
    """Splits the predictive entropy into its epistemic and its aleatoric part.

    Args:
        samples: class probabilities `[samples, batch, classes]`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        `(total, epistemic, aleatoric)` with total = epistemic + aleatoric (to rounding).

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one.

    Source:
        Depeweg et al. (2018), arXiv:1710.07283, equation 2.
    """
    return Decomposition(
        total=predictive_entropy(samples, logits=logits),
        epistemic=mutual_information(samples, logits=logits),
        aleatoric=expected_entropy(samples, logits=logits),
    )


def disagreement(samples: Float[Tensor, "samples batch classes"]) -> Float[Tensor, " batch"]:
    """Share of the pairs of samples whose most probable classes differ.

    Args:
        samples: class probabilities, or logits, `[samples, batch, classes]`.

    Returns:
        Disagreement between 0 and 1, `[batch]`; 0 for one sample.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one.

    Source:
        Fort et al. (2019), arXiv:1912.02757, section 4, for every pair.
    """
    _check_samples(samples)
    num, _, classes = samples.shape
    # Pairs that agree are counted class by class: S·N·C work, not S²·N.
    votes = torch.nn.functional.one_hot(samples.argmax(-1), classes).sum(0)
    agreeing = (votes * (votes - 1)).sum(-1)
    dtype = _work_dtype(samples)
    return 1 - agreeing.to(dtype) / (num * (num - 1)) if num > 1 else agreeing.to(dtype)


def ensemble_diversity(
    samples: Float[Tensor, "samples batch classes"],
    *,
    metric: Literal["variance", "disagreement", "kl"] = "variance",
) -> Float[Tensor, ""]:
    """How far the members of an ensemble differ, averaged over the batch.

    Args:
        samples: class probabilities of each member, `[members, batch, classes]`.
        metric: "variance", the mean unbiased variance of a class probability over members;
            "disagreement", the mean of `disagreement`; "kl", the mean KL divergence, in nats,
            over the ordered pairs of members.

    Returns:
        One number, not negative; 0 for one member. Infinite for "kl" where one member gives
        probability 0 to a class and another does not.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `metric` is unknown, or `samples` has not three axes, or an empty one.
    """
    _check_samples(samples)
    if metric not in ("variance", "disagreement", "kl"):
        raise ValueError(f"`metric` is {metric!r}, expected 'variance', 'disagreement' or 'kl'")
    if metric == "disagreement":
        return disagreement(samples).mean()
    num = samples.shape[0]
    probs = samples.to(_work_dtype(samples))
    if num == 1:
        return probs.new_zeros(())
    if metric == "variance":
        return probs.var(0).mean()
    # Σ_{s,t} KL(p_s ‖ p_t) without the pairs. Logarithms relative to their mean: the sums
    # would otherwise cancel where the members agree.
    log_probs = probs.log()
    relative = log_probs - _finite(_mean_log_probs(log_probs))
    own = num * _expectation(log_probs, relative).sum(0)
    total = probs.sum(0)
    # A class that every member excludes counts nothing.
    cross = torch.where(total > 0, total * relative.sum(0), 0).sum(-1)
    return ((own - cross).clamp_min(0) / (num * (num - 1))).mean()


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
    mean = _mean_log_probs(_log_probs(samples, logits=logits))
    if not logits:
        mean = mean.clamp_min(math.log(torch.finfo(samples.dtype).tiny))
    return -mean.gather(-1, targets.long().unsqueeze(-1)).mean()


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


def _work_dtype(samples: Tensor) -> torch.dtype:
    # Sums of float16 lose whole digits, and its smallest probability is 6e-8.
    return torch.promote_types(samples.dtype, torch.float32)


def check_floating(value: Tensor, name: str) -> None:
    """Raises TypeError unless `value` is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"`{name}` is {_kind(value)}, expected a floating-point tensor")


def check_targets(targets: Tensor, batch: int) -> None:
    """Raises TypeError or ValueError unless `targets` are `batch` integers."""
    dtype = targets.dtype if isinstance(targets, Tensor) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(
            f"`targets` is {_kind(targets)}, expected an integer tensor of class indices: "
            "use `targets.long()`"
        )
    if targets.shape != (batch,):
        raise ValueError(
            f"`targets` has shape {tuple(targets.shape)}, expected ({batch},): "
            "one class index for each row of the batch"
        )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"a {type(value).__name__}"


def _check_samples(samples: Tensor) -> None:
    check_floating(samples, "samples")
    if samples.ndim != 3 or 0 in samples.shape:
        raise ValueError(
            f"`samples` has shape {tuple(samples.shape)}, expected [samples, batch, classes], "
            "none of them 0; `predict(..., return_samples=True)` returns it"
        )


def _with_sample_axis(samples: Tensor) -> Tensor:
    if isinstance(samples, Tensor) and samples.ndim == 2:
        samples = samples.unsqueeze(0)
    _check_samples(samples)
    return samples


def _log_probs(samples: Tensor, *, logits: bool) -> Tensor:
    _check_samples(samples)
    samples = samples.to(_work_dtype(samples))
    return samples.log_softmax(-1) if logits else samples.log()


def _mean_log_probs(log_probs: Tensor) -> Tensor:
    return log_probs.logsumexp(0) - math.log(log_probs.shape[0])


def _mean_probs(samples: Tensor, *, logits: bool) -> Tensor:
    probs = samples.to(_work_dtype(samples))
    return (probs.softmax(-1) if logits else probs).mean(0)


def _finite(log_probs: Tensor) -> Tensor:
    # log 0 as the lowest number, so that 0 · log 0 is 0 and not NaN.
    return log_probs.clamp_min(torch.finfo(log_probs.dtype).min)


def _expectation(log_probs: Tensor, values: Tensor) -> Tensor:
    return (log_probs.exp() * _finite(values)).sum(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    # An entropy is not negative, its rounding error can be: log p may come out above 0.
    return -_expectation(log_probs, log_probs).clamp_max(0)
