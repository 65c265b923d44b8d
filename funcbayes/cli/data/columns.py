"""What the text in a table's columns means: numbers, categories, dates or nothing."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from funcbayes.cli.data.splits import MIN_CLASS_ROWS, Kind, Target
from funcbayes.cli.errors import UsageError
from funcbayes.extras import needs_extra

with needs_extra("report"):
    import pandas as pd

# pandas has no stubs, and what pyright infers are unions that fit nothing.
Frame: TypeAlias = Any
Series: TypeAlias = Any

# Cells that say that there is no value, whatever their case.
_MISSING = frozenset(
    ["", "na", "n/a", "n.a.", "#n/a", "nan", "-nan", "<na>", "null", "?", "-", "--", "."]
)
# A column of numbers may hold this much text, of so few kinds: marks for missing values that
# are not in the list.
_STRAY_SHARE, _STRAY_KINDS = 0.1, 3
_MAX_WHOLE_CLASSES = 20
# It is a float32, and a sum of many of its squares is a float64.
_LARGEST = 1e30

_UNIT = r"^[$€£]\s*|\s*[%$€£]$"
_THOUSANDS = r"[+-]?\d{1,3}(?:[,\s'’]\d{3})+(?:\.\d*)?"
_DECIMAL_COMMA = r"[+-]?(?:\d{1,3}(?:[.\s'’]\d{3})+(?:,\d*)?|\d*,\d+|\d+,)"
# By shape. `pandas.to_datetime` would take '10-12', an age range, for a day in October.
_TIME = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?"
_DATE = (
    rf"(?:\d{{4}}[-/.]\d{{1,2}}(?:[-/.]\d{{1,2}})?|\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:\d{{2}}|\d{{4}})"
    rf"|\d{{1,2}}[ -][^\W\d]{{3,9}}\.?[ ,-]+\d{{2,4}}|[^\W\d]{{3,9}}\.? \d{{1,2}},? \d{{4}})"
    rf"(?:[T ,]+{_TIME}.*)?|{_TIME}(?: ?[AaPp][Mm])?"
)
_IDENTIFIER = re.compile(
    r"(?i:id|idx|index|key|uuid|guid|no\.?|nr\.?|#|row[ _]?(?:id|names?|no|nr|number)?"
    r"|column 1|unnamed.*|.*[_ .-]id)|.*[a-z]I[dD]"
)


def told(sentences: Mapping[str, str], summary: str) -> list[str]:
    """One sentence a column, or where there are many columns one for all.

    Args:
        sentences: from a column to what is said about it.
        summary: what is said about them together, without what follows.
    """
    if len(sentences) <= 4:
        return list(sentences.values())
    return [f"{summary}: {listed(list(sentences))}."]


def listed(names: Sequence[str], *, most: int = 10) -> str:
    """Names for a message: the first few, and how many there are beyond."""
    text = ", ".join(f"`{name}`" for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def read(text: Frame, *, comma_decimals: bool) -> tuple[Frame, list[str]]:
    """Makes columns of numbers (float64, NaN for missing) or categories (text, likewise).

    Args:
        text: the table as it was written.
        comma_decimals: whether '1,234' is more likely 1.234 than 1234.

    Returns:
        The columns that can be used, and what a user should know about them.
    """
    columns: dict[str, Series] = {}
    number_styles: dict[str, str] = {}
    strays: dict[str, str] = {}
    mixtures: dict[str, str] = {}
    dates: dict[str, str] = {}
    identifiers: dict[str, str] = {}
    for name in map(str, text.columns):
        values = without_missing(text[name])
        present = values.dropna()
        number, style = numbers(values, comma_decimals=comma_decimals)
        odd = present[number[present.index].isna()]
        if not len(present) or not len(odd) or _is_stray(odd, present):
            if len(present) and _IDENTIFIER.fullmatch(name) and _all_different(number):
                identifiers[name] = (
                    f"`{name}`: left out, a number that names the row and says nothing about it."
                )
                continue
            if style:
                number_styles[name] = f"`{name}`: {style}."
            if len(odd):
                strays[name] = (
                    f"`{name}`: {counted(len(odd), 'value')} taken for missing among its numbers, "
                    f"{_examples(odd)}."
                )
            columns[name] = number
        elif present.str.fullmatch(_DATE).mean() > 1 - _STRAY_SHARE:
            dates[name] = (
                f"`{name}`: left out, dates or times such as {quoted(present.iloc[0])}; add a "
                "column of numbers for what matters in them."
            )
        else:
            if len(odd) < len(present) / 2:
                mixtures[name] = (
                    f"`{name}`: text, though {1 - len(odd) / len(present):.0%} of it are numbers, "
                    f"because of values such as {quoted(odd.iloc[0])}."
                )
            columns[name] = values
    notes = [
        *told(identifiers, "Left out, numbers that name the row"),
        *told(dates, "Left out, dates and times"),
        *told(number_styles, "Numbers with separators of thousands, decimal commas or units"),
        *told(strays, "Text among numbers was taken for missing"),
        *told(mixtures, "Numbers and text mixed, taken as text"),
    ]
    return pd.DataFrame(columns, index=text.index), notes


def guess_target(
    name: str, values: Series, task: Kind | None, *, comma_decimals: bool = False
) -> tuple[Target, np.ndarray, list[str]]:
    """Decides whether a column holds classes or numbers to predict.

    Text is classes. Numbers are classes if there are two of them, or if they are whole, at
    most twenty, and there are enough rows of each.

    Args:
        name: of the column.
        values: as they were written.
        task: what the user says that it is; None guesses.
        comma_decimals: as in `read`.

    Returns:
        The target of the rows that have one, the positions of these rows, and what a user
        should know.

    Raises:
        UsageError: there is nothing to predict.
    """
    notes: list[str] = []
    values = without_missing(values)
    present = values.dropna()
    if not len(present):
        raise UsageError(f"`{name}` has no value in any row: choose another target")
    number, style = numbers(present, comma_decimals=comma_decimals)
    odd = present[number.isna()]
    num_values = number.nunique()
    # Text among few numbers is a class like them; among many it is a mark for missing.
    numeric = not len(odd) or (_is_stray(odd, present) and num_values > _MAX_WHOLE_CLASSES)
    if task == "regression" and not numeric:
        raise UsageError(
            f"`{name}` holds text such as {quoted(odd.iloc[0])}, expected numbers to predict in a "
            "regression: choose another target, or leave --task out"
        )
    guessed = task is None
    if task is None:
        whole = bool((number.dropna() % 1 == 0).all())
        enough = num_values <= min(_MAX_WHOLE_CLASSES, len(present) // MIN_CLASS_ROWS)
        few = num_values <= 2 or (whole and enough)
        task = "regression" if numeric and not few else "classification"

    if task == "regression":
        present = number.dropna()
        check_size(present.to_frame(name))
        if style:
            notes.append(f"`{name}`: {style}.")
    missing = len(values) - len(present)
    if missing:
        strays = f" or is text ({_examples(odd)})" if task == "regression" and len(odd) else ""
        notes.append(f"{counted(missing, 'row')} left out whose `{name}` is missing{strays}.")
    rows = values.index.get_indexer(present.index)
    labels = _labels(present, number[present.index])
    classes, indices = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        raise UsageError(
            f"`{name}` is {quoted(classes[0])} in every row: there is nothing to predict, choose "
            "another target"
        )
    if task == "regression":
        if guessed:
            notes.append(
                f"`{name}` is predicted as a number (regression), as it has {len(classes)} "
                "different values."
            )
        return Target(number[present.index].to_numpy(np.float64), ()), rows, notes

    if len(classes) > len(present) / MIN_CLASS_ROWS:
        raise UsageError(
            f"`{name}` has {len(classes)} different values in {counted(len(present), 'row')}, too "
            f"many for classes of at least {MIN_CLASS_ROWS} rows: choose another target"
        )
    names = tuple(map(str, classes))
    if guessed:
        some = ", ".join(map(quoted, names[:10]))
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        notes.append(
            f"`{name}` is predicted as one of {len(names)} classes (classification): {some}{more}."
        )
        if numeric and len(names) > 2:
            notes.append(f"To predict `{name}` as a number, add --task regression.")
    if labels.dtype == np.int64 and labels.min() != 0:
        notes.append(
            f"The labels {classes[0]} to {classes[-1]} are numbered from 0 inside and keep their "
            "names."
        )
    return Target(indices.astype(np.int64), names), rows, notes


def without_missing(text: Series) -> Series:
    """The text with NaN for cells that say that there is no value."""
    return text.mask(text.str.casefold().isin(_MISSING))


def numbers(text: Series, *, comma_decimals: bool) -> tuple[Series, str]:
    """Reads numbers, NaN where a value is none, and says how if not as usual.

    Thousands may be set apart ('1,234.5', '1 234'), decimals follow a comma ('1.234,5'), and
    a currency or per cent sign stand at an end; for all of a column alike.

    Args:
        text: as it was written, NaN for missing.
        comma_decimals: what '1,234' is where a column could be either.
    """
    plain = _to_number(text)
    present = text.dropna()
    if plain[present.index].notna().all():
        return plain, ""
    clean = present.str.replace("−", "-").str.replace(_UNIT, "", regex=True)
    unit = " without their unit" if (clean != present).any() else ""
    grouped = clean.where(
        ~clean.str.fullmatch(_THOUSANDS), clean.str.replace(r"[,\s'’]", "", regex=True)
    )
    comma = clean.where(
        ~clean.str.fullmatch(_DECIMAL_COMMA),
        clean.str.replace(r"[.\s'’]", "", regex=True).str.replace(",", "."),
    )
    styles = [
        (_to_number(clean), f"numbers are read{unit}"),
        (_to_number(grouped), f"numbers are read{unit} with separators between thousands"),
        (_to_number(comma), f"numbers are read{unit} with a decimal comma"),
    ]
    if comma_decimals:
        styles[1:] = reversed(styles[1:])
    number, style = max(styles, key=lambda pair: pair[0].notna().sum())
    if number.notna().sum() == plain.notna().sum():
        return plain, ""
    return number.reindex(text.index), style


def check_size(numbers: Frame) -> None:
    """Refuses columns of numbers that cannot be standardised.

    Raises:
        UsageError: a number is infinite or too large.
    """
    large = numbers.abs() > _LARGEST
    for name in numbers.columns[large.any()]:
        value = numbers.loc[large[name], name].iloc[0]
        if np.isinf(value):
            raise UsageError(
                f"`{name}` holds an infinite value: write a number, or nothing where it is missing"
            )
        raise UsageError(
            f"`{name}` holds {value:g}, expected numbers below {_LARGEST:g}: rescale the column"
        )


def counted(number: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quoted(value: object) -> str:
    """A value for a message, not too long."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"'{text}'" if len(text) <= 40 else f"'{text[:39]}…'"


def _to_number(text: Series) -> Series:
    number: Series = pd.to_numeric(text, errors="coerce")
    return number.astype(np.float64)


def _is_stray(odd: Series, present: Series) -> bool:
    # "None" may be any share: as a number it is nothing else.
    kinds = odd[odd.str.casefold() != "none"]
    return len(kinds) <= _STRAY_SHARE * len(present) and (
        kinds.nunique() <= _STRAY_KINDS and len(odd) < len(present)
    )


def _all_different(number: Series) -> bool:
    return bool((number % 1 == 0).all()) and number.is_unique


def _examples(values: Series) -> str:
    return ", ".join(quoted(value) for value in values.unique()[:_STRAY_KINDS])


def _labels(present: Series, number: Series) -> np.ndarray:
    """Labels that sort as their classes are to be numbered: numbers by size, text as text."""
    # From 2⁵³ on, two integers may be one float64.
    if number.isna().any() or (number.abs() >= 2**53).any():
        return present.to_numpy(str)
    whole = (number % 1 == 0).all()
    return number.to_numpy(np.int64 if whole else np.float64)
