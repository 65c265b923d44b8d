"""Laplace approximation: a Gaussian at trained parameters, from the curvature of the loss there.

Source:
    MacKay (1992), doi:10.1162/neco.1992.4.3.448; Daxberger et al. (2021), arXiv:2106.14806,
    section 2, for deep networks. Curvature is summed over the data and kept apart from the
    prior, so the prior and the temperature are chosen after the fit, at no cost.
"""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.likelihoods import Likelihood
from funcbayes.core.model import Model
from funcbayes.core.trees import TensorTree
from funcbayes.curvature import curvature_sums
from funcbayes.inference.checks import check_state
from funcbayes.posteriors import Diagonal


class LaplaceState(NamedTuple):
    """The data's part of a Laplace approximation: everything but the prior.

    Attributes:
        mean: the parameters at which the curvature was taken; copies, tree like the parameters.
        curvature: diagonal of the curvature of Σ -log p(y | f(x)), summed over the data; tree
            like the parameters, in float32 or wider, in units of 1/θ².
        num_data: how many data it is summed over. Shape [], int64.
        loss: Σ -log p(y | f(x)) over the data at `mean`, in nats. Shape [].
    """

    mean: TensorTree
    curvature: TensorTree
    num_data: Int[Tensor, ""]
    loss: Float[Tensor, ""]


def fit(
    model: Model,
    data: Any,
    *,
    likelihood: Likelihood,
    structure: str = "diagonal",
    curvature: str = "ggn",
    chunk_size: int | None = None,
) -> LaplaceState:
    """Takes the curvature of the loss at the model's parameters, in one pass over the data.

    Args:
        model: a trained network. Its `params` get the posterior; its constants stay as they are.
        data: an iterable of `(inputs, targets)` batches, such as a `DataLoader`, or one such
            pair: the data that the network was trained on, each datum once.
        likelihood: the loss that the network was trained with, as -log p(y | outputs).
        structure: which part of the curvature is kept: "diagonal".
        curvature: "ggn" for Σ JᵀΛJ with Λ the likelihood's Hessian, "empirical_fisher" for
            Σ g gᵀ with g the gradient of one datum's loss (cheaper, and cruder).
        chunk_size: data at a time; None chooses by memory. The result does not depend on it.

    Returns:
        A state with copies of the parameters, so that training on does not move it.

    Raises:
        TypeError: an argument has the wrong type, or `data` does not yield pairs.
        ValueError: `data` yields nothing, targets do not fit the outputs, a weight, the loss or a
            gradient is NaN or infinite, or an option is unknown.
    """
    sums = curvature_sums(
        model,
        data,
        likelihood,
        curvature=curvature,
        structure=structure,
        chunk_size=chunk_size,
    )
    return LaplaceState(trees.clone(model.params), sums.curvature, sums.num_data, sums.loss)


def merge(a: LaplaceState, b: LaplaceState) -> LaplaceState:
    """The state of two disjoint sets of data, fitted at the same parameters.

    Args:
        a: state of one set of data.
        b: state of the other.

    Raises:
        ValueError: the states differ in structure, in a leaf's shape, or in the parameters at
            which they were taken.
    """
    check_state(a, LaplaceState, "laplace.fit", name="a")
    check_state(b, LaplaceState, "laplace.fit", name="b")
    trees.check_like(b.mean, a.mean, name="b.mean")
    trees.check_like(b.curvature, a.curvature, name="b.curvature")
    others = dict(trees.leaves_with_names(b.mean))
    for name, leaf in trees.leaves_with_names(a.mean):
        if _known_false((leaf == others[name]).all()):
            raise ValueError(
                f"`b.mean{name}` differs from `a.mean{name}`: curvatures add up only where both"
                " were taken at the same parameters; fit both states on the same trained model"
            )
    curvature = trees.tree_map(torch.add, a.curvature, b.curvature)
    return LaplaceState(a.mean, curvature, a.num_data + b.num_data, a.loss + b.loss)


def posterior(
    state: LaplaceState,
    *,
    prior_precision: float | Tensor | TensorTree = 1.0,
    temperature: float | Tensor = 1.0,
) -> Diagonal:
    """N(mean, (H/T + prior precision)⁻¹), with H the curvature and T the temperature.

    Args:
        state: from `fit`.
        prior_precision: 1/variance of the prior N(0, 1/prior_precision): a number for all
            parameters, or a tree like the parameters whose leaves are a number for the tensor
            or a tensor of its shape. Weight decay λ in a mean loss over N data is λ·N.
        temperature: T > 0; below 1 the posterior is sharper than Bayes' (a "cold" one).

    Returns:
        A diagonal normal, differentiable in `prior_precision` and `temperature`.

    Raises:
        TypeError: `temperature` or a prior precision is not a number or a tensor.
        ValueError: `prior_precision` or `temperature` is not positive and finite, or
            `prior_precision` is a tree of another structure or shape; the message names the leaf.
    """
    check_state(state, LaplaceState, "laplace.fit")
    prior = _prior_tree(prior_precision, state.curvature)
    precision = _posterior_precision(state, prior, _temperature(temperature))
    std = trees.tree_map(lambda p, mean: p.rsqrt().to(mean.dtype), precision, state.mean)
    return Diagonal(state.mean, std)


def log_marginal_likelihood(
    state: LaplaceState,
    *,
    prior_precision: float | Tensor | TensorTree = 1.0,
    temperature: float | Tensor = 1.0,
) -> Float[Tensor, ""]:
    """Laplace's estimate of log p(data), the evidence: -L/T - ½ [log det P - log det P₀ + θᵀP₀θ].

    L is the loss, P₀ the prior precision, P = H/T + P₀ and θ the state's mean. Of use to choose
    `prior_precision`: it is differentiable in it, and larger is better. Temperatures other than 1
    raise the likelihood to the power 1/T, in L as in H; such a likelihood is not normalised,
    so values at different temperatures do not compare.

    Args:
        state: from `fit`.
        prior_precision: as for `posterior`.
        temperature: as for `posterior`.

    Returns:
        In nats. Shape [].

    Raises:
        TypeError: as for `posterior`.
        ValueError: as for `posterior`.

    Source:
        MacKay (1992), doi:10.1162/neco.1992.4.3.448; Immer et al. (2021), arXiv:2104.04975,
        equation 6.
    """
    check_state(state, LaplaceState, "laplace.fit")
    temperature = _temperature(temperature)
    prior = _prior_tree(prior_precision, state.curvature)
    precision = _posterior_precision(state, prior, temperature)

    def complexity(p: Tensor, p0: Tensor, mean: Tensor) -> Tensor:
        # log(P/P₀) in one: where the data say nothing the two cancel exactly.
        return ((p / p0).log() + p0 * mean.to(p.dtype).square()).sum()

    terms = trees.leaves(trees.tree_map(complexity, precision, prior, state.mean))
    return -state.loss / temperature - 0.5 * torch.stack(terms).sum()


def _posterior_precision(
    state: LaplaceState, prior: TensorTree, temperature: float | Tensor
) -> TensorTree:
    return trees.tree_map(lambda h, p0: h / temperature + p0, state.curvature, prior)


def _prior_tree(prior_precision: Any, like: TensorTree) -> TensorTree:
    """A tree of tensors that broadcast to the leaves of `like`."""
    if _is_scalar(prior_precision):
        value = _positive(prior_precision, "prior_precision")
        return trees.tree_map(
            lambda h: torch.as_tensor(value, dtype=h.dtype, device=h.device), like
        )
    if not trees.same_structure(prior_precision, like):
        found = {name for name, _ in trees.leaves_with_names(prior_precision)}
        expected = {name for name, _ in trees.leaves_with_names(like)}
        parts = [f"prior_precision{name} is missing" for name in sorted(expected - found)[:3]]
        parts += [f"prior_precision{name} is not expected" for name in sorted(found - expected)[:3]]
        came = type(prior_precision).__name__
        if isinstance(prior_precision, Tensor):
            came += f" of shape {tuple(prior_precision.shape)}"
        raise ValueError(
            f"`prior_precision` is a {came}, expected a number, or a tree like the parameters of"
            f" numbers or of tensors of their shapes: {'; '.join(parts) or 'its containers differ'}"
        )
    leaves = []
    for (name, value), h in zip(
        trees.leaves_with_names(prior_precision), trees.leaves(like), strict=True
    ):
        name = f"prior_precision{name}"
        if isinstance(value, Tensor) and value.dim() and value.shape != h.shape:
            shape, wanted = tuple(value.shape), tuple(h.shape)
            hint = ": was it transposed?" if shape == wanted[::-1] else ""
            raise ValueError(f"`{name}` has shape {shape}, expected () or {wanted}{hint}")
        value = _positive(value, name)
        leaves.append(torch.as_tensor(value, dtype=h.dtype, device=h.device))
    return trees.unflatten(leaves, like)


def _temperature(value: Any) -> float | Tensor:
    if isinstance(value, Tensor) and value.dim():
        raise ValueError(f"`temperature` has shape {tuple(value.shape)}, expected a scalar")
    return _positive(value, "temperature")


def _is_scalar(value: Any) -> bool:
    return (isinstance(value, Real) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and value.dim() == 0
    )


def _positive(value: Any, name: str) -> float | Tensor:
    """A number or tensor that is positive and finite, as far as its values can be known."""
    if not isinstance(value, Real | Tensor) or isinstance(value, bool):
        raise TypeError(f"`{name}` is a {type(value).__name__}, expected a number or a tensor")
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"`{name}` has dtype {value.dtype}, expected a real number")
        if _known_false(((value > 0) & value.isfinite()).all()):
            came = f"{float(value)}" if value.dim() == 0 else f"as low as {float(value.min())}"
            raise ValueError(f"`{name}` is {came}, expected positive and finite")
        return value
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` is {number}, expected positive and finite")
    return number


def _known_false(condition: Tensor) -> bool:
    """Whether a 0-d condition is false; False where a transform hides its value."""
    if torch.compiler.is_compiling():
        return False
    try:
        return not bool(condition)
    except RuntimeError:
        return False
