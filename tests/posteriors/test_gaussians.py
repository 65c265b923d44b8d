"""Diagonal and low-rank normals: draws, moments and densities against dense references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.testing import assert_close

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.posteriors import Diagonal, LowRank

F64 = torch.float64
SHAPES = {"w": (3, 2), "b": (2,), "scale": (), "none": (0,)}
KINDS = ("diagonal", "low_rank")


def tree(seed, *batch, dtype=F64, positive=False):
    gen = torch.Generator().manual_seed(seed)
    draw = {k: torch.randn((*batch, *s), generator=gen, dtype=F64) for k, s in SHAPES.items()}
    return trees.tree_map(lambda x: (x.abs() + 0.2 if positive else x).to(dtype), draw)


def make(kind, seed=0, *, rank=3, dtype=F64, batch=()):
    mean = tree(seed, *batch, dtype=dtype)
    std = tree(seed + 1, *batch, dtype=dtype, positive=True)
    if kind == "diagonal":
        return Diagonal(mean, std)
    return LowRank(mean, std, tree(seed + 2, *batch, rank, dtype=dtype))


def dense_covariance(posterior):
    std = trees.ravel(posterior.std).double()
    covariance = torch.diag(std.square())
    if isinstance(posterior, LowRank):
        factor = trees.ravel(posterior.factor, batch_dims=1).double()
        covariance = covariance + factor.T @ factor
    return covariance


# -- one sample, one key -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**64),
    cuts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, F64]),
    into_buffer=st.booleans(),
)
def test_a_sample_does_not_depend_on_its_chunk_or_buffer(kind, seed, cuts, dtype, into_buffer):
    posterior = make(kind, dtype=dtype)
    whole = posterior.sample(seed, 6)
    start, stop = sorted(cuts)
    out = None
    if into_buffer:
        wide = torch.promote_types(dtype, torch.float32)
        out = torch.full((stop - start, posterior.draw_size), math.nan, dtype=wide)
    part = posterior.draw(random.key(seed), start, stop, out)
    assert part.constants is None
    assert part.masks is None
    # A product of another number of rows may round otherwise: a few roundings of numbers
    # below 10. Everything else is the same arithmetic.
    atol = 0 if kind == "diagonal" else 40 * torch.finfo(dtype).eps
    for name, leaf in whole.items():
        assert leaf.dtype == dtype
        assert leaf.shape == (6, *SHAPES[name])
        assert_close(part.params[name], leaf[start:stop], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_into_a_buffer_uses_it_and_leaves_the_posterior_alone(kind):
    posterior = make(kind, dtype=torch.float32)
    before = trees.clone(posterior)
    out = torch.empty(4, posterior.draw_size)
    drawn = posterior.draw(random.key(0), 0, 4, out).params
    storage = out.untyped_storage().data_ptr()
    assert all(leaf.untyped_storage().data_ptr() == storage for leaf in trees.leaves(drawn))
    assert_close(posterior, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_touches_no_global_state(kind):
    before = torch.get_rng_state()
    a = make(kind).sample(0, 3)
    state = torch.get_rng_state()
    torch.rand(1)
    assert torch.equal(before, state)
    assert_close(make(kind).sample(random.key(0), 3), a, rtol=0, atol=0)
    assert not torch.equal(make(kind).sample(1, 3)["w"], a["w"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_samples_is_checked(kind):
    posterior = make(kind)
    for num in (0, -3):
        with pytest.raises(ValueError, match=f"`num_samples` is {num}, expected at least 1"):
            posterior.sample(0, num)
    with pytest.raises(TypeError, match="`num_samples` is True, expected an integer"):
        posterior.sample(0, True)


def test_mixed_dtypes_keep_theirs():
    mean = {"a": torch.ones(2000, dtype=torch.bfloat16), "b": torch.ones(2000, dtype=F64)}
    std = trees.tree_map(torch.ones_like, mean)
    factor = trees.tree_map(lambda x: x[None] / 2, mean)
    for posterior in (Diagonal(mean, std), LowRank(mean, std, factor)):
        drawn = posterior.sample(0, 3)
        out = torch.empty(3, posterior.draw_size, dtype=F64)
        buffered = posterior.draw(random.key(0), 0, 3, out).params
        for name, leaf in mean.items():
            assert drawn[name].dtype == buffered[name].dtype == leaf.dtype
        assert_close(buffered, drawn, rtol=0, atol=2**-5)  # one bfloat16 rounding near 4
        z = drawn["a"].double() - 1
        assert 0.8 < float(z.std()) < 1.4


# -- moments -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_covariance_of_samples(kind):
    n = 5000
    posterior = make(kind)
    x = trees.ravel(posterior.sample(7, n), batch_dims=1)
    mean, covariance = trees.ravel(posterior.mean), dense_covariance(posterior)
    variance = covariance.diagonal()
    assert_close(trees.ravel(posterior.variance), variance)
    assert float(((x.mean(0) - mean) / (variance / n).sqrt()).abs().max()) < 5
    # For a normal, Var of (x − μ)ᵢ(x − μ)ⱼ is Σᵢᵢ Σⱼⱼ + Σᵢⱼ².
    centred = x - mean
    error = centred.T @ centred / n - covariance
    spread = ((torch.outer(variance, variance) + covariance.square()) / n).sqrt()
    assert float((error / spread).abs().max()) < 5


def test_a_std_of_0_holds_a_parameter_fixed():
    posterior = Diagonal({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2),
                                                                   "b": torch.ones(2)})  # fmt: skip
    drawn = posterior.sample(0, 5)
    assert bool((drawn["a"] == 1).all())
    assert not bool((drawn["b"] == 1).any())


def test_a_rank_of_0_is_the_diagonal():
    diagonal, empty = make("diagonal"), make("low_rank", rank=0)
    assert empty.rank == 0
    assert_close(empty.sample(0, 3), diagonal.sample(0, 3))
    assert_close(empty.variance, diagonal.variance)
    params = tree(9)
    assert_close(empty.log_prob(params), diagonal.log_prob(params))


def test_rows_are_drawn_alike_for_a_single_tensor():
    posterior = Diagonal(torch.zeros(3), torch.ones(3))  # a tensor is a tree
    expected = random.normal_rows(4, 0, 2, 3)
    assert_close(posterior.sample(4, 2), expected, rtol=0, atol=0)


# -- densities -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 12))
def test_log_prob_is_that_of_the_dense_normal(kind, seed, rank):
    posterior = make(kind, seed, rank=rank)
    params = tree(seed + 3)
    dense = torch.distributions.MultivariateNormal(
        trees.ravel(posterior.mean), dense_covariance(posterior)
    )
    # The covariance's condition number is below 1e4 · rank, in float64.
    assert_close(
        posterior.log_prob(params), dense.log_prob(trees.ravel(params)), rtol=1e-9, atol=1e-9
    )


def test_log_prob_of_a_fixed_parameter():
    mean = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    std = {"a": torch.tensor([0.0, 2.0], dtype=F64), "b": torch.tensor(0.0, dtype=F64)}
    posterior = Diagonal(mean, std)
    at = {"a": torch.tensor([0.0, 1.0], dtype=F64), "b": torch.tensor(0.0, dtype=F64)}
    expected = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(1.0, dtype=F64))
    assert_close(posterior.log_prob(at), expected)
    off = {"a": torch.tensor([0.1, 1.0], dtype=F64), "b": at["b"]}
    assert float(posterior.log_prob(off)) == -math.inf
    # Fixed parameters have no density, and must not spoil the gradients of the others.
    assert_close(grad(posterior.log_prob)(at)["a"], torch.tensor([0.0, -0.25], dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_checks_its_tree(kind):
    wrong = {**tree(0), "w": torch.zeros(2, 3, dtype=F64)}
    with pytest.raises(ValueError, match=r"`params\['w'\]` has shape \(2, 3\).* transposed"):
        make(kind).log_prob(wrong)


# -- transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_differentiable_in_every_field(kind):
    posterior = make(kind)
    weights = tree(5, 4)

    def loss(posterior):
        drawn = posterior.sample(0, 4)
        return sum((w * x).sum() for w, x in zip(weights.values(), drawn.values(), strict=True))

    gradient = grad(loss)(posterior)
    noise = random.normal_rows(0, 0, 4, posterior.draw_size, dtype=F64)
    z = trees.unravel(noise[:, : trees.num_elements(posterior.mean)], posterior.mean, batch_dims=1)
    for name, w in weights.items():
        assert_close(gradient.mean[name], w.sum(0))
        assert_close(gradient.std[name], (w * z[name]).sum(0))
        if kind == "low_rank":
            expected = noise[:, -posterior.rank :].T @ w.reshape(4, w[0].numel())
            assert_close(gradient.factor[name].reshape(expected.shape), expected)

    leaves = [leaf.clone().requires_grad_() for leaf in trees.leaves(posterior)]
    by_autograd = torch.autograd.grad(loss(trees.unflatten(leaves, posterior)), leaves)
    assert_close(list(by_autograd), trees.leaves(gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_stacked_posteriors(kind):
    stacked = make(kind, batch=(3,))
    singles = trees.unstack(stacked)
    params = tree(8)
    assert_close(
        vmap(lambda p: p.log_prob(params))(stacked),
        torch.stack([p.log_prob(params) for p in singles]),
    )
    assert_close(vmap(lambda p: p.variance)(stacked), trees.stack([p.variance for p in singles]))
    # One key, one stream of noise for all: not what vmap means by random.
    drawn = vmap(lambda p: p.sample(2, 4), randomness="same")(stacked)
    assert_close(drawn, trees.stack([p.sample(2, 4) for p in singles]))


def test_parameters_on_several_devices_are_refused():
    mean = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match=r"parameters lie on \['cpu', 'meta'\], expected one dev"):
        Diagonal(mean, mean).sample(0, 1)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_samples_on_cuda(kind):
    posterior = trees.tree_map(lambda x: x.cuda(), make(kind))
    drawn = posterior.sample(0, 4)
    assert all(leaf.is_cuda for leaf in trees.leaves(drawn))
    assert_close(posterior.draw(random.key(0), 2, 4).params, trees.tree_map(lambda x: x[2:], drawn))
    assert posterior.log_prob(posterior.mean).is_cuda


def test_low_rank_density_where_the_factor_outweighs_the_diagonal():
    wide = fb.posteriors.LowRank(
        mean=torch.zeros(6),
        std=torch.full((6,), 1e-3),
        factor=fb.random.normal(0, (3, 6)),
    )
    x = wide.sample(1, 1)[0]
    factor = wide.factor.double()
    covariance = 1e-6 * torch.eye(6, dtype=torch.float64) + factor.T @ factor
    exact = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance)
    # std is 1e-3 rounded to float32, which moves a density of order ten by 1e-7 of it.
    torch.testing.assert_close(
        wide.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-6, atol=1e-5
    )


def test_a_mixture_with_a_component_without_a_density():
    members = fb.posteriors.Empirical({"w": torch.zeros(2, 3)}, {})
    mixture = fb.posteriors.mixture([members])
    with pytest.raises(TypeError, match=r"`components\[0\]` is a Empirical, which has no density"):
        mixture.log_prob({"w": torch.zeros(3)})
