"""Equally weighted members: an ensemble, or samples that are already there."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import Draws, check_num_samples


class Empirical(NamedTuple):
    """M members with equal weight.

    Attributes:
        params: leaves `[members, *shape]`.
        constants: stacked constants of the members by name, such as batch-norm statistics;
            an empty dict where the members share the model's.
    """

    params: TensorTree
    constants: dict[str, Tensor]

    @property
    def num_members(self) -> int:
        """M."""
        return trees.leading_size(self.params)

    @property
    def mean(self) -> TensorTree:
        """Mean of the members, a tree like the parameters."""
        return trees.tree_map(lambda p: p.mean(0), self.params)

    @property
    def variance(self) -> TensorTree:
        """Unbiased variance of the members, a tree like the parameters; 0 for one member."""
        correction = min(1, self.num_members - 1)

        def spread(p: Tensor) -> Tensor:
            # Of a leaf without entries torch warns that it has no degrees of freedom.
            return p.var(0, correction=correction) if p.numel() else torch.zeros_like(p[0])

        return trees.tree_map(spread, self.params)

    @property
    def draw_size(self) -> int:
        """0: members are there already, so a draw needs no buffer."""
        return 0

    def sample(self, key: KeyLike, num_samples: int) -> TensorTree:
        """Draws members: random order without repetition, again from the start after M.

        Returns:
            Leaves `[num_samples, *shape]`.
        """
        return self.draw(random.as_key(key), 0, check_num_samples(num_samples)).params

    def draw(self, key: KeyLike | None, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it; without a key in order."""
        both = (self.params, self.constants)
        if key is None and (start, stop) == (0, self.num_members):
            rows = both
        elif key is None:
            rows = trees.tensor_map(lambda x: x[start:stop], both)
        else:
            members = drawn_members(key, start, stop, self.num_members)
            rows = trees.tensor_map(lambda x: x.index_select(0, members.to(x.device)), both)
        return Draws(rows[0], rows[1] or None, None)


def drawn_members(key: KeyLike, start: int, stop: int, num_members: int) -> Tensor:
    """Numbers of the members that are samples start … stop − 1: an order a cycle, each anew."""
    num = num_members
    first, last = start // num, -(-stop // num)
    # One cycle more than needed where the range is empty: `cat` wants something.
    cycles = range(first, max(last, first + 1))
    orders = torch.cat([random.permutation(random.fold_in(key, c), num) for c in cycles])
    return orders[start - first * num : stop - first * num]
