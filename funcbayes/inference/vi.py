"""Mean-field variational inference: a factorised Gaussian over the parameters of any model.

Source:
    Blundell, Cornebise, Kavukcuoglu, Wierstra (2015), "Weight uncertainty in neural
    networks", arXiv:1505.05424; the reparametrised gradient is that of Kingma, Welling
    (2014), arXiv:1312.6114.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from funcbayes.core import random, trees
from funcbayes.core.batching import map_samples
from funcbayes.core.data import batch_size, batches
from funcbayes.core.likelihoods import Likelihood, check_likelihood
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import Key, KeyLike
from funcbayes.core.trees import TensorTree, check_finite, check_like, tree_map
from funcbayes.inference.checks import check_state, check_training
from funcbayes.posteriors import Diagonal
from funcbayes.posteriors.base import check_num_samples


class ViState(NamedTuple):
    """The variational parameters of q(θ) = N(mean, softplus(rho)²), entry by entry.

    Attributes:
        mean: tree like the parameters, in units of θ.
        rho: tree like the parameters; softplus(rho) is the standard deviation in units of θ.
    """

    mean: TensorTree
    rho: TensorTree


class ViInfo(NamedTuple):
    """The parts of the negative ELBO, without gradient.

    Attributes:
        loss: the loss itself, nats per datum.
        nll: expected negative log likelihood under q, averaged over draws and over the
            batch, nats per datum.
        kl: KL(q ‖ prior), nats (for all parameters, not per datum, without `kl_weight`).
    """

    loss: Float[Tensor, ""]
    nll: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def init(params: TensorTree, *, std: float = 1e-2) -> ViState:
    """Starts q at given parameters with one standard deviation for every entry.

    Args:
        params: where the means start, usually trained weights. Copied.
        std: standard deviation in units of θ.

    Returns:
        A state whose leaves are fresh and require gradients, so that
        `torch.optim.Adam(trees.leaves(state))` trains it.

    Raises:
        TypeError: a leaf is not a floating-point tensor.
        ValueError: `std` is not positive, or `params` has no leaves, or holds NaN or infinity.
    """
    _check_positive(std, "std")
    named = trees.leaves_with_names(params)
    if not named:
        raise ValueError("`params` has no leaves, expected a tree of tensors")
    for path, leaf in named:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            came = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"`params{path}` is {came}, expected a floating-point tensor")
    check_finite(params, name="params")
    # log(exp(std) − 1), in the form that neither overflows above 90 nor rounds to −∞ near 0.
    rho = std + math.log(-math.expm1(-std))
    mean = tree_map(lambda p: p.requires_grad_(), trees.clone(params))
    return ViState(mean, tree_map(lambda m: torch.full_like(m, rho, requires_grad=True), mean))


def kl_divergence(
    state: ViState, *, prior_std: float = 1.0, prior_mean: TensorTree | None = None
) -> Float[Tensor, ""]:
    """KL(q ‖ N(prior_mean, prior_std²)) in nats, in closed form.

    Args:
        state: the variational parameters.
        prior_std: standard deviation of the prior, in units of θ.
        prior_mean: tree like the parameters. None: zero.

    Returns:
        The sum over all entries, in float32 or wider. Differentiable.

    Raises:
        ValueError: `prior_std` is not positive, or `prior_mean` is not like the parameters.
    """
    _check_positive(prior_std, "prior_std")
    means = trees.leaves(state.mean)
    if prior_mean is None:
        centres: Sequence[Tensor | float] = [0.0] * len(means)
    else:
        check_like(prior_mean, state.mean, name="prior_mean")
        centres = trees.leaves(prior_mean)
    total = means[0].new_zeros((), dtype=torch.promote_types(means[0].dtype, torch.float32))
    for mean, rho, centre in zip(means, trees.leaves(state.rho), centres, strict=True):
        dtype = torch.promote_types(mean.dtype, torch.float32)
        ratio = F.softplus(rho.to(dtype)) / prior_std
        shift = (mean.to(dtype) - centre) / prior_std
        # log q / p, averaged over q, entry by entry.
        entries = 0.5 * (ratio.square() + shift.square() - 1) - ratio.log()
        total = total + entries.sum().to(total.device)
    return total


def negative_elbo(
    state: ViState,
    model: Model,
    batch: tuple[Any, Any],
    *,
    key: KeyLike,
    likelihood: Likelihood,
    num_data: int,
    num_samples: int = 1,
    prior_std: float = 1.0,
    prior_mean: TensorTree | None = None,
    kl_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], ViInfo]:
    """The negative evidence lower bound of one batch, in nats *per datum*.

    loss = [(num_data / N) · mean over draws of Σₙ −log p(yₙ | f_θ(xₙ)) + kl_weight · KL] / num_data

    for the N rows of the batch, so its mean over the batches of an epoch is the bound on
    −log p(data) / num_data (for kl_weight = 1 and batches of one size). All draws go
    through the model in one vectorised pass; a model that vmap cannot batch is looped over.
    The model runs in evaluation mode: its dropout is off, since q stands in its place, and
    batch norm uses its running statistics.

    Args:
        state: the variational parameters; the loss is differentiable in its leaves.
        model: the model. Not modified.
        batch: `(inputs, targets)`.
        key: draw i is θᵢ = mean + std ⊙ zᵢ with zᵢ a function of `(key, i)` alone. Fold in
            the step number, or every step uses the same draws.
        likelihood: one of `funcbayes.likelihoods`.
        num_data: size of the whole training set.
        num_samples: how many draws to average over.
        prior_std: standard deviation of the prior N(prior_mean, prior_std²), in units of θ.
        prior_mean: tree like the parameters. None: zero.
        kl_weight: factor on the KL term; 1 is the bound, less is a cold posterior.

    Returns:
        The loss, and its parts without gradient.

    Raises:
        TypeError: the network's output or the targets are not a tensor.
        ValueError: targets of the wrong dtype, shape or range; `state` is not like `model.params`;
            `num_samples`, `num_data` or `prior_std` is not positive; `kl_weight` is negative.
    """
    return _negative_elbo(
        state,
        model,
        batch,
        random.as_key(key),
        likelihood,
        num_data=num_data,
        num_samples=num_samples,
        prior_std=prior_std,
        prior_mean=prior_mean,
        kl_weight=kl_weight,
    )


def fit(
    model: Model,
    data: Any,
    *,
    key: KeyLike,
    likelihood: Likelihood,
    num_epochs: int,
    learning_rate: float = 1e-3,
    num_samples: int = 1,
    prior_std: float = 1.0,
    prior_mean: TensorTree | None = None,
    kl_weight: float = 1.0,
    num_data: int | None = None,
    state: ViState | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    callback: Callable[[int, ViInfo], None] | None = None,
) -> ViState:
    """Minimises the negative ELBO by stochastic gradients.

    Args:
        model: the model; q starts at `model.params`. Not modified.
        data: iterable of `(inputs, targets)` pairs, such as a `DataLoader`, or one such
            pair. Gone through once an epoch, and once more before if `num_data` is None.
        key: step t uses the draws of `fold_in(key, t)`.
        likelihood: one of `funcbayes.likelihoods`.
        num_epochs: passes over the data.
        learning_rate: of Adam; not used if `optimizer` is given.
        num_samples: draws a step.
        prior_std: standard deviation of the prior, in units of θ.
        prior_mean: tree like the parameters. None: zero.
        kl_weight: factor on the KL term.
        num_data: size of the whole training set. None: the rows of one pass over `data`.
        state: where to start, for example an earlier result or `init(model.params, std=…)`.
            Not modified. None: `init(model.params)`.
        optimizer: makes an optimizer from the list of leaves to train. None: Adam.
        callback: called after each step with the number of steps done and that step's parts.

    Returns:
        The trained state, without gradients.

    Raises:
        RuntimeError: inference mode is on.
        TypeError: outputs or targets are not tensors, `callback` is not a function, or
            `optimizer` does not make an optimizer.
        ValueError: a bad argument, a loader that yields nothing, targets of the wrong dtype,
            shape or range, or a loss that is not finite (the message names the step).
    """
    check_model(model)
    check_likelihood(likelihood)
    if state is not None:
        check_state(state, ViState, "vi.init or vi.fit")
    check_training(callback)
    key = random.as_key(key)
    check_num_samples(num_epochs, name="num_epochs")
    _check_positive(learning_rate, "learning_rate")
    if num_data is None:
        num_data = sum(batch_size(inputs) for inputs, _ in batches(data))
    start = init(model.params) if state is None else state
    check_like(start.mean, model.params, name="state.mean")
    check_like(start.rho, model.params, name="state.rho")
    trained: ViState = tree_map(lambda leaf: leaf.requires_grad_(), trees.clone(start))
    leaves = trees.leaves(trained)
    if optimizer is None:
        steps = torch.optim.Adam(leaves, lr=learning_rate)
    else:
        steps = optimizer(leaves) if callable(optimizer) else optimizer
        if not isinstance(steps, torch.optim.Optimizer) or not callable(optimizer):
            raise TypeError(
                f"`optimizer` gives a {type(steps).__name__}, expected a function from a list of"
                " tensors to a torch.optim.Optimizer, such as"
                " lambda leaves: torch.optim.Adam(leaves, lr=1e-3)"
            )

    step = 0
    for epoch in range(num_epochs):
        for batch in batches(data):
            with torch.enable_grad():
                loss, info = _negative_elbo(
                    trained,
                    model,
                    batch,
                    random.fold_in(key, step),
                    likelihood,
                    num_data=num_data,
                    num_samples=num_samples,
                    prior_std=prior_std,
                    prior_mean=prior_mean,
                    kl_weight=kl_weight,
                    quiet=step > 0,
                )
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss is {loss.item()} at step {step} (epoch {epoch}): nll"
                    f" {info.nll.item()}, kl {info.kl.item()}; expected finite numbers. Check the"
                    " inputs for NaN, or lower the learning rate or the initial std"
                )
            # Not loss.backward(): that would also reach tensors of the user's that require
            # gradients, such as inputs.
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = grad
            steps.step()
            step += 1
            if callback is not None:
                callback(step, info)
    check_finite(trained, name="state")
    return tree_map(torch.Tensor.detach, trained)


def posterior(state: ViState) -> Diagonal:
    """The Gaussian q as a posterior, without gradients."""
    check_state(state, ViState, "vi.init or vi.fit")
    return _normal(trees.clone(state))


def _negative_elbo(
    state: ViState,
    model: Model,
    batch: tuple[Any, Any],
    key: Key,
    likelihood: Likelihood,
    *,
    num_data: int,
    num_samples: int,
    prior_std: float,
    prior_mean: TensorTree | None,
    kl_weight: float,
    quiet: bool = False,
) -> tuple[Tensor, ViInfo]:
    check_model(model)
    check_likelihood(likelihood)
    check_state(state, ViState, "vi.init or vi.fit")
    _check_positive(num_data, "num_data")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"`kl_weight` is {kl_weight}, expected a finite number of at least 0")
    check_like(state.mean, model.params, name="state.mean")
    check_like(state.rho, model.params, name="state.rho")
    inputs, targets = batch

    params = _normal(state).sample(key, num_samples)
    outputs = map_samples(lambda draw: model.apply(draw, inputs), params, quiet=quiet)
    likelihood.check(trees.index(outputs, 0), targets)
    losses = torch.vmap(lambda f: likelihood.nll(f, targets))(outputs)
    nll = losses.mean()
    # Without weight it has no gradient either: half of its time.
    with torch.set_grad_enabled(torch.is_grad_enabled() and kl_weight > 0):
        kl = kl_divergence(state, prior_std=prior_std, prior_mean=prior_mean)
    loss = nll + (kl_weight / num_data) * kl.to(nll.device)
    return loss, ViInfo(loss.detach(), nll.detach(), kl.detach())


def _normal(state: ViState) -> Diagonal:
    """q, differentiable in the state."""
    return Diagonal(state.mean, tree_map(F.softplus, state.rho))


def _check_positive(value: float | int, name: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value}, expected a finite positive number")
