"""Laws 2 and 5 where several methods or states meet; the table has each method alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.core.model import Model
from funcbayes.testing import networks, strategies
from tests.methods import METHODS

# beartype, which the shape hook calls, picks the items that it looks at by Python's generator.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

NUM_DATA = 6
FEW = settings(max_examples=max(4, settings().max_examples // 6))


def data_for(kind, dtype=torch.float32):
    return networks.inputs(kind, NUM_DATA, dtype=dtype), networks.targets(NUM_DATA)


@pytest.mark.parametrize("kind", ["dict_output", "tuple_output"])
@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.likelihood])
def test_a_fit_by_likelihood_refuses_networks_that_return_several_tensors(name, kind):
    came = kind.removesuffix("_output")
    with pytest.raises(TypeError, match=f"`outputs` is of type {came}, expected a tensor: let"):
        METHODS[name].fit(networks.make(kind), data_for(kind), 0)


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


BATCHES = strategies.networks_with_batches(
    kinds=networks.LOGIT_KINDS, dtypes=[torch.float64], min_batch=NUM_DATA, max_batch=NUM_DATA
)


@FEW
@given(cut=st.integers(1, NUM_DATA - 1), case=BATCHES)
def test_laplace_fits_of_shards_merge_in_a_pass_over_batches(cut, case):
    model, likelihood = Model.from_module(case.net), fb.likelihoods.Categorical()
    x, y = case.inputs, case.targets
    batches = [(networks.rows(x, a, b), y[a:b]) for a, b in ((0, cut), (cut, NUM_DATA))]
    states = [fb.laplace.fit(model, batch, likelihood=likelihood) for batch in batches]
    whole = fb.laplace.fit(model, batches, likelihood=likelihood)
    merged = fb.laplace.merge(*states)
    torch.testing.assert_close(trees.leaves(merged), trees.leaves(whole), rtol=1e-10, atol=1e-12)


def test_an_ensemble_of_laplace_fits_is_a_mixture():
    nets = [networks.make("linear", seed=i) for i in range(3)]
    data = data_for("linear")
    models = [Model.from_module(net) for net in nets]
    fits = [fb.laplace.fit(m, data, likelihood=fb.likelihoods.Categorical()) for m in models]
    mixture = fb.posteriors.mixture([fb.laplace.posterior(f) for f in fits])
    pred = fb.predict(models[0], mixture, data[0], key=0, num_samples=20)
    assert torch.isfinite(pred.variance).all()


@FEW
@given(state=strategies.states())
def test_any_state_is_saved_and_its_posterior_keeps_the_key_law(state):
    module = getattr(fb, type(state).__name__.removesuffix("State").lower())
    fb.testing.check_checkpoint_round_trip(state)
    fb.testing.check_key_determinism(module.posterior(state), num_samples=3)


@FEW
@given(posterior=strategies.posteriors(families=["diagonal"], zero_std=True), key=strategies.keys())
def test_parameters_that_are_held_fixed_keep_the_key_law(posterior, key):
    fb.testing.check_key_determinism(posterior, key=key, num_samples=3)
