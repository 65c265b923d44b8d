"""A normal distribution with independent parameters."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import RowsKey
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import Draws, check_num_samples, draw_rows, noise_rows

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Diagonal(NamedTuple):
    """N(mean, diag(std²)).

    Attributes:
        mean: tree like the parameters.
        std: standard deviations, tree like the parameters; 0 holds a parameter fixed.
    """

    mean: TensorTree
    std: TensorTree

    @property
    def variance(self) -> TensorTree:
        """std², a tree like the parameters."""
        return trees.tree_map(torch.square, self.std)

    @property
    def draw_size(self) -> int:
        """Numbers that one sample takes in a draw's buffer."""
        return trees.num_elements(self.mean)

    def sample(self, key: RowsKey, num_samples: int) -> TensorTree:
        """Draws mean + std ⊙ z; sample i is a function of `(key, i)`.

        Returns:
            Leaves `[num_samples, *shape]`, differentiable in `mean` and `std`.
        """
        return self.draw(random.as_rows_key(key), 0, check_num_samples(num_samples)).params

    def draw(self, key: RowsKey, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it."""

        def rows(start: int, stop: int, out: Tensor | None) -> TensorTree:
            noise = noise_rows(self.mean, key, start, stop, self.draw_size, out)
            z = trees.unravel(noise, self.mean, batch_dims=1)
            return shift_scale(self.mean, self.std, z, in_place=out is not None)

        return Draws(draw_rows(rows, self.mean, start, stop, out), None, None)

    def log_prob(self, params: TensorTree) -> Float[Tensor, ""]:
        """The log density at `params`, in nats; −∞ off the mean of a fixed parameter.

        Raises:
            ValueError: `params` is not a tree like `mean`.
        """
        trees.check_like(params, self.mean, name="params")

        def leaf_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
            # A std of 0 must not reach the branch that is not taken: its gradient is NaN.
            free = std > 0
            scale = torch.where(free, std, 1.0)
            density = -0.5 * ((x - mean) / scale).square() - scale.log() - _HALF_LOG_2PI
            fixed = torch.where(x == mean, 0.0, -math.inf)
            return torch.where(free, density, fixed).sum()

        each = trees.tree_map(leaf_log_prob, params, self.mean, self.std)
        return torch.stack(trees.leaves(each)).sum()


def shift_scale(mean: TensorTree, std: TensorTree, z: TensorTree, *, in_place: bool) -> TensorTree:
    """Mean + std ⊙ z leaf by leaf, into z's memory if asked."""
    if in_place:
        return trees.tree_map(lambda m, s, n: torch.addcmul(m, s, n, out=n), mean, std, z)
    return trees.tree_map(torch.addcmul, mean, std, z)
