"""Conformal sets and intervals: coverage by simulation, exact ranks, ties, wrong input."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import funcbayes as fb
from funcbayes import conformal

F64 = torch.float64


def gen(seed):
    return torch.Generator().manual_seed(seed)


def classification(rows, classes=4, *, seed=0, temperature=1.0, decimals=None, dtype=F64):
    """Probabilities and targets drawn from them, tempered: a model that is wrong if not 1."""
    logits = 1.5 * torch.randn(rows, classes, generator=gen(seed), dtype=F64)
    probs = (logits / temperature).softmax(-1)
    targets = fb.likelihoods.Categorical().sample(seed, logits)
    if decimals is not None:
        # Multiples of a power of two, which float64 adds without rounding.
        probs = (probs * 2**decimals).round() / 2**decimals
        largest = probs.argmax(-1, keepdim=True)
        probs.scatter_add_(-1, largest, 1 - probs.sum(-1, keepdim=True))
    return probs.to(dtype), targets


def rank(n, alpha):
    return math.ceil((n + 1) * (1 - Fraction(str(alpha))))


def coverage_z(hits, n, alpha):
    """z of covered test rows `[runs, tests]` against the exact coverage of distinct scores.

    The coverage of one calibration set is Beta(k, n + 1 − k), its mean k/(n + 1); the test rows
    of one run share it.
    """
    runs, tests = hits.shape
    k = rank(n, alpha)
    p = k / (n + 1)
    spread = p * (1 - p) / (n + 2)
    variance = p * (1 - p) / tests + spread * (1 - 1 / tests)
    return (hits.to(F64).mean().item() - p) / math.sqrt(variance / runs), p


# Coverage


@pytest.mark.parametrize("score", ["absolute", "normalized", "quantile"])
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.1), (9, 0.1), (50, 0.05), (24, 0.5), (3, 0.3)])
def test_intervals_cover_with_the_stated_probability(score, n, alpha):
    # 4000 independent runs as outputs; the model's means and widths are wrong on purpose.
    runs, tests = 4000, 3
    noise = torch.randn(n + tests, runs, generator=gen(n), dtype=F64)
    scale = torch.rand(n + tests, runs, generator=gen(n + 1), dtype=F64) + 0.1
    mean = torch.randn(n + tests, runs, generator=gen(n + 2), dtype=F64)
    y = 0.7 * mean + scale.square() * (noise.exp() - 1)
    if score == "quantile":
        lower, upper = mean - 0.5 * scale, mean + scale
        state = conformal.fit_quantile_intervals(lower[:n], upper[:n], y[:n], alpha=alpha)
        low, high = conformal.quantile_intervals(state, lower[n:], upper[n:])
    else:
        std = scale if score == "normalized" else None
        train, test = (None, None) if std is None else (std[:n], std[n:])
        state = conformal.fit_intervals(mean[:n], y[:n], alpha=alpha, scale=train)
        low, high = conformal.intervals(state, mean[n:], scale=test)
    assert state.score == score
    assert state.threshold.shape == (runs,)
    hits = ((low <= y[n:]) & (y[n:] <= high)).T
    z, p = coverage_z(hits, n, alpha)
    assert abs(z) < 5
    # The standard error is at most 0.5 %: the neighbouring ranks, 1/(n + 1) off, would be seen.
    assert 1 - alpha <= p <= 1 - alpha + 1 / (n + 1)


@pytest.mark.parametrize(
    ("score", "key"), [("lac", None), ("aps", None), ("aps", 7)], ids=["lac", "aps", "random aps"]
)
def test_sets_cover_with_the_stated_probability(score, key):
    runs, n, tests, alpha = 1000, 29, 20, 0.15
    probs, targets = classification(runs * (n + tests), temperature=0.6)
    probs, targets = probs.reshape(runs, n + tests, 4), targets.reshape(runs, n + tests)
    hits = []
    for run in range(runs):
        # A key of its own for each run, or all runs share their random numbers.
        own = None if key is None else fb.random.fold_in(key, run)
        state = conformal.fit_sets(
            probs[run, :n], targets[run, :n], alpha=alpha, score=score, key=own
        )
        sets = conformal.sets(state, probs[run, n:], key=own)
        hits.append(sets.gather(-1, targets[run, n:, None]).squeeze(-1))
    z, _ = coverage_z(torch.stack(hits), n, alpha)
    assert abs(z) < 5


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_ties_only_raise_the_coverage(score):
    # Probabilities are multiples of ¼, so many scores are equal.
    runs, n, alpha = 1500, 9, 0.2
    probs, targets = classification(runs * (n + 10), decimals=2)
    probs, targets = probs.reshape(runs, n + 10, 4), targets.reshape(runs, n + 10)
    hits = []
    for run in range(runs):
        state = conformal.fit_sets(probs[run, :n], targets[run, :n], alpha=alpha, score=score)
        sets = conformal.sets(state, probs[run, n:])
        hits.append(sets.gather(-1, targets[run, n:, None]).squeeze(-1))
    z, _ = coverage_z(torch.stack(hits), n, alpha)
    assert z > -5
    assert z > 5  # and here they raise it by a lot


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_target_that_ties_with_the_threshold_is_covered(dtype):
    # Whole targets about means of many digits: the new row equals a calibration row, and
    # rounding may not push its target out.
    mean = (100 * torch.rand(500, generator=gen(0))).to(dtype)
    y = (mean.double() + 10 * torch.randn(500, generator=gen(1), dtype=F64)).round().to(dtype)
    state = conformal.fit_intervals(mean, y, alpha=0.002)
    lower, upper = conformal.intervals(state, mean)
    worst = (y.double() - mean.double()).abs() <= state.threshold
    assert worst.sum() >= 499
    if dtype != F64:
        y = y.to(lower.dtype)
        assert torch.equal((lower <= y) & (y <= upper), worst)


def test_repeated_rows_are_all_covered():
    probs, targets = classification(1, seed=3)
    for score, key in (("lac", None), ("aps", None)):
        state = conformal.fit_sets(
            probs.repeat(50, 1), targets.repeat(50), alpha=0.1, score=score, key=key
        )
        assert conformal.sets(state, probs)[0, targets[0]]


# Ranks


@given(st.integers(1, 400), st.integers(1, 999))
def test_threshold_has_the_exact_rank(n, thousandths):
    alpha = thousandths / 1000
    k = math.ceil((n + 1) * (1 - Fraction(thousandths, 1000)))
    residuals = torch.randperm(n, generator=gen(n)).to(F64)
    if k > n:
        with pytest.raises(ValueError, match=f"there are {n} calibration rows, expected at least"):
            conformal.fit_intervals(residuals, torch.zeros(n, dtype=F64), alpha=alpha)
        return
    state = conformal.fit_intervals(residuals, torch.zeros(n, dtype=F64), alpha=alpha)
    assert state.threshold.item() == k - 1
    # NumPy's interpolation-free quantile at the level k/n, which a rounded level may miss by one.
    if n == 400:
        level = min(k / n, 1.0)
        assert abs(np.quantile(residuals.numpy(), level, method="higher") - (k - 1)) <= 1


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.7), (9, 0.1), (19, 0.05), (99, 0.01), (2, 1 / 3)])
def test_whole_ranks_are_not_rounded_up(n, alpha):
    # (n + 1)(1 − alpha) is whole, and in floating point now and then a little more.
    residuals = torch.arange(n, dtype=F64)
    state = conformal.fit_intervals(residuals, torch.zeros_like(residuals), alpha=alpha)
    assert state.threshold.item() == round((n + 1) * (1 - alpha)) - 1


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.1, 9), (0.05, 19), (1e-3, 999), (0.3, 3), (1 / 3, 2)]
)
def test_too_few_rows_are_refused_with_the_number_needed(alpha, needed):
    for n in (needed - 1, needed):
        mean = torch.zeros(n)
        probs = torch.full((n, 2), 0.5)
        calls = [
            lambda m=mean: conformal.fit_intervals(m, m, alpha=alpha),
            lambda m=mean: conformal.fit_quantile_intervals(m, m, m, alpha=alpha),
            lambda p=probs: conformal.fit_sets(p, p[:, 0].long(), alpha=alpha),
        ]
        for call in calls:
            if n == needed:
                call()
                continue
            message = (
                f"there are {n} calibration rows, expected at least {needed} for `alpha` {alpha}"
            )
            with pytest.raises(ValueError, match=message):
                call()


# Scores


def test_lac_sets_hold_the_classes_of_high_probability():
    probs, targets = classification(200)
    state = conformal.fit_sets(probs, targets, alpha=0.1)
    own = probs.gather(-1, targets[:, None]).squeeze(-1)
    bound = own.sort(descending=True).values[rank(200, 0.1) - 1]
    new, _ = classification(50, seed=1)
    # 1 − p rounds at 1, so at the bound two probabilities may look the same.
    clear = (new - bound).abs() > 1e-12
    assert torch.equal(conformal.sets(state, new)[clear], (new >= bound)[clear])


@given(st.integers(0, 2**32), st.booleans())
def test_aps_scores_equal_a_loop_over_classes(seed, with_ties):
    probs, targets = classification(12, 5, seed=seed, decimals=3 if with_ties else None)
    scores = []
    for row in probs.tolist():
        order = sorted(range(5), key=lambda c, row=row: (-row[c], c))
        mass = [sum(row[d] for d in order[: order.index(c) + 1]) for c in range(5)]
        scores.append([m / mass[order[-1]] for m in mass])
    own = sorted(scores[n][y] for n, y in enumerate(targets.tolist()))
    state = conformal.fit_sets(probs, targets, alpha=0.2, score="aps")
    threshold = own[rank(12, 0.2) - 1]
    assert state.threshold.item() == pytest.approx(threshold, rel=1e-15)
    want = torch.tensor(scores, dtype=F64) <= threshold + 1e-14
    assert torch.equal(conformal.sets(state, probs), want)
    # Nested: what is in the set is more probable than what is not.
    inside = torch.where(want, probs, math.inf).amin(-1)
    assert (inside >= torch.where(want, -math.inf, probs).amax(-1)).all()


def test_a_threshold_of_one_lets_every_class_in():
    # Whatever the rounding of the rows' sums: half of them are a little above 1.
    probs, _ = classification(1000, 7, dtype=torch.float32)
    sums = probs.double().sum(-1)
    assert (sums > 1).any()
    assert (sums < 1).any()
    state = conformal.fit_sets(probs, probs.argmin(-1), alpha=0.1, score="aps")
    assert state.threshold == 1
    assert conformal.sets(state, probs).all()


def test_random_aps_gives_smaller_sets():
    probs, targets = classification(500)
    new, _ = classification(500, seed=1)
    plain = conformal.fit_sets(probs, targets, alpha=0.1, score="aps")
    drawn = conformal.fit_sets(probs, targets, alpha=0.1, score="aps", key=0)
    assert (plain.score, drawn.score) == ("aps", "randomized aps")
    sizes = [conformal.sets(plain, new).sum(), conformal.sets(drawn, new, key=0).sum()]
    assert sizes[1] < sizes[0]


def test_random_sets_are_functions_of_the_key():
    probs, targets = classification(200)
    before = torch.get_rng_state()
    states = [conformal.fit_sets(probs, targets, alpha=0.1, score="aps", key=k) for k in (0, 0, 1)]
    assert states[0].threshold == states[1].threshold != states[2].threshold
    sets = [conformal.sets(states[0], probs, key=k) for k in (0, fb.random.key(0), 1)]
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0], sets[2])
    assert torch.equal(before, torch.get_rng_state())


def test_a_random_set_of_a_calibration_row_uses_other_numbers():
    # With one key in both calls the test rows must not meet the calibration rows' numbers: the
    # row at the threshold would always be covered, the next one never.
    probs = torch.tensor([[0.6, 0.4]], dtype=F64).repeat(20, 1)
    targets = torch.zeros(20, dtype=torch.int64)
    hits = []
    for k in range(300):
        state = conformal.fit_sets(probs, targets, alpha=0.5, score="aps", key=k)
        hits.append(conformal.sets(state, probs, key=k)[:, 0].sum().item())
    # ⌈21/2⌉ = 11 of 20 every time, if they did.
    assert len(set(hits)) > 5


def test_normalised_intervals_follow_the_scale():
    mean, y = torch.zeros(99, dtype=F64), torch.linspace(-1, 1, 99, dtype=F64)
    scale = torch.full((99,), 0.5, dtype=F64)
    state = conformal.fit_intervals(mean, y, alpha=0.1, scale=scale)
    wide = conformal.intervals(state, mean[:2], scale=torch.tensor([1.0, 3.0], dtype=F64))
    assert wide.upper[1] == pytest.approx(3 * wide.upper[0])
    plain = conformal.fit_intervals(mean, y, alpha=0.1)
    got = conformal.intervals(plain, mean[:1]).upper
    torch.testing.assert_close(got, 0.5 * wide.upper[:1])
    torch.testing.assert_close(got, plain.threshold[None])


def test_too_wide_intervals_are_narrowed_and_never_cross():
    y = torch.zeros(99)
    state = conformal.fit_quantile_intervals(y - 2, y + 3, y, alpha=0.1)
    assert state.threshold == -2
    lower, upper = conformal.quantile_intervals(
        state, torch.tensor([-2.0, 0.0]), torch.tensor([3.0, 1.0])
    )
    assert lower.tolist() == [0, 0.5]
    assert upper.tolist() == [1, 0.5]


def test_a_row_of_nan_excludes_nothing():
    probs, targets = classification(100)
    new = torch.tensor([[0.9, 0.1, 0.0, 0.0], [math.nan] * 4], dtype=F64)
    for score in ("lac", "aps"):
        state = conformal.fit_sets(probs, targets, alpha=0.3, score=score)
        sets = conformal.sets(state, new)
        assert sets.all(-1).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    probs, targets = classification(100, dtype=dtype)
    state = conformal.fit_sets(probs, targets.int(), alpha=0.1, score="aps")
    assert state.threshold.dtype == F64
    assert conformal.sets(state, probs).dtype == torch.bool
    mean = torch.zeros(20, 3, dtype=dtype)
    state = conformal.fit_intervals(mean, mean + 1, alpha=0.1, scale=mean + 1)
    lower, upper = conformal.intervals(state, mean, scale=mean + 1)
    assert lower.dtype == upper.dtype == torch.float32
    assert lower.shape == upper.shape == (20, 3)


# Laws


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_order_of_the_rows_does_not_matter_and_nothing_is_written(score):
    probs, targets = classification(60)
    copies = probs.clone(), targets.clone()
    order = torch.randperm(60, generator=gen(0))
    state = conformal.fit_sets(probs, targets, alpha=0.1, score=score)
    again = conformal.fit_sets(probs[order], targets[order], alpha=0.1, score=score)
    assert torch.equal(state.threshold, again.threshold)
    sets = conformal.sets(state, probs)
    assert torch.equal(sets[order], conformal.sets(state, probs[order]))
    assert torch.equal(probs, copies[0])
    assert torch.equal(targets, copies[1])


def test_smaller_alpha_gives_larger_sets_and_wider_intervals():
    probs, targets = classification(300)
    alphas = (0.5, 0.2, 0.1, 0.01)
    for score in ("lac", "aps"):
        sets = [
            conformal.sets(conformal.fit_sets(probs, targets, alpha=a, score=score), probs)
            for a in alphas
        ]
        for small, large in pairwise(sets):
            assert (small <= large).all()


def test_outputs_have_a_threshold_each():
    mean, y = torch.zeros(40, 3, 2), torch.randn(40, 3, 2, generator=gen(0))
    state = conformal.fit_intervals(mean, y, alpha=0.1)
    for i in range(3):
        one = conformal.fit_intervals(mean[:, i], y[:, i], alpha=0.1)
        assert torch.equal(one.threshold, state.threshold[i])


def test_prediction_passes_through_vmap():
    probs, targets = classification(80)
    stack = probs.reshape(4, 20, 4)
    for score in ("lac", "aps"):
        state = conformal.fit_sets(probs, targets, alpha=0.1, score=score)
        mapped = vmap(lambda p, state=state: conformal.sets(state, p))(stack)
        assert torch.equal(mapped.flatten(0, 1), conformal.sets(state, probs))
    y = torch.randn(4, 20, generator=gen(0))
    state = conformal.fit_intervals(y[0], y[1], alpha=0.1)
    mapped = vmap(lambda m: torch.stack(conformal.intervals(state, m)))(y)
    looped = torch.stack([torch.stack(conformal.intervals(state, m)) for m in y])
    assert torch.equal(mapped, looped)


@pytest.mark.compile
def test_prediction_compiles_to_one_graph():
    probs, targets = classification(80)
    state = conformal.fit_sets(probs, targets, alpha=0.1, score="aps")
    compiled = torch.compile(
        lambda p: conformal.sets(state, p), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(probs), conformal.sets(state, probs))


def test_states_are_saved_and_loaded(tmp_path):
    probs, targets = classification(80)
    mean = torch.zeros(20, 3)
    for state in (
        conformal.fit_sets(probs, targets, alpha=0.1, score="aps", key=0),
        conformal.fit_intervals(mean, mean + 1, alpha=0.1),
        conformal.fit_quantile_intervals(mean, mean, mean, alpha=0.1),
    ):
        fb.save(tmp_path / "state.safetensors", state)
        loaded = fb.load(tmp_path / "state.safetensors", types=(type(state),))
        assert type(loaded) is type(state)
        assert loaded.score == state.score
        assert torch.equal(loaded.threshold, state.threshold)


# Messages

PROBS, TARGETS = torch.full((20, 4), 0.25), torch.zeros(20, dtype=torch.int64)
MEAN = torch.zeros(20)
NAN = torch.where(torch.arange(20) == 3, math.nan, 0.25)
SETS = conformal.SetsState(torch.tensor(0.5, dtype=F64), "aps")
DRAWN = conformal.SetsState(torch.tensor(0.5, dtype=F64), "randomized aps")
PLAIN = conformal.IntervalsState(torch.tensor(0.5, dtype=F64), "absolute")
SCALED = conformal.IntervalsState(torch.tensor(0.5, dtype=F64), "normalized")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: conformal.fit_sets(PROBS, TARGETS, alpha=0.0),
            ValueError,
            "`alpha` is 0.0, expected a number between 0 and 1: the share of targets",
        ),
        (
            lambda: conformal.fit_sets(PROBS, TARGETS, alpha=90),
            ValueError,
            "`alpha` is 90, expected .*0.1 for a coverage of 90 %",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, MEAN, alpha=math.nan),
            ValueError,
            "`alpha` is nan, expected a number between 0 and 1",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, MEAN, alpha="0.1"),
            TypeError,
            "`alpha` is a str, expected a number",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, MEAN, alpha=True),
            TypeError,
            "`alpha` is a bool, expected a number",
        ),
        (
            lambda: conformal.fit_sets(PROBS, TARGETS, alpha=0.1, score="raps"),
            ValueError,
            "`score` is 'raps', expected 'lac' or 'aps'",
        ),
        (
            lambda: conformal.fit_sets(PROBS, TARGETS, alpha=0.1, key=0),
            ValueError,
            "`key` was given, but the score 'lac' is not random: leave it out",
        ),
        (
            lambda: conformal.fit_sets(PROBS * NAN[:, None], TARGETS, alpha=0.1),
            ValueError,
            "row 0 of `probs` sums to 0.25 .*apply softmax to logits, and look for NaN",
        ),
        (
            lambda: conformal.fit_sets(PROBS + NAN[:, None] - 0.25, TARGETS, alpha=0.1),
            ValueError,
            "row 3 of `probs` sums to nan",
        ),
        (
            lambda: conformal.fit_sets(PROBS[None], TARGETS, alpha=0.1),
            ValueError,
            r"`probs` has shape \(1, 20, 4\), expected \[batch, classes\].*average posterior",
        ),
        (
            lambda: conformal.fit_sets(PROBS.long(), TARGETS, alpha=0.1),
            TypeError,
            "`probs` is a tensor of torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: conformal.fit_sets(PROBS, TARGETS.float(), alpha=0.1),
            TypeError,
            r"`targets` is a tensor of torch.float32, .*targets.long\(\)",
        ),
        (
            lambda: conformal.fit_sets(PROBS, TARGETS[:3], alpha=0.1),
            ValueError,
            r"`targets` has shape \(3,\), expected \(20,\)",
        ),
        (
            lambda: conformal.fit_sets(PROBS, TARGETS - 1, alpha=0.1),
            ValueError,
            "`targets` lie between -1 and -1, expected 0 to 3",
        ),
        (
            lambda: conformal.sets(PLAIN, PROBS),
            TypeError,
            "`state` is a IntervalsState, expected the result of fit_sets",
        ),
        (
            lambda: conformal.sets(DRAWN, PROBS),
            ValueError,
            "`key` is None, but the state was fitted with one: give a key",
        ),
        (
            lambda: conformal.sets(SETS, PROBS, key=0),
            ValueError,
            "`key` is 0, but the state was fitted without one: leave it out",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, MEAN[:, None], alpha=0.1),
            ValueError,
            r"`targets` has shape \(20, 1\), expected \(20,\), the shape of `mean`",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, TARGETS, alpha=0.1),
            TypeError,
            "`targets` is a tensor of torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, NAN, alpha=0.1),
            ValueError,
            "`targets` holds 1 NaN or infinite values of 20, expected finite ones",
        ),
        (
            lambda: conformal.fit_intervals(MEAN, MEAN, alpha=0.1, scale=MEAN),
            ValueError,
            "`scale` is 0 at its smallest, expected positive numbers",
        ),
        (
            lambda: conformal.fit_intervals(MEAN[:0], MEAN[:0], alpha=0.1),
            ValueError,
            r"`mean` has shape \(0,\), expected \[batch, \*out\], none of them 0",
        ),
        (
            lambda: conformal.fit_quantile_intervals(MEAN, NAN, MEAN, alpha=0.1),
            ValueError,
            "`upper` holds 1 NaN or infinite values of 20",
        ),
        (
            lambda: conformal.intervals(SETS, MEAN),
            TypeError,
            "`state` is a SetsState, expected the result of fit_intervals",
        ),
        (
            lambda: conformal.quantile_intervals(PLAIN, MEAN, MEAN),
            ValueError,
            "fitted to the score 'absolute', expected the result of fit_quantile_intervals",
        ),
        (
            lambda: conformal.intervals(SCALED, MEAN),
            ValueError,
            "`scale` is None, but the state was fitted with one: give it here too",
        ),
        (
            lambda: conformal.intervals(PLAIN, MEAN, scale=MEAN),
            ValueError,
            "`scale` is given, but the state was fitted without one: leave it out",
        ),
        (
            lambda: conformal.intervals(PLAIN, torch.zeros(20, 3)),
            ValueError,
            r"`mean` has shape \(20, 3\), expected \[batch, \*\(\)\], the outputs",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
