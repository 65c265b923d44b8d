"""Uncertainty of class probabilities: entropies and their parts, and how far samples disagree."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.evaluation.uncertainty.common import (
    check_samples,
    divergence,
    entropy,
    expectation,
    log_probs,
    mean_log_probs,
    work_dtype,
)


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
    return entropy(mean_log_probs(log_probs(samples, logits=logits)))


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
    return entropy(log_probs(samples, logits=logits)).mean(0)


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
    each = log_probs(samples, logits=logits)
    mean = mean_log_probs(each)
    return expectation(mean, divergence(each, mean))


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
    each = log_probs(samples, logits=logits)
    mean = mean_log_probs(each)
    return Decomposition(
        total=entropy(mean),
        epistemic=expectation(mean, divergence(each, mean)),
        aleatoric=entropy(each).mean(0),
    )


def variation_ratio(samples: Float[Tensor, "samples batch classes"]) -> Float[Tensor, " batch"]:
    """Share of the samples whose most probable class is not the most frequent one.

    Args:
        samples: class probabilities, or logits, `[samples, batch, classes]`.

    Returns:
        Variation ratio between 0 and 1 − 1 / classes, `[batch]`; 0 for one sample.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one.

    Source:
        Freeman (1965), Elementary Applied Statistics; Gal (2016), Uncertainty in Deep Learning
        (PhD thesis, University of Cambridge), equation 3.19.
    """
    votes = _votes(samples)
    # One division: 1 − modal / S would leave rounding where all agree.
    return (len(samples) - votes.amax(-1)).to(work_dtype(samples)) / len(samples)


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
    # Pairs that agree are counted class by class: S·N·C work, not S²·N.
    votes, num = _votes(samples), len(samples)
    differing = num * (num - 1) - (votes * (votes - 1)).sum(-1)
    return differing.to(work_dtype(samples)) / max(num * (num - 1), 1)


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
    check_samples(samples)
    if metric not in ("variance", "disagreement", "kl"):
        raise ValueError(f"`metric` is {metric!r}, expected 'variance', 'disagreement' or 'kl'")
    if metric == "disagreement":
        return disagreement(samples).mean()
    num = samples.shape[0]
    probs = samples.to(work_dtype(samples))
    if num == 1:
        return probs.new_zeros(())
    if metric == "variance":
        return probs.var(0).mean()
    # Σ_{s,t} KL(p_s ‖ p_t) without the pairs. Logarithms relative to their mean: the sums
    # would otherwise cancel where the members agree.
    each = log_probs(samples, logits=False)
    mean = mean_log_probs(each)
    own = num * expectation(each, each - mean).sum(0)
    total = probs.sum(0)
    # Here log 0 is −inf; a class that every member excludes counts nothing.
    relative = (probs.log() - mean).sum(0)
    cross = torch.where(total > 0, total * relative, 0).sum(-1)
    return ((own - cross).clamp_min(0) / (num * (num - 1))).mean()


def _votes(samples: Tensor) -> Tensor:
    """How many samples find each class the most probable, `[batch, classes]`."""
    check_samples(samples)
    return torch.nn.functional.one_hot(samples.argmax(-1), samples.shape[-1]).sum(0)
