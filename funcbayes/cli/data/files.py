"""Users' own .csv and .npz files: read, understood, and refused with what to do about it."""

import csv
import difflib
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from funcbayes.cli.data import encode
from funcbayes.cli.data.columns import Frame, Series, counted, guess_target, listed, quoted, read
from funcbayes.cli.data.splits import Kind, Shares, Splits, split
from funcbayes.cli.errors import UsageError
from funcbayes.core.random import KeyLike
from funcbayes.extras import needs_extra

with needs_extra("report"):
    import pandas as pd

TABLES = (".csv", ".tsv", ".txt")
_SHARES = Shares(train=0.5, test=0.3)
# In the order in which they are looked for.
_TARGET_NAMES = ("target", "label", "class", "y")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SNIFFED_ROWS = 50
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def load_file(
    path: Path,
    *,
    target: str | None,
    task: Kind | None,
    ood_classes: Sequence[str] | None,
    key: KeyLike,
) -> Splits:
    """Reads a file and splits it: 50 % train, 20 % validate and 30 % test.

    Args:
        path: of a table (.csv, .tsv, .txt) with a row of names, or of an .npz file with arrays
            `x` `[rows]`, `[rows, features]` or images, and `y` `[rows]`.
        target: the column of a table to predict; None looks for one of a usual name.
        task: whether classes or a number are predicted; None guesses.
        ood_classes: names of the classes that are held out; None for none.
        key: what the split is drawn from.

    Raises:
        UsageError: the file is not there, cannot be read, or is no data to train on.
    """
    suffix = path.suffix.lower()
    if suffix not in (*TABLES, ".npz") or not path.is_file():
        raise UsageError(_why_no_file(path))
    try:
        load = _load_npz if suffix == ".npz" else _load_table
        return load(path, target=target, task=task, ood_classes=ood_classes or (), key=key)
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise UsageError(f"'{path}' does not fit into memory: take a part of it") from error


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return f"'{path}' is a folder, expected a .csv or .npz file"
    if not path.exists():
        folder = path.parent
        others = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, others, n=1, cutoff=0.75)
        hint = f": did you mean '{folder / close[0]}'?" if close else ""
        return f"there is no file '{path}'{hint}"
    fix = {
        ".npy": "put two arrays into one file by np.savez(path, x=…, y=…)",
        ".xls": "save the sheet as CSV",
        ".xlsx": "save the sheet as CSV",
        ".ods": "save the sheet as CSV",
        ".gz": "unpack it",
        ".zip": "unpack it",
    }.get(path.suffix.lower(), "write one with pandas' `to_csv` or with `np.savez`")
    return f"'{path}' is no .csv or .npz file: {fix}"


def _load_table(
    path: Path,
    *,
    target: str | None,
    task: Kind | None,
    ood_classes: Sequence[str],
    key: KeyLike,
) -> Splits:
    text, notes = _decode(path)
    frame, delimiter = _parse(path, text)
    # In countries that write decimals with a comma, columns are separated by semicolons.
    comma_decimals = delimiter == ";"
    if delimiter != ",":
        notes.append(f"Columns are separated by {_DELIMITERS[delimiter]}.")
    name, note = _target_column(frame, target)
    notes += note
    values, rows, target_notes = guess_target(
        name, frame[name], task, comma_decimals=comma_decimals
    )
    # Only rows with a target: what the others hold is in no part, and in no note.
    features, feature_notes = read(
        frame.drop(columns=name).iloc[rows], comma_decimals=comma_decimals
    )
    return split(
        path.name,
        values,
        partial(encode.table, features),
        shares=_SHARES,
        ood_classes=ood_classes,
        key=key,
        notes=[*notes, *target_notes, *feature_notes],
    )


def _decode(path: Path) -> tuple[str, list[str]]:
    """The text of a file in UTF-8, UTF-16 with its mark, or else Windows' Latin-1."""
    data = path.read_bytes()
    notes: list[str] = []
    try:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        # Five of the 256 bytes mean nothing there.
        text = data.decode("cp1252", errors="replace")
        notes.append("The file is not in UTF-8 and was read as Latin-1 (Windows-1252).")
    if _CONTROL.search(text):
        raise UsageError(
            f"'{path}' is not text, expected a table of comma-separated values: is it another "
            "kind of file under this name?"
        )
    if not text.strip():
        raise UsageError(f"'{path}' is empty, expected a row of names and rows of values")
    return text, notes


def _parse(path: Path, text: str) -> tuple[Frame, str]:
    """The table as text, and what separates its columns."""
    delimiter = max(_DELIMITERS, key=partial(_num_columns, text))
    # Numbered as an editor does, for the messages.
    lines: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            cells = [" ".join(cell.split()) for cell in row]
            if any(cells):
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise UsageError(
            f"'{path}' is no table, at line {reader.line_num}: {error}; is a quotation mark not "
            "closed?"
        ) from error
    if not lines:
        raise UsageError(f"'{path}' is empty, expected a row of names and rows of values")
    (_, header), *rows = lines
    # Some programs end every line with a separator.
    while not header[-1] and not any(any(row[len(header) - 1 :]) for _, row in rows):
        header.pop()
    for number, row in rows:
        if len(row) < len(header) or any(row[len(header) :]):
            fix = "write nothing between separators where a value is missing"
            if len(row) > len(header):
                fix = f"quote values that hold {_DELIMITERS[delimiter]}"
            raise UsageError(
                f"line {number} of '{path}' has {counted(len(row), 'value')}, expected "
                f"{len(header)} as in its first line: {fix}"
            )
    if len(header) < 2:
        raise UsageError(
            f"'{path}' has one column only, {quoted(header[0])}, expected one to predict and "
            "others to predict it from, separated by commas"
        )
    if _is_values(header):
        raise UsageError(
            f"the first line of '{path}' holds values such as {quoted(header[0])}, expected the "
            "columns' names: add a line of names"
        )
    names = [name or f"column {i + 1}" for i, name in enumerate(header)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"'{path}' has two columns named `{twice}`: rename one")
    if not rows:
        raise UsageError(f"'{path}' has a line of names only, expected rows of values below it")
    cells = [row[: len(header)] for _, row in rows]
    return pd.DataFrame(cells, columns=names, dtype="str"), delimiter


def _num_columns(text: str, delimiter: str) -> int:
    """How many columns the first rows have at least, if separated like this."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = itertools.islice(reader, _SNIFFED_ROWS)
        return min((len(row) for row in rows if any(row)), default=0)
    except csv.Error:
        return 0


def _is_values(header: Sequence[str]) -> bool:
    """Whether a first line is a row of the table and not its columns' names."""
    numbers: Series = pd.to_numeric(pd.Series(header, dtype="str"), errors="coerce")
    # 2019 may be a name, and pandas names columns 0, 1, … itself, but 5.1 is a value.
    if (numbers % 1 > 0).any():
        return True
    return bool(numbers.notna().all()) and numbers.to_list() != list(range(len(header)))


def _target_column(frame: Frame, target: str | None) -> tuple[str, list[str]]:
    columns = frame.columns.to_list()
    if target is None:
        by_name = {name.casefold(): name for name in reversed(columns)}
        usual = next((by_name[name] for name in _TARGET_NAMES if name in by_name), None)
        if usual is None:
            raise UsageError(
                "argument --target: say which column to predict; there are "
                f"{listed(columns, most=20)}"
            )
        return usual, [f"`{usual}` is taken for the target, by its name."]
    if target in columns:
        return target, []
    # A slip of the case first: difflib would not see it in a short name.
    alike = [name for name in columns if name.casefold() == target.casefold()]
    close = alike or difflib.get_close_matches(target, columns, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UsageError(
        f"argument --target: there is no column '{target}': {hint}choose from "
        f"{listed(columns, most=20)}"
    )


def _load_npz(
    path: Path,
    *,
    target: str | None,
    task: Kind | None,
    ood_classes: Sequence[str],
    key: KeyLike,
) -> Splits:
    if target is not None:
        raise UsageError(
            "argument --target: it names a column of a .csv file, and the target of an .npz file "
            "is its array `y`: leave it out"
        )
    x, y = _read_npz(path)
    notes: list[str] = []
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        fix = ": save y.argmax(1) if its columns are classes" if y.ndim == 2 else ""
        raise UsageError(f"`y` has shape {list(y.shape)}, expected one target a row, [rows]{fix}")
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim not in (2, 3, 4) or 0 in x.shape[1:]:
        raise UsageError(
            f"`x` has shape {list(x.shape)}, expected [rows, features], or images as [rows, "
            "channels, height, width]"
        )
    if len(x) != len(y):
        raise UsageError(
            f"`x` has {len(x)} rows and `y` has {len(y)}, expected as many: row i of `x` belongs "
            "to entry i of `y`"
        )
    if np.issubdtype(y.dtype, np.bytes_):
        y = np.char.decode(y, "latin-1")
    values, rows, target_notes = guess_target("y", pd.Series(y.astype(str)), task)
    x = x[rows]
    if x.ndim > 2:
        encoding = partial(encode.images, x)
    else:
        names = ["x"] if x.shape[1] == 1 else [f"x{i}" for i in range(x.shape[1])]
        frame = pd.DataFrame(x.astype(np.float64), columns=names)
        encoding = partial(encode.table, frame)
    return split(
        path.name,
        values,
        encoding,
        shares=_SHARES,
        ood_classes=ood_classes,
        key=key,
        notes=[*notes, *target_notes],
    )


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays `x` and `y`, or `X` and `Y`."""
    expected = "expected arrays `x` and `y`: write them by np.savez(path, x=…, y=…)"
    found: list[np.ndarray] = []
    # Opened here, because NumPy leaves a file open that it cannot read.
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"'{path}' is no .npz file, {expected}") from error
        if isinstance(archive, np.ndarray):
            raise UsageError(f"'{path}' is an .npy file of one array, {expected}")
        for name in "xy":
            stored = next((n for n in (name, name.upper()) if n in archive.files), None)
            if stored is None:
                others = listed(archive.files) or "none"
                raise UsageError(f"'{path}' has no array `{name}` but {others}, {expected}")
            found.append(_array(archive, stored, text=name == "y"))
    x, y = found
    return x, y


def _array(archive: Any, name: str, *, text: bool) -> np.ndarray:
    """An array of numbers, or where allowed of text."""
    try:
        array = archive[name]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):
            raise UsageError(
                f"`{name}` holds Python objects, which are not loaded as they can run code: save "
                f"{name}.astype(float)" + (f", or {name}.astype(str) for labels" if text else "")
            ) from error
        raise UsageError(f"the array `{name}` is damaged: write the file anew") from error
    kind = array.dtype.kind if isinstance(array, np.ndarray) else "?"
    if kind in "biuf" or (text and kind in "US"):
        return array
    what = {"?": "not an array", "U": "text", "S": "text"}.get(kind, "")
    raise UsageError(
        f"`{name}` is {what or array.dtype}, expected numbers{' or text' if text else ''}"
    )
