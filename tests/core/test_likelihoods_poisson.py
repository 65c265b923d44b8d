"""The Poisson likelihood against scipy and sums over all counts, at small and large rates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.func import grad, vmap

from funcbayes.core.likelihoods import Poisson
from funcbayes.core.likelihoods.poisson import _quantile

F64 = torch.float64
RATES = [1e-30, 1e-6, 0.01, 0.3, 1.0, 5.0, 15.9, 16.1, 49.9, 50.0, 50.1, 300.0, 1e4, 1e7]


def brute_force_entropy(rate):
    """-Σ p log p over all counts within 40 standard deviations, by scipy."""
    spread = 40 * math.sqrt(rate) + 80
    counts = np.arange(max(0, math.floor(rate - spread)), math.ceil(rate + spread))
    log_p = stats.poisson.logpmf(counts, rate)
    return -(np.exp(log_p) * log_p).sum()


# Density


@given(st.floats(-30, 16), st.integers(0, 10**7))
def test_nll_equals_scipy(log_rate, count):
    f, y = torch.tensor([log_rate], dtype=F64), torch.tensor([count])
    want = -stats.poisson.logpmf(count, math.exp(log_rate))
    # scipy's own three terms cancel: each is below y (|f| + log y + 1).
    atol = 1e-15 * (1 + count * (abs(log_rate) + math.log1p(count) + 1))
    torch.testing.assert_close(Poisson().nll(f, y).item(), want, rtol=1e-12, atol=atol + 1e-13)


def test_the_constant_is_exact_at_the_change_of_formula():
    y = torch.arange(10, 40)
    f = torch.ones(30, dtype=F64)
    want = torch.tensor([math.e - k + math.log(math.factorial(k)) for k in y.tolist()], dtype=F64)
    # Terms up to 150, a few roundings each; the fourth term of the series is 6e-10 at 16.
    torch.testing.assert_close(Poisson().nll(f, y), want, rtol=0, atol=1.5e-13)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100, 10_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("deviations", [-4.0, -0.3, 0.0, 2.0, 5.0])
def test_nll_does_not_cancel_in_float32(count, deviations):
    # At 1e6 counts the terms are 1.4e7 and float32 keeps them to 1: naively off by a nat.
    log_rate = math.log(count + 1) + deviations / math.sqrt(count + 1)
    f = torch.tensor([log_rate], dtype=torch.float32)
    y = torch.tensor([count])
    want = Poisson().nll(f.double(), y)
    # A rounding of f - log y, half an ulp of 16, is 1e-6 of a slope of up to 5 √y.
    atol = 2e-6 * (5 * math.sqrt(count) + 4)
    torch.testing.assert_close(Poisson().nll(f, y).double(), want, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("count", [0, 3, 15, 16, 1000])
def test_derivatives_are_rate_minus_count_and_rate_at_every_rate(count):
    f = torch.linspace(-40, 40, 161, dtype=F64)
    f = torch.cat([f, torch.tensor([math.log(count or 1)], dtype=F64)])
    y = torch.full(f.shape, count)

    def nll(f):
        return Poisson().nll(f, y).sum()

    first = grad(nll)(f)
    second = grad(lambda f: grad(nll)(f).sum())(f)
    torch.testing.assert_close(first, f.exp() - y, rtol=1e-13, atol=1e-13 * (count + 1))
    # To relative accuracy also where the rate is e^-40.
    torch.testing.assert_close(second, f.exp(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_rates_of_zero_and_beyond_the_range_give_no_nan(dtype):
    top = 1e4 if dtype == torch.float16 else 1e5
    f = torch.tensor([-math.inf, -top, top, math.inf], dtype=dtype)
    likelihood = Poisson()
    for count, want in ((0, [0, 0, math.inf, math.inf]), (3, [math.inf, None, math.inf, math.inf])):
        nll = likelihood.nll(f, torch.full((4,), count))
        assert not nll.isnan().any()
        for value, expected in zip(nll.tolist(), want, strict=True):
            assert expected is None or value == expected
    for method in (likelihood.inverse_link, likelihood.aleatoric, likelihood.entropy):
        assert not method(f).isnan().any()
    assert likelihood.entropy(f[:2]).max() <= 1e-300
    g = grad(lambda f: likelihood.nll(f, torch.tensor([0, 3])).sum())(f[1:2].repeat(2))
    torch.testing.assert_close(g.float(), torch.tensor([0.0, -3.0]))


def test_half_precision_rates_are_computed_in_float32():
    f = torch.tensor([12.0], dtype=torch.float16)  # e^12 is above 65504
    rate = Poisson().inverse_link(f)
    assert rate.dtype == torch.float32
    torch.testing.assert_close(rate, torch.tensor([math.exp(12)]))
    root = Poisson().hessian_root(f)
    assert root.dtype == torch.float16
    torch.testing.assert_close(root, torch.tensor([[math.exp(6)]], dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, F64])
def test_counts_of_any_dtype(dtype):
    f, y = torch.tensor([0.3, 2.0, -1.0], dtype=F64), torch.tensor([0, 200, 3])
    Poisson().check(f, y.to(dtype))
    assert torch.equal(Poisson().nll(f, y.to(dtype)), Poisson().nll(f, y))


# Entropy


@pytest.mark.parametrize("rate", RATES)
def test_entropy_equals_the_sum_over_counts(rate):
    f = torch.tensor([rate], dtype=F64).log()
    # 1e-12 is promised, scipy's log densities at 1e7 are good to 1e-8 of it.
    atol = 1e-12 if rate < 1e3 else 1e-8
    want = brute_force_entropy(rate)
    torch.testing.assert_close(Poisson().entropy(f).item(), want, rtol=1e-12, atol=min(atol, want))
    single = Poisson().entropy(f.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.item(), want, rtol=1e-5, atol=0)


def test_entropy_of_small_and_large_rates_is_that_of_their_limits():
    small = torch.tensor([1e-20], dtype=F64)
    torch.testing.assert_close(
        Poisson().entropy(small.log()), small * (1 - small.log()), rtol=1e-12, atol=0
    )
    f = torch.tensor([500.0], dtype=F64)  # a rate of 1e217
    want = (f + math.log(2 * math.pi * math.e)) / 2
    torch.testing.assert_close(Poisson().entropy(f), want)


def test_entropy_grows_smoothly_through_the_change_of_formula():
    f = torch.linspace(math.log(49), math.log(51), 401, dtype=F64)
    slopes = vmap(grad(lambda f: Poisson().entropy(f[None])[0]))(f)
    assert (slopes > 0).all()
    # dH/df = ½ + 1/12λ + …; the two formulas agree in their slope to 1e-10 as well.
    assert slopes.diff().abs().max() < 1e-5
    at = torch.tensor([math.log(50) - 1e-12, math.log(50) + 1e-12], dtype=F64)
    slopes = vmap(grad(lambda f: Poisson().entropy(f[None])[0]))(at)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-10)


def negative_binomial_entropy(mean, total):
    """Entropy of a Poisson whose rate is gamma distributed."""
    p = mean / total
    counts = np.arange(int(mean + 60 * total / math.sqrt(min(mean, 1)) + 200))
    log_p = stats.nbinom.logpmf(counts, mean**2 / (total - mean), p)
    return -(np.exp(log_p) * log_p).sum()


@pytest.mark.parametrize("mean", [0.01, 0.3, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("relative_spread", [0.01, 0.1, 0.3, 0.65, 1.0])
def test_predictive_entropy_of_gamma_rates_is_near_their_mixture(mean, relative_spread):
    total = mean + (mean * relative_spread) ** 2
    ours = Poisson().predictive_entropy(
        torch.tensor([mean], dtype=F64), torch.tensor([total], dtype=F64)
    )
    excess = ours.item() - negative_binomial_entropy(mean, total)
    # Exact to first order in the variance of the rates, and for exponential rates.
    most = {0.01: 4e-5, 0.1: 0.004, 0.3: 0.04, 0.65: 0.16, 1.0: 1e-9}[relative_spread]
    assert -1e-9 < excess < most


@given(st.lists(st.floats(-10, 8), min_size=1, max_size=6))
def test_predictive_entropy_is_never_below_that_of_the_samples(log_rates):
    f = torch.tensor(log_rates, dtype=F64)[:, None]  # samples of one datum
    likelihood = Poisson()
    rates = likelihood.inverse_link(f)
    total = rates.mean(0) + rates.var(0, correction=0)
    predictive = likelihood.predictive_entropy(rates.mean(0), total)
    assert (predictive >= likelihood.entropy(f).mean(0) - 1e-11).all()
    # A count of that mean has at most the geometric's entropy.
    m = rates.mean(0)
    assert (predictive <= ((m + 1) * (m + 1).log() - m * m.log()) + 1e-9).all()


def test_predictive_entropy_without_spread_is_the_entropy_also_after_rounding():
    mean = torch.tensor([0.0, 1e-30, 0.1, 3.0, 1e6])
    for factor in (1.0, 1 - 1e-7):
        ours = Poisson().predictive_entropy(mean, mean * factor)
        torch.testing.assert_close(ours, Poisson().entropy(mean.log()), rtol=1e-5, atol=1e-7)


# Samples


@given(st.floats(0, 1, exclude_max=True), st.floats(-30, 25))
def test_quantiles_are_those_of_scipy(u, log_rate):
    rate = math.exp(log_rate)
    count = _quantile(torch.tensor([u], dtype=F64), torch.tensor([rate], dtype=F64)).item()
    # The defining property, with room for a rounding of the distribution function. Draws below
    # 2⁻⁵³ are 0, for which the bracket ends at 8.9σ.
    assert stats.poisson.cdf(count, rate) > u - 1e-11
    if u > 1e-18:
        assert stats.poisson.cdf(count - 1, rate) <= u + 1e-11


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.5, 4.0, 30.0, 1e3, 1e6, 1e12])
def test_quantiles_at_the_ends_lie_in_the_bracket(rate):
    u = torch.tensor([2**-53, 2**-40, 1e-6, 0.5, 1 - 1e-6, 1 - 2**-40], dtype=F64)
    ours = _quantile(u, torch.full_like(u, rate))
    want = torch.as_tensor(stats.poisson.ppf(u.numpy(), rate)).clamp_min(0)
    keep = want.isfinite()  # scipy's own search gives up on large rates far out
    torch.testing.assert_close(ours[keep], want[keep], rtol=0, atol=0)
    assert (ours.diff() >= 0).all()


@pytest.mark.parametrize("rate", [0.2, 3.0, 40.0])
def test_samples_follow_the_distribution(rate):
    n = 20_000
    y = Poisson().sample(0, torch.full((n,), math.log(rate)))
    counts = torch.bincount(y.long(), minlength=int(rate + 5 * math.sqrt(rate)) + 1)
    p = torch.as_tensor(stats.poisson.pmf(np.arange(len(counts)), rate))
    z = (counts - n * p) / (n * p * (1 - p)).sqrt()
    assert z[n * p > 10].abs().max() < 5


def test_samples_of_rates_beyond_the_range_are_finite_counts():
    f = torch.tensor([-math.inf, 1e4, 60.0])
    y = Poisson().sample(0, f)
    Poisson().check(f, y)
    assert y[0] == 0
    assert y[1] == torch.finfo(torch.float32).max
    torch.testing.assert_close(y[2].item(), math.exp(60), rtol=1e-6, atol=0)


def test_lanes_of_vmap_share_their_numbers_or_not():
    f = torch.full((3, 200), 2.0)
    same = vmap(lambda f: Poisson().sample(0, f), randomness="same")(f)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda f: Poisson().sample(0, f), randomness="different")(f)
    assert not torch.equal(different[0], different[1])


def test_an_exposure_enters_as_its_log():
    # Twice the time, twice the counts: the fit of a rate to Σy over Σt.
    exposure, y = torch.tensor([1.0, 2.0, 5.0], dtype=F64), torch.tensor([2, 3, 11])
    best = (y.sum() / exposure.sum()).log()
    slope = grad(lambda b: Poisson().nll(b + exposure.log(), y).sum())(best)
    torch.testing.assert_close(slope, torch.zeros((), dtype=F64), rtol=0, atol=1e-13)
