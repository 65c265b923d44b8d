"""Uncertainty of a regression: parts of the variance, quantiles and intervals of the mixture.

The predictive distribution of a Gaussian likelihood is a mixture of normals with equal
weights, one a posterior sample: means as `predict(..., return_samples=True)` gives them, and the
noise about each.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.evaluation.uncertainty.common import check_floating, work_dtype


class VarianceDecomposition(NamedTuple):
    """Variance of y and its two parts, in the targets' units squared, each `[batch, *out]`.

    Attributes:
        total: variance of the mixture of all samples.
        epistemic: variance over samples of the mean; what more data would remove. That of the
            mixture, so it is divided by the number of samples S, where `Predictive.variance`
            estimates that of the posterior and divides by S − 1.
        aleatoric: mean over samples of the noise variance; what stays.
    """

    total: Float[Tensor, "batch *out"]
    epistemic: Float[Tensor, "batch *out"]
    aleatoric: Float[Tensor, "batch *out"]


class Interval(NamedTuple):
    """An interval for each target, ends included.

    Attributes:
        lower: lower ends, `[batch, *out]`.
        upper: upper ends, `[batch, *out]`.
    """

    lower: Float[Tensor, "batch *out"]
    upper: Float[Tensor, "batch *out"]


def decompose_variance(
    means: Float[Tensor, "samples batch *out"], variances: Float[Tensor, "..."] | float
) -> VarianceDecomposition:
    """Splits the variance of y into its epistemic and its aleatoric part.

    Args:
        means: mean of y given each sample, `[samples, batch, *out]`.
        variances: variance of y given each sample: a number, or a tensor that broadcasts to
            `means`.

    Returns:
        `(total, epistemic, aleatoric)` with total = epistemic + aleatoric.

    Raises:
        TypeError: `means` or `variances` is not floating point.
        ValueError: a shape does not fit, or the number `variances` is negative.

    Source:
        The law of total variance; Depeweg et al. (2018), arXiv:1710.07283, equation 5.
    """
    means = _means(means, "means")
    aleatoric = _noise(variances, means, "variances").mean(0)
    epistemic = means.var(0, correction=0)
    return VarianceDecomposition(epistemic + aleatoric, epistemic, aleatoric)


def mixture_quantiles(
    means: Float[Tensor, "samples batch *out"],
    stds: Float[Tensor, "..."] | float,
    levels: Float[Tensor, " levels"] | Sequence[float],
) -> Float[Tensor, "levels batch *out"]:
    """Quantiles of the mixture of normals over posterior samples.

    Correct to rounding, that of the distribution function included: the smallest number at
    which it reaches the level (above ½ the largest from which the upper tail reaches 1 − level),
    found by bisection between floating-point numbers. That takes as many evaluations as the
    dtype has bits, whatever the scale. No gradient flows.

    Args:
        means: mean of each component, `[samples, batch, *out]`.
        stds: standard deviation of each component: a number, or a tensor that broadcasts to
            `means`. 0 is a point mass.
        levels: probabilities between 0 and 1, `[levels]`, in any order. A tensor's values are
            not checked: outside [0, 1] the result is NaN.

    Returns:
        `[levels, batch, *out]`, never falling in the level.

    Raises:
        TypeError: `means`, `stds` or `levels` is not floating point.
        ValueError: a shape does not fit, the number `stds` is negative, or a level that is a
            number is not between 0 and 1.
    """
    means = _means(means, "means").detach()
    stds = _noise(stds, means, "stds").detach()
    levels = _levels(levels, means)
    # An upper quantile is the lower one of −y: the distribution function rounds 1 − 1e-9 to 1
    # in float32, but 1e-9 to eight digits. 1 − level is exact from ½ on.
    is_upper = levels > 0.5
    tail = torch.where(is_upper, 1 - levels, levels)
    sign = torch.where(is_upper, -1.0, 1.0).to(levels.dtype)
    tail, sign = (x.reshape(-1, *[1] * (means.ndim - 1)) for x in (tail, sign))
    quantiles = sign * _lower_quantiles(sign.unsqueeze(1) * means, stds, tail)
    return _monotone(quantiles, levels)


def mixture_interval(
    means: Float[Tensor, "samples batch *out"],
    stds: Float[Tensor, "..."] | float,
    level: float = 0.9,
) -> Interval:
    """Central interval of the mixture of normals over posterior samples.

    Args:
        means: mean of each component, `[samples, batch, *out]`.
        stds: standard deviation of each component: a number, or a tensor that broadcasts to
            `means`.
        level: probability of the interval; half of the rest lies on each side.

    Returns:
        `(lower, upper)`, each `[batch, *out]`.

    Raises:
        TypeError: `means` or `stds` is not floating point, or `level` is not a number.
        ValueError: a shape does not fit, the number `stds` is negative, or `level` is not
            between 0 and 1.
    """
    return Interval(*mixture_quantiles(means, stds, _central(level)))


def sample_quantiles(
    samples: Float[Tensor, "samples batch *out"],
    levels: Float[Tensor, " levels"] | Sequence[float],
) -> Float[Tensor, "levels batch *out"]:
    """Quantiles of plain samples, with linear interpolation between them.

    Of samples of y, or of the means alone: then they are those of the epistemic part. No
    gradient flows.

    Args:
        samples: `[samples, batch, *out]`; NaN where one of them is NaN.
        levels: probabilities between 0 and 1, `[levels]`, in any order. A tensor's values are
            not checked.

    Returns:
        `[levels, batch, *out]`, never falling in the level.

    Raises:
        TypeError: `samples` or `levels` is not floating point.
        ValueError: a shape does not fit, or a level that is a number is not between 0 and 1.

    Source:
        Hyndman and Fan (1996), doi:10.1080/00031305.1996.10473566, definition 7, the default of
        NumPy and torch; `torch.quantile` itself takes at most 2²⁴ numbers.
    """
    samples = _means(samples, "samples").detach()
    levels = _levels(levels, samples)
    ordered = samples.sort(0).values
    position = levels.double() * (len(samples) - 1)
    # The clamp moves only levels that are none, which would point outside the samples.
    below = position.floor().clamp(0, len(samples) - 1)
    part = (position - below).to(samples.dtype).reshape(-1, *[1] * (samples.ndim - 1))
    low = ordered[below.long()]
    high = ordered[(below.long() + 1).clamp_max(len(samples) - 1)]
    # Not low + part · (high − low), which overflows, and is NaN between equal infinities.
    between = ((1 - part) * low + part * high).clamp(low, high)
    quantiles = torch.where(part == 0, low, between)
    quantiles = torch.where(samples.isnan().any(0), math.nan, quantiles)
    return _monotone(quantiles, levels)


def sample_interval(samples: Float[Tensor, "samples batch *out"], level: float = 0.9) -> Interval:
    """Central interval of plain samples.

    Args:
        samples: `[samples, batch, *out]`.
        level: probability of the interval; half of the rest lies on each side.

    Returns:
        `(lower, upper)`, each `[batch, *out]`.

    Raises:
        TypeError: `samples` is not floating point, or `level` is not a number.
        ValueError: a shape does not fit, or `level` is not between 0 and 1.
    """
    return Interval(*sample_quantiles(samples, _central(level)))


def _lower_quantiles(means: Tensor, stds: Tensor, tail: Tensor) -> Tensor:
    """Quantiles of `means` `[levels, samples, *shape]` at `tail`, at most ½."""
    # Between those of the components: at the least of them no component has more than `tail`.
    each = means + stds * torch.special.ndtri(tail).unsqueeze(1)
    low, high = _ordinal(each.amin(1)), _ordinal(each.amax(1))
    at_mean = torch.where(stds == 0, math.inf, 0.0)  # where (x − mean) / std may be 0 / 0
    for _ in range(8 * means.element_size()):
        # The average without overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        x = _number(middle, means.dtype).unsqueeze(1)
        z = torch.where(x == means, at_mean, (x - means) / stds)
        # Not torch.special.ndtr, which is 1 + erf and has no small numbers.
        reached = torch.special.erfc(-z / math.sqrt(2)).mean(1) / 2 >= tail
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return torch.where(each.isnan().any(1), math.nan, _number(high, means.dtype))


def _ordinal(x: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers, neighbours for neighbours."""
    bits = x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    # A negative number has the sign bit before a magnitude that grows downwards.
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits)


def _number(ordinal: Tensor, dtype: torch.dtype) -> Tensor:
    least = torch.iinfo(ordinal.dtype).min
    return torch.where(ordinal < 0, least - ordinal, ordinal).view(dtype)


def _monotone(quantiles: Tensor, levels: Tensor) -> Tensor:
    """Lifts a quantile that rounding put below that of a smaller level."""
    order = levels.argsort()
    # NaN, of a level that is none, would spread to those above it.
    known = torch.where(quantiles.isnan(), -math.inf, quantiles)[order]
    lifted = known.cummax(0).values[order.argsort()]
    return torch.where(quantiles.isnan(), quantiles, lifted)


def _means(value: Tensor, name: str) -> Tensor:
    check_floating(value, name)
    if value.ndim < 2 or 0 in value.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, expected [samples, batch, *out], none of "
            "them 0; `predict(..., return_samples=True)` returns it"
        )
    return value.to(work_dtype(value))


def _noise(value: Tensor | float, means: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"`{name}` is a {type(value).__name__}, expected a number or a floating-point "
                "tensor"
            )
        if not value >= 0:
            raise ValueError(f"`{name}` is {value}, expected a number that is not negative")
        return torch.full_like(means, float(value))
    check_floating(value, name)
    shape = tuple(value.shape)
    fits = len(shape) <= means.ndim and all(
        s in (1, m) for s, m in zip(reversed(shape), reversed(means.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"`{name}` has shape {shape}, expected one that broadcasts to "
            f"{tuple(means.shape)}, the shape of `means`"
        )
    return value.to(means.dtype).expand_as(means)


def _levels(levels: Tensor | Sequence[float], like: Tensor) -> Tensor:
    if not isinstance(levels, Tensor):
        for level in levels:
            _check_level(level, "levels")
        levels = torch.tensor(list(levels), dtype=like.dtype, device=like.device)
    check_floating(levels, "levels")
    if levels.ndim != 1 or not len(levels):
        raise ValueError(
            f"`levels` has shape {tuple(levels.shape)}, expected [levels], at least one"
        )
    return levels.to(dtype=like.dtype, device=like.device)


def _central(level: float) -> list[float]:
    _check_level(level, "level")
    return [(1 - level) / 2, 1 - (1 - level) / 2]


def _check_level(level: float, name: str) -> None:
    if isinstance(level, bool) or not isinstance(level, Real):
        raise TypeError(f"`{name}` holds a {type(level).__name__}, expected numbers")
    if not 0 < level < 1:
        raise ValueError(
            f"`{name}` holds {level}, expected probabilities between 0 and 1: 0.05 for 5 %"
        )
