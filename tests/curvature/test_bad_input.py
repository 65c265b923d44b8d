"""Bad input to a curvature is named, before anything is kept, and leaves all that is the user's."""

import math
from unittest import mock

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import funcbayes as fb
from funcbayes import curvature
from funcbayes.core import trees

STRUCTURES = ("diagonal", "kronecker", "ekfac", "dense", "block_diagonal", "low_rank")
CURVATURES = ("ggn", "empirical_fisher", "monte_carlo_fisher", "hessian")
CLASSES = 2
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
FEW = settings(max_examples=max(8, settings().max_examples // 2))


@pytest.fixture(autouse=True, scope="module")
def _past_the_shape_hook():
    """Lets arguments of a wrong type reach the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def network():
    """With buffers, masks, a mode and gradients of the user's own."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, CLASSES)
    )
    net.train()
    net[2].eval()
    net(torch.randn(5, 3)).square().sum().backward()
    return net


def inputs(num=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, generator=g)


def labels(num=6):
    return torch.arange(num) % CLASSES


def options(structure, kind):
    found = {"structure": structure, "curvature": kind}
    if "low_rank" in ([structure] if isinstance(structure, str) else []):
        found["rank"] = 2
    if kind == "monte_carlo_fisher":
        found |= {"key": 0, "num_samples": 1}
    return found


@st.composite
def fits(draw, structures=STRUCTURES, curvatures=CURVATURES):
    """A structure of a curvature that has it."""
    kind = draw(st.sampled_from(curvatures))
    refused = {"hessian": ("kronecker", "ekfac"), "monte_carlo_fisher": ("low_rank",)}
    return options(
        draw(st.sampled_from([s for s in structures if s not in refused.get(kind, ())])), kind
    )


def refused(net, data, watched, error, match, likelihood=None, **chosen):
    """Checks the error, and that it leaves the network, the data and the process alone."""
    likelihood = likelihood or fb.likelihoods.Categorical()
    model = fb.Model.from_module(net)

    def call():
        with pytest.raises(error, match=match):
            fb.laplace.fit(model, data, likelihood=likelihood, **chosen)

    fb.testing.check_pure(call, [net, watched], raises=False)


class Untouched:
    """Data that may not be looked at: the options are wrong already."""

    def __iter__(self):
        raise AssertionError("the data were gone through before the options were checked")


BAD_STRUCTURES = {
    "unknown": (st.text().filter(lambda s: s not in STRUCTURES), ValueError, "`structure` is "),
    "type": (
        st.sampled_from([None, 3, ["dense"], {"dense"}, True]),
        TypeError,
        r"`structure` is a .*, expected one of .*, or a mapping",
    ),
    "unknown value": (
        st.sampled_from(["full", None, 3, ["dense"], ""]).map(lambda kind: {"*": kind}),
        ValueError,
        r"`structure\['\*'\]` is .*, expected one of",
    ),
    "key": (
        st.sampled_from([3, None, ("0.weight",)]).map(lambda key: {key: "dense", "*": "diagonal"}),
        TypeError,
        r"`structure` has the key .*, expected a pattern",
    ),
    "left out": (
        st.sampled_from([{}, {"0.*": "dense"}, {"*.bias": "diagonal", "0.*": "dense"}]),
        ValueError,
        r"`structure` has no pattern for '.*end it with \"\*\"",
    ),
    "no parameter": (
        st.sampled_from(["9.*", "*.wieght", ""]).map(lambda p: {p: "dense", "*": "diagonal"}),
        ValueError,
        r"`structure\['.*'\]` is the first match of no parameter",
    ),
    "hidden": (
        st.sampled_from(NAMES).map(lambda name: {"*": "diagonal", name: "dense"}),
        ValueError,
        r"`structure\['.*'\]` is the first match of no parameter",
    ),
}


@pytest.mark.parametrize("case", BAD_STRUCTURES)
@FEW
@given(data=st.data(), kind=st.sampled_from(CURVATURES))
def test_structures_that_a_model_cannot_have_are_named_before_the_data_are_seen(case, data, kind):
    structures, error, match = BAD_STRUCTURES[case]
    chosen = options(data.draw(structures), kind)
    refused(network(), Untouched(), (), error, match, **chosen)


@given(
    structure=st.sampled_from(
        [
            "kronecker",
            "ekfac",
            {"4.*": "ekfac", "*": "dense"},
            {"0.weight": "kronecker", "*": "dense"},
        ]
    )
)
def test_kronecker_factors_of_a_hessian_are_refused_before_the_data_are_seen(structure):
    match = "built from gradients, but the curvature is the Hessian"
    refused(network(), Untouched(), (), ValueError, match, structure=structure, curvature="hessian")


VALUES = st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    chosen=fits(),
    where=st.sampled_from((*NAMES, "2.running_mean", "2.running_var")),
    value=VALUES,
    entry=st.integers(0, 100),
)
def test_non_finite_weights_are_named_before_the_data_are_seen(chosen, where, value, entry):
    net = network()
    leaf = net.state_dict()[where]
    leaf.view(-1)[entry % leaf.numel()] = value
    tree = "constants" if "running" in where else "params"
    match = rf"`{tree}\['{where}'\]` has 1 of {leaf.numel()} entries NaN or infinite"
    refused(net, Untouched(), (), ValueError, match, **chosen)


@given(chosen=fits(), row=st.integers(0, 5), batches=st.sampled_from([[6], [2, 4], [1, 2, 3]]))
def test_nan_inputs_are_named_by_their_batch(chosen, row, batches):
    x, y = inputs(), labels()
    x[row, 1] = math.nan
    data = list(zip(x.split(batches), y.split(batches), strict=True))
    number = sum(row >= end for end in torch.tensor(batches).cumsum(0).tolist())
    match = rf"the loss of batch {number} of `data` is not finite .*do the inputs hold NaN"
    refused(network(), data, data, ValueError, match, **chosen)


# A bounded activation makes the loss finite, so that the infinity shows in the gradients alone.
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_infinite_inputs_are_named_by_the_parameters_that_they_reach(structure, kind):
    x = inputs()
    x[4, 1] = math.inf
    match = r"the curvature of '0\.weight'.* is not finite"
    refused(network(), (x, labels()), x, ValueError, match, **options(structure, kind))


@given(chosen=fits(), row=st.integers(0, 5), value=VALUES, cut=st.integers(1, 5))
def test_non_finite_targets_are_named(chosen, row, value, cut):
    x, y = inputs(), torch.ones(6, CLASSES)
    y[row, 0] = value
    data = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    match = r"`targets` holds 1 NaN or infinite values of \d+, expected finite ones"
    refused(
        network(), data, data, ValueError, match, fb.likelihoods.Gaussian(noise_std=0.5), **chosen
    )


BAD_TARGETS = {
    "float classes": (lambda y: y.float(), ValueError, r"has dtype torch.float32, expected integ"),
    "too large a class": (lambda y: y + 1, ValueError, r"holds labels from 1 to 2, expected 0 to"),
    "negative class": (lambda y: y - 1, ValueError, r"holds labels from -1 to 0, expected 0 to 1"),
    "too few": (lambda y: y[:-1], ValueError, r"has shape \(5,\), expected \(6,\)"),
    "too many": (lambda y: y.repeat(2), ValueError, r"has shape \(12,\), expected \(6,\)"),
    "one hot": (lambda y: nn.functional.one_hot(y), ValueError, r"has the shape of `outputs`"),
    "none": (lambda y: None, TypeError, r"is of type NoneType, expected a tensor"),
    "list": (lambda y: y.tolist(), TypeError, r"is of type list, expected a tensor"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
@FEW
@given(chosen=fits(), good_first=st.booleans())
def test_labels_that_do_not_fit_are_named(case, chosen, good_first):
    make, error, match = BAD_TARGETS[case]
    x, y = inputs(), labels()
    data = [(x, y)] * good_first + [(x, make(y))]
    refused(network(), data, data, error, f"`targets` {match}", **chosen)


@given(chosen=fits(), good_first=st.booleans())
def test_integer_targets_of_a_regression_are_named(chosen, good_first):
    x, y = inputs(), torch.ones(6, CLASSES)
    data = [(x, y)] * good_first + [(x, y.long())]
    match = "`targets` has dtype torch.int64, expected floating point"
    refused(network(), data, data, ValueError, match, fb.likelihoods.Gaussian(), **chosen)


@given(chosen=fits(), make=st.sampled_from([list, tuple, lambda: [(inputs(0), labels(0))] * 2]))
def test_empty_data_are_refused(chosen, make):
    refused(network(), make(), (), ValueError, r"`data` yielded no data", **chosen)


@given(chosen=fits())
def test_generators_are_refused_where_they_are_gone_through_twice_or_used_up(chosen):
    generator = iter([(inputs(), labels())])
    several = chosen["structure"] in ("ekfac", "low_rank") or chosen["curvature"] == "hessian"
    net = network()
    if several:
        refused(net, generator, (), ValueError, r"`data` is an iterator", **chosen)
        assert len(list(generator)) == 1  # it was not begun
        return
    fb.laplace.fit(
        fb.Model.from_module(net), generator, likelihood=fb.likelihoods.Categorical(), **chosen
    )
    refused(net, generator, (), ValueError, r"`data` yielded no data.*exhausted", **chosen)


NOT_PAIRS = {
    "single examples": (
        lambda x, y: torch.utils.data.TensorDataset(x, y),
        "gives single examples, expected batches",
    ),
    "triples": (lambda x, y: [(x, y, y)], r"batch 0 of `data` is a tuple of 3, expected a pair"),
    "no targets": (lambda x, y: [x], r"batch 0 of `data` is a Tensor, expected a pair"),
    "number": (lambda x, y: 3, r"`data` is a int, expected an iterable"),
    "second": (lambda x, y: [(x, y), x], r"batch 1 of `data` is a Tensor, expected a pair"),
}


@pytest.mark.parametrize("case", NOT_PAIRS)
@FEW
@given(chosen=fits())
def test_data_that_are_no_pairs_are_named(case, chosen):
    make, match = NOT_PAIRS[case]
    refused(network(), make(inputs(), labels()), (), TypeError, match, **chosen)


# Of the leaves of `network`; a dense block over n numbers takes 4 n² bytes.
SIZES = {"0.weight": 12, "0.bias": 4, "2.weight": 4, "2.bias": 4, "4.weight": 8, "4.bias": 2}


@given(
    structure=st.sampled_from(["dense", "block_diagonal"]),
    kind=st.sampled_from(["ggn", "empirical_fisher"]),
    free=st.integers(0, 4 * sum(SIZES.values()) ** 2 + 10),
)
def test_dense_blocks_that_do_not_fit_say_how_large_they_are_and_what_fits(structure, kind, free):
    params = sum(SIZES.values())
    names, size, total = "'0.weight', '0.bias', '2.weight' and 3 more", params, params**2
    if structure == "block_diagonal":
        names, size, total = "'0.weight'", 12, sum(size**2 for size in SIZES.values())
    net, data = network(), (inputs(), labels())
    with mock.patch("funcbayes.core.memory.available_bytes", return_value=free):
        if 4 * total <= free:
            model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
            getattr(curvature, kind)(model, data, likelihood, structure=structure)
            return
        refused(
            net,
            data,
            data,
            MemoryError,
            rf"takes {4 * total / 1e6:.3g} MB, and {free / 1e6:.3g} MB are free.* dense one over"
            rf" the {size} numbers of {names} with {4 * size**2 / 1e6:.3g} MB:"
            rf" structure=\"diagonal\" takes {4 * params / 1e6:.3g} MB, .*fewer parameters",
            structure=structure,
            curvature=kind,
        )


def test_all_blocks_are_looked_at_in_one_call(monkeypatch):
    asked = []
    is_finite = trees.is_finite
    monkeypatch.setattr(trees, "is_finite", lambda tree: asked.append(1) or is_finite(tree))
    counts = []
    for depth in (1, 4):
        asked.clear()
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))
        data = inputs(), labels()
        curvature.ggn(fb.Model.from_module(net), data, fb.likelihoods.Categorical())
        counts.append(len(asked))
    assert counts[0] == counts[1]
