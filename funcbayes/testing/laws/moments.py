"""The agreement of a posterior's samples with the moments that it states."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import Key, KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors import Empirical, Mixture
from funcbayes.posteriors.base import check_num_samples
from funcbayes.testing.laws.comparing import fail, needs, place

# Numbers that are drawn at a time.
_CHUNK_NUMBERS = 2**22


class _Sums(NamedTuple):
    """Sums over samples of powers of the deviations from the stated mean, for one leaf.

    Attributes:
        first: Σd.
        second: Σd².
        fourth: Σd⁴.
        largest: largest |d|.
        pooled_first: for each sample, the average over entries of d/σ.
        pooled_second: for each sample, the average over entries of d²/σ².
    """

    first: Tensor
    second: Tensor
    fourth: Tensor
    largest: Tensor
    pooled_first: list[Tensor]
    pooled_second: list[Tensor]


@torch.no_grad()
def check_sampling_moments(
    posterior: Any, *, key: KeyLike = 0, num_samples: int = 10_000, z_bound: float = 5.0
) -> None:
    """Checks that samples have the mean and the variance that the posterior states.

    With n samples, deviations d from the stated mean μ, and the stated variance σ²:

    - each entry's mean: z = (Σd/n) / (σ/√n);
    - each entry's variance: z = (Σd²/n − σ²) / √((m₄ − m₂²)/n), with the fourth and second
      moments m₄ = Σd⁴/n and m₂ = Σd²/n of the sample, as no normality is assumed;
    - each leaf's mean and variance at once: a sample's d/σ, and d²/σ², averaged over the
      leaf's entries are n independent numbers with expectations 0 and 1, whatever the
      correlations between entries; z from their own spread. An error that all entries
      share, such as a wrong factor of every standard deviation, shows here first.

    Entries of variance 0 must be the mean in every sample, to 4 units in its last place.
    Entries whose σ is below 16 units in the last place of μ cannot show their distribution
    in this dtype: they must lie within 8σ of the mean. For the others, the rounding of
    samples is allowed for.

    False alarms: where the law holds, |z| exceeds 5 with probability 5.7e-7. The bound is
    widened so that this holds for all tests of a call together, by Bonferroni (6.2 for a
    thousand tests, 7.2 for a million; the fixed key makes it the same in every run). The normal
    approximation makes it a few times more, as a variance and its spread err together, and
    needs samples without rare large deviations: each component of a mixture should be drawn
    some hundred times.

    Smallest detectable bias, with the bound z of about 5 to 7: with probability ½ a mean off
    by zσ/√n (0.05σ for n = 10⁴ and z = 5), a standard deviation off by a factor
    1 ± z/√(2n) (3.5 %); with probability 0.999 the same with z + 3 in place of z. For errors
    that d independent entries share, √d times smaller.

    Args:
        posterior: has `mean`, `variance` and `sample`; `draw` is used where it is there, so
            that not all samples are held at once. Of an `Empirical` posterior, whose stated
            variance is the unbiased one of its members, (M − 1)/M of it is expected, which is
            the variance of a draw of one of M members.
        key: the key to sample with.
        num_samples: n.
        z_bound: the bound on |z| for one test, before it is widened for many.

    Raises:
        TypeError: the posterior lacks `mean`, `variance` or `sample`.
        ValueError: `num_samples` is below 100.
        AssertionError: the law does not hold; the message names the leaf and the entry that
            are furthest off.
    """
    law = "check_sampling_moments"
    needs(law, posterior, "mean", "variance", "sample")
    if check_num_samples(num_samples) < 100:
        raise ValueError(f"`num_samples` is {num_samples}, expected at least 100")
    mean = trees.tensor_map(lambda leaf: leaf.detach().double(), posterior.mean)
    variance = _drawn_variance(posterior)
    _check_stated(law, posterior.mean, variance)
    parent = random.as_key(key)
    # Of the coarser dtype, where samples have another than the mean.
    eps = [
        max(torch.finfo(leaf.dtype).eps, torch.finfo(x.dtype).eps)
        for leaf, x in zip(
            trees.leaves(posterior.mean), trees.leaves(posterior.sample(parent, 1)), strict=True
        )
    ]
    variances = trees.leaves(variance)
    _check_draws_are_samples(law, posterior, parent, mean, eps)
    sums = _sums(law, posterior, parent, num_samples, mean, variances, eps)

    names = [name for name, _ in trees.leaves_with_names(mean)]
    wide = [
        _is_wide(mu, var, e) for mu, var, e in zip(trees.leaves(mean), variances, eps, strict=True)
    ]
    tests = 2 * sum(int(w.sum()) for w in wide) + 2 * sum(bool(w.any()) for w in wide)
    bound = widened(z_bound, tests)
    worst = 0.0, ""
    for name, mu, var, some, w, e in zip(
        names, trees.leaves(mean), variances, sums, wide, eps, strict=True
    ):
        _check_narrow(law, name, mu, var, some, w, e)
        if w.any():
            found = [
                *_entry_scores(name, mu, var, some, w, e, num_samples),
                *_pooled_scores(name, mu, var, some, w, e, num_samples),
            ]
            worst = max(worst, *found)
    if worst[0] > bound:
        fail(
            law,
            f"{worst[1]}, {worst[0]:.1f} standard errors off over {num_samples} samples"
            f" ({bound:.1f} are allowed)",
            "`sample` and the stated `mean` and `variance` scale or centre the noise differently"
            " (a standard deviation taken for a variance, n for n − 1, a factor left out)",
        )


def widened(z_bound: float, tests: int) -> float:
    """The bound on each of many |z| that is exceeded as rarely as `z_bound` on one (Bonferroni)."""
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-z_bound) / max(1, tests))


def _drawn_variance(posterior: Any) -> TensorTree:
    """The variance of one draw, in float64; it is the stated one but for `Empirical`."""
    wide = trees.tensor_map(lambda leaf: leaf.detach().double(), posterior.variance)
    if isinstance(posterior, Empirical):
        num = posterior.num_members
        return trees.tree_map(lambda v: v * ((num - 1) / num), wide)
    if isinstance(posterior, Mixture):
        for weight, component in zip(posterior.weights.tolist(), posterior.components, strict=True):
            stated = trees.tensor_map(lambda leaf: leaf.double(), component.variance)
            wide = trees.tree_map(
                lambda all_, a, b, w=weight: all_ + w * (a - b),
                wide,
                _drawn_variance(component),
                stated,
            )
    return wide


def _check_stated(law: str, mean: TensorTree, variance: TensorTree) -> None:
    try:
        trees.check_like(variance, mean, name="variance")
    except ValueError as error:
        fail(law, f"{error}, as in `mean`")
    for name, leaf in trees.leaves_with_names(variance):
        if not bool((torch.isfinite(leaf) & (leaf >= 0)).all()):
            fail(law, f"`variance{name}` is negative or not finite in some entries")


def _check_draws_are_samples(
    law: str, posterior: Any, key: Key, mean: TensorTree, eps: Sequence[float]
) -> None:
    """What is gathered below are draws, chunk by chunk: they must be what `sample` gives."""
    if not (hasattr(posterior, "draw") and hasattr(posterior, "sample")):
        return
    drawn = posterior.draw(key, 0, 4).params
    if drawn is None:
        return
    sampled = posterior.sample(key, 4)
    for tree, name in ((sampled, "sample(key, n)"), (drawn, "draw(key, 0, n)")):
        try:
            trees.check_like(tree, mean, name=name, batch_dims=1)
        except ValueError as error:
            fail(law, f"{error}, as in `mean`")
    pairs = zip(trees.leaves_with_names(sampled), trees.leaves(drawn), eps, strict=True)
    for (name, x), y, e in pairs:
        scale = float(x.detach().abs().max()) if x.numel() else 0.0
        if not torch.allclose(x, y, rtol=0, atol=16 * e * scale, equal_nan=True):
            fail(
                law,
                f"{name}: `sample(key, n)` and `draw(key, 0, n)` give different numbers",
                "one of the two was overridden without the other",
            )


def _sums(
    law: str,
    posterior: Any,
    key: Key,
    num: int,
    mean: TensorTree,
    variances: Sequence[Tensor],
    eps: Sequence[float],
) -> list[_Sums]:
    zeros = [torch.zeros_like(mu) for mu in trees.leaves(mean)]
    totals = [_Sums(z, z, z, z, [], []) for z in zeros]
    chunk = max(1, _CHUNK_NUMBERS // max(1, trees.num_elements(mean)))
    chunk = chunk if hasattr(posterior, "draw") else num
    for start in range(0, num, chunk):
        stop = min(num, start + chunk)
        samples = None
        if hasattr(posterior, "draw"):
            samples = posterior.draw(key, start, stop).params
        if samples is None:  # `draw` has masks only, or there is none
            samples = trees.tensor_map(
                lambda leaf, a=start, b=stop: leaf[a:b], posterior.sample(key, num)
            )
        try:
            trees.check_like(samples, mean, name="sample(key, n)", batch_dims=1)
        except ValueError as error:
            fail(law, f"{error}, as in `mean`")
        totals = [
            _add(law, name, total, x.detach(), mu, var, e)
            for (name, x), total, mu, var, e in zip(
                trees.leaves_with_names(samples), totals, trees.leaves(mean), variances, eps,
                strict=True,
            )
        ]  # fmt: skip
    return totals


def _add(
    law: str, name: str, total: _Sums, x: Tensor, mu: Tensor, var: Tensor, eps: float
) -> _Sums:
    if not bool(torch.isfinite(x).all()):
        fail(law, f"samples, {place(name)}: NaN or infinite numbers came")
    d = x.double() - mu
    wide = _is_wide(mu, var, eps)
    scaled = (d / var.sqrt())[:, wide]
    if scaled.numel():
        total.pooled_first.append(scaled.mean(1))
        total.pooled_second.append(scaled.square().mean(1))
    squared = d.square()
    return total._replace(
        first=total.first + d.sum(0),
        second=total.second + squared.sum(0),
        fourth=total.fourth + squared.square().sum(0),
        largest=torch.maximum(total.largest, d.abs().amax(0)),
    )


def _is_wide(mu: Tensor, var: Tensor, eps: float) -> Tensor:
    """Where the dtype of the samples has digits enough to show the distribution."""
    return (var > 0) & (var.sqrt() >= 16 * eps * mu.abs())


def _check_narrow(
    law: str, name: str, mu: Tensor, var: Tensor, sums: _Sums, wide: Tensor, eps: float
) -> None:
    too_far = ~wide & (sums.largest > 8 * var.sqrt() + 4 * eps * mu.abs())
    if too_far.any():
        at = tuple(int(i) for i in too_far.nonzero()[0])
        fail(
            law,
            f"{place(name, at)}: the stated variance is {float(var[at]):.3g}, and a sample is"
            f" {float(sums.largest[at]):.3g} away from the mean {float(mu[at]):.6g}",
            "noise is added where the variance says there is none",
        )


def _slack(mu: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What the rounding of a sample can do to the mean, and to the variance."""
    one = eps * (mu.abs() + 6 * var.sqrt())
    # (|d| + one)² − d² on average; and the stated variance is rounded itself.
    return one, 2 * one * var.sqrt() + one.square() + 8 * eps * var


def _entry_scores(
    name: str, mu: Tensor, var: Tensor, sums: _Sums, wide: Tensor, eps: float, num: int
) -> Iterator[tuple[float, str]]:
    mean_slack, var_slack = _slack(mu, var, eps)
    shift, second, fourth = sums.first / num, sums.second / num, sums.fourth / num
    mean_z = ((shift.abs() - mean_slack) / (var / num).sqrt()).masked_fill(~wide, 0)
    # Tiny rather than 0: samples that do not vary at all are infinitely far off.
    spread = ((fourth - second.square()).clamp_min(0) / num).sqrt().clamp_min(1e-300)
    var_z = (((second - var).abs() - var_slack) / spread).masked_fill(~wide, 0)
    for scores, what in ((mean_z, "mean"), (var_z, "variance")):
        at = tuple(int(i) for i in torch.unravel_index(scores.argmax(), scores.shape))
        stated, found = (mu, mu + shift) if what == "mean" else (var, second)
        yield (
            float(scores[at]),
            f"{place(name, at)}: samples have the {what} {float(found[at]):.6g} where `{what}`"
            f" states {float(stated[at]):.6g}" + _as_factor(what, float(found[at] / stated[at])),
        )


def _pooled_scores(
    name: str, mu: Tensor, var: Tensor, sums: _Sums, wide: Tensor, eps: float, num: int
) -> Iterator[tuple[float, str]]:
    mean_slack, var_slack = _slack(mu, var, eps)
    first, second = torch.cat(sums.pooled_first), torch.cat(sums.pooled_second)
    rows = (
        (first, 0.0, (mean_slack / var.sqrt())[wide].mean(), "mean"),
        (second, 1.0, (var_slack / var)[wide].mean(), "variance"),
    )
    for values, expected, slack, what in rows:
        spread = (values.std() / math.sqrt(num)).clamp_min(1e-300)
        off = float(values.mean()) - expected
        text = f"{place(name)}, averaged over its {int(wide.sum())} entries: "
        if what == "mean":
            text += f"samples are {off:.3g} stated standard deviations away from `mean`"
        else:
            ratio = float(values.mean())
            text += f"the variance of samples is {ratio:.4g} of the stated one"
            text += _as_factor(what, ratio)
        yield (abs(off) - float(slack)) / float(spread), text


def _as_factor(what: str, ratio: float) -> str:
    return f" (their standard deviation {math.sqrt(ratio):.4g} of it)" if what == "variance" else ""
