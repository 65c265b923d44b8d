"""Empirical posteriors, mixtures, and the distribution that dropout masks make."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.testing import assert_close

from funcbayes.core import random, trees
from funcbayes.posteriors import Diagonal, DropoutMasks, Empirical, LowRank, Mixture, mixture

F64 = torch.float64


def members(num, *, constants=False):
    params = {"w": torch.arange(float(num))[:, None].repeat(1, 2), "s": torch.arange(num) / 2}
    own = {"mean": torch.arange(num) + 100.0, "count": torch.arange(num)} if constants else {}
    return Empirical(params, own)


def drawn_members(draws):
    return [int(i) for i in draws.params["w"][:, 0]]


# -- Empirical -----------------------------------------------------------------------------


def test_without_a_key_members_come_in_order():
    posterior = members(4, constants=True)
    draws = posterior.draw(None, 1, 3)
    assert drawn_members(draws) == [1, 2]
    assert draws.constants["mean"].tolist() == [101, 102]
    assert draws.masks is None
    assert members(4).draw(None, 0, 4).constants is None
    assert (posterior.num_members, posterior.draw_size) == (4, 0)


@given(
    num=st.integers(1, 6), seed=st.integers(0, 2**64),
    cuts=st.tuples(st.integers(0, 14), st.integers(0, 14)),
)  # fmt: skip
def test_with_a_key_each_cycle_takes_every_member_once(num, seed, cuts):
    posterior, total = members(num, constants=True), 14
    whole = posterior.draw(random.key(seed), 0, total)
    order = drawn_members(whole)
    for start in range(0, total - num + 1, num):
        assert sorted(order[start : start + num]) == list(range(num))
    assert [int(c) for c in whole.constants["count"]] == order  # constants stay with their member
    start, stop = sorted(cuts)
    part = posterior.draw(random.key(seed), start, stop)
    assert drawn_members(part) == order[start:stop]
    assert_close(posterior.sample(seed, total), whole.params, rtol=0, atol=0)


def test_every_member_is_first_equally_often():
    n, num = 1000, 3
    posterior = members(num)
    first = torch.tensor([drawn_members(posterior.draw(random.key(i), 0, 1)) for i in range(n)])
    for member in range(num):
        hits = int((first == member).sum())
        assert abs(hits - n / num) / math.sqrt(n * 2 / 9) < 5


def test_moments_of_members():
    params = {"w": torch.randn(5, 2, dtype=F64), "s": torch.randn(5, dtype=F64)}
    posterior = Empirical(params, {})
    assert_close(posterior.mean, {name: p.mean(0) for name, p in params.items()})
    assert_close(posterior.variance, {name: p.var(0) for name, p in params.items()})
    single = Empirical(trees.tree_map(lambda p: p[:1], params), {})
    assert_close(single.variance, trees.zeros_like(single.mean), rtol=0, atol=0)


def test_members_that_differ_in_number_are_refused():
    with pytest.raises(ValueError, match=r"leading axes are .*\['a'\].*: 2.*: 3"):
        _ = Empirical({"a": torch.zeros(2), "b": torch.zeros(3)}, {}).num_members


# -- Mixture -------------------------------------------------------------------------------


def normals(num, dtype=F64):
    gen = torch.Generator().manual_seed(0)

    def draw():
        return {"w": 3 * torch.randn(2, 2, generator=gen, dtype=F64).to(dtype),
                "s": torch.randn((), generator=gen, dtype=F64).to(dtype)}  # fmt: skip

    return [Diagonal(draw(), trees.tree_map(lambda x: x.abs() + 0.1, draw())) for _ in range(num)]


@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 4.0)])
def test_moments_of_a_mixture(weights):
    components = normals(3)
    posterior = mixture(components, weights)
    w = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=F64)
    w = w / w.sum()
    assert_close(posterior.weights, w)
    means, variances = (
        torch.stack([trees.ravel(getattr(c, name)) for c in components])
        for name in ("mean", "variance")
    )
    mean = w @ means
    assert_close(trees.ravel(posterior.mean), mean)
    assert_close(trees.ravel(posterior.variance), w @ (variances + means.square()) - mean.square())

    n = 500
    x = trees.ravel(posterior.sample(1, n), batch_dims=1)
    spread = trees.ravel(posterior.variance)
    assert float(((x.mean(0) - mean) / (spread / n).sqrt()).abs().max()) < 5
    squares = (x - mean).square()
    # The standard error of the squares is their own, from the sample.
    z = (squares.mean(0) - spread) / (squares.std(0) / math.sqrt(n))
    assert float(z.abs().max()) < 5


@given(seed=st.integers(0, 2**64), cuts=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_a_mixture_sample_does_not_depend_on_its_chunk(seed, cuts):
    posterior = mixture([*normals(2), members_of_normals()], [1, 2, 3])
    whole = posterior.sample(seed, 6)
    start, stop = sorted(cuts)
    if start < stop:
        part = posterior.draw(random.key(seed), start, stop)
        assert_close(part.params, trees.tree_map(lambda x: x[start:stop], whole), rtol=0, atol=0)
        assert part.constants is None


def members_of_normals():
    return Empirical(normals(1)[0].sample(5, 4), {})


def test_components_come_up_by_their_weights():
    fixed = [Diagonal({"w": torch.full((1,), float(i))}, {"w": torch.zeros(1)}) for i in range(3)]
    weights = torch.tensor([0.1, 0.6, 0.3])
    n = 800
    which = mixture(fixed, weights).sample(0, n)["w"][:, 0]
    for i, w in enumerate(weights.tolist()):
        hits = int((which == i).sum())
        assert abs(hits - n * w) / math.sqrt(n * w * (1 - w)) < 5


def test_log_prob_of_a_mixture():
    components, weights = normals(3), [1.0, 2.0, 5.0]
    params = trees.tree_map(torch.zeros_like, components[0].mean)
    dense = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor(weights, dtype=F64)),
        torch.distributions.Independent(
            torch.distributions.Normal(
                torch.stack([trees.ravel(c.mean) for c in components]),
                torch.stack([trees.ravel(c.std) for c in components]),
            ),
            1,
        ),
    )
    expected = dense.log_prob(trees.ravel(params))
    assert_close(mixture(components, weights).log_prob(params), expected)
    single = mixture(normals(2, torch.float32))
    assert single.log_prob(trees.tree_map(torch.Tensor.float, params)).dtype == torch.float32


def test_a_mixture_of_one_stacked_posterior():
    components = normals(3)
    stacked = trees.stack(components)
    assert_close(mixture(stacked).sample(0, 20), mixture(components).sample(0, 20))
    factor = trees.tree_map(lambda m: m[None], components[0].mean)
    low_rank = [LowRank(c.mean, c.std, factor) for c in components]
    assert_close(mixture(trees.stack(low_rank)), mixture(low_rank))
    params = components[0].mean
    assert_close(
        vmap(lambda c: c.log_prob(params))(stacked).logsumexp(0) - math.log(3),
        mixture(components).log_prob(params),
    )


def test_constants_stay_with_their_component():
    parts = [members(2, constants=True), members(3, constants=True)]
    draws = mixture(parts).draw(random.key(0), 0, 30)
    assert [int(c) for c in draws.constants["count"]] == drawn_members(draws)
    assert draws.constants["mean"].shape == (30,)


@pytest.mark.parametrize(
    ("components", "weights", "error", "message"),
    [
        ([], None, ValueError, "`components` is empty"),
        (normals(2), [1.0], ValueError, r"`weights` is \[1.0\], expected 2 positive numbers"),
        (normals(2), [1.0, 0.0], ValueError, "expected 2 positive numbers, one a component"),
        (normals(2), [1.0, -1.0], ValueError, "positive"),
        (normals(2), [1.0, math.nan], ValueError, "positive"),
        (normals(2), [1.0, math.inf], ValueError, "positive"),
        ([normals(1)[0], {"w": 1}], None, TypeError, r"`components\[1\]` is a dict, expected"),
        (
            [DropoutMasks({"w": torch.zeros(1)}, None, "row")],
            None,
            TypeError,
            "is a DropoutMasks, .*dropout masks have none",
        ),
        ([mixture(normals(2))], None, TypeError, "is a Mixture: pass its components instead"),
        (
            [normals(1)[0], Diagonal({"w": torch.zeros(1)}, {"w": torch.ones(1)})],
            None,
            ValueError,
            r"`components\[1\].mean` has another structure",
        ),
        (
            [members(2), members(2, constants=True)],
            None,
            ValueError,
            r"`components\[1\].constants` has \['count', 'mean'\], expected \[\]",
        ),
    ],
)
def test_mixtures_check_their_parts(components, weights, error, message):
    with pytest.raises(error, match=message):
        mixture(components, weights)


def test_a_mixture_checks_the_number_of_samples():
    assert isinstance(mixture(normals(1)), Mixture)
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        mixture(normals(1)).sample(0, 0)


# -- DropoutMasks --------------------------------------------------------------------------


def test_dropout_masks_sample_fixed_parameters_without_copies():
    params = {"w": torch.randn(2, 3), "s": torch.randn(())}
    posterior = DropoutMasks(params, 0.1, "row")
    drawn = posterior.sample(0, 4)
    for name, leaf in params.items():
        assert drawn[name].shape == (4, *leaf.shape)
        assert drawn[name].data_ptr() == leaf.data_ptr()
        assert bool((drawn[name] == leaf).all())
    assert posterior.mean is params
    assert not any(bool(leaf.any()) for leaf in trees.leaves(posterior.variance))
    assert posterior.draw_size == 0


def test_dropout_masks_draw_one_key_a_sample():
    posterior = DropoutMasks({"w": torch.zeros(1)}, 0.2, "batch")
    whole, part = posterior.draw(random.key(3), 0, 6), posterior.draw(random.key(3), 2, 4)
    assert (whole.params, whole.constants) == (None, None)
    assert part.masks == (whole.masks.keys[2:4], 0.2, "batch", posterior.params)
    assert len(set(whole.masks.keys)) == 6
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        posterior.sample(0, 0)
    with pytest.raises(TypeError, match="`key` is a bool"):
        posterior.sample(True, 1)
