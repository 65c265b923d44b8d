"""Weighted mixtures of posteriors: MultiSWAG, ensembles of Laplace approximations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import Draws, check_num_samples


class Mixture(NamedTuple):
    """Σ weightᵢ · componentᵢ. Make one with `mixture`, which checks it.

    Attributes:
        components: posteriors over one parameter tree.
        weights: `[components]`, positive, sum 1.

    Source:
        Wilson and Izmailov (2020), arXiv:2002.08791, for mixtures of SWAG.
    """

    components: tuple[Any, ...]
    weights: Float[Tensor, " components"]

    @property
    def mean(self) -> TensorTree:
        """Mean of the mixture, a tree like the parameters."""
        return self._average([c.mean for c in self.components])

    @property
    def variance(self) -> TensorTree:
        """Variance within plus variance between components, a tree like the parameters."""
        mean = self.mean
        spread = [
            trees.tree_map(lambda v, m, all_: v + (m - all_).square(), c.variance, c.mean, mean)
            for c in self.components
        ]
        return self._average(spread)

    @property
    def draw_size(self) -> int:
        """0: every sample is drawn by its own component, which allocates what it needs."""
        return 0

    def sample(self, key: KeyLike, num_samples: int) -> TensorTree:
        """Draws samples; sample i and its component are functions of `(key, i)`.

        Returns:
            Leaves `[num_samples, *shape]`.
        """
        return self.draw(random.as_key(key), 0, check_num_samples(num_samples)).params

    def draw(self, key: KeyLike, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it."""
        bounds = self.weights.detach().double().cumsum(0).cpu()
        rows = []
        for i in range(start, stop):
            where = random.uniform(random.fold_in(key, i), (1,), dtype=torch.float64)
            number = min(int(torch.searchsorted(bounds, where)), len(self.components) - 1)
            rows.append(self.components[number].draw(random.fold_in(key, number), i, i + 1))
        params, constants, _ = zip(*rows, strict=True)
        joined = None if constants[0] is None else trees.concatenate(constants)
        return Draws(trees.concatenate(params), joined, None)

    def log_prob(self, params: TensorTree) -> Float[Tensor, ""]:
        """The log density at `params`, in nats.

        Raises:
            TypeError: a component has none, such as an `Empirical`.
        """
        for i, component in enumerate(self.components):
            if not hasattr(component, "log_prob"):
                raise TypeError(
                    f"`components[{i}]` is a {type(component).__name__}, which has no density, so"
                    " the mixture has none"
                )
        each = torch.stack([c.log_prob(params) for c in self.components])
        return torch.logsumexp(each + self.weights.log().to(each), dim=0)

    def _average(self, parts: list[TensorTree]) -> TensorTree:
        weights = self.weights.unbind()

        def average(*x: Tensor) -> Tensor:
            # A float64 weight times a scalar leaf would be float64.
            return sum(
                ((w * part).to(part.dtype) for w, part in zip(weights, x, strict=True)),
                start=torch.zeros_like(x[0]),
            )

        return trees.tree_map(average, *parts)


def mixture(
    components: Sequence[Any], weights: Sequence[float | int] | Tensor | None = None
) -> Mixture:
    """Makes a mixture of posteriors.

    Args:
        components: posteriors over one parameter tree; or one posterior whose leaves have a
            leading component axis, as `vmap` over states gives.
        weights: one number a component, positive; normalised. None: equal.

    Raises:
        TypeError: a component is not a distribution over parameters.
        ValueError: no components, weights of another number or not positive, or trees or
            constants that differ.
    """
    if hasattr(components, "_fields"):  # one stacked posterior: a NamedTuple
        components = trees.unstack(components)
    components = tuple(components)
    if not components:
        raise ValueError("`components` is empty, expected at least one posterior")
    for i, component in enumerate(components):
        if not hasattr(component, "draw") or hasattr(component, "per"):
            raise TypeError(
                f"`components[{i}]` is a {type(component).__name__}, expected a posterior over"
                " parameters (dropout masks have none)"
            )
        if isinstance(component, Mixture):
            raise TypeError(f"`components[{i}]` is a Mixture: pass its components instead")
        trees.check_like(component.mean, components[0].mean, name=f"components[{i}].mean")
        names, expected = (sorted(getattr(c, "constants", {})) for c in (component, components[0]))
        if names != expected:
            raise ValueError(
                f"`components[{i}].constants` has {names}, expected {expected} as in the first"
                " component: constants are sampled for all or for none"
            )
    values = [1.0] * len(components) if weights is None else [float(w) for w in weights]
    if len(values) != len(components) or not all(0 < w < float("inf") for w in values):
        raise ValueError(
            f"`weights` is {values}, expected {len(components)} positive numbers, one a component"
        )
    shares = [w / sum(values) for w in values]
    return Mixture(components, torch.tensor(shares, dtype=torch.float64, device="cpu"))
