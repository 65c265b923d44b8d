"""The five methods, each as one function from a network and data to a posterior."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.core.model import Model

Categorical = fb.likelihoods.Categorical


def swag(net: nn.Module, data: Any, key: int) -> tuple[Model, Any]:
    model = Model.from_module(net)
    state = fb.swag.init(model.params, max_rank=3)
    for i in range(4):
        step = fb.random.fold_in(key, i)
        noise = trees.tree_map(
            lambda p, step=step: 0.05 * fb.random.normal(step, p.shape, dtype=p.dtype), model.params
        )
        state = fb.swag.update(state, trees.tree_map(torch.add, model.params, noise))
    return model, fb.swag.posterior(state)


def laplace(net: nn.Module, data: Any, key: int) -> tuple[Model, Any]:
    model = Model.from_module(net)
    state = fb.laplace.fit(model, data, likelihood=Categorical())
    return model, fb.laplace.posterior(state, prior_precision=20.0)


def vi(net: nn.Module, data: Any, key: int) -> tuple[Model, Any]:
    model = Model.from_module(net)
    state = fb.vi.fit(model, data, key=key, likelihood=Categorical(), num_epochs=1)
    return model, fb.vi.posterior(state)


def dropout(net: nn.Module, data: Any, key: int) -> tuple[Model, Any]:
    model = Model.from_module(net)
    return model, fb.dropout.posterior(model)


def ensemble(net: nn.Module, data: Any, key: int) -> tuple[Model, Any]:
    model = Model.from_module(net)
    stacked = [
        trees.tree_map(lambda p, i=i: p + 0.02 * i, (model.params, model.constants))
        for i in range(3)
    ]
    params, constants = trees.stack(stacked)
    state = fb.ensemble.fit(
        model,
        fb.ensemble.EnsembleState(params, constants),
        data,
        key=key,
        likelihood=Categorical(),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.01),
        num_epochs=1,
    )
    return model, fb.ensemble.posterior(state)


METHODS: dict[str, Callable[[nn.Module, Any, int], tuple[Model, Any]]] = {
    "swag": swag,
    "laplace": laplace,
    "vi": vi,
    "dropout": dropout,
    "ensemble": ensemble,
}
