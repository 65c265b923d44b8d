"""What a data set is split into, and how: what trains, what chooses and what is reported."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.cli.errors import UsageError
from funcbayes.core import random
from funcbayes.core.random import Key, KeyLike
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from sklearn.model_selection import train_test_split

Kind = Literal["classification", "regression"]

# Points of a picture, and how far it reaches beyond the training inputs on each side, in
# units of their range: what a method says there is what the picture is for.
_LINE_POINTS, _LINE_MARGIN = 400, 0.5
_PLANE_SIDE, _PLANE_MARGIN = 80, 0.75

MIN_ROWS = 20
# With a fifth of the rows or more in each part, every part then has a row of every class.
MIN_CLASS_ROWS = 6


class Labelled(NamedTuple):
    """Inputs and what is to be predicted from them.

    Attributes:
        inputs: `[rows, features]` or `[rows, channels, height, width]`, float32.
        targets: class indices 0 … classes − 1, int64, or standardised numbers, float32;
            `[rows]`.
    """

    inputs: Float[Tensor, "rows *shape"]
    targets: Tensor


class Splits(NamedTuple):
    """Disjoint parts of a data set.

    Attributes:
        name: of the data set, or of its file.
        task: what is predicted, classes or a number.
        train: what the networks are trained on, and what all statistics are taken from.
        validation: what hyper-parameters are chosen on.
        test: what the figures are computed on; nothing is chosen on it.
        ood: inputs of the held-out classes, never seen in training; None without any.
        classes: original names of the classes 0, 1, … in `targets`; () in regression.
        target_mean: m; 0 in classification.
        target_std: s; a target in its own units is `s · targets + m`. 1 in classification.
        features: names of the columns of `inputs`; () for images.
        input_mean: `[features]`; None for images.
        input_std: `[features]`; inputs in their own units are `inputs · input_std + input_mean`.
            1, and the mean 0, for the columns of zeros and ones that stand for categories.
            None for images.
        grid: inputs to draw predictions over, where there are one or two features of numbers:
            `[points, 1]`, ascending, or `[side · side, 2]`, of which entry `i · side + j` has
            the j-th first and the i-th second coordinate. It reaches beyond the data.
        notes: what was guessed, left out, filled in and rescaled, a sentence each.
    """

    name: str
    task: Kind
    train: Labelled
    validation: Labelled
    test: Labelled
    ood: Float[Tensor, "rows *shape"] | None
    classes: tuple[str, ...]
    target_mean: float
    target_std: float
    features: tuple[str, ...]
    input_mean: Float[Tensor, " features"] | None
    input_std: Float[Tensor, " features"] | None
    grid: Float[Tensor, "points features"] | None
    notes: tuple[str, ...]


class ShuffledBatches:
    """The batches of an epoch, in a new order each time it is gone through.

    Rows that do not fill a batch wait for another epoch: batch norm is noisy on a few rows.
    """

    def __init__(self, data: Labelled, *, batch_size: int, key: KeyLike) -> None:
        """Takes inputs and targets; epoch e is shuffled by `fold_in(key, e)`."""
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
            yield self._data.inputs[rows], self._data.targets[rows]


class Shares(NamedTuple):
    """How the rows are dealt out; what is left validates.

    Attributes:
        train: share of all rows.
        test: share of all rows.
    """

    train: float
    test: float


class Target(NamedTuple):
    """What is predicted, for every row.

    Attributes:
        values: class indices, int64, or numbers in their own units, float64; `[rows]`.
        classes: names of the classes; () for numbers.
    """

    values: np.ndarray
    classes: tuple[str, ...]


class Encoded(NamedTuple):
    """The inputs of every row, ready for a network.

    Attributes:
        inputs: `[rows, *shape]`, rescaled by the training rows.
        features: names of the columns; () for images.
        mean: subtracted from each column; None for images.
        std: each column was divided by it; None for images.
        drawable: whether the columns are numbers to draw predictions over.
        notes: what was done.
    """

    inputs: Tensor
    features: tuple[str, ...]
    mean: Tensor | None
    std: Tensor | None
    drawable: bool
    notes: tuple[str, ...]


def split(
    name: str,
    target: Target,
    encode: Callable[[np.ndarray], Encoded],
    *,
    shares: Shares,
    ood_classes: Sequence[str],
    key: KeyLike,
    notes: Sequence[str] = (),
) -> Splits:
    """Deals the rows out, each part with the same share of every class.

    Args:
        name: of the data set.
        target: of every row.
        encode: from the numbers of the training rows to the inputs of all rows, so that
            nothing but these rows decides how inputs are rescaled.
        shares: of each part.
        ood_classes: names of the classes that are held out.
        key: what the split is drawn from.
        notes: put before those of `encode`.

    Raises:
        UsageError: the held-out classes do not fit the data, or the training targets are all
            the same.
    """
    key = random.as_key(key)
    known = _known_rows(target, ood_classes)
    rows = np.flatnonzero(known)
    task: Kind = "classification" if target.classes else "regression"
    labels = target.values if target.classes else None
    _check_enough(target, rows)
    train, validation, test = _deal(rows, labels, shares, key)
    encoded = encode(train)

    if target.classes:
        numbers = np.unique(target.values[known])
        classes = tuple(target.classes[c] for c in numbers)
        mean, std = 0.0, 1.0
        targets = torch.from_numpy(np.searchsorted(numbers, target.values))
    else:
        classes = ()
        mean, std = float(target.values[train].mean()), float(target.values[train].std())
        if not 0 < std < np.inf:
            raise UsageError(
                f"the targets of the training rows of {name} are all {mean:g}: there is nothing "
                "to predict, choose another target"
            )
        targets = torch.from_numpy((target.values - mean) / std).float()

    def part(rows: np.ndarray) -> Labelled:
        return Labelled(encoded.inputs[rows], targets[rows])

    return Splits(
        name=name,
        task=task,
        train=part(train),
        validation=part(validation),
        test=part(test),
        ood=None if known.all() else encoded.inputs[~known],
        classes=classes,
        target_mean=mean,
        target_std=std,
        features=encoded.features,
        input_mean=encoded.mean,
        input_std=encoded.std,
        grid=_grid(encoded.inputs[train]) if encoded.drawable else None,
        notes=(*notes, *encoded.notes),
    )


def _known_rows(target: Target, ood_classes: Sequence[str]) -> np.ndarray:
    """Which rows are of classes that are not held out."""
    held_out = set(ood_classes)
    if held_out and not target.classes:
        raise UsageError(
            "argument --ood-classes: the target is a number and has no classes to hold out: "
            "leave the argument out"
        )
    listed = ", ".join(target.classes[:20])
    if len(target.classes) > 20:
        listed += f" and {len(target.classes) - 20} more"
    for strange in ood_classes:
        if strange not in target.classes:
            close = difflib.get_close_matches(strange, target.classes, n=1, cutoff=0.7)
            hint = f": did you mean '{close[0]}'?" if close else ""
            raise UsageError(
                f"argument --ood-classes: class {strange} is not in the data, whose classes are "
                f"{listed}{hint}"
            )
    if held_out and len(target.classes) - len(held_out) < 2:
        raise UsageError(
            f"argument --ood-classes: {len(held_out)} of {len(target.classes)} classes are held "
            f"out, expected at most {len(target.classes) - 2}: at least two must stay to tell "
            "apart"
        )
    numbers = [number for number, name in enumerate(target.classes) if name in held_out]
    return ~np.isin(target.values, numbers)


def _check_enough(target: Target, rows: np.ndarray) -> None:
    if len(rows) < MIN_ROWS:
        raise UsageError(
            f"there are {len(rows)} rows to train, choose and test on, expected at least "
            f"{MIN_ROWS}: bring more data"
        )
    if target.classes:
        counts = np.bincount(target.values[rows], minlength=len(target.classes))
        for name, count in zip(target.classes, counts, strict=True):
            if 0 < count < MIN_CLASS_ROWS:
                number = ", predict a number by --task regression" if name.isdecimal() else ""
                raise UsageError(
                    f"class '{name}' has {count} rows, expected at least {MIN_CLASS_ROWS} to "
                    "train, choose and test on: leave these rows out, join the class with "
                    f"another{number}, or hold it out by --ood-classes {name}"
                )


def _deal(
    rows: np.ndarray, labels: np.ndarray | None, shares: Shares, key: Key
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def divide(rows: np.ndarray, share: float, number: int) -> tuple[np.ndarray, ...]:
        parts = train_test_split(
            rows,
            train_size=share,
            stratify=None if labels is None else labels[rows],
            random_state=random.seed(random.fold_in(key, number)) % 2**32,
        )
        return tuple(map(np.asarray, parts))

    test, seen = divide(rows, shares.test, 0)
    train, validation = divide(seen, shares.train / (1 - shares.test), 1)
    return train, validation, test


def _grid(inputs: Tensor) -> Tensor | None:
    """Points to draw predictions over, around the training inputs; None if they are no plane."""
    low, high = inputs.amin(0), inputs.amax(0)
    if inputs.shape[1] == 1:
        margin = _LINE_MARGIN * (high - low)
        return torch.linspace(float(low - margin), float(high + margin), _LINE_POINTS).unsqueeze(1)
    if inputs.shape[1] == 2:
        margin = _PLANE_MARGIN * (high - low)
        first, second = (
            torch.linspace(float(start), float(stop), _PLANE_SIDE)
            for start, stop in zip(low - margin, high + margin, strict=True)
        )
        return torch.cartesian_prod(second, first).flip(1)
    return None
