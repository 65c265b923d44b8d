"""Laplace approximations equal those of laplace-torch, where that is right."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes.prediction import links

with warnings.catch_warnings():
    # Deprecations that importing it runs into are not ours to mend.
    warnings.simplefilter("ignore")
    laplace = pytest.importorskip("laplace", exc_type=ImportError)
    curvature = pytest.importorskip("laplace.curvature", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")

N, D, HIDDEN, OUT = 7, 3, 4, 3
PRIOR, NOISE = 0.7, 0.5
LIKELIHOODS = ("classification", "regression")
# Of 7 data: one that divides them with a rest, and all at once.
BATCH_SIZES = (3, 7)
# Sums of at most a few thousand products in float64 round by 1e-13 of the largest entry;
# factorisations multiply that by condition numbers, here below 1e3.
RTOL = 1e-10

each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
each_batch_size = pytest.mark.parametrize("batch_size", BATCH_SIZES)


@pytest.fixture(autouse=True)
def float64():
    # It multiplies with identities of the default dtype.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(ours, theirs):
    """Equal to `RTOL` of the largest entry: small ones may be differences of large ones."""
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs.detach(), rtol=RTOL, atol=RTOL * scale)


def problem(likelihood, batch_size, out=OUT):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, out))
    x = torch.randn(N, D)
    y = torch.randint(out, (N,)) if likelihood == "classification" else torch.randn(N, out)
    return net, DataLoader(TensorDataset(x, y), batch_size=batch_size)


def our_likelihood(likelihood, noise_std=1.0):
    if likelihood == "classification":
        return fb.likelihoods.Categorical()
    return fb.likelihoods.Gaussian(noise_std=noise_std)


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
    assert len(factors) == len(ours.blocks)
    for (names, block), theirs in zip(ours.blocks.items(), factors, strict=True):
        if len(theirs) == 1:
            assert_same(block.to_dense(), theirs[0])
            continue
        assert names[0].endswith("weight")
        assert_same(block.outputs[0], theirs[0])
        assert_same(block.inputs[0] / block.count, theirs[1])
        assert_same(block.to_dense(), torch.kron(*theirs))


@each_batch_size
@each_likelihood
@pytest.mark.parametrize("structure", ["diag", "full"])
def test_empirical_fisher(structure, likelihood, batch_size):
    net, loader = problem(likelihood, batch_size)
    model = fb.Model.from_module(net)
    fisher = fb.curvature.empirical_fisher(
        model, loader, our_likelihood(likelihood), structure=STRUCTURES[structure]
    ).to_dense(model.params)
    if structure == "diag":
        fisher = fisher.diagonal()
    la = theirs_fitted(net, loader, likelihood, structure, backend=curvature.CurvlinopsEF)
    # Its gradients are those of the squared error, of which it halves the squares only once:
    # (2g)(2g)ᵀ/2 where the definition has g gᵀ.
    factor = 1 if likelihood == "classification" else 2
    assert_same(factor * fisher, la.H)


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
def test_variance_of_samples_is_that_of_the_posterior(batch_size):
    model, state, la = both("regression", batch_size, "full")
    posterior = fb.laplace.posterior(state, prior_precision=PRIOR)
    (factor,) = posterior.factors.values()
    assert len(parameters_to_vector(model.params.values())) == len(la.H)
    assert_same(factor.variance(), la.posterior_covariance.diagonal())
