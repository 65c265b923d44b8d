"""Block-diagonal normals and their factors against dense float64 references."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.posteriors import (
    BlockNormal,
    DenseFactor,
    Diagonal,
    DiagonalFactor,
    KroneckerFactor,
    LowRankFactor,
)

F64 = torch.float64
SHAPES = {"conv": (4, 3), "bias": (4,), "rows": (3, 2), "fc": (5, 2), "gain": (), "none": (0,)}


def gaussian(gen, *shape):
    return torch.randn(shape, generator=gen, dtype=F64)


def basis(gen, *shape, columns=None):
    """Orthonormal columns, laid out as no contiguous matrix is."""
    q = torch.linalg.qr(gaussian(gen, *shape))[0][..., :columns]
    padded = q.new_full((*q.shape[:-2], q.shape[-1], 2 * q.shape[-2]), math.nan)
    view = padded.mT[..., ::2, :]
    view.copy_(q)
    assert view.numel() < 2 or not view.is_contiguous()
    return view


def positive(gen, *shape):
    return gaussian(gen, *shape).abs() + 0.3


def diagonal(gen, n=6, stack=()):
    return DiagonalFactor(positive(gen, *stack, n))


def kronecker(gen, groups=1, o=3, i=4, stack=()):
    shape = (*stack, groups)
    return KroneckerFactor(
        positive(gen, *shape, o, i), basis(gen, *shape, o, o), basis(gen, *shape, i, i)
    )


def dense(gen, blocks=1, m=5, stack=()):
    root = 0.4 * gaussian(gen, *stack, blocks, m, m).tril(-1)
    return DenseFactor(root + torch.diag_embed(positive(gen, *stack, blocks, m)))


def low_rank(gen, blocks=1, m=6, k=3, stack=()):
    return LowRankFactor(
        positive(gen, *stack, blocks, m),
        basis(gen, *stack, blocks, m, m, columns=k),
        positive(gen, *stack, blocks, k),
    )


FACTORS = {
    "diagonal": diagonal,
    "no entries": lambda gen, **kw: diagonal(gen, 0, **kw),
    "kronecker": kronecker,
    "kronecker, one channel": lambda gen, **kw: kronecker(gen, 1, 1, 5, **kw),
    "grouped kronecker": lambda gen, **kw: kronecker(gen, 3, 2, 4, **kw),
    "depthwise kronecker": lambda gen, **kw: kronecker(gen, 5, 1, 3, **kw),
    "dense": dense,
    "dense in blocks": lambda gen, **kw: dense(gen, 4, 3, **kw),
    "low rank": low_rank,
    "low rank in blocks": lambda gen, **kw: low_rank(gen, 3, 4, 2, **kw),
    "rank 0": lambda gen, **kw: low_rank(gen, 2, 3, 0, **kw),
    "rank 1": lambda gen, **kw: low_rank(gen, 1, 4, 1, **kw),
}


def factor_of(name, seed=0, **kw) -> Any:
    return FACTORS[name](torch.Generator().manual_seed(seed), **kw)


def dense_root(factor):
    """R, `[n, n]`, from the formulas of the docstrings, block by block."""
    match factor:
        case DiagonalFactor(std):
            return std.diag()
        case KroneckerFactor(std, left, right):
            parts = [
                torch.kron(a.contiguous(), b.contiguous()) @ s.flatten().diag()
                for s, a, b in zip(std, left, right, strict=True)
            ]
        case DenseFactor(root):
            parts = [torch.linalg.inv(r.tril()).T for r in root]
        case LowRankFactor(std, directions, scales):
            eye = torch.eye(std.shape[1], dtype=std.dtype)
            parts = [
                s.diag() @ (eye + y @ (c - 1).diag() @ y.T)
                for s, y, c in zip(std, directions, scales, strict=True)
            ]
    return torch.block_diag(*parts)


# -- factors -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_every_method_is_that_of_the_dense_covariance(name, batch):
    factor = factor_of(name)
    root = dense_root(factor)
    covariance = root @ root.T
    n = len(root)
    assert factor.size == n
    x = gaussian(torch.Generator().manual_seed(1), *batch, n)
    # Matrices of size 24 at most with a condition number below 1e3.
    near = {"rtol": 1e-11, "atol": 1e-11}
    assert_close(factor.scale(x), x @ root.T, **near)
    assert_close(factor.project(x), x @ root, **near)
    assert_close(factor.whiten(x), x @ torch.linalg.inv(root).T, **near)
    assert_close(factor.whiten(factor.scale(x)), x, **near)
    quadratic = torch.einsum("...i,ij,...j->...", x, covariance, x)
    assert_close(factor.project(x).square().sum(-1), quadratic, **near)
    quadratic = torch.einsum("...i,ij,...j->...", x, torch.linalg.inv(covariance), x)
    assert_close(factor.whiten(x).square().sum(-1), quadratic, rtol=1e-10, atol=1e-10)
    assert_close(factor.log_det(), torch.logdet(covariance) if n else x.new_zeros(()), **near)
    assert_close(factor.variance(), covariance.diagonal(), **near)


@pytest.mark.parametrize("name", FACTORS)
def test_vectors_that_lie_oddly_in_memory(name):
    factor = factor_of(name)
    x = gaussian(torch.Generator().manual_seed(1), 2 * factor.size + 3, 10).T[::2, 3::2]
    for method in (factor.scale, factor.project, factor.whiten):
        assert_close(method(x), method(x.contiguous()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FACTORS)
def test_dtypes_are_promoted_and_never_below_float32(name):
    factor = factor_of(name)
    x = gaussian(torch.Generator().manual_seed(1), 3, factor.size)
    for kind in (torch.bfloat16, torch.float16, torch.float32, F64):
        for vector in (torch.bfloat16, torch.float32, F64):
            mine, theirs = trees.tree_map(lambda t, kind=kind: t.to(kind), factor), x.to(vector)
            wide = torch.promote_types(torch.promote_types(kind, vector), torch.float32)
            exact = trees.tree_map(torch.Tensor.double, mine)
            # Sums of 24 products of numbers below 10, in the wide dtype.
            atol = 1e3 * torch.finfo(wide).eps
            for method in ("scale", "project", "whiten"):
                got = getattr(mine, method)(theirs)
                assert got.dtype == wide
                expected = getattr(exact, method)(theirs.double())
                assert_close(got.double(), expected, rtol=atol, atol=atol)
            least = torch.promote_types(kind, torch.float32)
            assert mine.log_det().dtype == mine.variance().dtype == least


@pytest.mark.parametrize("name", [n for n in FACTORS if n not in ("no entries", "rank 0")])
def test_gradients_in_every_field_and_the_vector(name):
    factor = factor_of(name)
    x = gaussian(torch.Generator().manual_seed(1), 2, factor.size).requires_grad_()
    fields = [field.clone().requires_grad_() for field in factor]

    def all_of(x, *fields):
        made = type(factor)(*fields)
        vectors = (made.scale(x), made.project(x), made.whiten(x))
        return (*vectors, made.log_det(), made.variance())

    assert gradcheck(all_of, (x, *fields))


@pytest.mark.parametrize("name", FACTORS)
def test_vmap_over_a_stack_of_factors(name):
    stacked = factor_of(name, stack=(3,))
    singles = trees.unstack(stacked)
    x = gaussian(torch.Generator().manual_seed(1), 3, 2, singles[0].size)
    for method in ("scale", "project", "whiten"):
        got = vmap(lambda f, v, method=method: getattr(f, method)(v))(stacked, x)
        each = [getattr(f, method)(v) for f, v in zip(singles, x, strict=True)]
        assert_close(got, torch.stack(each), rtol=1e-12, atol=1e-12)
    for method in ("log_det", "variance"):
        got = vmap(lambda f, method=method: getattr(f, method)())(stacked)
        assert_close(got, torch.stack([getattr(f, method)() for f in singles]))


def test_a_low_rank_variance_is_not_negative_where_the_directions_span_everything():
    gen = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(gaussian(gen, 1, 50, 50))[0].float()
    factor = LowRankFactor(torch.ones(1, 50), directions, torch.full((1, 50), 1e-6))
    # The basis is orthonormal to 1e-7, and so is what is left outside of it.
    variance = factor.variance()
    assert bool((variance >= 0.99e-12).all())
    assert bool((variance < 1e-5).all())


def test_a_log_determinant_of_millions_of_entries_is_exact_to_rounding():
    std = torch.full((3_000_000,), 0.1)
    expected = 2 * 3_000_000 * math.log(float(std[0]))
    # Each logarithm is rounded alike, by half a unit in the last place of 2.3.
    assert abs(float(DiagonalFactor(std).log_det()) / expected - 1) < 1.2e-7


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", FACTORS)
def test_vectors_of_another_length_are_refused(name):
    factor = factor_of(name)
    for method, argument in (("scale", "z"), ("project", "v"), ("whiten", "d")):
        for shape in ((2, factor.size + 1), ()):
            with pytest.raises(
                ValueError, match=rf"`{argument}` has shape .*, expected \[\.\.\., {factor.size}\]"
            ):
                getattr(factor, method)(torch.zeros(shape))


# -- the posterior -------------------------------------------------------------------------


def mean_of(seed=0, dtype=F64, stack=()):
    gen = torch.Generator().manual_seed(seed + 100)
    return {name: gaussian(gen, *stack, *shape).to(dtype) for name, shape in SHAPES.items()}


def make(seed=0, *, dtype=F64, factors=F64, stack=()):
    """Every factor once; "conv" and "gain" are one group whose leaves are no neighbours."""
    gen = torch.Generator().manual_seed(seed)
    made = {
        ("bias", "rows"): low_rank(gen, 2, 5, 2, stack=stack),
        ("conv", "gain"): dense(gen, 1, 13, stack=stack),
        ("fc",): kronecker(gen, 1, 5, 2, stack=stack),
        ("none",): diagonal(gen, 0, stack=stack),
    }
    return BlockNormal(mean_of(seed, dtype, stack), trees.tree_map(lambda x: x.to(factors), made))


def dense_covariance(posterior):
    names = trees.names(posterior.mean)
    sizes = [leaf.numel() for leaf in trees.leaves(posterior.mean)]
    places = dict(zip(names, torch.arange(sum(sizes)).split(sizes), strict=True))
    covariance = torch.zeros(sum(sizes), sum(sizes), dtype=F64)
    for covered, factor in posterior.factors.items():
        where = torch.cat([places[name] for name in covered])
        root = dense_root(trees.tree_map(torch.Tensor.double, factor))
        covariance[where[:, None], where] = root @ root.T
    return covariance


def wishart_errors(x, mean, covariance):
    """Errors of the mean and covariance of samples, in standard errors."""
    n, variance = len(x), covariance.diagonal()
    centred = x - mean
    off = ((x.mean(0) - mean) / (variance / n).sqrt()).abs().max()
    # For a normal, Var of (x − μ)ᵢ(x − μ)ⱼ is Σᵢᵢ Σⱼⱼ + Σᵢⱼ².
    spread = ((torch.outer(variance, variance) + covariance.square()) / n).sqrt()
    return float(off), float(((centred.T @ centred / n - covariance) / spread).abs().max())


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_mean_and_covariance_of_samples(dtype):
    posterior = make(dtype=dtype, factors=dtype)
    samples = posterior.sample(3, 40_000)
    x = trees.ravel(samples, batch_dims=1).double()
    mean, covariance = trees.ravel(posterior.mean).double(), dense_covariance(posterior)
    # The standard error of a variance is 0.7 % of it here.
    off, spread = wishart_errors(x, mean, covariance)
    assert off < 5
    assert spread < 5
    exact = 1e-12 if dtype == F64 else 1e-5
    variance = trees.ravel(posterior.variance).double()
    assert_close(variance, covariance.diagonal(), rtol=exact, atol=exact)


@pytest.mark.parametrize("name", [n for n in FACTORS if n != "no entries"])
def test_covariance_of_samples_of_each_factor(name):
    factor = factor_of(name)
    posterior = BlockNormal({"w": torch.zeros(factor.size, dtype=F64)}, {("w",): factor})
    x = posterior.sample(5, 40_000)["w"]
    root = dense_root(factor)
    off, spread = wishart_errors(x, torch.zeros(factor.size), root @ root.T)
    assert off < 5
    assert spread < 5


def test_factors_that_are_all_diagonal_make_the_diagonal_normal():
    mean, std = mean_of(), trees.tree_map(lambda x: x.abs() + 0.1, mean_of(1))
    plain = Diagonal(mean, std)
    # In any order of the groups.
    factors = {(name,): DiagonalFactor(std[name].flatten()) for name in reversed(SHAPES)}
    blocks = BlockNormal(mean, factors)
    assert blocks.draw_size == plain.draw_size == 33
    assert_close(blocks.sample(2, 5), plain.sample(2, 5))
    assert_close(blocks.variance, plain.variance)
    assert_close(blocks.log_prob(mean_of(2)), plain.log_prob(mean_of(2)))


@given(
    seed=st.integers(0, 2**64),
    cuts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, F64]),
    factors=st.sampled_from([torch.float32, F64]),
    into_buffer=st.booleans(),
)
def test_a_sample_does_not_depend_on_its_chunk_or_buffer(seed, cuts, dtype, factors, into_buffer):
    posterior = make(dtype=dtype, factors=factors)
    whole = posterior.sample(seed, 6)
    start, stop = sorted(cuts)
    out = None
    if into_buffer:
        wide = torch.promote_types(dtype, torch.float32)
        out = torch.full((stop - start, posterior.draw_size), math.nan, dtype=wide)
    part = posterior.draw(random.key(seed), start, stop, out)
    assert part.constants is None
    assert part.masks is None
    # Products of another number of rows may round otherwise, in numbers below 20; and one more
    # rounding to the leaf's dtype.
    noise = torch.promote_types(dtype, torch.float32)
    atol = 400 * torch.finfo(noise).eps + (20 * torch.finfo(dtype).eps if dtype != noise else 0)
    for name, leaf in whole.items():
        assert leaf.dtype == dtype
        assert leaf.shape == (6, *SHAPES[name])
        assert_close(part.params[name], leaf[start:stop], rtol=0, atol=atol)


def test_a_draw_into_a_buffer_uses_it_and_leaves_the_posterior_alone():
    posterior = make(dtype=torch.float32, factors=torch.float32)
    before = trees.clone(posterior)
    out = torch.empty(4, posterior.draw_size)
    drawn = posterior.draw(random.key(0), 0, 4, out).params
    storage = out.untyped_storage().data_ptr()
    assert all(leaf.untyped_storage().data_ptr() == storage for leaf in trees.leaves(drawn))
    assert_close(posterior, before, rtol=0, atol=0)


def test_half_precision_means_get_noise_in_float32():
    # In bfloat16, noise would take few distinct values.
    posterior = BlockNormal(
        {"a": torch.zeros(40, dtype=torch.bfloat16), "b": torch.zeros(4000, dtype=F64)},
        {("a",): DiagonalFactor(torch.ones(40)), ("b",): DiagonalFactor(torch.ones(4000))},
    )
    drawn = posterior.sample(0, 3)
    assert drawn["a"].dtype == torch.bfloat16
    assert drawn["b"].dtype == F64
    expected = random.normal_rows(0, 0, 3, 4040, dtype=F64)
    assert_close(drawn["b"], expected[:, 40:], rtol=0, atol=0)
    assert_close(drawn["a"], expected[:, :40].bfloat16(), rtol=0, atol=0)
    out = torch.empty(3, 4040, dtype=F64)
    assert_close(posterior.draw(random.key(0), 0, 3, out).params, drawn, rtol=0, atol=0)


@given(seed=st.integers(0, 10_000))
def test_log_prob_is_that_of_the_dense_normal(seed):
    posterior, params = make(seed), mean_of(seed + 1)
    normal = torch.distributions.MultivariateNormal(
        trees.ravel(posterior.mean), dense_covariance(posterior)
    )
    # Condition numbers below 1e5, in float64.
    assert_close(
        posterior.log_prob(params), normal.log_prob(trees.ravel(params)), rtol=1e-9, atol=1e-9
    )


def test_log_prob_in_float32_of_an_ill_conditioned_precision():
    m = 30
    gen = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(gaussian(gen, m, m))[0]
    precision = q @ torch.diag(torch.logspace(0, 12, m, dtype=F64)) @ q.T
    root = torch.linalg.cholesky(precision).float()
    posterior = BlockNormal({"w": torch.zeros(m)}, {("w",): DenseFactor(root[None])})
    x = {"w": posterior.sample(0, 1)["w"][0]}
    wide = root.double()
    squared = (wide.T @ x["w"].double()).square().sum()
    exact = wide.diagonal().log().sum() - 0.5 * (squared + m * math.log(2 * math.pi))
    got = posterior.log_prob(x)
    assert got.dtype == torch.float32
    # One rounding of the result. In float32, Lᵀ(x − μ) moves it by 4e-5 of it.
    assert_close(got.double(), exact, rtol=1e-7, atol=0)
    assert bool(torch.isfinite(grad(posterior.log_prob)(x)["w"]).all())


def test_log_prob_checks_its_tree():
    wrong = {**mean_of(), "fc": torch.zeros(2, 5, dtype=F64)}
    with pytest.raises(ValueError, match=r"`params\['fc'\]` has shape \(2, 5\).* transposed"):
        make().log_prob(wrong)


def test_samples_density_and_variance_are_differentiable_in_every_field():
    posterior = make()
    at = mean_of(3)
    leaves = [leaf.clone().requires_grad_() for leaf in trees.leaves(posterior)]

    def all_of(*leaves):
        made = trees.unflatten(leaves, posterior)
        samples, variances = made.sample(0, 2), made.variance
        return (*trees.leaves(samples), *trees.leaves(variances), made.log_prob(at))

    assert gradcheck(all_of, tuple(leaves), fast_mode=True)
    by_func = grad(lambda p: p.log_prob(at))(posterior)
    by_autograd = torch.autograd.grad(trees.unflatten(leaves, posterior).log_prob(at), leaves)
    assert_close(trees.leaves(by_func), list(by_autograd))


def test_vmap_over_stacked_posteriors():
    stacked = make(stack=(3,))
    singles = trees.unstack(stacked)
    assert list(singles[0].factors) == list(make().factors)
    at = mean_of(8)
    assert_close(
        vmap(lambda p: p.log_prob(at))(stacked), torch.stack([p.log_prob(at) for p in singles])
    )
    assert_close(vmap(lambda p: p.variance)(stacked), trees.stack([p.variance for p in singles]))
    # One key, one stream of noise for all: not what vmap means by random.
    drawn = vmap(lambda p: p.sample(2, 4), randomness="same")(stacked)
    assert_close(drawn, trees.stack([p.sample(2, 4) for p in singles]))


def test_trees_that_are_nested_or_a_tensor():
    gen = torch.Generator().manual_seed(0)
    mean = {"block": [torch.zeros(2, 3), torch.zeros(2)], "last": torch.zeros(4)}
    names = trees.names(mean)
    posterior = BlockNormal(
        mean, {(names[0],): kronecker(gen, 1, 2, 3), tuple(names[1:]): dense(gen, 1, 6)}
    )
    trees.check_like(posterior.sample(0, 2), mean, name="samples", batch_dims=1)
    trees.check_like(posterior.variance, mean, name="variance")
    single = BlockNormal(torch.zeros(6), {("",): low_rank(gen)})
    assert single.sample(0, 3).shape == (3, 6)


def test_sampling_touches_no_global_state():
    before = torch.get_rng_state()
    make().sample(0, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_number_of_samples_is_checked():
    with pytest.raises(ValueError, match="`num_samples` is 0, expected at least 1"):
        make().sample(0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(("fc",)), r"`factors` has leaves 'fc' missing; expected each leaf once"),
        (
            lambda f: f.update({("fd",): f[("fc",)]}),
            r"`factors` has leaves 'fd' not expected; expected",
        ),
        (
            lambda f: f.update({("fc", "none"): f[("fc",)]}),
            r"`factors` has leaves 'fc', 'none' there twice; expected",
        ),
        (
            lambda f: f.update({("rows", "bias"): f.pop(("bias", "rows"))}),
            r"group \('rows', 'bias'\), expected it in the order of the tree, \('bias', 'rows'\)",
        ),
        (
            lambda f: f.update({("none",): DiagonalFactor(torch.ones(2))}),
            r"`factors\[\('none',\)\]` is over 2 numbers, but its leaves of `mean` hold 0",
        ),
    ],
)
def test_factors_that_do_not_fit_the_mean(change, message):
    posterior = make()
    change(posterior.factors)
    for use in (
        lambda: posterior.sample(0, 1),
        lambda: posterior.variance,
        lambda: posterior.log_prob(mean_of()),
    ):
        with pytest.raises(ValueError, match=message):
            use()


# -- in use --------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3))
    model = fb.Model.from_module(net)
    gen = torch.Generator().manual_seed(0)
    factors = {
        ("0.weight",): kronecker(gen, 2, 2, 9),
        ("0.bias",): dense(gen, 1, 4),
        ("3.weight", "3.bias"): low_rank(gen, 1, 51, 4),
    }
    factors = trees.tree_map(lambda x: 0.1 * x.float(), factors)
    return model, BlockNormal(model.params, factors), torch.randn(6, 2, 4, 4)


@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop", "threads"])
def test_predictions_are_those_of_the_samples(strategy):
    model, posterior, x = network()
    samples = posterior.sample(1, 9)
    expected = torch.stack([model.apply(trees.index(samples, i), x) for i in range(9)])
    for chunk_size in (None, 4):
        pred = fb.predict(
            model, posterior, x, key=1, num_samples=9, strategy=strategy, chunk_size=chunk_size
        )
        assert_close(pred.mean, expected.mean(0))
        assert_close(pred.variance, expected.var(0))


def test_predict_looks_for_what_is_not_finite():
    model, posterior, x = network()
    posterior.factors[("0.bias",)].precision_root[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"posterior.factors.*precision_root.* NaN or infinite"):
        fb.predict(model, posterior, x, key=1, num_samples=2)


def test_mixtures():
    components = [make(seed) for seed in range(3)]
    at = mean_of(9)
    for mixture in (
        fb.posteriors.mixture(components, [1, 2, 3]),
        fb.posteriors.mixture(make(stack=(3,))),
    ):
        each = torch.stack([c.log_prob(at) for c in mixture.components])
        assert_close(mixture.log_prob(at), (each + mixture.weights.log()).logsumexp(0))
        drawn = mixture.sample(0, 5)
        trees.check_like(drawn, at, name="drawn", batch_dims=1)
        trees.check_like(mixture.variance, at, name="variance")
    stacked = fb.posteriors.mixture(make(stack=(3,)))
    assert all(isinstance(c, BlockNormal) for c in stacked.components)


@pytest.mark.cuda
def test_samples_and_densities_on_cuda():
    posterior = trees.tree_map(lambda x: x.cuda(), make())
    drawn = posterior.sample(0, 4)
    assert all(leaf.is_cuda for leaf in trees.leaves(drawn))
    assert_close(posterior.draw(random.key(0), 2, 4).params, trees.tree_map(lambda x: x[2:], drawn))
    assert_close(posterior.log_prob(posterior.mean).cpu(), make().log_prob(make().mean))
