"""What every method refuses at its door, in the same words."""

import pytest
import torch
from torch import nn

import funcbayes as fb
from funcbayes.testing import networks

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def case():
    net = networks.make("linear")
    model = fb.Model.from_module(net)
    data = [(networks.inputs("linear", 4), networks.targets(4))]
    return net, model, data


def fits(model, data, likelihood):
    members = fb.ensemble.from_modules([networks.make("linear", seed=i) for i in range(2)])[1]
    return {
        "laplace": lambda: fb.laplace.fit(model, data, likelihood=likelihood),
        "vi": lambda: fb.vi.fit(model, data, key=0, likelihood=likelihood, num_epochs=1),
        "ensemble": lambda: fb.ensemble.fit(
            model,
            members,
            data,
            key=0,
            likelihood=likelihood,
            optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.1),
            num_epochs=1,
        ),
    }


@pytest.mark.parametrize("method", ["laplace", "vi", "ensemble"])
@pytest.mark.parametrize("likelihood", ["classification", fb.likelihoods.Categorical, None])
def test_what_is_no_likelihood(case, method, likelihood):
    _, model, data = case
    with pytest.raises(TypeError, match=r"expected a likelihood such as .*Categorical\(\)"):
        fits(model, data, likelihood)[method]()


@pytest.mark.parametrize("method", ["laplace", "vi", "ensemble"])
def test_a_module_in_place_of_a_model(case, method):
    net, _, data = case
    with pytest.raises(TypeError, match=r"make one with funcbayes\.Model\.from_module\(net\)"):
        fits(net, data, fb.likelihoods.Categorical())[method]()


def test_predict_refuses_what_is_no_likelihood_or_transform(case):
    _, model, data = case
    posterior = fb.dropout.posterior(model)
    for likelihood in ("classification", fb.likelihoods.Categorical):
        with pytest.raises(TypeError, match="expected a likelihood such as"):
            fb.predict(model, posterior, data[0][0], key=0, num_samples=2, likelihood=likelihood)
    with pytest.raises(ValueError, match="`transform` is 'softmax', expected a function"):
        fb.predict(model, posterior, data[0][0], key=0, num_samples=2, transform="softmax")


@pytest.mark.parametrize("bayesian", ["3.", ["3.weight"]])
def test_a_predicate_that_is_none(case, bayesian):
    with pytest.raises(TypeError, match="expected a predicate on parameter names"):
        fb.Model.from_module(case[0], bayesian=bayesian)


def test_a_module_in_place_of_a_function_that_builds_one():
    with pytest.raises(TypeError, match="expected a function without arguments"):
        fb.ensemble.init(nn.Linear(2, 2), key=0, num_members=2)


@pytest.mark.parametrize(
    "call",
    [
        fb.laplace.posterior,
        fb.laplace.log_marginal_likelihood,
        fb.swag.posterior,
        fb.vi.posterior,
        fb.ensemble.posterior,
        lambda other: fb.swag.update(other, other),
        lambda other: fb.swag.merge(other, other),
        lambda other: fb.laplace.merge(other, other),
    ],
)
def test_the_state_of_another_method(case, call):
    with pytest.raises(TypeError, match=r"`(state|a)` is a dict, expected a \w+State: the result"):
        call(case[1].params)


def vi_and_ensemble(case, **options):
    _, model, data = case
    fit = {"likelihood": fb.likelihoods.Categorical(), "num_epochs": 1, "key": 0, **options}
    members = fb.ensemble.from_modules([networks.make("linear", seed=i) for i in range(2)])[1]
    sgd = {"optimizer": lambda leaves: torch.optim.SGD(leaves, lr=0.1)}
    return [
        lambda: fb.vi.fit(model, data, **fit),
        lambda: fb.ensemble.fit(model, members, data, **fit, **sgd),
    ]


def test_what_is_no_callback(case):
    for fit in vi_and_ensemble(case, callback=3):
        with pytest.raises(TypeError, match="`callback` is a int, expected a function of two"):
            fit()


def test_training_in_inference_mode(case):
    for fit in vi_and_ensemble(case):
        message = "training needs gradients, which torch.inference_mode forbids"
        with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
            fit()


def test_one_width_in_place_of_a_list():
    with pytest.raises(TypeError, match=r"`hidden_sizes` is 8, expected a list of widths: for one"):
        fb.VariationalBayesNN(4, 8, 3)
