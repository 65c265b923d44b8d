"""Data sets that need no file: three of scikit-learn's and two toy problems."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from funcbayes.cli.data import encode
from funcbayes.cli.data.splits import Encoded, Shares, Splits, Target, split
from funcbayes.core import random
from funcbayes.core.random import KeyLike
from funcbayes.extras import needs_extra

with needs_extra("report"):
    import pandas as pd
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_moons

# Few rows train, on purpose: that is where weights are uncertain.
_TOY_ROWS, _TOY_SHARES = 500, Shares(train=0.2, test=0.6)


def digits(*, ood_classes: Sequence[str] | None, key: KeyLike) -> Splits:
    """The 1797 handwritten digits of scikit-learn as 1×8×8 images; 8 and 9 are held out.

    15 % train, 35 % validate and 50 % test, each with the same share of every class. Few
    images train, on purpose: that is where weights are uncertain. Many validate, as few of
    them are misread, and those few decide.

    Args:
        ood_classes: digits that are held out as out-of-distribution; None takes 8 and 9.
        key: what the split is drawn from.

    Raises:
        UsageError: a held-out class is no digit, or fewer than two classes are left.

    Source:
        Alpaydin and Kaynak (1998), "Optical recognition of handwritten digits",
        doi:10.24432/C50P49; its test set is what scikit-learn holds.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    encoded = Encoded(images, (), None, None, drawable=False, notes=())
    return split(
        "digits",
        Target(np.asarray(labels), tuple(map(str, range(10)))),
        lambda train: encoded,
        shares=Shares(train=0.15, test=0.5),
        ood_classes=("8", "9") if ood_classes is None else ood_classes,
        key=key,
        notes=("Pixels are in units of the brightest possible, 0 to 1.",),
    )


def breast_cancer(*, ood_classes: Sequence[str] | None, key: KeyLike) -> Splits:
    """569 tumours, malignant or benign, by 30 measurements of their cells' nuclei.

    20 % train, 30 % validate and 50 % test.

    Source:
        Wolberg, Mangasarian, Street and Street (1993), "Breast cancer Wisconsin
        (diagnostic)", doi:10.24432/C5DW2B.
    """
    data: Any = load_breast_cancer(as_frame=True)
    return split(
        "breast-cancer",
        Target(data.target.to_numpy(np.int64), tuple(map(str, data.target_names))),
        partial(encode.table, data.data),
        shares=Shares(train=0.2, test=0.5),
        ood_classes=ood_classes or (),
        key=key,
    )


def diabetes(*, ood_classes: Sequence[str] | None, key: KeyLike) -> Splits:
    """The progress of diabetes over a year in 442 patients, by ten measurements. Regression.

    50 % train, 20 % validate and 30 % test.

    Source:
        Efron, Hastie, Johnstone and Tibshirani (2004), doi:10.1214/009053604000000067.
    """
    data: Any = load_diabetes(as_frame=True, scaled=False)
    return split(
        "diabetes",
        Target(data.target.to_numpy(np.float64), ()),
        partial(encode.table, data.data),
        shares=Shares(train=0.5, test=0.3),
        ood_classes=ood_classes or (),
        key=key,
    )


def two_moons(*, ood_classes: Sequence[str] | None, key: KeyLike) -> Splits:
    """Two interleaved half circles in the plane: 100 points train, 100 validate, 300 test."""
    key = random.as_key(key)
    seed = random.seed(random.fold_in(key, 2)) % 2**32
    points, labels = make_moons(_TOY_ROWS, noise=0.15, random_state=seed)
    return split(
        "two-moons",
        Target(np.asarray(labels), ("upper", "lower")),
        partial(encode.table, pd.DataFrame(points, columns=["x1", "x2"])),
        shares=_TOY_SHARES,
        ood_classes=ood_classes or (),
        key=key,
    )


def gap(*, ood_classes: Sequence[str] | None, key: KeyLike) -> Splits:
    """A cosine with noise, seen on two intervals and not between: is the gap noticed?

    100 points train, 100 validate and 300 test, all of them on the two intervals.

    Source:
        Foong, Li, Hernández-Lobato and Turner (2019), arXiv:1906.11537, section 4.
    """
    key = random.as_key(key)
    x = random.uniform(random.fold_in(key, 2), [_TOY_ROWS], dtype=torch.float64).numpy()
    # The intervals are [-1, -0.7] and [0.5, 1], equally dense.
    x = np.where(x < 3 / 8, -1 + 0.8 * x, 0.5 + 0.8 * (x - 3 / 8))
    noise = random.normal(random.fold_in(key, 3), [_TOY_ROWS], dtype=torch.float64).numpy()
    return split(
        "gap",
        Target(np.cos(4 * x + 0.8) + 0.1 * noise, ()),
        partial(encode.table, pd.DataFrame({"x": x})),
        shares=_TOY_SHARES,
        ood_classes=ood_classes or (),
        key=key,
    )
