"""Checkpoints of the classes: ours, those written by the original, and devices."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import funcbayes as fb

# Written by incerto 0.1.1: state dicts of its classes around `network()`, with the SWAG moments
# of five models and a Laplace fit on (inputs, targets).
PUBLISHED = torch.load(
    Path(__file__).parent / "data" / "incerto_0.1.1_checkpoints.pt", weights_only=True
)
X, Y = PUBLISHED["inputs"], PUBLISHED["targets"]
METHODS = ("MCDropout", "DeepEnsemble", "SWAG", "LaplaceApproximation", "VariationalBayesNN")
each_method = pytest.mark.parametrize("name", METHODS)
STATISTICS = {
    "SWAG": ("_swag_mean", "_swag_sq_mean", "_swag_n_models"),
    "LaplaceApproximation": (
        "_laplace_mean",
        "_laplace_posterior_precision",
        "_laplace_likelihood",
        "_laplace_prior_precision",
        "_laplace_num_samples",
    ),
}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2)
    )


def make(name: str, **options: Any) -> Any:
    if name == "DeepEnsemble":
        return fb.DeepEnsemble(network, 2)
    if name == "VariationalBayesNN":
        return fb.VariationalBayesNN(3, [4], 2, prior_std=0.5)
    if name == "MCDropout":
        return fb.MCDropout(network(), dropout_rate=None)
    return getattr(fb, name)(network(), **options)


def fitted(name: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    method = make(name, **options)
    if name == "SWAG":
        for _ in range(4):
            other = copy.deepcopy(method.model)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            method.collect_model(other)
    if name == "LaplaceApproximation":
        method.fit([(X, Y)])
    return method


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(method: Any) -> list[torch.Tensor]:
    """Every tensor of a method: parameters, buffers and statistics."""
    found = [*method.parameters(), *method.buffers()]
    if isinstance(method, fb.SWAG):
        _, *moments = method._state
        return [*found, *(t for tree in moments for t in tree.values())]
    if isinstance(method, fb.LaplaceApproximation):
        return [*found, *method.mean.values(), *method.posterior_precision.values()]
    return found


def assert_same(state: Any, other: Any) -> None:
    """Equal in every entry, to the bit."""
    assert list(state) == list(other)
    for key, value in state.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], rtol=0, atol=0)
        else:
            assert value == other[key]


# -- ours --------------------------------------------------------------------------------------


@each_method
def test_checkpoints_round_trip_through_files(name):
    method, other = fitted(name), make(name)
    result = other.load_state_dict(through_file(method.state_dict()), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    first, second = (m.predict(X, True, key=3)[2] for m in (method, other))
    torch.testing.assert_close(first, second)


@each_method
def test_methods_that_are_not_fitted_round_trip_too(name):
    other = fitted(name)
    other.load_state_dict(through_file(make(name).state_dict()))
    if name in STATISTICS:
        with pytest.raises(fb.NotFittedError):
            other.predict(X)


@each_method
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_a_module_that_contains_the_method(name, assign):
    class Outer(nn.Module):
        def __init__(self, method):
            super().__init__()
            self.parts = nn.ModuleDict({"method": method, "other": nn.Linear(2, 2)})

    outer, copied = Outer(fitted(name)), Outer(make(name))
    into: dict[str, Any] = {}
    state = outer.state_dict(destination=into, prefix="net.", keep_vars=True)
    assert state is into
    if name in STATISTICS:
        assert "net.parts.method." + STATISTICS[name][0] in state
    assert any(isinstance(value, nn.Parameter) for value in state.values())

    copied.load_state_dict(through_file(outer.state_dict()), strict=True, assign=assign)
    first, second = (o.parts["method"].predict(X, True, key=3)[2] for o in (outer, copied))
    torch.testing.assert_close(first, second)

    if name in STATISTICS:
        state = outer.state_dict()
        del state["parts.method." + STATISTICS[name][0]]
        with pytest.raises(RuntimeError, match=r"parts\.method\._\w+_mean"):
            copied.load_state_dict(state)
        assert copied.load_state_dict(state, strict=False).missing_keys == [
            "parts.method." + STATISTICS[name][0]
        ]
        second = copied.parts["method"].predict(X, True, key=3)[2]
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", STATISTICS)
def test_state_dicts_have_the_published_keys(name):
    method = fitted(name)
    state = method.state_dict()
    weights = ["model." + key for key in method.model.state_dict()]
    ours = ["_swag_moments"] if name == "SWAG" else []
    assert set(state) == {*STATISTICS[name], *ours, *weights}
    assert set(PUBLISHED["swag" if name == "SWAG" else "laplace"]) == {
        *STATISTICS[name],
        *weights,
    }


@pytest.mark.parametrize("name", STATISTICS)
def test_checkpoints_are_copies(name):
    method = fitted(name)
    state = method.state_dict()
    kept = copy.deepcopy({key: state[key] for key in STATISTICS[name]})
    expected = method.predict(X, True, key=0)[2]
    # Parameters and buffers in a state dict are aliases, as for every module of torch.
    own = len([*method.parameters(), *method.buffers()])
    for tensor in tensors(method)[own:]:
        tensor.add_(1)
    if name == "SWAG":
        method.collect_model(network())
    else:
        method.fit([(X, 1 - Y)])
    assert_same({key: state[key] for key in kept}, kept)

    other = make(name)
    other.load_state_dict(state)
    for key in STATISTICS[name][:2]:
        for tensor in state[key].values():
            tensor.fill_(7)
    for parameter in method.parameters():
        parameter.data.fill_(7)
    torch.testing.assert_close(other.predict(X, True, key=0)[2], expected)


@each_method
def test_loading_does_not_modify_the_callers_dict(name):
    state = through_file(fitted(name).state_dict())
    before = copy.deepcopy(state)
    make(name).load_state_dict(state)
    assert_same(state, before)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("SWAG", "_swag_mean", {"a": torch.ones(1)}, "`_swag_mean` has another structure"),
        ("SWAG", "_swag_n_models", -1, "`_swag_n_models` is -1"),
        ("SWAG", "_swag_n_models", "three", "'str' object cannot be interpreted"),
        ("SWAG", "model.0.weight", torch.ones(2, 2), "size mismatch for model.0.weight"),
        ("LaplaceApproximation", "_laplace_mean", 3, "`_laplace_mean` is a int, expected a dict"),
        ("LaplaceApproximation", "_laplace_mean", None, "one of `_laplace_mean` and"),
        ("LaplaceApproximation", "_laplace_likelihood", "poisson", "`likelihood` is 'poisson'"),
        ("LaplaceApproximation", "_laplace_prior_precision", 0.0, "`_laplace_prior_precision` is"),
        ("LaplaceApproximation", "_laplace_num_samples", 0, "`_laplace_num_samples` is 0"),
        ("MCDropout", "model.9.weight", torch.ones(2), "Unexpected key"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_that_does_not_fit_changes_nothing(name, key, value, message, assign):
    method, other = fitted(name), fitted(name, seed=1)
    state = other.state_dict()
    state[key] = value
    identities = [id(p) for p in method.parameters()]
    expected = method.predict(X, True, key=0)[2]
    with pytest.raises(RuntimeError, match=message):
        method.load_state_dict(state, assign=assign)
    torch.testing.assert_close(method.predict(X, True, key=0)[2], expected)
    assert [id(p) for p in method.parameters()] == identities


def test_swag_keeps_its_exact_spread_in_a_checkpoint():
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    method = fb.SWAG(net, var_clamp=1e-30)
    for _ in range(6):
        with torch.no_grad():  # of squares near 100, float32 keeps 1e-5: more than the variance
            net.weight.copy_(10 + 1e-3 * torch.randn(20, 20))
        method.collect_model(net)
    state = through_file(method.state_dict())
    other = fb.SWAG(nn.Linear(20, 20), var_clamp=1e-30)
    other.load_state_dict(state)
    draws = [m.sample_parameters(key=1) for m in (method, other)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    # Without our own entry it is a checkpoint of the original class.
    del state["_swag_moments"]
    other.load_state_dict(state, strict=True)
    assert other.n_models == 6
    torch.testing.assert_close(other.mean, method.mean, rtol=0, atol=0)


def test_frozen_parameters_and_deviations_are_in_a_checkpoint():
    method = make("SWAG", max_rank=3)
    method.model[0].requires_grad_(False)
    for _ in range(4):
        with torch.no_grad():
            method.model[4].weight.add_(torch.randn(2, 4))
        method.collect_model(method.model)
    state = through_file(method.state_dict())
    other = make("SWAG", max_rank=3)  # here all parameters require gradients
    other.load_state_dict(state)
    draws = [m.sample_parameters(key=1) for m in (method, other)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    torch.testing.assert_close(draws[1]["0.weight"], method.mean["0.weight"], rtol=0, atol=0)

    with pytest.raises(RuntimeError, match=r"deviations.*has shape \(3, "):
        make("SWAG").load_state_dict(state)
    del state["_swag_moments"]
    with pytest.raises(RuntimeError, match=r"Missing key.*_swag_moments"):
        other.load_state_dict(state)


def test_a_sum_over_data_is_noted_in_a_checkpoint():
    method, other = fitted("LaplaceApproximation", data_scale="sum"), make("LaplaceApproximation")
    assert "_laplace_data_scale" not in fitted("LaplaceApproximation").state_dict()
    other.load_state_dict(through_file(method.state_dict()))
    assert other.data_scale == "sum"
    other.load_state_dict(fitted("LaplaceApproximation").state_dict())
    assert other.data_scale == "mean"


# -- written by the original -------------------------------------------------------------------


def test_a_published_swag_checkpoint_loads():
    state = PUBLISHED["swag"]
    method = fb.SWAG(network(), var_clamp=1e-12)
    method.load_state_dict(state)
    assert method.n_models == 5
    torch.testing.assert_close(method.mean, state["_swag_mean"], rtol=0, atol=0)
    torch.testing.assert_close(method.sq_mean, state["_swag_sq_mean"])
    draws = [method.sample_parameters(key=i) for i in range(100)]
    for name, mean in state["_swag_mean"].items():
        variance = state["_swag_sq_mean"][name].double() - mean.double().square()
        std = variance.clamp_min(1e-12).sqrt()
        z = (torch.stack([d[name] for d in draws]) - mean) / std
        assert z.mean(0).abs().max() < 5 / 10
        assert (z.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / 100)
    # And collection goes on from there.
    method.collect_model(network())
    assert method.n_models == 6


def test_frozen_parameters_of_a_published_checkpoint_get_no_noise():
    net = network()
    net[0].requires_grad_(False)
    method = fb.SWAG(net)
    method.load_state_dict(PUBLISHED["swag"])
    draw = method.sample_parameters()
    torch.testing.assert_close(draw["0.weight"], method.mean["0.weight"], rtol=0, atol=0)

    state = copy.deepcopy(PUBLISHED["laplace"])
    prior_precision = state["_laplace_prior_precision"]
    for name in ("0.weight", "0.bias"):  # the original writes the prior's for frozen ones
        state["_laplace_posterior_precision"][name].fill_(prior_precision)
    laplace = fb.LaplaceApproximation(net)
    laplace.load_state_dict(state)
    assert laplace.posterior_precision["0.weight"].isinf().all()
    assert laplace.posterior_precision["4.weight"].isfinite().all()


def test_a_published_laplace_checkpoint_loads():
    state = PUBLISHED["laplace"]
    method = fb.LaplaceApproximation(network(), "regression", 9.0, 3)
    method.load_state_dict(state)
    assert method.likelihood == "classification"
    assert (method.prior_precision, method.num_samples) == (2.5, 7)
    torch.testing.assert_close(method.mean, state["_laplace_mean"], rtol=0, atol=0)
    torch.testing.assert_close(
        method.posterior_precision, state["_laplace_posterior_precision"], rtol=0, atol=0
    )
    samples = method.predict(X, True, key=0, num_samples=1)[2]
    std = {n: p.rsqrt() for n, p in state["_laplace_posterior_precision"].items()}
    draw = fb.posteriors.Diagonal(state["_laplace_mean"], std).sample(0, 1)
    output = functional_call(
        copy.deepcopy(method.model).eval(), {n: t[0] for n, t in draw.items()}, (X,)
    )
    torch.testing.assert_close(samples[0], output.softmax(-1).detach())


def test_the_published_fisher_is_ours():
    """The fixture's Laplace was fitted by the original, by a loop over data."""
    state = PUBLISHED["laplace"]
    method = make("LaplaceApproximation", prior_precision=2.5)
    method.load_state_dict(state)
    method.fit([(X, Y)])
    torch.testing.assert_close(
        method.posterior_precision, state["_laplace_posterior_precision"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MCDropout", "dropout"),
        ("DeepEnsemble", "ensemble"),
        ("VariationalBayesNN", "variational"),
    ],
)
def test_other_published_checkpoints_load(name, key):
    method = make(name)
    method.load_state_dict(PUBLISHED[key], strict=True)
    torch.testing.assert_close(dict(method.state_dict()), dict(PUBLISHED[key]), rtol=0, atol=0)
    assert method.predict(X)[0].shape == (12, 2)


# -- devices and dtypes ------------------------------------------------------------------------


@each_method
def test_double_converts_every_tensor_and_predicts_the_same(name):
    method = fitted(name)
    if name == "VariationalBayesNN":  # float64 has another stream of noise: take it away
        with torch.no_grad():
            for layer in method.layers:
                layer.weight_rho.fill_(-30)
                layer.bias_rho.fill_(-30)
    method.double()
    assert {t.dtype for t in tensors(method) if t.is_floating_point()} == {torch.float64}
    mean, variance = method.predict(X.double(), key=0)
    assert mean.dtype == variance.dtype == torch.float64
    state = through_file(method.state_dict())
    back = make(name)
    back.load_state_dict(state)
    assert {t.dtype for t in tensors(back) if t.is_floating_point()} == {torch.float32}


@each_method
def test_to_moves_every_tensor(name):
    method = nn.Sequential(fitted(name)).to("meta")[0]
    assert {t.device.type for t in tensors(method)} == {"meta"}


def test_bfloat16_keeps_the_moments_in_float32():
    method = fitted("SWAG").bfloat16()
    assert {t.dtype for t in method.mean.values()} == {torch.float32}
    assert method.predict(X.bfloat16())[0].dtype == torch.bfloat16
    laplace = fitted("LaplaceApproximation").bfloat16()
    assert laplace.predict(X.bfloat16())[0].dtype == torch.bfloat16


def test_reestimated_draws_move_too_and_are_dropped_by_new_moments():
    method = fitted("SWAG")
    method.reestimate_batch_norm([(X, Y)], key=0, num_samples=3)
    method.double()
    assert method.predict(X.double(), True)[2].dtype == torch.float64
    fixed = method.predict(X.double(), True, num_samples=3, key=1)[2]
    again = method.predict(X.double(), True, num_samples=3, key=1)[2]
    torch.testing.assert_close(fixed, again)
    method.collect_model(method.model)
    fresh = method.predict(X.double(), True, num_samples=30, key=1)[2]
    assert fresh.unique(dim=0).shape[0] == 30
    method.reestimate_batch_norm([(X.double(), Y)], key=0, num_samples=3)
    method.load_state_dict(method.state_dict())
    fresh = method.predict(X.double(), True, num_samples=30, key=1)[2]
    assert fresh.unique(dim=0).shape[0] == 30


@pytest.mark.cuda
@each_method
def test_cuda_moves_every_tensor_and_predicts(name):
    method = fitted(name).cuda()
    assert {t.device.type for t in tensors(method)} == {"cuda"}
    mean, _ = method.predict(X.cuda(), key=0)
    assert mean.device.type == "cuda"
    back = make(name)
    back.load_state_dict(method.state_dict())
    assert {t.device.type for t in tensors(back)} == {"cpu"}


@each_method
def test_methods_can_be_deep_copied(name):
    method = fitted(name)
    other = copy.deepcopy(method)
    torch.testing.assert_close(other.predict(X, True, key=0)[2], method.predict(X, True, key=0)[2])
