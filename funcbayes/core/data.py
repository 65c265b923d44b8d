"""Batches of data as the library takes them: any iterable of `(inputs, targets)` pairs."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from funcbayes.core import trees


def batches(data: Any, *, name: str = "data") -> Iterator[tuple[Any, Any]]:
    """Goes through the batches of `data`.

    Args:
        data: an iterable of `(inputs, targets)` pairs, such as a `DataLoader`, or one
            such pair. Inputs are a pytree of tensors with a leading batch axis.
        name: the argument's name in messages.

    Raises:
        TypeError: `data` is not iterable, is a data set of single examples, or a batch is not
            a pair.
        ValueError: nothing came, or only empty batches.
    """
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        data = [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        # Python would iterate over it, one example without a batch axis at a time.
        raise TypeError(
            f"`{name}` is a {type(data).__name__}, which gives single examples, expected batches:"
            " wrap it in a torch.utils.data.DataLoader"
        )
    try:
        iterator = iter(data)
    except TypeError:
        raise TypeError(
            f"`{name}` is a {type(data).__name__}, expected an iterable of (inputs, targets)"
            " pairs, such as a DataLoader"
        ) from None
    total = 0
    for number, batch in enumerate(iterator):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            came = (
                f"{type(batch).__name__} of {len(batch)}"
                if isinstance(batch, tuple | list)
                else type(batch).__name__
            )
            raise TypeError(
                f"batch {number} of `{name}` is a {came}, expected a pair (inputs, targets)"
            )
        inputs, targets = batch
        size = batch_size(inputs)
        total += size
        if size:
            yield inputs, targets
    if total == 0:
        raise ValueError(
            f"`{name}` yielded no data, expected at least one (inputs, targets) batch:"
            " is it an exhausted generator, or an empty loader with drop_last=True?"
        )


def batch_size(inputs: Any) -> int:
    """The length of the leading axis of the first tensor in `inputs`.

    Raises:
        ValueError: there is no tensor, or it is a scalar.
    """
    for leaf in trees.tensor_leaves(inputs):
        if leaf.dim() == 0:
            raise ValueError("an input is a scalar tensor, expected a leading batch axis")
        return int(leaf.shape[0])
    raise ValueError(f"inputs hold no tensor (a {type(inputs).__name__} came)")
