"""Joint uncertainties and batch selection: enumeration in float64, unbiasedness, cost, laws."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from funcbayes.evaluation import uncertainty

LOG2 = math.log(2)


def probabilities(*shape, sharpness=2.0, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return (
        (sharpness * torch.randn(shape, generator=gen, dtype=torch.float64)).softmax(-1).to(dtype)
    )


@st.composite
def batches(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)))
    sharpness = draw(st.sampled_from([1e-3, 2.0, 30.0, 800.0]))
    return probabilities(*shape, sharpness=sharpness, seed=draw(st.integers(0, 2**32)))


def by_enumeration(probs):
    """Joint entropy and information, configuration by configuration."""
    num, batch, classes = probs.shape
    total, each = 0.0, [0.0] * num
    for labels in itertools.product(range(classes), repeat=batch):
        p = [math.prod(probs[s, b, y].item() for b, y in enumerate(labels)) for s in range(num)]
        mean = sum(p) / num
        total -= mean * math.log(mean) if mean > 0 else 0
        each = [h - q * math.log(q) if q > 0 else h for h, q in zip(each, p, strict=True)]
    return total, total - sum(each) / num


# Exact


@given(batches())
def test_joint_quantities_equal_enumeration(probs):
    entropy, information = by_enumeration(probs)
    got = uncertainty.joint_entropy(probs).item()
    # Up to 4⁴ configurations, each term good to a few roundings of log p of at most 745 · 4.
    assert got == pytest.approx(entropy, rel=1e-12, abs=1e-11)
    got = uncertainty.joint_mutual_information(probs).item()
    assert got == pytest.approx(max(information, 0), rel=1e-12, abs=1e-11)


@given(batches())
def test_joint_information_lies_within_its_bounds(probs):
    got = uncertainty.joint_mutual_information(probs).item()
    alone = uncertainty.mutual_information(probs)
    assert got >= 0
    assert got <= alone.sum().item() + 1e-12
    assert got <= math.log(len(probs)) + 1e-12
    assert got >= alone.max().item() - 1e-12
    one = uncertainty.joint_mutual_information(probs[:, :1]).item()
    assert one == pytest.approx(alone[0].item(), rel=1e-9, abs=1e-15)


def test_information_that_two_rows_both_carry_counts_once():
    # Two samples that are sure of opposite labels: any number of rows says one bit.
    for dtype in (torch.float32, torch.float64):
        probs = torch.eye(2, dtype=dtype)[:, None].expand(2, 9, 2)
        assert uncertainty.joint_mutual_information(probs).item() == pytest.approx(LOG2)
        assert uncertainty.joint_entropy(probs).item() == pytest.approx(LOG2)
    # Fair coins say nothing, and their entropies add.
    coins = torch.full((2, 5, 2), 0.5)
    assert uncertainty.joint_mutual_information(coins).item() == 0
    assert uncertainty.joint_entropy(coins).item() == pytest.approx(5 * LOG2)


def test_probabilities_that_underflow_together():
    # Forty rows of e^-50 each: p(y | s) is e^-2000 for one sample and 1 for the other.
    logits = torch.tensor([[0.0, 50.0], [50.0, 0.0]])[:, None].expand(2, 40, 2)
    for most in (2**40, 100):
        if most == 100:
            got = uncertainty.joint_mutual_information(
                logits, logits=True, key=0, max_configurations=most
            )
        else:
            got = uncertainty.joint_mutual_information(logits[:, :13], logits=True)
        assert got.item() == pytest.approx(LOG2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_wide(dtype):
    probs = probabilities(4, 3, 3, dtype=dtype)
    wide = probs.double() / probs.double().sum(-1, keepdim=True)
    entropy, information = by_enumeration(wide)
    for got, want in (
        (uncertainty.joint_entropy(probs), entropy),
        (uncertainty.joint_mutual_information(probs), information),
    ):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want, rel=1e-5)


def test_extreme_logits_and_excluded_classes():
    logits = torch.tensor([[[3e38, -3e38, 0.0], [0.0, -math.inf, 0.0]]] * 2)
    assert uncertainty.joint_entropy(logits, logits=True).item() == pytest.approx(LOG2)
    assert uncertainty.joint_mutual_information(logits, logits=True).item() == 0


def test_joint_quantities_pass_through_vmap_and_grad():
    stack = torch.stack([probabilities(3, 4, 3, seed=i) for i in range(2)])
    for most in (1000, 10):
        for f in (uncertainty.joint_entropy, uncertainty.joint_mutual_information):

            def call(p, f=f, most=most):
                return f(p, key=3, max_configurations=most)

            looped = torch.stack([call(p) for p in stack])
            torch.testing.assert_close(vmap(call, randomness="same")(stack), looped)
    gradient = grad(uncertainty.joint_entropy)(stack[0])
    assert gradient.isfinite().all()


# Drawn


def test_drawn_estimates_are_unbiased():
    probs = probabilities(3, 5, 3, seed=1)
    exact = [uncertainty.joint_entropy(probs).item()]
    exact.append(uncertainty.joint_mutual_information(probs).item())
    # 400 estimates from 30 of 243 configurations each.
    calls = (uncertainty.joint_entropy, uncertainty.joint_mutual_information)
    for call, want in zip(calls, exact, strict=True):
        draws = torch.stack([call(probs, key=k, max_configurations=30) for k in range(400)])
        standard_error = draws.std().item() / 20
        assert abs(draws.mean().item() - want) < 5 * standard_error
        # A bias of 1 % of the information would be seen.
        assert standard_error < 0.002 * exact[1] * 5


def test_drawn_estimates_converge():
    probs = probabilities(4, 6, 4, seed=2)
    want = uncertainty.joint_mutual_information(probs).item()

    def spread(most):
        calls = (
            uncertainty.joint_mutual_information(probs, key=k, max_configurations=most)
            for k in range(60)
        )
        return (torch.stack(list(calls)) - want).square().mean().sqrt().item()

    # A hundredth of the variance. The ratio of two root mean squares of 60 is good to 13 %.
    assert spread(20) / spread(2000) == pytest.approx(10, rel=0.65)
    assert spread(2000) < 0.02 * want


def test_labels_are_drawn_with_their_probabilities():
    # By way of a batch that reveals the sample: then the information is log S for each
    # configuration, and the entropy is that plus the exact rest.
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]).double()
    probs = torch.stack([probs, probs[:, [2, 0, 1]]], 1).repeat(1, 6, 1)
    for k in range(5):
        got = uncertainty.joint_mutual_information(probs, key=k, max_configurations=3)
        # Samples 1 and 2 are the same: log 3 with probability 1/3, and log 3 − log 2.
        assert got.item() == pytest.approx(math.log(3) - 2 / 3 * LOG2, rel=1e-12)


def test_estimates_are_functions_of_the_key():
    probs = probabilities(3, 9, 4)
    state = torch.get_rng_state()
    values = [
        uncertainty.joint_entropy(probs, key=k, max_configurations=99).item() for k in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert torch.equal(state, torch.get_rng_state())


# Selection


def greedy(probs, size):
    """Every candidate batch from scratch."""
    chosen, information = [], []
    for _ in range(size):
        rest = [n for n in range(probs.shape[1]) if n not in chosen]
        scores = [by_enumeration(probs[:, [*chosen, n]])[1] for n in rest]
        best = max(range(len(rest)), key=scores.__getitem__)
        chosen.append(rest[best])
        information.append(scores[best])
    return chosen, information


@pytest.mark.parametrize("seed", range(5))
def test_selection_equals_greedy_search_from_scratch(seed):
    probs = probabilities(5, 7, 3, seed=seed)
    chosen, information = greedy(probs, 4)
    got = uncertainty.select_batch(probs, 4)
    assert got.indices.tolist() == chosen
    assert got.information.tolist() == pytest.approx(information, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_selection_from_drawn_configurations_approaches_the_exact_one(seed):
    probs = probabilities(4, 8, 3, seed=seed)
    exact = uncertainty.select_batch(probs, 5)
    # 3⁴ = 81 configurations, of which 80 random ones, then many.
    for most, tolerance in ((80, 0.1), (3, 1.0)):
        got = uncertainty.select_batch(probs, 5, key=0, max_configurations=most)
        assert len(set(got.indices.tolist())) == 5
        # What it took is worth nearly as much.
        worth = uncertainty.joint_mutual_information(probs[:, got.indices]).item()
        assert worth >= exact.information[-1].item() * (1 - 0.3 * tolerance)
        assert got.information[-1].item() == pytest.approx(worth, rel=tolerance)


def test_gains_from_drawn_configurations_are_unbiased():
    # Rows so different that noise does not change their order.
    rows = [probabilities(4, 1, 3, sharpness=s, seed=3) for s in (8.0, 3.0, 1.2, 0.4)]
    probs = torch.cat(rows, 1)
    want = uncertainty.select_batch(probs, 4)
    # Nine configurations precede the third step: it draws those of two rows, the fourth adds one.
    runs = [uncertainty.select_batch(probs, 4, key=k, max_configurations=8) for k in range(300)]
    assert all(run.indices.tolist() == want.indices.tolist() for run in runs)
    gains = torch.stack([run.information.diff() for run in runs])
    error = gains.mean(0) - want.information.diff()
    standard_error = gains.std(0) / math.sqrt(len(gains))
    assert abs(error[0]) < 1e-12
    assert (standard_error[1:] > 0).all()
    assert (standard_error[1:] < 0.03 * want.information.diff()[1:]).all()
    assert (error[1:].abs() < 5 * standard_error[1:]).all()


def test_copies_of_a_chosen_row_are_not_chosen_again():
    # Four samples. Rows 1 to 5 tell the first two from the others for certain, row 0 the even
    # from the odd ones nearly so: on its own it is worth less, after row 1 all that is left.
    probs = torch.zeros(4, 6, 2, dtype=torch.float64)
    probs[:, :, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    probs[:, 0, 0] = torch.tensor([0.95, 0.05, 0.95, 0.05])
    probs[:, :, 1] = 1 - probs[:, :, 0]
    assert uncertainty.mutual_information(probs).topk(2).indices.min() > 0
    got = uncertainty.select_batch(probs, 2)
    assert got.indices[0] > 0
    assert got.indices[1] == 0


def test_information_never_falls_and_stays_below_what_there_is_to_know():
    probs = probabilities(4, 12, 2, sharpness=8.0, seed=5)
    for most in (10_000, 16):
        got = uncertainty.select_batch(probs, 12, key=0, max_configurations=most).information
        assert (got.diff() >= 0).all()
        assert got[-1] <= math.log(4) + 1e-9


def test_every_row_can_be_chosen_and_one_sample_knows_nothing():
    got = uncertainty.select_batch(probabilities(1, 5, 3), 5)
    assert sorted(got.indices.tolist()) == list(range(5))
    assert got.information.max() < 1e-15
    one_class = uncertainty.select_batch(torch.ones(3, 2, 1), 2)
    assert not one_class.information.any()


def test_candidates_in_parts_give_the_same(monkeypatch):
    probs = probabilities(3, 11, 4, seed=6)
    want = uncertainty.select_batch(probs, 4)
    joint = uncertainty.select_batch.__globals__
    monkeypatch.setitem(joint, "_TABLE", 200)
    got = uncertainty.select_batch(probs, 4)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.information, want.information)


def test_selection_costs_what_the_paper_says():
    # Σ over steps of min(classesⁿ, M) · samples · batch · classes multiply-adds: the
    # configurations of the chosen rows are kept from step to step.
    num, batch, classes, most = 5, 40, 3, 30
    counter = FlopCounterMode(display=False)
    with counter:
        uncertainty.select_batch(
            probabilities(num, batch, classes), 6, key=0, max_configurations=30
        )
    configurations = [1, 3, 9, 27, most, most]
    want = sum(configurations) * num * batch * classes * 2
    # The weighting of the entropies is one more multiply-add for each row and configuration.
    assert want <= counter.get_total_flops() <= want * (1 + 1 / (num * classes)) + 1


PROBS = torch.full((2, 30, 4), 0.25)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: uncertainty.joint_entropy(PROBS),
            r"there are 4\^30 configurations of labels, more than `max_configurations`, 10000, "
            "and `key` is None: give a key to draw them",
        ),
        (
            lambda: uncertainty.joint_mutual_information(PROBS[:, :4], max_configurations=255),
            r"there are 4\^4 configurations of labels, more than `max_configurations`, 255",
        ),
        (
            lambda: uncertainty.joint_entropy(PROBS.repeat(1, 20, 1)),
            r"there are 4\^600 configurations of labels",
        ),
        (
            lambda: uncertainty.select_batch(PROBS, 8),
            r"there are 4\^7 configurations of labels",
        ),
        (
            lambda: uncertainty.joint_entropy(PROBS, max_configurations=0, key=0),
            "`max_configurations` is 0, expected at least 1",
        ),
        (
            lambda: uncertainty.select_batch(PROBS, 31, key=0),
            "`size` is 31, expected 1 to 30, the number of rows of `samples`",
        ),
        (lambda: uncertainty.select_batch(PROBS, 0), "`size` is 0, expected 1 to 30"),
        (
            lambda: uncertainty.select_batch(PROBS[0], 2),
            r"`samples` has shape \(30, 4\), expected \[samples, batch, classes\]",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
