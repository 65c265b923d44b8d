"""Keyed dropout: the right distribution, and masks that are a function of the key alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.testing import assert_close

from funcbayes.core import random, trees, workers
from funcbayes.core.masks import KeyedDropout
from tests.snapshots import assert_unchanged, snapshot

KEYS = random.split(11, 4)
SELU_FLOOR = -1.7580993408473766  # −λα

# Whole-element, per-channel and alpha dropout, as functions of (x, p, training).
PLAIN = {
    "F.dropout": F.dropout,
    "F.dropout in place": lambda x, p, training: F.dropout(x, p, training, inplace=True),
    "torch.dropout": torch.dropout,
    "torch.dropout_": lambda x, p, training: torch.dropout_(x.clone(), p, training),
    "nn.Dropout": lambda x, p, training: nn.Dropout(p).train(training)(x),
}
FEATURE = {
    "F.dropout1d": (F.dropout1d, 3),
    "F.dropout2d": (F.dropout2d, 4),
    "F.dropout3d": (F.dropout3d, 5),
    "torch.feature_dropout": (torch.feature_dropout, 4),
    "torch.feature_dropout_": (lambda x, p, t: torch.feature_dropout_(x.clone(), p, t), 4),
    "nn.Dropout1d": (lambda x, p, t: nn.Dropout1d(p).train(t)(x), 3),
    "nn.Dropout2d": (lambda x, p, t: nn.Dropout2d(p).train(t)(x), 4),
    "nn.Dropout3d": (lambda x, p, t: nn.Dropout3d(p).train(t)(x), 5),
}
ALPHA = {
    "F.alpha_dropout": F.alpha_dropout,
    "torch.alpha_dropout": torch.alpha_dropout,
    "torch.alpha_dropout_": lambda x, p, t: torch.alpha_dropout_(x.clone(), p, t),
    "nn.AlphaDropout": lambda x, p, t: nn.AlphaDropout(p).train(t)(x),
}
FEATURE_ALPHA = {
    "F.feature_alpha_dropout": F.feature_alpha_dropout,
    "torch.feature_alpha_dropout": torch.feature_alpha_dropout,
    "torch.feature_alpha_dropout_": lambda x, p, t: torch.feature_alpha_dropout_(x.clone(), p, t),
    "nn.FeatureAlphaDropout": lambda x, p, t: nn.FeatureAlphaDropout(p).train(t)(x),
}
ALL = {**PLAIN, **{name: f for name, (f, _) in FEATURE.items()}, **ALPHA, **FEATURE_ALPHA}
DIM = {**dict.fromkeys(ALL, 4), **{name: dim for name, (_, dim) in FEATURE.items()}}


def under(key, fn, *args, always=False, rate=None):
    with KeyedDropout([random.as_key(key)], always=always, rate=rate):
        return fn(*args)


def z_score(x, mean, variance):
    return float((x.double().mean() - mean) / math.sqrt(variance / x.numel()))


def images(name, side=2):
    return torch.randn(3, 5, *(side,) * (DIM[name] - 2), generator=torch.Generator().manual_seed(0))


# -- distributions -------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("name", PLAIN)
def test_entries_are_dropped_at_the_rate_and_the_mean_is_kept(name, p):
    n = 60_000
    out = under(0, PLAIN[name], torch.ones(n), p, True)
    dropped = out == 0
    assert abs(z_score(dropped, p, p * (1 - p))) < 5
    assert abs(z_score(out, 1, p / (1 - p))) < 5
    # The scale is 1/(1 − p) to the rounding of the rate to 2⁻¹⁶.
    kept = out[~dropped]
    assert bool((kept == kept[0]).all())
    assert math.isclose(float(kept[0]) * (1 - p), 1, abs_tol=2**-16 / (1 - p))


def test_rates_are_rounded_to_sixteen_bits_and_never_to_0_or_1():
    n = 2_000_000
    rare = under(0, F.dropout, torch.ones(n), 1e-9)
    assert abs(z_score(rare == 0, 2**-16, 2**-16)) < 5
    assert float(rare.max()) == pytest.approx(1 / (1 - 2**-16))
    frequent = under(0, F.dropout, torch.ones(n), 1 - 1e-9)
    assert abs(z_score(frequent != 0, 2**-16, 2**-16)) < 5
    assert float(frequent.max()) == 2**16
    third = under(0, F.dropout, torch.ones(1000), 1 / 3)
    assert float(third.max()) == pytest.approx(1 / (1 - round(2**16 / 3) / 2**16))


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("name", FEATURE)
def test_feature_dropout_drops_whole_channels(name, p):
    function, dim = FEATURE[name]
    x = torch.ones(200, 100, *(2,) * (dim - 2))
    out = under(0, function, x, p, True).flatten(2)
    assert bool((out == out[..., :1]).all())
    channels = out[..., 0]
    assert abs(z_score(channels == 0, p, p * (1 - p))) < 5
    assert abs(z_score(channels, 1, p / (1 - p))) < 5


def test_feature_dropout_without_a_batch_axis_drops_whole_channels():
    for function, dim in [(F.dropout1d, 2), (F.dropout3d, 4)]:
        out = under(0, function, torch.ones(4000, *(3,) * (dim - 1)), 0.5, True).flatten(1)
        assert bool((out == out[:, :1]).all())
        assert abs(z_score(out[:, 0] == 0, 0.5, 0.25)) < 5


@pytest.mark.filterwarnings("ignore:dropout2d:UserWarning")
def test_dropout2d_takes_three_axes_for_a_batch_as_torch_does():
    out = under(0, F.dropout2d, torch.ones(50, 40, 3), 0.5, True)
    assert bool((out == out[..., :1]).all())
    assert abs(z_score(out[..., 0] == 0, 0.5, 0.25)) < 5


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("name", [*ALPHA, *FEATURE_ALPHA])
def test_alpha_dropout_keeps_mean_and_variance_of_standard_normal_inputs(name, p):
    x = random.normal(3, (600, 200))
    out = under(0, ALL[name], x, p, True).double()
    # E[out⁴] ≤ 20 here, so the square's variance is at most 20.
    assert abs(z_score(out, 0, 1)) < 5
    assert abs(z_score(out.square(), 1, 20)) < 5
    slope = ((1 - p) * (1 + p * SELU_FLOOR**2)) ** -0.5
    floor = slope * SELU_FLOOR * (1 - p)  # slope · (floor) − slope · floor · p
    dropped = torch.isclose(out, torch.tensor(floor, dtype=torch.float64), atol=1e-3, rtol=0)
    assert abs(z_score(dropped, p, p * (1 - p))) < 6  # a few normal entries come close
    rest = (out - (slope * x - slope * SELU_FLOOR * p))[~dropped]
    assert float(rest.abs().max()) < 1e-3


@pytest.mark.parametrize("name", FEATURE_ALPHA)
def test_feature_alpha_dropout_drops_whole_channels(name):
    out = under(0, FEATURE_ALPHA[name], torch.full((300, 50, 2, 2), 7.0), 0.3, True).flatten(2)
    assert bool((out == out[..., :1]).all())
    assert abs(z_score(out[..., 0] < 0, 0.3, 0.21)) < 5


def test_attention_weights_are_dropped():
    heads, time, width = 40, 50, 4
    q = torch.zeros(heads, time, width)
    # All scores are 0, so each weight is 1/time, and with the identity as values the output
    # is the weights themselves.
    values = torch.eye(time).expand(heads, time, time)
    out = under(0, F.scaled_dot_product_attention, q, q, values, None, 0.3)
    assert abs(z_score(out == 0, 0.3, 0.21)) < 5
    assert abs(z_score(out * time, 1, 0.3 / 0.7)) < 5


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_drops_in_evaluation_mode_if_asked(need_weights):
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).eval()
    x = torch.randn(2, 30, 8)

    def run(key, always):
        with KeyedDropout([random.key(key)], always=always):
            return layer(x, x, x, need_weights=need_weights, average_attn_weights=False)

    plain = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
    assert_close(run(0, False), plain)
    assert_close(run(0, True), run(0, True), rtol=0, atol=0)
    assert not torch.allclose(run(0, True)[0], run(1, True)[0])
    if need_weights:
        weights = run(0, True)[1]
        assert abs(z_score(weights == 0, 0.5, 0.25)) < 5
        kept = weights != 0
        assert_close(weights[kept], 2 * plain[1][kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers(layer, packed):
    net = layer(3, 50, num_layers=2, dropout=0.4, batch_first=True).eval()
    data = torch.randn(4, 25, 3)
    x = rnn.pack_padded_sequence(data, torch.tensor([25, 20, 9, 3]), True) if packed else data
    dropped = []

    def run(key, **options):
        with KeyedDropout([random.key(key)], **options) as mode:
            inner = mode._drop
            mode._drop = lambda *args: dropped.append(inner(*args)) or dropped[-1]
            return net(x)[1]

    assert_close(run(0, always=False), net(x)[1])
    assert dropped == []
    assert_close(run(0, always=True), run(0, always=True), rtol=0, atol=0)
    states = [trees.leaves(run(key, always=True))[0] for key in (0, 1)]
    assert_close(states[0][0], states[1][0])  # of the first layer, which nothing precedes
    assert not torch.allclose(states[0][1], states[1][1])
    assert abs(z_score(dropped[0] == 0, 0.4, 0.24)) < 5  # outputs of layer 1 are nowhere 0
    assert_close(run(0, always=True, rate=0.0), net(x)[1])


def test_a_single_recurrent_layer_and_a_rate_of_0_have_no_dropout_to_override():
    x = torch.randn(4, 5, 3)
    for net in (nn.GRU(3, 4), nn.GRU(3, 4, num_layers=2)):
        assert_close(under(0, net, x, always=True, rate=0.9), net(x))
    attention = nn.MultiheadAttention(4, 2).eval()
    y = torch.randn(4, 5, 4)
    with KeyedDropout(KEYS, always=True, rate=0.9):
        outputs = attention(y, y, y)[0]
    assert_close(outputs, attention(y, y, y)[0])


# -- rates and modes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rate_0_rate_1_the_override_and_training(name):
    function, x = ALL[name], images(name)
    original = x.clone()
    run = lambda *args, **kw: under(0, function, x, *args, **kw)  # noqa: E731
    assert_close(run(0.0, True), x, rtol=0, atol=0)
    assert_close(run(1.0, True), torch.zeros_like(x), rtol=0, atol=0)
    assert_close(run(0.5, False), x, rtol=0, atol=0)
    active = run(0.5, True)
    assert not torch.equal(active, x)
    assert_close(run(0.5, False, always=True), active, rtol=0, atol=0)
    assert_close(run(0.5, True, rate=0.0), x, rtol=0, atol=0)
    assert_close(run(0.1, True, rate=0.5), active, rtol=0, atol=0)
    assert_close(run(0.0, False, rate=0.5, always=True), active, rtol=0, atol=0)
    assert_close(run(0.9, False, rate=0.5), x, rtol=0, atol=0)
    # No form writes to an input that samples may share; those whose name says it got a clone.
    assert_close(x, original, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dropout", "feature_dropout", "alpha_dropout"])
def test_functions_that_say_in_place_write(name):
    x = torch.ones(20, 20)
    before = x.data_ptr()
    out = under(0, getattr(torch, name + "_"), x, 0.5, True)
    assert out is x
    assert x.data_ptr() == before
    assert_close(x, under(0, getattr(torch, name), torch.ones(20, 20), 0.5, True), rtol=0, atol=0)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_rates_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match=r"dropout probability is .*, expected 0 ≤ p ≤ 1"):
        under(0, F.dropout, torch.ones(3), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_the_dtype_stays_and_the_mask_is_that_of_float32(name, dtype):
    x = images(name) + 5
    wide, out = (under(0, ALL[name], x.to(d), 0.5, True) for d in (torch.float32, dtype))
    assert out.dtype == dtype
    # Three roundings of numbers below 20 in magnitude.
    assert_close(out.float(), wide, rtol=0, atol=3 * 20 * torch.finfo(dtype).eps + 1e-5)


def test_empty_and_scalar_inputs():
    assert under(0, F.dropout, torch.ones(0, 3), 0.5).shape == (0, 3)
    assert float(under(0, F.dropout, torch.tensor(1.0), 0.5)) in (0.0, 2.0)


# -- one sample, one key -------------------------------------------------------------------


class Mixed(nn.Module):
    """Every kind of dropout that vmap can batch, in one forward pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.drop2d = nn.Dropout2d(0.4)
        self.alpha = nn.AlphaDropout(0.3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        self.inplace = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        x = self.alpha(self.drop2d(self.conv(x)))
        x = self.encoder(x.flatten(2).mT)
        return F.dropout(self.inplace(x.clone()), 0.2, self.training).mean(1)


def mixed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed().double().eval()


def looped(net, x, keys, **options):
    return torch.stack([_run(net, x, [key], None, options) for key in keys])


def vmapped(net, x, keys, **options):
    index = torch.arange(len(keys))
    return vmap(lambda i: _run(net, x, keys, i, options), randomness="same")(index)


def _run(net, x, keys, index, options):
    with KeyedDropout(keys, index, always=True, **options):
        return net(x)


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("_")])
def test_vmapped_masks_are_those_of_the_loop_bit_for_bit(name):
    x = images(name, side=3)

    def net(x):
        return ALL[name](ALL[name](x, 0.3, True), 0.6, False)

    expected = looped(net, x, KEYS)
    assert_close(vmapped(net, x, KEYS), expected, rtol=0, atol=0)
    assert len({tuple(row.flatten().tolist()) for row in expected}) == len(KEYS)


@given(seed=st.integers(0, 2**64), cuts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_a_sample_does_not_depend_on_its_chunk(seed, cuts):
    net = nn.Sequential(nn.Dropout(0.3), nn.Dropout1d(0.5), nn.AlphaDropout(0.2))
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    keys = [random.fold_in(seed, i) for i in range(5)]
    whole = vmapped(net, x, keys)
    start, stop = sorted(cuts)
    if start < stop:
        assert_close(vmapped(net, x, keys[start:stop]), whole[start:stop], rtol=0, atol=0)
        assert_close(vmapped(net, x, keys[::-1]), whole.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("rate", [None, 0.45])
def test_a_network_of_all_kinds_is_the_same_vmapped_and_looped(rate):
    net, x = mixed(), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    before = snapshot(net)
    expected = looped(net, x, KEYS, rate=rate).detach()
    assert_close(vmapped(net, x, KEYS, rate=rate).detach(), expected)
    assert_unchanged(net, before)  # the global generator, too
    assert bool((expected.std(0) > 0).all())


@pytest.mark.parametrize("inference", [False, True])
def test_threads_draw_the_same_masks(inference, monkeypatch):
    x = torch.ones(50, 8)
    expected = vmapped(F.dropout, x, KEYS)
    monkeypatch.setattr(workers, "THREADS_FROM", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            assert_close(vmapped(F.dropout, x, KEYS).clone(), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_masks_of_samples_calls_and_neighbours_are_independent():
    n = 40_000
    keys = random.split(5, 6)
    out = vmapped(
        lambda x: torch.stack([F.dropout(x, 0.5), F.dropout(x, 0.5)]), torch.ones(n), keys
    )
    signs = (out - 1).flatten(0, 1).double()  # ±1, mean 0, variance 1
    correlations = (signs @ signs.T / math.sqrt(n))[~torch.eye(12, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 5
    for lag in (1, 2, 3, 4, 8):  # four masks entries share a word
        assert abs(z_score(signs[:, lag:] * signs[:, :-lag], 0, 1)) < 5


# -- gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("_")])
def test_gradients_pass_through_the_mask(name):
    x = images(name).double()
    leaf = x.clone().requires_grad_()
    out = under(0, ALL[name], leaf, 0.5, True)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    # Affine in x with the mask fixed: f(x + h) − f(x) = gradient · h.
    h = torch.randn_like(x)
    change = under(0, ALL[name], x + h, 0.5, True) - out.detach()
    assert_close(change, gradient * h)
    assert 0 < int((gradient == 0).sum()) < x.numel()
    by_func = grad(lambda x: under(0, ALL[name], x, 0.5, True).sum())(x)
    assert_close(by_func, gradient, rtol=0, atol=0)


def test_gradients_of_all_samples_in_one_pass():
    net, x = mixed(), torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def loss(x, index):
        return _run(net, x, KEYS, index, {}).square().sum()

    index = torch.arange(len(KEYS))
    batched = vmap(grad(loss), in_dims=(None, 0), randomness="same")(x, index)
    for i, key in enumerate(KEYS):
        single = grad(lambda x, key=key: _run(net, x, [key], None, {}).square().sum())(x)
        assert_close(batched[i], single)


# -- devices -------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", ALL)
def test_masks_on_cuda(name):
    x = images(name).cuda()
    before = torch.cuda.get_rng_state()
    first = under(0, ALL[name], x, 0.5, True)
    assert first.is_cuda
    assert_close(under(0, ALL[name], x, 0.5, True), first, rtol=0, atol=0)
    assert not torch.equal(under(1, ALL[name], x, 0.5, True), first)
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.cuda
def test_rates_on_cuda():
    out = under(0, F.dropout, torch.ones(100_000, device="cuda"), 0.3)
    assert abs(z_score((out == 0).cpu(), 0.3, 0.21)) < 5
    index = torch.arange(len(KEYS), device="cuda")
    x = torch.ones(1000, device="cuda")
    batched = vmap(lambda i: _run(F.dropout, x, KEYS, i, {}), randomness="same")(index)
    assert_close(batched, looped(F.dropout, x, KEYS), rtol=0, atol=0)


def test_a_rate_of_zero_in_training_mode_draws_nothing_from_anywhere():
    nets = (
        (nn.MultiheadAttention(4, 2, dropout=0.5).train(), lambda net, x: net(x, x, x)[0]),
        (nn.LSTM(4, 3, num_layers=2, dropout=0.5).train(), lambda net, x: net(x)[0]),
    )
    x = torch.ones(3, 2, 4)
    for net, call in nets:
        before = torch.get_rng_state()
        with KeyedDropout([random.key(0)], rate=0.0, always=True):
            found = call(net, x)
        assert torch.equal(before, torch.get_rng_state())
        torch.testing.assert_close(found, call(net.eval(), x))
