"""The Poisson likelihood: counts."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.likelihoods.common import (
    LOG_2PI,
    LOG_2PI_E,
    aligned,
    diagonal_columns,
    float_outputs,
    known_false,
    sum_datum,
    tensor,
    widen,
)
from funcbayes.core.random import KeyLike

# From this count on log y! is Stirling's series, of which the first term left out,
# 691/360360 y⁻¹¹, is then below 1.1e-16.
_STIRLING_FROM = 16
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
# From this rate on the entropy is its asymptotic series; below, a sum over the counts 0 … 127,
# of which the rest has probability below 1e-19.
_SERIES_FROM = 50.0
_COUNTS = 128
_SERIES = (
    -1 / 12,
    -1 / 24,
    -19 / 360,
    -9 / 80,
    -863 / 2520,
    -1375 / 1008,
    -33953 / 5040,
    -57281 / 1440,
)


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """A count for each output, with rate exp(outputs): the log link.

    Outputs `[batch, *out]`, the log rates; targets 0, 1, 2, … of an integer or a floating dtype
    with the same shape, a last axis of length one may be missing on either side. The outputs of a
    datum are independent, each a distribution of its own, so entropies have the shape of
    `outputs`. An exposure (the time or area in which was counted) enters as its log, added to the
    outputs by the model.
    """

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that do not belong together; see `Likelihood.check`.

        Args:
            outputs: log rates, floating point.
            targets: whole numbers from 0 on.

        Raises:
            TypeError: not a tensor.
            ValueError: targets that are negative, fractional, not finite or of a boolean or
                complex dtype, or a shape that does not fit.
        """
        outputs = float_outputs(outputs)
        targets = self._counts(outputs, tensor(targets, "targets"))
        fine = targets >= 0
        if targets.is_floating_point():
            fine = fine & targets.isfinite() & (targets == targets.floor())
        if known_false(fine.all()):
            bad = targets[~fine]
            raise ValueError(
                f"`targets` holds {bad.numel()} values of {targets.numel()} that are no counts, "
                f"such as {bad[0].item():g}, expected 0, 1, 2, …: give the counts themselves, not "
                "their logs or rates, and use Gaussian() for targets that are no counts"
            )

    def nll(
        self, outputs: Float[Tensor, "batch *out"], targets: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " batch"]:
        """exp(f) - y f + log y!, summed over a datum's outputs.

        Right to a few roundings of the result or of `y - exp(f)`, whichever is larger, also
        where the three terms cancel: at 10⁶ counts they would cost a nat in float32. A rate that
        overflows gives inf, a rate of 0 (an output of -inf) 0 or inf, never NaN.

        Args:
            outputs: log rates.
            targets: counts, the shape of `outputs`.

        Returns:
            `[batch]`, in nats.

        Raises:
            ValueError: the dtype or shape of `targets` does not fit `outputs`.

        Source:
            Loader (2000), Fast and accurate computation of binomial probabilities: the deviance
            and the remainder of Stirling's formula apart.
        """
        targets = self._counts(float_outputs(outputs), targets)
        f = widen(outputs)
        y = targets.to(f.dtype)
        # Where exp(f) is inf for certain, -y f must not be -inf; and 0 · -inf is 0 here.
        limits = torch.finfo(f.dtype)
        linear = f.clamp(limits.min, math.log(limits.max) + 1)
        few = f.exp() - y * linear + (y + 1).lgamma()

        # log y! = y log y - y + ½ log 2πy + series, so that exp(f) - y f + log y! is
        # y (e^d - 1 - d) + ½ log 2πy + series, with d = f - log y.
        many = y.clamp_min(_STIRLING_FROM)
        log_many = many.log()
        d = linear - log_many
        # expm1 only where the rate is near the count: far below, the second derivative of expm1
        # is a difference of ones.
        near = d.abs() < 1
        deviance = torch.where(
            near, many * (d.clamp(-1, 1).expm1() - d), (f.exp() - many) - many * d
        )
        inverse = many.reciprocal()
        series = inverse * _polynomial(_STIRLING, inverse.square())
        large = deviance + (log_many + LOG_2PI) / 2 + series
        return sum_datum(torch.where(y < _STIRLING_FROM, few, large))

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """The rates exp(outputs), which are the mean counts.

        Args:
            outputs: log rates.
        """
        return widen(outputs).exp()

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Variances of the counts, which are the rates again.

        Args:
            outputs: log rates.
        """
        return widen(outputs).exp()

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Entropy of each count, in nats; it has no closed form.

        Below a rate of 50 the sum of -p log p over the counts 0 … 127, all terms positive; from
        there on ½ log 2πeλ - 1/12λ - 1/24λ² - … - 57281/1440λ⁸. Both in float64: the error is
        below 1e-12 nats, or a few roundings of the result in the dtype that it is returned in.
        Takes memory for 128 float64 numbers an output.

        Args:
            outputs: log rates.

        Returns:
            The shape of `outputs`.

        Source:
            The series is that of Evans and Boersma (1988), The entropy of a Poisson
            distribution, SIAM Review 30(2), 314-317, continued by inserting the central moments
            into Stirling's series.
        """
        return _entropy(widen(outputs))

    def predictive_entropy(
        self, mean: Float[Tensor, "batch *out"], total_variance: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "batch *out"]:
        """Approximate entropy of a mixture of Poissons; mean and variance do not determine it.

        With m the mean and V the total variance, the smaller of H(m) + ½ log(V / m), H the
        entropy of a Poisson, and (m + 1) log(m + 1) - m log m. The first is exact where all
        samples have the same rate, and right to first order in the variance V - m of the rates at
        every m, and for normally spread large rates; the second is the most that any counts of
        mean m can have. Never below the mean of `entropy(outputs)` over the samples. For gamma
        distributed rates too large by less than 0.16 nats as long as their standard deviation is
        at most m, less than 0.04 where it is at most 0.3 m; beyond m, by more.

        Args:
            mean: average of the rates over the samples.
            total_variance: variance of the counts under the mixture.

        Returns:
            The shape of `mean`, in nats.
        """
        mean = widen(mean)
        tiny = torch.finfo(mean.dtype).tiny
        positive = mean.clamp_min(tiny)
        # Never below 1: rounding may leave the total a little under the mean.
        spread = (widen(total_variance) / positive).clamp_min(1)
        normal = _entropy(positive.log()) + spread.log() / 2
        # (m + 1) log(m + 1) - m log m without the difference of two large numbers.
        geometric = positive.log1p() + positive * positive.reciprocal().log1p()
        return torch.minimum(normal, geometric)

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws counts, whole floating-point numbers with the shape of `outputs`.

        Inverts the distribution function at uniform numbers, so that under `vmap` the samples
        follow its `randomness` as those of other likelihoods do, and equal rates give equal
        counts for the same key. Exact in float64 up to rates of 10¹², rounded normals beyond.

        Args:
            key: a key or an int.
            outputs: log rates.

        Returns:
            Counts in the dtype of `inverse_link(outputs)`; the largest finite number where the
            rate overflows. See `Likelihood.sample`.
        """
        f = widen(outputs)
        # 53 bits of the uniform numbers whatever the dtype: 24 would cut the tails off at 5σ.
        u = random.uniform(key, f.shape, dtype=torch.float64, device=f.device)
        counts = _quantile(u, f.double().exp().clamp_max(torch.finfo(f.dtype).max))
        return counts.clamp_max(torch.finfo(f.dtype).max).to(f.dtype)

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "columns batch *out"]:
        """One column exp(f/2) for each output of a datum; exact for any target.

        Args:
            outputs: log rates f.

        Returns:
            `[outputs of a datum, *outputs.shape]`.
        """
        root = (widen(outputs) / 2).exp()
        return diagonal_columns(root).to(outputs.dtype)

    def _counts(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(
                f"`targets` has dtype {targets.dtype}, expected counts of an integer or a floating "
                "dtype: use Bernoulli() for yes-or-no labels"
            )
        fix = "one count for each output: give the network as many outputs as there are counts"
        return aligned(targets, tuple(outputs.shape), outputs, fix)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """c₀ + c₁ x + c₂ x² + …."""
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = c + x * value
    return value


def _entropy(log_rate: Tensor) -> Tensor:
    """Entropy of Poissons in nats; see `Poisson.entropy`."""
    # A rate of e^-700 has an entropy of 1e-301, as good as the 0 of an output of -inf, without
    # the 0 · -inf.
    f = log_rate.double().clamp_min(-700)
    low = f.clamp_max(math.log(_SERIES_FROM))[..., None]
    counts = torch.arange(_COUNTS, dtype=f.dtype, device=f.device)
    log_probs = counts * low - low.exp() - (counts + 1).lgamma()
    below = -(log_probs.exp() * log_probs).sum(-1)

    high = f.clamp_min(math.log(_SERIES_FROM))
    inverse = (-high).exp()
    above = (high + LOG_2PI_E) / 2 + inverse * _polynomial(_SERIES, inverse)
    return torch.where(f < math.log(_SERIES_FROM), below, above).to(log_rate.dtype)


def _quantile(u: Tensor, rate: Tensor) -> Tensor:
    """The smallest count whose distribution function exceeds u, 0 ≤ u < 1; both float64.

    Bisects the 64 counts about the expansion of Cornish and Fisher, whose error is below 32
    for every rate and every u that a float64 generator gives.
    """
    z = torch.special.ndtri(u.clamp(2**-60, 1 - 2**-53))
    guess = rate + rate.sqrt() * z + (z.square() - 1) / 6
    low = (guess.floor() - 32).clamp_min(-1)
    high = low + 64
    for _ in range(6):
        middle = ((low + high) / 2).floor()
        above = torch.special.gammaincc(middle + 1, rate) > u
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high
