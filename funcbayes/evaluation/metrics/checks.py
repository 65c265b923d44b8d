"""The doors of the metrics: shapes, dtypes and values, and float64 behind them."""

import torch
from torch import Tensor

from funcbayes.evaluation import uncertainty


def checked_probs(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities `[batch, classes]` in float64 and class indices `[batch]` in int64."""
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


def check_num_bins(num_bins: int) -> None:
    """Raises ValueError below one bin."""
    if num_bins < 1:
        raise ValueError(f"`num_bins` is {num_bins}, expected at least 1 (15 is usual)")


def checked_scores(scores: Tensor, name: str) -> Tensor:
    """Finite scores `[inputs]` in float64."""
    uncertainty.check_floating(scores, name)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"`{name}` has shape {tuple(scores.shape)}, expected [inputs], at least one: "
            "one score for each input, such as `Predictive.entropy`"
        )
    if not scores.isfinite().all():
        raise ValueError(f"`{name}` holds NaN or infinite scores, expected finite ones")
    return scores.detach().double()


def checked_targets(targets: Tensor) -> Tensor:
    """Finite regression targets of any shape in float64."""
    uncertainty.check_floating(targets, "targets")
    if not targets.numel():
        raise ValueError(
            f"`targets` has shape {tuple(targets.shape)}, expected [batch], at least one datum"
        )
    return _finite(targets, "targets")


def checked_means(means: Tensor, name: str, targets: Tensor, *, samples: bool) -> Tensor:
    """Finite means like `targets`, or with `samples` one such for each sample, in float64."""
    uncertainty.check_floating(means, name)
    _check_shape(means, name, targets, samples=samples)
    return _finite(means, name)


def checked_stds(stds: Tensor, name: str, means: Tensor, like: str) -> Tensor:
    """Finite positive standard deviations, one for each mean, in float64."""
    uncertainty.check_floating(stds, name)
    if stds.shape != means.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(stds.shape)}, expected {tuple(means.shape)}, that of "
            f"`{like}`: one number for all is `{name}.expand_as({like})`"
        )
    stds = _finite(stds, name)
    if not (stds > 0).all():
        raise ValueError(
            f"`{name}` has smallest entry {stds.min().item():.4g}, expected positive standard "
            "deviations of y: take `Predictive.total.sqrt()`, which has the noise in it"
        )
    return stds


def checked_interval(
    lower: Tensor, upper: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of intervals like `targets`, possibly infinite, and the targets, in float64."""
    targets = checked_targets(targets)
    for name, end in (("lower", lower), ("upper", upper)):
        uncertainty.check_floating(end, name)
        _check_shape(end, name, targets, samples=False)
    return *checked_ends(lower, upper), targets


def checked_ends(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of intervals in order, possibly infinite, in float64."""
    uncertainty.check_floating(lower, "lower")
    uncertainty.check_floating(upper, "upper")
    if lower.shape != upper.shape or not lower.numel():
        raise ValueError(
            f"`lower` has shape {tuple(lower.shape)} and `upper` {tuple(upper.shape)}, expected "
            "the same, [batch], with at least one datum"
        )
    lower, upper = lower.detach().double(), upper.detach().double()
    # Not `lower > upper`: a NaN would pass. Both ends at one infinity make no width either.
    in_order = (lower <= upper) & (lower < torch.inf) & (upper > -torch.inf)
    if not in_order.all():
        where = int((~in_order).flatten().nonzero()[0])
        raise ValueError(
            f"interval {where} is from {lower.flatten()[where].item():.4g} to "
            f"{upper.flatten()[where].item():.4g}, expected `lower` <= `upper`: were they swapped?"
        )
    return lower, upper


def kind(value: object) -> str:
    """What a value is, for a message about its type."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"a {type(value).__name__}"


def check_level(level: float) -> None:
    """Raises ValueError unless `level` is a probability between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(
            f"`level` is {level}, expected a probability between 0 and 1, such as 0.9 "
            "for the central 90 % interval"
        )


def _check_shape(value: Tensor, name: str, targets: Tensor, *, samples: bool) -> None:
    want = tuple(targets.shape)
    if samples and (value.ndim == 0 or value.shape[1:] != targets.shape or not len(value)):
        wanted = "(" + ", ".join(["samples", *map(str, want)]) + ")"
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, expected {wanted}, at least one sample: "
            "the samples are the first axis, the others are those of `targets`"
        )
    if not samples and value.shape != targets.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, expected {want}, that of `targets`: "
            "squeeze the output's axis of size 1, or add it to the targets"
        )


def _finite(value: Tensor, name: str) -> Tensor:
    if not value.isfinite().all():
        raise ValueError(f"`{name}` holds NaN or infinite numbers, expected finite ones")
    return value.detach().double()
