"""Kronecker-factored weights that are never formed: the same samples as where they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from funcbayes.core import random, trees
from funcbayes.core.model import Model
from funcbayes.posteriors import BlockNormal
from funcbayes.posteriors.factors import DenseFactor, DiagonalFactor, KroneckerFactor
from funcbayes.prediction import explain, predict, rotated

F64 = torch.float64


def kronecker(mean, seed):
    gen = torch.Generator().manual_seed(seed)
    o, i = mean.shape[0], mean[0].numel()

    def basis(size):
        return torch.linalg.qr(torch.randn(size, size, generator=gen, dtype=F64))[0][None]

    std = torch.rand(1, o, i, generator=gen, dtype=F64) + 0.1
    return KroneckerFactor(std, basis(o), basis(i))


def posterior_of(model, *, dense=()):
    factors = {}
    for number, (name, mean) in enumerate(model.params.items()):
        if mean.dim() >= 2:
            factors[(name,)] = kronecker(mean, number)
        elif name in dense:
            factors[(name,)] = DenseFactor(2 * torch.eye(mean.numel(), dtype=F64)[None])
        else:
            factors[(name,)] = DiagonalFactor(torch.full((mean.numel(),), 0.2, dtype=F64))
    return BlockNormal(model.params, factors)


def formed(model, posterior, x, num):
    """Every sample's network by itself, its weights formed."""
    stack = posterior.sample(0, num)
    return torch.stack([model.apply(trees.index(stack, i), x) for i in range(num)])


class Tied(nn.Module):
    """One weight in two places, and one that is also used as such."""

    def __init__(self):
        super().__init__()
        self.shared, self.norm = nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        return self.norm(x) / self.norm.weight.norm()


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (6,), 2),
    "tied": (Tied, (9,), 1),
    "convolution before": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
        (1, 4, 4),
        1,
    ),
    "attention": (Attentive, (1, 8), 4),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (6,), 1),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    make, shape, num_rotated = NETWORKS[request.param]
    torch.manual_seed(0)
    model = Model.from_module(make().double())
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    dense = [name for name in model.params if name.endswith("bias")][:1]
    return model, posterior_of(model, dense=dense), x, num_rotated


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("strategy", ["auto", "vmap", "loop", "threads"])
def test_samples_are_those_of_formed_weights(case, strategy, chunk_size):
    model, posterior, x, num_rotated = case
    turned, _ = rotated.rotated(model, posterior, x)
    assert len(turned.constants) - len(model.constants) == 3 * num_rotated
    expected = formed(model, posterior, x, 5)
    for _ in range(3):  # the third time small batched passes are those of a recording
        pred = predict(
            *(model, posterior, x),
            key=0,
            num_samples=5,
            strategy=strategy,
            chunk_size=chunk_size,
            return_samples=True,
        )
        # Some hundred operations in float64, on numbers of about 1.
        assert_close(pred.samples, expected, rtol=1e-11, atol=1e-12)


def test_coupled_samples_are_those_of_formed_weights(case):
    model, posterior, x, _ = case
    key = random.orthogonal(3)
    stack = posterior.sample(key, 6)
    expected = torch.stack([model.apply(trees.index(stack, i), x) for i in range(6)])
    pred = predict(model, posterior, x, key=key, num_samples=6, return_samples=True)
    assert_close(pred.samples, expected, rtol=1e-11, atol=1e-12)


def test_nothing_changes(case):
    model, posterior, x, _ = case
    before = trees.clone((model.params, model.constants, posterior.mean, x))
    rng = torch.get_rng_state()
    predict(model, posterior, x, key=0, num_samples=3)
    assert_close((model.params, model.constants, posterior.mean, x), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(posterior.factors[next(iter(posterior.factors))], KroneckerFactor)


def test_weights_are_formed_where_that_takes_fewer_operations():
    torch.manual_seed(0)
    model = Model.from_module(nn.Linear(6, 5).double())
    posterior = posterior_of(model)
    for rows, is_rotated in ((1, True), (400, False)):
        x = torch.randn(rows, 6, dtype=F64)
        assert (rotated.rotated(model, posterior, x)[0] is not model) == is_rotated
    few, many = (explain(model, posterior, torch.ones(n, 6, dtype=F64)).profile for n in (1, 400))
    # A product with the mean, one with the drawn part, and the two rotations.
    assert few.shared + few.sampled == 2 * (2 * 5 * 6 + 6 * 6 + 5 * 5)
    assert many.sampled == 400 * 2 * 5 * 6


class Fickle(nn.Module):
    """Uses its weight in another way where the first input is negative."""

    def __init__(self, other):
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        self.other = other

    def forward(self, x):
        return self.other(x, self.linear.weight) if x[0, 0] < 0 else self.linear(x)


def unseen(x, weight):
    """A product that the interpreter is not told of."""
    with torch._C.DisableTorchFunction():
        return x @ weight.T


@pytest.mark.parametrize("other", [lambda x, weight: F.linear(x, weight) * weight.norm(), unseen])
def test_a_network_that_changes_its_mind_gets_formed_weights(other):
    torch.manual_seed(0)
    model = Model.from_module(Fickle(other).double())
    posterior = posterior_of(model)
    x = torch.ones(1, 3, dtype=F64)
    assert rotated.rotated(model, posterior, x)[0] is not model
    for _ in range(2):
        for inputs in (x, -x):
            pred = predict(
                *(model, posterior, inputs),
                key=0,
                num_samples=4,
                strategy="loop",
                return_samples=True,
            )
            assert_close(pred.samples, formed(model, posterior, inputs, 4), rtol=1e-11, atol=0)
    assert rotated.rotated(model, posterior, x) == (model, posterior)


def test_explain_sees_a_network_that_changes_its_mind():
    torch.manual_seed(0)
    model = Model.from_module(Fickle(unseen).double())
    posterior = posterior_of(model)
    x = torch.ones(1, 3, dtype=F64)
    assert rotated.rotated(model, posterior, x)[0] is not model
    profile = explain(model, posterior, -x, num_samples=4).profile
    assert profile.shared + profile.sampled == 2 * 3 * 2  # one product, of a formed weight


class Hidden(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return Hidden.apply(F.relu(self.linear(x)), self.linear.weight)


def test_a_use_that_cannot_be_seen_forms_the_weight():
    torch.manual_seed(0)
    model = Model.from_module(Hiding().double())
    posterior = posterior_of(model)
    x = torch.ones(1, 3, dtype=F64)
    assert rotated.rotated(model, posterior, x) == (model, posterior)
    pred = predict(model, posterior, x, key=0, num_samples=4, return_samples=True)
    assert_close(pred.samples, formed(model, posterior, x, 4), rtol=1e-11, atol=0)


READS = {
    "comparison": lambda w: (w > 0).sum(),
    "argmax": lambda w: w.argmax(),
    "number": lambda w: float(w[0, 0]),
    "list": lambda w: sum(w.flatten().tolist()),
    "equality": lambda w: int(torch.equal(w, w.abs())),
    "shape of another": lambda w: torch.no_grad()(w.expand_as)(w).sum(),
    "detached": lambda w: w.data.sum(),
}


class Reading(nn.Module):
    """A weight of a linear map, of which something else is read as well."""

    def __init__(self, read):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.read = read

    def forward(self, x):
        return self.linear(x) * (1 + self.read(self.linear.weight))


@pytest.mark.parametrize("name", READS)
def test_a_weight_whose_values_are_read_is_formed(name):
    torch.manual_seed(0)
    model = Model.from_module(Reading(READS[name]).double())
    posterior = posterior_of(model)
    x = torch.ones(1, 3, dtype=F64)
    assert rotated.rotated(model, posterior, x) == (model, posterior)
    pred = predict(
        *(model, posterior, x), key=0, num_samples=4, strategy="loop", return_samples=True
    )
    assert_close(pred.samples, formed(model, posterior, x, 4), rtol=1e-11, atol=0)


def test_a_weight_whose_format_is_read_is_not_formed():
    torch.manual_seed(0)
    model = Model.from_module(
        Reading(
            lambda w: w.new_ones(w.shape[0]).sum() + torch.zeros(2).to(w).sum() + w.dim()
        ).double()
    )
    posterior = posterior_of(model)
    x = torch.ones(1, 3, dtype=F64)
    assert rotated.rotated(model, posterior, x)[0] is not model
    pred = predict(model, posterior, x, key=0, num_samples=4, return_samples=True)
    assert_close(pred.samples, formed(model, posterior, x, 4), rtol=1e-11, atol=0)


def test_narrow_weights_are_formed():
    torch.manual_seed(0)
    model = Model.from_module(nn.Linear(6, 5).bfloat16())
    posterior = posterior_of(model)
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    assert rotated.rotated(model, posterior, x) == (model, posterior)
