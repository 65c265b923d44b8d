"""A default device does not reach tensors that go with the user's own: here one without memory."""

import pytest
import torch
from torch import nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.testing import networks
from tests.methods import METHODS

CATEGORICAL = fb.likelihoods.Categorical()
X, Y = networks.inputs("linear", 5), networks.targets(5)
REALS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _elsewhere():
    with torch.device("meta"):
        yield


def model():
    with torch.device("cpu"):
        return fb.Model.from_module(networks.make("linear"))


def assert_real(tree):
    assert {leaf.device.type for leaf in trees.tensor_leaves(tree)} == {"cpu"}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    row = METHODS[name]
    with torch.device("cpu"):
        net = networks.make("linear")
    fitted, posterior = row.fit(net, (X, Y), 0)
    for strategy in ("auto", "vmap", "loop", "threads"):
        pred = fb.predict(
            fitted, posterior, X, key=0, num_samples=3, strategy=strategy, likelihood=CATEGORICAL
        )
        assert_real((pred.mean, pred.variance))


@pytest.mark.parametrize("structure", ["low_rank", "kronecker", "ekfac", "dense", "diagonal"])
def test_a_noise_for_each_output(structure):
    rank = 2 if structure == "low_rank" else None
    state = fb.laplace.fit(
        model(),
        (X, REALS),
        likelihood=fb.likelihoods.Gaussian(noise_std=0.5),
        structure=structure,
        rank=rank,
        per_output_noise=True,
    )
    assert_real(state)


def test_choices_of_priors():
    with torch.device("cpu"):
        own = fb.Model.from_module(nn.Linear(4, 3))
    gaussian = fb.likelihoods.Gaussian(noise_std=0.5)
    state = fb.laplace.fit(own, (X, REALS), likelihood=gaussian)
    assert_real(fb.laplace.log_marginal_likelihood(state, prior_precision=2.0))
    assert_real(fb.laplace.tune(state, prior="per_tensor", learn_noise=True, noise_std=0.7))

    def squares(posterior):
        return sum(leaf.square().sum() for leaf in trees.leaves(posterior.sample(0, 1)))

    tune = fb.laplace.tune_by_validation
    assert_real(tune(state, lambda posterior: float(squares(posterior)), prior_precisions=[1]))
    assert_real(tune(state, squares, method="gradient", learn_temperature=True, num_steps=2))
    online = fb.laplace.online(own, (X, REALS), key=0, likelihood=gaussian, num_epochs=2)
    assert_real((online.params, online.history, online.state))


def test_keys_and_members_that_are_drawn():
    with torch.device("cpu"):
        members = [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))]
        ensemble = fb.DeepEnsemble(members.pop, 2)
    assert_real(ensemble.predict(X, num_samples=2))


def test_empty_draws():
    assert fb.random.normal_rows(0, 0, 0, 3).device.type == "cpu"
