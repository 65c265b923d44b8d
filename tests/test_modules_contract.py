"""The published contract of the classes, sentence by sentence."""

import copy
import inspect
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes.core import random
from tests.snapshots import assert_unchanged, snapshot

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0])
METHODS = ("MCDropout", "DeepEnsemble", "SWAG", "LaplaceApproximation", "VariationalBayesNN")
each_method = pytest.mark.parametrize("name", METHODS)
drawing = pytest.mark.parametrize("name", [m for m in METHODS if m != "DeepEnsemble"])


def network(outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, outputs))


def fitted(name: str, outputs: int = 2, num_samples: int = 5) -> Any:
    torch.manual_seed(0)
    net = network(outputs)
    if name == "MCDropout":
        return fb.MCDropout(net, num_samples)
    if name == "DeepEnsemble":
        return fb.DeepEnsemble(lambda: network(outputs), num_samples)
    if name == "VariationalBayesNN":
        return fb.VariationalBayesNN(3, [8], outputs, num_samples=num_samples)
    if name == "SWAG":
        method = fb.SWAG(net, num_samples)
        for _ in range(3):
            other = copy.deepcopy(net)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            method.collect_model(other)
        return method
    method = fb.LaplaceApproximation(net, "regression", num_samples=num_samples)
    method.fit([(X, torch.zeros(6, outputs))])
    return method


# -- common ------------------------------------------------------------------------------------


@each_method
def test_predict_returns_mean_unbiased_variance_and_samples(name):
    method = fitted(name)
    assert isinstance(method, fb.BaseBayesianMethod)
    mean, variance, samples = method.predict(X, return_samples=True, key=1)
    assert samples.shape == (5, 6, 2)
    torch.testing.assert_close(mean, samples.mean(0))
    torch.testing.assert_close(variance, samples.var(0, correction=1))
    pair = method.predict(X, key=1)
    assert len(pair) == 2
    torch.testing.assert_close(pair[0], mean)
    torch.testing.assert_close(pair[1], variance)


def test_the_base_class_is_an_abstract_module():
    assert issubclass(fb.BaseBayesianMethod, nn.Module)
    with pytest.raises(TypeError, match="abstract"):
        fb.BaseBayesianMethod()

    class Own(fb.BaseBayesianMethod):
        def predict(self, x, return_samples=False, **kwargs):
            return x, torch.zeros_like(x)

    assert Own().predict(X)[0] is X


@pytest.mark.parametrize(
    ("shape", "softmax"), [((6, 2), True), ((6, 1), False), ((6, 2, 3), False), ((6,), False)]
)
def test_normalize_output_is_softmax_of_wide_matrices_only(shape, softmax):
    class Reshape(nn.Module):
        def forward(self, x):
            return x.reshape(shape)

    size = math.prod(shape) // 6
    net = nn.Sequential(nn.Linear(3, size), nn.Dropout(0.3), Reshape())
    method = fb.MCDropout(net, dropout_rate=None)
    raw = method.predict(X, return_samples=True, normalize_output=False, key=3)[2]
    normalised = method.predict(X, return_samples=True, key=3)[2]
    assert raw.shape == (20, *shape)
    torch.testing.assert_close(normalised, raw.softmax(-1) if softmax else raw)


@each_method
def test_predict_computes_no_gradients(name):
    method = fitted(name)
    x = X.clone().requires_grad_()
    for part in method.predict(x, return_samples=True):
        assert not part.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in method.parameters())


@drawing
def test_a_key_fixes_the_samples_and_leaves_the_global_generator(name):
    method = fitted(name)
    before = snapshot(method)
    first = method.predict(X, return_samples=True, key=7)[2]
    assert_unchanged(method, before)
    torch.testing.assert_close(method.predict(X, True, key=7)[2], first)
    other = method.predict(X, True, key=fb.random.key(8))[2]
    assert not torch.equal(other, first)


@drawing
def test_without_a_key_manual_seed_governs_the_samples(name):
    method = fitted(name)
    torch.manual_seed(5)
    first, second = method.predict(X)[0], method.predict(X)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    torch.testing.assert_close(method.predict(X)[0], first)


@drawing
def test_samples_do_not_depend_on_their_number_or_the_chunks(name):
    method = fitted(name)
    many = method.predict(X, True, key=2, num_samples=7)[2]
    few = method.predict(X, True, key=2, num_samples=3, chunk_size=2)[2]
    torch.testing.assert_close(many[:3], few)
    assert many.shape[0] == 7
    with pytest.raises(ValueError, match="`num_samples` is 0, expected an integer of at least 1"):
        method.predict(X, num_samples=0)
    with pytest.raises(ValueError, match="`chunk_size` is 0"):
        method.predict(X, chunk_size=0)


def test_constructors_take_the_published_arguments_in_order():
    published = {
        fb.MCDropout: {"model": ..., "num_samples": 20, "dropout_rate": 0.1},
        fb.DeepEnsemble: {"model_fn": ..., "num_models": 5},
        fb.SWAG: {"model": ..., "num_samples": 20, "var_clamp": 1e-6},
        fb.LaplaceApproximation: {
            "model": ...,
            "likelihood": "classification",
            "prior_precision": 1.0,
            "num_samples": 20,
        },
        fb.VariationalBayesNN: {
            "in_features": ...,
            "hidden_sizes": ...,
            "out_features": ...,
            "prior_std": 1.0,
            "num_samples": 20,
        },
        fb.GaussianLinear: {"in_features": ..., "out_features": ..., "prior_std": 1.0},
    }
    for cls, arguments in published.items():
        found = {
            name: ... if p.default is p.empty else p.default
            for name, p in inspect.signature(cls).parameters.items()
            if p.kind is not p.KEYWORD_ONLY
        }
        assert list(found.items()) == list(arguments.items()), cls


# -- MCDropout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_dropout_rate_outside_0_1_is_refused(rate):
    with pytest.raises(ValueError, match=r"`dropout_rate` is .*, expected a number in \[0, 1\)"):
        fb.MCDropout(network(), dropout_rate=rate)


def test_none_keeps_each_layers_rate_and_a_number_overrides_all():
    net = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.0))
    ones = torch.ones(500, 40)

    def kept(rate):
        method = fb.MCDropout(net, num_samples=1, dropout_rate=rate)
        samples = method.predict(ones, True, normalize_output=False, key=0)[2]
        return (samples != 0).double().mean().item()

    # 20 000 entries: standard error at most 0.004.
    assert abs(kept(None) - 0.5) < 0.02
    assert abs(kept(0.1) - 0.9**2) < 0.02
    assert [m.p for m in net if isinstance(m, nn.Dropout)] == [0.5, 0.0]


def test_a_model_without_dropout_warns():
    with pytest.warns(UserWarning, match="all samples will be identical and the variance zero"):
        method = fb.MCDropout(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    with pytest.warns(UserWarning, match="all samples are identical"):
        _, variance = method.predict(X)
    torch.testing.assert_close(variance, torch.zeros(6, 2), rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="no dropout in the model"):
        fb.MCDropout(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)), dropout_rate=None)


def helper(x):
    return helped(x)


def helped(x):
    return F.dropout(x, 0.5)


class Indirect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.through(x)

    def through(self, x):
        return helper(self.linear(x))


class Mentioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 2), nn.Identity()

    def forward(self, x):
        return self.dropout(self.linear(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.relu(self.linear(x))


def test_dropout_that_only_code_names_is_left_to_the_forward_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = fb.MCDropout(Indirect(), dropout_rate=None)
        assert method.predict(X, normalize_output=False)[1].min() > 0
        method = fb.MCDropout(Mentioned())
    with pytest.warns(UserWarning, match="all samples are identical"):
        method.predict(X)
    with pytest.warns(UserWarning, match="no dropout in the model"):
        fb.MCDropout(Plain())


def test_forward_is_one_stochastic_pass_in_either_mode_and_differentiable():
    method = fb.MCDropout(network(), dropout_rate=0.4)
    for mode in (method.train, method.eval):
        mode()
        torch.manual_seed(0)
        first, second = method(X), method(X)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        torch.testing.assert_close(method(X), first, rtol=0, atol=0)
    first.sum().backward()
    assert method.model[0].weight.grad is not None
    samples = method.predict(X, True, normalize_output=False, num_samples=100, key=0)[2]
    torch.manual_seed(1)
    passes = torch.stack([method(X).detach() for _ in range(100)])
    # Two means of 100 draws each.
    z = (samples.mean(0) - passes.mean(0)) / ((samples.var(0) + passes.var(0)) / 100).sqrt()
    assert z.abs().max() < 5


def test_entropy_and_mutual_information_are_those_of_the_samples():
    method = fb.MCDropout(network(3), dropout_rate=0.5)
    samples = method.predict(X, True, key=4)[2].double()
    total = torch.special.entr(samples.mean(0)).sum(-1)
    expected = torch.special.entr(samples).sum(-1).mean(0)
    entropy = method.predict_entropy(X, key=4)
    information = method.predict_mutual_information(X, key=4)
    assert entropy.shape == information.shape == (6,)
    torch.testing.assert_close(entropy.double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(information.double(), total - expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="not probabilities over the last axis"):
        method.predict_entropy(X, normalize_output=False)
    with pytest.raises(ValueError, match="expected class logits"):
        fb.MCDropout(network(1)).predict_mutual_information(X)


def test_attributes_of_mc_dropout():
    net = network()
    method = fb.MCDropout(net, 7, 0.3)
    assert method.model is net
    assert (method.num_samples, method.dropout_rate) == (7, 0.3)
    assert fb.MCDropout(net).num_samples == 20
    method.per = "column"
    with pytest.raises(ValueError, match="`per` is 'column', expected 'row' or 'batch'"):
        method.predict(X)


# -- DeepEnsemble ------------------------------------------------------------------------------


def test_bad_constructor_arguments_of_an_ensemble():
    with pytest.raises(TypeError, match="`model_fn` must be callable"):
        fb.DeepEnsemble(network())
    with pytest.raises(TypeError, match="model_fn"):
        fb.DeepEnsemble("network")
    with pytest.raises(ValueError, match="`num_models` is 0"):
        fb.DeepEnsemble(network, 0)
    with pytest.raises(TypeError, match=r"is a int, expected a torch\.nn\.Module"):
        fb.DeepEnsemble(lambda: 3)
    shared = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="share all of their parameters"):
        fb.DeepEnsemble(lambda: nn.Sequential(shared), 2)


def test_predictions_see_the_members_current_weights():
    ensemble = fb.DeepEnsemble(network, 3)
    assert isinstance(ensemble.models, nn.ModuleList)
    for _ in range(2):
        samples = ensemble.predict(X, True)[2]
        by_hand = [copy.deepcopy(m).eval()(X).softmax(-1) for m in ensemble.models]
        torch.testing.assert_close(samples, torch.stack(by_hand).detach())
        with torch.no_grad():
            ensemble.models[1][0].weight.data.mul_(2)  # not even a version counter moves


def test_forward_of_an_ensemble():
    ensemble = fb.DeepEnsemble(network, 3).eval()
    outputs = torch.stack([member(X) for member in ensemble.models])
    torch.testing.assert_close(ensemble(X), outputs.mean(0))
    torch.testing.assert_close(ensemble(X, model_idx=1), outputs[1])
    torch.testing.assert_close(ensemble(X, 2), outputs[2])
    ensemble(X).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())


def test_return_all_is_a_deprecated_alias():
    ensemble = fb.DeepEnsemble(network, 3)
    with pytest.warns(DeprecationWarning, match="`return_all` is deprecated"):
        _, _, samples = ensemble.predict(X, return_all=True)
    torch.testing.assert_close(samples, ensemble.predict(X, return_samples=True)[2])


def test_diversity_is_the_mean_variance():
    ensemble = fb.DeepEnsemble(network, 3)
    torch.testing.assert_close(ensemble.diversity(X), ensemble.predict(X)[1].mean(-1))


class Activated(nn.Module):
    def __init__(self, activation) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(3, 2), activation

    def forward(self, x):
        return self.activation(self.linear(x))


@pytest.mark.parametrize(
    "members",
    [
        [network(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), nn.Linear(3, 2)],
        # One class and the same shapes, but other functions.
        [Activated(torch.tanh), Activated(torch.relu), Activated(torch.sigmoid)],
        [nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(slope)) for slope in (0.0, 0.5, 1.0)],
    ],
    ids=["layers", "attribute", "option"],
)
def test_members_that_differ_are_evaluated_one_by_one(members):
    ensemble = fb.DeepEnsemble(iter(members).__next__, 3)
    by_hand = torch.stack([copy.deepcopy(m).eval()(X).softmax(-1) for m in members]).detach()
    mean, variance, samples = ensemble.predict(X, True)
    torch.testing.assert_close(samples, by_hand)
    torch.testing.assert_close(variance, by_hand.var(0))
    torch.testing.assert_close(mean, by_hand.mean(0))
    drawn = ensemble.predict(X, True, num_samples=6, key=0)[2]
    torch.testing.assert_close(drawn.mean(0), mean)  # each twice
    torch.testing.assert_close(ensemble.predict(X, True, num_samples=6, key=0)[2], drawn)


def test_a_shared_frozen_trunk_is_fine():
    trunk = nn.Linear(3, 8).requires_grad_(False)
    ensemble = fb.DeepEnsemble(lambda: nn.Sequential(trunk, nn.Tanh(), nn.Linear(8, 2)), 3)
    by_hand = torch.stack([m(X).softmax(-1) for m in ensemble.models]).detach()
    torch.testing.assert_close(ensemble.predict(X, True)[2], by_hand)


def loader(batch_size: int = 3) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


def test_train_member_trains_one_member_in_place_and_keeps_its_modes():
    torch.manual_seed(0)
    ensemble = fb.DeepEnsemble(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 2)
    ensemble.eval()
    by_hand = copy.deepcopy(ensemble.models[0]).train()
    other = snapshot(ensemble.models[1])
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (ensemble.models[0], by_hand)]
    result = ensemble.train_member(
        0, loader(), optimizers[0], nn.CrossEntropyLoss(), num_epochs=3, device="cpu"
    )
    assert result is None
    for _ in range(3):
        for x, y in loader():
            optimizers[1].zero_grad()
            F.cross_entropy(by_hand(x), y).backward()
            optimizers[1].step()
    trained = ensemble.models[0].state_dict()
    torch.testing.assert_close(dict(trained), dict(by_hand.state_dict()), rtol=0, atol=0)
    assert not any(m.training for m in ensemble.models[0].modules())
    other["generator"] = torch.get_rng_state()  # the loader draws from it
    assert_unchanged(ensemble.models[1], other)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "`train_loader` yielded no data"),
        ([(X, Y), (X * math.nan, Y)], "the loss is nan in epoch 0, batch 1"),
    ],
)
def test_training_that_fails_leaves_the_member_as_it_was(data, message):
    ensemble = fb.DeepEnsemble(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 2)
    member = ensemble.models[0]
    before, modes = copy.deepcopy(member.state_dict()), [m.training for m in member.modules()]
    optimizer = torch.optim.Adam(member.parameters())
    with pytest.raises(ValueError, match=message):
        ensemble.train_member(0, data, optimizer, nn.CrossEntropyLoss(), device="cpu")
    torch.testing.assert_close(dict(member.state_dict()), dict(before), rtol=0, atol=0)
    assert [m.training for m in member.modules()] == modes
    assert not optimizer.state_dict()["state"]
    with pytest.raises(ValueError, match=r"is not finite|yielded no data"):
        ensemble.train_all(data, torch.optim.Adam, device="cpu")
    torch.testing.assert_close(dict(member.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("by", ["criterion", "likelihood"])
def test_train_all_equals_training_the_members_one_by_one(by):
    torch.manual_seed(0)
    ensemble = fb.DeepEnsemble(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), 3
    )
    alone = copy.deepcopy(ensemble)
    addresses = [p.data_ptr() for p in ensemble.parameters()]
    criterion = nn.CrossEntropyLoss() if by == "criterion" else None
    steps = []
    ensemble.train_all(
        loader(),
        lambda leaves: torch.optim.SGD(leaves, lr=0.2, momentum=0.9),
        criterion,
        num_epochs=4,
        device="cpu",
        callback=lambda step, losses: steps.append((step, tuple(losses.shape))),
    )
    for i, member in enumerate(alone.models):
        optimizer = torch.optim.SGD(member.parameters(), lr=0.2, momentum=0.9)
        alone.train_member(i, loader(), optimizer, nn.CrossEntropyLoss(), 4, "cpu")
    torch.testing.assert_close(dict(ensemble.state_dict()), dict(alone.state_dict()))
    assert [p.data_ptr() for p in ensemble.parameters()] == addresses
    assert steps == [(i, (3,)) for i in range(1, 9)]


def test_train_all_by_regression_and_on_resamples():
    torch.manual_seed(0)
    ensemble = fb.DeepEnsemble(lambda: nn.Linear(3, 1), 3)
    with torch.no_grad():
        for member in ensemble.models:
            member.load_state_dict(ensemble.models[0].state_dict())
    targets = X.sum(1)
    adam = torch.optim.Adam
    options: Any = {"num_epochs": 3, "likelihood": "regression", "key": 0, "device": "cpu"}
    ensemble.train_all([(X, targets)], adam, **options)
    assert ensemble.predict(X)[1].max() < 1e-10  # one start and one batch: one solution
    ensemble.train_all([(X, targets)], adam, bootstrap=True, **options)
    assert ensemble.predict(X)[1].min() > 0
    with pytest.raises(ValueError, match="`likelihood` is 'regresion'"):
        ensemble.train_all([(X, targets)], adam, likelihood="regresion", device="cpu")
    with pytest.raises(ValueError, match=r"`criterion` gives a tensor of shape \(6,\)"):
        ensemble.train_all(
            [(X, targets[:, None])], adam, lambda f, y: (f - y).square().sum(1), device="cpu"
        )


# -- SWAG --------------------------------------------------------------------------------------


def iterates(net: nn.Module, num: int, scale: float = 0.3) -> list[nn.Module]:
    nets = [copy.deepcopy(net) for _ in range(num)]
    with torch.no_grad():
        for other in nets:
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return nets


def test_moments_and_attributes_of_swag():
    torch.manual_seed(0)
    net = network()
    method = fb.SWAG(net)
    assert (method.n_models, method.num_samples, method.var_clamp) == (0, 20, 1e-6)
    assert list(method.mean) == list(method.sq_mean) == [n for n, _ in net.named_parameters()]
    nets = iterates(net, 4)
    for i, other in enumerate(nets):
        method.collect_model(other)
        assert method.n_models == i + 1
    for name in method.mean:
        stack = torch.stack([dict(other.named_parameters())[name].detach() for other in nets])
        torch.testing.assert_close(method.mean[name], stack.mean(0))
        torch.testing.assert_close(method.sq_mean[name], stack.square().mean(0))
    training_on = {name: t.clone() for name, t in method.mean.items()}
    with torch.no_grad():
        nets[-1][0].weight.add_(1)
    torch.testing.assert_close(method.mean, training_on, rtol=0, atol=0)


def test_swag_predicts_with_the_diagonal_at_full_scale():
    method = fitted("SWAG")
    variance = {n: (method.sq_mean[n] - m.square()).clamp_min(1e-6) for n, m in method.mean.items()}
    torch.manual_seed(0)
    draws = [method.sample_parameters() for _ in range(100)]
    for name, mean in method.mean.items():
        z = (torch.stack([d[name] for d in draws]) - mean) / variance[name].sqrt()
        # 100 draws each: mean ± 1/10, variance ± √(2/100); up to 24 entries.
        assert z.mean(0).abs().max() < 5 / 10
        assert (z.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / 100)

    # predict draws with the same keys as sample_parameters.
    one = method.sample_parameters(key=3)
    outputs = functional_call(copy.deepcopy(method.model).eval(), one, (X,)).detach()
    samples = method.predict(X, True, key=3, normalize_output=False)[2]
    torch.testing.assert_close(samples[0], outputs)


def test_low_rank_swag_draws_along_the_deviations():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    method = fb.SWAG(net, max_rank=3, var_clamp=1e-12)
    nets = iterates(net, 5)
    state = fb.swag.init(fb.Model.from_module(net).params, max_rank=3)
    for other in nets:
        method.collect_model(other)
        state = fb.swag.update(state, dict(other.named_parameters()))
    expected = fb.swag.posterior(state, var_clamp=1e-12).sample(0, 1)
    draw = method.sample_parameters(key=0)
    for name in draw:
        torch.testing.assert_close(draw[name], expected[name][0])


def test_swag_before_any_collection_and_bad_collections():
    method = fb.SWAG(network())
    with pytest.raises(fb.NotFittedError, match="call `collect_model` first"):
        method.predict(X)
    assert issubclass(fb.NotFittedError, RuntimeError)
    with pytest.raises(ValueError, match=r"0.weight.* has shape \(4, 3\), expected \(8, 3\)"):
        method.collect_model(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Tanh(), nn.Linear(8, 2)))
    broken = network()
    with torch.no_grad():
        broken[0].bias[1] = math.nan
    with pytest.raises(ValueError, match=r"'0.bias'.*NaN or infinite"):
        method.collect_model(broken)
    assert method.n_models == 0


def test_parameters_are_frozen_by_the_flags_of_what_was_collected():
    net = network()
    method = fb.SWAG(net)
    net[0].requires_grad_(False)
    method.collect_model(net)
    net.requires_grad_(False)  # for deployment: says nothing about what was trained
    method.collect_model(copy.deepcopy(net))
    draws = [method.sample_parameters(key=i) for i in range(2)]
    torch.testing.assert_close(draws[0]["0.weight"], draws[1]["0.weight"], rtol=0, atol=0)
    assert not torch.equal(draws[0]["3.weight"], draws[1]["3.weight"])
    assert list(draws[0]) == list(method.mean)


def test_half_precision_networks_have_float32_moments():
    net = network().bfloat16()
    method = fb.SWAG(net)
    for _ in range(2):
        method.collect_model(net)
    assert {m.dtype for m in method.mean.values()} == {torch.float32}
    assert method.sample_parameters()["0.weight"].dtype == torch.bfloat16
    assert method.predict(X.bfloat16())[0].dtype == torch.bfloat16


# -- LaplaceApproximation ----------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_posterior_precision_is_prior_plus_gathered_squared_gradients(likelihood, scale):
    torch.manual_seed(0)
    net = network()
    targets = Y if likelihood == "classification" else torch.randn(6, 2)
    method = fb.LaplaceApproximation(net, likelihood, 2.0, data_scale=scale)
    assert method.mean is None
    assert method.posterior_precision is None
    assert method.fit(DataLoader(TensorDataset(X, targets), batch_size=4)) is None
    squares = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    twin = copy.deepcopy(net).eval()
    for x, y in zip(X, targets, strict=True):
        twin.zero_grad()
        output = twin(x[None])
        if likelihood == "classification":
            F.cross_entropy(output, y[None]).backward()
        else:
            (0.5 * (output - y).square().sum()).backward()
        for name, parameter in twin.named_parameters():
            squares[name] += parameter.grad.square()
    for name, square in squares.items():
        expected = 2.0 + (square / 6 if scale == "mean" else square)
        torch.testing.assert_close(method.posterior_precision[name], expected)
    torch.testing.assert_close(method.mean, {n: p.detach() for n, p in net.named_parameters()})


def test_laplace_draws_around_the_weights_at_fit_time():
    method = fitted("LaplaceApproximation")
    mean = {name: m.clone() for name, m in method.mean.items()}
    before = method.predict(X, True, key=0)[2]
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(1)
    torch.testing.assert_close(method.mean, mean, rtol=0, atol=0)
    torch.testing.assert_close(method.predict(X, True, key=0)[2], before)
    draw = {n: method.posterior_precision[n].rsqrt() for n in mean}
    by_hand = fb.posteriors.Diagonal(mean, draw).sample(0, 1)
    output = functional_call(
        copy.deepcopy(method.model).eval(), {n: t[0] for n, t in by_hand.items()}, (X,)
    )
    torch.testing.assert_close(before[0], output.softmax(-1).detach())


def test_laplace_before_fit_and_bad_arguments():
    method = fb.LaplaceApproximation(network())
    assert (method.likelihood, method.prior_precision, method.num_samples) == (
        "classification",
        1.0,
        20,
    )
    with pytest.raises(fb.NotFittedError, match="call `fit` first"):
        method.predict(X)
    with pytest.raises(ValueError, match=r"labels from 0 to 1, expected 0 to 0|1 logit"):
        fb.LaplaceApproximation(network(1)).fit([(X, Y)])
    method.data_scale = "total"
    with pytest.raises(ValueError, match="`data_scale` is 'total', expected 'mean'"):
        method.fit([(X, Y)])
    method.likelihood = "regresion"
    with pytest.raises(ValueError, match="`likelihood` is 'regresion'"):
        method.fit([(X, Y)])


def test_laplace_takes_the_targets_that_torchs_losses_take():
    torch.manual_seed(0)
    net = network()
    soft = F.one_hot(Y, 2).float()
    by_label, by_probability = fb.LaplaceApproximation(net), fb.LaplaceApproximation(net)
    by_label.fit([(X, Y)])
    by_probability.fit([(X, soft)])
    torch.testing.assert_close(by_label.posterior_precision, by_probability.posterior_precision)
    one = network(1)
    flat, column = (fb.LaplaceApproximation(one, "regression") for _ in range(2))
    flat.fit([(X, Y)])  # [N] integers beside [N, 1] outputs
    column.fit([(X, Y[:, None].float())])
    torch.testing.assert_close(flat.posterior_precision, column.posterior_precision)


def test_data_scale_sum_is_narrower_than_the_published_mean():
    torch.manual_seed(0)
    net = network()
    widths = []
    for scale in ("mean", "sum"):
        method = fb.LaplaceApproximation(net, data_scale=scale)
        method.fit([(X.repeat(50, 1), Y.repeat(50))])
        widths.append(method.predict(X, key=0)[1].mean())
    assert widths[1] < widths[0]


# -- VariationalBayesNN and GaussianLinear -----------------------------------------------------


def test_parameters_of_a_gaussian_layer():
    torch.manual_seed(0)
    layer = fb.GaussianLinear(300, 200, prior_std=0.3)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight_mu": (200, 300),
        "weight_rho": (200, 300),
        "bias_mu": (200,),
        "bias_rho": (200,),
    }
    for rho in (layer.weight_rho, layer.bias_rho):
        torch.testing.assert_close(F.softplus(rho), torch.full_like(rho, 0.3))
    assert not layer.bias_mu.any()
    # 60 000 draws: relative standard error of the deviation 0.3 %.
    assert abs(layer.weight_mu.std().item() / 0.3 - 1) < 0.015


def test_forward_of_a_gaussian_layer_draws_weight_and_bias():
    layer = fb.GaussianLinear(3, 2, prior_std=0.5)
    torch.manual_seed(0)
    output = layer(X)
    torch.manual_seed(0)
    weight = layer.weight_mu + F.softplus(layer.weight_rho) * torch.randn(2, 3)
    bias = layer.bias_mu + F.softplus(layer.bias_rho) * torch.randn(2)
    torch.testing.assert_close(output, F.linear(X, weight, bias))
    output.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    before = torch.get_rng_state()
    torch.testing.assert_close(layer(X, key=1), layer(X, key=1), rtol=0, atol=0)
    assert not torch.equal(layer(X, key=1), layer(X, key=2))
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_kl_of_a_gaussian_layer_is_torchs():
    layer = fb.GaussianLinear(3, 2, prior_std=0.5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    prior = torch.distributions.Normal(0.0, 0.5)
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mu, F.softplus(rho)), prior
        ).sum()
        for mu, rho in ((layer.weight_mu, layer.weight_rho), (layer.bias_mu, layer.bias_rho))
    )
    torch.testing.assert_close(layer.kl_divergence(), expected)


def test_a_variational_network_is_relu_layers():
    net = fb.VariationalBayesNN(3, [5, 4], 2, prior_std=0.7)
    assert isinstance(net.layers, nn.ModuleList)
    assert [type(layer) for layer in net.layers] == [fb.GaussianLinear] * 3
    assert [(m.in_features, m.out_features, m.prior_std) for m in net.layers] == [
        (3, 5, 0.7),
        (5, 4, 0.7),
        (4, 2, 0.7),
    ]
    torch.manual_seed(0)
    output = net(X)
    torch.manual_seed(0)
    hidden = X
    for i, layer in enumerate(net.layers):
        hidden = layer(hidden.relu() if i else hidden)
    torch.testing.assert_close(output, hidden)
    torch.testing.assert_close(net.kl_divergence(), sum(m.kl_divergence() for m in net.layers))


def test_predict_of_a_variational_network_draws_from_its_gaussians():
    torch.manual_seed(0)
    net = fb.VariationalBayesNN(3, [4], 2, prior_std=0.4)
    samples = net.predict(X, True, num_samples=800, normalize_output=False, key=0)[2]
    torch.manual_seed(1)
    passes = torch.stack([net(X) for _ in range(800)]).detach()
    z = (samples.mean(0) - passes.mean(0)) / ((samples.var(0) + passes.var(0)) / 800).sqrt()
    assert z.abs().max() < 5
    # Ratio of two variances of 800 draws with kurtosis up to about 6: ± √(2·5/800).
    assert (samples.var(0) / passes.var(0) - 1).abs().max() < 5 * math.sqrt(10 / 800)


def test_variational_loss_is_mean_cross_entropy_plus_weighted_kl():
    torch.manual_seed(0)
    net = fb.VariationalBayesNN(3, [4], 2)
    kl = net.kl_divergence()
    loss = net.variational_loss(X, Y, key=0)
    torch.manual_seed(2)
    torch.testing.assert_close(
        net.variational_loss(X, Y, key=0, kl_weight=0.5), loss - 0.5 * kl / 6
    )
    without = net.variational_loss(X, Y, key=0, kl_weight=0.0)
    torch.testing.assert_close(loss, without + kl / 6)
    torch.testing.assert_close(net.variational_loss(X, Y, key=0, num_data=500), without + kl / 500)
    # The same draws as predict: keyed alike.
    samples = net.predict(X, True, num_samples=10, normalize_output=False, key=0)[2]
    nll = torch.stack([F.cross_entropy(f, Y) for f in samples]).mean()
    torch.testing.assert_close(without.detach(), nll)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_gradients_of_the_variational_loss_are_those_of_a_loop():
    torch.manual_seed(0)
    net = fb.VariationalBayesNN(3, [4], 2).double()
    x = X.double()
    loss = net.variational_loss(x, Y, num_samples=3, key=0, kl_weight=0.3)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    # Noise of the draws, from predict's: θ = mu + std ⊙ z.
    model, posterior = net._posterior()
    draws = posterior.sample(random.as_key(0), 3)
    total = 0.3 * net.kl_divergence() / 6
    for i in range(3):
        hidden = x
        for j, layer in enumerate(net.layers):
            parts = []
            for part in ("weight", "bias"):
                mean, rho = getattr(layer, f"{part}_mu"), getattr(layer, f"{part}_rho")
                z = (draws[j][part][i] - mean.detach()) / F.softplus(rho).detach()
                parts.append(mean + F.softplus(rho) * z)
            hidden = F.linear(hidden.relu() if j else hidden, *parts)
        total = total + F.cross_entropy(hidden, Y) / 3
    expected = torch.autograd.grad(total, list(net.parameters()))
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(grads, expected)
    assert model.params is not None


def test_variational_regression_with_a_learnt_noise():
    torch.manual_seed(0)
    net = fb.VariationalBayesNN(3, [4], 1)
    noise = torch.tensor(0.5, requires_grad=True)
    y = X.sum(1)
    likelihood = fb.likelihoods.Gaussian(noise_std=noise)
    net.variational_loss(X, y, likelihood=likelihood, key=0).backward()
    assert noise.grad is not None
    unit = net.variational_loss(X, y, likelihood=fb.likelihoods.Gaussian(), key=0)
    torch.testing.assert_close(net.variational_loss(X, y, likelihood="regression", key=0), unit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"num_data": 0}, "`num_data` is 0"),
        ({"likelihood": "regresion"}, "`likelihood` is 'regresion'"),
        ({"likelihood": 3}, "`likelihood` is a int"),
        ({"kl_weight": -1.0}, "`kl_weight` is -1"),
    ],
)
def test_bad_options_of_the_variational_loss(options, message):
    with pytest.raises(ValueError, match=message):
        fb.VariationalBayesNN(3, [4], 2).variational_loss(X, Y, **options)


def test_bad_sizes_of_a_variational_network():
    for sizes in ((0, [4], 2), (3, [0], 2), (3, [4], -1)):
        with pytest.raises(ValueError, match=r"`(in|out)_features` is .*, expected an integer"):
            fb.VariationalBayesNN(*sizes)
    assert len(fb.VariationalBayesNN(3, [], 2).layers) == 1


# -- models that vmap cannot batch, and torch's defaults ---------------------------------------


# torch says so where vmap falls back to a loop of its own.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recurrent_networks_work_in_every_class(caplog):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.lstm(x)[0][:, -1])

    sequences = X[:, None].expand(-1, 5, -1)
    torch.manual_seed(0)
    net = Recurrent()
    swag, laplace = fb.SWAG(net, 3), fb.LaplaceApproximation(net, num_samples=3)
    swag.collect_model(net)
    laplace.fit([(sequences, Y)])
    for method in (swag, laplace, fb.MCDropout(net, 3), fb.DeepEnsemble(Recurrent, 3)):
        mean, variance = method.predict(sequences)
        assert mean.shape == variance.shape == (6, 2)
        assert variance.max() > 0


def test_a_tuple_is_positional_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(3, 2), nn.Dropout()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.drop(self.linear(a * b))

    torch.manual_seed(0)
    net = Two()
    laplace = fb.LaplaceApproximation(net)
    laplace.fit([((X, X), Y)])
    swag = fb.SWAG(net)
    swag.collect_model(net)
    ensemble = fb.DeepEnsemble(Two, 2)
    ensemble.train_all([((X, X), Y)], torch.optim.Adam, num_epochs=1, device="cpu")
    ensemble.train_member(
        0,
        [((X, X), Y)],
        torch.optim.Adam(ensemble.models[0].parameters()),
        nn.CrossEntropyLoss(),
        1,
        "cpu",
    )
    for method in (fb.MCDropout(net), ensemble, laplace, swag):
        assert method.predict((X, X))[0].shape == (6, 2)
    assert fb.MCDropout(net)((X, X)).shape == (6, 2)


def test_predictions_follow_every_change_of_the_network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    method = fb.MCDropout(net, num_samples=400, dropout_rate=None)
    x = torch.ones(1, 3)
    wide = method.predict(x, normalize_output=False, key=0)[1]
    net[1].p = 0.01  # an attribute
    narrow = method.predict(x, normalize_output=False, key=0)[1]
    assert (narrow < wide / 4).all()
    with torch.no_grad():
        net[2].bias.add_(5.0)  # a value
    shifted = method.predict(x, normalize_output=False, key=0)[0]
    net[2].bias.data = net[2].bias.data + 5.0  # other memory
    again = method.predict(x, normalize_output=False, key=0)[0]
    torch.testing.assert_close(again, shifted + 5.0)
    net[0].register_forward_hook(lambda module, inputs, output: output * 0)  # a hook
    hooked = method.predict(x, normalize_output=False, key=0)[0]
    torch.testing.assert_close(hooked, net[2].bias.detach()[None])
    net[2] = nn.Linear(4, 5)  # a layer
    assert method.predict(x)[0].shape == (1, 5)
    method.double()  # a dtype
    assert method.predict(x.double())[0].dtype == torch.float64


@pytest.mark.filterwarnings("ignore:MCDropout found no dropout", "ignore:no dropout was active")
def test_predictions_follow_memory_that_is_read_another_way():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))
    method = fb.MCDropout(net, num_samples=2, dropout_rate=None)
    x = torch.ones(1, 3)
    method.predict(x, normalize_output=False)
    net[0].weight.data = net[0].weight.data.t()
    found = method.predict(x, normalize_output=False)[0]
    torch.testing.assert_close(found, net(x).detach())
