"""Temperature scaling: scipy and scikit-learn as references, every start, data at their limits."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

import funcbayes as fb
from funcbayes import calibration
from funcbayes.core.likelihoods import Bernoulli, Categorical, Gaussian

F64 = torch.float64
STARTS = [1e-6, 1e-3, 0.1, 1.0, 20.0, 1e4, 1e6]
fit = calibration.fit_temperature


def data(seed, *, rows=200, classes=4, samples=None, scale=3.0, noise=1.0, dtype=F64):
    """Logits that know something of the targets, and are `scale` too large."""
    gen = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=gen)
    shape = (rows, classes) if samples is None else (samples, rows, classes)
    logits = torch.nn.functional.one_hot(targets, classes) + noise * torch.randn(
        shape, generator=gen, dtype=F64
    )
    return (scale * logits).to(dtype), targets


def nll(outputs, targets, temperature):
    """Of the mean probabilities over the samples, by scipy."""
    z = outputs.double().numpy() / temperature
    z = z if z.ndim == 3 else z[None]
    log_probs = log_softmax(z, axis=-1)[:, np.arange(len(targets)), targets.numpy()]
    return -(logsumexp(log_probs, axis=0) - math.log(len(z))).sum()


def slope(log_t, outputs, targets):
    """d nll / d log T of one sample: −Σ (E z − z_y)/T."""
    z = outputs.double().numpy() / math.exp(log_t)
    own = z[np.arange(len(targets)), targets.numpy()]
    return (own - (softmax(z, axis=-1) * z).sum(-1)).sum()


def by_brentq(outputs, targets):
    low, high = math.log(1e-6), math.log(1e6)
    return math.exp(brentq(slope, low, high, args=(outputs, targets), xtol=1e-14, rtol=1e-15))


# One network


@given(
    st.integers(0, 2**32),
    st.sampled_from([2, 3, 10]),
    st.sampled_from([1e-4, 0.1, 1.0, 50.0, 1e4]),
    st.sampled_from([0.5, 1.0, 5.0]),
)
def test_every_start_finds_the_minimiser_of_scipy(seed, classes, scale, noise):
    outputs, targets = data(seed, classes=classes, scale=scale, noise=noise)
    if slope(math.log(1e6), outputs, targets) <= 0:
        return  # less than a guess: no finite minimiser
    want = by_brentq(outputs, targets)
    for start in STARTS:
        # The slope is good to 1e-14 of its terms, some of which cancel near the minimiser.
        assert fit(outputs, targets, start=start).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("start", STARTS)
def test_newton_takes_few_passes_over_the_outputs(monkeypatch, start):
    passes = 0
    original = calibration._loss

    def counted(margins):
        loss = original(margins)

        def at(inverse):
            nonlocal passes
            passes += 1
            return loss(inverse)

        return at

    monkeypatch.setattr(calibration, "_loss", counted)
    for scale, noise in ((1e-4, 0.5), (1.0, 1.0), (3.0, 0.7), (1e4, 1.0)):
        outputs, targets = data(0, scale=scale, noise=noise)
        passes = 0
        fit(outputs, targets, start=start)
        # Three for the bounds and the start; bisection alone takes fifty more.
        assert passes <= 18


def test_a_fine_grid_finds_nothing_better():
    outputs, targets = data(0)
    got = fit(outputs, targets)
    grid = np.geomspace(0.5, 50, 4001)
    losses = [nll(outputs, targets, t) for t in grid]
    assert nll(outputs, targets, got.item()) <= min(losses)
    # Neighbours of the grid are 1.15e-3 apart.
    assert got.item() == pytest.approx(grid[np.argmin(losses)], rel=1.2e-3)
    bounded = minimize_scalar(
        lambda u: nll(outputs, targets, math.exp(u)), bounds=(-3, 5), options={"xatol": 1e-12}
    )
    # A minimum of a rounded function is known to the root of the rounding.
    assert got.item() == pytest.approx(math.exp(bounded.x), rel=1e-6)


class Logits(ClassifierMixin, BaseEstimator):
    """Gives its inputs as logits."""

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, x):
        return x

    def predict(self, x):
        return x.argmax(-1)


def test_result_equals_scikit_learn():
    outputs, targets = data(1, classes=5)
    x, y = outputs.numpy(), targets.numpy()
    peer = CalibratedClassifierCV(FrozenEstimator(Logits().fit(x, y)), method="temperature")
    beta = peer.fit(x, y).calibrated_classifiers_[0].calibrators[0].beta_
    assert fit(outputs, targets).item() == pytest.approx(1 / beta, rel=1e-6)


def test_well_calibrated_logits_keep_a_temperature_near_one():
    gen = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=gen, dtype=F64)
    targets = Categorical().sample(0, logits)
    # The standard error of log T is 1/√(Σ Var z), about 1/√(20000 · 2).
    assert fit(logits, targets).item() == pytest.approx(1, abs=5 / math.sqrt(20_000 * 2))
    assert fit(7 * logits, targets).item() == pytest.approx(7 * fit(logits, targets).item())


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
def test_temperature_has_the_scale_of_the_logits(factor):
    outputs, targets = data(2)
    want = fit(outputs, targets).item()
    bounds = (1e-3 * factor, 1e3 * factor)
    got = fit(outputs * factor, targets, start=factor, bounds=bounds).item()
    assert got == pytest.approx(want * factor, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_result_has_the_dtype_of_the_outputs_and_is_computed_in_float64(dtype):
    outputs, targets = data(3, dtype=dtype)
    got = fit(outputs, targets)
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert got == fit(outputs.double(), targets).float()


def test_outputs_that_require_gradients_are_only_looked_at():
    outputs, targets = data(4)
    got = fit(outputs.requires_grad_(), targets)
    assert not got.requires_grad
    assert outputs.grad is None


def test_shapes_and_class_axes():
    outputs, targets = data(5, rows=24, classes=3)
    want = fit(outputs, targets)
    images = outputs.reshape(4, 2, 3, 3).movedim(-1, 1)
    labels = targets.reshape(4, 2, 3)
    for dim in (1, -3):
        got = fit(images, labels, likelihood=Categorical(class_dim=dim))
        torch.testing.assert_close(got, want)
        got = fit(images[None], labels, likelihood=Categorical(class_dim=dim, temperature=9))
        torch.testing.assert_close(got, want)
    positions = fit(outputs.reshape(4, 6, 3), targets.reshape(4, 6))
    torch.testing.assert_close(positions, want)
    torch.testing.assert_close(fit(outputs, targets.int()), want)


@given(st.integers(0, 2**32))
def test_bernoulli_is_two_classes(seed):
    gen = torch.Generator().manual_seed(seed)
    f = 4 * torch.randn(60, generator=gen, dtype=F64)
    y = (torch.rand(60, generator=gen) < (f / 2).sigmoid()).long()
    two = torch.stack([torch.zeros_like(f), f], -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by chance a set may be separable
        want = fit(two, y)
        for outputs, targets in (
            (f, y),
            (f[:, None], y),
            (f, y[:, None].double()),
            (f.reshape(20, 3), y.reshape(20, 3).bool()),
            (f[None], y),
            (f.reshape(1, 20, 3), y.reshape(20, 3)),
            (f[None, :, None], y),
        ):
            torch.testing.assert_close(fit(outputs, targets, likelihood=Bernoulli()), want)


def test_excluded_classes_are_as_if_absent():
    outputs, targets = data(6, classes=3)
    masked = torch.cat([outputs, torch.full((200, 2), -math.inf, dtype=F64)], 1)
    assert fit(masked, targets) == fit(outputs, targets)


# No finite minimiser


def separable(rows=30, classes=3, seed=0):
    outputs, _ = data(seed, rows=rows, classes=classes)
    return outputs, outputs.argmax(-1)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("start", STARTS)
def test_separable_data_give_the_lower_bound_and_a_warning(samples, start):
    outputs, targets = separable()
    outputs = outputs if samples is None else outputs * torch.tensor([1.0, 2, 3])[:, None, None]
    with pytest.warns(UserWarning, match=r"lies below 1e-06, the lower end of `bounds`.*largest"):
        assert fit(outputs, targets, start=start).item() == 1e-6
    with pytest.warns(UserWarning, match=r"lies below 0.1, the lower end"):
        assert fit(outputs, targets, bounds=(0.1, 10)).item() == 0.1


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("start", STARTS)
def test_all_wrong_data_give_the_upper_bound_and_a_warning(samples, start):
    outputs, _ = data(0, rows=30)
    outputs = outputs if samples is None else outputs * torch.tensor([1.0, 2, 3])[:, None, None]
    targets = outputs.reshape(-1, 30, 4)[0].argmin(-1)
    with pytest.warns(UserWarning, match=r"lies above 1e\+06, the upper end .*same order\?"):
        assert fit(outputs, targets, start=start).item() == 1e6


def test_opposite_targets_of_equal_logits_give_the_upper_bound():
    outputs, targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="lies above"):
        assert fit(outputs, targets).item() == 1e6


def test_separable_data_with_a_tie_give_the_lower_bound():
    outputs = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    with pytest.warns(UserWarning, match="lies below"):
        fit(outputs, torch.tensor([0, 0]))


def test_one_wrong_row_among_separable_ones_makes_a_finite_minimiser():
    outputs, targets = separable(rows=300)
    margin = 1e-8
    outputs = torch.cat([outputs, torch.tensor([[margin, 0.0, -5.0]], dtype=F64)])
    targets = torch.cat([targets, torch.tensor([1])])
    got = {fit(outputs, targets, start=start).item() for start in STARTS}
    want = by_brentq(outputs, targets)
    assert all(t == pytest.approx(want, rel=1e-9) for t in got)


@pytest.mark.parametrize("start", [1e-6, 3.0, 1e6])
def test_constant_logits_give_the_start_and_a_warning(start):
    outputs = torch.arange(5.0)[:, None].expand(5, 3)
    with pytest.warns(UserWarning, match="every temperature fits alike, because the outputs of"):
        assert fit(outputs, torch.arange(5) % 3, start=start).item() == pytest.approx(start)


def test_a_row_that_says_nothing_changes_nothing():
    outputs, targets = data(7)
    more = torch.cat([outputs, torch.zeros(50, 4, dtype=F64)])
    got = fit(more, torch.cat([targets, torch.zeros(50, dtype=torch.int64)]))
    torch.testing.assert_close(got, fit(outputs, targets))


# Samples


@given(st.integers(0, 2**32), st.sampled_from([0.3, 3.0, 100.0]), st.integers(2, 5))
def test_samples_find_the_minimum_of_a_fine_grid(seed, scale, samples):
    outputs, targets = data(seed, rows=40, classes=3, samples=samples, scale=scale)
    grid = np.geomspace(1e-2 * scale, 1e2 * scale, 120)
    best = min(nll(outputs, targets, t) for t in grid)
    bounds = (grid[0], grid[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some sets have their minimum at an end
        got = [fit(outputs, targets, start=s * scale, bounds=bounds) for s in (0.01, 1, 3.3, 100)]
    for t in got:
        assert nll(outputs, targets, t.item()) <= best + 1e-9 * abs(best)
        assert t.item() == pytest.approx(got[0].item(), rel=1e-8)


def test_a_problem_with_two_minima_gives_the_better_one_from_any_start():
    # A row to which the samples give the margins 1 and −0.01 is fitted best where the second
    # does not count yet, at a temperature of 0.1; with margins a ten-thousandth of those, at 1e-5.
    margins = torch.tensor([[1.0, 1.0, 1.0, 1e-4, 1e-4], [-1e-2, -1e-2, -1e-2, -1e-6, -1e-6]])
    outputs = torch.stack([margins, torch.zeros_like(margins)], -1)
    targets = torch.zeros(5, dtype=torch.int64)
    grid = np.geomspace(1e-6, 1e6, 1201)
    losses = np.array([nll(outputs, targets, t) for t in grid])
    minima = np.flatnonzero((losses[1:-1] < losses[:-2]) & (losses[1:-1] <= losses[2:])) + 1
    assert len(minima) == 2
    want = grid[minima[np.argmin(losses[minima])]]
    for start in STARTS:  # grid points are 2.33 % apart
        assert fit(outputs, targets, start=start).item() == pytest.approx(want, rel=0.024)


def test_one_sample_and_equal_samples_are_one_network():
    outputs, targets = data(8)
    want = fit(outputs, targets)
    torch.testing.assert_close(fit(outputs[None], targets), want)
    torch.testing.assert_close(fit(outputs.expand(5, -1, -1), targets), want, rtol=1e-9, atol=0)


def test_the_mean_of_the_samples_is_calibrated_and_not_each():
    outputs, targets = data(9, samples=8, noise=2.0)
    together, alone = fit(outputs, targets), fit(outputs.flatten(0, 1), targets.repeat(8))
    # A mean over samples is softer than they are, so they may be colder.
    assert together < alone


def test_a_fitted_temperature_lowers_the_loss_of_predictions():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 3).double()
    model = fb.Model.from_module(net)
    variance = {name: torch.full_like(p, 4.0) for name, p in model.params.items()}
    posterior = fb.posteriors.Diagonal(model.params, variance)
    x = torch.randn(400, 2, dtype=F64)
    outputs = fb.predict(model, posterior, x, key=0, num_samples=5, return_samples=True).samples
    y = Categorical(temperature=3).sample(0, outputs[0])
    temperature = fit(outputs, y)
    losses = []
    for t in (temperature, temperature * 1.1, temperature / 1.1, 1.0):
        pred = fb.predict(
            model, posterior, x, key=0, num_samples=5, likelihood=Categorical(temperature=t)
        )
        losses.append(fb.uncertainty.negative_log_likelihood(pred.mean, y).item())
    assert losses[0] == min(losses)
    # Per row, and without the constant: the loss that was minimised is that of the predictions.
    assert losses[0] == pytest.approx(nll(outputs, y, temperature.item()) / 400, rel=1e-12)


# Messages

ROW, INTS = (
    torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 0]),
)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fit(ROW * math.nan, INTS),
            ValueError,
            "`outputs` holds NaN or infinite logits in 4 of 4 rows, expected finite ones",
        ),
        (
            lambda: fit(ROW.clone().fill_diagonal_(math.inf), INTS),
            ValueError,
            "`outputs` holds NaN or infinite logits in 3 of 4 rows",
        ),
        (
            lambda: fit(torch.full((2, 4, 3), -math.inf), INTS),
            ValueError,
            "in 4 of 4 rows, .* −inf for classes that are not the target",
        ),
        (
            lambda: fit(
                torch.tensor([math.inf, 1.0]), torch.tensor([0, 1]), likelihood=Bernoulli()
            ),
            ValueError,
            "in 1 of 2 rows",
        ),
        (
            lambda: fit(ROW[:0], INTS[:0]),
            ValueError,
            r"`outputs` has shape \(0, 3\), expected at least one datum",
        ),
        (
            lambda: fit(ROW.expand(0, 4, 3), INTS),
            ValueError,
            r"`outputs` has shape \(0, 4, 3\), expected at least one datum, and one sample",
        ),
        (
            lambda: fit(ROW, INTS, likelihood=Gaussian()),
            TypeError,
            r"`likelihood` is Gaussian\(.*, expected Categorical\(\) or Bernoulli\(\)",
        ),
        (
            lambda: fit(ROW, INTS + 1),
            ValueError,
            "`targets` holds labels from 1 to 3, expected 0 to 2",
        ),
        (lambda: fit(ROW.tolist(), INTS), TypeError, "`outputs` is of type list"),
        (lambda: fit(ROW, INTS.tolist()), TypeError, "`targets` is of type list"),
        (
            lambda: fit(ROW[None, None], INTS),
            ValueError,
            r"`targets` has shape \(4,\), expected \(1, 1, 4\)",
        ),
        (
            lambda: fit(ROW, INTS, bounds=(1.0, 0.5)),
            ValueError,
            r"`bounds` is \(1.0, 0.5\), expected two positive numbers, the smaller one first",
        ),
        (lambda: fit(ROW, INTS, bounds=(0.0, 2.0)), ValueError, r"`bounds` is \(0.0, 2.0\)"),
        (
            lambda: fit(ROW, INTS, start=0.0),
            ValueError,
            r"`start` is 0.0, expected a temperature between 1e-06 and 1e\+06",
        ),
        (lambda: fit(ROW, INTS, start=math.nan), ValueError, "`start` is nan"),
        (lambda: fit(ROW, INTS, start="1"), TypeError, "`start` holds a str, expected numbers"),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
