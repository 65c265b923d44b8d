"""Uncertainties of classes, scores: hand-derived cases, float64 references, laws, wrong input."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from torch.func import grad
from torchmetrics.functional.classification import multiclass_calibration_error

from funcbayes.evaluation import uncertainty

LOG2 = math.log(2)
double = partial(torch.tensor, dtype=torch.float64)
# Two members that contradict each other on the first input and agree on the second.
CONTRADICTION = double([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])


@st.composite
def probabilities(draw):
    """Samples of class probabilities, from nearly uniform to nearly one-hot."""
    shape = [draw(st.integers(1, 6)) for _ in range(2)] + [draw(st.integers(2, 7))]
    sharpness = draw(st.sampled_from([1e-4, 1.0, 30.0, 300.0]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = sharpness * torch.randn(shape, generator=gen, dtype=torch.float64)
    return logits, logits.softmax(-1)


def entropy_by_hand(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


def test_uncertainty_of_members_that_contradict_each_other():
    total, epistemic, aleatoric = uncertainty.decompose(CONTRADICTION)
    want = double([LOG2, LOG2])
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(epistemic, want * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(aleatoric, want * torch.tensor([0.0, 1.0]))


@given(probabilities())
def test_decomposition_equals_entropies_computed_one_by_one(case):
    _, probs = case
    total = [entropy_by_hand(row) for row in probs.mean(0).tolist()]
    each = [[entropy_by_hand(row) for row in sample] for sample in probs.tolist()]
    aleatoric = double(each).mean(0)
    epistemic = double(total) - aleatoric
    got = uncertainty.decompose(probs)
    # Sums of at most 6 · 7 terms, each below 1/e, and their difference.
    atol = 64 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(got.total, double(total), rtol=0, atol=atol)
    torch.testing.assert_close(got.aleatoric, aleatoric, rtol=0, atol=atol)
    torch.testing.assert_close(got.epistemic, epistemic.clamp_min(0), rtol=0, atol=atol)


@given(probabilities(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_parts_are_never_negative_and_add_up(case, dtype):
    _, probs = case
    total, epistemic, aleatoric = uncertainty.decompose(probs.to(dtype))
    assert total.dtype == torch.float32
    assert (epistemic >= 0).all()
    assert (aleatoric >= 0).all()
    # Rows in half precision sum to 1 only to its rounding, and the parts count what is left
    # over with different signs.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total, epistemic + aleatoric, rtol=0, atol=16 * eps)


@given(probabilities())
def test_logits_and_their_probabilities_say_the_same(case):
    logits, probs = case
    targets = torch.zeros(probs.shape[1], dtype=torch.int64)
    for f in (
        uncertainty.predictive_entropy,
        uncertainty.expected_entropy,
        uncertainty.mutual_information,
    ):
        torch.testing.assert_close(f(logits, logits=True), f(probs), rtol=1e-9, atol=1e-12)
    for g in (uncertainty.brier_score, uncertainty.expected_calibration_error):
        torch.testing.assert_close(g(logits, targets, logits=True), g(probs, targets))


def test_logits_keep_a_likelihood_that_probabilities_underflow():
    logits = torch.tensor([[[0.0, 2000.0]], [[0.0, 1000.0]]])
    targets = torch.tensor([0])
    got = uncertainty.negative_log_likelihood(logits, targets, logits=True)
    # The mean of e^-2000 and e^-1000.
    torch.testing.assert_close(got, torch.tensor(1000 + LOG2))
    floored = uncertainty.negative_log_likelihood(logits.softmax(-1), targets)
    torch.testing.assert_close(floored, torch.tensor(-math.log(torch.finfo(torch.float32).tiny)))


def test_one_sample_knows_nothing_of_epistemic_uncertainty():
    probs = torch.rand(1, 50, 4).softmax(-1)
    assert not uncertainty.mutual_information(probs).any()
    assert not uncertainty.disagreement(probs).any()
    for metric in ("variance", "disagreement", "kl"):
        assert uncertainty.ensemble_diversity(probs, metric=metric) == 0


def test_small_information_survives_float32():
    # Two coins at 1/2 ± d share d²/(2·¼) nats to leading order; the difference of their
    # entropies would leave rounding of 1e-7.
    d = 1e-3
    probs = torch.tensor([[[0.5 + d, 0.5 - d]], [[0.5 - d, 0.5 + d]]])
    got = uncertainty.mutual_information(probs).item()
    assert got == pytest.approx(2 * d * d, rel=0.05)


@pytest.mark.parametrize("d", [1e-2, 1e-4, 1e-6])
def test_float32_information_is_right_to_its_digits_where_samples_nearly_agree(d):
    gen = torch.Generator().manual_seed(0)
    shift = torch.randn(8, 50, 4, generator=gen, dtype=torch.float64)
    logits = torch.randn(50, 4, generator=gen, dtype=torch.float64) + d * shift
    want = uncertainty.mutual_information(logits, logits=True)
    # Logits of size 1 to 3 are rounded by 2e-7, which is 2e-7 / d of their differences.
    got = uncertainty.mutual_information(logits.float(), logits=True).double()
    torch.testing.assert_close(got, want, rtol=1e-5 + 4e-6 / d, atol=1e-14)


@given(probabilities())
def test_entropies_equal_scipy(case):
    _, probs = case
    total, epistemic, aleatoric = uncertainty.decompose(probs)
    want = torch.as_tensor(scipy_entropy(probs.mean(0).numpy(), axis=-1))
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-14)
    want = torch.as_tensor(scipy_entropy(probs.numpy(), axis=-1).mean(0))
    torch.testing.assert_close(aleatoric, want, rtol=1e-12, atol=1e-14)
    kl = scipy_entropy(probs.numpy(), probs.mean(0, keepdim=True).numpy(), axis=-1)
    torch.testing.assert_close(epistemic, torch.as_tensor(kl.mean(0)), rtol=1e-12, atol=1e-13)


@given(probabilities(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_logits_of_half_precision_give_their_uncertainty(case, dtype):
    logits = case[0].to(dtype)
    want = uncertainty.decompose(logits.double(), logits=True)
    got = uncertainty.decompose(logits, logits=True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        # A log probability of up to 1e3 is rounded by 1e-7 of its size.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_and_zero_probabilities(dtype):
    largest = torch.finfo(dtype).max
    rows = [[largest, -largest, 0.0], [0.0, 0.0, -math.inf], [0.0, largest, largest]]
    logits = torch.tensor([rows, rows[::-1]], dtype=dtype)
    for samples, are_logits in ((logits, True), (logits.softmax(-1), False)):
        total, epistemic, aleatoric = uncertainty.decompose(samples, logits=are_logits)
        # Row 0 meets row 2: one class for certain and two others at even odds.
        three = 0.5 * math.log(2) + 0.5 * math.log(4)
        want = torch.tensor([three, LOG2, three], dtype=total.dtype)
        torch.testing.assert_close(total, want)
        torch.testing.assert_close(
            aleatoric, want * torch.tensor([LOG2 / 2 / three, 1, LOG2 / 2 / three]).to(want.dtype)
        )
        torch.testing.assert_close(epistemic, total - aleatoric)
        assert epistemic[1] == 0
        for f in (
            uncertainty.predictive_entropy,
            uncertainty.mutual_information,
            uncertainty.expected_entropy,
        ):
            g = grad(lambda x, f=f, are_logits=are_logits: f(x, logits=are_logits).sum())(samples)
            assert g.isfinite().all()


def test_one_class_leaves_nothing_uncertain():
    for part in uncertainty.decompose(torch.ones(3, 2, 1)):
        assert not part.any()
    for f in (uncertainty.variation_ratio, uncertainty.disagreement):
        assert not f(torch.ones(3, 2, 1)).any()


def test_nan_is_not_taken_for_a_probability():
    probs = torch.full((2, 2, 3), 1 / 3)
    probs[0, 1, 2] = math.nan
    for part in uncertainty.decompose(probs):
        assert part.isnan().tolist() == [False, True]


def test_variation_ratio_is_the_share_outside_the_mode():
    votes = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 1, 3]])
    samples = torch.nn.functional.one_hot(votes, 4).double()
    got = uncertainty.variation_ratio(samples)
    torch.testing.assert_close(got, double([0.0, 0.5, 0.75]))
    # Monotone in each sample: probabilities and logits vote alike.
    assert torch.equal(uncertainty.variation_ratio(100 * samples), got)
    half = uncertainty.variation_ratio(samples.half())
    assert half.dtype == torch.float32


@given(probabilities())
def test_variation_ratio_and_disagreement_bound_each_other(case):
    _, probs = case
    ratio, differing = uncertainty.variation_ratio(probs), uncertainty.disagreement(probs)
    num = len(probs)
    # Of the ordered pairs, those of a sample in the mode with one outside differ, twice over.
    lower = 2 * ratio * (1 - ratio) * num**2 / max(num * (num - 1), 1)
    assert (differing >= lower - 1e-12).all()
    assert ((ratio == 0) == (differing == 0)).all()


def test_disagreement_is_the_share_of_pairs():
    votes = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 1, 2]])
    samples = torch.nn.functional.one_hot(votes, 3).double()
    got = uncertainty.disagreement(samples)
    pairs = [(s, t) for s in range(4) for t in range(s)]
    want = [sum(int(votes[s, n] != votes[t, n]) for s, t in pairs) / 6 for n in range(3)]
    torch.testing.assert_close(got, double(want))
    got_mean = uncertainty.ensemble_diversity(samples, metric="disagreement")
    torch.testing.assert_close(got_mean, got.mean())


@given(probabilities())
def test_diversity_equals_loops_over_members(case):
    logits, _ = case
    probs = (logits / (1 + logits.abs().max())).softmax(-1)
    num, batch, classes = probs.shape
    if num == 1:
        return
    variance = torch.stack(
        [torch.var(probs[:, n, c]) for n in range(batch) for c in range(classes)]
    ).mean()
    kls = [
        (probs[s] * (probs[s] / probs[t]).log()).sum(-1).mean()
        for s in range(num)
        for t in range(num)
        if s != t
    ]
    got = uncertainty.ensemble_diversity(probs)
    torch.testing.assert_close(got, variance, rtol=1e-12, atol=1e-15)
    got = uncertainty.ensemble_diversity(probs, metric="kl")
    torch.testing.assert_close(got, torch.stack(kls).mean(), rtol=1e-9, atol=1e-14)


def test_divergence_where_probabilities_are_zero():
    everywhere = double([[[0.5, 0.5, 0.0]], [[0.25, 0.75, 0.0]]])
    want = 0.5 * (
        0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    )
    got = uncertainty.ensemble_diversity(everywhere, metric="kl").item()
    assert got == pytest.approx(want, rel=1e-12)
    assert uncertainty.ensemble_diversity(CONTRADICTION, metric="kl") == math.inf


def test_scores_of_a_hand_made_batch():
    probs = double([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]])
    targets = torch.tensor([0, 2, 1])
    nll = -(math.log(0.7) + math.log(0.8) + math.log(0.3)) / 3
    brier = (0.09 + 0.04 + 0.01 + 0.01 + 0.01 + 0.04 + 0.36 + 0.49 + 0.01) / 3
    for samples in (probs, probs.expand(4, 3, 3)):
        got = uncertainty.negative_log_likelihood(samples, targets)
        assert got.item() == pytest.approx(nll, rel=1e-12)
        assert uncertainty.brier_score(samples, targets).item() == pytest.approx(brier, rel=1e-12)


def test_scores_are_those_of_the_mean_and_not_the_mean_of_scores():
    targets = torch.tensor([0, 1])
    got = uncertainty.negative_log_likelihood(CONTRADICTION, targets)
    assert got.item() == pytest.approx(LOG2, rel=1e-12)
    assert uncertainty.brier_score(CONTRADICTION, targets).item() == pytest.approx(0.5, rel=1e-12)


def test_calibration_error_by_hand():
    # Bins of a quarter: confidences .6 and .7 (one right of two), .9 (right) and 1 (wrong).
    confidence = double([0.6, 0.7, 0.9, 1.0])
    probs = torch.stack([confidence, 1 - confidence], -1)
    targets = torch.tensor([0, 1, 0, 1])
    bins = uncertainty.reliability_bins(probs, targets, num_bins=4)
    assert bins.counts.tolist() == [0, 0, 2, 2]
    torch.testing.assert_close(bins.confidence, double([0.0, 0.0, 0.65, 0.95]))
    torch.testing.assert_close(bins.accuracy, double([0.0, 0.0, 0.5, 0.5]))
    got = uncertainty.expected_calibration_error(probs, targets, num_bins=4)
    assert got.item() == pytest.approx(0.5 * 0.15 + 0.5 * 0.45, rel=1e-12)


@given(probabilities(), st.integers(1, 20))
def test_calibration_error_equals_torchmetrics(case, num_bins):
    _, probs = case
    # torchmetrics computes in float32, where 1 − 1e-9 would be the edge 1.
    mean = probs.mean(0).float()
    targets = torch.arange(len(mean)) % mean.shape[1]
    got = uncertainty.expected_calibration_error(mean, targets, num_bins=num_bins)
    if (mean.max(-1).values < 1).all():
        want = multiclass_calibration_error(mean, targets, mean.shape[1], n_bins=num_bins)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_bin_above():
    probs = torch.tensor([[0.5, 0.5]])
    bins = uncertainty.reliability_bins(probs, torch.tensor([0]), num_bins=2)
    assert bins.counts.tolist() == [0, 1]


def test_every_function_passes_through_vmap_and_grad():
    stack = torch.randn(3, 5, 4, 6, dtype=torch.float64).softmax(-1)
    targets = torch.randint(6, (3, 4))
    for f in (
        uncertainty.predictive_entropy,
        uncertainty.mutual_information,
        uncertainty.disagreement,
        uncertainty.variation_ratio,
        uncertainty.ensemble_diversity,
    ):
        looped = torch.stack([f(one) for one in stack])
        torch.testing.assert_close(torch.vmap(f)(stack), looped)
    for g in (
        uncertainty.negative_log_likelihood,
        uncertainty.brier_score,
        uncertainty.expected_calibration_error,
    ):
        looped = torch.stack([g(*pair) for pair in zip(stack, targets, strict=True)])
        torch.testing.assert_close(torch.vmap(g)(stack, targets), looped)
    gradient = torch.func.grad(lambda p: uncertainty.mutual_information(p).sum())(stack[0])
    assert gradient.isfinite().all()


PROBS = torch.full((2, 3, 4), 0.25)
TARGETS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: uncertainty.predictive_entropy(PROBS[0]),
            ValueError,
            r"`samples` has shape \(3, 4\), expected \[samples, batch, classes\]",
        ),
        (
            lambda: uncertainty.mutual_information(PROBS[:0]),
            ValueError,
            r"`samples` has shape \(0, 3, 4\).*none of them 0",
        ),
        (
            lambda: uncertainty.disagreement(PROBS.long()),
            TypeError,
            r"`samples` is a tensor of torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: uncertainty.expected_entropy(PROBS.tolist()),
            TypeError,
            r"`samples` is a list, expected a floating-point tensor",
        ),
        (
            lambda: uncertainty.ensemble_diversity(PROBS, metric="cosine"),
            ValueError,
            r"`metric` is 'cosine', expected 'variance', 'disagreement' or 'kl'",
        ),
        (
            lambda: uncertainty.negative_log_likelihood(PROBS, TARGETS.float()),
            TypeError,
            r"`targets` is a tensor of torch.float32.*use `targets.long\(\)`",
        ),
        (
            lambda: uncertainty.brier_score(PROBS, TARGETS[:2]),
            ValueError,
            r"`targets` has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: uncertainty.expected_calibration_error(PROBS, TARGETS, num_bins=0),
            ValueError,
            r"`num_bins` is 0, expected at least 1",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
