"""Linear regression, whose posterior, evidence and predictive are known, by every structure."""

import pytest
import torch
from torch import nn

import funcbayes as fb
from funcbayes.core import trees

NUM, INPUTS, OUTPUTS = 30, 4, 2
PRIOR = 0.8


def data():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(NUM, INPUTS, generator=g, dtype=torch.float64)
    return x, torch.randn(NUM, OUTPUTS, generator=g, dtype=torch.float64)


def exact(x, y, variance):
    """Mean `[outputs, inputs]`, and the covariance that each output's weights have."""
    covariance = torch.linalg.inv(x.T @ x / variance + PRIOR * torch.eye(INPUTS).double())
    return (covariance @ x.T @ y / variance).T, covariance


def fit(structure, mean, x, y, std):
    net = nn.Linear(INPUTS, OUTPUTS, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(mean)
    model = fb.Model.from_module(net)
    state = fb.laplace.fit(
        model,
        [(x[:11], y[:11]), (x[11:], y[11:])],
        likelihood=fb.likelihoods.Gaussian(noise_std=std),
        structure=structure,
        rank=INPUTS * OUTPUTS if structure == "low_rank" else None,
    )
    return model, state


# With one layer, and noise that is the same for all outputs, the curvature is I ⊗ XᵀX / σ²: a
# Kronecker product, so that every structure but the diagonal has all of it.
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("structure", ["kronecker", "ekfac", "dense", "block_diagonal", "low_rank"])
def test_linear_regression_has_its_exact_posterior_evidence_and_predictive(
    structure, refit, temperature
):
    x, y = data()
    std = 0.7
    mean, covariance = exact(x, y, std**2 * temperature)
    model, state = fit(structure, mean, x, y, std if refit else 1.3)
    options = {"prior_precision": PRIOR, "temperature": temperature, "noise_std": std}
    posterior = fb.laplace.posterior(state, **options)
    torch.testing.assert_close(posterior.mean["weight"], mean)
    whole = torch.block_diag(*[covariance] * OUTPUTS)
    torch.testing.assert_close(trees.ravel(posterior.variance), whole.diagonal())
    (factor,) = posterior.factors.values()
    root = factor.scale(torch.eye(INPUTS * OUTPUTS).double())
    torch.testing.assert_close(root.T @ root, whole)

    new = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    likelihood = fb.likelihoods.Gaussian(noise_std=std)
    pred = fb.linearized(model, posterior, new, likelihood=likelihood, joint=True)
    # [data, outputs, data, outputs]: independent outputs, each with x Σ xᵀ.
    joint = torch.einsum("nm,ab->namb", new @ covariance @ new.T, torch.eye(OUTPUTS).double())
    torch.testing.assert_close(pred.mean, new @ mean.T)
    torch.testing.assert_close(pred.joint_covariance, joint)
    spread = (new @ covariance @ new.T).diagonal() + std**2
    torch.testing.assert_close(pred.total, spread[:, None].expand(3, OUTPUTS))

    if temperature == 1:
        # Each output by itself: log N(y; 0, σ²I + X Xᵀ / p₀).
        marginal = std**2 * torch.eye(NUM).double() + x @ x.T / PRIOR
        normal = torch.distributions.MultivariateNormal(torch.zeros(NUM).double(), marginal)
        evidence = fb.laplace.log_marginal_likelihood(state, **options)
        torch.testing.assert_close(evidence, normal.log_prob(y.T).sum())


def test_diagonal_structures_keep_the_diagonal_of_the_precision():
    x, y = data()
    mean, covariance = exact(x, y, 0.49)
    _, state = fit("diagonal", mean, x, y, 0.7)
    posterior = fb.laplace.posterior(state, prior_precision=PRIOR)
    expected = (1 / torch.linalg.inv(covariance).diagonal()).expand(OUTPUTS, INPUTS)
    torch.testing.assert_close(posterior.variance["weight"], expected)
