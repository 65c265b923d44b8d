"""Curvatures equal the linear operators of curvlinops, where these are right."""

import pytest
import torch
from torch import nn

import funcbayes as fb
from tests.peers.support import (
    assert_differs,
    assert_same,
    dense_reference,
    each_likelihood,
    our_likelihood,
    peer,
)

curvlinops = peer("curvlinops")

pytestmark = pytest.mark.filterwarnings("ignore")

# More data than inputs to any layer before the last: else the averaged inputs of "reduce" span
# a part of the space only, and the eigenbasis of the rest is anybody's choice.
N, D, OUT = 11, 3, 3
each_batch_size = pytest.mark.parametrize("batch_size", [4, N])
each_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])
each_sharing = pytest.mark.parametrize("sharing", ["expand", "reduce"])
each_network = pytest.mark.parametrize("network", ["mlp", "conv", "sequence"])

OPERATORS = {"ggn": "GGN", "empirical_fisher": "EF", "hessian": "Hessian"}
FISHER_TYPES = {"ggn": "type-2", "empirical_fisher": "empirical"}


class Sequence(nn.Module):
    """Linear layers that are used at each position."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(D, 4)
        self.second = nn.Linear(4, 5)
        self.head = nn.Linear(5, OUT)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(D, D)
        self.head = nn.Linear(D, OUT)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def problem(network, likelihood, batch_size):
    torch.manual_seed(0)
    if network == "mlp":
        net, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, OUT)), torch.randn(N, D)
    elif network == "conv":
        net = nn.Sequential(
            nn.Conv2d(1, 2, (3, 2), stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(2, 3, 2, dilation=2, padding=1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(27, OUT),
        )
        x = torch.randn(N, 1, 6, 5)
    elif network == "sequence":
        net, x = Sequence(), torch.randn(N, 5, D)
    else:
        net, x = Twice(), torch.randn(N, D)
    y = torch.randint(OUT, (N,)) if likelihood == "classification" else torch.randn(N, OUT)
    return net, list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def loss_of(likelihood, reduction="sum"):
    if likelihood == "classification":
        return nn.CrossEntropyLoss(reduction=reduction)
    return nn.MSELoss(reduction=reduction)


def scale(kind, likelihood, reduction):
    """Their matrix over ours: their squared error lacks the ½, and a mean divides once."""
    if likelihood == "classification":
        return 1 if reduction == "sum" else 1 / N
    # Once in the empirical Fisher, too, and by data and outputs.
    factor = 4 if kind == "empirical_fisher" else 2
    return factor if reduction == "sum" else factor / (N * OUT)


def theirs(operator, net, loss, batches, **options):
    params = list(net.parameters())
    made = getattr(curvlinops, f"{operator}LinearOperator")(net, loss, params, batches, **options)
    return made @ torch.eye(sum(p.numel() for p in params))


def ours(kind, net, likelihood, batches, structure="dense", **options):
    model = fb.Model.from_module(net)
    take = getattr(fb.curvature, kind)
    curvature = take(model, batches, our_likelihood(likelihood), structure=structure, **options)
    return curvature.to_dense(model.params)


def blocks(matrix, net):
    """The diagonal blocks of the tensors, by name."""
    found, start = {}, 0
    for name, p in net.named_parameters():
        found[name] = matrix[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    return found


@each_batch_size
@each_reduction
@each_likelihood
@pytest.mark.parametrize("kind", OPERATORS)
@each_network
def test_dense_curvatures(network, kind, likelihood, reduction, batch_size):
    net, batches = problem(network, likelihood, batch_size)
    matrix = theirs(OPERATORS[kind], net, loss_of(likelihood, reduction), batches)
    factor = scale(kind, likelihood, reduction)
    assert_same(factor * ours(kind, net, likelihood, batches), matrix)


@each_batch_size
@each_reduction
@each_likelihood
@pytest.mark.parametrize("kind", FISHER_TYPES)
@each_sharing
@pytest.mark.parametrize("structure", ["kronecker", "ekfac"])
@each_network
def test_kronecker_factored_curvatures(
    network, structure, sharing, kind, likelihood, reduction, batch_size
):
    net, batches = problem(network, likelihood, batch_size)
    operator = "KFAC" if structure == "kronecker" else "EKFAC"
    options = {"fisher_type": FISHER_TYPES[kind], "kfac_approx": sharing}
    loss = loss_of(likelihood, reduction)
    matrices = blocks(theirs(operator, net, loss, batches, **options), net)
    factor = scale(kind, likelihood, reduction)
    mine = blocks(ours(kind, net, likelihood, batches, structure, sharing=sharing), net)
    exact = blocks(ours(kind, net, likelihood, batches), net)
    for name, block in mine.items():
        if name.endswith("weight"):
            # Eigenvectors err by eps over the gaps between eigenvalues, here above 1e-4 of the
            # largest, or 0 where both factors are multiples of the identity.
            assert_same(factor * block, matrices[name])
        else:
            assert_same(block, exact[name])  # theirs are factors of the weight's, or corrected


@each_batch_size
@each_likelihood
def test_a_weight_used_twice(likelihood, batch_size):
    net, batches = problem("twice", likelihood, batch_size)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    half = 1 if likelihood == "classification" else 0.5
    loss = loss_of(likelihood)
    exact = dense_reference("ggn", net, x, y, lambda f, target: half * loss(f, target))
    assert_same(ours("ggn", net, likelihood, batches), exact)
    assert_same(half * theirs("GGN", net, loss, batches), exact)

    name = "shared.weight"
    exact = blocks(exact, net)[name]
    factors = blocks(ours("ggn", net, likelihood, batches, "kronecker"), net)[name]
    matrix = half * blocks(theirs("KFAC", net, loss, batches, fisher_type="type-2"), net)[name]
    assert_same(factors, kronecker_reference(net, x, y, lambda f, t: half * loss(f, t)))
    # They divide the inputs of both uses by the number of data, not of uses.
    assert_differs(factors, matrix)

    # In any orthonormal basis the exact diagonal adds up to the trace.
    corrected = blocks(ours("ggn", net, likelihood, batches, "ekfac"), net)[name]
    matrix = half * blocks(theirs("EKFAC", net, loss, batches, fisher_type="type-2"), net)[name]
    assert_same(corrected.trace(), exact.trace())
    # They pair the gradients of each use with the inputs of the last.
    assert_differs(matrix.trace(), exact.trace())


def kronecker_reference(net, x, y, loss):
    """Σ g gᵀ ⊗ the mean of a aᵀ, over the uses of the shared layer; g by the root of Λ."""
    seen, results = [], []
    handle = net.shared.register_forward_hook(
        lambda module, inputs, output: (seen.append(inputs[0]), results.append(output))[0]
    )
    outputs = net(x)
    handle.remove()
    a, g = 0, 0
    for n in range(len(x)):
        curvature = torch.func.hessian(loss)(outputs[n].detach(), y[n])
        values, vectors = torch.linalg.eigh(curvature)
        for root in (vectors * values.clamp_min(0).sqrt()).T:
            grads = torch.autograd.grad(outputs[n] @ root, results, retain_graph=True)
            for grad in grads:
                g = g + torch.outer(grad[n], grad[n])
        for inputs in seen:
            a = a + torch.outer(inputs[n], inputs[n])
    return torch.kron(g, (a / (len(x) * len(seen))).contiguous()).detach()
