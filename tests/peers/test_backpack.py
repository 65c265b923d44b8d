"""Diagonals equal those of BackPACK."""

import copy

import pytest
import torch
from torch import nn

import funcbayes as fb
from tests.peers.support import assert_same, each_likelihood, our_likelihood, peer

backpack = peer("backpack")
extensions = peer("backpack.extensions")

pytestmark = pytest.mark.filterwarnings("ignore")

N, D, OUT = 7, 3, 3


def problem(network, likelihood):
    torch.manual_seed(0)
    if network == "mlp":
        net, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, OUT)), torch.randn(N, D)
    else:
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, OUT),
        )
        x = torch.randn(N, 2, 5, 5)
    y = torch.randint(OUT, (N,)) if likelihood == "classification" else torch.randn(N, OUT)
    return net, x, y


@pytest.mark.parametrize("batch_size", [3, 7])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@each_likelihood
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_diagonals(network, likelihood, reduction, batch_size):
    net, x, y = problem(network, likelihood)
    model = fb.Model.from_module(net)
    kind = nn.CrossEntropyLoss if likelihood == "classification" else nn.MSELoss
    extended = backpack.extend(copy.deepcopy(net))
    loss = backpack.extend(kind(reduction=reduction))
    # It sees one batch at a time; a mean is over that batch.
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        extended.zero_grad()
        with backpack.backpack(extensions.DiagGGNExact(), extensions.SumGradSquared()):
            loss(extended(inputs), targets).backward()
        # Their squared error lacks the ½. Its mean is over data and outputs.
        factor = 1 if likelihood == "classification" else 2
        if reduction == "mean":
            factor /= targets.numel()
        batch, ours = (inputs, targets), our_likelihood(likelihood)
        ggn = fb.curvature.ggn(model, batch, ours).diagonal(model.params)
        fisher = fb.curvature.empirical_fisher(model, batch, ours).diagonal(model.params)
        for name, p in extended.named_parameters():
            assert_same(factor * ggn[name], p.diag_ggn_exact)
            assert_same(factor**2 * fisher[name], p.sum_grad_squared)
