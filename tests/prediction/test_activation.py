"""Draws of outputs in the place of weights: exact for each datum, keyed, pure, and refused else."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.posteriors import Diagonal, LowRank
from funcbayes.posteriors.block_normal import BlockNormal
from funcbayes.posteriors.factors import DenseFactor, DiagonalFactor
from funcbayes.prediction import activation, forward
from funcbayes.testing import networks
from tests.snapshots import assert_unchanged, snapshot

EXACT_KINDS = ("linear", "frozen", "dict", "pair", "inplace", "dict_output", "tuple_output")
OTHER_KINDS = tuple(kind for kind in networks.NETWORKS if kind not in EXACT_KINDS)


def diagonal(params, seed: int = 1, scale: float = 0.3) -> Diagonal:
    """Standard deviations between scale / 2 and scale, all different."""
    leaves = [
        scale * (1 + fb.random.uniform(fb.random.fold_in(seed, i), p.shape, dtype=p.dtype)) / 2
        for i, p in enumerate(trees.leaves(params))
    ]
    return Diagonal(trees.clone(params), trees.unflatten(leaves, params))


def draw(model, posterior, x, num=4, key=0, **options):
    """Every sample's outputs, `[num, batch, *out]`."""
    pred = fb.predict(
        model, posterior, x, key=key, num_samples=num, return_samples=True,
        **{"noise": "activation", **options},
    )  # fmt: skip
    return pred.samples


def make(kind: str, dtype: torch.dtype = torch.float64):
    model = fb.Model.from_module(networks.make(kind, dtype=dtype))
    return model, diagonal(model.params), networks.inputs(kind, 5, dtype=dtype)


def assert_moments(samples, mean, variance):
    """|z| < 5 for the first two moments of normal numbers, `samples` `[num, …]`.

    The sample mean has variance σ²/n, and the sample variance 2σ⁴/(n − 1).
    """
    num = len(samples)
    z = (samples.mean(0) - mean) / (variance / num).sqrt()
    assert z.abs().max() < 5
    z = (samples.var(0) - variance) / (variance * math.sqrt(2 / (num - 1)))
    assert z.abs().max() < 5


def linear_moments(posterior, x, weight="weight", bias="bias"):
    mean, var = posterior.mean, posterior.variance
    return (
        x @ mean[weight].T + mean[bias],
        x.square() @ var[weight].T + var[bias],
    )


# The distribution. 20,000 samples: a standard error of 1 % of a variance.


def test_a_linear_models_moments_are_those_of_the_closed_form():
    model = fb.Model.from_module(nn.Linear(4, 3).double())
    posterior = diagonal(model.params)
    x = fb.random.normal(2, (6, 4), dtype=torch.float64)
    samples = draw(model, posterior, x, num=20_000)
    assert samples.dtype == torch.float64
    assert_moments(samples, *linear_moments(posterior, x))


def test_rows_outputs_and_samples_are_independent_and_normal():
    model = fb.Model.from_module(nn.Linear(4, 3).double())
    posterior = diagonal(model.params)
    x = fb.random.normal(2, (6, 4), dtype=torch.float64)
    mean, variance = linear_moments(posterior, x)
    z = ((draw(model, posterior, x, num=20_000) - mean) / variance.sqrt()).flatten(1)
    # An empirical correlation of independent numbers has standard error n^-½.
    off = torch.corrcoef(z.T) - torch.eye(18, dtype=torch.float64)
    assert off.abs().max() < 5 / math.sqrt(20_000)
    lagged = (z[1:] * z[:-1]).mean(0)
    assert lagged.abs().max() < 5 / math.sqrt(20_000)
    # The fourth moment of a standard normal is 3, that of its estimate has variance 96/n.
    assert ((z**4).mean(0) - 3).abs().max() < 5 * math.sqrt(96 / 20_000)


def test_a_deep_networks_predictive_of_each_row_is_that_of_drawn_weights():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    model = fb.Model.from_module(net)
    posterior = diagonal(model.params)
    x = fb.random.normal(2, (5, 4), dtype=torch.float64)
    by = {
        noise: draw(model, posterior, x, num=20_000, key=key, noise=noise)
        for key, noise in enumerate(("weight", "activation"))
    }

    def compare(values):
        one, other = values["weight"], values["activation"]
        error = ((one.var(0) + other.var(0)) / 20_000).sqrt()
        assert ((one.mean(0) - other.mean(0)) / error).abs().max() < 5

    # Bias of a wrong variance (its square root, say) would be tens of per cent; the standard
    # error of a second moment is 1 %.
    compare(by)
    compare({noise: s.square() for noise, s in by.items()})
    # Both outputs of one row: what the second layer makes of one hidden draw.
    compare({noise: s[..., 0] * s[..., 1] for noise, s in by.items()})


def test_a_fixed_parameter_stays_where_it_is():
    model = fb.Model.from_module(networks.make("linear", dtype=torch.float64))
    zero = Diagonal(trees.clone(model.params), trees.zeros_like(model.params))
    x = networks.inputs("linear", 5, dtype=torch.float64)
    expected = model.apply(model.params, x).expand(4, -1, -1)
    torch.testing.assert_close(draw(model, zero, x), expected, rtol=0, atol=1e-14)


def test_only_the_bias_uncertain_draws_only_the_bias():
    net = nn.Linear(4, 3).double()
    model = fb.Model.from_module(net, lambda name: name == "bias")
    posterior = diagonal(model.params)
    x = fb.random.normal(2, (6, 4), dtype=torch.float64)
    samples = draw(model, posterior, x, num=20_000)
    assert_moments(samples, net(x).detach(), posterior.variance["bias"].expand(6, 3))


def test_a_pure_function_with_matmul_and_add_is_understood():
    params = {
        "hidden": {"w": torch.ones(4, 3), "b": torch.zeros(3)},
        "head": [torch.ones(3, 2)],
    }
    params = trees.tensor_map(torch.Tensor.double, params)

    def apply(p, x):
        return torch.mm(torch.tanh(x @ p["hidden"]["w"] + p["hidden"]["b"]), p["head"][0])

    model = fb.Model(apply, params)
    x = fb.random.normal(2, (6, 4), dtype=torch.float64)
    posterior = diagonal(params)
    assert draw(model, posterior, x).shape == (4, 6, 2)
    # Of the first layer alone the moments are known.
    model = fb.Model(lambda p, x: x @ p["w"] + p["b"], params["hidden"])
    posterior = diagonal(model.params)
    turned = Diagonal(*({"w": t["w"].T, "b": t["b"]} for t in posterior))
    samples = draw(model, posterior, x, num=20_000)
    assert_moments(samples, *linear_moments(turned, x, "w", "b"))


def test_attention_over_one_position_is_exact():
    class One(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    model = fb.Model.from_module(One(4, 2, batch_first=True).double())
    x = fb.random.normal(2, (5, 1, 4), dtype=torch.float64)
    posterior = diagonal(model.params)
    means = [draw(model, posterior, x, 20_000, noise=n).mean(0) for n in ("weight", "activation")]
    error = draw(model, posterior, x, 20_000).std(0) / math.sqrt(20_000 / 2)
    assert ((means[0] - means[1]) / error).abs().max() < 5


# Laws.


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_samples_depend_on_key_and_number_alone(kind):
    model, posterior, x = make(kind)
    options = {"approximate": kind in OTHER_KINDS}
    whole = draw(model, posterior, x, num=7, **options)
    ways = [{"strategy": "loop"}, {"strategy": "threads"}, {}]
    if kind not in networks.UNBATCHABLE_KINDS:
        ways += [{"strategy": "vmap"}, {"strategy": "vmap", "chunk_size": 2}]
    for way in ways:
        torch.testing.assert_close(draw(model, posterior, x, num=7, **way, **options), whole)
        few = draw(model, posterior, x, num=3, **way, **options)
        torch.testing.assert_close(few, trees.tensor_map(lambda s: s[:3], whole))
    other = draw(model, posterior, x, num=7, key=1, **options)
    for one, two in zip(trees.leaves(whole), trees.leaves(other), strict=True):
        assert (one != two).any(0).all()
        assert (one[0] != one[1]).all()  # each sample has numbers of its own


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_nothing_of_the_users_changes(kind):
    net = networks.make(kind)
    model = fb.Model.from_module(net)
    posterior, x = diagonal(model.params), networks.inputs(kind, 5)
    held = trees.clone((posterior, x, model.params))
    before = snapshot(net)
    for noise in ("activation", "activation", "weight"):
        draw(model, posterior, x, noise=noise, approximate=True)
    if kind in OTHER_KINDS:
        with pytest.raises(ValueError, match="approximate=True"):
            draw(model, posterior, x)
    assert_unchanged(net, before)
    pairs = zip(trees.leaves(held), trees.leaves((posterior, x, model.params)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_networks_own_randomness_is_refused_before_it_draws():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(3)

    model = fb.Model.from_module(Noisy(4, 3))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws from torch's global generator"):
        draw(model, diagonal(model.params), torch.ones(2, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_predictions_in_weight_space_stay_what_they_are():
    model, posterior, x = make("linear")
    first = draw(model, posterior, x, noise="weight")
    draw(model, posterior, x)
    # The first call runs sample 0 on its own: equal but for rounding.
    torch.testing.assert_close(draw(model, posterior, x, noise="weight"), first)


# How it runs.


def test_what_lies_before_the_first_uncertain_parameter_runs_once_for_all_samples():
    mapped = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.trunk(x)
            mapped.append(trees.in_transform(hidden))
            return self.head(hidden)

    model = fb.Model.from_module(Net(), lambda name: name.startswith("head"))
    posterior, x = diagonal(model.params), torch.ones(2, 4)
    draw(model, posterior, x, num=9)
    mapped.clear()
    assert draw(model, posterior, x, num=9).shape == (9, 2, 3)
    assert mapped == [False]


def test_moments_of_the_first_use_are_taken_once_for_all_chunks(monkeypatch):
    model, posterior, x = make("linear")
    taken = []
    std = activation._Sampler._std
    monkeypatch.setattr(
        activation._Sampler, "_std", lambda self, call: taken.append(self.done) or std(self, call)
    )
    draw(model, posterior, x, num=6, strategy="loop")
    assert taken.count(0) == 1
    assert taken.count(1) == 6


def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch):
    model, posterior, x = make("linear")
    expected = draw(model, posterior, x, num=16, strategy="loop")
    sizes = []
    whole = forward.all_samples

    def small_machine(model, draws, x):
        size = trees.leading_size(draws.params)
        sizes.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, draws, x)

    monkeypatch.setattr(forward, "all_samples", small_machine)
    found = draw(model, posterior, x, num=16, strategy="vmap")
    assert sizes == [16, 8, 4, 4, 4, 4]
    torch.testing.assert_close(found, expected)


def test_no_rows_give_no_rows():
    model, posterior, x = make("linear")
    assert draw(model, posterior, x[:0]).shape == (4, 0, 3)


def test_no_uncertain_parameter_in_use_is_a_prediction_without_spread():
    model = fb.Model(lambda p, x: x * 2, {"w": torch.ones(3)})
    pred = fb.predict(
        model, diagonal(model.params), torch.ones(2, 3), key=0, num_samples=3, noise="activation"
    )
    assert not pred.variance.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_small_variances(autocast):
    # σ² = 1e-10 is 0 in float16; a² = 1e6 is infinite.
    net = nn.Linear(4, 1)
    model = fb.Model.from_module(net if autocast else net.half())
    mean = trees.zeros_like(model.params)
    std = {"weight": torch.full_like(mean["weight"], 1e-5), "bias": mean["bias"]}
    x = torch.full((3, 4), 1e3, dtype=mean["weight"].dtype)
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        samples = draw(model, Diagonal(mean, std), x, num=4000)
    assert samples.dtype == torch.float16
    # σ = 1e-5 · 1e3 · √4 = 0.02, to float16's rounding of σ, 4 %, and 4 standard errors of 1.1 %.
    assert abs(samples.double().std().item() / 0.02 - 1) < 0.08


def test_it_runs_in_inference_mode_and_with_a_graph_behind_the_posterior():
    model, posterior, x = make("embedding")
    expected = draw(model, posterior, x, approximate=True)
    tracked = trees.tree_map(lambda leaf: leaf.clone().requires_grad_() * 1, posterior)
    assert torch.equal(draw(model, tracked, x, approximate=True), expected)
    model, posterior, x = make("embedding")
    with torch.inference_mode():
        assert torch.equal(draw(model, posterior, x.clone(), approximate=True), expected)


# What it refuses.


def refusal(kind: str) -> str:
    model, posterior, x = make(kind)
    with pytest.raises(ValueError, match="noise='weight'") as caught:
        draw(model, posterior, x)
    assert "pass approximate=True" in str(caught.value)
    return str(caught.value)


def test_convolutions_are_refused_by_name():
    assert "parameter '0.weight' meets 80 positions in conv2d for 5 inputs" in refusal(
        "convolution"
    )


def test_sequences_are_refused_by_name():
    model = fb.Model.from_module(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="parameter 'weight' meets 6 rows in linear for 2 inputs"):
        draw(model, diagonal(model.params), torch.ones(2, 3, 4))
    # The batch axis is the first.
    with pytest.raises(ValueError, match="parameter 'weight' meets 3 rows in linear for 1 inputs"):
        draw(model, diagonal(model.params), torch.ones(1, 3, 4))


def test_tied_weights_are_refused_by_name():
    assert "parameter 'first.weight' is used 2 times in one forward pass" in refusal("tied")


def test_a_layer_called_twice_is_refused_by_name():
    model = fb.Model(
        lambda p, x: F.linear(torch.tanh(F.linear(x, p["w"])), p["w"]), {"w": torch.eye(3)}
    )
    with pytest.raises(ValueError, match="parameter 'w' is used 2 times"):
        draw(model, diagonal(model.params), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.LayerNorm(3), "parameter '1.weight' is used by layer_norm"),
        (nn.BatchNorm1d(3), "parameter '1.weight' is used by batch_norm"),
        (nn.PReLU(3), "parameter '1.weight' is used by prelu"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "parameter '1.parametrizations"),
    ],
)
def test_other_uses_are_refused_by_name(layer, match):
    model = fb.Model.from_module(nn.Sequential(nn.Linear(4, 3), layer).eval())
    with pytest.raises(ValueError, match=match):
        draw(model, diagonal(model.params), torch.ones(2, 4))


def test_uses_that_only_autograd_sees_or_that_autograd_does_not_see_are_refused():
    class Hidden(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, w):
            return x * w

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum(0)

    x = torch.ones(2, 3)
    seen = [
        fb.Model(lambda p, x: Hidden.apply(x, p["w"]), {"w": torch.ones(3)}),
        fb.Model(lambda p, x: x * p["w"].detach(), {"w": torch.ones(3)}),
        fb.Model(lambda p, x: (x * p["w"]).argmax(1).float(), {"w": torch.ones(3)}),
    ]
    for model in seen:
        with pytest.raises(ValueError, match="parameter 'w' is used by"):
            draw(model, diagonal(model.params), x)
        samples = draw(model, diagonal(model.params), x, num=40, approximate=True)
        expected = draw(model, diagonal(model.params), x, num=40, noise="weight")
        torch.testing.assert_close(samples, expected)


def test_shapes_of_parameters_may_be_read():
    def apply(p, x):
        return F.linear(x.type_as(p["w"]), p["w"]) * p["w"].shape[0] + p["w"].new_zeros(3)

    model = fb.Model(apply, {"w": torch.eye(3)})
    assert draw(model, diagonal(model.params), torch.ones(2, 3)).std() > 0


def test_posteriors_with_correlations_are_refused_by_name():
    model, posterior, x = make("linear")
    rank_one = LowRank(*posterior, trees.tree_map(lambda p: p[None], posterior.std))
    dense = {(name,): DenseFactor(torch.eye(p.numel())) for name, p in model.params.items()}
    several = [
        rank_one,
        BlockNormal(posterior.mean, dense),
        fb.posteriors.mixture([posterior, posterior]),
        fb.posteriors.Empirical(trees.stack([model.params] * 2), {}),
    ]
    for other in several:
        with pytest.raises(ValueError, match=f"`posterior` is a {type(other).__name__}"):
            draw(model, other, x)


def test_posteriors_that_are_independent_by_their_fields_are_taken():
    model, posterior, x = make("linear")
    expected = draw(model, posterior, x)
    factors = {(name,): DiagonalFactor(s.flatten()) for name, s in posterior.std.items()}
    same = [
        LowRank(*posterior, trees.tree_map(lambda p: p.new_empty(0, *p.shape), posterior.std)),
        BlockNormal(posterior.mean, factors),
    ]
    for other in same:
        torch.testing.assert_close(draw(model, other, x), expected)


@pytest.mark.usefixtures("unchecked")
def test_another_noise_is_refused():
    model, posterior, x = make("linear")
    with pytest.raises(ValueError, match=r"`noise` is 'both', expected one of \('weight', 'activ"):
        draw(model, posterior, x, noise="both")


def test_another_order_of_calls_than_for_the_first_inputs_is_refused():
    def apply(p, x):
        x = F.linear(x, p["w"])
        return F.linear(x, p["v"]) if bool(x.new_tensor(state["deep"])) else x

    state = {"deep": True}
    model = fb.Model(apply, {"w": torch.eye(3), "v": torch.eye(3)})
    posterior, x = diagonal(model.params), torch.ones(2, 3)
    draw(model, posterior, x)
    state["deep"] = False
    with pytest.raises(ValueError, match="uses its parameters in another way"):
        draw(model, posterior, x)


# What it may do with leave.


def test_every_position_of_a_sequence_has_its_exact_moments():
    model = fb.Model.from_module(nn.Linear(4, 3).double())
    posterior = diagonal(model.params)
    x = fb.random.normal(2, (2, 3, 4), dtype=torch.float64)
    samples = draw(model, posterior, x, num=20_000, approximate=True)
    assert_moments(samples, *linear_moments(posterior, x))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "bias": False}])
def test_every_position_of_a_convolution_has_its_exact_moments(options):
    conv = nn.Conv2d(2, 4, 3, **options).double()
    model = fb.Model.from_module(conv)
    posterior = diagonal(model.params)
    x = fb.random.normal(2, (2, 2, 5, 5), dtype=torch.float64)
    # Each output by each weight: the derivative of the outputs, which are affine.
    jacobian = torch.func.jacrev(model.apply)(model.params, x)
    variance = sum(
        (j.square() * posterior.variance[name]).flatten(4).sum(-1) for name, j in jacobian.items()
    )
    samples = draw(model, posterior, x, num=20_000, approximate=True)
    assert_moments(samples, conv(x).detach(), variance)


def test_a_convolution_at_one_position_needs_no_leave():
    model = fb.Model.from_module(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()))
    assert draw(model, diagonal(model.params), torch.ones(2, 2, 3, 3)).shape == (4, 2, 4)


def test_parameters_of_other_uses_are_drawn_themselves():
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    model = fb.Model.from_module(net, lambda name: name.startswith("1"))
    posterior, x = diagonal(model.params), fb.random.normal(2, (5, 4), dtype=torch.float64)
    # Nothing but such parameters: the numbers are those of weight space.
    expected = draw(model, posterior, x, noise="weight")
    torch.testing.assert_close(draw(model, posterior, x, approximate=True), expected)


def test_a_position_embedding_over_one_axis_of_the_batch_is_drawn_itself():
    model = fb.Model(lambda p, x: x + p["b"], {"b": torch.zeros(4)})
    posterior, x = diagonal(model.params), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="parameter 'b' is used by add"):
        draw(model, posterior, x)
    samples = draw(model, posterior, x, approximate=True)
    torch.testing.assert_close(samples, draw(model, posterior, x, noise="weight"))


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_leave_makes_every_network_run_with_the_right_scale(kind):
    model, posterior, x = make(kind)
    by = {
        noise: draw(model, posterior, x, num=500, noise=noise, approximate=True)
        for noise in ("weight", "activation")
    }
    # Not equal, since positions are independent, but of one size: a term left out, or a variance
    # in the place of a standard deviation, shows.
    ratio = by["activation"].var(0).mean() / by["weight"].var(0).mean()
    assert 0.3 < ratio < 2
