"""Statistics of the normal numbers that samples are drawn from.

Each test looks at one fixed set of numbers, so it cannot fail by chance from run to run; a correct
generator passes for a seed chosen beforehand but for the stated probability. A statistic that is
standard normal fails beyond 5, 6e-7 both sides together; other tests are made at 1e-6.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from funcbayes.core import random, workers

FALSE_ALARM = 1e-6
# Lags at which the transform's structure would show: neighbours, the halves of a block, which
# share their radii, and whole blocks; in float64 a block has half as many numbers.
BLOCK = random._BLOCK_BYTES // 4
LAGS = [*range(1, 9), BLOCK // 4, BLOCK // 2 - 1, BLOCK // 2, BLOCK // 2 + 1, BLOCK]
ROWS, LENGTH = 20, 3 * BLOCK


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["32", "64"])
def rows(request):
    """Several whole blocks in each row, drawn in threads, in float64."""
    assert LENGTH > workers.THREADS_FROM
    return random.normal_rows(2024, 0, ROWS, LENGTH, dtype=request.param).double().numpy()


def moment(order: int) -> float:
    return 0.0 if order % 2 else float(math.prod(range(order - 1, 0, -2)))


@pytest.mark.parametrize("order", range(1, 9))
def test_moments(rows, order):
    spread = math.sqrt((moment(2 * order) - moment(order) ** 2) / rows.size)
    assert abs((rows**order).mean() - moment(order)) < 5 * spread


def test_the_distribution_function(rows):
    """Kolmogorov–Smirnov, with the limit distribution's bound for a large n."""
    below = stats.norm.cdf(np.sort(rows.ravel()))
    n = below.size
    steps = np.arange(n) / n
    distance = max(np.max(below - steps), np.max(steps + 1 / n - below))
    assert distance * math.sqrt(n) < math.sqrt(-math.log(FALSE_ALARM / 2) / 2)


@pytest.mark.parametrize("threshold", [3.0, 4.0, 4.5, 5.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_as_many_numbers_lie_in_the_tails_as_should(rows, threshold, side):
    found = int((side * rows > threshold).sum())
    expected = stats.poisson(rows.size * stats.norm.sf(threshold))
    assert expected.sf(found - 1) > FALSE_ALARM / 2
    assert expected.cdf(found) > FALSE_ALARM / 2


def test_the_tail_beyond_four_deviations_has_the_normal_shape(rows):
    beyond = np.abs(rows[np.abs(rows) > 4])
    assert stats.kstest(stats.norm.sf(beyond) / stats.norm.sf(4), "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("power", [1, 2])
def test_numbers_of_a_row_do_not_depend_on_one_another(rows, lag, power):
    # Squares too: what shares a radius and nothing else is uncorrelated but for those.
    x = rows**power - moment(power)
    products = x[:, lag:] * x[:, :-lag]
    spread = (moment(2 * power) - moment(power) ** 2) / math.sqrt(products.size)
    assert abs(products.mean()) < 5 * spread


@pytest.mark.parametrize("power", [1, 2])
def test_rows_do_not_depend_on_one_another(rows, power):
    x = rows**power - moment(power)
    between = (x @ x.T / math.sqrt(LENGTH) / (moment(2 * power) - moment(power) ** 2))[
        ~np.eye(ROWS, dtype=bool)
    ]
    assert np.abs(between).max() < 5


def test_rows_are_the_same_whatever_the_threads_the_chunk_and_the_order(rows):
    dtype = torch.float32 if (rows == rows.astype(np.float32)).all() else torch.float64
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start, stop in ((7, 9), (0, 1), (19, 20)):
            part = random.normal_rows(2024, start, stop, LENGTH, dtype=dtype)
            assert (part.double().numpy() == rows[start:stop]).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_far_tails_of_many_numbers():
    threshold, found, size, n = 5.5, 0, 10_000_000, 0
    for seed in range(40):
        z = random.normal(seed, (size,))
        found += int((z.abs() > threshold).sum())
        n += size
    expected = stats.poisson(2 * n * stats.norm.sf(threshold))
    assert expected.sf(found - 1) > FALSE_ALARM / 2
    assert expected.cdf(found) > FALSE_ALARM / 2
