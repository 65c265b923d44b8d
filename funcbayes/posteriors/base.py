"""What every posterior offers, and what a prediction takes from it."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from funcbayes.core import random, trees, workers
from funcbayes.core.random import Coupled, Key, KeyLike, RowsKey
from funcbayes.core.trees import TensorTree


class MaskStreams(NamedTuple):
    """Dropout masks of a range of samples, as the keys that they are drawn from.

    Attributes:
        keys: one a sample.
        rate: replaces the rate of every dropout; None keeps each one's own.
        per: "row": every row of a batch has a mask of its own; "batch": all share one.
        params: the parameters of the network under the masks, which all samples share.
    """

    keys: list[Key]
    rate: float | None
    per: str
    params: TensorTree


class Draws(NamedTuple):
    """Posterior samples start … stop − 1, in the form that a forward pass takes.

    Attributes:
        params: leaves `[samples, *shape]`; None where they are not sampled: those of `masks`
            are used then, or the model's own.
        constants: sampled constants by name, `[samples, *shape]`; None where the model's own
            are used.
        masks: None where dropout stays off.
    """

    params: TensorTree | None
    constants: dict[str, Tensor] | None
    masks: MaskStreams | None


class Posterior(Protocol):
    """A distribution over parameter pytrees, as `funcbayes.predict` needs it.

    Sample i must be a function of `(key, i)` alone.
    """

    def sample(self, key: KeyLike, num_samples: int) -> TensorTree:
        """Parameters, leaves `[num_samples, *shape]`."""
        ...

    def draw(self, key: Key | Coupled, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1.

        Args:
            key: the key of the whole set of samples; a coupled one for normal posteriors only.
            start: number of the first one.
            stop: one past the number of the last one.
            out: a buffer `[stop − start, draw_size]` that may be used, and that the result
                may be views of. Without it, the draw is differentiable in the posterior.
        """
        ...

    @property
    def draw_size(self) -> int:
        """Numbers that one sample takes in the buffer; 0 where none is used."""
        ...


def check_num_samples(num_samples: int, *, name: str = "num_samples") -> int:
    """Checks a number of samples.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"`{name}` is {num_samples!r}, expected an integer of at least 1")
    if num_samples < 1:
        raise ValueError(f"`{name}` is {num_samples}, expected at least 1")
    return num_samples


def noise_format(tree: TensorTree) -> tuple[torch.dtype, torch.device]:
    """The dtype and device to draw a tree's noise in: its widest float, float32 at least.

    Raises:
        ValueError: the leaves lie on several devices.
    """
    dtype, devices = torch.float32, set()
    for leaf in trees.leaves(tree):
        dtype = torch.promote_types(dtype, leaf.dtype)
        devices.add(leaf.device)
    if len(devices) != 1:
        raise ValueError(f"parameters lie on {sorted(map(str, devices))}, expected one device")
    return dtype, devices.pop()


def noise_rows(
    like: TensorTree, key: RowsKey, start: int, stop: int, size: int, out: Tensor | None
) -> Tensor:
    """Standard normal rows `[stop − start, size]` in the format of `like`."""
    dtype, device = noise_format(like)
    return random.normal_rows(key, start, stop, size, dtype=dtype, device=device, out=out)


def draw_rows(
    draw: Callable[[int, int, Tensor | None], TensorTree],
    like: TensorTree,
    start: int,
    stop: int,
    out: Tensor | None,
) -> TensorTree:
    """Samples start … stop − 1, several at a time where a buffer takes them.

    Args:
        draw: `draw(start, stop, out)` gives a range of samples; in `out`, if that is given and
            has the leaves' dtype.
        like: the tree of one sample.
        start: number of the first sample.
        stop: one past the number of the last one.
        out: buffer `[stop − start, numbers]`, those of `like` first in each row.
    """
    if out is None or any(leaf.dtype != out.dtype for leaf in trees.leaves(like)):
        return draw(start, stop, out)

    def work(first: int, last: int) -> None:
        draw(start + first, start + last, out[first:last])

    workers.over_rows(work, len(out), out.shape[1], out.device)
    return trees.unravel(out[:, : trees.num_elements(like)], like, batch_dims=1)
