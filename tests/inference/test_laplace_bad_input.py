"""Bad priors, and curvatures without a Gaussian, are named by every function that takes them."""

import math
import re
from functools import cache

import jaxtyping
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.curvature.blocks import Curvature, DenseBlock, DiagonalBlock, LowRankBlock
from funcbayes.inference import laplace
from funcbayes.inference.laplace import LaplaceState
from funcbayes.testing import check_pure

STRUCTURES = ("diagonal", "kronecker", "ekfac", "dense", "block_diagonal", "low_rank")
FUNCTIONS = {
    "posterior": laplace.posterior,
    "evidence": laplace.log_marginal_likelihood,
    "tune": laplace.tune,
}
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
EPS = torch.finfo(torch.float64).eps
FEW = settings(max_examples=max(12, settings().max_examples // 2))


@pytest.fixture(autouse=True, scope="module")
def _past_the_shape_hook():
    """Lets arguments of a wrong type reach the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@cache
def fitted(structure, curvature="ggn", seed=0, dtype=torch.float32):
    model = fb.Model.from_module(network(seed).to(dtype))
    data = torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    rank = {"rank": 26} if structure == "low_rank" else {}
    likelihood = fb.likelihoods.Gaussian(noise_std=0.3)
    return laplace.fit(
        model, data, likelihood=likelihood, structure=structure, curvature=curvature, **rank
    )


def refused(call, watched, error, match):
    def refuse():
        with pytest.raises(error, match=match):
            call()

    check_pure(refuse, watched, raises=False)


# -- priors --------------------------------------------------------------------------------

# What a leaf, or all of them, can be wrong by: the values, the error and its message.
BAD_VALUES = {
    "zero": (st.sampled_from([0, 0.0, -0.0, torch.tensor(0.0)]), ValueError, "expected positive"),
    "negative": (
        st.floats(max_value=0, exclude_max=True, allow_infinity=False),
        ValueError,
        "expected positive",
    ),
    "not finite": (
        st.sampled_from([math.nan, math.inf, -math.inf]).flatmap(
            lambda v: st.sampled_from([v, torch.tensor(v)])
        ),
        ValueError,
        "expected positive",
    ),
    # Zero or infinite in float32, the dtype of the curvature.
    "beyond the dtype": (
        st.sampled_from([1e-50, 1e-320, 1e39, 1e300]).flatmap(
            lambda v: st.sampled_from([v, torch.tensor(v, dtype=torch.float64)])
        ),
        ValueError,
        r"in torch\.float32, the curvature's dtype, expected positive and finite there",
    ),
}
BAD_TYPES = st.sampled_from(
    ["1", None, True, 1j, torch.tensor(True), torch.tensor(1j), [1.0], torch.ones(2, 3, 1)]
)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", BAD_VALUES)
@FEW
@given(data=st.data(), structure=st.sampled_from(STRUCTURES))
def test_bad_precisions_are_named(function, case, data, structure):
    values, error, message = BAD_VALUES[case]
    bad, state = data.draw(values), fitted(structure)
    refused(
        lambda: FUNCTIONS[function](state, prior_precision=bad),
        state,
        error,
        f"`prior_precision` is .*{message}",
    )
    name = data.draw(st.sampled_from(list(SHAPES)))
    prior = {**dict.fromkeys(SHAPES, 1.0), name: bad}
    options = {"prior": "per_tensor"} if function == "tune" else {}
    refused(
        lambda: FUNCTIONS[function](state, prior_precision=prior, **options),
        state,
        error,
        rf"`prior_precision\['{re.escape(name)}'\]` is .*{message}",
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@given(data=st.data(), structure=st.sampled_from(["diagonal", "dense", "low_rank"]))
def test_one_bad_entry_of_a_precision_is_named_by_its_leaf(function, data, structure):
    name = data.draw(st.sampled_from(list(SHAPES)))
    prior = {key: torch.ones(shape) for key, shape in SHAPES.items()}
    entry = data.draw(st.integers(0, prior[name].numel() - 1))
    prior[name].view(-1)[entry] = data.draw(st.sampled_from([0.0, -1.0, math.nan, math.inf]))
    options = {"prior": "per_element"} if function == "tune" else {}
    state = fitted(structure)
    refused(
        lambda: FUNCTIONS[function](state, prior_precision=prior, **options),
        [state, prior],
        ValueError,
        rf"`prior_precision\['{re.escape(name)}'\]` is as low as .*expected positive and finite",
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@given(structure=st.sampled_from(STRUCTURES), bad=BAD_TYPES, name=st.sampled_from(list(SHAPES)))
def test_precisions_of_a_wrong_type_are_named(function, structure, bad, name):
    state, call = fitted(structure), FUNCTIONS[function]
    both = (TypeError, ValueError)
    refused(lambda: call(state, prior_precision=bad), state, both, "`prior_precision` (is|has)")
    prior = {**dict.fromkeys(SHAPES, 1.0), name: bad}
    refused(
        lambda: call(state, prior_precision=prior), state, both, r"`prior_precision(\[|` is|` has)"
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@given(
    structure=st.sampled_from(STRUCTURES),
    name=st.sampled_from(list(SHAPES)),
    extra=st.sampled_from(["", "3.weight", "0.weigth", "0"]),
)
def test_priors_of_other_leaves_are_named(function, structure, name, extra):
    state, call = fitted(structure), FUNCTIONS[function]
    prior = dict.fromkeys(SHAPES, 1.0)
    missing = {key: value for key, value in prior.items() if key != name}
    match = rf"prior_precision\['{re.escape(name)}'\] is missing"
    refused(lambda: call(state, prior_precision=missing), state, ValueError, match)
    match = rf"prior_precision\['{re.escape(extra)}'\] is not expected"
    refused(lambda: call(state, prior_precision={**prior, extra: 1.0}), state, ValueError, match)
    nested = {"net": prior}
    match = "is missing; .* is not expected"
    refused(lambda: call(state, prior_precision=nested), state, ValueError, match)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(
    structure=st.sampled_from(["diagonal", "dense", "block_diagonal", "low_rank"]),
    name=st.sampled_from(list(SHAPES)),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
)
@example(structure="dense", name="0.weight", shape=(3, 4))
def test_precisions_of_another_shape_are_named(function, structure, name, shape):
    assume(shape != SHAPES[name])
    prior = {**dict.fromkeys(SHAPES, 1.0), name: torch.ones(shape)}
    wanted = re.escape(f"`prior_precision['{name}']` has shape {shape}, expected () or")
    hint = ": was it transposed" if shape == SHAPES[name][::-1] and shape != SHAPES[name] else ""
    state = fitted(structure)
    refused(
        lambda: FUNCTIONS[function](state, prior_precision=prior),
        [state, prior],
        ValueError,
        f"{wanted}.*{re.escape(hint)}",
    )


@pytest.mark.parametrize("function", ["posterior", "evidence"])
@given(structure=st.sampled_from(STRUCTURES), temperature=st.sampled_from([1e-300, 1e-60, 1e-44]))
def test_temperatures_at_which_the_curvature_overflows_are_refused(
    function, structure, temperature
):
    state = fitted(structure)
    refused(
        lambda: FUNCTIONS[function](state, temperature=temperature),
        state,
        ValueError,
        "has NaN or infinite entries, .* its ratio to the temperature and the prior's",
    )


# -- curvatures ----------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*FUNCTIONS, "decompose"])
@given(data=st.data(), structure=st.sampled_from(STRUCTURES))
def test_curvatures_that_are_not_finite_are_named_by_their_block(function, data, structure):
    state = trees.clone(fitted(structure))
    names = data.draw(st.sampled_from(list(state.curvature.blocks)))
    block = state.curvature.blocks[names]
    assume(function != "decompose" or hasattr(block, "inputs") or hasattr(block, "matrix"))
    # On the diagonal: of a symmetric matrix LAPACK reads one half.
    block[0].view(-1)[0] = data.draw(st.sampled_from([math.nan, math.inf]))
    call = {**FUNCTIONS, "decompose": laplace.decompose}[function]
    match = rf"precision of {re.escape(names[0])}.* has NaN or infinite entries"
    refused(lambda: call(state), state, ValueError, match)


@given(
    structure=st.sampled_from(["diagonal", "dense", "block_diagonal", "low_rank"]),
    seed=st.integers(0, 20),
    log_prior=st.floats(-2, 4),
)
def test_indefinite_hessians_are_refused_with_their_smallest_eigenvalue(structure, seed, log_prior):
    state = fitted(structure, "hessian", seed, torch.float64)
    prior = 10.0**log_prior
    smallest = {
        names: float(1 + torch.linalg.eigvalsh(block.to_dense()).min() / prior)
        for names, block in state.curvature.blocks.items()
    }
    # Beside the border by more than the jitter.
    assume(all(abs(value) > 1e-6 for value in smallest.values()))
    wrong = [(names, value) for names, value in smallest.items() if value < 0]
    for call in (laplace.posterior, laplace.log_marginal_likelihood):
        if not wrong:
            assert all(x.isfinite().all() for x in trees.leaves(call(state, prior_precision=prior)))
            continue
        names, value = wrong[0]
        found, enough = (re.escape(f"{number:.3g}") for number in (value, 1 - value))
        match = (
            rf"precision of {re.escape(', '.join(names[:3]))}.* is not positive definite: .*"
            rf"smallest eigenvalue is {found}, .*more than {enough} times"
        )
        refused(lambda call=call: call(state, prior_precision=prior), state, ValueError, match)
    # The factor that the message names for the worst block is enough for all.
    enough = prior * max(1.0, 1.01 * (1 - min(smallest.values())))
    laplace.posterior(state, prior_precision=enough)


@given(num=st.integers(2, 8), roundings=st.floats(-1, 6), seed=st.integers(0, 99))
@example(num=4, roundings=0.3, seed=0)
@example(num=4, roundings=1.5, seed=0)
@example(num=4, roundings=2.5, seed=0)
@example(num=4, roundings=4.0, seed=0)
def test_jitter_is_raised_to_the_rounding_of_the_sums_and_no_further(num, roundings, seed):
    """A relative precision I + H whose smallest eigenvalue is some roundings below 0."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(num, num, generator=g, dtype=torch.float64))[0]
    values = torch.ones(num, dtype=torch.float64)
    size = (num - 1) / num  # of the mean diagonal entry
    values[0] = -(10.0**roundings) * EPS * size
    matrix = (basis * values) @ basis.T
    matrix = (matrix + matrix.T) / 2 - torch.eye(num, dtype=torch.float64)
    state = LaplaceState(
        {"a": torch.zeros(num, dtype=torch.float64)},
        Curvature({("a",): DenseBlock(matrix[None])}),
        torch.tensor(3),
        torch.tensor(1.0, dtype=torch.float64),
        (),
    )
    if roundings < 2.9:  # at most 1e3 roundings are added, and so few numbers round by some
        factor = laplace.posterior(state).factors[("a",)].precision_root
        assert factor.isfinite().all()
        back = factor[0] @ factor[0].mT - torch.eye(num, dtype=torch.float64)
        torch.testing.assert_close(back, matrix, rtol=0, atol=1.1e3 * EPS)
        assert laplace.log_marginal_likelihood(state).isfinite()
    elif roundings > 3.5:
        match = r"precision of a is not positive definite: .*smallest eigenvalue is -.*e-1"
        for call in (laplace.posterior, laplace.log_marginal_likelihood):
            refused(lambda call=call: call(state), state, ValueError, match)


@pytest.mark.parametrize("prior", ["scalar", "per_tensor", "per_element"])
@pytest.mark.parametrize("structure", ["dense", "block_diagonal", "joint"])
def test_tuning_takes_roundings_of_narrow_sums_for_zeros(structure, prior):
    # Rank 2 at 1e6 in float32: eigenvalues of some -0.1 where there should be zeros, which are
    # more than the prior's precision times -1.
    g = torch.Generator().manual_seed(0)
    groups = {"joint": [("a", "b")], "dense": [("a",)], "block_diagonal": [("a",), ("b",)]}
    mean = {"a": torch.randn(12, generator=g), "b": torch.randn(6, generator=g)}
    mean = {name: mean[name] for names in groups[structure] for name in names}
    blocks = {}
    for names in groups[structure]:
        root = 1e3 * torch.randn(sum(mean[n].numel() for n in names), 2, generator=g)
        matrix = root @ root.T
        noise = 0.1 * torch.randn(matrix.shape, generator=g)
        blocks[names] = DenseBlock((matrix + noise + noise.T)[None])
        assert torch.linalg.eigvalsh(blocks[names].matrix.double()).min() < -0.1
    state = LaplaceState(mean, Curvature(blocks), torch.tensor(3), torch.tensor(1.0), ())
    tuned = laplace.tune(state, prior=prior, prior_precision=1e-2, tolerance=1e-2, num_steps=2000)
    assert tuned.log_marginal_likelihood.isfinite()


def test_eigenvalues_far_below_zero_are_no_roundings():
    matrix = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    state = LaplaceState(
        {"a": torch.zeros(3)},
        Curvature({("a",): DenseBlock(matrix[None])}),
        torch.tensor(3),
        torch.tensor(1.0),
        (),
    )
    with pytest.raises(ValueError, match=r"precision of a is not positive definite"):
        laplace.tune(state, prior_precision=0.1)


def test_blocks_without_parameters_or_without_a_rank_have_the_prior():
    none = torch.zeros(0)
    for block in (
        DiagonalBlock(none),
        DenseBlock(torch.zeros(1, 0, 0)),
        LowRankBlock(torch.zeros(1, 0), torch.zeros(1, 0, 0)),
    ):
        state = LaplaceState(
            {"a": none}, Curvature({("a",): block}), torch.tensor(3), torch.tensor(1.0), ()
        )
        assert float(laplace.log_marginal_likelihood(state)) == -1.0
        assert laplace.posterior(state).variance["a"].shape == (0,)
    block = LowRankBlock(torch.zeros(1, 0), torch.zeros(1, 3, 0))
    state = state._replace(mean={"a": torch.ones(3)}, curvature=Curvature({("a",): block}))
    torch.testing.assert_close(laplace.posterior(state).variance["a"], torch.ones(3))
    assert float(laplace.log_marginal_likelihood(state)) == -2.5
