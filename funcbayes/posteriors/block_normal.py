"""A normal distribution whose covariance is block-diagonal over groups of leaves."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import RowsKey
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import Draws, check_num_samples, draw_rows, noise_format, noise_rows
from funcbayes.posteriors.factors import DiagonalFactor, Factor


class BlockNormal(NamedTuple):
    """N(mean, Σ), Σ block-diagonal over groups of leaves, each block by its factor.

    Attributes:
        mean: tree like the parameters.
        factors: by the names of the leaves that a factor covers, in the order of the tree, as
            `funcbayes.curvature.Curvature` has its blocks; each leaf is in exactly one. A leaf's
            name is its key in a flat dict, and its path (`"['block']['weight']"`) in other trees.
    """

    mean: TensorTree
    factors: dict[tuple[str, ...], Factor]

    @property
    def variance(self) -> TensorTree:
        """The diagonal of the covariance, a tree like the parameters, in the factors' dtype."""
        found: dict[int, Tensor] = {}
        for group in self._groups():
            parts = group.factor.variance().split(group.sizes)
            for leaf, part in zip(group.leaves, parts, strict=True):
                found[leaf] = part
        means = trees.leaves(self.mean)
        return trees.unflatten(
            [found[i].view(mean.shape) for i, mean in enumerate(means)], self.mean
        )

    @property
    def draw_size(self) -> int:
        """Numbers that one sample takes in a draw's buffer."""
        return trees.num_elements(self.mean)

    def sample(self, key: RowsKey, num_samples: int) -> TensorTree:
        """Draws mean + R z; sample i is a function of `(key, i)`.

        Returns:
            Leaves `[num_samples, *shape]`, differentiable in every field.

        Raises:
            ValueError: `factors` does not fit `mean`.
        """
        return self.draw(random.as_rows_key(key), 0, check_num_samples(num_samples)).params

    def draw(self, key: RowsKey, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it."""
        groups, means = self._groups(), trees.leaves(self.mean)

        def rows(start: int, stop: int, out: Tensor | None) -> TensorTree:
            noise = noise_rows(self.mean, key, start, stop, self.draw_size, out)
            columns = noise.split([mean.numel() for mean in means], dim=1)
            samples: list[Any] = [None] * len(means)
            for group in groups:
                z = _joined(noise, columns, group)
                scaled = _scaled_in_place(group.factor, z) if out is not None else None
                scaled = group.factor.scale(z) if scaled is None else scaled
                deviations = scaled.split(group.sizes, dim=1)
                for leaf, deviation in zip(group.leaves, deviations, strict=True):
                    mean = means[leaf]
                    shift = deviation.view(stop - start, *mean.shape)
                    if out is not None and mean.dtype == noise.dtype:
                        target = columns[leaf].view(shift.shape)
                        samples[leaf] = torch.add(mean, shift, out=target)
                    else:
                        samples[leaf] = (mean + shift).to(mean.dtype)
            return trees.unflatten(samples, self.mean)

        return Draws(draw_rows(rows, self.mean, start, stop, out), None, None)

    def log_prob(self, params: TensorTree) -> Float[Tensor, ""]:
        """The log density at `params`, in nats, taken in float64.

        There is none where a standard deviation is 0: it is NaN then.

        Raises:
            ValueError: `params` is not a tree like `mean`, or `factors` does not fit `mean`.
        """
        trees.check_like(params, self.mean, name="params")
        pairs = zip(trees.leaves(params), trees.leaves(self.mean), strict=True)
        deviations = [(x.double() - mean.double()).flatten() for x, mean in pairs]
        terms = []
        for group in self._groups():
            # In float64: a root of a precision times a deviation is a difference of large terms
            # where the precision is ill-conditioned.
            factor = trees.tensor_map(torch.Tensor.double, group.factor)
            whitened = factor.whiten(torch.cat([deviations[leaf] for leaf in group.leaves]))
            terms.append(whitened.square().sum() + factor.log_det())
        constant = self.draw_size * math.log(2 * math.pi)
        return (-0.5 * (torch.stack(terms).sum() + constant)).to(noise_format(self.mean)[0])

    def _groups(self) -> "list[_Group]":
        names, means = trees.names(self.mean), trees.leaves(self.mean)
        check_groups(self.factors, names, name="factors")
        numbers = {name: i for i, name in enumerate(names)}
        groups = []
        for covered, factor in self.factors.items():
            leaves = [numbers[name] for name in covered]
            sizes = [means[leaf].numel() for leaf in leaves]
            if factor.size != sum(sizes):
                raise ValueError(
                    f"`factors[{covered!r}]` is over {factor.size} numbers, but its leaves of"
                    f" `mean` hold {sum(sizes)}: was it made for another network?"
                )
            groups.append(_Group(factor, leaves, sizes))
        return groups


def check_groups(groups: dict[tuple[str, ...], Any], names: list[str], *, name: str) -> None:
    """Checks that every leaf is in exactly one group, and each group's leaves are in order.

    Args:
        groups: what is kept of each group, by the names of its leaves.
        names: the leaves' names, in the order of the tree.
        name: the argument's name in the message.

    Raises:
        ValueError: a leaf is missing, there twice, or unknown, or a group has another order.
    """
    covered = [leaf for group in groups for leaf in group]
    if sorted(covered) != sorted(names):
        missing = [leaf for leaf in names if leaf not in covered]
        extra = [leaf for leaf in covered if leaf not in names]
        twice = sorted({leaf for leaf in covered if covered.count(leaf) > 1})
        found = [
            f"{', '.join(map(repr, part[:3]))}{', …' if len(part) > 3 else ''} {what}"
            for part, what in (
                (missing, "missing"),
                (extra, "not expected"),
                (twice, "there twice"),
            )
            if part
        ]
        raise ValueError(f"`{name}` has leaves {'; '.join(found)}; expected each leaf once")
    numbers = {leaf: i for i, leaf in enumerate(names)}
    for group in groups:
        ordered = tuple(sorted(group, key=numbers.__getitem__))
        if group != ordered:
            raise ValueError(
                f"`{name}` has the group {group!r}, expected it in the order of the tree,"
                f" {ordered!r}"
            )


class _Group(NamedTuple):
    factor: Factor
    leaves: list[int]
    sizes: list[int]


def _scaled_in_place(factor: Factor, z: Tensor) -> Tensor | None:
    """`factor.scale(z)` in the memory of z; None where there is another for it."""
    if isinstance(factor, DiagonalFactor) and z.dtype == factor.std.dtype:
        return z.mul_(factor.std)
    return None


def _joined(noise: Tensor, columns: "tuple[Tensor, ...]", group: _Group) -> Tensor:
    """The noise of a group, `[samples, n]`: a view where its leaves are neighbours."""
    first, last = group.leaves[0], group.leaves[-1]
    if last - first + 1 == len(group.leaves):
        before = sum(part.shape[1] for part in columns[:first])
        return noise.narrow(1, before, sum(group.sizes))
    return torch.cat([columns[leaf] for leaf in group.leaves], dim=1)
