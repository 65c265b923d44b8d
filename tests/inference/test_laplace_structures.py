"""The Gaussian and the evidence of every structure, against dense matrices in float64."""

import math

import pytest
import torch
from torch.func import vmap

from funcbayes import testing
from funcbayes.core import trees
from funcbayes.curvature.blocks import (
    Curvature,
    DenseBlock,
    DiagonalBlock,
    EigenKroneckerBlock,
    KroneckerBlock,
    LowRankBlock,
)
from funcbayes.inference import laplace
from funcbayes.inference.laplace import LaplaceState, Noise
from funcbayes.posteriors import BlockNormal, Diagonal

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "b.bias": (2,)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
ALL = tuple(SHAPES)
TOTAL = sum(SIZES.values())
D = 2  # outputs with a noise of their own


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, g):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def psd(*shape, g, rank=None):
    *lead, m = shape
    root = normal(*lead, m, rank or m + 1, g=g)
    return root @ root.mT


def diagonal(names, g):
    (name,) = names
    return DiagonalBlock(normal(*SHAPES[name], g=g).square())


def dense(names, g, parts=1):
    return DenseBlock(psd(parts, sum(SIZES[n] for n in names) // parts, g=g))


def low_rank(names, g, parts=1, rank=3):
    m = sum(SIZES[n] for n in names) // parts
    vectors = torch.linalg.qr(normal(parts, m, rank, g=g))[0]
    values = normal(parts, rank, g=g).square().sort(-1, descending=True)[0]
    return LowRankBlock(values, vectors)


def kronecker(names, g, groups=1):
    (name,) = names
    rows, columns = SHAPES[name]
    count = torch.tensor(7.0, dtype=torch.float64)
    return KroneckerBlock(
        # Of too low a rank, as factors from few data are: eigenvalues of 0 repeat.
        psd(groups, columns, g=g, rank=1),
        psd(groups, rows // groups, g=g, rank=1 if groups == 1 else None),
        count,
    )


def eigen(names, g, groups=1):
    block = kronecker(names, g, groups)
    rows = block.outputs.shape[-1]
    return EigenKroneckerBlock(
        normal(groups, rows, block.inputs.shape[-1], g=g).square(),
        torch.linalg.qr(block.outputs + torch.eye(rows))[0],
        torch.linalg.qr(block.inputs + torch.eye(block.inputs.shape[-1]))[0],
    )


STRUCTURES = {
    "diagonal": {(name,): diagonal for name in ALL},
    "dense": {ALL: dense},
    "block_diagonal": {(name,): dense for name in ALL},
    "low_rank": {ALL: low_rank},
    "full_rank": {ALL: lambda names, g: low_rank(names, g, rank=TOTAL)},
    "kronecker": {
        ("a.weight",): kronecker,
        ("a.bias",): dense,
        ("b.weight",): kronecker,
        ("b.bias",): dense,
    },
    "eigen": {("a.weight",): eigen, ("a.bias",): dense, ("b.weight",): eigen, ("b.bias",): dense},
    # Blocks of every kind, in groups that are not in the order of the leaves; grouped
    # convolutions and the rows of embeddings among them.
    "mixed": {
        ("a.weight",): lambda names, g: kronecker(names, g, groups=2),
        ("a.bias", "b.bias"): low_rank,
        ("b.weight",): lambda names, g: dense(names, g, parts=2),
    },
    "rows": {
        ("a.weight",): lambda names, g: low_rank(names, g, parts=4, rank=2),
        ("a.bias",): diagonal,
        ("b.weight", "b.bias"): dense,
    },
}


def make(structure, *, seed=0, per_output=False, power=2.0):
    g = generator(seed)
    mean = {name: normal(*shape, g=generator(100)) for name, shape in SHAPES.items()}

    def blocks(g):
        return {names: build(names, g) for names, build in STRUCTURES[structure].items()}

    if per_output:
        parts = [blocks(g) for _ in range(D)]
        stacked = trees.stack(parts)
        for names, block in stacked.items():
            if isinstance(block, KroneckerBlock):
                same = block.inputs[:1].expand_as(block.inputs)
                stacked[names] = block._replace(inputs=same)
            if isinstance(block, EigenKroneckerBlock):
                bases = (b[:1].expand_as(b) for b in block[1:])
                stacked[names] = EigenKroneckerBlock(block.eigenvalues, *bases)
        curvature, shape = Curvature(stacked), (D,)
    else:
        curvature, shape = Curvature(blocks(g)), ()
    noise = Noise(
        0.5 + torch.rand(shape, generator=g, dtype=torch.float64),
        10 + torch.rand(shape, generator=g, dtype=torch.float64),
        torch.tensor(30),
        torch.tensor(power, dtype=torch.float64),
    )
    return LaplaceState(mean, curvature, torch.tensor(30), normal(g=g).square(), noise)


def tree_prior(kind):
    g = generator(7)
    match kind:
        case "scalar":
            return torch.tensor(0.7, dtype=torch.float64)
        case "per_tensor":
            return {name: torch.tensor(0.3 + i).double() for i, name in enumerate(ALL)}
        case "per_element":
            return {name: 0.3 + normal(*shape, g=g).square() for name, shape in SHAPES.items()}


def flat_prior(prior):
    if not isinstance(prior, dict):
        return prior * torch.ones(TOTAL, dtype=torch.float64)
    return torch.cat([(prior[n] * torch.ones(s)).double().flatten() for n, s in SHAPES.items()])


def takes(structure, kind):
    return kind != "per_element" or structure not in ("kronecker", "eigen", "mixed")


def covariance(posterior):
    """Σ in the order of the flat vector, from the roots of its blocks."""
    if isinstance(posterior, Diagonal):
        return trees.ravel(posterior.variance).diag()
    assert isinstance(posterior, BlockNormal)
    starts = dict(zip(ALL, torch.tensor([0, *SIZES.values()]).cumsum(0).tolist(), strict=False))
    found = torch.zeros(TOTAL, TOTAL, dtype=torch.float64)
    for names, factor in posterior.factors.items():
        where = torch.cat([torch.arange(starts[n], starts[n] + SIZES[n]) for n in names])
        rows = factor.scale(torch.eye(len(where), dtype=torch.float64))
        found[where[:, None], where] = rows.T @ rows
    return found


def dense_precision(state, prior, temperature, std=None):
    h = state.curvature.to_dense(state.mean)
    if std is not None:
        h = h * (state.noise.std / std) ** state.noise.power
    return h / temperature + flat_prior(prior).diag()


CASES = [(s, kind) for s in STRUCTURES for kind in ("scalar", "per_tensor", "per_element")]
CASES = [case for case in CASES if takes(*case)]
cases = pytest.mark.parametrize(("structure", "kind"), CASES)


@cases
@pytest.mark.parametrize(("temperature", "std", "power"), [(1.0, None, 2.0), (0.3, 0.9, 4.0)])
def test_posterior_covariance_inverts_the_tempered_curvature_plus_prior(
    structure, kind, temperature, std, power
):
    state, prior = make(structure, power=power), tree_prior(kind)
    posterior = laplace.posterior(
        state, prior_precision=prior, temperature=temperature, noise_std=std
    )
    expected = torch.linalg.inv(dense_precision(state, prior, temperature, std))
    torch.testing.assert_close(covariance(posterior), expected)
    variances = torch.cat([v.flatten() for v in posterior.variance.values()])
    torch.testing.assert_close(variances, expected.diagonal())
    assert isinstance(posterior, Diagonal if structure == "diagonal" else BlockNormal)


@cases
@pytest.mark.parametrize(("temperature", "std", "power"), [(1.0, None, 2.0), (0.3, 0.9, 4.0)])
def test_evidence_equals_the_formula_over_flat_vectors(structure, kind, temperature, std, power):
    state, prior = make(structure, power=power), tree_prior(kind)
    p0, theta = flat_prior(prior), trees.ravel(state.mean) - 0.2
    noise = state.noise
    loss = state.loss
    if std is not None:
        loss = loss + 0.5 * noise.squared_error * (std**-2 - noise.std**-2)
        loss = loss + noise.num_targets * (std / noise.std).log()
    expected = -loss / temperature - 0.5 * (
        torch.logdet(dense_precision(state, prior, temperature, std))
        - p0.log().sum()
        + theta @ (p0 * theta)
    )
    found = laplace.log_marginal_likelihood(
        state, prior_precision=prior, prior_mean=0.2, temperature=temperature, noise_std=std
    )
    torch.testing.assert_close(found, expected)


def options_of(kind, logs):
    """Options from logarithms: of the prior's entries, the temperature and the noise."""
    *log_prior, log_temperature, log_std = logs
    prior = log_prior[0].exp()
    if kind != "scalar":
        prior = dict(zip(ALL, (p.exp() for p in log_prior), strict=True))
    return {
        "prior_precision": prior,
        "temperature": log_temperature.exp(),
        "noise_std": log_std.exp(),
    }


def logs_of(state, kind):
    prior = tree_prior(kind)
    values = list(prior.values()) if isinstance(prior, dict) else [prior]
    values += [torch.tensor(0.6, dtype=torch.float64), 1.3 * state.noise.std]
    return tuple(v.log().detach().clone().requires_grad_() for v in values)


@cases
@pytest.mark.parametrize("per_output", [False, True])
def test_evidence_has_the_right_gradient(structure, kind, per_output):
    state = make(structure, per_output=per_output)

    def evidence(*logs):
        return laplace.log_marginal_likelihood(state, **options_of(kind, logs))

    assert torch.autograd.gradcheck(evidence, logs_of(state, kind))


@cases
@pytest.mark.parametrize("per_output", [False, True])
def test_covariance_has_the_right_gradient(structure, kind, per_output):
    state = make(structure, per_output=per_output)

    def moments(*logs):
        posterior = laplace.posterior(state, **options_of(kind, logs))
        return covariance_of_ones(posterior)

    assert torch.autograd.gradcheck(moments, logs_of(state, kind))


def covariance_of_ones(posterior):
    """Variances, and 1ᵀΣ1: also off the diagonal."""
    variances = torch.cat([v.flatten() for v in posterior.variance.values()])
    if isinstance(posterior, Diagonal):
        return variances
    joint = [
        f.project(torch.ones(f.size).double()).square().sum() for f in posterior.factors.values()
    ]
    return torch.cat([variances, torch.stack(joint)])


@cases
def test_decomposed_states_give_the_same(structure, kind):
    state, prior = make(structure), tree_prior(kind)
    once = laplace.decompose(state)
    for block in once.curvature.blocks.values():
        assert not isinstance(block, KroneckerBlock | DenseBlock)
    options = {"prior_precision": prior, "temperature": 0.4, "noise_std": 0.8}
    torch.testing.assert_close(
        covariance(laplace.posterior(once, **options)),
        covariance(laplace.posterior(state, **options)),
    )
    torch.testing.assert_close(
        laplace.log_marginal_likelihood(once, **options),
        laplace.log_marginal_likelihood(state, **options),
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_curvatures_by_output_add_up_with_their_noise(structure):
    state = make(structure, per_output=True)
    std = torch.tensor([0.4, 1.7], dtype=torch.float64)
    weights = (state.noise.std / std).square()
    if structure in ("kronecker", "mixed"):
        # Factors are averaged apart, so their product is not that of the sum: build the sum.
        blocks = {}
        for names, block in state.curvature.blocks.items():
            if isinstance(block, KroneckerBlock):
                outputs = torch.einsum("d,dgij->gij", weights, block.outputs)
                blocks[names] = KroneckerBlock(block.inputs[0], outputs, block.count[0])
            else:
                first = [trees.index(block, i).to_dense() for i in range(D)]
                total = weights[0] * first[0] + weights[1] * first[1]
                blocks[names] = DenseBlock(total.unsqueeze(0))
        h = Curvature(blocks).to_dense(state.mean)
    else:
        parts = [trees.index(state.curvature, i).to_dense(state.mean) for i in range(D)]
        h = weights[0] * parts[0] + weights[1] * parts[1]
    found = covariance(laplace.posterior(state, prior_precision=0.5, noise_std=std))
    torch.testing.assert_close(found, torch.linalg.inv(h + 0.5 * torch.eye(TOTAL)))
    assert laplace.decompose(state) is state


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_stack_of_states_is_an_ensemble(structure):
    states = [make(structure, seed=seed) for seed in range(3)]
    stacked = trees.stack(states)
    posterior = vmap(laplace.posterior)(stacked)
    evidence = vmap(laplace.log_marginal_likelihood)(stacked)
    for i, state in enumerate(states):
        torch.testing.assert_close(
            covariance(trees.index(posterior, i)), covariance(laplace.posterior(state))
        )
        torch.testing.assert_close(evidence[i], laplace.log_marginal_likelihood(state))
    if structure not in ("eigen", "low_rank", "rows", "full_rank"):
        vmap(laplace.merge)(stacked, stacked)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_of_no_information_is_minus_the_loss(structure):
    state = make(structure)
    zero = trees.tensor_map(lambda x: x * 0, state.curvature)
    blocks = {  # a count of data is not information
        names: block._replace(count=block.count + 1) if isinstance(block, KroneckerBlock) else block
        for names, block in zero.blocks.items()
    }
    state = state._replace(mean=trees.zeros_like(state.mean), curvature=Curvature(blocks))
    evidence = laplace.log_marginal_likelihood(state, prior_precision=1e-3)
    torch.testing.assert_close(evidence, -state.loss, rtol=0, atol=0)


@cases
def test_samples_have_the_covariance(structure, kind):
    state, prior = make(structure), tree_prior(kind)
    posterior = laplace.posterior(state, prior_precision=prior, temperature=0.5)
    expected = torch.linalg.inv(dense_precision(state, prior, 0.5))
    num = 4000
    drawn = posterior.sample(0, num)
    rows = torch.cat([leaf.flatten(1) for leaf in drawn.values()], 1) - trees.ravel(state.mean)
    # In units of the standard deviations an entry of the sample covariance has variance
    # (1 + ρ²) / num: 5 of its deviations are at most 0.11, over 300 entries.
    scale = expected.diagonal().rsqrt()
    error = (rows.T @ rows / num - expected) * scale * scale[:, None]
    correlation = expected * scale * scale[:, None]
    assert float((error / ((1 + correlation.square()) / num).sqrt()).abs().max()) < 5
    # The covariance, not its transpose or that of another structure: entries are drawn jointly.
    means = rows.mean(0) * scale
    assert float(means.abs().max()) < 5 / math.sqrt(num)


# Not in the other process: there the shape hook would break the graph.
@pytest.mark.compile
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("function", [laplace.posterior, laplace.log_marginal_likelihood])
def test_posterior_and_evidence_compile_to_one_graph(structure, function):
    def call(state, log_prior, log_temperature, log_std):
        return function(
            state,
            prior_precision=log_prior.exp(),
            temperature=log_temperature.exp(),
            noise_std=log_std.exp(),
        )

    logs = (torch.tensor(x, dtype=torch.float64) for x in (0.4, -0.3, 0.2))
    testing.check_compiles(call, make(structure), *logs, backend="aot_eager")


# -- merge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s not in ("kronecker", "mixed")])
@pytest.mark.parametrize("per_output", [False, True])
def test_merged_curvatures_are_sums(structure, per_output):
    a, b = (make(structure, seed=seed, per_output=per_output) for seed in (0, 1))
    b = b._replace(noise=b.noise._replace(std=a.noise.std))
    if structure == "eigen":
        for names, block in b.curvature.blocks.items():
            if isinstance(block, EigenKroneckerBlock):
                own = a.curvature.blocks[names]
                b.curvature.blocks[names] = own._replace(eigenvalues=block.eigenvalues)
    merged = laplace.merge(a, b)

    def matrix(state):
        if per_output:
            each = [trees.index(state.curvature, i) for i in range(D)]
            return torch.stack([c.to_dense(state.mean) for c in each])
        return state.curvature.to_dense(state.mean)

    torch.testing.assert_close(matrix(merged), matrix(a) + matrix(b))
    torch.testing.assert_close(merged.loss, a.loss + b.loss)
    torch.testing.assert_close(
        merged.noise.squared_error, a.noise.squared_error + b.noise.squared_error
    )
    assert int(merged.noise.num_targets) == int(merged.num_data) == 60


def test_merged_kronecker_factors_are_sums():
    a, b = make("kronecker", seed=0), make("kronecker", seed=1)
    b = b._replace(noise=a.noise)
    merged = laplace.merge(a, b).curvature.blocks[("a.weight",)]
    ours, theirs = (s.curvature.blocks[("a.weight",)] for s in (a, b))
    for x, y, z in zip(merged, ours, theirs, strict=True):
        torch.testing.assert_close(x, y + z)


def test_low_rank_blocks_merge_beyond_the_rank_of_the_space():
    a, b = make("full_rank", seed=0), make("full_rank", seed=1)
    merged = laplace.merge(a, b._replace(noise=a.noise)).curvature
    assert merged.blocks[ALL].vectors.shape == (1, TOTAL, TOTAL)
    torch.testing.assert_close(
        merged.to_dense(a.mean), a.curvature.to_dense(a.mean) + b.curvature.to_dense(a.mean)
    )


def test_merge_refuses_what_does_not_add_up():
    a, b = make("eigen"), make("eigen", seed=1)
    b = b._replace(noise=a.noise)
    with pytest.raises(
        ValueError, match=r"block of a\.weight has other eigenvectors .*\"kronecker\""
    ):
        laplace.merge(a, b)
    with pytest.raises(ValueError, match=r"has blocks of \(a\.weight\).* expected those of `a`"):
        laplace.merge(make("dense"), make("kronecker"))
    with pytest.raises(ValueError, match=r"is a KroneckerBlock in `b`, expected a EigenKronecker"):
        laplace.merge(a, make("kronecker")._replace(noise=a.noise))
    with pytest.raises(ValueError, match=r"one state has a `noise` and the other has none"):
        laplace.merge(a, a._replace(noise=()))
    other = a.noise._replace(std=a.noise.std * 2)
    with pytest.raises(ValueError, match=r"`b\.noise` has std .* expected"):
        laplace.merge(a, a._replace(noise=other))
    short = make("dense")
    short.curvature.blocks[ALL] = DenseBlock(torch.eye(3).double()[None])
    with pytest.raises(
        ValueError, match=r"block of a\.weight, .* has shape \(1, 3, 3\) in `b`, exp"
    ):
        laplace.merge(make("dense"), short)


# -- definiteness --------------------------------------------------------------------------


def indefinite(structure, smallest):
    """A state whose curvature has one eigenvalue `smallest`, the others positive."""
    state = make(structure)
    names, block = next(iter(state.curvature.blocks.items()))
    match block:
        case DiagonalBlock():
            block.values.view(-1)[0] = smallest
        case DenseBlock():
            values, vectors = torch.linalg.eigh(block.matrix)
            values[..., 0] = smallest
            state.curvature.blocks[names] = DenseBlock(
                (vectors * values.unsqueeze(-2)) @ vectors.mT
            )
        case LowRankBlock() | EigenKroneckerBlock():
            block.eigenvalues.view(-1)[-1] = smallest
    return state, names


@pytest.mark.parametrize("structure", ["diagonal", "dense", "low_rank", "eigen"])
@pytest.mark.parametrize("function", [laplace.posterior, laplace.log_marginal_likelihood])
def test_indefinite_posteriors_are_refused_with_their_block(structure, function):
    state, names = indefinite(structure, -3.0)
    # In units of the prior 1 + (-3) / 2 = -0.5.
    message = (
        rf"precision of {names[0]}.* is not positive definite: .* smallest eigenvalue is -0\.5,"
        r".* more than 1\.5 times"
    )
    with pytest.raises(ValueError, match=message):
        function(state, prior_precision=2.0)
    with pytest.raises(ValueError, match=message):
        function(laplace.decompose(state), prior_precision=2.0)
    stacked = trees.stack([state, make(structure)])
    found = vmap(lambda s: function(s, prior_precision=2.0))(stacked)
    nan = [torch.stack([x[i].isnan().any() for x in trees.leaves(found)]).any() for i in (0, 1)]
    assert nan == [True, False]
    # Enough prior makes it positive.
    expected = torch.linalg.inv(dense_precision(state, torch.tensor(4.0), 1.0))
    for same in (state, laplace.decompose(state)):
        posterior = laplace.posterior(same, prior_precision=4.0)
        torch.testing.assert_close(covariance(posterior), expected)


def test_roundings_of_zero_are_no_reason_to_refuse():
    # Rank 1 at 1e8 in float32: eigenvalues of about ±10 where there should be zeros.
    g = generator(0)
    v = torch.randn(TOTAL, generator=g)
    matrix = 1e8 * torch.outer(v, v)
    noisy = matrix + 4 * torch.randn(TOTAL, TOTAL, generator=g)
    matrix = (noisy + noisy.T) / 2
    assert torch.linalg.eigvalsh(matrix.double()).min() < -1
    state = make("dense")
    mean = trees.tree_map(lambda m: m.float(), state.mean)
    curvature = Curvature({ALL: DenseBlock(matrix[None])})
    state = LaplaceState(mean, curvature, torch.tensor(3), torch.tensor(1.0), ())
    evidence = laplace.log_marginal_likelihood(state, prior_precision=1e-2)
    assert evidence.isfinite()
    assert all(v.isfinite().all() for v in laplace.posterior(state).variance.values())
    once = laplace.decompose(state).curvature.blocks[ALL]
    assert (once.eigenvalues >= 0).all()


def test_curvatures_that_overflow_are_refused():
    state = make("dense")
    state.curvature.blocks[ALL].matrix[0, 1, 0] = math.nan
    with pytest.raises(ValueError, match=r"has NaN or infinite entries"):
        laplace.posterior(state)


# -- arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("function", [laplace.posterior, laplace.log_marginal_likelihood])
@pytest.mark.parametrize("structure", ["kronecker", "eigen"])
def test_kronecker_blocks_take_one_precision_for_a_tensor(function, structure):
    message = r"`prior_precision\['a\.weight'\]` has shape \(4, 3\), expected a number: a Kronecker"
    with pytest.raises(ValueError, match=message):
        function(make(structure), prior_precision=tree_prior("per_element"))
    # Its bias is dense, and takes one for each entry.
    prior = {**tree_prior("per_tensor"), "a.bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    function(make(structure), prior_precision=prior)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [laplace.posterior, laplace.log_marginal_likelihood])
def test_noise_that_does_not_fit_is_named(function):
    state = make("dense")
    with pytest.raises(ValueError, match=r"`noise_std` is given, but the state has no noise"):
        function(state._replace(noise=()), noise_std=1.0)
    with pytest.raises(ValueError, match=r"`noise_std` has shape \(2,\), expected a number: for"):
        function(state, noise_std=torch.ones(2))
    with pytest.raises(ValueError, match=r"`noise_std` is 0\.0, expected positive and finite"):
        function(state, noise_std=0)
    with pytest.raises(TypeError, match=r"`noise_std` is a str"):
        function(state, noise_std="1")
    state = make("dense", per_output=True)
    with pytest.raises(ValueError, match=r"shape \(3,\), expected a number or one for each of 2"):
        function(state, noise_std=torch.ones(3))
    flat = state._replace(curvature=make("dense").curvature)
    with pytest.raises(ValueError, match=r"a leading axis for the 2 outputs of `state\.noise`"):
        function(flat)
    several = make("eigen", per_output=True)
    block = several.curvature.blocks[("a.weight",)]
    basis = block.output_basis * torch.tensor([1.0, -1.0]).double()[:, None, None, None]
    several.curvature.blocks[("a.weight",)] = block._replace(output_basis=basis)
    with pytest.raises(ValueError, match=r"has another basis for each output, expected one"):
        function(several)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mean", "error", "match"),
    [
        (math.nan, ValueError, r"`prior_mean` is nan, expected a finite number"),
        ("0", ValueError, r"`prior_mean` is a str, expected a number, or a tree"),
        ({**dict.fromkeys(ALL, 0.0), "a.bias": torch.zeros(3)}, ValueError, r"shape \(3,\)"),
        ({"a.bias": 0.0}, ValueError, r"prior_mean\['a\.weight'\] is missing"),
        ({**dict.fromkeys(ALL, 0.0), "a.bias": None}, TypeError, r"\['a\.bias'\]` is a NoneType"),
    ],
)
def test_bad_prior_means_are_named(mean, error, match):
    with pytest.raises(error, match=match):
        laplace.log_marginal_likelihood(make("dense"), prior_mean=mean)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "function",
    [laplace.posterior, laplace.log_marginal_likelihood, laplace.decompose, laplace.tune],
)
def test_curvatures_of_other_parameters_are_named(function):
    state = make("dense")
    with pytest.raises(TypeError, match=r"`state\.curvature` is a dict, expected a Curvature"):
        function(state._replace(curvature=state.mean))
    some = make("block_diagonal")
    del some.curvature.blocks[("a.bias",)]
    some.curvature.blocks[("c", "b.bias")] = some.curvature.blocks[("b.bias",)]
    match = r"'a\.bias' has no block; 'c' is not a parameter; 'b\.bias' is in two blocks"
    with pytest.raises(ValueError, match=match):
        function(some)


def test_precisions_keep_the_dtype_of_their_block():
    state = trees.tensor_map(lambda t: t.float() if t.is_floating_point() else t, make("mixed"))
    prior = torch.tensor(2.0, dtype=torch.float64)
    posterior = laplace.posterior(state, prior_precision=prior, noise_std=0.4)
    assert {leaf.dtype for leaf in trees.leaves(posterior)} == {torch.float32}
    assert laplace.log_marginal_likelihood(state, prior_precision=prior).dtype == torch.float32
