"""Monte Carlo dropout as a posterior: its options, and what predictions with it are."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from funcbayes.core import random, trees
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.inference import dropout
from funcbayes.posteriors import DropoutMasks
from funcbayes.prediction import predict
from funcbayes.testing import networks
from tests.snapshots import assert_unchanged, snapshot

F64 = torch.float64


class TimeFirst(nn.Module):
    """A transformer layer that wants `[time, batch, width]` inside a network that does not."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


class TimeFirstRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 5, num_layers=2, dropout=0.4)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.gru(x.transpose(0, 1))[0][-1])


def build(kind):
    """A network in float64 and inputs of five rows, the first and the last equal."""
    own = {"time first": (TimeFirst, (4, 8)), "time first recurrent": (TimeFirstRecurrent, (4, 3))}
    if kind in own:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = own[kind][0]().double().eval()
        x = torch.randn(5, *own[kind][1], dtype=F64, generator=torch.Generator().manual_seed(0))
    else:
        net, x = networks.make(kind, dtype=F64), networks.inputs(kind, 5, dtype=F64)
    return net, trees.tensor_map(lambda leaf: torch.cat([leaf[:4], leaf[:1]]), x)


KINDS = [*networks.LOGIT_KINDS, "time first", "time first recurrent"]


def samples(net, x, *, num=4, key=0, strategy="loop", **options):
    model = Model.from_module(net)
    posterior = dropout.posterior(model, **options)
    return predict(
        model, posterior, x, key=key, num_samples=num, strategy=strategy, return_samples=True
    ).samples


# -- options -------------------------------------------------------------------------------


def test_the_posterior_holds_a_copy_of_the_parameters():
    net = networks.make("linear")
    model = Model.from_module(net)
    posterior = dropout.posterior(model, rate=0.3, per="batch")
    assert isinstance(posterior, DropoutMasks)
    assert (posterior.rate, posterior.per) == (0.3, "batch")
    expected = trees.clone(model.params)
    x = networks.inputs("linear", 3)
    before = predict(model, posterior, x, key=0, num_samples=3, return_samples=True).samples
    with torch.no_grad():
        net[0].weight.zero_()
    assert_close(posterior.params, expected, rtol=0, atol=0)
    # So training on does not move it.
    after = predict(model, posterior, x, key=0, num_samples=3, return_samples=True).samples
    assert_close(after, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": -0.1}, ValueError, "`rate` is -0.1, expected 0 ≤ rate < 1, or None for the"),
        ({"rate": 1.0}, ValueError, "`rate` is 1.0, expected 0 ≤ rate < 1"),
        ({"rate": math.nan}, ValueError, "`rate` is nan"),
        ({"rate": "0.1"}, TypeError, "`rate` is a str, expected a number|Type-check error"),
        (
            {"per": "row "},
            ValueError,
            "`per` is 'row ', expected 'row' or 'batch'|Type-check error",
        ),
    ],
)
def test_options_are_checked(options, error, message):
    model = Model.from_module(networks.make("linear"))
    with pytest.raises((error, TypeError), match=message):
        dropout.posterior(model, **options)


def test_a_module_is_no_model():
    with pytest.raises(TypeError, match=r"`model` is a Sequential, expected|Type-check error"):
        dropout.posterior(networks.make("linear"))  # pyright: ignore[reportArgumentType]


# -- predictions ---------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_a_loop_by_hand(kind, per):
    net, x = build(kind)
    before = snapshot(net)
    result = samples(net, x, per=per)
    assert_unchanged(net, before)
    expected = []
    for i in range(4):
        rows = [x] if per == "row" else [networks.rows(x, n, n + 1) for n in range(5)]
        outputs = []
        for row in rows:
            with torch.no_grad(), KeyedDropout([random.fold_in(0, i)], always=True):
                outputs.append(net(*networks.arguments(row)))
        expected.append(torch.cat(outputs))
    assert_close(result, torch.stack(expected))
    if kind != "frozen":
        assert bool((result.std(0) > 0).any())


# With a mask a row, and for the other methods, tests/laws has it.
@pytest.mark.parametrize("strategy", ["vmap", "threads", "auto"])
@pytest.mark.parametrize("kind", ["convolution", "dict", "time first", "recurrent"])
def test_every_strategy_gives_the_same_with_a_mask_a_batch(kind, strategy):
    if (kind, strategy) == ("recurrent", "vmap"):
        return  # refused with a message, as the tests of predict have it
    net, x = build(kind)
    expected = samples(net, x, per="batch", num=3)
    assert_close(samples(net, x, per="batch", num=3, strategy=strategy), expected)
    assert_close(samples(net, x, per="batch", num=2, strategy=strategy), expected[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_one_mask_a_batch_makes_a_sample_one_function_of_the_row(kind):
    net, x = build(kind)
    whole = samples(net, x, per="batch", num=2)
    assert_close(whole[:, 0], whole[:, 4])  # the two equal rows
    for start, stop in [(0, 1), (2, 5)]:  # whatever else is in the batch
        part = samples(net, networks.rows(x, start, stop), per="batch", num=2)
        assert_close(part, whole[:, start:stop])
    # A mask a row tells equal rows apart.
    rows = samples(net, x, per="row", num=8)
    assert not torch.allclose(rows[:, 0], rows[:, 4])


@pytest.mark.parametrize("rate", [0.05, 0.9])
def test_the_rate_overrides_all(rate):
    net, x = build("attention")
    result = samples(net, x, rate=rate)
    assert not torch.allclose(result, samples(net, x))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = rate
    assert_close(result, samples(net, x))


def test_the_mean_of_a_linear_network_under_dropout_is_the_network():
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 2)).double().eval()
    x = torch.randn(3, 6, dtype=F64)
    n = 3000
    drawn = samples(net, x, num=n, strategy="vmap")
    z = (drawn.mean(0) - net(x).detach()) / (drawn.std(0) / math.sqrt(n))
    assert float(z.abs().max()) < 5
    # Var of Σ w·x·mask/(1 − p) is Σ (w·x)² p/(1 − p), but for the rounding of p to 2⁻¹⁶.
    expected = (x.square() @ net[1].weight.detach().square().T) * 0.3 / 0.7
    spread = (drawn - drawn.mean(0)).square()
    z = (spread.mean(0) - expected) / (spread.std(0) / math.sqrt(n))
    assert float(z.abs().max()) < 5


# -- the warning ---------------------------------------------------------------------------


def plain():
    return nn.Sequential(nn.Linear(4, 3)).double()


@pytest.mark.parametrize(
    ("per", "strategy"), [("row", "vmap"), ("row", "loop"), ("batch", "threads"), ("batch", "auto")]
)
def test_no_active_dropout_is_a_warning(strategy, per):
    x = networks.inputs("linear", 3, dtype=F64)
    with pytest.warns(UserWarning, match="no dropout was active .* variance is zero"):
        result = samples(plain(), x, per=per, strategy=strategy)
    assert_close(result[0], result[1], rtol=0, atol=0)


def test_the_warning_comes_again_on_the_next_call():
    model = Model.from_module(plain())
    posterior = dropout.posterior(model)
    for _ in range(2):
        with pytest.warns(UserWarning, match="no dropout was active"):
            predict(model, posterior, torch.randn(2, 4, dtype=F64), key=0, num_samples=2)


def test_rate_0_is_no_active_dropout():
    net, x = build("linear")
    with pytest.warns(UserWarning, match="no dropout was active"):
        result = samples(net, x, rate=0.0)
    assert_close(result, net(x).detach().expand_as(result))
    net[2].p = 0.0
    with pytest.warns(UserWarning, match="no dropout was active"):
        samples(net, x)
