"""Streaming metrics: batches, merged parts and processes equal the whole."""

import itertools
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection

from funcbayes.evaluation import metrics
from funcbayes.exceptions import NotFittedError


class Case(NamedTuple):
    build: Callable[..., Metric]
    whole: Callable[..., float]
    names: tuple[str, ...]


def on_parts(function):
    return lambda scores, outside: function(scores[~outside], scores[outside])


LABELS, ERRORS = ("probs", "targets"), ("mean", "targets")
SAMPLES = ("samples", "targets")
NORMAL, MIXTURE = ("mean", "std", "targets"), ("means", "stds", "targets")
INTERVAL, SCORES = ("lower", "upper", "targets"), ("scores", "outside")

CASES = {
    "accuracy": Case(metrics.Accuracy, metrics.accuracy, LABELS),
    "nll": Case(metrics.NegativeLogLikelihood, metrics.negative_log_likelihood, LABELS),
    "brier": Case(metrics.BrierScore, metrics.brier_score, LABELS),
    "ece": Case(metrics.ExpectedCalibrationError, metrics.expected_calibration_error, LABELS),
    "ece_4": Case(
        partial(metrics.ExpectedCalibrationError, num_bins=4),
        partial(metrics.expected_calibration_error, num_bins=4),
        LABELS,
    ),
    "adaptive": Case(
        partial(metrics.AdaptiveCalibrationError, num_bins=4),
        partial(metrics.adaptive_calibration_error, num_bins=4),
        LABELS,
    ),
    "auroc": Case(metrics.AUROC, on_parts(metrics.auroc), SCORES),
    "aupr": Case(metrics.AUPR, on_parts(metrics.aupr), SCORES),
    "fpr95": Case(metrics.FPR95, on_parts(metrics.fpr95), SCORES),
    "aurc": Case(metrics.AURC, metrics.aurc, ("scores", "losses")),
    "rmse": Case(metrics.RMSE, metrics.rmse, ERRORS),
    "mae": Case(metrics.MAE, metrics.mae, ERRORS),
    "gaussian_nll": Case(metrics.GaussianNLL, metrics.gaussian_nll, NORMAL),
    "mixture_nll": Case(metrics.MixtureNLL, metrics.mixture_nll, MIXTURE),
    "gaussian_crps": Case(metrics.GaussianCRPS, metrics.gaussian_crps, NORMAL),
    "mixture_crps": Case(metrics.MixtureCRPS, metrics.mixture_crps, MIXTURE),
    "fair_crps": Case(metrics.SampleCRPS, metrics.sample_crps, SAMPLES),
    "plain_crps": Case(
        partial(metrics.SampleCRPS, fair=False),
        partial(metrics.sample_crps, fair=False),
        SAMPLES,
    ),
    "interval_score": Case(metrics.IntervalScore, metrics.interval_score, INTERVAL),
    "interval_score_50": Case(
        partial(metrics.IntervalScore, level=0.5),
        partial(metrics.interval_score, level=0.5),
        INTERVAL,
    ),
    "coverage": Case(metrics.Coverage, metrics.coverage, INTERVAL),
    "sharpness": Case(metrics.Sharpness, metrics.sharpness, ("lower", "upper")),
}
every_case = pytest.mark.parametrize("name", CASES)


def make_data(names, num, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=gen, dtype=dtype)
    # Rounded: equal scores, in one batch and in two, are the hard part of a curve.
    rounded = (3 * normal(5, num)).round() / 4
    data = {
        "probs": rounded[:3].T.softmax(-1),
        "mean": normal(num),
        "std": normal(num).exp(),
        "means": normal(4, num),
        "stds": normal(4, num).exp(),
        "samples": normal(4, num),
        "lower": normal(num) - 2,
        "upper": normal(num) + 2,
        "scores": rounded[3],
        "losses": rounded[4].abs(),
        # Both kinds are there, whatever the cuts.
        "outside": torch.arange(num) % 3 == 1,
        "targets": torch.arange(num) % 3 if "probs" in names else 2 * normal(num),
    }
    data["lower"], data["upper"] = (
        torch.minimum(data["lower"], data["upper"]),
        torch.maximum(data["lower"], data["upper"]),
    )
    return {name: data[name] for name in names}


def rows(data, start, stop):
    return {k: v[..., start:stop] if k != "probs" else v[start:stop] for k, v in data.items()}


def check_equal(got, want):
    assert isinstance(got, Tensor)
    assert got.dtype == torch.float64
    assert got.shape == ()
    # Some forty numbers of order 10 are added in another order.
    assert got.item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@st.composite
def splits(draw):
    """A number of data, and cuts between batches; some batches have one datum."""
    num = draw(st.integers(2, 40))
    inner = draw(st.sets(st.integers(1, num - 1)))
    return [0, *sorted(inner), num]


@every_case
@given(splits(), st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_batches_equal_the_whole(name, cuts, seed, dtype):
    case = CASES[name]
    data = make_data(case.names, cuts[-1], seed, dtype)
    want = case.whole(**data)
    metric = case.build()
    parts = [case.build() for _ in cuts[1:]]
    for part, (start, stop) in zip(parts, itertools.pairwise(cuts), strict=True):
        part.update(**rows(data, start, stop))
        metric.update(**rows(data, start, stop))
    check_equal(metric.compute(), want)
    # Parts that were filled apart, merged in another order.
    merged = parts.pop()
    for part in parts:
        merged.merge_state(part)
    check_equal(merged.compute(), want)


@every_case
def test_batches_of_one_equal_the_whole(name):
    case = CASES[name]
    data = make_data(case.names, 30)
    metric = case.build()
    for i in range(30):
        metric.update(**rows(data, i, i + 1))
    check_equal(metric.compute(), case.whole(**data))


@every_case
def test_a_metric_goes_on_after_compute_and_starts_again_after_reset(name):
    case = CASES[name]
    data = make_data(case.names, 20)
    metric = case.build()
    metric.update(**rows(data, 0, 8))
    check_equal(metric.compute(), case.whole(**rows(data, 0, 8)))
    metric.update(**rows(data, 8, 20))
    check_equal(metric.compute(), case.whole(**data))
    copy = pickle.loads(pickle.dumps(metric))
    metric.reset()
    metric.update(**rows(data, 3, 9))
    check_equal(metric.compute(), case.whole(**rows(data, 3, 9)))
    check_equal(copy.compute(), case.whole(**data))


@every_case
def test_a_call_gives_the_value_of_its_batch(name):
    case = CASES[name]
    data = make_data(case.names, 20)
    metric = case.build()
    for start, stop in ((0, 9), (9, 20)):
        check_equal(metric(**rows(data, start, stop)), case.whole(**rows(data, start, stop)))
    check_equal(metric.compute(), case.whole(**data))


@every_case
def test_a_state_dict_holds_what_was_seen(name):
    case = CASES[name]
    data = make_data(case.names, 20)
    metric, other = case.build(), case.build()
    metric.persistent(True)
    metric.update(**data)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    # torchmetrics counts updates, not what a state dict brings.
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        check_equal(other.compute(), case.whole(**data))


@every_case
def test_nothing_seen_is_said(name):
    metric = CASES[name].build()
    message = rf"^{type(metric).__name__} has seen no .*: call `update` before `compute`$"
    # torchmetrics warns on its own account; the error comes either way.
    with (
        pytest.warns(UserWarning, match="was called before the ``update`` method"),
        pytest.raises(NotFittedError, match=message),
    ):
        metric.compute()


def test_a_missing_kind_of_score_is_said():
    metric = metrics.AUROC()
    metric.update(torch.tensor([0.5]), outside=False)
    with pytest.raises(NotFittedError, match="AUROC has seen no out scores"):
        metric.compute()
    metric.update(torch.tensor([0.75]), outside=True)
    assert metric.compute() == 1
    mixed = metrics.AUROC()
    mixed.update(torch.tensor([0.75, 0.5]), outside=torch.tensor([True, False]))
    assert mixed.compute() == 1


@pytest.mark.usefixtures("unchecked")
@every_case
def test_a_refused_batch_changes_nothing(name):
    case = CASES[name]
    data = make_data(case.names, 20)
    metric = case.build()
    metric.update(**rows(data, 0, 11))
    bad = {k: v * torch.nan for k, v in data.items()}
    for call in (metric.update, metric):
        with pytest.raises((ValueError, TypeError), match=r"^(`|interval|row)"):
            call(**bad)
    metric.update(**rows(data, 11, 20))
    check_equal(metric.compute(), case.whole(**data))
    metric(**rows(data, 0, 11))
    check_equal(metric(**rows(data, 11, 20)), case.whole(**rows(data, 11, 20)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.Accuracy().update(torch.ones(2), torch.zeros(2).long()),
            ValueError,
            r"`probs` has shape \(2,\), expected \[batch, classes\]",
        ),
        (
            lambda: metrics.RMSE().update(torch.ones(2, 1), torch.ones(2)),
            ValueError,
            r"`mean` has shape \(2, 1\), expected \(2,\)",
        ),
        (
            lambda: metrics.SampleCRPS().update(torch.ones(2), torch.ones(2)),
            ValueError,
            r"`samples` has shape \(2,\), expected \(samples, 2\)",
        ),
        (
            lambda: metrics.AUROC().update(torch.ones(2), outside=1),
            TypeError,
            r"`outside` is a int, expected True, False, or a tensor of booleans",
        ),
        (
            lambda: metrics.FPR95().update(torch.ones(2), outside=torch.ones(2)),
            TypeError,
            r"`outside` is a tensor of torch.float32, expected True",
        ),
        (
            lambda: metrics.AUPR().update(torch.ones(2), outside=torch.ones(1).bool()),
            ValueError,
            r"`outside` has shape \(1,\), expected \(2,\): one boolean for each score",
        ),
        (
            lambda: metrics.ExpectedCalibrationError(num_bins=0),
            ValueError,
            r"`num_bins` is 0, expected at least 1",
        ),
        (
            lambda: metrics.AdaptiveCalibrationError(num_bins=-1),
            ValueError,
            r"`num_bins` is -1, expected at least 1",
        ),
    ],
)
def test_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("names", [LABELS, ERRORS, NORMAL, MIXTURE, SAMPLES, INTERVAL])
def test_a_collection_shares_no_state_of_metrics_that_differ(names):
    # Perfect first batches: every sum of a score is 0 there, or the number of data.
    data = make_data(names, 30)
    first = rows(data, 0, 3)
    if "probs" in names:
        first["probs"] = torch.eye(3, dtype=torch.float64)
    else:
        first = {
            k: torch.zeros_like(v) if k != "std" and k != "stds" else torch.ones_like(v)
            for k, v in first.items()
        }
    cases = {k: case for k, case in CASES.items() if set(case.names) <= set(names)}
    assert len(cases) > 1
    collection = MetricCollection({k: case.build() for k, case in cases.items()})
    for batch in (first, rows(data, 3, 11), rows(data, 11, 30)):
        collection.update(**batch)
    seen = {k: torch.cat([first[k], rows(data, 3, 30)[k]], 0 if k == "probs" else -1) for k in data}
    for k, value in collection.compute().items():
        check_equal(value, cases[k].whole(**{n: seen[n] for n in cases[k].names}))


def test_the_streamed_curve_is_the_curve():
    data = make_data(("scores", "losses"), 30)
    metric = metrics.RiskCoverageCurve()
    for i in range(0, 30, 4):
        metric.update(**rows(data, i, i + 4))
    got, want = metric.compute(), metrics.risk_coverage(**data)
    assert type(got) is type(want)
    torch.testing.assert_close(got.coverage, want.coverage)
    torch.testing.assert_close(got.risk, want.risk)


def test_a_data_loader_and_a_thousand_float32_batches():
    # A float32 sum of 1e4 equal terms of 0.1 is off by 1e-4 of itself.
    data = TensorDataset(torch.full((10_000,), 0.1), torch.zeros(10_000))
    metric = metrics.MAE()
    for mean, targets in DataLoader(data, batch_size=10):
        metric.update(mean, targets)
    assert metric.compute().item() == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)
    # No dtype of the surrounding module reaches the sums.
    assert metric.half().compute().dtype == torch.float64


def test_sums_do_not_grow():
    for name, case in CASES.items():
        metric = case.build()
        metric.update(**make_data(case.names, 40))
        kept = sum(
            sum(map(len, state)) if isinstance(state, list) else state.numel()
            for state in metric.metric_state.values()
        )
        if name in ("adaptive", "auroc", "aupr", "fpr95", "aurc"):
            assert kept == (80 if name in ("adaptive", "aurc") else 40)
        else:
            assert kept <= 16


@pytest.mark.cuda
@every_case
def test_a_metric_moves_between_devices(name):
    case = CASES[name]
    data = make_data(case.names, 20)
    metric = case.build()
    metric.update(**rows(data, 0, 8))
    metric = metric.to("cuda")
    metric.update(**{k: v.cuda() for k, v in rows(data, 8, 14).items()})
    # Batches come from any device.
    metric.update(**rows(data, 14, 20))
    value = metric.compute()
    assert value.is_cuda
    check_equal(value, case.whole(**data))
    check_equal(metric.cpu().compute(), case.whole(**data))


def in_process(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    for case in CASES.values():
        data = make_data(case.names, 20)
        metric = case.build()
        # Unequal shares in unequal batches; the last process has no data.
        for start, stop in (((0, 5), (5, 6)), ((6, 20),), ())[rank]:
            metric.update(**rows(data, start, stop))
        check_equal(metric.compute(), case.whole(**data))
        if rank < 2:
            # Its own data are its own again.
            metric.update(**rows(data, 0, 1))
            metric.sync_on_compute = metric._to_sync = False
            own = rows(data, 0, 6) if rank == 0 else rows(data, 6, 20)
            own = {
                k: torch.cat([v, rows(data, 0, 1)[k]], 0 if k == "probs" else -1)
                for k, v in own.items()
            }
            check_equal(metric.compute(), case.whole(**own))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no gloo over files")
def test_processes_equal_the_whole(tmp_path):
    torch.multiprocessing.spawn(in_process, (f"file://{tmp_path}/store",), nprocs=3)
