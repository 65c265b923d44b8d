"""The methods as rows of the conformance table: from a network and data to a posterior.

A new method is a new row in `METHODS`; the columns are in `tests/laws/test_conformance.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.core.model import Model
from funcbayes.testing import networks

Categorical = fb.likelihoods.Categorical
NUM_STEPS = 4


class Row(NamedTuple):
    """What the table needs to know of a method.

    Attributes:
        state: a network, data `(inputs, targets)` and a seed become a state.
        posterior: a state becomes a posterior.
        likelihood: whether the fit evaluates a likelihood, so that it refuses a network that
            returns several tensors.
        family: which of `strategies.posteriors` the row is; None for a method.
        vmappable: whether a stack of states goes through `vmap(posterior)`; otherwise the reason
            why not.
        merge: from a network and data to data, a fit and a merge whose states are those of all
            data; otherwise the reason why there is none.
        log_prob: whether the posterior has a density; otherwise the reason why not.
        fast: one in so many of the row's cells is in the fast selection.
    """

    state: Callable[[Model, Any, int], Any]
    posterior: Callable[[Any], Any]
    likelihood: bool = False
    family: str | None = None
    vmappable: str | None = None
    merge: Callable[[Model, Any], tuple[Any, Any, Any]] | str = "its states do not merge"
    log_prob: str | None = None
    fast: int = 3

    def fit(self, net: nn.Module, data: Any, key: int, bayesian: Any = None) -> tuple[Model, Any]:
        """The network as a model, and its posterior."""
        model = Model.from_module(net, bayesian)
        return model, self.posterior(self.state(model, data, key))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The networks that the method takes."""
        return networks.LOGIT_KINDS if self.likelihood else tuple(networks.NETWORKS)


# -- SWAG ----------------------------------------------------------------------------------


def trajectory(params: Any, key: int) -> Any:
    """Weight iterates around given weights, leaves `[steps, *shape]`."""
    leaves = [
        p + 0.05 * fb.random.normal(fb.random.fold_in(key, i), (NUM_STEPS, *p.shape), dtype=p.dtype)
        for i, p in enumerate(trees.leaves(params))
    ]
    return trees.unflatten(leaves, params)


def swag_of(iterates: Any, max_rank: int) -> fb.swag.SwagState:
    """The state after these iterates."""
    state = fb.swag.init(trees.index(iterates, 0), max_rank=max_rank)
    for iterate in trees.unstack(iterates):
        state = fb.swag.update(state, iterate)
    return state


def swag(max_rank: int) -> Callable[[Model, Any, int], Any]:
    return lambda model, data, key: swag_of(trajectory(model.params, key), max_rank)


def swag_shards(model: Model, data: Any) -> tuple[Any, Any, Any]:
    return trajectory(model.params, 0), lambda iterates: swag_of(iterates, 0), fb.swag.merge


def multiswag(model: Model, data: Any, key: int) -> Any:
    """States of two trajectories, stacked."""
    return trees.stack([swag(2)(model, data, 2 * key + i) for i in range(2)])


# -- Laplace -------------------------------------------------------------------------------


def laplace(curvature: str) -> Callable[[Model, Any, int], Any]:
    return lambda model, data, key: fb.laplace.fit(
        model, data, likelihood=Categorical(), curvature=curvature
    )


def laplace_shards(curvature: str) -> Callable[[Model, Any], tuple[Any, Any, Any]]:
    return lambda model, data: (
        data,
        lambda shard: laplace(curvature)(model, shard, 0),
        fb.laplace.merge,
    )


def laplace_posterior(state: Any) -> Any:
    return fb.laplace.posterior(state, prior_precision=20.0)


EKFAC_SHARDS = "eigenvalues add up in one basis only, and each shard has its own"


def laplace_structure(structure: str, rank: int | None = None) -> Row:
    """A structure of the GGN; the row "laplace_ggn" is the diagonal one."""

    def fit(model: Model, data: Any) -> Any:
        return fb.laplace.fit(model, data, likelihood=Categorical(), structure=structure, rank=rank)

    def shards(model: Model, data: Any) -> tuple[Any, Any, Any]:
        return data, lambda shard: fit(model, shard), fb.laplace.merge

    merge: Any = shards
    if structure == "ekfac":
        merge = EKFAC_SHARDS
    if structure == "low_rank":
        merge = "ranks add up, so the tensors differ in shape; their merge has tests of its own"
    return Row(
        lambda model, data, key: fit(model, data),
        laplace_posterior,
        likelihood=True,
        merge=merge,
        fast=7,  # they have much in common
    )


# -- the others ----------------------------------------------------------------------------


def vi(model: Model, data: Any, key: int) -> Any:
    return fb.vi.fit(model, data, key=key, likelihood=Categorical(), num_epochs=1)


NO_STATE = "masks have no state"


def dropout(per: Any) -> dict[str, Any]:
    return {
        "state": lambda model, data, key: model,
        "posterior": lambda model: fb.dropout.posterior(model, per=per),
        "vmappable": NO_STATE,
        "merge": NO_STATE,
        "log_prob": "masks are no density over parameters",
    }


def members(model: Model, key: int, scale: float = 0.02) -> tuple[Any, dict[str, torch.Tensor]]:
    """Three members around the model's weights, with constants of their own."""

    def stack(leaf: torch.Tensor) -> torch.Tensor:
        if not leaf.is_floating_point():
            return torch.stack([leaf] * 3)
        return torch.stack([leaf + scale * (i + key) for i in range(3)])

    return trees.tensor_map(stack, model.params), trees.tensor_map(stack, model.constants)


def ensemble(model: Model, data: Any, key: int) -> Any:
    return fb.ensemble.fit(
        model,
        fb.ensemble.EnsembleState(*members(model, key)),
        data,
        key=key,
        likelihood=Categorical(),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.01),
        num_epochs=1,
    )


# -- the families themselves ---------------------------------------------------------------


def noise(model: Model, key: int, *batch: int) -> Any:
    """A tree like the parameters with a leading axis, of standard deviation 0.1."""
    leaves = [
        0.1 * fb.random.normal(fb.random.fold_in(key, i), (*batch, *p.shape), dtype=p.dtype)
        for i, p in enumerate(trees.leaves(model.params))
    ]
    return trees.unflatten(leaves, model.params)


def diagonal(model: Model, data: Any, key: int) -> Any:
    std = trees.tree_map(lambda n: n.abs() + 0.01, noise(model, key))
    return fb.posteriors.Diagonal(trees.clone(model.params), std)


def low_rank(model: Model, data: Any, key: int) -> Any:
    return fb.posteriors.LowRank(*diagonal(model, data, key), noise(model, key + 1, 2))


def mixture(model: Model, data: Any, key: int) -> Any:
    parts = [diagonal(model, data, key), low_rank(model, data, key)]
    return fb.posteriors.mixture(parts, [1.0, 2.0])


def family(name: str, state: Callable[[Model, Any, int], Any], **options: Any) -> Row:
    return Row(
        state,
        lambda state: state,
        family=name,
        vmappable="it is a posterior already",
        merge="it is a posterior already",
        **options,
    )


NO_DENSITY = "members have no density"
METHODS: dict[str, Row] = {
    "swag_diagonal": Row(swag(0), fb.swag.posterior, merge=swag_shards),
    "swag_low_rank": Row(
        swag(3),
        fb.swag.posterior,
        merge="deviations are kept from the newest iterates, so order matters; their merge has"
        " tests of its own",
    ),
    "laplace_ggn": Row(
        laplace("ggn"), laplace_posterior, likelihood=True, merge=laplace_shards("ggn")
    ),
    "laplace_empirical_fisher": Row(
        laplace("empirical_fisher"),
        laplace_posterior,
        likelihood=True,
        merge=laplace_shards("empirical_fisher"),
    ),
    "laplace_kronecker": laplace_structure("kronecker"),
    "laplace_ekfac": laplace_structure("ekfac"),
    "laplace_dense": laplace_structure("dense"),
    "laplace_low_rank": laplace_structure("low_rank", rank=3),
    "laplace_block_diagonal": laplace_structure("block_diagonal"),
    "vi": Row(vi, fb.vi.posterior, likelihood=True),
    "dropout_per_row": Row(**dropout("row")),
    "dropout_per_batch": Row(**dropout("batch")),
    "ensemble": Row(ensemble, fb.ensemble.posterior, likelihood=True, log_prob=NO_DENSITY),
    "multiswag": Row(
        multiswag, lambda state: fb.posteriors.mixture(torch.vmap(fb.swag.posterior)(state))
    ),
    "diagonal": family("diagonal", diagonal),
    "low_rank": family("low_rank", low_rank),
    "empirical": family(
        "empirical",
        lambda model, data, key: fb.posteriors.Empirical(*members(model, key, 0.1)),
        log_prob=NO_DENSITY,
    ),
    "mixture": family("mixture", mixture),
}
