"""The plain network and five Bayesian methods, each trained as its paper has it.

Every function here takes the same `Task` and gives a `Fitted`, which is all that prediction
needs. Hyper-parameters that depend on the data are chosen on the validation split.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from funcbayes.cli.data import ShuffledBatches, Splits
from funcbayes.core import random, trees
from funcbayes.core.likelihoods import Categorical
from funcbayes.core.model import Model
from funcbayes.core.random import Key
from funcbayes.inference import dropout, ensemble, laplace, swag, vi
from funcbayes.posteriors import Empirical
from funcbayes.prediction import predict

LIKELIHOOD = Categorical()
BATCH_SIZE = 32
NUM_MEMBERS = 5

# SGD with Nesterov momentum and cosine decay, the recipe of every network that is trained
# from the start.
_LEARNING_RATE, _MOMENTUM, _WEIGHT_DECAY = 0.05, 0.9, 5e-4


class Task(NamedTuple):
    """What every method starts from.

    Attributes:
        data: the splits.
        make_net: builds an untrained network.
        net: the trained plain network; a method that trains on copies it.
        epochs: passes over the training split of a network that is trained from the start.
        num_samples: posterior samples for a prediction.
        key: the method's own.
        begin: called once with the number of steps to come.
        tick: called after each step; arguments are ignored.
    """

    data: Splits
    make_net: Callable[[], nn.Module]
    net: nn.Module
    epochs: int
    num_samples: int
    key: Key
    begin: Callable[[int], None]
    tick: Callable[..., None]


class Fitted(NamedTuple):
    """What predicts.

    Attributes:
        model: the network as a function.
        posterior: the distribution over its parameters.
        num_samples: how many samples to predict with; None for every member of an ensemble.
        choices: what was chosen on the validation split, for the report.
    """

    model: Model
    posterior: Any
    num_samples: int | None
    choices: dict[str, Any]


def fit_plain(task: Task) -> Fitted:
    """Trains `task.net` itself, in place, in a plain PyTorch loop."""
    data = _shuffled(task)
    num_steps = task.epochs * len(data)
    task.begin(num_steps)
    # Dropout in training draws from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.seed(task.key))
        optimizer, schedule = _sgd(list(task.net.parameters()), num_steps)
        task.net.train()
        for _ in range(task.epochs):
            for images, targets in data:
                _step(task.net, optimizer, images, targets)
                schedule.step()
                task.tick()
    task.net.eval()
    model = Model.from_module(task.net)
    alone = trees.tree_map(lambda p: p.clone().unsqueeze(0), model.params)
    return Fitted(model, Empirical(alone, {}), None, {})


def fit_swag(task: Task) -> Fitted:
    """SWAG: goes on from the plain network by SGD at a constant learning rate.

    Weights are collected after each epoch, the low-rank part keeps the last 20, and each
    draw gets batch-norm statistics of its own. Only the learning rate is chosen.

    Source:
        Maddox et al. (2019), arXiv:1902.02476, algorithm 1 and section 3.4.
    """
    learning_rates = (0.01, 0.03, 0.1)
    num_epochs, max_rank = 40, 20
    steps = num_epochs * len(_shuffled(task))
    task.begin(len(learning_rates) * steps)

    def collect(learning_rate: float) -> Fitted:
        net = copy.deepcopy(task.net).train()
        model = Model.from_module(net)
        state = swag.init(model.params, max_rank=max_rank)
        optimizer = torch.optim.SGD(
            net.parameters(), learning_rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY
        )
        data = _shuffled(task)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.seed(task.key))
            for _ in range(num_epochs):
                for images, targets in data:
                    _step(net, optimizer, images, targets)
                    task.tick()
                state = swag.update(state, model.params)
        draws = swag.reestimate_batch_norm(
            model,
            swag.posterior(state),
            task.data.train,
            key=random.fold_in(task.key, 1),
            num_samples=task.num_samples,
        )
        # The draws are members now: predicting with all of them draws nothing.
        return Fitted(model, draws, None, {})

    return _best(task, "learning_rate", {rate: collect(rate) for rate in learning_rates})


def fit_laplace(task: Task) -> Fitted:
    """Laplace: the diagonal GGN around the plain network's last layer.

    Samples of a Laplace posterior over *all* weights underfit when they go through the
    network itself: the Gaussian is that of the network linearised in its weights, and holds
    for no other. In its last layer a network *is* linear, so there sampled weights are right
    without linearising, and the last layer alone does nearly as well.

    Source:
        Daxberger et al. (2021), arXiv:2106.14806, sections 2.2 and 4.1; the underfitting is
        in Immer et al. (2021), arXiv:2008.08400. The prior precision is chosen by validation
        likelihood, which is among their options; no refit is needed for another value.
    """
    prior_precisions = [10.0 ** (k / 4) for k in range(2, 17)]
    task.begin(1 + len(prior_precisions))
    model = Model.from_module(task.net, bayesian=_in_head)
    state = laplace.fit(model, task.data.train, likelihood=LIKELIHOOD)
    task.tick()

    def widen(prior_precision: float) -> Fitted:
        task.tick()
        posterior = laplace.posterior(state, prior_precision=prior_precision)
        return Fitted(model, posterior, task.num_samples, {})

    return _best(task, "prior_precision", {p: widen(p) for p in prior_precisions})


def fit_vi(task: Task) -> Fitted:
    """Variational inference: a factorised Gaussian over the last layer's weights.

    It starts at the plain network's weights with a small standard deviation; prior N(0, 1),
    the KL term weighted 1 and counted once for the whole training split. The number of
    epochs is chosen.

    NOTE: the lower the bound's KL term gets on this data, the worse the predictions: over
    all weights of the network, and for the last layer after some hundred epochs. A factorised
    Gaussian buys a small KL by giving up weights that repeat what others say, and unseen
    classes are told by just these. So only the last layer is uncertain, and training stops
    early.

    Source:
        Blundell et al. (2015), arXiv:1505.05424, with a Gaussian prior; the pruning is in
        Trippe and Turner (2018), arXiv:1801.06230.
    """
    num_rounds, epochs_per_round = 6, 15
    model = Model.from_module(task.net, bayesian=_in_head)
    state = vi.init(model.params, std=0.01)
    data = _shuffled(task)
    task.begin(num_rounds * epochs_per_round * len(data))
    rounds: dict[float, Fitted] = {}
    for i in range(num_rounds):
        state = vi.fit(
            model,
            data,
            key=random.fold_in(random.fold_in(task.key, 1), i),
            likelihood=LIKELIHOOD,
            num_epochs=epochs_per_round,
            learning_rate=5e-4,
            num_samples=4,
            num_data=len(task.data.train.targets),
            state=state,
            callback=task.tick,
        )
        posterior = vi.posterior(state)
        rounds[epochs_per_round * (i + 1)] = Fitted(model, posterior, task.num_samples, {})
    return _best(task, "epochs", rounds)


def fit_dropout(task: Task) -> Fitted:
    """Monte Carlo dropout: the plain network, its dropout left on. Nothing to train.

    Source:
        Gal and Ghahramani (2016), arXiv:1506.02142.
    """
    task.begin(1)
    model = Model.from_module(task.net)
    task.tick()
    return Fitted(model, dropout.posterior(model), task.num_samples, {})


def fit_ensemble(task: Task) -> Fitted:
    """Deep ensemble: five networks trained from the start, all in one vectorised step.

    Source:
        Lakshminarayanan et al. (2017), arXiv:1612.01474, without adversarial training.
    """
    data = _shuffled(task)
    num_steps = task.epochs * len(data)
    task.begin(num_steps)
    init_key, fit_key = random.split(task.key)
    model, members = ensemble.init(task.make_net, key=init_key, num_members=NUM_MEMBERS)
    schedules: list[LRScheduler] = []

    def make_optimizer(leaves: list[Tensor]) -> Optimizer:
        optimizer, schedule = _sgd(leaves, num_steps)
        schedules.append(schedule)
        return optimizer

    def after_step(number: int, losses: Tensor) -> None:
        schedules[-1].step()
        task.tick()

    members = ensemble.fit(
        model,
        members,
        data,
        key=fit_key,
        likelihood=LIKELIHOOD,
        optimizer=make_optimizer,
        num_epochs=task.epochs,
        callback=after_step,
    )
    return Fitted(model, ensemble.posterior(members), None, {})


METHODS: dict[str, Callable[[Task], Fitted]] = {
    "plain": fit_plain,
    "swag": fit_swag,
    "laplace": fit_laplace,
    "vi": fit_vi,
    "dropout": fit_dropout,
    "ensemble": fit_ensemble,
}
"""From the name on the command line to what fits it; the plain network comes first."""


def _in_head(name: str) -> bool:
    return name.startswith("head.")


def _shuffled(task: Task) -> ShuffledBatches:
    return ShuffledBatches(task.data.train, batch_size=BATCH_SIZE, key=random.fold_in(task.key, 0))


def _sgd(leaves: Iterable[Tensor], num_steps: int) -> tuple[Optimizer, LRScheduler]:
    optimizer = torch.optim.SGD(
        leaves,
        _LEARNING_RATE,
        momentum=_MOMENTUM,
        nesterov=True,
        weight_decay=_WEIGHT_DECAY,
    )
    return optimizer, CosineAnnealingLR(optimizer, num_steps)


def _step(net: nn.Module, optimizer: Optimizer, images: Tensor, targets: Tensor) -> None:
    loss = nn.functional.cross_entropy(net(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _best(task: Task, name: str, candidates: dict[float, Fitted]) -> Fitted:
    """The candidate of the lowest validation NLL, with the values tried in its choices."""
    nlls: dict[float, float] = {}
    for value, fitted in candidates.items():
        nlls[value] = _validation_nll(task, fitted)
    best = min(nlls, key=lambda value: nlls[value])
    tried = {f"{value:.4g}": round(nll, 6) for value, nll in nlls.items()}
    return candidates[best]._replace(choices={name: best, "validation_nll": tried})


def _validation_nll(task: Task, fitted: Fitted) -> float:
    """NLL on the validation split, in nats a datum; infinite where it is no number."""
    images, targets = task.data.validation
    predictive = predict(
        fitted.model,
        fitted.posterior,
        images,
        key=random.fold_in(task.key, 2),
        num_samples=fitted.num_samples,
        likelihood=LIKELIHOOD,
    )
    nll = float(-predictive.mean.gather(1, targets[:, None]).log().mean())
    return nll if math.isfinite(nll) else math.inf
