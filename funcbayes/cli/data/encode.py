"""From columns or pixels to what a network takes, by the training rows alone."""

from typing import Any, cast

import numpy as np
import torch

from funcbayes.cli.data.columns import Frame, check_size, counted, told
from funcbayes.cli.data.splits import Encoded
from funcbayes.cli.errors import UsageError
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

# Columns that one column of categories becomes at most; the rare ones share the last.
_MAX_CATEGORIES = 20
# Text of which so large a share differs names the row.
_NAMING_SHARE = 0.9
_MIN_PIXELS = 4


def table(frame: Frame, train: np.ndarray) -> Encoded:
    """Fills in, standardises numbers, and gives each category a column of zeros and ones.

    Args:
        frame: columns of numbers or of text, NaN for missing.
        train: the positions of the training rows, from which every statistic is taken.

    Raises:
        UsageError: no column says anything, or a number is infinite or too far from the others.
    """
    names, notes = _informative(frame.iloc[train])
    numbers = frame[names].select_dtypes("number").columns.to_list()
    categories = frame[names].columns.difference(numbers, sort=False).to_list()
    frame = frame[numbers + categories]
    check_size(frame[numbers])

    fill_numbers, scaler = SimpleImputer(strategy="median"), StandardScaler()
    fill_categories = SimpleImputer(strategy="most_frequent")
    one_hot = OneHotEncoder(
        # A category of one training row is told from that row only.
        min_frequency=2,
        max_categories=_MAX_CATEGORIES,
        handle_unknown="infrequent_if_exist",
        sparse_output=False,
        # Its default, a string, is all that pyright sees.
        feature_name_combiner=cast(Any, _column_name),
    )
    encoder = ColumnTransformer(
        [
            ("numbers", make_pipeline(fill_numbers, scaler), numbers),
            ("categories", make_pipeline(fill_categories, one_hot), categories),
        ]
    )
    encoder.fit(frame.iloc[train])
    inputs = torch.from_numpy(encoder.transform(frame)).float()
    features = tuple(numbers)
    if categories:
        fill_categories, one_hot = encoder.named_transformers_["categories"]
        features += tuple(one_hot.get_feature_names_out(categories))
    strange = ~inputs.isfinite().all(0)
    if strange.any():
        raise UsageError(
            f"`{features[int(strange.nonzero()[0])]}` has a value beyond float32 in units of the "
            "training rows' standard deviation: is it a mark for a missing value?"
        )

    mean, std = torch.zeros(len(features)), torch.ones(len(features))
    if numbers:
        fill_numbers, scaler = encoder.named_transformers_["numbers"]
        mean[: len(numbers)] = torch.from_numpy(scaler.mean_)
        std[: len(numbers)] = torch.from_numpy(scaler.scale_)
        notes += _fill_notes(frame[numbers], fill_numbers.statistics_, "the median")
        notes.append(
            "Numbers are standardised by the mean and the standard deviation of the training rows."
        )
    if categories:
        notes += _fill_notes(
            frame[categories], fill_categories.statistics_, "the most frequent value"
        )
        joined = {
            name: f"`{name}`: {counted(len(rare), 'rare value')} joined into one column."
            for name, rare in zip(categories, one_hot.infrequent_categories_, strict=True)
            if rare is not None
        }
        notes += told(joined, "Rare values joined into one column each")
        some = {
            name: f"`{name}`: text, a column of zeros and ones for each value."
            for name in categories
        }
        notes += told(some, "Text, a column of zeros and ones for each value")
    return Encoded(inputs, features, mean, std, drawable=not categories, notes=tuple(notes))


def images(pixels: np.ndarray, train: np.ndarray) -> Encoded:
    """Brings images into the order channels, height, width, and their values near 0 … 1.

    Args:
        pixels: `[images, height, width]`, or `[images, channels, height, width]`, or the latter
            with one, three or four channels last.
        train: the positions of the training images.

    Raises:
        UsageError: the images are too small, or a value is not finite.
    """
    notes: list[str] = []
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[1] not in (1, 2, 3, 4) and pixels.shape[3] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 3, 1)
        notes.append("The last axis of the images is taken for their channels.")
    channels, height, width = pixels.shape[1:]
    if not channels or min(height, width) < _MIN_PIXELS:
        raise UsageError(
            f"the images in `x` are {height}x{width} pixels of {counted(channels, 'channel')}, "
            f"expected at least {_MIN_PIXELS}x{_MIN_PIXELS}: save smaller ones as [rows, features]"
        )
    values = torch.from_numpy(np.ascontiguousarray(pixels)).float()
    low, high = values.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise UsageError("`x` holds images with infinite or missing values: replace them")
    if low >= 0 and high <= 1:
        pass
    elif pixels.dtype == np.uint8:
        values = values / 255
        notes.append("Pixels are scaled from 0 … 255 to 0 … 1.")
    else:
        seen = values[train].double()
        # A training set of one colour says nothing, but it is no reason to divide by zero.
        mean, std = float(seen.mean()), float(seen.std()) or 1.0
        values = (values - mean) / std
        notes.append(
            f"Pixels are standardised by the training images' mean, {mean:g}, and standard "
            f"deviation, {std:g}."
        )
    return Encoded(values, (), None, None, drawable=False, notes=tuple(notes))


def _informative(train: Frame) -> tuple[list[str], list[str]]:
    """The columns that differ from row to row but do not name it, and notes on the others."""
    dropped: dict[str, str] = {}
    naming: dict[str, str] = {}
    numbers = train.select_dtypes("number")
    low, high = numbers.min(), numbers.max()
    for name in map(str, train.columns):
        if name in low.index:
            constant, empty = not low[name] < high[name], bool(np.isnan(low[name]))
        else:
            different, present = train[name].nunique(), train[name].count()
            constant, empty = different <= 1, present == 0
            if not constant and different >= _NAMING_SHARE * present:
                naming[name] = f"`{name}`: left out, text that differs in almost every row."
                continue
        if constant:
            why = "empty" if empty else "the same"
            dropped[name] = f"`{name}`: left out, it is {why} in every training row."
    kept = [name for name in map(str, train.columns) if name not in dropped | naming]
    if not kept:
        raise UsageError(
            "no column is left to predict from: all are the same in every training row, dates, or "
            "names of the rows"
        )
    return kept, [
        *told(dropped, "Left out, the same or empty in every training row"),
        *told(naming, "Left out, text that differs in almost every row"),
    ]


def _fill_notes(frame: Frame, values: Any, what: str) -> list[str]:
    sentences = {}
    for (name, missing), value in zip(frame.isna().sum().items(), values, strict=True):
        if missing:
            text = f"{value:g}" if isinstance(value, float) else f"'{value}'"
            sentences[str(name)] = (
                f"`{name}`: {counted(missing, 'missing value')} filled with {what} {text}."
            )
    return told(sentences, f"Missing values filled with {what} of the training rows")


def _column_name(column: str, value: object) -> str:
    return f"{column}={'(other)' if value == 'infrequent_sklearn' else value}"
