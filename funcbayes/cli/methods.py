"""The plain network and the methods, each trained as its paper has it.

Every function here takes the same `Task` and gives a `Fitted`, which is all that prediction
needs. Hyper-parameters that depend on the data are chosen on the validation split, and so is
the noise in regression, for each method its own.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from funcbayes.cli import choose
from funcbayes.cli.choose import Fitted
from funcbayes.cli.data import ShuffledBatches, Splits
from funcbayes.cli.errors import UsageError
from funcbayes.cli.recipes import batch_size, recipe
from funcbayes.core import random, trees
from funcbayes.core.likelihoods import Categorical, Gaussian, Likelihood
from funcbayes.core.model import Model
from funcbayes.core.random import Key
from funcbayes.inference import dropout, ensemble, laplace, swag, vi
from funcbayes.posteriors import Empirical

NUM_MEMBERS = 5

# SGD with Nesterov momentum and cosine decay, the recipe of every network that is trained
# from the start.
_LEARNING_RATE, _MOMENTUM = 0.05, 0.9


class DivergedError(UsageError):
    """Training ended in numbers that are not finite."""


class Task(NamedTuple):
    """What every method starts from.

    Attributes:
        data: the splits, on the device to train on.
        make_net: builds an untrained network there.
        net: the trained plain network; a method that trains on copies it.
        weight_decay: that of the plain network; chosen when it is trained.
        likelihood: that of the plain network, in regression with its noise.
        epochs: passes over the training split of a network that is trained from the start.
        num_samples: posterior samples for a prediction.
        key: the method's own.
        begin: called once with the number of steps to come.
        tick: called after each step; arguments are ignored.
    """

    data: Splits
    make_net: Callable[[], nn.Module]
    net: nn.Module
    weight_decay: float
    likelihood: Likelihood
    epochs: int
    num_samples: int
    key: Key
    begin: Callable[[int], None]
    tick: Callable[..., None]


def likelihood_for(data: Splits) -> Likelihood:
    """What outputs mean before anything is trained; the targets' noise is not known yet."""
    return Categorical() if data.task == "classification" else Gaussian(noise_std=1.0)


def fit_plain(task: Task) -> Fitted:
    """Trains `task.net` itself, in place, in a plain PyTorch loop."""
    candidates: dict[float, Fitted] = {}
    nets: dict[float, nn.Module] = {}
    decays = recipe(task.data).weight_decays
    num_steps = task.epochs * len(_shuffled(task))
    task.begin(len(decays) * num_steps)
    for decay in decays:
        net = nets[decay] = copy.deepcopy(task.net).train()
        optimizer, schedule = _sgd(list(net.parameters()), num_steps, decay)

        def after_step(schedule: LRScheduler = schedule) -> None:
            schedule.step()
            task.tick()

        _train(task, net, optimizer, _shuffled(task), task.epochs, after_step)
        model = Model.from_module(net.eval())
        alone = trees.tree_map(lambda p: p.clone().unsqueeze(0), model.params)
        candidates[decay] = Fitted(model, Empirical(alone, {}), None, task.likelihood, {})
    best = _best(task, "weight_decay", candidates)
    task.net.load_state_dict(nets[best.choices["weight_decay"]].state_dict())
    task.net.eval()
    return best


def fit_swag(task: Task) -> Fitted:
    """SWAG: goes on from the plain network by SGD at a constant learning rate.

    Weights are collected after each epoch, the low-rank part keeps the last 20, and each
    draw gets batch-norm statistics of its own. Only the learning rate is chosen.

    Source:
        Maddox et al. (2019), arXiv:1902.02476, algorithm 1 and section 3.4.
    """
    learning_rates = (0.01, 0.03, 0.1)
    num_epochs, max_rank = max(2, round(task.epochs * 2 / 3)), 20
    data = _shuffled(task)
    task.begin(len(learning_rates) * num_epochs * len(data))
    has_statistics = bool(dict(task.net.named_buffers()))

    def collect(learning_rate: float) -> Fitted:
        net = copy.deepcopy(task.net).train()
        model = Model.from_module(net)
        state = swag.init(model.params, max_rank=max_rank)
        optimizer = torch.optim.SGD(
            net.parameters(), learning_rate, momentum=_MOMENTUM, weight_decay=task.weight_decay
        )

        def after_epoch() -> None:
            nonlocal state
            state = swag.update(state, model.params)

        _train(task, net, optimizer, _shuffled(task), num_epochs, task.tick, after_epoch)
        posterior = swag.posterior(state)
        if not has_statistics:
            return Fitted(model, posterior, task.num_samples, task.likelihood, {})
        draws = swag.reestimate_batch_norm(
            model,
            posterior,
            task.data.train,
            key=random.fold_in(task.key, 1),
            num_samples=task.num_samples,
        )
        # The draws are members now: predicting with all of them draws nothing.
        return Fitted(model, draws, None, task.likelihood, {})

    candidates: dict[float, Fitted] = {}
    for i, rate in enumerate(learning_rates):
        # The largest ones may be too large; then there are the others.
        with contextlib.nullcontext() if i == 0 else contextlib.suppress(DivergedError):
            candidates[rate] = collect(rate)
    return _best(task, "learning_rate", candidates)


def fit_laplace(task: Task) -> Fitted:
    """Laplace: the diagonal GGN around the plain network's last layer.

    Samples of a Laplace posterior over *all* weights underfit when they go through the
    network itself: the Gaussian is that of the network linearised in its weights, and holds
    for no other. In its last layer a network *is* linear, so there sampled weights are right
    without linearising, and the last layer alone does nearly as well.

    NOTE: on small tables the validation split may prefer a narrow posterior: a diagonal one
    that is wide enough to be unsure far from the data is too unsure near them, since it
    knows no correlations. The evidence chose wider ones, which fitted regression as well and
    made the NLL of classification up to three times as large.

    Source:
        Daxberger et al. (2021), arXiv:2106.14806, sections 2.2 and 4.1; the underfitting is
        in Immer et al. (2021), arXiv:2008.08400. The prior precision is chosen by validation
        likelihood, which is among their options; no refit is needed for another value.
    """
    prior_precisions = recipe(task.data).prior_precisions
    task.begin(1 + len(prior_precisions))
    model = Model.from_module(task.net, bayesian=_in_head)
    state = laplace.fit(model, task.data.train, likelihood=task.likelihood)
    task.tick()

    def widen(prior_precision: float) -> Fitted:
        task.tick()
        posterior = laplace.posterior(state, prior_precision=prior_precision)
        return Fitted(model, posterior, task.num_samples, task.likelihood, {})

    return _best(task, "prior_precision", {p: widen(p) for p in prior_precisions})


def fit_laplace_linearized(
    task: Task, *, structure: str, bayesian: Callable[[str], bool] | None = None
) -> Fitted:
    """Laplace as the network linearised in its weights has it.

    NOTE: the prior precision of the largest evidence, which needs no validation split, is far
    too small where the network fits its training data all but perfectly, as on digits: the
    curvature there is next to nothing, and the evidence of a network whose training stopped
    short of the mode says little. So the validation split chooses.

    Args:
        task: what to fit.
        structure: of the GGN.
        bayesian: which weights are uncertain, by name; None: all.

    Source:
        Immer, Korzepa and Bauer (2021), arXiv:2008.08400.
    """
    prior_precisions = recipe(task.data).prior_precisions[::2]
    task.begin(1 + len(prior_precisions))
    model = Model.from_module(task.net, bayesian=bayesian)
    state = laplace.decompose(
        laplace.fit(model, task.data.train, likelihood=task.likelihood, structure=structure)
    )
    task.tick()

    def widen(prior_precision: float) -> Fitted:
        task.tick()
        posterior = laplace.posterior(state, prior_precision=prior_precision)
        return Fitted(model, posterior, task.num_samples, task.likelihood, {}, linearized=True)

    return _best(task, "prior_precision", {p: widen(p) for p in prior_precisions})


def fit_vi(task: Task) -> Fitted:
    """Variational inference: a factorised Gaussian over the last layer's weights.

    It starts at the plain network's weights with a small standard deviation (a wider one on
    tables: few steps would not reach it); prior N(0, 1), the KL term weighted 1 and counted
    once for the whole training split. The number of epochs is chosen.

    NOTE: the lower the bound's KL term gets on this data, the worse the predictions: over
    all weights of the network, and for the last layer after some hundred epochs. A factorised
    Gaussian buys a small KL by giving up weights that repeat what others say, and unseen
    classes are told by just these. So only the last layer is uncertain, and training stops
    early.

    Source:
        Blundell et al. (2015), arXiv:1505.05424, with a Gaussian prior; the pruning is in
        Trippe and Turner (2018), arXiv:1801.06230.
    """
    settings = recipe(task.data)
    num_rounds, epochs_per_round = 6, max(1, round(task.epochs / 4))
    model = Model.from_module(task.net, bayesian=_in_head)
    state = vi.init(model.params, std=settings.vi_std)
    data = _shuffled(task)
    task.begin(num_rounds * epochs_per_round * len(data))
    rounds: dict[float, Fitted] = {}
    for i in range(num_rounds):
        state = vi.fit(
            model,
            data,
            key=random.fold_in(random.fold_in(task.key, 1), i),
            likelihood=task.likelihood,
            num_epochs=epochs_per_round,
            learning_rate=settings.vi_learning_rate,
            num_samples=4,
            num_data=len(task.data.train.targets),
            state=state,
            callback=task.tick,
        )
        posterior = vi.posterior(state)
        rounds[epochs_per_round * (i + 1)] = Fitted(
            model, posterior, task.num_samples, task.likelihood, {}
        )
    return _best(task, "epochs", rounds)


def fit_dropout(task: Task) -> Fitted:
    """Monte Carlo dropout: the plain network, its dropout left on. Nothing to train.

    Source:
        Gal and Ghahramani (2016), arXiv:1506.02142.
    """
    task.begin(1)
    model = Model.from_module(task.net)
    fitted = Fitted(model, dropout.posterior(model), task.num_samples, task.likelihood, {})
    task.tick()
    return _with_noise(task, fitted)


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
        optimizer, schedule = _sgd(leaves, num_steps, task.weight_decay)
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
        likelihood=likelihood_for(task.data),
        optimizer=make_optimizer,
        num_epochs=task.epochs,
        callback=after_step,
    )
    return _with_noise(task, Fitted(model, ensemble.posterior(members), None, task.likelihood, {}))


def fit(name: str, task: Task) -> Fitted:
    """Fits a method.

    Raises:
        DivergedError: training ended in numbers that are not finite.
        UsageError: the network's outputs or the targets do not fit the likelihood.
    """
    inputs, targets = (part[:2] for part in task.data.train)
    try:
        with torch.no_grad():
            task.likelihood.check(copy.deepcopy(task.net).eval()(inputs), targets)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the data do not fit {task.data.task}: {error}; or choose the other kind by --task"
        ) from error
    try:
        return METHODS[name](task)
    except DivergedError as error:
        reason, cause = str(error), error
    except ValueError as error:
        # The library's own check of losses and weights.
        if "finite" not in str(error) and "NaN" not in str(error):
            raise
        reason, cause = str(error).split(", expected")[0], error
    raise DivergedError(
        f"training diverged for method {name}, {reason}: look for values far from all others in "
        "the data and standardise them, or lower --epochs"
    ) from cause


def _in_head(name: str) -> bool:
    return name.startswith("head.")


METHODS: dict[str, Callable[[Task], Fitted]] = {
    "plain": fit_plain,
    "swag": fit_swag,
    "laplace": fit_laplace,
    "laplace-head": partial(fit_laplace_linearized, structure="dense", bayesian=_in_head),
    "laplace-diagonal": partial(fit_laplace_linearized, structure="diagonal"),
    "laplace-kronecker": partial(fit_laplace_linearized, structure="kronecker"),
    "vi": fit_vi,
    "dropout": fit_dropout,
    "ensemble": fit_ensemble,
}
"""From the name on the command line to what fits it; the plain network comes first."""

STREAMS = {
    "plain": 0,
    "swag": 1,
    "laplace": 2,
    "vi": 3,
    "dropout": 4,
    "ensemble": 5,
    "laplace-head": 6,
    "laplace-diagonal": 7,
    "laplace-kronecker": 8,
}
"""What a method's key is folded with. A new method takes a new number and moves no other."""


def _shuffled(task: Task) -> ShuffledBatches:
    return ShuffledBatches(
        task.data.train, batch_size=batch_size(task.data), key=random.fold_in(task.key, 0)
    )


def _sgd(
    leaves: Iterable[Tensor], num_steps: int, weight_decay: float
) -> tuple[Optimizer, LRScheduler]:
    optimizer = torch.optim.SGD(
        leaves,
        _LEARNING_RATE,
        momentum=_MOMENTUM,
        nesterov=True,
        weight_decay=weight_decay,
    )
    return optimizer, CosineAnnealingLR(optimizer, num_steps)


def _train(
    task: Task,
    net: nn.Module,
    optimizer: Optimizer,
    data: ShuffledBatches,
    num_epochs: int,
    after_step: Callable[[], None],
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """A plain PyTorch loop; the loss is that of unit noise in regression."""
    likelihood = likelihood_for(task.data)
    # Dropout in training draws from torch's global generator.
    with _seeded(task.key, task.data.train.inputs.device):
        loss = torch.zeros(())
        for epoch in range(num_epochs):
            for inputs, targets in data:
                loss = likelihood.nll(net(inputs), targets).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                after_step()
            if not math.isfinite(loss.item()):
                raise DivergedError(f"the loss is {loss.item()} in epoch {epoch + 1}")
            after_epoch()


@contextlib.contextmanager
def _seeded(key: Key, device: torch.device) -> Iterator[None]:
    """The global generators of torch follow the key inside, and are as before after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(random.seed(key))
        yield


def _best(task: Task, name: str, candidates: dict[float, Fitted]) -> Fitted:
    key, tolerance = random.fold_in(task.key, 2), recipe(task.data).tolerance
    return choose.best(name, candidates, task.data, key=key, tolerance=tolerance)


def _with_noise(task: Task, fitted: Fitted) -> Fitted:
    return choose.with_noise(fitted, task.data, key=random.fold_in(task.key, 2))
