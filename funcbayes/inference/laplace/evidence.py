"""Laplace's estimate of the evidence, by which priors and noise are chosen."""

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.inference.checks import check_state
from funcbayes.inference.laplace.gaussian import log_det_ratio
from funcbayes.inference.laplace.noise import at_noise
from funcbayes.inference.laplace.priors import (
    Prior,
    check_curvature,
    check_temperature,
    deviations,
    prior_precisions,
)
from funcbayes.inference.laplace.state import LaplaceState


def log_marginal_likelihood(
    state: LaplaceState,
    *,
    prior_precision: Prior = 1.0,
    prior_mean: Prior = 0.0,
    temperature: float | Tensor = 1.0,
    noise_std: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Laplace's estimate of log p(data): -L/T - ½ [log det P - log det P₀ + (θ-μ₀)ᵀP₀(θ-μ₀)].

    L is the loss, P₀ the prior precision, P = H/T + P₀, μ₀ the prior mean and θ the state's mean.
    Of use to choose `prior_precision` and `noise_std`: it is differentiable in them, and larger
    is better. Temperatures other than 1 raise the likelihood to the power 1/T, in L as in H; such
    a likelihood is not normalised, so values at different temperatures do not compare.

    Args:
        state: from `fit`.
        prior_precision: as for `posterior`.
        prior_mean: μ₀, a number or a tree like the parameters of numbers or tensors.
        temperature: as for `posterior`.
        noise_std: as for `posterior`.

    Returns:
        In nats. Shape [].

    Raises:
        TypeError: as for `posterior`.
        ValueError: as for `posterior`.

    Source:
        MacKay (1992), doi:10.1162/neco.1992.4.3.448; Immer et al. (2021), arXiv:2104.04975,
        equation 6.
    """
    check_state(state, LaplaceState, "laplace.fit")
    check_curvature(state.curvature, state.mean)
    temperature = check_temperature(temperature)
    priors = prior_precisions(prior_precision, state.curvature, state.mean)
    shifts = deviations(prior_mean, state.curvature, state.mean)
    curvature, loss = at_noise(state, noise_std)
    terms = []
    for names, block in curvature.blocks.items():
        prior, shift = priors[names], shifts[names]
        terms.append(log_det_ratio(block, prior, temperature, names))
        terms.append((prior * shift.square()).sum())
    return -loss / temperature - 0.5 * torch.stack(terms).sum()
