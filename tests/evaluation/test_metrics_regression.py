"""Metrics of numbers: integrals, enumeration, properness, peers, hand-derived values, wrong input.

Most are compared with slow float64 references datum by datum, so batches have few rows.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from sklearn.metrics import mean_absolute_error, root_mean_squared_error
from torchmetrics.functional.regression import continuous_ranked_probability_score

from funcbayes.evaluation import metrics

F64 = torch.float64
means = st.floats(-3, 3)
stds = st.floats(0.05, 4)


def tensor(values):
    return torch.tensor(values, dtype=F64)


def crps_by_integration(cdf, target, low, high):
    """∫ (F(t) − 1[t ≥ y])² dt on each side of the step."""
    options = {"epsabs": 1e-11, "epsrel": 1e-11, "limit": 400}
    below, _ = integrate.quad(lambda t: cdf(t) ** 2, low, target, **options)
    above, _ = integrate.quad(lambda t: (1 - cdf(t)) ** 2, target, high, **options)
    return below + above


@given(means, stds, st.floats(-8, 8))
def test_crps_of_a_normal_is_its_integral(mean, std, target):
    got = metrics.gaussian_crps(tensor([mean]), tensor([std]), tensor([target]))
    law = stats.norm(mean, std)
    low, high = min(mean - 10 * std, target), max(mean + 10 * std, target)
    assert got == pytest.approx(crps_by_integration(law.cdf, target, low, high), abs=1e-8)


@given(st.lists(st.tuples(means, stds), min_size=1, max_size=4), st.floats(-8, 8))
def test_scores_of_a_mixture_are_those_of_its_distribution(members, target):
    mean, std = (np.array(column) for column in zip(*members, strict=True))
    args = tensor(mean.tolist())[:, None], tensor(std.tolist())[:, None], tensor([target])

    def cdf(t):
        return stats.norm.cdf(t, mean, std).mean()

    low, high = min(min(mean - 10 * std), target), max(max(mean + 10 * std), target)
    want = crps_by_integration(cdf, target, low, high)
    assert metrics.mixture_crps(*args) == pytest.approx(want, abs=1e-8)
    # Added one by one, not by logsumexp: no density here underflows to nothing.
    density = math.fsum(stats.norm.pdf(target, mean, std)) / len(members)
    if density > 1e-300:
        assert metrics.mixture_nll(*args) == pytest.approx(-math.log(density), rel=1e-9, abs=1e-9)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_a_mixture_of_equals_is_its_member(num, seed):
    gen = torch.Generator().manual_seed(seed)
    mean, targets = torch.randn(2, 3, 2, generator=gen, dtype=F64)
    std = 0.1 + torch.rand(3, 2, generator=gen, dtype=F64)
    mixture = mean.expand(num, 3, 2), std.expand(num, 3, 2), targets
    got, want = metrics.mixture_crps(*mixture), metrics.gaussian_crps(mean, std, targets)
    assert got == pytest.approx(want, rel=1e-12)
    got, want = metrics.mixture_nll(*mixture), metrics.gaussian_nll(mean, std, targets)
    assert got == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("fair", [True, False])
@given(st.integers(2, 7), st.integers(0, 1000))
def test_crps_of_samples_is_its_sum_over_pairs(fair, num, seed):
    # Rounded, so that some samples are equal.
    samples = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
    samples, targets = (10 * samples).round() / 10, tensor([0.0, -1.0, 3.0])
    want = []
    for x, y in zip(samples.T.tolist(), targets.tolist(), strict=True):
        pairs = math.fsum(abs(a - b) for a in x for b in x)
        error = math.fsum(abs(a - y) for a in x) / num
        want.append(error - pairs / (2 * num * (num - 1 if fair else num)))
    got = metrics.sample_crps(samples, targets, fair=fair)
    assert got == pytest.approx(np.mean(want), rel=1e-12, abs=1e-12)
    if not fair:
        peer = continuous_ranked_probability_score(samples.T, targets)
        assert got == pytest.approx(peer.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_fair_crps_is_unbiased(num):
    # Every tuple of draws from a law of three equally likely values, against that law's CRPS.
    values, y = [-1.0, 0.5, 4.0], 0.75
    tuples = list(itertools.product(values, repeat=num))
    samples, targets = tensor(tuples).T, torch.full((len(tuples),), y, dtype=F64)
    spread = np.mean([abs(a - b) for a in values for b in values])
    law = np.mean([abs(a - y) for a in values]) - spread / 2
    assert metrics.sample_crps(samples, targets) == pytest.approx(law, rel=1e-12)
    plain = metrics.sample_crps(samples, targets, fair=False)
    assert plain == pytest.approx(law + spread / (2 * num), rel=1e-12)


def test_crps_of_samples_is_the_mixture_without_noise():
    samples, targets = tensor([[0.0, 1.0], [2.0, -1.0], [5.0, 0.5]]), tensor([1.0, 0.25])
    narrow = metrics.mixture_crps(samples, torch.full_like(samples, 1e-12), targets)
    assert narrow == pytest.approx(metrics.sample_crps(samples, targets, fair=False), abs=1e-11)
    one = metrics.sample_crps(samples[:1], targets, fair=False)
    assert one == metrics.mae(samples[0], targets)


def test_crps_of_samples_keeps_its_digits_at_an_offset():
    # Sums weighted by rank would cancel: their terms are 1e12 times the result.
    samples, targets = tensor([[0.0], [0.25], [1.0], [1.5]]), tensor([0.5])
    want = metrics.sample_crps(samples, targets)
    assert metrics.sample_crps(samples + 2**40, targets + 2**40) == want


@given(st.integers(1, 20), st.integers(0, 1000))
def test_errors_and_densities_equal_those_of_peers(batch, seed):
    gen = torch.Generator().manual_seed(seed)
    mean, targets = torch.randn(2, batch, generator=gen, dtype=F64)
    std = 0.1 + torch.rand(batch, generator=gen, dtype=F64)
    want = root_mean_squared_error(targets, mean)
    assert metrics.rmse(mean, targets) == pytest.approx(want, rel=1e-12)
    want = mean_absolute_error(targets, mean)
    assert metrics.mae(mean, targets) == pytest.approx(want, rel=1e-12)
    want = -stats.norm.logpdf(targets, mean, std).mean()
    assert metrics.gaussian_nll(mean, std, targets) == pytest.approx(want, rel=1e-12, abs=1e-12)


@given(st.integers(0, 1000), st.sampled_from([0.5, 0.8, 0.9, 0.99]))
def test_all_at_once_are_the_scores_one_by_one(seed, level):
    gen = torch.Generator().manual_seed(seed)
    mean, targets = torch.randn(2, 20, generator=gen, dtype=F64)
    std = 0.1 + torch.rand(20, generator=gen, dtype=F64)
    got = metrics.regression(mean, std, targets, level=level)
    lower, upper = (tensor(end.tolist()) for end in stats.norm.interval(level, mean, std))
    assert got.rmse == metrics.rmse(mean, targets)
    assert got.nll == metrics.gaussian_nll(mean, std, targets)
    assert got.crps == metrics.gaussian_crps(mean, std, targets)
    assert got.coverage == metrics.coverage(lower, upper, targets)
    assert got.width == pytest.approx(metrics.sharpness(lower, upper), rel=1e-12)
    want = metrics.interval_score(lower, upper, targets, level=level)
    assert got.interval_score == pytest.approx(want, rel=1e-12)


def test_regression_by_hand():
    mean, std, targets = tensor([0.0, 1.0]), tensor([1.0, 2.0]), tensor([0.0, 7.0])
    got = metrics.regression(mean, std, targets)
    z = 1.6448536269514722
    assert got.rmse == pytest.approx(math.sqrt(18))
    log_density = math.log(2 * math.pi) + math.log(2) + 0.5 * 3**2
    assert got.nll == pytest.approx(log_density / 2)
    assert got.coverage == 0.5
    assert got.width == pytest.approx(3 * z)
    assert got.interval_score == pytest.approx((2 * z + 4 * z + 20 * (6 - 2 * z)) / 2)
    # σ (√2 − 1) / √π at the mean.
    at_mean = metrics.gaussian_crps(mean, std, mean)
    assert at_mean == pytest.approx(1.5 * (math.sqrt(2) - 1) / math.sqrt(math.pi))


def test_intervals_by_hand():
    lower, upper = torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 4.0, 2.0])
    targets = torch.tensor([-1.0, 2.5, 4.0, 2.0])
    assert metrics.coverage(lower, upper, targets) == 0.5
    assert metrics.sharpness(lower, upper) == 7 / 4
    got = metrics.interval_score(lower, upper, targets, level=0.75)
    assert got == pytest.approx(7 / 4 + 8 * 1.5 / 4)


def test_an_unbounded_interval_covers_and_is_infinitely_wide():
    lower, upper = torch.tensor([-torch.inf, 0.0]), torch.tensor([torch.inf, 1.0])
    targets = torch.tensor([3.0, 2.0])
    assert metrics.coverage(lower, upper, targets) == 0.5
    assert metrics.sharpness(lower, upper) == math.inf
    assert metrics.interval_score(lower, upper, targets) == math.inf


# The n midpoint quantiles of a law stand for it: a score's mean over them is its expectation to
# O(1/n), and steps of 0.2 in location or scale change it by more than that.
QUANTILES = tensor(stats.gamma(3).ppf((np.arange(20_000) + 0.5) / 20_000).tolist())


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_interval_score_is_lowest_at_the_quantiles(level):
    ends = stats.gamma(3).ppf([(1 - level) / 2, (1 + level) / 2])

    def score(low, high):
        size = QUANTILES.shape
        args = torch.full(size, low, dtype=F64), torch.full(size, high, dtype=F64), QUANTILES
        return metrics.interval_score(*args, level=level)

    best = score(*ends)
    for low, high in itertools.product((-0.2, 0.0, 0.2), repeat=2):
        if (low, high) != (0.0, 0.0):
            assert score(ends[0] + low, ends[1] + high) > best + 1e-3
    # For another level the best interval is another one.
    low, high = ends
    wider = torch.full_like(QUANTILES, low - 0.2), torch.full_like(QUANTILES, high + 0.2)
    assert metrics.interval_score(*wider, QUANTILES, level=0.99) < metrics.interval_score(
        torch.full_like(QUANTILES, low), torch.full_like(QUANTILES, high), QUANTILES, level=0.99
    )


def test_proper_scores_are_lowest_at_the_truth():
    targets = tensor(stats.norm(1, 2).ppf((np.arange(20_000) + 0.5) / 20_000).tolist())
    for score in (metrics.gaussian_nll, metrics.gaussian_crps):
        values = {
            (mean, std): score(
                torch.full_like(targets, mean), torch.full_like(targets, std), targets
            )
            for mean in (0.8, 1.0, 1.2)
            for std in (1.8, 2.0, 2.2)
        }
        best = values.pop((1.0, 2.0))
        assert min(values.values()) > best + 1e-3


def test_mixture_scores_are_lowest_at_the_true_mixture():
    def ppf(q):
        grid = np.linspace(-8, 8, 100_001)
        cdf = (stats.norm.cdf(grid, -2, 1) + stats.norm.cdf(grid, 2, 0.5)) / 2
        return np.interp(q, cdf, grid)

    targets = tensor(ppf((np.arange(20_000) + 0.5) / 20_000).tolist())

    def members(first, second):
        return tensor([first, second])[:, None].expand(2, len(targets))

    for score in (metrics.mixture_nll, metrics.mixture_crps):
        best = score(members(-2.0, 2.0), members(1.0, 0.5), targets)
        for shift, scale in ((0.4, 1), (-0.4, 1), (0, 1.4), (0, 0.7)):
            other = members(-2.0 + shift, 2.0), members(1.0, 0.5 * scale), targets
            assert score(*other) > best + 1e-3


@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(0, 1000))
def test_scores_follow_a_change_of_units(scale, shift, seed):
    gen = torch.Generator().manual_seed(seed)
    mean, targets = torch.randn(2, 10, generator=gen, dtype=F64)
    std = 0.1 + torch.rand(10, generator=gen, dtype=F64)
    one = metrics.regression(mean, std, targets)
    other = metrics.regression(scale * mean + shift, scale * std, scale * targets + shift)
    # Rounding of numbers of up to |shift| + 4 scale, in units of scale, and times 1/std ≤ 10.
    tolerance = 1e-13 * (1 + abs(shift) / scale) * 100
    for name in ("rmse", "crps", "width", "interval_score"):
        assert getattr(other, name) / scale == pytest.approx(getattr(one, name), abs=tolerance)
    assert other.nll == pytest.approx(one.nll + math.log(scale), abs=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_double(dtype):
    # All numbers are exact in each dtype; 300² is not a float16.
    mean, std = tensor([300.0, -2.0]), tensor([0.5, 4.0])
    targets = tensor([0.0, 1.0])
    want = metrics.regression(mean, std, targets)
    assert metrics.regression(mean.to(dtype), std.to(dtype), targets.to(dtype)) == want
    both = torch.stack([mean, targets]), torch.stack([std, std]), targets
    narrow = [x.to(dtype) for x in both]
    assert metrics.mixture_nll(*narrow) == metrics.mixture_nll(*both)
    assert metrics.mixture_crps(*narrow) == metrics.mixture_crps(*both)
    assert metrics.sample_crps(narrow[0], narrow[2]) == metrics.sample_crps(both[0], both[2])


def test_a_mixture_far_from_the_target_has_a_finite_score():
    args = tensor([[0.0], [1.0]]), tensor([[1.0], [1.0]]), tensor([1001.0])
    # The nearer member alone: the other's density is e^-1000 of its.
    want = 1000**2 / 2 + math.log(2 * math.pi) / 2 + math.log(2)
    assert metrics.mixture_nll(*args) == pytest.approx(want, rel=1e-12)
    assert math.isfinite(metrics.mixture_crps(*args))


def test_gradients_are_neither_needed_nor_kept():
    mean = torch.zeros(2, requires_grad=True)
    assert metrics.regression(mean, torch.ones(2, requires_grad=True), torch.zeros(2)).rmse == 0


X = torch.tensor([0.1, 0.2])
ONE = torch.ones(2)
XX = X.expand(3, 2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.rmse(X[:, None], X),
            ValueError,
            r"`mean` has shape \(2, 1\), expected \(2,\), that of `targets`: squeeze",
        ),
        (
            lambda: metrics.mae(X, X.long()),
            TypeError,
            r"`targets` is a tensor of torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: metrics.rmse([0.1], X),
            TypeError,
            r"`mean` is a list, expected a floating-point tensor",
        ),
        (
            lambda: metrics.mae(X[:0], X[:0]),
            ValueError,
            r"`targets` has shape \(0,\), expected \[batch\], at least one datum",
        ),
        (
            lambda: metrics.rmse(X / 0, X),
            ValueError,
            r"`mean` holds NaN or infinite numbers",
        ),
        (
            lambda: metrics.gaussian_nll(X, X, X * math.nan),
            ValueError,
            r"`targets` holds NaN or infinite numbers",
        ),
        (
            lambda: metrics.gaussian_nll(X, ONE * 0, X),
            ValueError,
            r"`std` has smallest entry 0, expected positive.*Predictive.total.sqrt\(\)",
        ),
        (
            lambda: metrics.regression(X, ONE[0], X),
            ValueError,
            r"`std` has shape \(\), expected \(2,\), that of `mean`.*`std.expand_as\(mean\)`",
        ),
        (
            lambda: metrics.regression(X, ONE, X, level=90),
            ValueError,
            r"`level` is 90, expected a probability between 0 and 1",
        ),
        (
            lambda: metrics.interval_score(X, X, X, level=1.0),
            ValueError,
            r"`level` is 1.0, expected a probability",
        ),
        (
            lambda: metrics.gaussian_crps(X, -ONE, X),
            ValueError,
            r"`std` has smallest entry -1",
        ),
        (
            lambda: metrics.mixture_nll(X, ONE, X),
            ValueError,
            r"`means` has shape \(2,\), expected \(samples, 2\).*samples are the first axis",
        ),
        (
            lambda: metrics.mixture_crps(XX, XX[:2], X),
            ValueError,
            r"`stds` has shape \(2, 2\), expected \(3, 2\), that of `means`",
        ),
        (
            lambda: metrics.sample_crps(XX.T, X),
            ValueError,
            r"`samples` has shape \(2, 3\), expected \(samples, 2\)",
        ),
        (
            lambda: metrics.sample_crps(XX[:0], X),
            ValueError,
            r"`samples` has shape \(0, 2\), expected \(samples, 2\), at least one sample",
        ),
        (
            lambda: metrics.sample_crps(XX[:1], X),
            ValueError,
            r"`samples` holds 1 sample, expected at least 2.*fair=False",
        ),
        (
            lambda: metrics.coverage(X + 1, X, X),
            ValueError,
            r"interval 0 is from 1.1 to 0.1, expected `lower` <= `upper`: were they swapped",
        ),
        (
            lambda: metrics.sharpness(X, X * math.nan),
            ValueError,
            r"interval 0 is from 0.1 to nan",
        ),
        (
            lambda: metrics.sharpness(X / 0, X / 0),
            ValueError,
            r"interval 0 is from inf to inf",
        ),
        (
            lambda: metrics.sharpness(X, X[:1]),
            ValueError,
            r"`lower` has shape \(2,\) and `upper` \(1,\), expected the same",
        ),
        (
            lambda: metrics.coverage(X[:1], X, X),
            ValueError,
            r"`lower` has shape \(1,\), expected \(2,\), that of `targets`",
        ),
        (
            lambda: metrics.sharpness(X, X.long()),
            TypeError,
            r"`upper` is a tensor of torch.int64",
        ),
        (
            lambda: metrics.IntervalScore(level=0),
            ValueError,
            r"`level` is 0, expected a probability",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
