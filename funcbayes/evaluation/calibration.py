"""Calibration: the temperature of logits that fits held-out data best."""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from funcbayes.core.likelihoods import Bernoulli, Categorical

# Temperatures of the scan, a decade.
_PER_DECADE = 8


def fit_temperature(
    outputs: Float[Tensor, "..."],
    targets: Shaped[Tensor, "..."],
    *,
    likelihood: Categorical | Bernoulli = Categorical(),  # noqa: B008 (a value)
    start: float = 1.0,
    bounds: tuple[float, float] = (1e-6, 1e6),
) -> Float[Tensor, ""]:
    """The temperature that minimises the negative log likelihood of held-out targets.

    Of one network that is the mean of -log softmax(z/T) at the targets; of posterior samples that
    of the *mean* of softmax(z/T) over them, which is what a prediction reports. It is computed in
    float64. What is guaranteed:

    - Without samples, or with one, the problem is convex in 1/T, and the result is its minimiser
      to rounding, whatever the start.
    - With more samples it is not convex. The derivative is looked at in `bounds`, at eight
      temperatures a decade and at the start, and the result is the best of the local minima that
      they tell apart. It is never worse than one of these temperatures.
    - Where the likelihood only grows towards an end of `bounds`, the result is that end, with a
      warning: towards 0 where every target has the largest logit (separable data), upwards where
      the logits say nothing of the targets or the opposite.
    - Where every temperature fits alike (the logits of each row are all the same), the result is
      the start, with a warning.

    Args:
        outputs: raw outputs of the network on data that it was not trained on: `[batch, *out]`, or
            `[samples, batch, *out]` as `predict(..., return_samples=True).samples` gives without
            a likelihood. −inf marks a class that is excluded.
        targets: one target a datum or a position, as `likelihood` takes them.
        likelihood: what the outputs mean. Its own temperature is not used.
        start: temperature to begin at.
        bounds: least and largest temperature.

    Returns:
        The temperature, in the dtype of `outputs`, at least float32.

    Raises:
        TypeError: `likelihood` is neither a Categorical nor a Bernoulli; `outputs` or `targets`
            is no tensor; `start` or `bounds` are no numbers.
        ValueError: no data; NaN or infinite outputs; targets that do not fit the outputs; `bounds`
            are not positive and in order, or `start` is not between them.

    Source:
        Guo et al. (2017), arXiv:1706.04599, section 4.2; for ensembles Rahaman and Thiery (2021),
        arXiv:2007.08792: the temperature goes into each member, and is fitted to their mean.

    Examples:
        Fit on the outputs for the validation data, then predict with the result:

        >>> import torch, funcbayes as fb
        >>> generator = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(9, 3))
        >>> model = fb.Model.from_module(net)
        >>> posterior = fb.dropout.posterior(model)
        >>> x = torch.randn(50, 9)
        >>> y = (net(x) + torch.randn(50, 3)).argmax(-1)
        >>> pred = fb.predict(model, posterior, x, key=0, num_samples=9, return_samples=True)
        >>> temperature = fb.calibration.fit_temperature(pred.samples, y)
        >>> likelihood = fb.likelihoods.Categorical(temperature=temperature)
        >>> fb.predict(model, posterior, x, key=1, num_samples=9, likelihood=likelihood).mean.shape
        torch.Size([50, 3])
    """
    bounds = _checked_range(start, bounds)
    margins = _margins(outputs, targets, likelihood)
    scale = margins.where(margins.isfinite(), 0).abs().max().item()
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    if scale == 0:
        _warn("every temperature fits alike, because the outputs of each row are all the same")
        return torch.full((), start, dtype=dtype, device=outputs.device)
    # In units of the largest margin nothing overflows.
    loss = _loss(margins / scale)
    low, high = bounds
    points = {scale / high, scale / start, scale / low}
    if len(margins) > 1:
        steps = math.ceil(_PER_DECADE * math.log10(high / low))
        points |= {scale / (low * (high / low) ** (i / steps)) for i in range(1, steps)}
    scan = [loss(point) for point in sorted(points)]
    best = _minimum(loss, scan)
    if best.inverse == scan[0].inverse:
        _warn(
            f"the best temperature lies above {high:g}, the upper end of `bounds`: the outputs say "
            "less of the targets than a guess would, are the two in the same order?"
        )
    if best.inverse == scan[-1].inverse:
        _warn(
            f"the best temperature lies below {low:g}, the lower end of `bounds`: the likelihood "
            "only grows as it falls, as where every target has the largest output; fit on more "
            "data that the network was not trained on"
        )
    temperature = min(max(scale / best.inverse, low), high)
    return torch.full((), temperature, dtype=dtype, device=outputs.device)


class _Point(NamedTuple):
    """The loss and its first two derivatives at an inverse temperature."""

    inverse: float
    loss: float
    slope: float
    curvature: float


def _loss(margins: Tensor) -> Callable[[float], _Point]:
    """The negative log likelihood of the targets as a function of the inverse temperature β.

    −log p(target) is logsumexp_c β m_c, with the margin m_c of class c over the target; its
    derivative in β is the mean of m under the tempered probabilities, then their variance.

    Args:
        margins: m, `[samples, rows, classes]`; 0 at the targets, −inf for excluded classes.
    """
    largest = margins.amax(-1)
    below = margins - largest.unsqueeze(-1)
    finite = below.where(below.isfinite(), 0)

    def at(inverse: float) -> _Point:
        weights = (inverse * below).exp()
        total = weights.sum(-1)
        mean = (weights * finite).sum(-1) / total
        variance = (weights * finite.square()).sum(-1) / total - mean.square()
        slopes = largest + mean
        log_probs = -(inverse * largest + total.log())
        log_mean = log_probs.logsumexp(0)
        # How much of the mean probability each sample is.
        share = (log_probs - log_mean).exp()
        slope = (share * slopes).sum(0)
        curvature = (share * (variance - slopes.square())).sum(0) + slope.square()
        loss = math.log(len(margins)) - log_mean
        return _Point(inverse, *(x.sum().item() for x in (loss, slope, curvature)))

    return at


def _minimum(loss: Callable[[float], _Point], scan: list[_Point]) -> _Point:
    """The best of the local minima between points, sorted, that the signs of the slopes show."""
    found = [_root(loss, a, b) for a, b in pairwise(scan) if a.slope < 0 < b.slope]
    # A slope of 0 is a minimum, or a plateau to rounding; on that, the end is what is meant.
    found += [point for point in scan[1:-1] if point.slope == 0]
    found += [scan[0]] if scan[0].slope >= 0 else []
    found += [scan[-1]] if scan[-1].slope <= 0 else []
    best = min(reversed(found), key=lambda point: point.loss)
    lowest = min(scan, key=lambda point: point.loss)
    # Two more stationary points may hide between two of the scan; rounding shows no others.
    return lowest if lowest.loss < best.loss - 1e-9 * abs(best.loss) else best


def _root(loss: Callable[[float], _Point], low: _Point, high: _Point) -> _Point:
    """Where the slope, negative at `low` and positive at `high`, is 0.

    The geometric mean of the bracket, then, near by, Newton's method: where the data are nearly
    separable the slope is exponential in β, on which Newton's steps do not grow. A step that leaves
    the bracket or does not halve the one before the last is no good either, as in Press et al.,
    Numerical Recipes, section 9.4.
    """
    point, last = low, [math.inf, math.inf]
    while point.slope != 0 and high.inverse > low.inverse * (1 + 1e-15):
        newton = point.slope / point.curvature if point.curvature > 0 else math.inf
        if abs(newton) <= 1e-12 * point.inverse:
            return point
        target = point.inverse - newton
        is_near = high.inverse < 1.5 * low.inverse and abs(newton) < last[0] / 2
        if not (is_near and low.inverse < target < high.inverse):
            target = math.sqrt(low.inverse) * math.sqrt(high.inverse)
        last = [last[1], abs(target - point.inverse)]
        point = loss(target)
        low, high = (point, high) if point.slope < 0 else (low, point)
    return point


def _margins(outputs: Tensor, targets: Tensor, likelihood: Categorical | Bernoulli) -> Tensor:
    """Logits less the target's, `[samples, rows, classes]`, a row for each position, in float64."""
    if not isinstance(likelihood, Categorical | Bernoulli):
        raise TypeError(
            f"`likelihood` is {likelihood!r}, expected Categorical() or Bernoulli(): only logits "
            "have a temperature"
        )
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        likelihood.check(outputs, targets)  # which says what it is
    samples = outputs if _has_sample_axis(outputs, targets, likelihood) else outputs.unsqueeze(0)
    if len(samples):
        likelihood.check(samples[0], targets)
    if not samples.numel():
        raise ValueError(
            f"`outputs` has shape {tuple(outputs.shape)}, expected at least one datum, and one "
            "sample if there is an axis of them"
        )
    logits = samples.detach().double()
    if isinstance(likelihood, Categorical):
        logits = logits.movedim(likelihood.class_dim % (logits.ndim - 1) + 1, -1).flatten(1, -2)
    else:
        # The other class has logit 0.
        logits = torch.stack([torch.zeros_like(logits), logits], -1).flatten(1, -2)
    labels = targets.long().reshape(1, -1, 1).expand(len(logits), -1, -1)
    margins = logits - logits.gather(-1, labels)
    bad = (margins.isnan() | (logits == math.inf) | (margins == math.inf)).any(-1).any(0)
    if bad.any():
        raise ValueError(
            f"`outputs` holds NaN or infinite logits in {int(bad.sum())} of {len(bad)} rows, "
            "expected finite ones, or −inf for classes that are not the target"
        )
    return margins


def _has_sample_axis(outputs: Tensor, targets: Tensor, likelihood: Categorical | Bernoulli) -> bool:
    if isinstance(likelihood, Categorical):
        return outputs.ndim == targets.ndim + 2
    # A last axis of one may be missing on either side.
    shape, got = tuple(outputs.shape), tuple(targets.shape)
    return outputs.ndim >= targets.ndim and shape != got and shape != (*got, 1)


def _checked_range(start: float, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    for name, value in (("start", start), ("bounds", low), ("bounds", high)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"`{name}` holds a {type(value).__name__}, expected numbers")
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"`bounds` is {(low, high)}, expected two positive numbers, the smaller one first"
        )
    if not low <= start <= high:
        raise ValueError(
            f"`start` is {start}, expected a temperature between {low:g} and {high:g}, the `bounds`"
        )
    return float(low), float(high)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
