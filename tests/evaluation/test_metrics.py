"""Metrics: hand-derived values, scikit-learn and torchmetrics, half precision, wrong input."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from funcbayes.evaluation import metrics, uncertainty
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
def test_calibration_error_equals_the_one_without_torchmetrics(case, num_bins):
    probs, targets = case
    got = metrics.expected_calibration_error(probs, targets, num_bins=num_bins)
    want = uncertainty.expected_calibration_error(probs, targets, num_bins=num_bins)
    # torchmetrics sums in float32.
    assert got == pytest.approx(want.item(), abs=1e-6)


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


def test_detection_by_hand():
    inside = torch.arange(20.0)
    # 95 % of the inside is 19 of 20: accept up to 18.
    outside = torch.tensor([17.5, 18.0, 18.5, 40.0])
    got = metrics.detection(inside, outside)
    assert got.fpr95 == 0.5
    assert got.auroc == pytest.approx((18 + 18.5 + 19 + 20) / 80)
    assert metrics.detection(inside, inside + 20) == (1.0, 0.0)


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
