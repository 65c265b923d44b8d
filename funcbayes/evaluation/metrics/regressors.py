"""Errors and proper scores of predictive distributions of numbers.

Arguments are `[batch]`, or of any one shape: scores are means over all entries. torchmetrics
has squared and absolute errors, which it sums in float32, and the CRPS of samples, for which
it takes memory for all pairs of samples.
"""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.metrics.intervals import coverage, interval_score, sharpness
from funcbayes.evaluation.metrics.streaming import MeanOverData


class RegressionMetrics(NamedTuple):
    """How well a normal predictive distribution fits the targets.

    Attributes:
        rmse: root mean squared error of the mean, in units of the target.
        nll: mean negative log density, nats.
        crps: mean continuous ranked probability score, in units of the target.
        coverage: share of the targets inside the central interval.
        width: mean width of this interval, in units of the target.
        interval_score: mean score of this interval, in units of the target.
    """

    rmse: float
    nll: float
    crps: float
    coverage: float
    width: float
    interval_score: float


def regression(
    mean: Float[Tensor, "*batch"],
    std: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    level: float = 0.9,
) -> RegressionMetrics:
    """Error, proper scores and the central interval of a normal prediction at once.

    Args:
        mean: predictive mean of y, such as `Predictive.mean`, `[batch]`.
        std: predictive standard deviation of y, noise included, such as
            `Predictive.total.sqrt()`, `[batch]`.
        targets: y, `[batch]`.
        level: probability of the central interval, `mean ± z std`.

    Returns:
        The six figures.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, numbers are not finite, `std` is not positive, or `level`
            is not between 0 and 1.
    """
    checks.check_level(level)
    mean, std, targets = _checked_normal(mean, std, targets)
    half_width = NormalDist().inv_cdf((1 + level) / 2) * std
    lower, upper = mean - half_width, mean + half_width
    return RegressionMetrics(
        rmse=rmse(mean, targets),
        nll=gaussian_nll(mean, std, targets),
        crps=gaussian_crps(mean, std, targets),
        coverage=coverage(lower, upper, targets),
        width=sharpness(lower, upper),
        interval_score=interval_score(lower, upper, targets, level=level),
    )


def rmse(mean: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]) -> float:
    """Root mean squared error.

    Args:
        mean: predictions, `[batch]`.
        targets: y, `[batch]`.

    Returns:
        √mean (mean − y)², in units of the target.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or numbers are not finite.
    """
    return math.sqrt(_errors(mean, targets).square().mean().item())


def mae(mean: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]) -> float:
    """Mean absolute error.

    Args:
        mean: predictions, `[batch]`; the score is lowest in expectation at the median.
        targets: y, `[batch]`.

    Returns:
        Mean |mean − y|, in units of the target.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or numbers are not finite.
    """
    return _errors(mean, targets).abs().mean().item()


def gaussian_nll(
    mean: Float[Tensor, "*batch"], std: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> float:
    """Mean negative log density of a normal prediction.

    Args:
        mean: predictive mean, `[batch]`.
        std: predictive standard deviation of y, noise included, `[batch]`.
        targets: y, `[batch]`.

    Returns:
        Nats a datum; the density is one a unit of the target, so the score shifts by
        log(c) where the target is multiplied by c.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, numbers are not finite, or `std` is not positive.
    """
    return _gaussian_nlls(mean, std, targets).mean().item()


def mixture_nll(
    means: Float[Tensor, "samples *batch"],
    stds: Float[Tensor, "samples *batch"],
    targets: Float[Tensor, "*batch"],
) -> float:
    """Mean negative log density of an equally weighted mixture of normals.

    Args:
        means: mean of y of each posterior sample, `[samples, batch]`.
        stds: noise of each posterior sample, `[samples, batch]`.
        targets: y, `[batch]`.

    Returns:
        Nats a datum.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, numbers are not finite, or `stds` are not positive.
    """
    return _mixture_nlls(means, stds, targets).mean().item()


def gaussian_crps(
    mean: Float[Tensor, "*batch"], std: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]
) -> float:
    """Mean continuous ranked probability score of a normal prediction, in closed form.

    Args:
        mean: predictive mean, `[batch]`.
        std: predictive standard deviation of y, noise included, `[batch]`.
        targets: y, `[batch]`.

    Returns:
        Mean of ∫ (F(t) − 1[t ≥ y])² dt, in units of the target; lower is better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, numbers are not finite, or `std` is not positive.

    Source:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437, equation 21 and the
        formula below it.
    """
    return _gaussian_crps(mean, std, targets).mean().item()


def mixture_crps(
    means: Float[Tensor, "samples *batch"],
    stds: Float[Tensor, "samples *batch"],
    targets: Float[Tensor, "*batch"],
) -> float:
    """Mean CRPS of an equally weighted mixture of normals, in closed form.

    Args:
        means: mean of y of each posterior sample, `[samples, batch]`.
        stds: noise of each posterior sample, `[samples, batch]`.
        targets: y, `[batch]`.

    Returns:
        Mean of ∫ (F(t) − 1[t ≥ y])² dt, in units of the target. Takes time quadratic in the
        number of samples, and memory linear in it.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, numbers are not finite, or `stds` are not positive.

    Source:
        Grimit et al. (2006), doi:10.1256/qj.05.235, equation 5.
    """
    return _mixture_crps(means, stds, targets).mean().item()


def sample_crps(
    samples: Float[Tensor, "samples *batch"], targets: Float[Tensor, "*batch"], *, fair: bool = True
) -> float:
    """Mean CRPS from samples of y: E|Y − y| − ½ E|Y − Y'|.

    Args:
        samples: draws from the predictive distribution of y, noise included,
            `[samples, batch]`.
        targets: y, `[batch]`.
        fair: divide by the number of pairs of different samples: unbiased for the
            distribution they were drawn from, so numbers of samples can differ between what
            is compared. False takes the samples for the whole distribution, which adds
            E|Y − Y'| / (2 samples) to the score.

    Returns:
        In units of the target. With `fair` it can fall below 0.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, numbers are not finite, or there is one sample where
            `fair` needs two.

    Source:
        Gneiting and Raftery (2007), doi:10.1198/016214506000001437, equation 21; fair:
        Ferro (2014), doi:10.1002/qj.2270.
    """
    return _sample_crps(samples, targets, fair=fair).mean().item()


class RMSE(MeanOverData):
    """Streaming `rmse`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(self, mean: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]) -> None:
        """Adds a batch; arguments and errors are those of `rmse`."""
        self.add(_errors(mean, targets).square())

    def compute(self) -> Tensor:
        """The root of the mean over all data so far, float64 `[]`."""
        return super().compute().sqrt()


class MAE(MeanOverData):
    """Streaming `mae`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(self, mean: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"]) -> None:
        """Adds a batch; arguments and errors are those of `mae`."""
        self.add(_errors(mean, targets).abs())


class GaussianNLL(MeanOverData):
    """Streaming `gaussian_nll`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(
        self,
        mean: Float[Tensor, "*batch"],
        std: Float[Tensor, "*batch"],
        targets: Float[Tensor, "*batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `gaussian_nll`."""
        self.add(_gaussian_nlls(mean, std, targets))


class MixtureNLL(MeanOverData):
    """Streaming `mixture_nll`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(
        self,
        means: Float[Tensor, "samples *batch"],
        stds: Float[Tensor, "samples *batch"],
        targets: Float[Tensor, "*batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `mixture_nll`."""
        self.add(_mixture_nlls(means, stds, targets))


class GaussianCRPS(MeanOverData):
    """Streaming `gaussian_crps`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(
        self,
        mean: Float[Tensor, "*batch"],
        std: Float[Tensor, "*batch"],
        targets: Float[Tensor, "*batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `gaussian_crps`."""
        self.add(_gaussian_crps(mean, std, targets))


class MixtureCRPS(MeanOverData):
    """Streaming `mixture_crps`.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def update(
        self,
        means: Float[Tensor, "samples *batch"],
        stds: Float[Tensor, "samples *batch"],
        targets: Float[Tensor, "*batch"],
    ) -> None:
        """Adds a batch; arguments and errors are those of `mixture_crps`."""
        self.add(_mixture_crps(means, stds, targets))


class SampleCRPS(MeanOverData):
    """Streaming `sample_crps`.

    Args:
        fair: unbiased for the distribution that the samples were drawn from.
        kwargs: those of `torchmetrics.Metric`.
    """

    def __init__(self, *, fair: bool = True, **kwargs: Any) -> None:
        super().__init__(f"sum_of_{'fair' if fair else 'plain'}_crps", **kwargs)
        self.fair = fair

    def update(
        self, samples: Float[Tensor, "samples *batch"], targets: Float[Tensor, "*batch"]
    ) -> None:
        """Adds a batch; arguments and errors are those of `sample_crps`."""
        self.add(_sample_crps(samples, targets, fair=self.fair))


def _checked_normal(mean: Tensor, std: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = checks.checked_targets(targets)
    mean = checks.checked_means(mean, "mean", targets, samples=False)
    return mean, checks.checked_stds(std, "std", mean, "mean"), targets


def _checked_mixture(means: Tensor, stds: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = checks.checked_targets(targets)
    means = checks.checked_means(means, "means", targets, samples=True)
    return means, checks.checked_stds(stds, "stds", means, "means"), targets


def _errors(mean: Tensor, targets: Tensor) -> Tensor:
    targets = checks.checked_targets(targets)
    return checks.checked_means(mean, "mean", targets, samples=False) - targets


def _gaussian_nlls(mean: Tensor, std: Tensor, targets: Tensor) -> Tensor:
    mean, std, targets = _checked_normal(mean, std, targets)
    return -torch.distributions.Normal(mean, std).log_prob(targets)


def _mixture_nlls(means: Tensor, stds: Tensor, targets: Tensor) -> Tensor:
    means, stds, targets = _checked_mixture(means, stds, targets)
    log_probs = torch.distributions.Normal(means, stds).log_prob(targets)
    return math.log(len(means)) - log_probs.logsumexp(0)


def _mean_abs_normal(mean: Tensor, std: Tensor) -> Tensor:
    """E|Z| for Z normal: A(μ, σ²) of Grimit et al. (2006)."""
    z = mean / std
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    # 2Φ(z) − 1 as an error function, which does not cancel around 0.
    return 2 * std * density + mean * torch.erf(z / math.sqrt(2))


def _gaussian_crps(mean: Tensor, std: Tensor, targets: Tensor) -> Tensor:
    mean, std, targets = _checked_normal(mean, std, targets)
    return _mean_abs_normal(targets - mean, std) - std / math.sqrt(math.pi)


def _mixture_crps(means: Tensor, stds: Tensor, targets: Tensor) -> Tensor:
    means, stds, targets = _checked_mixture(means, stds, targets)
    num = len(means)
    # Σ_{s,t} E|Y_s − Y_t|: the diagonal, then each pair twice. A row at a time, as all pairs
    # of a few hundred samples would not fit into memory.
    spread = 2 / math.sqrt(math.pi) * stds.sum(0)
    for i in range(num - 1):
        between = torch.hypot(stds[i], stds[i + 1 :])
        spread = spread + 2 * _mean_abs_normal(means[i] - means[i + 1 :], between).sum(0)
    return _mean_abs_normal(targets - means, stds).mean(0) - spread / (2 * num**2)


def _sample_crps(samples: Tensor, targets: Tensor, *, fair: bool) -> Tensor:
    targets = checks.checked_targets(targets)
    samples = checks.checked_means(samples, "samples", targets, samples=True)
    num = len(samples)
    if fair and num < 2:
        raise ValueError(
            "`samples` holds 1 sample, expected at least 2 for the fair estimate: draw more, or "
            "pass fair=False"
        )
    # Σ_{s<t} |y_s − y_t|: the gap above the i-th smallest separates i samples from the others.
    gaps = samples.sort(0).values.diff(dim=0)
    below = torch.arange(1, num, dtype=torch.float64, device=samples.device)
    pairs = torch.tensordot(below * (num - below), gaps, dims=1)
    return (samples - targets).abs().mean(0) - pairs / (num * (num - 1 if fair else num))
