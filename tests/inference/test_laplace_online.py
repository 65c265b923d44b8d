"""Training while the marginal likelihood chooses the prior."""

import copy
import math

import pytest
import torch
from torch import nn

from funcbayes.core import likelihoods, trees
from funcbayes.core.model import Model
from funcbayes.inference import laplace


def data(num=60):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 2, generator=generator)
    y = x.sin().sum(1, keepdim=True) + 0.2 * torch.randn(num, 1, generator=generator)
    return [(x[: num // 2], y[: num // 2]), (x[num // 2 :], y[num // 2 :])]


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), *extra, nn.Linear(8, 1))


OPTIONS = {"key": 0, "likelihood": likelihoods.Gaussian(noise_std=0.5), "num_epochs": 6}


def test_training_reaches_a_better_evidence_than_without_a_choice():
    model = Model.from_module(network())
    result = laplace.online(
        model,
        data(),
        **{**OPTIONS, "num_epochs": 200},
        learning_rate=1e-2,
        learn_noise=True,
        burn_in=20,
        interval=20,
    )
    # Nine by the interval; the last is that of the last epoch.
    assert result.history.epoch.tolist() == list(range(40, 201, 20))
    assert result.history.log_marginal_likelihood[-1] > result.history.log_marginal_likelihood[0]
    assert result.noise_std.item() == pytest.approx(0.2, rel=0.4)
    options = {"prior_precision": result.prior_precision, "noise_std": result.noise_std}
    # Float32 sums against float64 ones.
    torch.testing.assert_close(
        laplace.log_marginal_likelihood(result.state, **options).double(),
        result.history.log_marginal_likelihood[-1],
        rtol=1e-4,
        atol=1e-3,
    )
    # What Adam found by small steps is near what fixed points find at the end.
    tuned = laplace.tune(result.state, prior="per_tensor", learn_noise=True)
    assert tuned.log_marginal_likelihood - result.history.log_marginal_likelihood[-1] < 1.0
    posterior = laplace.posterior(result.state, **options)
    assert trees.same_structure(posterior.mean, model.params)


def by_hand(net, batches, precision, mean, num_epochs, learning_rate, temperature):
    """Plain MAP training with a prior that stays."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    num_data = sum(len(x) for x, _ in batches)
    likelihood = likelihoods.Gaussian(noise_std=0.5)
    for _ in range(num_epochs):
        for x, y in batches:
            optimizer.zero_grad()
            penalty = sum(((p - mean).square() * precision).sum() for p in net.parameters())
            loss = likelihood.nll(net(x), y).mean() + temperature * penalty / (2 * num_data)
            loss.backward()
            optimizer.step()
    return dict(net.named_parameters())


def test_training_is_maximum_a_posteriori_with_weight_decay():
    net = network().double()
    batches = [(x.double(), y.double()) for x, y in data()]
    expected = by_hand(net, batches, 3.0, 0.1, 6, 1e-2, 0.5)
    result = laplace.online(
        Model.from_module(net),
        batches,
        **OPTIONS,
        learning_rate=1e-2,
        prior_precision=3.0,
        prior_mean=0.1,
        temperature=0.5,
        burn_in=6,
    )
    for name, leaf in result.params.items():
        torch.testing.assert_close(leaf, expected[name].detach())
        torch.testing.assert_close(result.state.mean[name], leaf)
    assert result.history.epoch.tolist() == [6]
    assert result.noise_std is None


def test_one_step_on_the_prior_is_adam_on_its_logarithm():
    result = laplace.online(
        Model.from_module(network()),
        data(),
        **{**OPTIONS, "num_epochs": 1},
        prior="scalar",
        num_prior_steps=1,
        prior_learning_rate=0.3,
    )
    # Adam's first step is its learning rate, uphill.
    p = torch.ones((), requires_grad=True)
    value = laplace.log_marginal_likelihood(result.state, prior_precision=p)
    sign = torch.autograd.grad(value, p)[0].sign().item()
    assert result.prior_precision.item() == pytest.approx(math.exp(0.3 * sign), rel=1e-4)


def test_the_module_and_the_random_state_stay_and_the_key_decides():
    net = network(nn.BatchNorm1d(8), nn.Dropout(0.3))
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    model = Model.from_module(net)
    # Optimizers, callbacks: every step and every epoch is seen once.
    epochs = []
    results = [
        laplace.online(
            model,
            data(),
            **{**OPTIONS, "key": key},
            interval=3,
            optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.01),
            callback=lambda epoch, info: epochs.append((epoch, info)),
        )
        for key in (0, 0, 1)
    ]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), random_state)
    first, same, other = (trees.ravel(result.params) for result in results)
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert [epoch for epoch, _ in epochs] == [1, 2, 3, 4, 5, 6] * 3
    known = [bool(info.log_marginal_likelihood.isfinite()) for _, info in epochs[:6]]
    assert known == [False, False, True, False, False, True]
    assert all(info.loss.isfinite() for _, info in epochs)
    # Batch norm has seen 12 batches; its statistics are in the result.
    constants = results[0].constants
    assert int(constants["2.num_batches_tracked"]) == 12
    assert not torch.equal(constants["2.running_mean"], before["2.running_mean"])
    assert not any(leaf.requires_grad for leaf in trees.tensor_leaves(results[0]))
    # The curvature is that of the network as it is returned.
    loss = sum(
        OPTIONS["likelihood"].nll(model.apply(results[0].params, x, constants), y).sum()
        for x, y in data()
    )
    torch.testing.assert_close(results[0].state.loss, loss)


@pytest.mark.parametrize("prior", ["scalar", "per_tensor", "per_element"])
@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_every_kind_of_prior_is_learnt(prior, structure):
    result = laplace.online(
        Model.from_module(network()),
        data(),
        **OPTIONS,
        prior=prior,
        structure=structure,
        interval=3,
        per_output_noise=True,
        learn_noise=True,
    )
    assert result.noise_std.shape == (1,)
    for leaf in trees.leaves(result.prior_precision):
        assert (leaf != 1).all()
    stacked = trees.leaves(result.history.prior_precision)
    assert all(len(leaf) == 2 for leaf in stacked)
    laplace.posterior(result.state, prior_precision=result.prior_precision)


@pytest.mark.parametrize(
    "sampled", [{"curvature": "monte_carlo_fisher"}, {"curvature": "ggn", "num_samples": 2}]
)
def test_sampled_curvatures_draw_from_the_key(sampled):
    results = [
        laplace.online(Model.from_module(network()), data(), **OPTIONS, **sampled) for _ in range(2)
    ]
    torch.testing.assert_close(
        *(trees.leaves(result.prior_precision) for result in results), rtol=0, atol=0
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_epochs": 0}, ValueError, r"`num_epochs` is 0"),
        ({"interval": 0}, ValueError, r"`interval` is 0"),
        ({"num_prior_steps": 0}, ValueError, r"`num_prior_steps` is 0"),
        ({"burn_in": -1}, ValueError, r"`burn_in` is -1, expected an integer of at least 0"),
        ({"learning_rate": 0.0}, ValueError, r"`learning_rate` is 0\.0"),
        ({"prior_learning_rate": "1"}, TypeError, r"`prior_learning_rate` is a str"),
        ({"prior": "none"}, ValueError, r"`prior` is 'none'"),
        ({"prior_precision": 0.0}, ValueError, r"`prior_precision` is 0\.0"),
        ({"prior_mean": math.inf}, ValueError, r"`prior_mean` is inf"),
        ({"temperature": 0.0}, ValueError, r"`temperature` is 0\.0"),
        ({"callback": 3}, TypeError, r"`callback` is a int"),
        ({"optimizer": 3}, TypeError, r"`optimizer` gives a int, expected a function from a list"),
        ({"data": []}, ValueError, r"`data` yielded no data"),
        ({"data": iter([])}, TypeError, r"`data` is a list_iterator, which can be gone through on"),
        ({"learning_rate": 1e30}, ValueError, r"the loss is (nan|inf) at step 1 \(epoch 0\)"),
        (
            {"likelihood": likelihoods.Categorical(), "learn_noise": True},
            ValueError,
            r"`learn_noise` is True, but `likelihood` is Categorical, expected Gaussian",
        ),
    ],
    ids=lambda value: None,
)
def test_bad_options_are_named(options, error, match):
    options = {"data": data(), **OPTIONS, **options}
    with pytest.raises(error, match=match):
        laplace.online(Model.from_module(network()), **options)


def test_training_in_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="training needs gradients"):
        laplace.online(Model.from_module(network()), data(), **OPTIONS)
