"""Regression uncertainties: parts of the variance, quantiles of mixtures and of samples."""

import math
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch.func import vmap

from funcbayes.evaluation import uncertainty

double = partial(torch.tensor, dtype=torch.float64)
LEVELS = [0.5, 1e-30, 0.05, 0.95, 1e-6, 0.3, 0.999999]


@st.composite
def mixtures(draw, dtype=torch.float64):
    """Means and standard deviations `[samples, batch]` of very different sizes."""
    num, batch = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale, spread, offset = (draw(st.sampled_from(x)) for x in (SCALES, SPREADS, [0.0, 1.0, -1e4]))
    means = scale * (offset + spread * torch.randn(num, batch, generator=gen, dtype=torch.float64))
    stds = scale * torch.rand(num, batch, generator=gen, dtype=torch.float64).exp() ** draw(
        st.sampled_from([1, 10])
    )
    return means.to(dtype), stds.to(dtype)


SCALES = [1.0, 1e-20, 1e20]
SPREADS = [0.0, 1e-3, 1.0, 1e3, 1e9]


# Variance


def test_parts_of_the_variance_equal_the_law_of_total_variance():
    gen = torch.Generator().manual_seed(0)
    means = torch.randn(7, 3, 2, generator=gen, dtype=torch.float64)
    variances = torch.rand(7, 3, 2, generator=gen, dtype=torch.float64)
    got = uncertainty.decompose_variance(means, variances)
    # E y² − (E y)² of the mixture.
    total = (means.square() + variances).mean(0) - means.mean(0).square()
    torch.testing.assert_close(got.total, total)
    torch.testing.assert_close(got.epistemic, torch.as_tensor(np.var(means.numpy(), axis=0)))
    torch.testing.assert_close(got.aleatoric, variances.mean(0))
    torch.testing.assert_close(got.total, got.epistemic + got.aleatoric)


@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (1, 3, 2), (7, 1, 1)])
def test_noise_broadcasts_to_the_means(shape):
    means = torch.randn(7, 3, 2)
    noise = torch.rand(shape) + 1
    want = noise.expand(7, 3, 2)
    for f in (
        uncertainty.decompose_variance,
        lambda m, s: uncertainty.mixture_quantiles(m, s, [0.1, 0.9]),
    ):
        for got, expected in zip(f(means, noise), f(means, want), strict=True):
            torch.testing.assert_close(got, expected)
    same = uncertainty.decompose_variance(means, 2.0)
    torch.testing.assert_close(same.aleatoric, torch.full((3, 2), 2.0))


def test_one_sample_has_no_epistemic_variance():
    got = uncertainty.decompose_variance(torch.full((1, 4), 1e6), 0.25)
    assert not got.epistemic.any()
    assert (got.total == 0.25).all()


def test_variance_of_half_precision_means_is_computed_in_float32():
    means = torch.tensor([[300.0], [-300.0]], dtype=torch.float16)
    got = uncertainty.decompose_variance(means, 1.0)
    assert got.total.item() == 90_001
    assert got.total.dtype == torch.float32


# Quantiles of mixtures


def check_to_rounding(quantile, level, means, stds, eps, cdf):
    """The level lies between the distribution function a few roundings to either side.

    A quantile is rounded to its own size, and the distances to the means, relative to their
    size, before they enter the distribution function; its value is then good to a few eps.
    """
    reach = 8 * eps * (abs(quantile) + max(abs(quantile - m) for m in means))
    sign = -1 if level > 0.5 else 1
    tail = min(level, 1 - level)

    def tail_at(x):
        return sum(cdf(sign * (x - m) / s) for m, s in zip(means, stds, strict=True)) / len(means)

    assert tail_at(quantile - sign * reach) <= tail * (1 + 16 * eps)
    assert tail_at(quantile + sign * reach) >= tail * (1 - 16 * eps)


@given(mixtures(torch.float32))
def test_mixture_quantiles_are_right_to_rounding_in_float32(case):
    means, stds = case
    levels = torch.tensor(LEVELS)
    got = uncertainty.mixture_quantiles(means, stds, levels)
    assert got.dtype == torch.float32
    for level, row in zip(levels.double().tolist(), got.double().tolist(), strict=True):
        for n, q in enumerate(row):
            components = (x[:, n].double().tolist() for x in (means, stds))
            check_to_rounding(q, level, *components, 2.0**-23, norm.cdf)


def test_mixture_quantiles_are_right_to_rounding_in_float64():
    cases = [
        ([0.0], [1.0]),
        ([1e-3, -2.0, 5.0], [0.1, 1.0, 1e-8]),
        ([1e150, 1e150 * (1 + 1e-12), -1e150], [1e140, 1e3, 1e149]),
        ([-1e-200, 1e200], [1e-210, 1e-3]),
    ]

    def cdf(z):  # mpmath's own stops at 1e200; at ±100 it is 0 and 1 to 2000 digits
        return mpmath.ncdf(max(min(z, 100), -100))

    with mpmath.workdps(60):
        for means, stds in cases:
            got = uncertainty.mixture_quantiles(
                double(means)[:, None], double(stds)[:, None], LEVELS
            )
            for level, q in zip(LEVELS, got[:, 0].tolist(), strict=True):
                numbers = [[mpmath.mpf(x) for x in xs] for xs in (means, stds)]
                # 1 − level as float64 has it, which is exact from ½ on.
                check_to_rounding(mpmath.mpf(q), level, *numbers, 2.0**-52, cdf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_mixture_quantiles_never_fall_in_the_level(dtype, spread):
    gen = torch.Generator().manual_seed(0)
    means = spread * torch.randn(5, 500, generator=gen, dtype=dtype)
    stds = torch.rand(5, 500, generator=gen, dtype=dtype) + 0.1
    # Neighbouring numbers too, among them those next to ½, where the tail changes.
    near = torch.tensor([0.05, 0.3, 0.5, 0.7], dtype=dtype)
    ends = (near.nextafter(torch.full_like(near, end)) for end in (0.0, 1.0))
    levels = torch.cat([near, *ends]).sort().values
    got = uncertainty.mixture_quantiles(means, stds, levels)
    assert (got.diff(dim=0) >= 0).all()
    shuffled = torch.randperm(len(levels), generator=gen)
    again = uncertainty.mixture_quantiles(means, stds, levels[shuffled])
    assert torch.equal(again, got[shuffled])


@given(mixtures(), st.floats(1e-9, 0.4999))
def test_quantiles_of_the_mirrored_mixture_are_mirrored(case, level):
    means, stds = case
    # 1 − level is rounded: the level to compare with is the one it leaves.
    upper = 1 - level
    lower = uncertainty.mixture_quantiles(-means, stds, [1 - upper])
    assert torch.equal(uncertainty.mixture_quantiles(means, stds, [upper]), -lower)


@given(mixtures())
def test_mixture_quantiles_do_not_depend_on_the_order_of_the_samples(case):
    means, stds = case
    got = uncertainty.mixture_quantiles(means, stds, LEVELS)
    flipped = uncertainty.mixture_quantiles(means.flip(0), stds.flip(0), LEVELS)
    # Between far modes the distribution function is flat to rounding, so in the levels of
    # those plateaus, k/6, anything goes; of LEVELS that is ½ alone.
    torch.testing.assert_close(got[1:], flipped[1:], rtol=1e-12, atol=1e-12 * stds.max().item())


def test_quantiles_of_one_component_are_those_of_the_normal():
    means, stds = double([[0.3, -2.0]]), double([[1.0, 5.0]])
    got = uncertainty.mixture_quantiles(means, stds, LEVELS)
    want = norm.ppf(np.array(LEVELS)[:, None], means.numpy(), stds.numpy())
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-14, atol=1e-14)


def test_components_without_noise_are_point_masses():
    means = torch.tensor([[5.0], [0.0], [2.0], [1.0]])
    got = uncertainty.mixture_quantiles(means, 0.0, [0.05, 0.3, 0.6, 0.9])
    assert got[:, 0].tolist() == [0, 1, 2, 5]
    # Nearly every number of the dtype lies between.
    far = torch.tensor([[-3e38], [3e38]])
    got = uncertainty.mixture_quantiles(far, 0.0, [0.3, 0.7])
    assert torch.equal(got, far)


def test_quantiles_at_the_ends_of_the_range():
    largest = torch.finfo(torch.float32).max
    means = torch.tensor([[-largest, 0.0, largest], [largest, 0.0, largest]])
    stds = torch.tensor([[1.0, 1e-38, largest], [largest, 1e38, largest]])
    got = uncertainty.mixture_quantiles(means, stds, [1e-30, 0.25, 0.5, 0.75, 1 - 1e-7])
    assert not got.isnan().any()
    assert (got.diff(dim=0)[1:4, 1] >= 0).all()
    assert (got[-1, [0, 2]] >= largest).all()
    limits = uncertainty.mixture_quantiles(means, stds, torch.tensor([0.0, 1.0, 2.0, -1.0]))
    assert (limits[0] == -math.inf).all()
    assert (limits[1] == math.inf).all()
    assert limits[2:].isnan().all()
    means[0, 1] = math.nan
    got = uncertainty.mixture_quantiles(means, stds, [0.5])
    assert got.isnan().tolist() == [[False, True, False]]


def test_half_precision_is_computed_in_float32():
    means = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)
    got = uncertainty.mixture_quantiles(means, means, [0.05, 0.95])
    want = uncertainty.mixture_quantiles(means.float(), means.float(), [0.05, 0.95])
    assert torch.equal(got, want)


@given(mixtures(), st.floats(0.01, 0.99))
def test_interval_holds_its_probability(case, level):
    means, stds = case
    lower, upper = uncertainty.mixture_interval(means, stds, level)
    cdf = [norm.cdf(x.numpy(), means.numpy(), stds.numpy()).mean(0) for x in (lower, upper)]
    # Means of 1e4 scales leave 1e-12 of a standard deviation, and 1e9 leaves 1e-7.
    rounding = 4 * 2.0**-52 * (means.abs() / stds).max().item()
    np.testing.assert_allclose(cdf[0], (1 - level) / 2, rtol=0, atol=1e-12 + rounding)
    np.testing.assert_allclose(cdf[1], (1 + level) / 2, rtol=0, atol=1e-12 + rounding)


# Quantiles of samples


@given(st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_sample_quantiles_equal_numpy(num, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    samples = torch.randn(num, 3, 2, generator=gen, dtype=dtype)
    levels = torch.rand(5, generator=gen, dtype=dtype)
    got = uncertainty.sample_quantiles(samples, levels)
    want = np.quantile(samples.double().numpy(), levels.double().numpy(), axis=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), torch.as_tensor(want), rtol=0, atol=64 * eps)
    assert (got[levels.argsort()].diff(dim=0) >= 0).all()


def test_quantiles_of_equal_samples_are_the_sample():
    samples = torch.rand(1000, generator=torch.Generator().manual_seed(0)).expand(3, 1000)
    levels = torch.linspace(0.01, 0.99, 7)
    assert torch.equal(uncertainty.sample_quantiles(samples, levels), samples[[0] * 7])


def test_sample_quantiles_of_extremes():
    largest = torch.finfo(torch.float32).max
    samples = torch.tensor(
        [[-largest, math.inf, 1.0], [largest, math.inf, math.nan], [0.1, 0.0, 2.0]]
    )
    got = uncertainty.sample_quantiles(samples, torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]))
    assert not got[:, 0].isnan().any()
    assert got[[0, -1], 0].tolist() == [-largest, largest]
    assert got[:, 1].tolist() == [0, math.inf, math.inf, math.inf, math.inf]
    assert got[:, 2].isnan().all()


def test_more_samples_than_torch_quantile_takes():
    samples = torch.arange(2**24 + 2, dtype=torch.float32).reshape(-1, 2)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(samples, 0.5)
    got = uncertainty.sample_quantiles(samples, [0.5])
    # [2²³ + 1, 2]: the median of column 0 is number 2²² of 0, 2, 4, ….
    assert got[0, 0].item() == 2**23


def test_sample_interval_is_central():
    samples = torch.arange(101.0)[:, None]
    assert [x.item() for x in uncertainty.sample_interval(samples, 0.8)] == pytest.approx([10, 90])


def test_quantiles_pass_through_vmap():
    means, stds = torch.randn(4, 5, 3, 2), torch.rand(4, 5, 3, 2)
    levels = torch.tensor([0.9, 0.1])
    for f in (
        lambda m, s: uncertainty.mixture_quantiles(m, s, levels),
        lambda m, s: uncertainty.sample_quantiles(m, levels),
        lambda m, s: torch.stack(uncertainty.mixture_interval(m, s, 0.5)),
        lambda m, s: torch.stack(uncertainty.decompose_variance(m, s)),
    ):
        looped = torch.stack([f(m, s) for m, s in zip(means, stds, strict=True)])
        torch.testing.assert_close(vmap(f)(means, stds), looped)


@pytest.mark.compile
def test_quantiles_compile_to_one_graph():
    means, stds = torch.randn(5, 3), torch.rand(5, 3)
    levels = torch.tensor([0.1, 0.9])
    for f in (
        lambda m, s: uncertainty.mixture_quantiles(m, s, levels),
        lambda m, s: uncertainty.sample_quantiles(m, levels),
    ):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(means, stds), f(means, stds))


MEANS = torch.zeros(4, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: uncertainty.decompose_variance(MEANS[0], 1.0),
            ValueError,
            r"`means` has shape \(3,\), expected \[samples, batch, \*out\]",
        ),
        (
            lambda: uncertainty.decompose_variance(MEANS.long(), 1.0),
            TypeError,
            r"`means` is a tensor of torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: uncertainty.decompose_variance(MEANS, torch.ones(4)),
            ValueError,
            r"`variances` has shape \(4,\), expected one that broadcasts to \(4, 3\)",
        ),
        (
            lambda: uncertainty.decompose_variance(MEANS, torch.ones(2, 4, 3)),
            ValueError,
            r"`variances` has shape \(2, 4, 3\), expected one that broadcasts",
        ),
        (
            lambda: uncertainty.decompose_variance(MEANS, -1.0),
            ValueError,
            r"`variances` is -1.0, expected a number that is not negative",
        ),
        (
            lambda: uncertainty.mixture_quantiles(MEANS, [1.0], [0.5]),
            TypeError,
            r"`stds` is a list, expected a number or a floating-point tensor",
        ),
        (
            lambda: uncertainty.mixture_quantiles(MEANS, 1.0, [0.5, 95]),
            ValueError,
            r"`levels` holds 95, expected probabilities between 0 and 1: 0.05 for 5 %",
        ),
        (
            lambda: uncertainty.mixture_quantiles(MEANS, 1.0, [math.nan]),
            ValueError,
            r"`levels` holds nan",
        ),
        (
            lambda: uncertainty.sample_quantiles(MEANS, ["0.5"]),
            TypeError,
            r"`levels` holds a str, expected numbers",
        ),
        (
            lambda: uncertainty.sample_quantiles(MEANS, torch.tensor(0.5)),
            ValueError,
            r"`levels` has shape \(\), expected \[levels\], at least one",
        ),
        (
            lambda: uncertainty.sample_quantiles(MEANS, []),
            ValueError,
            r"`levels` has shape \(0,\), expected \[levels\], at least one",
        ),
        (
            lambda: uncertainty.sample_quantiles(MEANS[:0], [0.5]),
            ValueError,
            r"`samples` has shape \(0, 3\)",
        ),
        (
            lambda: uncertainty.mixture_interval(MEANS, 1.0, 1.0),
            ValueError,
            r"`level` holds 1.0, expected probabilities between 0 and 1",
        ),
        (
            lambda: uncertainty.sample_interval(MEANS, level=True),
            TypeError,
            r"`level` holds a bool",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
