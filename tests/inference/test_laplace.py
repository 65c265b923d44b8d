"""The Laplace state, its posterior under any prior, and the evidence."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

from funcbayes import curvature
from funcbayes.core import likelihoods, trees
from funcbayes.core.model import Model
from funcbayes.inference import laplace
from funcbayes.inference.laplace import LaplaceState

N = 12


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return net, torch.randn(N, 3).double(), torch.randint(0, 2, (N,))


def fitted(**options):
    net, x, y = problem()
    return laplace.fit(
        Model.from_module(net), (x, y), likelihood=likelihoods.Categorical(), **options
    )


def diagonal_of(state):
    return state.curvature.diagonal(state.mean)


def assert_states_close(a, b):
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_fit_is_curvature_loss_and_count(kind):
    net, x, y = problem()
    model, likelihood = Model.from_module(net), likelihoods.Categorical()
    state = laplace.fit(
        model, [(x[:5], y[:5]), (x[5:], y[5:])], likelihood=likelihood, curvature=kind
    )
    expected = getattr(curvature, kind)(model, (x, y), likelihood)
    loss = likelihood.nll(net(x), y).sum().detach()
    assert_states_close(state, LaplaceState(model.params, expected, torch.tensor(N), loss, ()))


def test_a_likelihood_without_noise_leaves_none():
    assert fitted().noise == ()


def regression(std, kind, *, per_output_noise=False, structure="dense"):
    net, x, _ = problem()
    targets = torch.linspace(-1, 2, 2 * N, dtype=torch.float64).reshape(N, 2).sin()
    return laplace.fit(
        Model.from_module(net),
        [(x[:5], targets[:5]), (x[5:], targets[5:])],
        likelihood=likelihoods.Gaussian(noise_std=std),
        curvature=kind,
        structure=structure,
        per_output_noise=per_output_noise,
    )


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker"])
def test_noise_changed_after_the_fit_is_noise_at_the_fit(kind, structure):
    changed, fitted = (regression(std, kind, structure=structure) for std in (0.5, 0.8))
    found = laplace.posterior(changed, noise_std=0.8)
    torch.testing.assert_close(found.variance, laplace.posterior(fitted).variance)
    torch.testing.assert_close(
        laplace.log_marginal_likelihood(changed, noise_std=0.8),
        laplace.log_marginal_likelihood(fitted),
    )


@pytest.mark.parametrize("structure", ["diagonal", "dense", "kronecker", "ekfac"])
def test_noise_of_each_output_changed_after_the_fit_is_noise_at_the_fit(structure):
    std = torch.tensor([0.8, 0.3], dtype=torch.float64)
    options = {"per_output_noise": True, "structure": structure}
    changed, fitted = (regression(s, "ggn", **options) for s in (0.5, std))
    found = laplace.log_marginal_likelihood(changed, noise_std=std)
    if structure == "ekfac":
        # The eigenvectors are those at the fit: another approximation at another noise, and
        # the same at the same.
        std, fitted = 0.5, regression(0.5, "ggn", structure=structure)
        found = laplace.log_marginal_likelihood(changed, noise_std=std)
    torch.testing.assert_close(found, laplace.log_marginal_likelihood(fitted))
    torch.testing.assert_close(
        laplace.posterior(changed, noise_std=std).variance, laplace.posterior(fitted).variance
    )


def test_the_default_curvature_is_the_ggn():
    assert_states_close(fitted(), fitted(curvature="ggn"))


def linear_gaussian(num_data=30):
    """A regression with orthogonal features, whose posterior is diagonal: known in closed form."""
    torch.manual_seed(1)
    features = torch.linalg.qr(torch.randn(num_data, 4).double())[0] * torch.arange(1.0, 5.0)
    y = torch.randn(num_data, 1).double()
    return features, y


def test_linear_gaussian_model_has_its_exact_posterior_and_evidence():
    features, y = linear_gaussian()
    noise_std, prior = 0.7, torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    gram = features.T @ features / noise_std**2
    covariance = torch.linalg.inv(gram + torch.diag(prior))
    mean = covariance @ features.T @ y / noise_std**2
    model = Model(apply=lambda w, x: x @ w.unsqueeze(1), params=mean.squeeze(1))

    state = laplace.fit(model, (features, y), likelihood=likelihoods.Gaussian(noise_std=noise_std))
    posterior = laplace.posterior(state, prior_precision=prior)
    torch.testing.assert_close(posterior.mean, mean.squeeze(1))
    torch.testing.assert_close(posterior.variance, covariance.diagonal())

    # log N(y; 0, σ²I + X P₀⁻¹ Xᵀ)
    marginal = noise_std**2 * torch.eye(len(y)) + features @ torch.diag(1 / prior) @ features.T
    exact = torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), marginal)
    evidence = laplace.log_marginal_likelihood(state, prior_precision=prior)
    torch.testing.assert_close(evidence, exact.log_prob(y.squeeze(1)))


@pytest.mark.parametrize("structure", ["dense", "block_diagonal"])
def test_correlated_linear_gaussian_model_has_its_exact_posterior_and_evidence(structure):
    torch.manual_seed(2)
    features, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    prior = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
    for std in (0.7, 1.3):
        covariance = torch.linalg.inv(features.T @ features / std**2 + torch.diag(prior))
        mean = covariance @ features.T @ y / std**2
        model = Model(apply=lambda w, x: x @ w.unsqueeze(1), params=mean.squeeze(1))
        # Fitted at another noise, and moved to this one.
        state = laplace.fit(
            model,
            (features, y),
            likelihood=likelihoods.Gaussian(noise_std=0.7),
            structure=structure,
        )
        posterior = laplace.posterior(state, prior_precision=prior, noise_std=std)
        (factor,) = posterior.factors.values()
        rows = factor.scale(torch.eye(4).double())
        torch.testing.assert_close(rows.T @ rows, covariance)
        marginal = std**2 * torch.eye(len(y)) + features @ torch.diag(1 / prior) @ features.T
        exact = torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), marginal)
        found = laplace.log_marginal_likelihood(state, prior_precision=prior, noise_std=std)
        torch.testing.assert_close(found, exact.log_prob(y.squeeze(1)))


@given(cuts=st.sets(st.integers(1, N - 1)))
def test_shards_merge_to_the_whole(cuts):
    net, x, y = problem()
    model, likelihood = Model.from_module(net), likelihoods.Categorical()
    edges = [0, *sorted(cuts), N]
    states = [
        laplace.fit(model, (x[a:b], y[a:b]), likelihood=likelihood) for a, b in pairwise(edges)
    ]
    merged = states[0]
    for state in states[1:]:
        merged = laplace.merge(merged, state)
    assert_states_close(merged, laplace.fit(model, (x, y), likelihood=likelihood))


def test_merge_refuses_states_of_different_parameters():
    a, b = fitted(), fitted()
    b.mean["2.bias"][0] += 1
    with pytest.raises(
        ValueError, match=r"`b\.mean\['2\.bias'\]` differs from `a\.mean\['2\.bias'\]`"
    ):
        laplace.merge(a, b)
    with pytest.raises(ValueError, match=r"b\.mean\['0\.weight'\] is missing"):
        laplace.merge(a, b._replace(mean={"2.bias": b.mean["2.bias"]}))


PRIORS = {
    "number": lambda s: 2.5,
    "int": lambda s: 3,
    "numpy": lambda s: np.float32(2.5),
    "tensor": lambda s: torch.tensor(2.5),
    "numbers": lambda s: {name: 1.0 + i for i, name in enumerate(s.mean)},
    "scalars": lambda s: {name: torch.tensor(1.0 + i) for i, name in enumerate(s.mean)},
    "full": lambda s: trees.tree_map(lambda m: 1 + torch.rand(m.shape), s.mean),
    "mixed": lambda s: {**trees.tree_map(lambda m: 1 + m.square(), s.mean), "0.bias": 7.0},
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("temperature", [1.0, 0.25, torch.tensor(2.0)])
def test_posterior_precision_is_tempered_curvature_plus_prior(prior, temperature):
    state = fitted()
    prior = prior(state)
    before = copy.deepcopy(state)
    posterior = laplace.posterior(state, prior_precision=prior, temperature=temperature)
    for name, std in posterior.std.items():
        value = prior[name] if isinstance(prior, dict) else prior
        torch.testing.assert_close(1 / std.square(), diagonal_of(state)[name] / temperature + value)
        assert torch.equal(posterior.mean[name], state.mean[name])
    assert_states_close(state, before)


def test_evidence_is_differentiable_and_its_gradient_is_right():
    state = fitted()
    log_prior = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def evidence(log_prior, log_temperature):
        return laplace.log_marginal_likelihood(
            state, prior_precision=log_prior.exp(), temperature=log_temperature.exp()
        )

    assert torch.autograd.gradcheck(evidence, (log_prior, log_temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_evidence_equals_the_formula_over_flat_vectors(temperature):
    state, prior = fitted(), PRIORS["full"](fitted())
    h, p0, theta = (trees.ravel(tree) for tree in (diagonal_of(state), prior, state.mean))
    precision = torch.diag(h / temperature + p0)
    expected = -state.loss / temperature - 0.5 * (
        torch.logdet(precision) - torch.logdet(torch.diag(p0.double())) + theta @ (p0 * theta)
    )
    found = laplace.log_marginal_likelihood(state, prior_precision=prior, temperature=temperature)
    torch.testing.assert_close(found, expected)


def test_evidence_of_no_information_is_minus_the_loss():
    state = fitted()
    state = state._replace(
        mean=trees.zeros_like(state.mean), curvature=trees.zeros_like(state.curvature)
    )
    evidence = laplace.log_marginal_likelihood(state, prior_precision=1e-3)
    torch.testing.assert_close(evidence, -state.loss, rtol=0, atol=0)


def test_posterior_is_differentiable_in_the_prior():
    state = fitted()
    prior = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    total = sum(leaf.sum() for leaf in laplace.posterior(state, prior_precision=prior).std.values())
    (gradient,) = torch.autograd.grad(total, prior)
    # d/dp (h + p)^(-1/2) = -½ (h + p)^(-3/2)
    expected = sum((-0.5 * (h + 2).pow(-1.5)).sum() for h in diagonal_of(state).values())
    torch.testing.assert_close(gradient, expected)


def test_a_stack_of_states_is_an_ensemble():
    states = [fitted(), fitted(curvature="empirical_fisher")]
    stacked = trees.stack(states)
    posterior = vmap(laplace.posterior)(stacked)
    evidences = vmap(laplace.log_marginal_likelihood)(stacked)
    merged = vmap(laplace.merge)(stacked, stacked)
    for i, state in enumerate(states):
        assert_states_close(trees.index(posterior, i), laplace.posterior(state))
        torch.testing.assert_close(evidences[i], laplace.log_marginal_likelihood(state))
        assert_states_close(trees.index(merged, i), laplace.merge(state, state))


def test_training_on_does_not_move_the_state():
    net, x, y = problem()
    model = Model.from_module(net)
    state = laplace.fit(model, (x, y), likelihood=likelihoods.Categorical())
    before = copy.deepcopy(state)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert_states_close(state, before)
    assert not any(leaf.requires_grad for leaf in trees.leaves(state))


def test_low_precision_parameters_keep_their_dtype():
    net, x, y = problem()
    state = laplace.fit(
        Model.from_module(net.to(torch.bfloat16)),
        (x.bfloat16(), y),
        likelihood=likelihoods.Categorical(),
    )
    assert {leaf.dtype for leaf in trees.leaves(state.curvature)} == {torch.float32}
    posterior = laplace.posterior(state)
    assert {leaf.dtype for leaf in trees.leaves(posterior)} == {torch.bfloat16}
    assert laplace.log_marginal_likelihood(state).dtype == torch.float32


def test_frozen_parameters_have_no_posterior():
    net, x, y = problem()
    model = Model.from_module(net, bayesian=lambda name: name.startswith("2."))
    state = laplace.fit(model, (x, y), likelihood=likelihoods.Categorical())
    assert list(state.curvature.blocks) == [("2.weight",), ("2.bias",)]
    whole = diagonal_of(fitted())
    for name, leaf in diagonal_of(state).items():
        torch.testing.assert_close(leaf, whole[name])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [laplace.posterior, laplace.log_marginal_likelihood])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"prior_precision": 0}, ValueError, r"`prior_precision` is 0\.0, expected positive"),
        ({"prior_precision": -1.0}, ValueError, r"`prior_precision` is -1\.0"),
        ({"prior_precision": math.nan}, ValueError, r"`prior_precision` is nan"),
        ({"prior_precision": torch.tensor(math.inf)}, ValueError, r"`prior_precision` is inf"),
        ({"prior_precision": True}, ValueError, r"`prior_precision` is a bool"),
        ({"prior_precision": "1"}, ValueError, r"`prior_precision` is a str, expected a number"),
        ({"prior_precision": torch.ones(3)}, ValueError, r"is a Tensor of shape \(3,\)"),
        ({"temperature": 0.0}, ValueError, r"`temperature` is 0\.0"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, r"`temperature` is -1\.0"),
        ({"temperature": "hot"}, TypeError, r"`temperature` is a str"),
        ({"temperature": torch.ones(2)}, ValueError, r"`temperature` has shape \(2,\)"),
    ],
    ids=lambda value: None,
)
def test_bad_priors_and_temperatures_are_named(function, options, error, match):
    with pytest.raises(error, match=match):
        function(fitted(), **options)


def test_bad_leaves_of_a_prior_are_named():
    state = fitted()
    good = trees.tree_map(torch.ones_like, state.mean)
    bad = {
        r"`prior_precision\['2\.bias'\]` is as low as -1\.0": {"2.bias": torch.tensor([1.0, -1.0])},
        r"`prior_precision\['2\.bias'\]` is 0\.0": {"2.bias": 0.0},
        r"`prior_precision\['0\.weight'\]` has shape \(3, 4\), expected \(\) or \(4, 3\):": {
            "0.weight": torch.ones(3, 4)
        },
        r"prior_precision\['0\.weigth'\] is not expected": {"0.weigth": 1.0},
    }
    for match, change in bad.items():
        with pytest.raises(ValueError, match=match):
            laplace.posterior(state, prior_precision={**good, **change})
    with pytest.raises(ValueError, match=r"prior_precision\['0\.bias'\] is missing"):
        laplace.posterior(state, prior_precision={"0.weight": 1.0})
    with pytest.raises(TypeError, match=r"`prior_precision\['0\.bias'\]` is a str"):
        laplace.posterior(state, prior_precision={**good, "0.bias": "1"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"curvature": "fisher"}, r"`curvature` is 'fisher', expected one of \"ggn\""),
        ({"structure": "full"}, r"`structure` is 'full', expected one of \"diagonal\""),
        ({"data": []}, r"`data` yielded no data"),
        ({"data": (torch.zeros(2, 3), torch.zeros(2))}, r"`targets` has dtype torch.float32"),
    ],
    ids=lambda value: None,
)
def test_fit_refuses_at_the_door(options, match):
    net, x, y = problem()
    options = {"data": (x.float(), y), **options}
    with pytest.raises(ValueError, match=match):
        laplace.fit(Model.from_module(net.float()), likelihood=likelihoods.Categorical(), **options)


def test_fit_refuses_non_finite_weights_and_losses():
    net, x, y = problem()
    with pytest.raises(ValueError, match=r"the loss of batch 1 of `data` is not finite"):
        laplace.fit(
            Model.from_module(net),
            [(x, y), (x * math.inf, y)],
            likelihood=likelihoods.Categorical(),
        )
    with torch.no_grad():
        net[2].bias[0] = math.nan
    with pytest.raises(
        ValueError, match=r"`params\['2\.bias'\]` has 1 of 2 entries NaN or infinite"
    ):
        laplace.fit(Model.from_module(net), (x, y), likelihood=likelihoods.Categorical())
