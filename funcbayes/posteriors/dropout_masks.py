"""The distribution over networks that dropout masks make."""

from typing import NamedTuple

from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import Draws, MaskStreams, check_num_samples


class DropoutMasks(NamedTuple):
    """Fixed parameters under random dropout masks.

    What is random lives in the activations, so `sample` gives the same parameters in every
    row; `funcbayes.predict` draws the masks.

    Attributes:
        params: tree like the parameters.
        rate: replaces the rate of every dropout; None keeps each one's own.
        per: "row": every row of a batch has a mask of its own, as in training; "batch": one
            mask a sample for all rows, so that a sample is one function of the input and
            its rows are a joint draw.
    """

    params: TensorTree
    rate: float | None
    per: str

    @property
    def mean(self) -> TensorTree:
        """The parameters."""
        return self.params

    @property
    def variance(self) -> TensorTree:
        """Zeros: the parameters are fixed."""
        return trees.zeros_like(self.params)

    @property
    def draw_size(self) -> int:
        """0: masks are drawn where the activations are."""
        return 0

    def sample(self, key: KeyLike, num_samples: int) -> TensorTree:
        """The parameters, expanded to `[num_samples, *shape]` without copies."""
        random.as_key(key)
        num = check_num_samples(num_samples)
        return trees.tree_map(lambda p: p.expand(num, *p.shape), self.params)

    def draw(self, key: KeyLike, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it."""
        keys = [random.fold_in(key, i) for i in range(start, stop)]
        return Draws(None, None, MaskStreams(keys, self.rate, self.per, self.params))
