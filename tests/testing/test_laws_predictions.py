"""The laws on predictions: sound models and posteriors pass, planted bugs are named."""

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.posteriors import Diagonal, DropoutMasks, Empirical, LowRank, mixture
from funcbayes.testing import networks
from funcbayes.testing.laws import check_chunk_invariant, check_pure, check_vectorised_equals_loop
from tests.testing.test_laws_sampling import ChunkSeed, Normal, OneGenerator, OnlySample

DTYPE = torch.float64
laws = pytest.mark.parametrize("law", [check_chunk_invariant, check_vectorised_equals_loop])


def posterior_of(family, model):
    params = trees.clone(model.params)
    std = trees.tree_map(lambda p: torch.full_like(p, 0.1), params)
    diagonal = Diagonal(params, std)
    match family:
        case "diagonal":
            return diagonal
        case "low_rank":
            return LowRank(params, std, diagonal.sample(1, 2))
        case "empirical":
            constants = {name: torch.stack([c, c]) for name, c in model.constants.items()}
            return Empirical(diagonal.sample(2, 2), constants)
        case "mixture":
            return mixture([diagonal, diagonal])
        case _:
            return DropoutMasks(params, None, family)


@laws
@pytest.mark.parametrize("family", ["diagonal", "low_rank", "empirical", "mixture", "row", "batch"])
def test_sound_posteriors_pass(law, family):
    model = fb.Model.from_module(networks.make("convolution", dtype=DTYPE))
    law(model, posterior_of(family, model), networks.inputs("convolution", 2, dtype=DTYPE))


@laws
@pytest.mark.parametrize("kind", list(networks.NETWORKS))
def test_networks_of_every_kind_pass(law, kind):
    model = fb.Model.from_module(networks.make(kind))
    law(model, posterior_of("diagonal", model), networks.inputs(kind, 2), num_samples=4)


@laws
def test_what_is_not_a_posterior_for_predictions_is_refused(law):
    model = fb.Model.from_module(networks.make("linear"))
    with pytest.raises(TypeError, match=r"is a OnlySample without `draw` and `draw_size`"):
        law(model, OnlySample(), networks.inputs("linear", 2))


@laws
def test_other_errors_of_predict_are_passed_on(law):
    model = fb.Model.from_module(networks.make("linear"))
    posterior = Diagonal({"other": torch.ones(2)}, {"other": torch.ones(2)})
    with pytest.raises(ValueError, match="has another structure"):
        law(model, posterior, networks.inputs("linear", 2))


# -- planted bugs --------------------------------------------------------------------------


def case(bug):
    net = networks.make("linear")
    model = fb.Model.from_module(net)
    params = trees.clone(model.params)
    std = trees.tree_map(lambda p: torch.full_like(p, 0.1), params)
    return model, bug(params, std), networks.inputs("linear", 3)


def test_a_draw_that_depends_on_the_chunk_is_named():
    model, posterior, x = case(ChunkSeed)
    message = (
        r"^check_chunk_invariant: predictions with chunk_size=2 against chunk_size=1: sample \d,"
        r" entry \(\d, \d\): .* apart \(.* is allowed\); \d+ of 63 numbers differ. Likely cause:"
        r" `draw\(key, start, stop\)` uses something of the whole range"
    )
    with pytest.raises(AssertionError, match=message):
        check_chunk_invariant(model, posterior, x)


def test_a_draw_that_depends_on_the_number_of_samples_is_named():
    model, posterior, x = case(OneGenerator)
    with pytest.raises(AssertionError, match=r"num_samples=3 against the first of 7"):
        check_chunk_invariant(model, posterior, x, chunk_sizes=(1,))


class MaskOfTheChunk(DropoutMasks):
    """All samples of a chunk share the mask of its first sample."""

    def draw(self, key, start, stop, out=None):
        drawn = super().draw(key, start, stop, out)
        keys = [random.fold_in(key, start)] * (stop - start)
        return drawn._replace(masks=drawn.masks._replace(keys=keys))


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (check_chunk_invariant, r"chunk_size=2 against chunk_size=1: sample \d, entry"),
        (check_vectorised_equals_loop, r"strategy='auto' against a plain loop: sample \d, entry"),
    ],
)
def test_a_mask_that_depends_on_the_chunk_is_named(law, message):
    model, _, x = case(Normal)
    with pytest.raises(AssertionError, match=message):
        law(model, MaskOfTheChunk(trees.clone(model.params), 0.5, "row"), x)


def test_a_draw_that_differs_from_the_loop_is_named():
    model, posterior, x = case(ChunkSeed)
    message = (
        r"^check_vectorised_equals_loop: predictions with strategy='vmap' against a plain loop"
    )
    with pytest.raises(AssertionError, match=message):
        check_vectorised_equals_loop(model, posterior, x, strategies=("threads", "vmap"))


class OverSamples(torch.autograd.Function):
    """Its rule for vmap centres over the samples."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x - x.mean(in_dims[0], keepdim=True), in_dims[0]


def test_a_network_that_mixes_samples_in_vmap_is_named():
    net = networks.make("linear")

    def apply(params, x):
        return OverSamples.apply(functional_call(net, params, (x,)))

    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    model = fb.Model(apply, params)
    x = networks.inputs("linear", 3)
    with pytest.raises(AssertionError, match=r"strategy='vmap'.*a statistic over what it takes"):
        check_vectorised_equals_loop(model, posterior_of("diagonal", model), x, strategies=["vmap"])


def test_a_network_with_a_memory_between_calls_is_named():
    net, seen = networks.make("linear"), []

    def apply(params, x):
        seen.append(1)
        return functional_call(net, params, (x,)) + 0.1 * len(seen)

    model = fb.Model(apply, {name: p.detach().clone() for name, p in net.named_parameters()})
    x = networks.inputs("linear", 3)
    with pytest.raises(AssertionError, match=r"strategy='loop'.*a state it keeps from call to"):
        check_vectorised_equals_loop(model, posterior_of("diagonal", model), x, strategies=["loop"])


def test_a_network_that_is_not_safe_to_call_from_threads_is_named():
    net = networks.make("linear")
    pair = threading.Barrier(2, timeout=20)
    now = {}

    def apply(params, x):
        now["params"] = params
        if threading.current_thread() is not threading.main_thread():
            pair.wait()  # two workers at a time, and the parameters of one of them
        return functional_call(net, now["params"], (x,))

    if torch.get_num_threads() < 2:
        pytest.skip("needs two threads")
    model = fb.Model(apply, {name: p.detach().clone() for name, p in net.named_parameters()})
    x = networks.inputs("linear", 3)
    with pytest.raises(AssertionError, match=r"strategy='threads' against a plain loop: sample"):
        check_vectorised_equals_loop(
            model, posterior_of("diagonal", model), x, num_samples=5, strategies=["threads"]
        )


def test_tolerances_are_the_users():
    model, posterior, x = case(ChunkSeed)
    check_chunk_invariant(model, posterior, x, atol=100.0)
    with pytest.raises(AssertionError, match=r"numbers differ"):
        check_chunk_invariant(model, posterior, x, rtol=1e-6)


def test_the_laws_are_pure_themselves():
    net = networks.make("convolution").train()
    model = fb.Model.from_module(net)
    posterior = posterior_of("row", model)
    x = networks.inputs("convolution", 2)
    check_pure(
        lambda: check_vectorised_equals_loop(model, posterior, x, num_samples=2),
        [net, posterior, x],
        raises=False,
    )


def test_batch_norm_needs_more_than_one_row_nowhere():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model = fb.Model.from_module(net)
    for law in (check_chunk_invariant, check_vectorised_equals_loop):
        law(model, posterior_of("diagonal", model), networks.inputs("linear", 1))
