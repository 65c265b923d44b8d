"""Laplace approximations equal those of laplace-torch, where that is right."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes.prediction import links
from tests.peers.support import (
    assert_differs,
    assert_same,
    dense_reference,
    each_likelihood,
    flat_function,
    our_likelihood,
    peer,
)

laplace = peer("laplace")
curvature = peer("laplace.curvature")

pytestmark = pytest.mark.filterwarnings("ignore")

N, D, HIDDEN, OUT = 7, 3, 4, 3
PRIOR, NOISE = 0.7, 0.5
# Of 7 data: one that divides them with a rest, and all at once.
each_batch_size = pytest.mark.parametrize("batch_size", [3, 7])


def problem(likelihood, batch_size, out=OUT):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, out))
    x = torch.randn(N, D)
    y = torch.randint(out, (N,)) if likelihood == "classification" else torch.randn(N, out)
    return net, DataLoader(TensorDataset(x, y), batch_size=batch_size)


def theirs_fitted(
    net, loader, likelihood, structure, *, subset="all", noise_std=1.0, backend=None, **options
):
    la = laplace.Laplace(
        copy.deepcopy(net),
        likelihood,
        subset_of_weights=subset,
        hessian_structure=structure,
        prior_precision=PRIOR,
        backend=backend or curvature.CurvlinopsGGN,
        **({} if likelihood == "classification" else {"sigma_noise": noise_std}),
        **options,
    )
    la.fit(loader)
    return la


STRUCTURES = {"diag": "diagonal", "kron": "kronecker", "full": "dense"}
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def both(likelihood, batch_size, structure):
    noise = 1.0 if likelihood == "classification" else NOISE
    net, loader = problem(likelihood, batch_size)
    model = fb.Model.from_module(net)
    state = fb.laplace.fit(
        model,
        loader,
        likelihood=our_likelihood(likelihood, noise),
        structure=STRUCTURES[structure],
    )
    return model, state, theirs_fitted(net, loader, likelihood, structure, noise_std=noise)


# Curvature


@each_batch_size
@each_likelihood
@pytest.mark.parametrize("structure", ["diag", "full"])
def test_ggn(structure, likelihood, batch_size):
    net, loader = problem(likelihood, batch_size)
    model = fb.Model.from_module(net)
    ggn = fb.curvature.ggn(
        model, loader, our_likelihood(likelihood), structure=STRUCTURES[structure]
    ).to_dense(model.params)
    la = theirs_fitted(net, loader, likelihood, structure)
    assert_same(ggn.diagonal() if structure == "diag" else ggn, la.H)


@each_batch_size
@each_likelihood
def test_noise_scales_the_precision(likelihood, batch_size):
    _, state, la = both(likelihood, batch_size, "full")
    precision = state.curvature.to_dense(state.mean) + PRIOR * torch.eye(len(la.H))
    assert_same(precision, la.posterior_precision)
    assert_same(state.loss, -la.log_likelihood)


@each_batch_size
@each_likelihood
def test_kronecker_factors_of_linear_layers(likelihood, batch_size):
    net, loader = problem(likelihood, batch_size)
    model = fb.Model.from_module(net)
    ours = fb.curvature.ggn(model, loader, our_likelihood(likelihood), structure="kronecker")
    # `la.H` is decomposed after the fit; the factors as they were:
    factors = theirs_fitted(net, loader, likelihood, "kron").H_facs.kfacs
    # Theirs halve the Hessian 2I of the squared error, by a root of ½ in either factor.
    root = 1 if likelihood == "classification" else 2**0.5
    assert len(factors) == len(ours.blocks)
    for (names, block), theirs in zip(ours.blocks.items(), factors, strict=True):
        if len(theirs) == 1:
            assert_same(block.to_dense(), theirs[0])
            continue
        assert names[0].endswith("weight")
        assert_same(block.outputs[0] * root, theirs[0])
        assert_same(block.inputs[0] / block.count / root, theirs[1])
        assert_same(block.to_dense(), torch.kron(*theirs))


@each_batch_size
@each_likelihood
@each_structure
def test_empirical_fisher(structure, likelihood, batch_size):
    net, loader = problem(likelihood, batch_size)
    model = fb.Model.from_module(net)
    fisher = fb.curvature.empirical_fisher(
        model, loader, our_likelihood(likelihood), structure=STRUCTURES[structure]
    ).to_dense(model.params)
    la = theirs_fitted(net, loader, likelihood, structure, backend=curvature.CurvlinopsEF)
    theirs = la.H.to_matrix() if structure == "kron" else la.H
    # Its gradients are those of the squared error, of which it halves the squares only once:
    # (2g)(2g)ᵀ/2 where the definition has g gᵀ.
    factor = 1 if likelihood == "classification" else 2
    assert_same(factor * (fisher.diagonal() if structure == "diag" else fisher), theirs)


@each_batch_size
def test_empirical_fisher_in_regression_by_its_definition(batch_size):
    net, loader = problem("regression", batch_size)

    def loss(outputs, target):
        return -torch.distributions.Normal(outputs, NOISE).log_prob(target).sum()

    exact = dense_reference("empirical_fisher", net, *loader.dataset.tensors, loss)
    model = fb.Model.from_module(net)
    likelihood = our_likelihood("regression", NOISE)
    fisher = fb.curvature.empirical_fisher(model, loader, likelihood, structure="dense")
    assert_same(fisher.to_dense(model.params), exact)
    la = theirs_fitted(
        net, loader, "regression", "full", noise_std=NOISE, backend=curvature.CurvlinopsEF
    )
    # 2 Σ g gᵀ/σ² for Σ g gᵀ/σ⁴, g at σ = 1.
    assert_same(2 * NOISE**2 * exact, la.H * la._H_factor)
    assert_differs(exact, la.H * la._H_factor)

    # So the noise scales ours by σ⁻⁴ after the fit, too.
    state = fb.laplace.fit(
        model,
        loader,
        likelihood=our_likelihood("regression"),
        structure="dense",
        curvature="empirical_fisher",
    )
    evidence = fb.laplace.log_marginal_likelihood(state, prior_precision=PRIOR, noise_std=NOISE)
    outputs, flat = flat_function(net)
    x, y = loader.dataset.tensors
    total = sum(loss(outputs(flat, a), b) for a, b in zip(x, y, strict=True))
    log_det = torch.logdet(torch.eye(len(flat)) + exact / PRIOR)
    assert_same(evidence, -total - (log_det + PRIOR * flat @ flat) / 2)


@each_batch_size
@each_likelihood
def test_last_layer_is_a_block_of_the_whole(likelihood, batch_size):
    net, loader = problem(likelihood, batch_size)
    ours = our_likelihood(likelihood)
    head = fb.Model.from_module(net, bayesian=lambda name: name.startswith("2."))
    alone = fb.curvature.ggn(head, loader, ours, structure="dense").to_dense(head.params)
    whole = fb.Model.from_module(net)
    full = fb.curvature.ggn(whole, loader, ours, structure="dense").to_dense(whole.params)
    la = theirs_fitted(net, loader, likelihood, "full", subset="last_layer")
    assert_same(alone, la.H)
    assert_same(full[-len(alone) :, -len(alone) :], la.H)


@each_batch_size
@each_likelihood
def test_subnetwork_is_a_block_of_the_whole(likelihood, batch_size):
    net, loader = problem(likelihood, batch_size)
    ours = our_likelihood(likelihood)
    full = fb.Model.from_module(net)
    H = fb.curvature.ggn(full, loader, ours, structure="dense").to_dense(full.params)
    chosen = torch.tensor([0, 5, 12, 14, 20])
    la = theirs_fitted(
        net, loader, likelihood, "full", subset="subnetwork", subnetwork_indices=chosen
    )
    assert_same(H[chosen[:, None], chosen], la.H)
    # Whole tensors, chosen by name: the first bias and the last weight.
    names = ("0.bias", "2.weight")
    part = fb.Model.from_module(net, bayesian=lambda name: name in names)
    alone = fb.curvature.ggn(part, loader, ours, structure="dense").to_dense(part.params)
    chosen = torch.arange(D * HIDDEN, D * HIDDEN + HIDDEN + HIDDEN * OUT)
    la = theirs_fitted(
        net, loader, likelihood, "full", subset="subnetwork", subnetwork_indices=chosen
    )
    assert_same(alone, la.H)


# Evidence


@each_batch_size
@each_likelihood
@each_structure
@pytest.mark.parametrize("prior_precision", [0.01, PRIOR, 50.0])
def test_log_marginal_likelihood(prior_precision, structure, likelihood, batch_size):
    _, state, la = both(likelihood, batch_size, structure)
    ours = fb.laplace.log_marginal_likelihood(state, prior_precision=prior_precision)
    assert_same(ours, la.log_marginal_likelihood(torch.tensor([prior_precision])).squeeze())


@each_structure
def test_log_marginal_likelihood_at_another_noise(structure):
    _, state, la = both("regression", 3, structure)
    for noise in (0.1, 2.0):
        ours = fb.laplace.log_marginal_likelihood(state, prior_precision=PRIOR, noise_std=noise)
        theirs = la.log_marginal_likelihood(sigma_noise=torch.tensor([noise]))
        assert_same(ours, theirs.squeeze())


@each_likelihood
@each_structure
def test_log_marginal_likelihood_with_a_prior_for_each_tensor(structure, likelihood):
    model, state, la = both(likelihood, 3, structure)
    values = (0.3, 2.0, 0.9, 11.0)
    prior = dict(zip(model.params, map(torch.tensor, values), strict=True))
    ours = fb.laplace.log_marginal_likelihood(state, prior_precision=prior)
    assert_same(ours, la.log_marginal_likelihood(torch.tensor(values)).squeeze())


@each_batch_size
def test_evidence_of_a_linear_model_is_exact(batch_size):
    net, loader = problem("regression", batch_size)
    x, y = loader.dataset.tensors
    features = torch.cat([x, torch.ones(N, 1)], dim=1)
    # The formula holds at the mode: the ridge solution.
    gram = features.T @ features + PRIOR * NOISE**2 * torch.eye(D + 1)
    weights = torch.linalg.solve(gram, features.T @ y).T
    net = nn.Linear(D, OUT)
    net.load_state_dict({"weight": weights[:, :D], "bias": weights[:, D]})
    state = fb.laplace.fit(
        fb.Model.from_module(net),
        loader,
        likelihood=our_likelihood("regression", NOISE),
        structure="dense",
    )
    ours = fb.laplace.log_marginal_likelihood(state, prior_precision=PRIOR)
    covariance = features @ features.T / PRIOR + NOISE**2 * torch.eye(N)
    targets = torch.distributions.MultivariateNormal(torch.zeros(N), covariance)
    assert_same(ours, targets.log_prob(y.T).sum())
    la = theirs_fitted(net, loader, "regression", "full", noise_std=NOISE)
    assert_same(ours, la.log_marginal_likelihood().squeeze())


@each_batch_size
@each_structure
def test_gradient_of_the_evidence_to_the_noise(structure, batch_size):
    _, state, la = both("regression", batch_size, structure)

    def evidence(noise):
        return fb.laplace.log_marginal_likelihood(state, prior_precision=PRIOR, noise_std=noise)

    noise = torch.tensor(NOISE, requires_grad=True)
    (ours,) = torch.autograd.grad(evidence(noise), noise)
    (theirs,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=noise), noise)
    # Truncation is (step/σ)² of the gradient, 4e-8; rounding of the evidence, about 1e2, gives
    # 1e2 · 1e-16/step = 1e-10.
    step = 1e-4
    differences = (evidence(NOISE + step) - evidence(NOISE - step)) / (2 * step)
    assert_same(ours, differences, rtol=1e-6)
    if structure == "kron":
        # Their log-determinant carries no gradient to the noise.
        assert_differs(theirs, ours)
    else:
        assert_same(ours, theirs)


# Prediction


@each_batch_size
@each_likelihood
@each_structure
def test_covariance_of_the_linearized_outputs(structure, likelihood, batch_size):
    model, state, la = both(likelihood, batch_size, structure)
    posterior = fb.laplace.posterior(state, prior_precision=PRIOR)
    x = torch.randn(5, D)
    ours = fb.linearized(model, posterior, x, joint=True)
    mean, covariance = la._glm_predictive_distribution(x)
    assert_same(ours.mean, mean)
    assert_same(ours.covariance, covariance)
    mean, covariance = la._glm_predictive_distribution(x, joint=True)
    assert_same(ours.mean.flatten(), mean)
    assert_same(ours.joint_covariance.reshape(5 * OUT, 5 * OUT), covariance)


@each_likelihood
@each_structure
def test_covariance_from_the_last_layer(structure, likelihood):
    net, loader = problem(likelihood, 3)
    model = fb.Model.from_module(net, bayesian=lambda name: name.startswith("2."))
    state = fb.laplace.fit(
        model, loader, likelihood=our_likelihood(likelihood), structure=STRUCTURES[structure]
    )
    la = theirs_fitted(net, loader, likelihood, structure, subset="last_layer")
    x = torch.randn(5, D)
    ours = fb.linearized(model, fb.laplace.posterior(state, prior_precision=PRIOR), x)
    assert_same(ours.covariance, la._glm_predictive_distribution(x)[1])
    assert_same(
        fb.laplace.log_marginal_likelihood(state, prior_precision=PRIOR),
        la.log_marginal_likelihood().squeeze(),
    )


@each_batch_size
@each_structure
@pytest.mark.parametrize(
    ("link", "theirs"),
    [("probit", "probit"), ("bridge", "bridge"), ("bridge_normalized", "bridge_norm")],
)
def test_class_probabilities(link, theirs, structure, batch_size):
    model, state, la = both("classification", batch_size, structure)
    posterior = fb.laplace.posterior(state, prior_precision=PRIOR)
    x = torch.randn(5, D)
    ours = fb.linearized(model, posterior, x, likelihood=fb.likelihoods.Categorical())
    assert_same(ours.probabilities(link), la(x, pred_type="glm", link_approx=theirs))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_bridge_over_numbers_of_classes_and_spreads(classes, spread):
    net, loader = problem("classification", 3, out=classes)
    la = theirs_fitted(net, loader, "classification", "full")
    root = spread * torch.randn(4, classes, classes)
    mean, covariance = 2 * torch.randn(4, classes), root @ root.mT
    for normalized, name in ((False, "bridge"), (True, "bridge_norm")):
        # It works in place.
        la._glm_predictive_distribution = lambda *_, **__: (mean.clone(), covariance.clone())
        theirs = la(torch.zeros(4, D), pred_type="glm", link_approx=name)
        assert_same(links.laplace_bridge(mean, covariance, normalized=normalized), theirs)


@each_batch_size
def test_variances_of_the_weights(batch_size):
    _, state, la = both("regression", batch_size, "full")
    posterior = fb.laplace.posterior(state, prior_precision=PRIOR)
    (factor,) = posterior.factors.values()
    assert_same(factor.variance(), la.posterior_covariance.diagonal())
