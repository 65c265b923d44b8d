"""Choices by the validation split: hyper-parameters, and the noise in regression."""

import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from funcbayes.cli.data import Splits
from funcbayes.core.likelihoods import Gaussian, Likelihood
from funcbayes.core.model import Model
from funcbayes.core.random import Key
from funcbayes.extras import needs_extra
from funcbayes.prediction import Predictive, linearized, predict

with needs_extra("report"):
    from scipy.optimize import minimize_scalar

# The noise that is looked for in regression, in units of the targets' own spread.
_NOISE_RANGE = 1e-3, 10.0


class Fitted(NamedTuple):
    """What predicts.

    Attributes:
        model: the network as a function.
        posterior: the distribution over its parameters.
        num_samples: how many samples to predict with; None for every member of an ensemble.
        likelihood: what the outputs mean; in regression with the noise of this method.
        choices: what was chosen, for the report.
        linearized: whether the network linearised in its weights predicts, not the network.
    """

    model: Model
    posterior: Any
    num_samples: int | None
    likelihood: Likelihood
    choices: dict[str, Any]
    linearized: bool = False

    def predict(self, inputs: Tensor, key: Key, *, strategy: Any = "auto") -> Predictive:
        """The predictive distribution.

        Args:
            inputs: on the device of the network.
            key: of the samples, of weights or of linearised outputs.
            strategy: of `predict`, where weights are sampled.
        """
        if self.linearized:
            found = linearized(self.model, self.posterior, inputs, likelihood=self.likelihood)
            # Outputs are cheap to draw, the covariance is what takes time.
            return found.predictive(key=key, num_samples=10 * (self.num_samples or 1))
        return predict(
            self.model,
            self.posterior,
            inputs,
            key=key,
            num_samples=self.num_samples,
            likelihood=self.likelihood,
            strategy=strategy,
        )


def best(
    name: str, candidates: dict[float, Fitted], data: Splits, *, key: Key, tolerance: float
) -> Fitted:
    """The candidate of the lowest validation NLL, with the values tried in its choices.

    With a tolerance, the least sure of those that are not told apart from it: the rule of
    one standard error of Breiman et al. (1984), "Classification and regression trees",
    section 3.4.3, with a fraction of it, and for the wider posterior in place of the
    smaller tree.

    Args:
        name: of what is chosen.
        candidates: from a value to what was fitted with it.
        data: whose validation split chooses.
        key: of the posterior samples.
        tolerance: how many standard errors of the difference in NLL count for none.
    """
    fits = {value: with_noise(fitted, data, key=key) for value, fitted in candidates.items()}
    found = {value: _validate(fitted, data, key) for value, fitted in fits.items()}
    lowest = min(found, key=lambda value: found[value].mean_nll)
    chosen = lowest
    for value, other in found.items():
        excess = other.nlls - found[lowest].nlls
        error = float(excess.std(correction=0)) / math.sqrt(len(excess))
        as_good = other.mean_nll - found[lowest].mean_nll <= tolerance * error
        if as_good and other.spread > found[chosen].spread:
            chosen = value
    tried = {f"{value:.4g}": round(one.mean_nll, 6) for value, one in found.items()}
    choices = {name: chosen, **fits[chosen].choices, "validation_nll": tried}
    return fits[chosen]._replace(choices=choices)


def with_noise(fitted: Fitted, data: Splits, *, key: Key) -> Fitted:
    """In regression, the noise under which the validation targets are most likely.

    The predictive distribution is a normal with the variance over samples plus that of the
    noise: a method that is unsure itself needs less noise.
    """
    if not isinstance(fitted.likelihood, Gaussian):
        return fitted
    predictive = fitted.predict(data.validation.inputs, key)
    spread = (predictive.total - predictive.aleatoric).clamp_min(0).double().cpu().numpy()
    error = (data.validation.targets - predictive.mean).double().cpu().numpy()

    def nll(log_std: float) -> float:
        variance = spread + math.exp(2 * log_std)
        return float(np.mean(np.log(variance) + error**2 / variance))

    bounds = tuple(map(math.log, _NOISE_RANGE))
    noise_std = math.exp(minimize_scalar(nll, bounds=bounds, method="bounded").x)
    return fitted._replace(
        likelihood=Gaussian(noise_std=noise_std),
        choices={**fitted.choices, "noise_std": noise_std * data.target_std},
    )


class _Validated(NamedTuple):
    """NLL of each validation datum, its mean (infinite for no number), and how unsure it is."""

    nlls: Tensor
    mean_nll: float
    spread: float


def _validate(fitted: Fitted, data: Splits, key: Key) -> _Validated:
    targets = data.validation.targets
    predictive = fitted.predict(data.validation.inputs, key)
    if isinstance(fitted.likelihood, Gaussian):
        total = predictive.total.double()
        error = targets - predictive.mean.double()
        nlls = 0.5 * ((2 * math.pi * total).log() + error.square() / total)
        spread = float((predictive.total - predictive.aleatoric).mean())
    else:
        nlls = -predictive.mean.gather(1, targets[:, None]).squeeze(1).log()
        spread = float(predictive.mutual_information.mean())
    mean = float(nlls.mean())
    return _Validated(nlls, mean if math.isfinite(mean) else math.inf, spread)
