"""`torch.compile` of forward passes: one graph, the same numbers, nothing of the user's changed."""

import pytest
import torch
from torch.func import functional_call, vmap
from torch.testing import assert_close

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.prediction import forward
from funcbayes.testing import networks
from tests.snapshots import assert_unchanged, snapshot

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["linear", "convolution", "norms", "tied"])
def test_a_batched_forward_pass_compiles_without_graph_breaks(name, dtype):
    net = networks.make(name).to(dtype)
    x = networks.inputs(name, 4, dtype=dtype)
    model = fb.Model.from_module(net)
    posterior = fb.posteriors.Diagonal(
        model.params, trees.tree_map(lambda p: torch.full_like(p, 0.1), model.params)
    )
    stack = posterior.sample(0, 3)
    before = snapshot(net)

    def forward(stack, x):
        return vmap(lambda params: model.apply(params, x))(stack)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(stack, x)
        expected = torch.stack(
            [functional_call(net.eval(), trees.index(stack, i), (x,)) for i in range(3)]
        )
    assert compiled.dtype == dtype
    assert_close(compiled, expected)
    assert_unchanged(net, before)


def test_gradients_through_a_compiled_pass():
    net = networks.make("linear").double()
    x = networks.inputs("linear", 4, dtype=torch.float64)
    model = fb.Model.from_module(net)

    def loss(params):
        return model.apply(params, x).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert_close(compiled(model.params), torch.func.grad(loss)(model.params))


def graphs():
    """A backend for `torch.compile` that counts what it is given."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend, seen


def test_steps_of_variational_inference_are_one_graph_with_the_same_draws():
    net = networks.make("linear").double()
    inputs = networks.inputs("linear", 6, dtype=torch.float64)
    model = fb.Model.from_module(net)
    targets = torch.arange(6) % model.apply(model.params, inputs).shape[1]
    state = fb.vi.init(model.params)

    def loss(state, inputs, targets, key):
        return fb.vi.negative_elbo(
            *(state, model, (inputs, targets)),
            key=key,
            likelihood=fb.likelihoods.Categorical(),
            num_data=60,
            num_samples=3,
        )[0]

    torch._dynamo.reset()
    backend, seen = graphs()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for step in range(8):
        key = fb.random.fold_in(fb.random.key(2**100 + 5), step)
        found, expected = (f(state, inputs, targets, key) for f in (compiled, loss))
        assert_close(found, expected, rtol=1e-12, atol=0)
        for a, b in zip(
            *(torch.autograd.grad(value, trees.leaves(state)) for value in (found, expected)),
            strict=True,
        ):
            assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(seen) <= 3  # a new step is no new graph


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [torch.nn.BatchNorm1d(5), torch.nn.ReLU()],
        lambda: [torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.AlphaDropout(0.2)],
    ],
    ids=["batch norm", "dropout"],
)
def test_steps_of_an_ensemble_are_one_graph_with_the_same_masks(layers):
    model, state = fb.ensemble.from_modules(
        [
            torch.nn.Sequential(torch.nn.Linear(6, 5), *layers(), torch.nn.Linear(5, 3)).double()
            for _ in range(3)
        ]
    )
    inputs = torch.randn(8, 6, dtype=torch.float64)
    targets = torch.arange(8) % 3
    before = trees.clone(tuple(state))

    def losses(params, key):
        return fb.ensemble.losses(
            *(model, state._replace(params=params), (inputs, targets)),
            key=key,
            likelihood=fb.likelihoods.Categorical(),
        )

    torch._dynamo.reset()
    backend, seen = graphs()
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    generator = torch.get_rng_state()
    for step in range(6):
        key = fb.random.fold_in(fb.random.key(3), step)
        found, expected = compiled(state.params, key), losses(state.params, key)
        assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
        assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    assert len(seen) <= 3
    assert torch.equal(torch.get_rng_state(), generator)
    assert_close(tuple(state), before, rtol=0, atol=0)


def test_predictions_with_dropout_masks_compile_with_the_same_masks():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.4), torch.nn.Linear(5, 3))
    model = fb.Model.from_module(net)
    posterior = fb.dropout.posterior(model, rate=0.2)
    inputs = torch.randn(4, 6)

    def outputs(inputs, key):
        return forward.all_samples(model, posterior.draw(key, 0, 5), inputs)

    torch._dynamo.reset()
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in range(3):
            key = fb.random.key(seed)
            assert_close(compiled(inputs, key), outputs(inputs, key))


def test_a_compiled_step_refuses_a_network_that_draws_by_itself():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x + torch.randn_like(x))

    model, state = fb.ensemble.from_modules([Noisy(), Noisy()])
    batch = torch.randn(8, 6), torch.arange(8) % 3

    def losses(params):
        return fb.ensemble.losses(
            *(model, state._replace(params=params), batch),
            key=0,
            likelihood=fb.likelihoods.Categorical(),
        )[0]

    torch._dynamo.reset()
    with pytest.raises(Exception, match="random"):
        torch.compile(losses, fullgraph=True, backend="aot_eager")(state.params)
