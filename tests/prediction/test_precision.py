"""Predictions under autocast and in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.testing import networks

STRATEGIES = ("auto", "vmap", "loop", "threads")


def diagonal(model):
    return fb.posteriors.Diagonal(
        model.params, trees.tree_map(lambda p: torch.full_like(p, 0.05), model.params)
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["weights", "masks"])
def test_autocast_holds_for_every_strategy(strategy, low, kind):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), Spy(32, 3)).eval()
    model = fb.Model.from_module(net)
    posterior = diagonal(model) if kind == "weights" else fb.dropout.posterior(model)
    x = torch.randn(8, 16)
    likelihood = fb.likelihoods.Categorical()
    options = {"key": 0, "num_samples": 12, "likelihood": likelihood}
    expected = fb.predict(model, posterior, x, **options)
    seen.clear()
    with torch.autocast("cpu", dtype=low):
        found = fb.predict(model, posterior, x, strategy=strategy, **options)
    # torch adds a mapped bias to a mapped product in float32.
    assert low in seen
    assert set(seen) <= {low, torch.float32}
    # Three roundings of a logit of a few units, and probabilities rise by at most a quarter of it.
    atol = 4 * torch.finfo(low).eps
    assert_close(found.mean.float(), expected.mean, rtol=0, atol=atol)
    assert_close(found.mean.float().sum(-1), torch.ones(8), rtol=0, atol=atol)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_moments_of_low_precision_outputs_are_taken_in_float32(strategy):
    """The mean of many equal outputs is that output: in bfloat16 a sum would stop growing."""
    model = fb.Model.from_module(nn.Linear(4, 2))
    std = trees.tree_map(torch.zeros_like, model.params)
    posterior, x = fb.posteriors.Diagonal(model.params, std), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = fb.predict(model, posterior, x, key=0, num_samples=1)
        many = fb.predict(model, posterior, x, key=0, num_samples=700, strategy=strategy)
    eps = torch.finfo(torch.bfloat16).eps
    assert_close(many.mean.float(), one.mean.float(), rtol=eps, atol=eps)
    assert float(many.variance.abs().max()) < 1e-4


def posteriors_of(model, data):
    likelihood = fb.likelihoods.Categorical()
    state = fb.swag.init(model.params, max_rank=3)
    for i in range(4):
        state = fb.swag.update(
            state, trees.tree_map(lambda p, i=i: p * (1 + 0.1 * i), model.params)
        )
    yield "swag", fb.swag.posterior(state)
    for structure in ("diagonal", "kronecker"):
        fitted = fb.laplace.fit(model, data, likelihood=likelihood, structure=structure)
        yield structure, fb.laplace.posterior(fitted, prior_precision=20.0)
    yield "vi", fb.vi.posterior(fb.vi.init(model.params, std=0.05))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_drops_out_of_float64(strategy):
    net = networks.make("linear", dtype=torch.float64)
    x = networks.inputs("linear", 6, dtype=torch.float64)
    model = fb.Model.from_module(net)
    for name, posterior in posteriors_of(model, (x, networks.targets(6))):
        stack = posterior.sample(0, 5)
        outputs = torch.stack(
            [functional_call(net, trees.index(stack, i), (x,)) for i in range(5)]
        ).detach()
        pred = fb.predict(
            model, posterior, x, key=0, num_samples=5, strategy=strategy, return_samples=True
        )
        assert pred.mean.dtype == pred.variance.dtype == torch.float64, name
        # Sums of a few dozen products, each rounded: float32 would err by 1e-7.
        assert_close(pred.samples, outputs, rtol=1e-12, atol=1e-12)
        assert_close(pred.mean, outputs.mean(0), rtol=1e-12, atol=1e-12)
        assert_close(pred.variance, outputs.var(0), rtol=1e-10, atol=1e-12)
