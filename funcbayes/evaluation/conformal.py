"""Split conformal prediction: sets and intervals that hold the target with a stated probability.

On top of any predictive and whatever its quality: a score says how badly a target fits its
prediction, and a quantile of the scores of n calibration rows bounds the score of a new one. If
calibration and new rows are exchangeable, P(target in the set) ≥ 1 − alpha, and below
1 − alpha + 1/(n + 1) where no two scores are equal. The probability is over calibration data *and*
the new row: it is no promise for one class, one region, or one calibration set, whose own
coverage varies by about √(alpha (1 − alpha)/n). The calibration rows must have played no part in
training or in choosing the model, temperature included.

Scores are computed in float64. Fitting reads values and refuses NaN; `sets`, `intervals` and
`quantile_intervals` pass through `vmap` and `torch.compile`.

Source:
    Vovk, Gammerman and Shafer (2005), Algorithmic Learning in a Random World; Lei et al. (2018),
    arXiv:1604.04173, for the split form.
"""

import math
from fractions import Fraction
from numbers import Real
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.random import KeyLike
from funcbayes.evaluation.uncertainty.common import check_floating, check_targets, work_dtype
from funcbayes.evaluation.uncertainty.regression import Interval


class SetsState(NamedTuple):
    """What `sets` needs of the calibration data.

    Attributes:
        threshold: largest score of a class in a set, `[]`, float64.
        score: "lac", "aps" or "randomized aps".
    """

    threshold: Float[Tensor, ""]
    score: str


class IntervalsState(NamedTuple):
    """What `intervals` and `quantile_intervals` need of the calibration data.

    Attributes:
        threshold: largest score of a target in an interval, `[*out]`, float64.
        score: "absolute" residuals, "normalized" ones or "quantile".
    """

    threshold: Float[Tensor, "*out"]
    score: str


def fit_sets(
    probs: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    alpha: float,
    score: Literal["lac", "aps"] = "lac",
    key: KeyLike | None = None,
) -> SetsState:
    """Fits the threshold of prediction sets to calibration data.

    Args:
        probs: predictive probabilities of the calibration rows, `[batch, classes]`, such as
            `Predictive.mean`.
        targets: their classes, `[batch]`.
        alpha: probability of missing the target that is allowed: 0.1 for sets that hold it with
            90 %.
        score: "lac", one minus the probability of the class: the smallest sets on average.
            "aps", the probability of the class and all more probable ones: larger sets, and
            closer to the same coverage for easy and for hard inputs.
        key: a key or an int for "aps", which then counts a uniform random part of the
            probability of the class itself: smaller sets, and `sets` needs a key as well. None
            counts all of it.

    Returns:
        State for `sets`.

    Raises:
        TypeError: a dtype does not fit, or `alpha` is not a number.
        ValueError: a shape does not fit; rows of `probs` are no distributions; a target is no
            class; `alpha` is not between 0 and 1; fewer rows than 1/alpha − 1; `score` is
            unknown, or takes no key.

    Source:
        "lac": Sadinle, Lei and Wasserman (2019), arXiv:1609.00451. "aps": Romano, Sesia and
        Candès (2020), arXiv:2006.02544; as there, classes of equal probability are ordered by
        their index.

    Examples:
        >>> import torch, funcbayes as fb
        >>> probs = torch.randn(200, 3).softmax(-1)
        >>> targets = torch.randint(3, (200,))
        >>> state = fb.conformal.fit_sets(probs[:100], targets[:100], alpha=0.1)
        >>> fb.conformal.sets(state, probs[100:]).shape
        torch.Size([100, 3])
    """
    if score not in ("lac", "aps"):
        raise ValueError(f"`score` is {score!r}, expected 'lac' or 'aps'")
    if score == "lac" and key is not None:
        raise ValueError("`key` was given, but the score 'lac' is not random: leave it out")
    _check_probs(probs)
    check_targets(targets, len(probs))
    rank = _rank(len(probs), alpha)
    _check_probs_values(probs)
    classes = probs.shape[1]
    if not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(
            f"`targets` lie between {int(targets.min())} and {int(targets.max())}, expected 0 to "
            f"{classes - 1}, the column indices of `probs`"
        )
    kind = score if key is None else "randomized aps"
    # Two streams, or the same key here and in `sets` would give both the same numbers.
    scores = _class_scores(probs, kind, None if key is None else random.fold_in(key, 0))
    own = scores.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return SetsState(own.sort().values[rank - 1], kind)


def sets(
    state: SetsState, probs: Float[Tensor, "batch classes"], *, key: KeyLike | None = None
) -> Bool[Tensor, "batch classes"]:
    """Prediction sets: the classes whose score is at most the threshold.

    A set may be empty: its row is less certain of any class than nearly all calibration rows
    were of the right one. Adding the most probable class to every set keeps the coverage.

    Args:
        state: the result of `fit_sets`.
        probs: predictive probabilities, `[batch, classes]`; a row with NaN gets every class that
            it cannot exclude.
        key: a key or an int, if `fit_sets` had one (the same does). Calls with one key share
            their random numbers, rows of one call have each its own.

    Returns:
        True for the classes in the set, `[batch, classes]`.

    Raises:
        TypeError: `state` is of another function, or `probs` is not a floating-point tensor.
        ValueError: a shape does not fit, or a key is missing or surplus.
    """
    if not isinstance(state, SetsState):
        raise TypeError(f"`state` is a {type(state).__name__}, expected the result of fit_sets")
    is_random = state.score == "randomized aps"
    if is_random != (key is not None):
        fix = "with one: give a key" if is_random else "without one: leave it out"
        raise ValueError(f"`key` is {key!r}, but the state was fitted {fix}")
    _check_probs(probs)
    scores = _class_scores(probs, state.score, None if key is None else random.fold_in(key, 1))
    # Not `scores <= threshold`: a score of NaN excludes nothing.
    return ~(scores > state.threshold)


def fit_intervals(
    mean: Float[Tensor, "batch *out"],
    targets: Float[Tensor, "batch *out"],
    *,
    alpha: float,
    scale: Float[Tensor, "batch *out"] | None = None,
) -> IntervalsState:
    """Fits the half width of prediction intervals to calibration data.

    Args:
        mean: predicted means of the calibration rows, `[batch, *out]`.
        targets: their targets, with the same shape.
        alpha: probability of missing the target that is allowed, for each output on its own.
        scale: what the width is proportional to, such as the predicted standard deviation
            `Predictive.total.sqrt()`, with the same shape; positive. None gives every row the
            same width.

    Returns:
        State for `intervals`.

    Raises:
        TypeError: a dtype does not fit, or `alpha` is not a number.
        ValueError: a shape does not fit; NaN or infinite values; a scale that is not positive;
            `alpha` is not between 0 and 1; fewer rows than 1/alpha − 1.

    Source:
        Lei et al. (2018), arXiv:1604.04173, algorithm 2 and section 5.2 (the scale).

    Examples:
        >>> import torch, funcbayes as fb
        >>> mean, std, targets = torch.randn(200), torch.rand(200) + 0.1, torch.randn(200)
        >>> state = fb.conformal.fit_intervals(
        ...     mean[:100], targets[:100], alpha=0.1, scale=std[:100]
        ... )
        >>> lower, upper = fb.conformal.intervals(state, mean[100:], scale=std[100:])
        >>> lower.shape
        torch.Size([100])
    """
    _check_alike(mean, "mean", targets=targets, scale=scale)
    rank = _rank(len(mean), alpha)
    _check_finite(mean=mean, targets=targets, scale=scale)
    scores = (targets.double() - mean.double()).abs()
    if scale is not None:
        if not (scale > 0).all():
            raise ValueError(
                f"`scale` is {scale.min().item():g} at its smallest, expected positive numbers"
            )
        scores = scores / scale.double()
    kind = "absolute" if scale is None else "normalized"
    return IntervalsState(scores.sort(0).values[rank - 1], kind)


def intervals(
    state: IntervalsState,
    mean: Float[Tensor, "batch *out"],
    *,
    scale: Float[Tensor, "batch *out"] | None = None,
) -> Interval:
    """Prediction intervals about the mean.

    Args:
        state: the result of `fit_intervals`.
        mean: predicted means, `[batch, *out]`.
        scale: as in `fit_intervals`, if that had one.

    Returns:
        `(lower, upper)`, each `[batch, *out]`; ends included.

    Raises:
        TypeError: `state` is of another function, or a dtype does not fit.
        ValueError: a shape does not fit, or `scale` is missing or surplus.
    """
    _check_state(state, ("absolute", "normalized"), "fit_intervals")
    if (state.score == "normalized") != (scale is not None):
        came, fix = "given", "without one: leave it out"
        if scale is None:
            came, fix = "None", "with one: give it here too"
        raise ValueError(f"`scale` is {came}, but the state was fitted {fix}")
    _check_alike(mean, "mean", scale=scale)
    _check_outputs(state, mean, "mean")
    width = state.threshold if scale is None else state.threshold * scale.double()
    dtype = work_dtype(mean)
    # In float64 and rounded last: then the end is still no nearer than a target in `dtype`.
    return Interval((mean.double() - width).to(dtype), (mean.double() + width).to(dtype))


def fit_quantile_intervals(
    lower: Float[Tensor, "batch *out"],
    upper: Float[Tensor, "batch *out"],
    targets: Float[Tensor, "batch *out"],
    *,
    alpha: float,
) -> IntervalsState:
    """Fits what predicted intervals have to be widened by to calibration data.

    Args:
        lower: lower ends of the calibration rows' intervals, `[batch, *out]`, such as those of
            `uncertainty.mixture_interval`.
        upper: upper ends, with the same shape.
        targets: their targets, with the same shape.
        alpha: probability of missing the target that is allowed, for each output on its own.

    Returns:
        State for `quantile_intervals`.

    Raises:
        TypeError: a dtype does not fit, or `alpha` is not a number.
        ValueError: a shape does not fit; NaN or infinite values; `alpha` is not between 0 and 1;
            fewer rows than 1/alpha − 1.

    Source:
        Romano, Patterson and Candès (2019), arXiv:1905.03222, algorithm 1 (conformalized quantile
        regression).
    """
    _check_alike(lower, "lower", upper=upper, targets=targets)
    rank = _rank(len(lower), alpha)
    _check_finite(lower=lower, upper=upper, targets=targets)
    y = targets.double()
    scores = torch.maximum(lower.double() - y, y - upper.double())
    return IntervalsState(scores.sort(0).values[rank - 1], "quantile")


def quantile_intervals(
    state: IntervalsState, lower: Float[Tensor, "batch *out"], upper: Float[Tensor, "batch *out"]
) -> Interval:
    """Predicted intervals, widened, or narrowed where they were too wide.

    Args:
        state: the result of `fit_quantile_intervals`.
        lower: lower ends, `[batch, *out]`.
        upper: upper ends, with the same shape.

    Returns:
        `(lower, upper)`, each `[batch, *out]`; both the middle where narrowing would cross them.

    Raises:
        TypeError: `state` is of another function, or a dtype does not fit.
        ValueError: a shape does not fit.
    """
    _check_state(state, ("quantile",), "fit_quantile_intervals")
    _check_alike(lower, "lower", upper=upper)
    _check_outputs(state, lower, "lower")
    dtype = work_dtype(lower)
    low, high = lower.double() - state.threshold, upper.double() + state.threshold
    middle = low / 2 + high / 2
    return Interval(
        torch.where(low > high, middle, low).to(dtype),
        torch.where(low > high, middle, high).to(dtype),
    )


def _class_scores(probs: Tensor, score: str, key: KeyLike | None) -> Tensor:
    """The score of every class, `[batch, classes]`, in float64."""
    probs = probs.detach().double()
    if score == "lac":
        return 1 - probs
    ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    up_to = ordered.cumsum(-1)
    total = up_to[:, -1:]
    if key is not None:
        u = random.uniform(key, (len(probs), 1), dtype=probs.dtype, device=probs.device)
        up_to = up_to - u * ordered
    # Rows sum to 1 to rounding, and by rounding must not differ in the score of the last class.
    return torch.zeros_like(probs).scatter(-1, order, up_to / total)


def _rank(num: int, alpha: float) -> int:
    """⌈(n + 1)(1 − alpha)⌉: which of the sorted scores is the threshold."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"`alpha` is a {type(alpha).__name__}, expected a number between 0 and 1")
    if not 0 < alpha < 1:
        raise ValueError(
            f"`alpha` is {alpha}, expected a number between 0 and 1: the share of targets that may "
            "be missed, 0.1 for a coverage of 90 %"
        )
    # The fraction that was meant: 10 (1 − 0.7) is 3.0000000000000004 in floating point.
    exact = Fraction(float(alpha)).limit_denominator(10**12) or Fraction(float(alpha))
    rank = math.ceil((num + 1) * (1 - exact))
    if rank > num:
        raise ValueError(
            f"there are {num} calibration rows, expected at least {math.ceil(1 / exact) - 1} for "
            f"`alpha` {alpha}: fewer cannot bound a new score with that probability"
        )
    return rank


def _check_probs(probs: Tensor) -> None:
    check_floating(probs, "probs")
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(
            f"`probs` has shape {tuple(probs.shape)}, expected [batch, classes], neither of them "
            "0: average posterior samples over their axis first"
        )


def _check_probs_values(probs: Tensor) -> None:
    sums = probs.double().sum(-1)
    # Half a unit in the last place of each class.
    tolerance = max(1e-4, probs.shape[1] * torch.finfo(probs.dtype).eps)
    is_distribution = (probs >= 0).all(-1) & ((sums - 1).abs() <= tolerance)
    if not is_distribution.all():
        row = int((~is_distribution).nonzero()[0])
        raise ValueError(
            f"row {row} of `probs` sums to {sums[row].item():.4g} with smallest entry "
            f"{probs[row].min().item():.4g}, expected probabilities that sum to 1: apply softmax "
            "to logits, and look for NaN"
        )


def _check_alike(first: Tensor, name: str, **others: Tensor | None) -> None:
    check_floating(first, name)
    if not first.ndim or 0 in first.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(first.shape)}, expected [batch, *out], none of them 0"
        )
    for other, value in others.items():
        if value is None:
            continue
        check_floating(value, other)
        if value.shape != first.shape:
            raise ValueError(
                f"`{other}` has shape {tuple(value.shape)}, expected {tuple(first.shape)}, the "
                f"shape of `{name}`"
            )


def _check_finite(**values: Tensor | None) -> None:
    for name, value in values.items():
        if value is not None and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"`{name}` holds {bad} NaN or infinite values of {value.numel()}, expected finite "
                "ones"
            )


def _check_state(state: object, scores: tuple[str, ...], made_by: str) -> None:
    if not isinstance(state, IntervalsState):
        raise TypeError(f"`state` is a {type(state).__name__}, expected the result of {made_by}")
    if state.score not in scores:
        raise ValueError(
            f"`state` was fitted to the score {state.score!r}, expected the result of {made_by}"
        )


def _check_outputs(state: IntervalsState, first: Tensor, name: str) -> None:
    if state.threshold.shape != first.shape[1:]:
        raise ValueError(
            f"`{name}` has shape {tuple(first.shape)}, expected [batch, "
            f"*{tuple(state.threshold.shape)}], the outputs that the state was fitted to"
        )
