"""A normal distribution with low-rank plus diagonal covariance."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import RowsKey
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import Draws, check_num_samples, draw_rows, noise_format, noise_rows
from funcbayes.posteriors.diagonal import shift_scale


class LowRank(NamedTuple):
    """N(mean, diag(std²) + FᵀF), with F the rows of `factor` as long vectors.

    Attributes:
        mean: tree like the parameters.
        std: diagonal part as standard deviations, tree like the parameters.
        factor: leaves `[rank, *shape]`.
    """

    mean: TensorTree
    std: TensorTree
    factor: TensorTree

    @property
    def variance(self) -> TensorTree:
        """The diagonal of the covariance, a tree like the parameters."""
        return trees.tree_map(lambda s, f: s.square() + f.square().sum(0), self.std, self.factor)

    @property
    def rank(self) -> int:
        """Rows of the factor."""
        return trees.leading_size(self.factor)

    @property
    def draw_size(self) -> int:
        """Numbers that one sample takes in a draw's buffer."""
        return trees.num_elements(self.mean) + self.rank

    def sample(self, key: RowsKey, num_samples: int) -> TensorTree:
        """Draws mean + std ⊙ z₁ + z₂F; sample i is a function of `(key, i)`.

        Returns:
            Leaves `[num_samples, *shape]`, differentiable in every field.
        """
        return self.draw(random.as_rows_key(key), 0, check_num_samples(num_samples)).params

    def draw(self, key: RowsKey, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it."""

        def rows(start: int, stop: int, out: Tensor | None) -> TensorTree:
            noise = noise_rows(self.mean, key, start, stop, self.draw_size, out)
            diagonal, low_rank = noise.split([self.draw_size - self.rank, self.rank], dim=1)
            z = trees.unravel(diagonal, self.mean, batch_dims=1)
            samples = shift_scale(self.mean, self.std, z, in_place=out is not None)

            def add_low_rank(sample: Tensor, factor: Tensor) -> Tensor:
                weights = low_rank.to(factor.dtype)
                flat = factor.reshape(self.rank, factor.shape[1:].numel())
                if out is not None and sample.dtype == factor.dtype:
                    # A view also where the leaf's rows lie apart in the buffer.
                    sample.view(sample.shape[0], flat.shape[1]).addmm_(weights, flat)
                    return sample
                return sample + (weights @ flat).view(sample.shape)

            return trees.tree_map(add_low_rank, samples, self.factor)

        return Draws(draw_rows(rows, self.mean, start, stop, out), None, None)

    def log_prob(self, params: TensorTree) -> Float[Tensor, ""]:
        """The log density at `params`, in nats, by Woodbury's identity, in float64.

        There is none where `std` is 0: it is NaN then.

        Raises:
            ValueError: `params` is not a tree like `mean`.
        """
        trees.check_like(params, self.mean, name="params")
        # In float64: Woodbury's difference cancels where the factor outweighs the diagonal.
        mean, std, x = (trees.ravel(tree).double() for tree in (self.mean, self.std, params))
        whitened = (x - mean) / std
        factor = trees.ravel(self.factor, batch_dims=1).double() / std
        inner = torch.eye(self.rank, dtype=factor.dtype, device=factor.device) + factor @ factor.T
        root = torch.linalg.cholesky(inner)
        inside = torch.linalg.solve_triangular(root, (factor @ whitened)[:, None], upper=False)
        squared = whitened.square().sum() - inside.square().sum()
        log_det = 2 * std.log().sum() + 2 * root.diagonal().log().sum()
        density = -0.5 * (squared + log_det + std.numel() * math.log(2 * math.pi))
        return density.to(noise_format(self.mean)[0])
