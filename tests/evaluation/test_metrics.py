"""Metrics of classes and scores: definitions, hand-derived values, peers, wrong input."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from funcbayes.evaluation import metrics
from funcbayes.extras import needs_extra


@st.composite
def classified(draw):
    """Probabilities and targets of a batch that holds every class."""
    classes = draw(st.integers(2, 6))
    batch = draw(st.integers(classes, 40))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 3 * torch.randn(batch, classes, generator=gen, dtype=torch.float64)
    targets = torch.arange(batch) % classes
    return logits.softmax(-1), targets


@given(classified())
def test_figures_equal_scikit_learn(case):
    probs, targets = case
    p, y = probs.numpy(), targets.numpy()
    labels = np.arange(p.shape[1])
    got = metrics.classification(probs, targets)
    assert got.accuracy == pytest.approx(accuracy_score(y, p.argmax(1)), rel=1e-6)
    assert got.nll == pytest.approx(log_loss(y, p, labels=labels), rel=1e-12)
    # For two classes scikit-learn halves the score unless told not to.
    want = brier_score_loss(np.eye(len(labels))[y], p, scale_by_half=False)
    assert got.brier == pytest.approx(want, rel=1e-12)


@given(classified(), st.integers(1, 20))
def test_calibration_error_equals_torchmetrics(case, num_bins):
    probs, targets = case
    got = metrics.expected_calibration_error(probs, targets, num_bins=num_bins)
    want = multiclass_calibration_error(probs, targets, probs.shape[1], n_bins=num_bins)
    # torchmetrics sums in float32.
    assert got == pytest.approx(want.item(), abs=1e-6)


@given(classified(), st.integers(1, 20))
def test_calibration_errors_equal_their_definitions(case, num_bins):
    probs, targets = case
    rows = [
        (max(p), p.index(max(p)) == y)
        for p, y in zip(probs.tolist(), targets.tolist(), strict=True)
    ]
    by_width = [min(int(conf * num_bins), num_bins - 1) for conf, _ in rows]
    # 1 / num_bins is not a float: a confidence within a rounding of an edge has no known bin.
    edges = np.arange(num_bins + 1) / num_bins
    assume(all(abs(edges - conf).min() > 1e-12 for conf, _ in rows))
    rank = np.argsort(np.argsort([conf for conf, _ in rows]))
    by_mass = [r * num_bins // len(rows) for r in rank]
    sizes = np.bincount(by_mass, minlength=num_bins)
    assert max(sizes) - min(sizes) <= 1
    for function, bins in (
        (metrics.expected_calibration_error, by_width),
        (metrics.adaptive_calibration_error, by_mass),
    ):
        want = 0.0
        for b in set(bins):
            inside = [row for row, i in zip(rows, bins, strict=True) if i == b]
            gap = np.mean([right for _, right in inside]) - np.mean([conf for conf, _ in inside])
            want += len(inside) / len(rows) * abs(gap)
        assert function(probs, targets, num_bins=num_bins) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("confidences", [[3, 3, 3, 3, 3], [2, 3, 3, 3, 2], [3, 2, 3, 3, 3, 2]])
@pytest.mark.parametrize("num_bins", [1, 2, 3, 4])
def test_adaptive_bins_split_equal_confidences_evenly(confidences, num_bins):
    # Every order of equal confidences, then the gap of the mean accuracy over these orders.
    conf = torch.tensor(confidences, dtype=torch.float64) / 4
    targets = torch.tensor([0, 1, 1, 0, 0, 1][: len(conf)])
    probs = torch.stack([conf, 1 - conf], 1)
    orders = [
        order
        for order in itertools.permutations(range(len(conf)))
        if all(conf[a] <= conf[b] for a, b in itertools.pairwise(order))
    ]
    want = 0.0
    for b in range(num_bins):
        places = [i for i in range(len(conf)) if i * num_bins // len(conf) == b]
        gaps = [(targets[o[i]] == 0).item() - conf[o[i]].item() for o in orders for i in places]
        want += abs(sum(gaps)) / len(orders) / len(conf)
    got = metrics.adaptive_calibration_error(probs, targets, num_bins=num_bins)
    assert got == pytest.approx(want, abs=1e-12)
    # With probabilities of ½ the most probable class would depend on the order of classes.
    assert got == metrics.adaptive_calibration_error(
        probs.flip(0), targets.flip(0), num_bins=num_bins
    )


def test_adaptive_calibration_error_by_hand():
    # Two bins: (.5 wrong, .75 right) and (.75 right, 1 right): (|1 − 1.25| + |2 − 1.75|) / 4.
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]])
    targets = torch.tensor([0, 1, 1, 0])
    assert metrics.adaptive_calibration_error(probs, targets, num_bins=2) == 0.125
    # More bins than data: each datum is a bin.
    want = (0 + 0.5 + 0.25 + 0.25) / 4
    assert metrics.adaptive_calibration_error(probs, targets, num_bins=9) == want


def test_a_confidence_of_one_shares_the_last_bin():
    # One bin of confidences .9 (right) and 1 (wrong): |.5 − .95|, not (|1 − .9| + |0 − 1|)/2.
    probs = torch.tensor([[0.9, 0.1], [1.0, 0.0]], dtype=torch.float64)
    got = metrics.expected_calibration_error(probs, torch.tensor([0, 1]), num_bins=4)
    assert got == pytest.approx(0.45, rel=1e-6)


def test_figures_of_a_hand_made_batch():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])
    got = metrics.classification(probs, torch.tensor([0, 2, 1]), num_bins=1)
    assert got.accuracy == pytest.approx(2 / 3)
    assert got.nll == pytest.approx(math.log(2), rel=1e-6)
    assert got.brier == pytest.approx((0.375 + 0.375 + 0.5) / 3)
    assert got.ece == pytest.approx(2 / 3 - 0.5)
    # Three equal confidences: every order of one error among them.
    assert got.aurc == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_full(dtype):
    # Both dtypes hold these numbers exactly, so not even the data are rounded.
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])
    targets = torch.tensor([0, 2])
    assert metrics.classification(probs.to(dtype), targets) == metrics.classification(
        probs, targets
    )
    # 0 counts as the smallest normal number of the dtype that it underflowed in.
    floored = metrics.negative_log_likelihood(probs[1:].to(dtype), torch.tensor([0]))
    assert floored == pytest.approx(-math.log(torch.finfo(dtype).tiny), rel=1e-6)


def test_half_precision_softmax_is_accepted():
    probs = (3 * torch.randn(64, 100)).to(torch.float16).softmax(-1)
    assert metrics.classification(probs, torch.zeros(64, dtype=torch.int32)).nll > 0


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_detection_equals_its_definition(inside, outside):
    got = metrics.detection(torch.tensor(inside).double(), torch.tensor(outside).double())
    wins = [(o > i) + 0.5 * (o == i) for i in inside for o in outside]
    assert got.auroc == pytest.approx(sum(wins) / len(wins))
    labels = [0] * len(inside) + [1] * len(outside)
    assert got.auroc == pytest.approx(roc_auc_score(labels, inside + outside))
    # The lowest threshold below which 95 % of the inside lies.
    threshold = min(t for t in inside if sum(i <= t for i in inside) >= 0.95 * len(inside))
    assert got.fpr95 == pytest.approx(sum(o <= threshold for o in outside) / len(outside))
    # Precision at each distinct score, times the share of the outside that it adds.
    precision = [
        sum(o >= t for o in outside) / sum(s >= t for s in inside + outside) for t in outside
    ]
    assert got.aupr == pytest.approx(sum(precision) / len(outside))


def test_detection_by_hand():
    inside = torch.arange(20.0)
    # 95 % of the inside is 19 of 20: accept up to 18.
    outside = torch.tensor([17.5, 18.0, 18.5, 40.0])
    got = metrics.detection(inside, outside)
    assert got.fpr95 == 0.5
    assert got.auroc == pytest.approx((18 + 18.5 + 19 + 20) / 80)
    # Precision at 40, 18.5, 18 (which 18 and 19 inside reach too) and 17.5.
    assert got.aupr == pytest.approx((1 / 1 + 2 / 3 + 3 / 5 + 4 / 6) / 4)
    assert metrics.detection(inside, inside + 20) == (1.0, 1.0, 0.0)
    # The curve is one straight line, whose inner points count.
    assert metrics.fpr95(inside, inside) == 0.95


def test_scores_that_a_sigmoid_would_tie_are_told_apart():
    inside, outside = torch.tensor([40.0, 41.0]), torch.tensor([42.0])
    assert metrics.detection(inside, outside) == (1.0, 1.0, 0.0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6),
)
def test_risk_coverage_is_the_mean_over_all_orders_of_ties(rows):
    scores, losses = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    batch = len(rows)
    curves = [
        [sum(rows[i][1] for i in order[: k + 1]) / (k + 1) for k in range(batch)]
        for order in itertools.permutations(range(batch))
        if all(rows[a][0] <= rows[b][0] for a, b in itertools.pairwise(order))
    ]
    want = np.mean(curves, axis=0)
    got = metrics.risk_coverage(scores, losses)
    np.testing.assert_allclose(got.risk, want, rtol=1e-12)
    np.testing.assert_allclose(got.coverage, np.arange(1, batch + 1) / batch, rtol=1e-12)
    assert metrics.aurc(scores, losses) == pytest.approx(want.mean(), rel=1e-12)
    # The risk of everything is the mean loss, and no score sorts the losses better than they do.
    assert got.risk[-1].item() == pytest.approx(losses.mean().item())
    assert metrics.aurc(losses, losses) <= metrics.aurc(scores, losses) + 1e-12
    assert metrics.aurc(torch.ones(batch), losses) == pytest.approx(losses.mean().item())


def test_risk_coverage_by_hand():
    # Most certain first: right, wrong, right, wrong.
    scores = torch.tensor([0.4, 0.1, 0.2, 0.3])
    wrong = torch.tensor([True, False, True, False])
    coverage, risk = metrics.risk_coverage(scores, wrong)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == [0, 1 / 2, 1 / 3, 2 / 4]
    assert metrics.aurc(scores, wrong) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert metrics.aurc(scores, wrong.long()) == metrics.aurc(scores, wrong)


def test_area_of_probabilities_tells_close_confidences_apart():
    # 1 − confidence is the same double for both rows.
    less, more = 0.3, math.nextafter(0.3, 1)
    probs = torch.tensor([[c, *[(1 - c) / 4] * 4] for c in (more, less)], dtype=torch.float64)
    assert 1 - less == 1 - more
    assert metrics.classification(probs, torch.tensor([0, 1])).aurc == 0.25


def test_scores_in_half_precision_keep_their_order():
    assert metrics.auroc(torch.tensor([0.1, 0.2]).half(), torch.tensor([0.3]).bfloat16()) == 1


PROBS = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
TARGETS = torch.tensor([0, 1])
SCORES = torch.tensor([0.1, 0.2])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.accuracy(PROBS.expand(3, 2, 2), TARGETS),
            ValueError,
            r"`probs` has shape \(3, 2, 2\), expected \[batch, classes\].*average posterior",
        ),
        (
            lambda: metrics.brier_score(PROBS.long(), TARGETS),
            TypeError,
            r"`probs` is a tensor of torch.int64, expected a floating-point tensor",
        ),
        (
            lambda: metrics.negative_log_likelihood(PROBS[:0], TARGETS[:0]),
            ValueError,
            r"`probs` has shape \(0, 2\).*neither of them 0",
        ),
        (
            lambda: metrics.negative_log_likelihood(4 * PROBS, TARGETS),
            ValueError,
            r"row 0 of `probs` sums to 4 .*apply softmax to logits",
        ),
        (
            lambda: metrics.accuracy(torch.tensor([[0.5, 0.5], [1.5, -0.5]]), TARGETS),
            ValueError,
            r"row 1 of `probs` sums to 1 with smallest entry -0.5",
        ),
        (
            lambda: metrics.accuracy(torch.tensor([[math.nan, 0.5], [0.5, 0.5]]), TARGETS),
            ValueError,
            r"row 0 of `probs` sums to nan.*look for NaN",
        ),
        (
            lambda: metrics.accuracy(PROBS, TARGETS.float()),
            TypeError,
            r"`targets` is a tensor of torch.float32.*targets.long",
        ),
        (
            lambda: metrics.accuracy(PROBS, torch.tensor([True, False])),
            TypeError,
            r"`targets` is a tensor of torch.bool",
        ),
        (
            lambda: metrics.accuracy(PROBS, TARGETS[:, None]),
            ValueError,
            r"`targets` has shape \(2, 1\), expected \(2,\)",
        ),
        (
            lambda: metrics.accuracy(PROBS, TARGETS + 1),
            ValueError,
            r"`targets` lie between 1 and 2, expected 0 to 1",
        ),
        (
            lambda: metrics.expected_calibration_error(PROBS, TARGETS, num_bins=0),
            ValueError,
            r"`num_bins` is 0, expected at least 1",
        ),
        (
            lambda: metrics.auroc(SCORES, torch.tensor([1, 2])),
            TypeError,
            r"`out_scores` is a tensor of torch.int64",
        ),
        (
            lambda: metrics.auroc(SCORES[:0], SCORES),
            ValueError,
            r"`in_scores` has shape \(0,\), expected \[inputs\]",
        ),
        (
            lambda: metrics.fpr95(SCORES, torch.tensor([math.nan])),
            ValueError,
            r"`out_scores` holds NaN",
        ),
        (
            lambda: metrics.aupr(SCORES, SCORES[:, None]),
            ValueError,
            r"`out_scores` has shape \(2, 1\), expected \[inputs\]",
        ),
        (
            lambda: metrics.adaptive_calibration_error(PROBS, TARGETS, num_bins=0),
            ValueError,
            r"`num_bins` is 0, expected at least 1",
        ),
        (
            lambda: metrics.aurc(TARGETS, SCORES),
            TypeError,
            r"`scores` is a tensor of torch.int64",
        ),
        (
            lambda: metrics.risk_coverage(SCORES, SCORES[:1]),
            ValueError,
            r"`losses` has shape \(1,\), expected \(2,\): one loss for each score",
        ),
        (
            lambda: metrics.aurc(SCORES, SCORES / 0),
            ValueError,
            r"`losses` holds NaN or infinite",
        ),
        (
            lambda: metrics.aurc(SCORES, [0, 1]),
            TypeError,
            r"`losses` is a list, expected a tensor of numbers or of booleans",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    message = r"^torchmetrics is not installed: run `pip install 'funcbayes\[report\]'`$"
    with pytest.raises(ModuleNotFoundError, match=message), needs_extra("report"):
        import torchmetrics  # noqa: F401
