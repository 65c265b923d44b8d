"""Priors, noise and temperature by the marginal likelihood and by held-out data."""

import math
import warnings

import pytest
import torch
from torch import nn

from funcbayes.core import likelihoods, trees
from funcbayes.core.model import Model
from funcbayes.curvature.blocks import Curvature, DiagonalBlock
from funcbayes.inference import laplace
from funcbayes.inference.laplace import LaplaceState

STRUCTURES = ["diagonal", "kronecker", "ekfac", "dense", "block_diagonal", "low_rank"]


def fitted(structure="dense", *, dtype=torch.float64, num_steps=300, **options):
    """A regression, trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    x = torch.randn(40, 2, dtype=dtype)
    y = torch.stack([x.sin().sum(1), (x[:, 0] * x[:, 1]).tanh()], 1)
    y = y + torch.tensor([0.05, 0.3], dtype=dtype) * torch.randn(40, 2, dtype=dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return laplace.fit(
        Model.from_module(net),
        (x, y),
        likelihood=likelihoods.Gaussian(noise_std=0.4),
        structure=structure,
        rank=12 if structure == "low_rank" else None,
        **options,
    )


def assert_maximum(state, tuned, prior, learn_noise):
    """Every step of 2 % in a logarithm lowers the evidence."""

    def evidence(precision, std):
        return laplace.log_marginal_likelihood(state, prior_precision=precision, noise_std=std)

    best = evidence(tuned.prior_precision, tuned.noise_std)
    torch.testing.assert_close(best, tuned.log_marginal_likelihood)
    for factor in (0.98, 1.02):
        if prior == "scalar":
            assert evidence(tuned.prior_precision * factor, tuned.noise_std) < best
        else:
            for name, value in tuned.prior_precision.items():
                moved = {**tuned.prior_precision, name: value * factor}
                assert evidence(moved, tuned.noise_std) < best
        if learn_noise:
            for i in range(max(1, tuned.noise_std.numel())):
                std = tuned.noise_std.clone()
                std.view(-1)[i] *= factor
                assert evidence(tuned.prior_precision, std) < best


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", ["scalar", "per_tensor"])
@pytest.mark.parametrize("noise", ["fixed", "learnt", "per_output"])
def test_tuned_options_maximise_the_evidence(structure, prior, noise):
    state = fitted(structure, per_output_noise=noise == "per_output")
    tuned = laplace.tune(state, prior=prior, learn_noise=noise != "fixed", tolerance=1e-6)
    assert tuned.converged
    assert (tuned.history.diff() > -1e-6).all()
    assert_maximum(state, tuned, prior, noise != "fixed")
    laplace.posterior(
        state,
        prior_precision=tuned.prior_precision,
        noise_std=tuned.noise_std,
        temperature=tuned.temperature,
    )


def test_noise_is_found_where_it_differs_between_outputs():
    tuned = laplace.tune(fitted("dense", per_output_noise=True), learn_noise=True)
    # 0.05 and 0.3 in the data; the first output is not fitted to its noise yet.
    small, large = tuned.noise_std.tolist()
    assert small < large / 2
    assert large == pytest.approx(0.3, rel=0.3)


@pytest.mark.parametrize("start", [1e-6, 1e6])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_start_does_not_matter(start, structure):
    state = fitted(structure)
    near, far = (laplace.tune(state, prior_precision=p, tolerance=1e-6) for p in (1.0, start))
    torch.testing.assert_close(near.prior_precision, far.prior_precision, rtol=1e-4, atol=0)
    # A contraction by a half: 14 in the logarithm, at a derivative of up to 40, is 1e-6 after 30.
    assert len(far.history) < 30


def one_entry(h, theta):
    params = torch.tensor([theta], dtype=torch.float64)
    block = DiagonalBlock(torch.tensor([h], dtype=torch.float64))
    mean = {"w": params}
    return LaplaceState(
        mean, Curvature({("w",): block}), torch.tensor(1), torch.tensor(0.0).double(), ()
    )


@pytest.mark.parametrize(("h", "theta"), [(4.0, 1.5), (100.0, 0.01), (0.3, 2.0)])
@pytest.mark.parametrize("prior", ["scalar", "per_tensor", "per_element"])
def test_one_parameter_has_the_closed_form(h, theta, prior):
    tuned = laplace.tune(one_entry(h, theta), prior=prior, prior_mean=0.25, tolerance=1e-9)
    # h / (h + p) = p d² with d = θ - μ₀: p² + h p = h / d².
    square = (theta - 0.25) ** 2
    expected = (-h + math.sqrt(h**2 + 4 * h / square)) / 2
    assert trees.leaves(tuned.prior_precision)[0].item() == pytest.approx(expected, rel=1e-6)


def test_precision_of_each_element_maximises_the_evidence():
    state = fitted("dense")
    tuned = laplace.tune(state, prior="per_element", tolerance=1e-6)
    scalar = laplace.tune(state)
    assert tuned.log_marginal_likelihood > scalar.log_marginal_likelihood
    precision = trees.tree_map(lambda p: p.clone().requires_grad_(), tuned.prior_precision)
    evidence = laplace.log_marginal_likelihood(state, prior_precision=precision)
    gradients = torch.autograd.grad(evidence, trees.leaves(precision))
    for p, g in zip(trees.leaves(precision), gradients, strict=True):
        free = p < 1e10
        assert (p * g)[free].abs().max() < 2e-6


def test_parameters_at_their_prior_mean_go_to_the_limit_with_a_warning():
    state = fitted("diagonal")
    state.mean["2.bias"].zero_()
    with pytest.warns(UserWarning, match=r"`prior_precision\['2\.bias'\]` went to a limit"):
        tuned = laplace.tune(state, prior="per_tensor")
    assert tuned.prior_precision["2.bias"] == pytest.approx(1e10)
    assert tuned.converged


def test_too_few_steps_are_noticed():
    with pytest.warns(UserWarning, match=r"not stationary after 1 steps \(a derivative is"):
        tuned = laplace.tune(fitted("dense"), prior_precision=1e4, num_steps=1)
    assert not tuned.converged
    assert len(tuned.history) == 2


def test_tuning_in_float32_is_tuning_in_float64():
    single, double = (
        fitted("kronecker", dtype=d, num_steps=0) for d in (torch.float32, torch.float64)
    )
    wide = trees.tensor_map(lambda t: t.double() if t.is_floating_point() else t, single)
    torch.testing.assert_close(
        laplace.tune(single).prior_precision, laplace.tune(wide).prior_precision
    )
    assert double.loss.dtype == torch.float64


def test_the_state_stays_as_it_is():
    state = fitted("kronecker")
    before = trees.clone(state)
    laplace.tune(state, learn_noise=True)
    torch.testing.assert_close(trees.leaves(state), trees.leaves(before), rtol=0, atol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"prior": "all"}, ValueError, r"`prior` is 'all', expected one of \"scalar\", \"per_te"),
        ({"num_steps": 0}, ValueError, r"`num_steps` is 0, expected at least 1"),
        ({"tolerance": -1.0}, ValueError, r"`tolerance` is -1\.0, expected positive"),
        ({"tolerance": "1"}, TypeError, r"`tolerance` is a str, expected a number"),
        ({"prior_precision": -1.0}, ValueError, r"`prior_precision` is -1\.0"),
        ({"temperature": 0.0}, ValueError, r"`temperature` is 0\.0"),
        ({"noise_std": 0.0}, ValueError, r"`noise_std` is 0\.0"),
        ({"prior": "per_element"}, ValueError, r"a Kronecker structure takes one prior"),
    ],
    ids=lambda value: None,
)
def test_bad_options_of_tune_are_named(options, error, match):
    with pytest.raises(error, match=match):
        laplace.tune(fitted("kronecker", num_steps=0), **options)


def test_starts_that_do_not_fit_the_prior_are_named():
    state = fitted("dense", num_steps=0)
    numbers = {name: 1.0 + i for i, name in enumerate(state.mean)}
    with pytest.raises(ValueError, match=r"`prior_precision` has several values, expected one"):
        laplace.tune(state, prior_precision=numbers)
    full = trees.tree_map(torch.ones_like, state.mean)
    with pytest.raises(
        ValueError, match=r"`prior_precision\['0\.weight'\]` has shape \(6, 2\), ex"
    ):
        laplace.tune(state, prior="per_tensor", prior_precision=full)
    laplace.tune(state, prior="per_tensor", prior_precision=numbers)
    laplace.tune(state, prior="per_element", prior_precision=full)


@pytest.mark.usefixtures("unchecked")
def test_tuning_what_cannot_be_tuned():
    state = fitted("dense", num_steps=0)
    with pytest.raises(ValueError, match=r"`learn_noise` is True, but the state has no noise"):
        laplace.tune(state._replace(noise=()), learn_noise=True)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="training needs gradients"):
        laplace.tune(state)
    with pytest.raises(TypeError, match=r"`state` is a dict, expected a LaplaceState"):
        laplace.tune(state.mean)


# -- by validation -------------------------------------------------------------------------


def gap(target):
    """A stand-in for a loss on held-out data: how far the mean log variance is from a target."""

    def nll(posterior):
        parts = [v.log().flatten() for v in trees.leaves(posterior.variance)]
        return (torch.cat(parts).mean() - target).square()

    return nll


def test_the_grid_finds_the_best_of_its_numbers():
    state = fitted("kronecker")
    target = torch.cat(
        [v.log().flatten() for v in laplace.posterior(state, prior_precision=3.0).variance.values()]
    ).mean()
    grid = [100.0, 0.1, 3.0, 1.0]
    for numbers in (grid, torch.tensor(grid)):
        tuned = laplace.tune_by_validation(state, gap(target), prior_precisions=numbers)
        assert tuned.prior_precision.item() == pytest.approx(3.0)
        assert tuned.history.shape == (4,)
        assert tuned.nll == tuned.history.min()
        assert tuned.nll.item() == pytest.approx(0, abs=1e-10)
    plain = laplace.tune_by_validation(state, lambda p: float(gap(target)(p)))
    assert plain.prior_precision.item() == pytest.approx(10**0.5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_gradient_finds_what_the_grid_has_no_number_for(structure):
    state = fitted(structure)
    options = {"temperature": 0.7, "noise_std": 0.3}
    best = laplace.posterior(state, prior_precision=3.3, **options)
    target = torch.cat([v.log().flatten() for v in best.variance.values()]).mean()
    tuned = laplace.tune_by_validation(
        state, gap(target), method="gradient", num_steps=200, **options
    )
    torch.testing.assert_close(
        tuned.prior_precision, torch.tensor(3.3, dtype=torch.float64), rtol=0.01, atol=0
    )
    assert tuned.nll == tuned.history.min()
    assert (tuned.noise_std, tuned.temperature) == (0.3, 0.7)


def test_the_gradient_learns_temperatures_and_precisions_of_tensors():
    state = fitted("dense")

    def nll(posterior):
        wanted = zip(posterior.variance.values(), (0.01, 0.02, 0.03, 0.04), strict=True)
        return torch.stack([(v.mean() / w).log().square() for v, w in wanted]).sum()

    tuned = laplace.tune_by_validation(
        state, nll, method="gradient", prior="per_tensor", learn_temperature=True, num_steps=300
    )
    assert tuned.nll < 0.01 * tuned.history[0]
    found = laplace.posterior(
        state, prior_precision=tuned.prior_precision, temperature=tuned.temperature
    )
    torch.testing.assert_close(nll(found), tuned.nll)


def test_the_best_at_an_end_of_the_grid_is_a_warning():
    state = fitted("diagonal", num_steps=0)
    with pytest.warns(UserWarning, match=r"best prior precision is 2, at an end .* lie above"):
        laplace.tune_by_validation(state, gap(-1e6), prior_precisions=[0.5, 1.0, 2.0])
    with pytest.warns(UserWarning, match=r"best prior precision is 0\.5, at an end .* lie below"):
        laplace.tune_by_validation(state, gap(1e6), prior_precisions=[0.5, 1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace.tune_by_validation(state, gap(0.0), prior_precisions=[1.0])


def test_values_that_are_not_finite_are_left_out():
    state = fitted("diagonal", num_steps=0)
    values = iter([math.nan, 3.0, 1.0, 2.0])
    with pytest.warns(UserWarning, match=r"`nll` is not finite for 1 of 4 prior precisions"):
        tuned = laplace.tune_by_validation(
            state, lambda p: next(values), prior_precisions=[1.0, 2.0, 3.0, 4.0]
        )
    assert tuned.prior_precision == 3.0
    with pytest.raises(ValueError, match=r"`nll` is not finite for any prior precision from 1 to"):
        laplace.tune_by_validation(state, lambda p: math.nan, prior_precisions=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"`nll` is nan at the start"):
        laplace.tune_by_validation(
            state, lambda p: p.std["2.bias"].sum() * math.nan, method="gradient"
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"nll": 3.0}, TypeError, r"`nll` is a float, expected a function of a posterior"),
        ({"nll": lambda p: "1"}, TypeError, r"`nll` gives a str, expected a number"),
        ({"nll": lambda p: torch.ones(3)}, TypeError, r"a Tensor of shape \(3,\) and dtype"),
        ({"method": "line"}, ValueError, r"`method` is 'line', expected one of \"grid\""),
        ({"prior": "per_tensor"}, ValueError, r"`prior` is 'per_tensor', which a grid"),
        ({"learn_temperature": True}, ValueError, r"`learn_temperature` is True, which a grid"),
        ({"prior_precisions": []}, ValueError, r"`prior_precisions` is empty"),
        ({"prior_precisions": [1.0, 0.0]}, ValueError, r"`prior_precisions` is 0\.0, expected pos"),
        ({"prior_precisions": 1.0}, TypeError, r"`prior_precisions` is a float, expected a list"),
        (
            {"prior_precisions": [1.0], "method": "gradient"},
            ValueError,
            r"`prior_precisions` is a grid, expected None",
        ),
        (
            {"nll": lambda p: 1.0, "method": "gradient"},
            ValueError,
            r"`nll` has no gradient, expected a tensor that is differentiable",
        ),
        ({"temperature": -1.0}, ValueError, r"`temperature` is -1\.0"),
        ({"noise_std": -1.0}, ValueError, r"`noise_std` is -1\.0"),
        ({"method": "gradient", "num_steps": 0}, ValueError, r"`num_steps` is 0"),
        ({"method": "gradient", "learning_rate": 0}, ValueError, r"`learning_rate` is 0\.0"),
    ],
    ids=lambda value: None,
)
def test_bad_options_of_validation_are_named(options, error, match):
    options = {"nll": gap(0.0), **options}
    with pytest.raises(error, match=match):
        laplace.tune_by_validation(fitted("diagonal", num_steps=0), **options)
