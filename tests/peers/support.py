"""What the comparisons with other libraries share."""

import importlib
import os
import warnings

import pytest
import torch
from torch.func import functional_call, hessian, jacrev, vmap

import funcbayes as fb

# Sums of at most a few thousand products in float64 round by 1e-13 of the largest entry;
# factorisations multiply that by condition numbers, here below 1e3.
RTOL = 1e-10

LIKELIHOODS = ("classification", "regression")
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def peer(name):
    """A library to compare with; without it the tests of a module are skipped.

    Where `FUNCBAYES_REQUIRE_PEERS` is set, as by `make test-peers`, they fail instead.
    """
    with warnings.catch_warnings():
        # Deprecations that importing it runs into are not ours to mend.
        warnings.simplefilter("ignore")
        if os.environ.get("FUNCBAYES_REQUIRE_PEERS"):
            return importlib.import_module(name)
        return pytest.importorskip(name, exc_type=ImportError)


def assert_same(ours, theirs, rtol=RTOL):
    """Equal to `rtol` of the largest entry: small ones may be differences of large ones."""
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=rtol, atol=rtol * scale)


def assert_differs(ours, theirs):
    """By more than a hundredth of the largest entry: not by rounding."""
    distance, scale = (ours - theirs).abs().max(), theirs.abs().max()
    assert float(distance) > 0.01 * float(scale)


def our_likelihood(likelihood, noise_std=1.0):
    if likelihood == "classification":
        return fb.likelihoods.Categorical()
    return fb.likelihoods.Gaussian(noise_std=noise_std)


def flat_function(net):
    """The outputs for one datum from the flat vector of parameters, and that vector."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def outputs(flat, x):
        parts = flat.split(sizes)
        tree = {name: part.view_as(params[name]) for name, part in zip(params, parts, strict=True)}
        return functional_call(net, tree, (x.unsqueeze(0),)).squeeze(0)

    return outputs, torch.cat([p.flatten() for p in params.values()])


def dense_reference(kind, net, x, y, loss):
    """The "ggn" or "empirical_fisher" of Σ loss(outputs, y) by autograd alone, `[P, P]`.

    Args:
        kind: which of them.
        net: the network.
        x: inputs.
        y: targets.
        loss: of the outputs and the target of one datum.
    """
    outputs, flat = flat_function(net)
    jacobians = vmap(jacrev(outputs), (None, 0))(flat, x)
    values = vmap(outputs, (None, 0))(flat, x)
    if kind == "ggn":
        return torch.einsum("nap,nab,nbq->pq", jacobians, vmap(hessian(loss))(values, y), jacobians)
    gradients = torch.einsum("na,nap->np", vmap(jacrev(loss))(values, y), jacobians)
    return gradients.T @ gradients
