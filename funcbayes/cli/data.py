"""Data sets of the command line, split into what trains, what chooses and what is reported."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.random import KeyLike
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split


_TRAIN_SHARE, _TEST_SHARE = 0.15, 0.5


class Labelled(NamedTuple):
    """Images and their classes.

    Attributes:
        images: `[images, channels, height, width]`, in units of the brightest pixel.
        targets: class indices 0 … classes − 1, `[images]`.
    """

    images: Float[Tensor, "images channels height width"]
    targets: Int[Tensor, " images"]


class Splits(NamedTuple):
    """Disjoint parts of a data set.

    Attributes:
        train: what the networks are trained on.
        validation: what hyper-parameters are chosen on.
        test: what the figures are computed on; nothing is chosen on it.
        ood: images of the held-out classes, never seen in training.
        classes: original names of the classes 0, 1, … in `targets`.
    """

    train: Labelled
    validation: Labelled
    test: Labelled
    ood: Float[Tensor, "images channels height width"]
    classes: tuple[int, ...]


class ShuffledBatches:
    """The batches of an epoch, in a new order each time it is gone through.

    Rows that do not fill a batch wait for another epoch: batch norm is noisy on a few rows.
    """

    def __init__(self, data: Labelled, *, batch_size: int, key: KeyLike) -> None:
        """Takes images and targets; epoch e is shuffled by `fold_in(key, e)`."""
        self._data = data
        self._batch_size = min(batch_size, len(data.targets))
        self._key = random.as_key(key)
        self._epoch = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._data.targets) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes through one epoch."""
        order = random.permutation(random.fold_in(self._key, self._epoch), len(self._data.targets))
        self._epoch += 1
        for rows in order.split(self._batch_size)[: len(self)]:
            yield self._data.images[rows], self._data.targets[rows]


def digits(*, ood_classes: Sequence[int], key: KeyLike) -> Splits:
    """The 1797 handwritten digits of scikit-learn as 1×8×8 images.

    15 % train, 35 % validate and 50 % test, each with the same share of every class. Few
    images train, on purpose: that is where weights are uncertain. Many validate, as few of
    them are misread, and those few decide.

    Args:
        ood_classes: digits that are held out as out-of-distribution.
        key: what the split is drawn from.

    Raises:
        ValueError: a held-out class is no digit, or fewer than two classes are left.

    Source:
        Alpaydin and Kaynak (1998), "Optical recognition of handwritten digits",
        doi:10.24432/C50P49; its test set is what scikit-learn holds.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return _split(images, torch.tensor(labels), ood_classes=ood_classes, key=key)


DATA: dict[str, Callable[..., Splits]] = {"digits": digits}
"""From the name on the command line to what loads it."""


def _split(images: Tensor, labels: Tensor, *, ood_classes: Sequence[int], key: KeyLike) -> Splits:
    known = labels.unique().tolist()
    listed = ", ".join(map(str, known))
    strange = [c for c in ood_classes if c not in known]
    if strange:
        raise ValueError(f"class {strange[0]} is not in the data, whose classes are {listed}")
    if not ood_classes:
        raise ValueError(f"no class is held out, expected at least one of {listed}")
    classes = tuple(c for c in known if c not in ood_classes)
    if len(classes) < 2:
        raise ValueError(
            f"{len(set(ood_classes))} of {len(known)} classes are held out, "
            f"expected at most {len(known) - 2}: at least two must stay to tell apart"
        )
    inside = torch.isin(labels, torch.tensor(classes))
    images_in = images[inside]
    targets = torch.searchsorted(torch.tensor(classes), labels[inside])

    def divide(rows: Tensor, share: float, number: int) -> tuple[Tensor, Tensor]:
        first, second = train_test_split(
            rows.numpy(),
            train_size=share,
            stratify=targets[rows].numpy(),
            random_state=random.seed(random.fold_in(key, number)) % 2**32,
        )
        return torch.from_numpy(first), torch.from_numpy(second)

    test, seen = divide(torch.arange(len(targets)), _TEST_SHARE, 0)
    train, validation = divide(seen, _TRAIN_SHARE / (1 - _TEST_SHARE), 1)

    def part(rows: Tensor) -> Labelled:
        return Labelled(images_in[rows], targets[rows])

    return Splits(part(train), part(validation), part(test), images[~inside], classes)
