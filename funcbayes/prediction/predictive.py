"""The predictive distribution: moments over posterior samples, gathered chunk by chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.likelihoods import Gaussian, Likelihood


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
    _with_likelihood: "_LikelihoodMoments | None"

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
        return self._with_likelihood


@dataclass(frozen=True)
class _LikelihoodMoments:
    aleatoric: Tensor
    total: Tensor
    entropy: Tensor
    expected_entropy: Tensor


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
            values = self._each(self._likelihood.inverse_link, outputs)
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
            aleatoric = _at_least_float32(self._each(self._likelihood.aleatoric, outputs)).sum(0)
            entropy = _at_least_float32(self._each(self._likelihood.entropy, outputs)).sum(0)
            first = self._count == 0
            self._aleatoric = aleatoric if first else self._aleatoric + aleatoric
            self._entropy = entropy if first else self._entropy + entropy
        self._count += chunk

    @staticmethod
    def _each(method: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
        """A likelihood's method on every sample: likelihoods take one axis of data."""
        return method(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])

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

        def narrow(wide: Tensor, like: Tensor) -> Tensor:
            return wide.to(like.dtype) if like.is_floating_point() else wide

        mean = trees.tree_map(narrow, self._mean, self._like)
        variance = trees.tree_map(lambda s, x: narrow(s / ddof, x), self._sum_sq_dev, self._like)
        moments = None
        if self._likelihood is not None:
            aleatoric = self._aleatoric / self._count
            # Biased on purpose: the mixture of these samples has exactly this variance, and
            # for probabilities it adds up to mean · (1 − mean).
            total = aleatoric + self._sum_sq_dev / self._count
            entropy = self._likelihood.predictive_entropy(self._mean, total)
            # One sample is its own mixture: no rounding between two ways to its entropy.
            expected = entropy if self._count == 1 else self._entropy / self._count
            moments = _LikelihoodMoments(
                *(narrow(x, self._like) for x in (aleatoric, total, entropy, expected))
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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
