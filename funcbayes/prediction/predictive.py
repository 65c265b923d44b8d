"""The predictive distribution: moments over posterior samples, gathered chunk by chunk."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.likelihoods import Gaussian, Likelihood

# Numbers of outputs that a predictive distribution keeps until it is asked about them.
_MOST_WAITING = 2**16


@dataclass(frozen=True)
class Predictive:
    """What a set of posterior samples predicts.

    `Out` stands for the shape of one sample's prediction: probabilities for a classification
    likelihood, means for a regression one, the network's outputs without a likelihood (then
    a pytree where the network returns one).

    Attributes:
        mean: mean over samples, `[batch, *out]`.
        variance: unbiased variance over samples, `[batch, *out]`: the epistemic part. 0 for
            one sample.
        samples: `[samples, batch, *out]` where they were asked for, otherwise None.
    """

    mean: Any
    variance: Any
    samples: Any
    _with_likelihood: "_LikelihoodMoments | _Waiting | None"

    @property
    def aleatoric(self) -> Tensor:
        """Mean over samples of the variance of y given the sample, `[batch, *out]`."""
        return self._moments("aleatoric").aleatoric

    @property
    def total(self) -> Tensor:
        """Variance of y: epistemic (as the mean of squared deviations) plus aleatoric."""
        return self._moments("total").total

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predictive distribution, nats, one number a distribution.

        For a Gaussian likelihood, that of the normal with the predictive moments: an upper
        bound of the mixture's.
        """
        return self._moments("entropy").entropy

    @property
    def expected_entropy(self) -> Tensor:
        """Mean over samples of the entropy of y given the sample, nats."""
        return self._moments("expected_entropy").expected_entropy

    @property
    def mutual_information(self) -> Tensor:
        """Information that y carries on the parameters, nats: entropy − expected entropy.

        Never negative: rounding below 0 is 0.

        Source:
            Houlsby et al. (2011), arXiv:1112.5745 (BALD).
        """
        moments = self._moments("mutual_information")
        return (moments.entropy - moments.expected_entropy).clamp_min(0)

    def _moments(self, name: str) -> "_LikelihoodMoments":
        if self._with_likelihood is None:
            raise ValueError(
                f"`{name}` needs to know what the outputs mean: pass `likelihood` to predict,"
                " e.g. likelihood=funcbayes.likelihoods.Categorical()"
            )
        if isinstance(self._with_likelihood, _Waiting):
            object.__setattr__(self, "_with_likelihood", self._with_likelihood.moments())
        return self._with_likelihood  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _LikelihoodMoments:
    aleatoric: Tensor
    total: Tensor
    entropy: Tensor
    expected_entropy: Tensor


class _Waiting(NamedTuple):
    """What `_LikelihoodMoments` are computed from when somebody asks.

    For a small network they take longer than the rest of a prediction.
    """

    likelihood: Likelihood
    outputs: Tensor
    mean: Tensor
    sum_sq_dev: Tensor

    @torch.no_grad()
    def moments(self) -> _LikelihoodMoments:
        aleatoric, entropy = _sums(self.likelihood, self.outputs)
        return _likelihood_moments(
            self.likelihood,
            len(self.outputs),
            self.mean,
            self.sum_sq_dev,
            aleatoric,
            entropy,
            self.outputs.dtype,
        )


class RunningMoments:
    """Moments over samples that come in chunks; memory does not grow with their number.

    Args:
        likelihood: says what outputs mean; None keeps moments of the outputs themselves.
        keep_samples: whether the samples are kept as well.

    Source:
        Chan, Golub and LeVeque (1983), doi:10.1080/00031305.1983.10483115, for the merge.
    """

    def __init__(
        self,
        likelihood: Likelihood | None,
        transform: Callable[[Tensor], Tensor] | None,
        *,
        keep_samples: bool,
    ) -> None:
        """Starts with no samples."""
        self._likelihood = likelihood
        self._transform = transform
        self._kept: list[Any] | None = [] if keep_samples else None
        self._count = 0
        self._like: Any = None
        self._mean: Any = None
        self._sum_sq_dev: Any = None
        self._waiting: Tensor | None = None
        self._aleatoric: Any = None
        self._entropy: Any = None

    def add(self, outputs: Any) -> None:
        """Adds network outputs, a pytree with leaves `[chunk, batch, *out]`."""
        if self._likelihood is not None:
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"the network returns a {type(outputs).__name__}, but `likelihood` describes"
                    " one tensor: wrap the network to return that tensor, or leave the"
                    " likelihood out"
                )
            values = _each(self._likelihood.inverse_link, outputs)
        elif self._transform is not None:
            values = trees.tensor_map(self._transform, outputs)
        else:
            values = outputs
        if self._kept is not None:
            self._kept.append(values)
        chunk = trees.leading_size(values)
        wide = trees.tensor_map(_at_least_float32, values)
        if self._count == 0:
            self._like = trees.index(values, 0)
        self._merge(wide, chunk)
        if self._likelihood is not None:
            if self._count == 0 and self._kept is None and _may_wait(self._likelihood, outputs):
                self._waiting = outputs
            else:
                self._sum_up(self._likelihood)
                self._add_sums(_sums(self._likelihood, outputs))
        self._count += chunk

    def _sum_up(self, likelihood: Likelihood) -> None:
        """Takes in the outputs that wait."""
        if self._waiting is not None:
            self._add_sums(_sums(likelihood, self._waiting))
            self._waiting = None

    def _add_sums(self, sums: tuple[Tensor, Tensor]) -> None:
        aleatoric, entropy = sums
        first = self._aleatoric is None
        self._aleatoric = aleatoric if first else self._aleatoric + aleatoric
        self._entropy = entropy if first else self._entropy + entropy

    def _merge(self, values: Any, chunk: int) -> None:
        mean = trees.tensor_map(lambda v: v.mean(0), values)
        if chunk == 1:
            spread = trees.zeros_like(mean)
        else:
            spread = trees.tree_map(lambda v, m: (v - m).square().sum(0), values, mean)
        if self._count == 0:
            self._mean, self._sum_sq_dev = mean, spread
            return
        total = self._count + chunk
        delta = trees.tree_map(torch.sub, mean, self._mean)
        self._mean = trees.tree_map(lambda m, d: m + d * (chunk / total), self._mean, delta)
        self._sum_sq_dev = trees.tree_map(
            lambda a, b, d: a + b + d.square() * (self._count * chunk / total),
            self._sum_sq_dev,
            spread,
            delta,
        )

    def result(self) -> Predictive:
        """The predictive distribution of the samples so far."""
        ddof = max(self._count - 1, 1)

        mean = trees.tree_map(lambda m, x: _narrow(m, x.dtype), self._mean, self._like)
        variance = trees.tree_map(
            lambda s, x: _narrow(s / ddof, x.dtype), self._sum_sq_dev, self._like
        )
        moments = None
        if self._likelihood is not None and self._waiting is not None:
            moments = _Waiting(self._likelihood, self._waiting, self._mean, self._sum_sq_dev)
        elif self._likelihood is not None:
            moments = _likelihood_moments(
                self._likelihood,
                self._count,
                self._mean,
                self._sum_sq_dev,
                self._aleatoric,
                self._entropy,
                self._like.dtype,
            )
        samples = None
        if self._kept is not None:
            samples = trees.concatenate(self._kept)
        return Predictive(mean, variance, samples, moments)


def normal_predictive(mean: Tensor, variance: Tensor, likelihood: Gaussian | None) -> Predictive:
    """The predictive distribution where the outputs are normal, without samples."""
    if likelihood is None:
        return Predictive(mean, variance, None, None)
    aleatoric = likelihood.aleatoric(mean)
    total = variance + aleatoric
    entropy = likelihood.predictive_entropy(mean, total)
    moments = _LikelihoodMoments(aleatoric, total, entropy, likelihood.entropy(mean))
    return Predictive(mean, variance, None, moments)


def _likelihood_moments(
    likelihood: Likelihood,
    count: int,
    mean: Tensor,
    sum_sq_dev: Tensor,
    aleatoric: Tensor,
    entropy: Tensor,
    dtype: torch.dtype,
) -> _LikelihoodMoments:
    """From sums over `count` samples; `dtype` is the predictions'."""
    aleatoric = aleatoric / count
    # Biased on purpose: the mixture of these samples has exactly this variance, and for
    # probabilities it adds up to mean · (1 − mean).
    total = aleatoric + sum_sq_dev / count
    mixture = likelihood.predictive_entropy(mean, total)
    # One sample is its own mixture: no rounding between two ways to its entropy.
    expected = mixture if count == 1 else entropy / count
    return _LikelihoodMoments(*(_narrow(x, dtype) for x in (aleatoric, total, mixture, expected)))


def _sums(likelihood: Likelihood, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Aleatoric variance and entropy of outputs `[samples, batch, *out]`, summed over samples."""
    aleatoric = _at_least_float32(_each(likelihood.aleatoric, outputs)).sum(0)
    return aleatoric, _at_least_float32(_each(likelihood.entropy, outputs)).sum(0)


def _each(method: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """A likelihood's method on every sample: likelihoods take one axis of data."""
    return method(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])


def _may_wait(likelihood: Likelihood, outputs: Tensor) -> bool:
    """Whether the likelihood will say the same later, and the outputs are small enough to keep."""
    return (
        outputs.numel() <= _MOST_WAITING
        and outputs.dtype in (torch.float32, torch.float64)
        and is_dataclass(likelihood)
        and likelihood.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
        and all(isinstance(value, int | float | str | None) for value in vars(likelihood).values())
    )


def _narrow(wide: Tensor, dtype: torch.dtype) -> Tensor:
    return wide.to(dtype) if dtype.is_floating_point else wide


def _at_least_float32(x: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))
