"""Training with the prior and the noise chosen by the marginal likelihood on the way."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.data import batch_size, batches
from funcbayes.core.likelihoods import Gaussian, Likelihood, check_likelihood
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import Key, KeyLike
from funcbayes.core.trees import TensorTree, check_finite, tree_map
from funcbayes.inference.checks import check_training
from funcbayes.inference.laplace.priors import (
    Prior,
    check_number,
    check_temperature,
    leaf_deviations,
    leaf_precisions,
)
from funcbayes.inference.laplace.state import LaplaceState, fit
from funcbayes.inference.laplace.tune import Problem, check_prior, start
from funcbayes.inference.seeding import seeded
from funcbayes.posteriors.base import check_num_samples


class OnlineInfo(NamedTuple):
    """How an epoch went.

    Attributes:
        loss: average of the objective over the epoch's steps, in nats per datum. Shape [].
        log_marginal_likelihood: after the epoch's choice of the prior, in nats; NaN after an
            epoch without one. Shape [].
    """

    loss: Float[Tensor, ""]
    log_marginal_likelihood: Float[Tensor, ""]


class OnlineHistory(NamedTuple):
    """The choices of the prior.

    Attributes:
        epoch: after how many epochs each was made.
        log_marginal_likelihood: after each choice, at the parameters and the curvature of then,
            in nats.
        prior_precision: what was chosen; leaves have a leading axis.
    """

    epoch: Int[Tensor, " choices"]
    log_marginal_likelihood: Float[Tensor, " choices"]
    prior_precision: TensorTree


class OnlineResult(NamedTuple):
    """A trained network with its prior, noise and curvature.

    Attributes:
        params: the trained parameters.
        constants: the model's constants as training left them: the statistics of batch norm.
            `model.replace(result.params, result.constants)` is the trained model.
        prior_precision: as `posterior` takes it.
        noise_std: as `posterior` takes it; None where the noise is not learnt.
        history: the choices on the way.
        state: the curvature at `params`, from `fit`.
    """

    params: TensorTree
    constants: dict[str, Tensor]
    prior_precision: Tensor | TensorTree
    noise_std: Tensor | None
    history: OnlineHistory
    state: LaplaceState


def online(
    model: Model,
    data: Any,
    *,
    key: KeyLike,
    likelihood: Likelihood,
    num_epochs: int,
    learning_rate: float = 1e-3,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    structure: Any = "kronecker",
    curvature: str = "ggn",
    sharing: str = "expand",
    rank: int | None = None,
    num_samples: int | None = None,
    per_output_noise: bool = False,
    prior: str = "per_tensor",
    prior_precision: Prior = 1.0,
    prior_mean: Prior = 0.0,
    temperature: float = 1.0,
    learn_noise: bool = False,
    burn_in: int = 0,
    interval: int = 5,
    num_prior_steps: int = 100,
    prior_learning_rate: float = 0.1,
    callback: Callable[[int, OnlineInfo], None] | None = None,
) -> OnlineResult:
    """Trains a network by maximum a posteriori, and its prior by the marginal likelihood.

    Steps on mean nll + T/(2N) Σ p₀ (θ − μ₀)² alternate with choices of the prior: a new
    curvature, and steps of Adam on the logarithms of the precisions (and of the noise). The last
    epoch ends with such a choice. No data are held out.

    Args:
        model: the network, which starts at `model.params`. Not modified; it runs in training
            mode (dropout with masks from the key, batch norm with the batch's statistics), and
            in evaluation mode for the curvature.
        data: iterable of `(inputs, targets)` pairs, such as a `DataLoader`, or one such pair:
            all training data, each datum once a pass. Gone through once an epoch, once before,
            and once or more for each choice of the prior.
        key: whatever is drawn at step t depends on `(key, t)`.
        likelihood: one of `funcbayes.likelihoods`.
        num_epochs: passes over the data.
        learning_rate: of Adam; not used if `optimizer` is given.
        optimizer: makes an optimizer from the list of leaves to train. Without weight decay of
            its own: the prior is that.
        structure: of the curvature, as for `fit`; so are the five arguments that follow.
        curvature: as for `fit`.
        sharing: as for `fit`.
        rank: as for `fit`.
        num_samples: as for `fit`.
        per_output_noise: as for `fit`.
        prior: "scalar", "per_tensor" or "per_element", as for `tune`.
        prior_precision: where it starts, as for `tune`.
        prior_mean: as for `log_marginal_likelihood`.
        temperature: T, as for `posterior`.
        learn_noise: whether the noise of a Gaussian likelihood is chosen too; training then
            goes on with it.
        burn_in: epochs before the first choice of the prior.
        interval: epochs between choices.
        num_prior_steps: steps on the logarithms at each choice.
        prior_learning_rate: of Adam on the logarithms.
        callback: called after each epoch with the number of epochs done and how it went.

    Returns:
        The trained parameters, and what `posterior` takes:
        `posterior(result.state, prior_precision=result.prior_precision,
        noise_std=result.noise_std)`.

    Raises:
        RuntimeError: inference mode is on.
        TypeError: an argument has the wrong type.
        ValueError: a bad argument, a loader that yields nothing or cannot be gone through again,
            targets of the wrong dtype, shape or range, or a loss that is not finite (the
            message names the step).

    Source:
        Immer, Bauer, Fortuin, Rätsch, Khan (2021), arXiv:2104.04975, algorithm 1.
    """
    check_model(model)
    check_likelihood(likelihood)
    check_training(callback)
    check_prior(prior)
    key = random.as_key(key)
    for count, name in ((num_epochs, "num_epochs"), (interval, "interval")):
        check_num_samples(count, name=name)
    check_num_samples(num_prior_steps, name="num_prior_steps")
    if not isinstance(burn_in, int) or isinstance(burn_in, bool) or burn_in < 0:
        raise ValueError(f"`burn_in` is {burn_in!r}, expected an integer of at least 0")
    learning_rate = check_number(learning_rate, "learning_rate")
    prior_learning_rate = check_number(prior_learning_rate, "prior_learning_rate")
    check_temperature(temperature)
    if learn_noise and not isinstance(likelihood, Gaussian):
        raise ValueError(
            f"`learn_noise` is True, but `likelihood` is {type(likelihood).__name__}, expected"
            " Gaussian: the others have no noise, or predict it"
        )
    start(prior, prior_precision, model.params)
    leaf_deviations(prior_mean, model.params)
    num_data = _num_data(data)
    params = tree_map(lambda p: p.requires_grad_(), trees.clone(model.params))
    constants = trees.clone(model.constants)
    leaves = trees.leaves(params)
    if optimizer is None:
        steps: Any = torch.optim.Adam(leaves, lr=learning_rate)
    else:
        steps = optimizer(leaves) if callable(optimizer) else optimizer
        if not isinstance(steps, torch.optim.Optimizer) or not callable(optimizer):
            raise TypeError(
                f"`optimizer` gives a {type(steps).__name__}, expected a function from a list of"
                " tensors to a torch.optim.Optimizer, such as"
                " lambda leaves: torch.optim.Adam(leaves, lr=1e-3)"
            )

    chosen: Any = prior_precision
    noise_std: Tensor | None = None
    choice: _Choice | None = None
    state: LaplaceState | None = None
    made: list[tuple[int, Tensor, Any]] = []
    sampled = curvature == "monte_carlo_fisher" or num_samples is not None
    step = 0
    for epoch in range(1, num_epochs + 1):
        losses = []
        weights = tree_map(
            lambda p, like: p.detach().to(like) * (temperature / num_data),
            leaf_precisions(chosen, params),
            params,
        )
        for batch in batches(data):
            with torch.enable_grad():
                nll, constants = _nll(
                    model, params, constants, batch, random.fold_in(key, step), likelihood
                )
                shifts = leaf_deviations(prior_mean, params)
                penalty = tree_map(lambda w, d: 0.5 * (w * d.square()).sum(), weights, shifts)
                loss = nll + torch.stack([t.to(nll) for t in trees.leaves(penalty)]).sum()
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss is {loss.item()} at step {step} (epoch {epoch - 1}), expected a"
                    " finite number. Check the inputs for NaN, or lower the learning rate"
                )
            # Not loss.backward(): that would also reach tensors of the user's that require
            # gradients, such as inputs.
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad
            steps.step()
            step += 1
            losses.append(loss.detach())
        evidence = losses[0].new_full((), math.nan)
        due = epoch > burn_in and (epoch - burn_in) % interval == 0
        if due or epoch == num_epochs:
            check_finite(params, name="params")
            state = fit(
                model.replace(params, constants),
                data,
                likelihood=likelihood,
                structure=structure,
                curvature=curvature,
                sharing=sharing,
                rank=rank,
                num_samples=num_samples,
                key=random.fold_in(key, step) if sampled else None,
                per_output_noise=per_output_noise,
            )
            problem = Problem(
                state,
                prior=prior,
                learn_noise=learn_noise,
                prior_precision=chosen,
                prior_mean=prior_mean,
                temperature=temperature,
                noise_std=None,
            )
            if choice is None:
                choice = _Choice(problem.variables, prior_learning_rate)
            evidence = choice.improve(problem, num_prior_steps)
            chosen, noise_std = problem.prior_precision(), problem.noise_std()
            if isinstance(noise_std, Tensor):
                likelihood = Gaussian(noise_std=noise_std)
            made.append((epoch, evidence, chosen))
        if callback is not None:
            callback(epoch, OnlineInfo(torch.stack(losses).mean(), evidence))
    assert state is not None  # the last epoch ends with a choice
    epochs, evidences, precisions = zip(*made, strict=True)
    history = OnlineHistory(
        torch.tensor(epochs, device="cpu"), torch.stack(evidences), trees.stack(list(precisions))
    )
    params = tree_map(torch.Tensor.detach, params)
    return OnlineResult(params, constants, chosen, noise_std, history, state)


class _Choice:
    """Adam on the logarithms, whose averages go on from one curvature to the next."""

    def __init__(self, variables: list[Tensor], learning_rate: float) -> None:
        self.leaves = [v.detach().clone().requires_grad_() for v in variables]
        self.optimizer = torch.optim.Adam(self.leaves, lr=learning_rate, maximize=True)

    def improve(self, problem: Problem, num_steps: int) -> Tensor:
        """Moves the variables of a problem; gives the evidence at the last."""
        for _ in range(num_steps):
            gradients = problem.evidence()[1]
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                leaf.grad = gradient
            self.optimizer.step()
            problem.variables = [leaf.detach().clone() for leaf in self.leaves]
            problem.limit()
            with torch.no_grad():
                for leaf, value in zip(self.leaves, problem.variables, strict=True):
                    leaf.copy_(value)
        return problem.evidence()[0]


def _nll(
    model: Model,
    params: TensorTree,
    constants: dict[str, Tensor],
    batch: tuple[Any, Any],
    key: Key,
    likelihood: Likelihood,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of a batch in training mode, and the constants after it."""
    inputs, targets = batch
    with seeded(key, trees.leaves(params)[0].device), KeyedDropout([key], always=False):
        outputs, buffers = model.apply_train(params, inputs, constants)
    likelihood.check(outputs, targets)
    buffers = trees.tensor_map(torch.Tensor.detach, buffers)
    return likelihood.nll(outputs, targets).mean(), {**constants, **buffers}


def _num_data(data: Any) -> int:
    if isinstance(data, Iterator):
        raise TypeError(
            f"`data` is a {type(data).__name__}, which can be gone through once, expected a"
            " DataLoader, a list of batches or one (inputs, targets) pair"
        )
    return sum(batch_size(inputs) for inputs, _ in batches(data))
