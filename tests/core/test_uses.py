"""The re-expressed composites against torch's own, in float64, for every option."""

import inspect
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.testing import assert_close

from funcbayes.core import uses

F64 = torch.float64
RECURRENT_LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def normal(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(*shape, generator=gen, dtype=F64)


# -- the interpreter -----------------------------------------------------------------------


def test_a_rule_answers_its_function_and_no_other_also_under_vmap():
    mode = uses.Interpreter({F.relu: lambda x, inplace=False: x + 10, torch.sin: torch.cos})
    x = torch.tensor([-1.0, 2.0])

    def net(x):
        return F.relu(x), torch.sin(x), x.exp()

    expected = (x + 10, x.cos(), x.exp())
    with mode:
        assert_close(net(x), expected)
        assert_close(vmap(net)(x), expected)
        assert_close(grad(lambda x: torch.sin(x).sum())(x), -x.sin())
    assert_close(F.relu(x), x.clamp_min(0))


def test_inside_a_rule_the_interpreter_is_off_unless_entered():
    seen = []

    def rule(x, inplace=False):
        seen.append("relu")
        with mode:
            return torch.sin(F.relu(x)) if len(seen) == 1 else torch.sin(x)

    mode = uses.Interpreter({F.relu: rule, torch.sin: lambda x: x + 1})
    with mode:
        assert F.relu(torch.tensor(0.0)) == 2  # sin by rule twice; relu itself within relu's rule
    assert seen == ["relu", "relu"]
    plain = uses.Interpreter({F.relu: lambda x, inplace=False: F.relu(x) + 1})
    with plain:
        assert F.relu(torch.tensor(-3.0)) == 1


# -- scaled dot product attention ----------------------------------------------------------

BOOL_MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
ATTENTION = {
    "plain": {},
    "bool mask": {"attn_mask": BOOL_MASK},
    "float mask": {"attn_mask": normal(3, 5)},
    "mask per head": {"attn_mask": normal(2, 4, 3, 5)},
    "float mask with -inf": {"attn_mask": normal(3, 5).masked_fill(~BOOL_MASK, -math.inf)},
    "nothing to attend to": {"attn_mask": BOOL_MASK & torch.tensor([[True], [False], [True]])},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "no dropout": {"dropout_p": 0.0},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_torchs(name):
    options = ATTENTION[name]
    q, k, v = normal(2, 4, 3, 6), normal(2, 4, 5, 6, seed=1), normal(2, 4, 5, 7, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    assert_close(uses.attention(q, k, v, **options), expected)
    assert not expected.isnan().any()

    def gradient(function):
        return grad(lambda args: function(*args, **options).square().sum())((q, k, v))

    assert_close(gradient(uses.attention), gradient(F.scaled_dot_product_attention))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_queries(key_heads, causal):
    q = normal(2, 4, 3, 6)
    k, v = normal(2, key_heads, 5, 6, seed=1), normal(2, key_heads, 5, 6, seed=2)
    options = {"enable_gqa": True, "is_causal": causal}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    assert_close(uses.attention(q, k, v, **options), expected)


@pytest.mark.parametrize("shape", [(3, 6), (4, 3, 6), (2, 2, 4, 3, 6)])
def test_attention_without_and_with_more_batch_axes(shape):
    q, k, v = (normal(*shape, seed=i) for i in range(3))
    assert_close(uses.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_batches():
    q = normal(3, 2, 4, 5, 6)
    expected = torch.stack([uses.attention(x, x, x, is_causal=True) for x in q])
    assert_close(vmap(lambda x: uses.attention(x, x, x, is_causal=True))(q), expected)


# -- multi-head attention ------------------------------------------------------------------

TIME, SOURCE, BATCH, WIDTH, HEADS = 3, 5, 2, 8, 4


def test_signatures_are_torchs():
    own = inspect.signature(uses.multi_head_attention)
    torchs = inspect.signature(F.multi_head_attention_forward)
    assert [(p.name, p.default) for p in own.parameters.values()] == [
        (p.name, p.default) for p in torchs.parameters.values()
    ]


def attention_both_ways(layer, *args, **kwargs):
    """What a `nn.MultiheadAttention` returns by torch's function, and by ours."""
    # An interpreter without rules switches off the fused kernel of evaluation mode.
    with uses.Interpreter({}):
        expected = layer(*args, **kwargs)
    with uses.Interpreter({F.multi_head_attention_forward: uses.multi_head_attention}):
        return layer(*args, **kwargs), expected


def attn_mask(name, time, source, batch):
    gen = torch.Generator().manual_seed(5)
    drop = torch.rand(batch * HEADS, time, source, generator=gen) < 0.4
    drop[..., 0] = False  # something is left to attend to
    return {
        "none": None,
        "bool": drop[0],
        "float": normal(time, source),
        "bool per head": drop,
        "float per head": normal(batch * HEADS, time, source),
    }[name]


@pytest.mark.parametrize("need_weights", ["no", "average", "each"])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "bool per head", "float per head"])
@pytest.mark.parametrize("added", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_masks_and_weights(mask, padding, need_weights, added):
    layer = nn.MultiheadAttention(WIDTH, HEADS, **added).double().eval()
    query, key = normal(TIME, BATCH, WIDTH), normal(SOURCE, BATCH, WIDTH, seed=1)
    ignored = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    ignored[1, 3:] = True
    padded = {"none": None, "bool": ignored, "float": -3.0 * ignored.double()}[padding]
    ours, torchs = attention_both_ways(
        layer,
        query,
        key,
        normal(SOURCE, BATCH, WIDTH, seed=2),
        key_padding_mask=padded,
        attn_mask=attn_mask(mask, TIME, SOURCE, BATCH),
        need_weights=need_weights != "no",
        average_attn_weights=need_weights == "average",
    )
    assert_close(ours, torchs)


STRUCTURES = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "separate projections": {"kdim": 5, "vdim": 7},
    "separate, no bias": {"kdim": 5, "vdim": 7, "bias": False},
    "batch first": {"batch_first": True},
}


CALLS = [
    (structure, which)
    for structure, options in STRUCTURES.items()
    # Keys and values of other widths are other tensors.
    for which in (["self", "key is value"] if "kdim" not in options else []) + ["all differ"]
]


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(("structure", "which"), CALLS)
def test_structures(structure, which, unbatched):
    options = STRUCTURES[structure]
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()

    def draw(length, width, seed):
        if unbatched:
            return normal(length, width, seed=seed)
        shape = (BATCH, length) if options.get("batch_first") else (length, BATCH)
        return normal(*shape, width, seed=seed)

    query = draw(TIME, WIDTH, 0)
    key = query if which == "self" else draw(SOURCE, options.get("kdim", WIDTH), 1)
    value = key if which != "all differ" else draw(SOURCE, options.get("vdim", WIDTH), 2)
    for need_weights in (False, True):
        ours, torchs = attention_both_ways(layer, query, key, value, need_weights=need_weights)
        assert_close(ours, torchs)
    mask = attn_mask("float per head", TIME, key.shape[0 if unbatched else -2], 1)
    if unbatched:
        ours, torchs = attention_both_ways(layer, query, key, value, attn_mask=mask)
        assert_close(ours, torchs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_causal_hint_beside_its_mask(need_weights):
    layer = nn.MultiheadAttention(WIDTH, HEADS).double().eval()
    x = normal(TIME, BATCH, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(TIME, dtype=F64)
    options = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
    ours, torchs = attention_both_ways(layer, x, x, x, **options)
    assert_close(ours, torchs)
    with pytest.raises(ValueError, match="`is_causal` is a hint beside `attn_mask`"):
        uses.multi_head_attention(
            x, x, x, WIDTH, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias, is_causal=True,
        )  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_sequence_that_is_all_padding_gives_what_torch_gives(need_weights):
    layer = nn.MultiheadAttention(WIDTH, HEADS).double().eval()
    x = normal(TIME, BATCH, WIDTH)
    padding = torch.zeros(BATCH, TIME, dtype=torch.bool)
    padding[1] = True
    ours, torchs = attention_both_ways(
        layer, x, x, x, key_padding_mask=padding, need_weights=need_weights
    )
    assert_close(ours, torchs, equal_nan=True)
    assert bool(ours[0].isnan().any()) == need_weights


def test_static_keys_and_values():
    layer = nn.MultiheadAttention(WIDTH, HEADS).double()
    x = normal(TIME, BATCH, WIDTH)
    static = normal(BATCH * HEADS, SOURCE, WIDTH // HEADS)
    args = (
        x, x, x, WIDTH, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, True, 0.0,
        layer.out_proj.weight, layer.out_proj.bias,
    )  # fmt: skip
    options = {"static_k": static, "static_v": 2 * static}
    expected = F.multi_head_attention_forward(*args, **options)
    assert_close(uses.multi_head_attention(*args, **options), expected)


@pytest.mark.parametrize("training", [False, True])
def test_transformer_layers_are_unchanged_and_batch(training):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.0, batch_first=True).double()
    layer.train(training)
    x = normal(3, BATCH, TIME, WIDTH)
    expected = torch.stack([layer(row) for row in x])
    with uses.batchable():
        assert_close(vmap(layer)(x), expected)
        assert_close(layer(x[0]), expected[0])


# -- recurrent layers ----------------------------------------------------------------------

OPTIONS = [
    dict(zip(("num_layers", "bidirectional", "bias", "batch_first"), values, strict=True))
    for values in itertools.product([1, 3], [False, True], [False, True], [False, True])
]
CASES = [(kind, options) for kind in RECURRENT_LAYERS for options in OPTIONS]
CASES += [("lstm", {**options, "proj_size": 2}) for options in OPTIONS]
CASES += [("rnn", {"num_layers": 2, "nonlinearity": "relu"})]


def by_layers():
    def rule(func):
        return lambda *args: uses.stacked_recurrent(func, args)

    return uses.Interpreter({func: rule(func) for func in uses.RECURRENT})


@pytest.mark.parametrize(
    ("kind", "options"), [pytest.param(*c, id=f"{c[0]}-{i}") for i, c in enumerate(CASES)]
)
def test_recurrent_layers_one_by_one_are_torchs(kind, options):
    layer = RECURRENT_LAYERS[kind](4, 3, **options).double()
    batch_first = options.get("batch_first", False)
    x = normal(2, 5, 4) if batch_first else normal(5, 2, 4)
    _, final = layer(x)
    start = (
        tuple(normal(*h.shape, seed=i) for i, h in enumerate(final))
        if kind == "lstm"
        else (normal(*final.shape))
    )
    packed = rnn.pack_padded_sequence(
        x, torch.tensor([3, 5]), batch_first=batch_first, enforce_sorted=False
    )
    cases = [(x,), (x, start), (x[0],), (packed,), (packed, start)]
    for args in cases:
        expected = layer(*args)
        with by_layers():
            assert_close(layer(*args), expected)


@pytest.mark.parametrize("kind", RECURRENT_LAYERS)
def test_gradients_through_recurrent_layers_one_by_one(kind):
    layer = RECURRENT_LAYERS[kind](4, 3, num_layers=2, bidirectional=True).double()
    x = normal(5, 2, 4)
    weights = list(layer.parameters())
    expected = torch.autograd.grad(layer(x)[0].square().sum(), weights)
    with by_layers():
        assert_close(torch.autograd.grad(layer(x)[0].square().sum(), weights), expected)
