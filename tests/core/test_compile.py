"""`torch.compile` of forward passes: one graph, the same numbers, nothing of the user's changed."""

import pytest
import torch
from torch.func import functional_call, vmap
from torch.testing import assert_close

import funcbayes as fb
from funcbayes.core import trees
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
