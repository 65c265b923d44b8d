"""The strategies: what they draw is sound, within its documented range, and shrinks to little."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.posteriors import Diagonal, DropoutMasks, Empirical, LowRank, Mixture
from funcbayes.testing import networks, strategies

# beartype, which the shape hook calls, picks the items that it looks at by Python's generator.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Finding goes on until an example is found: a seed makes it the same one on every run.
FIND = settings(
    max_examples=2000,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def smallest(strategy, condition=lambda _: True):
    return find(strategy, condition, settings=FIND)


# -- keys ----------------------------------------------------------------------------------


@given(key=strategies.keys(), plain=strategies.keys(derived=False))
def test_keys_seed_generators(key, plain):
    assert fb.random.normal(key, (2,)).isfinite().all()
    assert plain == fb.random.key(plain.entropy)


def test_keys_are_derived_in_both_ways_and_shrink_to_key_0():
    key = fb.random.key(0)
    assert smallest(strategies.keys()) == key
    assert smallest(strategies.keys(), lambda k: k.path) == fb.random.split(key, 1)[0]
    folded = smallest(strategies.keys(), lambda k: k.path[:1] == (1,))
    assert folded == fb.random.fold_in(key, 4)


# -- tensors and trees ---------------------------------------------------------------------


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 3), max_size=3),
    scales=st.sampled_from([(1e-3, 1e3), (1.0, 1.0), (0.2, 0.5), (0.01, 1e2)]),
    positive=st.booleans(),
    zeros=st.booleans(),
)
def test_tensors_keep_to_their_range(data, dtype, shape, scales, positive, zeros):
    x = data.draw(
        strategies.tensors(shape, dtype=dtype, scales=scales, positive=positive, zeros=zeros)
    )
    assert (x.dtype, list(x.shape)) == (dtype, shape)
    rounding = 1 + torch.finfo(dtype).eps
    assert (x.abs().double() <= 4 * scales[1] * rounding).all()
    if positive:
        assert (x >= 0).all()
        assert ((x == 0) | (x.double() >= 0.1 * scales[0] / rounding)).all()
    if not zeros:
        assert (x != 0).all()


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (lambda x: True, [1.0, 1.0, 1.0]),
        (lambda x: (x == 0).all(), [0.0, 0.0, 0.0]),
        (lambda x: (x > 50).any(), [100.0, 100.0, 100.0]),
        (lambda x: (x < 0.05).any() and (x > 0).all(), [0.01, 0.01, 0.01]),
    ],
)
def test_tensors_shrink_to_plain_ones(condition, expected):
    assert smallest(strategies.tensors((3,)), condition).tolist() == pytest.approx(expected)


def test_tensors_hold_entries_of_all_magnitudes_beside_each_other():
    x = smallest(strategies.tensors((6,)), lambda x: x.abs().max() > 1e4 * x.abs().min() > 0)
    assert x.shape == (6,)
    smallest(strategies.tensors((6,)), lambda x: 0 < x.count_nonzero() < 6)


@given(tree=strategies.parameter_trees(mixed_dtypes=True))
def test_trees_are_what_a_model_takes(tree):
    leaves = trees.leaves(tree)
    assert 1 <= len(leaves) <= 4
    assert 1 <= trees.num_elements(tree) <= 40
    for leaf in leaves:
        assert leaf.dtype in strategies.FLOATS
        assert leaf.dim() <= 3
        assert all(side <= 3 for side in leaf.shape)
    fb.Model(apply=lambda p, x: x, params=tree)
    trees.check_like(trees.unravel(trees.ravel(tree), tree), tree, name="tree")


def test_trees_come_in_every_form_and_shrink_to_a_scalar():
    every = strategies.parameter_trees(containers=[*strategies.CONTAINERS, "namedtuple"])
    assert torch.equal(smallest(every), torch.tensor(1.0))
    for kind in (dict, list, tuple, strategies.Pair):
        tree = smallest(every, lambda t, kind=kind: type(t) is kind and trees.num_elements(t) > 1)
        assert trees.num_elements(tree) == 2
        assert all((leaf == 1).all() for leaf in trees.leaves(tree))
    nested = smallest(every, lambda t: isinstance(t, dict) and list in map(type, t.values()))
    assert trees.num_elements(nested) == 1
    for condition in (
        lambda t: any(leaf.numel() == 0 for leaf in trees.leaves(t)),
        lambda t: len({leaf.dtype for leaf in trees.leaves(t)}) > 1,
    ):
        assert (
            len(trees.leaves(smallest(strategies.parameter_trees(mixed_dtypes=True), condition)))
            == 2
        )


@given(
    tree=strategies.parameter_trees(
        dtypes=[torch.bfloat16], max_leaves=2, max_dims=1, max_side=2, max_elements=3,
        scales=(1.0, 1.0), containers=["list"], empty=False,
    )
)  # fmt: skip
def test_trees_keep_to_their_restrictions(tree):
    leaves = trees.leaves(tree)
    assert len(leaves) <= 2
    assert trees.num_elements(tree) <= 3
    assert all(leaf.dtype == torch.bfloat16 and leaf.dim() <= 1 and leaf.numel() for leaf in leaves)
    assert all(type(part) in (list, Tensor) for part in (tree if type(tree) is list else [tree]))


@given(strategies.parameter_trees(containers=()))
def test_trees_without_containers_are_tensors(tree):
    assert isinstance(tree, Tensor)


# -- networks ------------------------------------------------------------------------------


@given(case=strategies.networks_with_batches(min_batch=0, contiguous=False, dtypes=DTYPES[1:]))
def test_networks_take_their_batches(case):
    before = torch.get_rng_state()
    num = len(case.targets)
    assert not case.net.training
    outputs = case.net(*networks.arguments(case.inputs))
    for leaf in trees.leaves(outputs):
        assert leaf.shape[0] == num
        assert leaf.isfinite().all()
    if case.kind in networks.LOGIT_KINDS:
        assert outputs.shape == (num, networks.NUM_CLASSES)
        fb.likelihoods.Categorical().check(outputs, case.targets)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_every_kind_is_drawn_with_weights_of_its_own(kind):
    only = strategies.networks(kinds=[kind])
    net = smallest(only)
    other = smallest(only, lambda n: not _same_weights(n, net))
    assert isinstance(other, nn.Module)
    # Nothing is left in the global generator's hands, and each seed is one network.
    assert _same_weights(networks.make(kind, seed=3), networks.make(kind, seed=3))


def _same_weights(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_strided_inputs_hold_the_same_numbers(kind):
    x = networks.inputs(kind, 3)
    strided = networks.strided(x)
    for leaf, other in zip(trees.leaves(x), trees.leaves(strided), strict=True):
        assert torch.equal(leaf, other)
        assert leaf.is_contiguous()
        assert not other.is_contiguous()


def test_batches_shrink_to_one_row():
    x, y = smallest(strategies.batches("pair", contiguous=False))
    assert [len(part) for part in x] == [1, 1]
    assert len(y) == 1
    x, _ = smallest(
        strategies.batches("linear", contiguous=False), lambda b: not b[0].is_contiguous()
    )
    assert x.shape == (1, 4)


# -- likelihoods ---------------------------------------------------------------------------


@settings(max_examples=6 * settings().max_examples)  # of several kinds
@given(case=strategies.likelihoods_with_targets(dtypes=DTYPES))
def test_likelihoods_take_their_targets(case):
    likelihood, outputs, targets = case
    likelihood.check(outputs, targets)
    nll = likelihood.nll(outputs, targets)
    assert nll.shape == outputs.shape[:1]
    assert nll.isfinite().all()


@pytest.mark.parametrize("kind", strategies.LIKELIHOODS)
def test_likelihoods_are_drawn_with_every_option(kind):
    only = strategies.likelihoods_with_targets(kinds=[kind], max_batch=2)
    assert len(smallest(only).outputs) == 1
    conditions = {
        "gaussian": [
            lambda c: isinstance(c.likelihood.noise_std, Tensor),
            lambda c: c.outputs.dim() == 1,
            lambda c: c.targets.dim() < c.outputs.dim(),
        ],
        "heteroscedastic": [lambda c: c.outputs.dim() == 3],
        "bernoulli": [
            lambda c: c.likelihood.temperature < 1,
            lambda c: c.targets.dtype == torch.bool,
        ],
        "categorical": [
            lambda c: c.likelihood.temperature > 1,
            lambda c: c.likelihood.class_dim == 1 and c.outputs.dim() == 4,
            lambda c: c.targets.dtype == torch.uint8,
        ],
        "poisson": [
            lambda c: c.targets.dtype == torch.int64,
            lambda c: c.targets.is_floating_point(),
            lambda c: c.targets.dim() < c.outputs.dim(),
            lambda c: (c.targets > 5).any(),
        ],
        "negative_log_likelihood": [
            lambda c: c.likelihood.predictive is None,
            lambda c: c.likelihood.predictive is not None,
            lambda c: c.outputs.dim() == 3,
        ],
    }
    for condition in conditions[kind]:
        smallest(only, condition)


# -- posteriors and states -----------------------------------------------------------------


@given(posterior=strategies.posteriors())
def test_posteriors_sample_and_have_densities(posterior):
    drawn = posterior.sample(0, 3)
    assert all(leaf.isfinite().all() for leaf in trees.leaves(drawn))
    assert all((leaf >= 0).all() for leaf in trees.leaves(posterior.variance))
    if isinstance(posterior, Diagonal | LowRank):
        assert all((leaf > 0).all() for leaf in trees.leaves(posterior.std))
        assert posterior.log_prob(trees.index(drawn, 0)).isfinite()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("diagonal", Diagonal),
        ("low_rank", LowRank),
        ("empirical", Empirical),
        ("mixture", Mixture),
        ("dropout_masks", DropoutMasks),
    ],
)
def test_every_family_is_drawn_and_shrinks_to_one_number(family, kind):
    posterior = smallest(strategies.posteriors(families=[family]))
    assert type(posterior) is kind
    assert trees.num_elements(posterior.mean) == 1
    assert type(smallest(strategies.posteriors(), lambda p: type(p) is kind)) is kind


def test_posteriors_are_drawn_with_every_option():
    def some(condition, **options):
        return smallest(strategies.posteriors(**options), condition)

    some(lambda p: (p.std == 0).any(), params=torch.ones(3), families=["diagonal"], zero_std=True)
    some(lambda p: p.rank == 3, families=["low_rank"])
    assert len(some(lambda p: p.num_members > 2, families=["empirical"]).params) == 3
    every = ["mixture", "diagonal", "low_rank", "empirical"]
    mixed = some(
        lambda p: len(set(map(type, getattr(p, "components", ())))) == 3,
        params=torch.ones(1),
        families=every,
    )
    assert len(mixed.components) == 3
    some(lambda p: p.weights.max() > 0.8 and len(p.weights) > 1, families=["mixture"])
    some(lambda p: p.per == "batch" and p.rate == 0.9, families=["dropout_masks"])


@given(data=st.data(), case=strategies.networks_with_batches(max_batch=2))
def test_posteriors_over_a_model_predict(data, case):
    model = fb.Model.from_module(case.net)
    posterior = data.draw(
        strategies.posteriors(model.params, constants=model.constants, scales=(1e-3, 1e-1))
    )
    pred = fb.predict(model, posterior, case.inputs, key=0, num_samples=2, strategy="loop")
    assert all(leaf.isfinite().all() for leaf in trees.leaves(pred.mean))
    if isinstance(posterior, Empirical):
        assert posterior.constants.keys() == model.constants.keys()


@given(state=strategies.states())
def test_states_make_posteriors(state):
    leaves = trees.leaves_with_names(state)
    assert all(isinstance(leaf, Tensor) and not leaf.requires_grad for _, leaf in leaves)
    module = {
        "SwagState": fb.swag,
        "LaplaceState": fb.laplace,
        "ViState": fb.vi,
        "EnsembleState": fb.ensemble,
    }[type(state).__name__]
    posterior = module.posterior(state)
    assert all(leaf.isfinite().all() for leaf in trees.leaves(posterior.sample(0, 2)))
    if isinstance(posterior, Diagonal):
        assert all((leaf > 0).all() for leaf in trees.leaves(posterior.std))


@pytest.mark.parametrize("method", strategies.METHODS)
def test_every_state_is_drawn_and_shrinks_to_one_number(method):
    state = smallest(strategies.states(methods=[method]))
    assert type(state).__name__.lower().removesuffix("state") == method
    assert all(leaf.numel() <= 1 for leaf in trees.leaves(state))


@given(tree=strategies.parameter_trees(), data=st.data())
def test_what_is_drawn_shares_no_memory_with_the_parameters(tree, data):
    mine = {leaf.untyped_storage().data_ptr() for leaf in trees.leaves(tree) if leaf.numel()}
    drawn = [data.draw(strategies.posteriors(tree)), data.draw(strategies.states(tree))]
    for leaf in trees.tensor_leaves(drawn):
        assert not leaf.numel() or leaf.untyped_storage().data_ptr() not in mine


# -- messages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: strategies.posteriors(families=["normal"]),
            r"`families` has \['normal'\], expect",
        ),
        (
            lambda: strategies.states(methods=["sgld"]),
            r"`methods` has \['sgld'\], expected some of",
        ),
        (
            lambda: strategies.likelihoods_with_targets(kinds=["student"]),
            r"`kinds` has \['student'",
        ),
        (
            lambda: strategies.parameter_trees(containers=["set"]),
            r"`containers` has \['set'\], exp",
        ),
        (lambda: strategies.tensors((2,), scales=(2, 1)), r"`scales` is \(2, 1\), expected the sm"),
        (
            lambda: strategies.tensors((2,), scales=(0.1, 1e5), dtype=torch.float16),
            r"`scales` is \(0.1, 100000.0\), expected magnitudes from 0.0006 to 2e\+04",
        ),
        (lambda: networks.make("lstm"), "`kind` is 'lstm', expected one of linear, convolution"),
        (lambda: networks.inputs("lstm", 2), "`kind` is 'lstm', expected one of"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tree_drawn_inside_is_centred_where_it_is_asked():
    params = {"w": torch.full((2,), 7.0)}
    posterior = smallest(strategies.posteriors(params, families=["diagonal"]))
    assert torch.equal(posterior.mean["w"], params["w"])
