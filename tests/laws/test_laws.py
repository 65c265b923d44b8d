"""The laws of the library over every method and every kind of network.

Law 4 (never slower than the loop) is a matter of the benchmarks.
"""

from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from tests import networks
from tests.methods import METHODS
from tests.snapshots import assert_unchanged, snapshot

KINDS = list(networks.NETWORKS)
STRATEGIES = ("auto", "vmap", "loop", "threads")
NUM_DATA, NUM_SAMPLES = 6, 12
FEW = settings(max_examples=max(4, settings().max_examples // 6))
pairs = pytest.mark.parametrize(
    ("method", "kind"), [pytest.param(m, k, id=f"{m}-{k}") for m in METHODS for k in KINDS]
)


def data_for(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    return networks.inputs(kind, NUM_DATA, dtype=dtype), networks.targets(NUM_DATA)


@cache
def fitted(method: str, kind: str) -> tuple[nn.Module, Model, Any]:
    """A network with its posterior, in float64."""
    net = networks.make(kind, dtype=torch.float64)
    model, posterior = METHODS[method](net, data_for(kind, torch.float64), 0)
    return net, model, posterior


def outputs(method: str, kind: str, **options: Any) -> Tensor:
    """The samples of a prediction, `[samples, batch, classes]`."""
    _, model, posterior = fitted(method, kind)
    x = networks.inputs(kind, 5, seed=7, dtype=torch.float64)
    options = {"key": 3, "num_samples": NUM_SAMPLES, "strategy": "loop", **options}
    return fb.predict(model, posterior, x, return_samples=True, **options).samples


@cache
def looped_by_hand(method: str, kind: str) -> Tensor:
    """The plain loop that every strategy must equal: one `functional_call` a sample."""
    net, _, posterior = fitted(method, kind)
    x = networks.inputs(kind, 5, seed=7, dtype=torch.float64)
    draws = posterior.draw(random.key(3), 0, NUM_SAMPLES)
    results = []
    with torch.no_grad():
        for i in range(NUM_SAMPLES):
            tensors = dict(net.named_parameters()) | dict(net.named_buffers())
            for sampled in (draws.params, draws.constants):
                tensors |= trees.index(sampled or {}, i)
            if draws.masks is None:
                results.append(functional_call(net, tensors, (x,)))
                continue
            with KeyedDropout([draws.masks.keys[i]], always=True):
                results.append(functional_call(net, tensors, (x,)))
    return torch.stack(results)


def refusal_of_vmap(kind: str, strategy: str, num: int = 2) -> AbstractContextManager[Any]:
    """Expects the error of a strategy that the network does not allow, otherwise nothing."""
    # Sample 0 may have been run alone, to plan: then one sample needs no vmap.
    if strategy == "vmap" and kind == "recurrent" and num == 1:
        return suppress(ValueError)
    if strategy == "vmap" and kind == "recurrent":
        return pytest.raises(ValueError, match="vmap cannot batch this model")
    return nullcontext()


# Law 1: pure.


@pairs
def test_fitting_changes_nothing(method, kind):
    net = networks.make(kind)
    net.train()  # a mode of the user's own, and one layer in another
    next(iter(net.children())).eval()
    x, y = data_for(kind)
    nn.functional.cross_entropy(net(x), y).backward()  # gradients of the user's own
    before = snapshot(net)
    METHODS[method](net, (x, y), 0)
    assert_unchanged(net, before)


@pairs
@FEW
@given(
    strategy=st.sampled_from(STRATEGIES),
    num=st.integers(1, 6),
    chunk=st.none() | st.integers(1, 6),
    batch=st.integers(1, 4),
    key=st.integers(0, 2**64),
)
def test_predicting_changes_nothing(method, kind, strategy, num, chunk, batch, key):
    net, model, posterior = fitted(method, kind)
    x = networks.inputs(kind, batch, dtype=torch.float64)
    before, posterior_before = snapshot(net), trees.clone(posterior)
    with refusal_of_vmap(kind, strategy, num):
        fb.predict(
            model, posterior, x, key=key, num_samples=num, strategy=strategy, chunk_size=chunk
        )
    assert_unchanged(net, before)
    for leaf, same in zip(
        trees.tensor_leaves(posterior), trees.tensor_leaves(posterior_before), strict=True
    ):
        assert torch.equal(leaf, same)


class FaultError(Exception):
    """Raised on purpose."""


class FailsAt(nn.Module):
    """Raises at the k-th forward call, counted over all copies of the module."""

    calls = 0
    fail_at = 10**9

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Tensor:
        result = self.net(x)
        FailsAt.calls += 1
        if FailsAt.calls == FailsAt.fail_at:
            raise FaultError(f"call {FailsAt.calls}")
        return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["convolution", "recurrent"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forward_pass_that_raises_changes_nothing(method, kind, strategy):
    net = FailsAt(networks.make(kind))
    data = data_for(kind)

    def work() -> None:
        model, posterior = METHODS[method](net, data, 0)
        with refusal_of_vmap(kind, strategy):
            fb.predict(model, posterior, data[0], key=1, num_samples=3, strategy=strategy)

    FailsAt.calls, FailsAt.fail_at = 0, 10**9
    work()
    total = FailsAt.calls
    assert total > 0
    # Every call of a short run; a spread of them of a long one, the ends included.
    for fail_at in sorted({*range(1, min(total, 4) + 1), total // 2, total - 1, total} - {0}):
        FailsAt.calls, FailsAt.fail_at = 0, fail_at
        before = snapshot(net)
        with pytest.raises(FaultError):
            work()
        assert_unchanged(net, before)
    FailsAt.calls, FailsAt.fail_at = 0, 10**9
    work()  # and nothing was left broken behind


@pairs
def test_a_posterior_does_not_follow_further_training(method, kind):
    net = networks.make(kind)
    model, posterior = METHODS[method](net, data_for(kind), 0)
    x = networks.inputs(kind, 5)
    before = trees.clone(posterior)
    pred = fb.predict(model, posterior, x, key=0, num_samples=3)
    with torch.no_grad():
        for parameter in trees.leaves(model.params):
            parameter.add_(1.0)  # shares the memory of the network's
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(trees.tensor_leaves(posterior), trees.tensor_leaves(before), **same)
    again = fb.predict(model, posterior, x, key=0, num_samples=3)
    torch.testing.assert_close(again.mean, pred.mean)


# Law 2: one sample, one key.


@pairs
@FEW
@given(
    chunk=st.integers(1, NUM_SAMPLES + 2),
    num=st.integers(1, NUM_SAMPLES),
    strategy=st.sampled_from(["auto", "vmap", "threads"]),
)
def test_sample_i_is_a_function_of_key_and_i(method, kind, chunk, num, strategy):
    if kind == "recurrent" and strategy == "vmap":
        strategy = "auto"
    whole = outputs(method, kind)
    part = outputs(method, kind, num_samples=num, chunk_size=chunk, strategy=strategy)
    # Networks of depth under ten, outputs of order one: rounding is a few hundred eps.
    torch.testing.assert_close(part, whole[:num], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_another_key_gives_other_samples(method):
    if method == "ensemble":  # the same members, in another order
        return
    first, second = (outputs(method, "linear", key=key) for key in (3, 4))
    assert (first - second).abs().amax() > 1e-6


# Law 3: vectorised = looped.


@pairs
@FEW
@given(
    strategy=st.sampled_from(STRATEGIES),
    num=st.integers(2, NUM_SAMPLES),
    chunk=st.none() | st.integers(1, NUM_SAMPLES),
)
def test_every_strategy_equals_the_plain_loop(method, kind, strategy, num, chunk):
    with refusal_of_vmap(kind, strategy):
        found = outputs(method, kind, strategy=strategy, num_samples=num, chunk_size=chunk)
        torch.testing.assert_close(found, looped_by_hand(method, kind)[:num], rtol=0, atol=1e-12)


@pairs
def test_moments_equal_those_of_the_samples(method, kind):
    _, model, posterior = fitted(method, kind)
    x = networks.inputs(kind, 5, seed=7, dtype=torch.float64)
    probs = torch.softmax(looped_by_hand(method, kind), dim=-1)
    pred = fb.predict(
        model,
        posterior,
        x,
        key=3,
        num_samples=NUM_SAMPLES,
        chunk_size=5,
        likelihood=fb.likelihoods.Categorical(),
    )
    mean = probs.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    expected_entropy = -(probs * probs.log()).sum(-1).mean(0)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(pred.mean, mean, **close)
    torch.testing.assert_close(pred.variance, probs.var(0), **close)
    torch.testing.assert_close(pred.aleatoric, (probs * (1 - probs)).mean(0), **close)
    torch.testing.assert_close(pred.total, mean * (1 - mean), **close)
    torch.testing.assert_close(pred.entropy, entropy, **close)
    torch.testing.assert_close(pred.expected_entropy, expected_entropy, **close)
    torch.testing.assert_close(pred.mutual_information, entropy - expected_entropy, **close)


@pairs
def test_dtype_is_kept(method, kind):
    net = networks.make(kind)
    model, posterior = METHODS[method](net, data_for(kind), 0)
    pred = fb.predict(
        model, posterior, networks.inputs(kind, 2), key=0, num_samples=2, return_samples=True
    )
    assert pred.mean.dtype == pred.variance.dtype == pred.samples.dtype == torch.float32


@pairs
@pytest.mark.parametrize("strategy", ["auto", "loop", "threads"])
def test_a_batch_of_one_and_of_none(method, kind, strategy):
    _, model, posterior = fitted(method, kind)
    x = networks.inputs(kind, 5, seed=7, dtype=torch.float64)
    options = {"key": 3, "num_samples": 3, "strategy": strategy}
    one = fb.predict(model, posterior, networks.rows(x, 0, 1), **options)
    assert one.mean.shape == (1, 3)
    if kind == "recurrent":  # torch's recurrent layers refuse an empty batch
        return
    none = fb.predict(model, posterior, networks.rows(x, 0, 0), **options)
    assert none.mean.shape == none.variance.shape == (0, 3)


# Law 5: states are data.


def test_vmapped_swag_updates_are_multiswag():
    stack = {"w": random.normal(0, (5, 4, 3, 2), dtype=torch.float64)}  # [iterates, models, …]
    states = torch.func.vmap(lambda p: fb.swag.init(p, max_rank=2))(trees.index(stack, 0))
    for i in range(5):
        states = torch.func.vmap(fb.swag.update)(states, trees.index(stack, i))
    posteriors = torch.func.vmap(fb.swag.posterior)(states)
    mixture = fb.posteriors.mixture(posteriors)
    for m, component in enumerate(mixture.components):
        state = fb.swag.init({"w": stack["w"][0, m]}, max_rank=2)
        for i in range(5):
            state = fb.swag.update(state, {"w": stack["w"][i, m]})
        alone = fb.swag.posterior(state)
        torch.testing.assert_close(trees.leaves(component), trees.leaves(alone))
    assert mixture.sample(0, 6)["w"].shape == (6, 3, 2)


@FEW
@given(cut=st.integers(1, NUM_DATA - 1), kind=st.sampled_from(KINDS))
def test_laplace_fits_of_shards_merge_to_the_fit_of_all(cut, kind):
    net = networks.make(kind, dtype=torch.float64)
    model = Model.from_module(net)
    x, y = data_for(kind, torch.float64)
    likelihood = fb.likelihoods.Categorical()
    shards = [
        fb.laplace.fit(model, (networks.rows(x, a, b), y[a:b]), likelihood=likelihood)
        for a, b in ((0, cut), (cut, NUM_DATA))
    ]
    whole = fb.laplace.fit(model, (x, y), likelihood=likelihood)
    merged = fb.laplace.merge(*shards)
    torch.testing.assert_close(trees.leaves(merged), trees.leaves(whole), rtol=1e-10, atol=1e-12)


def test_an_ensemble_of_laplace_fits_is_a_mixture():
    nets = [networks.make("linear", seed=i) for i in range(3)]
    data = data_for("linear")
    models = [Model.from_module(net) for net in nets]
    fits = [fb.laplace.fit(m, data, likelihood=fb.likelihoods.Categorical()) for m in models]
    mixture = fb.posteriors.mixture([fb.laplace.posterior(f) for f in fits])
    pred = fb.predict(models[0], mixture, data[0], key=0, num_samples=20)
    assert torch.isfinite(pred.variance).all()


@pytest.mark.parametrize("kind", KINDS)
def test_states_hold_tensors_only(kind):
    net = networks.make(kind)
    model = Model.from_module(net)
    data = data_for(kind)
    states = [
        fb.swag.init(model.params, max_rank=2),
        fb.laplace.fit(model, data, likelihood=fb.likelihoods.Categorical()),
        fb.vi.init(model.params),
    ]
    live = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
    for state in states:
        for name, leaf in trees.leaves_with_names(state):
            assert isinstance(leaf, Tensor), f"{type(state).__name__}{name}"
            assert not leaf.numel() or leaf.untyped_storage().data_ptr() not in live, name
