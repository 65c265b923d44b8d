"""Files that cannot be used: every one is one sentence that says what to do."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcbayes.cli import main
from funcbayes.cli.data import load
from funcbayes.cli.data.files import load_file
from funcbayes.cli.errors import UsageError

NUM = 60
NUMBERS = [f"{value:.3f}" for value in np.random.default_rng(0).normal(size=NUM)]


def csv(num=NUM, sep=",", **columns):
    """A table of columns; a function gives the value of a row, text stands in every row."""
    rows = [
        sep.join(str(value(i)) if callable(value) else value for value in columns.values())
        for i in range(num)
    ]
    return "\n".join([sep.join(columns), *rows]) + "\n"


def number(i):
    return NUMBERS[i]


def other(i):
    return NUMBERS[-1 - i]


def refused(data, **options):
    """The message, which is one sentence on one line."""
    with pytest.raises(UsageError) as caught:
        load(str(data), key=0, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


GOOD = csv(a=number, b=other, y=number)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, expected a row of names and rows of values"),
        (" \n\n\t\n", "is empty, expected a row of names and rows of values"),
        ('""\n', "is empty, expected a row of names and rows of values"),
        (b"\xff\xfe", "is empty, expected"),
        (bytes(range(256)) * 8, "is not text, expected a table of comma-separated values"),
        (b"PK\x03\x04" + bytes(64), "is not text, expected a table of comma-separated values"),
        ("a,y\n\x1b[2J,1\n", "is not text, expected a table of comma-separated values"),
        ("a,b,y\n", "has a line of names only, expected rows of values below it"),
        ("a\n1\n2\n", "has one column only, 'a', expected one to predict and others"),
        ("Dear all,\nhello\n", "has one column only, 'Dear all'"),
        (GOOD.split("\n", 1)[1], "holds values such as '0.126', expected the columns' names"),
        ("5.1,3.5,setosa\n4.9,3.0,setosa\n", "holds values such as '5.1', expected the columns'"),
        ("7,8,9\n1,2,3\n", "holds values such as '7', expected the columns' names"),
        (csv(a=number, b=other, y=number).replace("b", "a"), "has two columns named `a`: rename"),
        (GOOD + "1,2\n", "line 62 of '{path}' has 2 values, expected 3 as in its first line: "),
        (GOOD + "1,2,3,4\n", "has 4 values, expected 3 as in its first line: quote values that "),
        (GOOD + '1,"2,3\n', "is no table, at line 62: unexpected end of data; is a quotation mark"),
        (csv(12, a=number, y=number), "there are 12 rows to train, choose and test on, expected "),
        (csv(a=number, y="c"), "`y` is 'c' in every row: there is nothing to predict, choose"),
        (csv(a=number, y="3.5"), "`y` is '3.5' in every row: there is nothing to predict"),
        (csv(a=number, y=""), "`y` has no value in any row: choose another target"),
        (
            csv(a=number, y=lambda i: "rare" if i < 3 else "ab"[i % 2]),
            "class 'rare' has 3 rows, expected at least 6 to train, choose and test on: leave "
            "these rows out, join the class with another, or hold it out by --ood-classes rare",
        ),
        (
            csv(a=number, y=lambda i: 9 if i < 3 else i % 4),
            "class '9' has 3 rows, expected at least 6 to train, choose and test on: leave these "
            "rows out, join the class with another, predict a number by --task regression, or "
            "hold it out by --ood-classes 9",
        ),
        (
            csv(a=number, y=lambda i: f"t{i // 2}"),
            "`y` has 30 different values in 60 rows, too many for classes of at least 6 rows",
        ),
        (csv(a=lambda i: "inf" if i == 3 else i, y=number), "`a` holds an infinite value: write"),
        (csv(a=lambda i: "1e999" if i == 3 else i, y=number), "`a` holds an infinite value: "),
        (csv(a=number, y=lambda i: "-inf" if i == 3 else i), "`y` holds an infinite value: "),
        (csv(a=lambda i: 10 ** (i + 1), y=number), "`a` holds 1e+31, expected numbers below 1e+30"),
        (csv(a=number, y=lambda i: 10 ** (i + 1)), "`y` holds 1e+31, expected numbers below 1e+30"),
        (csv(a="1", b="k", y=number), "no column is left to predict from: all are the same in"),
        (csv(a=lambda i: f"{1 + i % 12}/3/2021 10:00", y=number), "no column is left to predict"),
        (csv(a=lambda i: f"row {i}", y=number), "no column is left to predict from"),
        (csv(id=lambda i: i, y=number), "no column is left to predict from"),
        (csv(a="", y=number), "no column is left to predict from"),
        ('"two\r\nlines",  price \n' + "1,2\n" * 30, "there are `two lines`, `price`"),
        (
            csv(a=number, price=other),
            "argument --target: say which column to predict; there are `a`, `price`",
        ),
    ],
)
def test_tables(content, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message.format(path=path) in refused(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": "prize"},
            "there is no column 'prize': did you mean 'Price'? choose from `a`, ",
        ),
        (
            {"target": "price"},
            "there is no column 'price': did you mean 'Price'? choose from `a`, ",
        ),
        ({"target": "zzz"}, "--target: there is no column 'zzz': choose from `a`, `kind`, `Price`"),
        (
            {"target": "kind", "task": "regression"},
            "`kind` holds text such as 'u', expected numbers to predict in a regression: choose "
            "another target, or leave --task out",
        ),
        (
            {"target": "a", "task": "classification"},
            "`a` has 60 different values in 60 rows, too many for classes",
        ),
        (
            {"target": "Price", "ood_classes": ["1"]},
            "argument --ood-classes: the target is a number and has no classes to hold out",
        ),
        (
            {"target": "kind", "ood_classes": ["green"]},
            "argument --ood-classes: class green is not in the data, whose classes are u, v, w",
        ),
        (
            {"target": "kind", "ood_classes": ["u", "v"]},
            "argument --ood-classes: 2 of 3 classes are held out, expected at most 1: at least two",
        ),
    ],
)
def test_options_of_tables(options, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(csv(a=lambda i: f"{i}.5", kind=lambda i: "uvw"[i % 3], Price=number))
    assert message in refused(path, **options)


def test_wide_tables_do_not_list_every_column(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(csv(**{f"c{i}": number for i in range(500)}))
    message = refused(path)
    assert message.endswith("`c18`, `c19` and 480 more")


def test_a_value_of_a_test_row_too_far_for_float32(tmp_path):
    path = tmp_path / "table.csv"
    # Of 60 rows one is far off. In training it widens the spread, otherwise it overflows.
    messages = set()
    for row in range(12):
        tiny = csv(a=lambda i, row=row: 1e29 if i == row else f"{NUMBERS[i]}e-12", y=other)
        path.write_text(tiny)
        try:
            data = load(str(path), key=0)
            assert data.train.inputs.abs().max() < 8
        except UsageError as error:
            messages.add(str(error))
    (message,) = messages
    assert message.startswith("`a` has a value beyond float32 in units of the training rows'")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wnie.csv", "there is no file '{folder}/wnie.csv': did you mean '{folder}/wine.csv'?"),
        ("missing/wine.csv", "there is no file '{folder}/missing/wine.csv'"),
        ("wine.xlsx", "'{folder}/wine.xlsx' is no .csv or .npz file: save the sheet as CSV"),
        ("wine.npy", "is no .csv or .npz file: put two arrays into one file by np.savez("),
        ("wine.csv.gz", "is no .csv or .npz file: unpack it"),
        ("wine", "is no .csv or .npz file: write one with pandas' `to_csv` or with `np.savez`"),
        ("folder.csv", "'{folder}/folder.csv' is a folder, expected a .csv or .npz file"),
        ("", "is a folder, expected a .csv or .npz file"),
    ],
)
def test_paths(name, message, tmp_path):
    for file in ("wine.csv", "wine.xlsx", "wine.npy", "wine.csv.gz", "wine"):
        (tmp_path / file).write_text(GOOD)
    (tmp_path / "folder.csv").mkdir()
    assert message.format(folder=tmp_path) in refused(tmp_path / name)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text(GOOD)

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    assert refused(path) == f"'{path}' cannot be read: Permission denied"


def test_a_file_too_large_for_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text(GOOD)

    def fill(*_, **__):
        raise MemoryError

    monkeypatch.setattr("pathlib.Path.read_bytes", fill)
    assert refused(path) == f"'{path}' does not fit into memory: take a part of it"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("digit", {}, "there is no data set 'digit': did you mean 'digits'? choose from digits, "),
        ("mnist", {}, "there is no data set 'mnist': choose from digits, breast-cancer, "),
        ("digits", {"target": "a"}, "argument --target: it is for files, and 'digits' has its own"),
        ("gap", {"task": "regression"}, "argument --task: it is for files, and 'gap' has its own"),
        ("diabetes", {"ood_classes": ["1"]}, "the target is a number and has no classes to hold"),
        (
            "breast-cancer",
            {"ood_classes": ["benig"]},
            "class benig is not in the data, whose classes are malignant, benign: did you mean "
            "'benign'?",
        ),
        (
            "breast-cancer",
            {"ood_classes": ["benign"]},
            "1 of 2 classes are held out, expected at most 0: at least two must stay to tell apart",
        ),
        (
            "digits",
            {"ood_classes": ["12"]},
            "class 12 is not in the data, whose classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        ),
        (
            "digits",
            {"ood_classes": list("123456789")},
            "9 of 10 classes are held out, expected at most 8: at least two must stay",
        ),
    ],
)
def test_bundled_sets(data, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(data, **options)


X = np.random.default_rng(0).normal(size=(NUM, 3))
Y = np.arange(NUM) % 3
OBJECTS = np.array(["a", 1] * (NUM // 2), dtype=object)
INFINITE = np.where(X[3, 1] == X, np.inf, X)
IMAGES = np.random.default_rng(0).normal(size=(NUM, 1, 8, 8))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": X},
            "has no array `y` but `x`, expected arrays `x` and `y`: write them by np.savez(",
        ),
        ({}, "has no array `x` but none, expected arrays `x` and `y`"),
        ({"x_train": X, "y_train": Y}, "has no array `x` but `x_train`, `y_train`, expected"),
        ({"x": X, "y": OBJECTS}, "`y` holds Python objects, which are not loaded as they can run "),
        ({"x": X.astype(object), "y": Y}, "can run code: save x.astype(float)"),
        ({"x": X, "y": X}, "`y` has shape [60, 3], expected one target a row, [rows]: save y.argm"),
        ({"x": X, "y": IMAGES}, "`y` has shape [60, 1, 8, 8], expected one target a row, [rows]"),
        ({"x": X, "y": np.array(3)}, "`y` has shape [], expected one target a row, [rows]"),
        ({"x": np.array(3.0), "y": Y}, "`x` has shape [], expected [rows, features], or images"),
        ({"x": X[:, :0], "y": Y}, "`x` has shape [60, 0], expected [rows, features], or images"),
        ({"x": IMAGES[..., None], "y": Y}, "`x` has shape [60, 1, 8, 8, 1], expected [rows, feat"),
        ({"x": X[:50], "y": Y}, "`x` has 50 rows and `y` has 60, expected as many: row i of `x`"),
        ({"x": X.astype(str), "y": Y}, "`x` is text, expected numbers"),
        ({"x": X + 1j, "y": Y}, "`x` is complex128, expected numbers"),
        ({"x": X, "y": Y.astype("M8[s]")}, "`y` is datetime64[s], expected numbers or text"),
        ({"x": X[:0], "y": Y[:0]}, "`y` has no value in any row: choose another target"),
        ({"x": X, "y": np.full(NUM, np.nan)}, "`y` has no value in any row: choose another"),
        ({"x": X, "y": np.ones(NUM)}, "`y` is '1' in every row: there is nothing to predict"),
        ({"x": X, "y": np.where(Y == 0, np.inf, X[:, 0])}, "`y` holds an infinite value"),
        ({"x": X[:9], "y": Y[:9]}, "there are 9 rows to train, choose and test on, expected"),
        ({"x": X[:19], "y": Y[:19]}, "there are 19 rows to train, choose and test on, expected"),
        ({"x": INFINITE, "y": Y}, "`x1` holds an infinite value"),
        ({"x": np.ones_like(X), "y": Y}, "no column is left to predict from"),
        ({"x": np.full_like(X, np.nan), "y": Y}, "no column is left to predict from"),
        ({"x": X * 1e30, "y": Y}, "expected numbers below 1e+30: rescale the column"),
        ({"x": np.where(IMAGES > 2, np.nan, IMAGES), "y": Y}, "`x` holds images with infinite or"),
        ({"x": np.where(IMAGES > 2, np.inf, IMAGES), "y": Y}, "`x` holds images with infinite or"),
        ({"x": IMAGES[..., :3], "y": Y}, "the images in `x` are 8x3 pixels of 1 channel, expected"),
    ],
)
def test_arrays(arrays, message, tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    assert message in refused(path)


def test_files_that_are_no_archive(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, x=X, y=Y)
    whole = path.read_bytes()
    one = io.BytesIO()
    np.save(one, X)
    pickled = io.BytesIO()
    np.save(pickled, OBJECTS, allow_pickle=True)
    texts = io.BytesIO()
    with zipfile.ZipFile(texts, "w") as archive:
        archive.writestr("x", "hello")
        archive.writestr("y", "you")
    for content, message in (
        (b"", "is no .npz file, expected arrays `x` and `y`"),
        (b"garbage" * 30, "is no .npz file, expected arrays `x` and `y`"),
        (GOOD.encode(), "is no .npz file, expected arrays `x` and `y`"),
        (whole[:-200], "is no .npz file, expected arrays `x` and `y`"),
        (one.getvalue(), "is an .npy file of one array, expected arrays `x` and `y`"),
        (pickled.getvalue(), "is no .npz file, expected arrays `x` and `y`"),
        (texts.getvalue(), "`x` is not an array, expected numbers"),
        (whole[:400] + b"zzzz" + whole[404:], "the array `x` is damaged: write the file anew"),
    ):
        path.write_bytes(content)
        assert message in refused(path)


def test_the_target_of_an_archive_has_its_name(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, x=X, y=Y)
    assert "argument --target: it names a column of a .csv file" in refused(path, target="y")


def used_or_refused(path):
    """Nothing but data or a sentence comes out."""
    try:
        data = load_file(path, target=None, task=None, ood_classes=None, key=0)
    except UsageError as error:
        # `raises` cannot expect what may also not be raised.
        assert "\n" not in str(error)  # noqa: PT017
        return
    for part in (data.train, data.validation, data.test):
        assert len(part.targets)
        assert part.inputs.isfinite().all()
        assert part.targets.isfinite().all()


CELLS = st.one_of(
    st.sampled_from(
        ["", "NA", "?", "1", "0", "1.5", "1,5", "1.234,5", "inf", "1e40", "a", "b", '"']
    ),
    st.integers(-9, 9).map(str),
    st.floats(width=32).map(str),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)


@given(
    header=st.lists(st.sampled_from(["a", "b", "id", "y", "0", "", "2.5"]), min_size=1, max_size=4),
    rows=st.lists(st.lists(CELLS, min_size=2, max_size=4), max_size=12),
    sep=st.sampled_from([",", ";", "\t"]),
    repeats=st.sampled_from([1, 12]),
)
def test_any_text_is_used_or_refused(tmp_path_factory, header, rows, sep, repeats):
    path = tmp_path_factory.mktemp("any") / "table.csv"
    lines = [sep.join(row) for row in [header, *(rows * repeats)]]
    path.write_text("\n".join(lines), encoding="utf-8")
    used_or_refused(path)


@given(
    columns=st.lists(st.lists(CELLS, min_size=1, max_size=9), min_size=1, max_size=3),
    targets=st.lists(CELLS, min_size=2, max_size=9),
    num=st.sampled_from([24, 90]),
)
def test_any_well_formed_table_is_used_or_refused(tmp_path_factory, columns, targets, num):
    path = tmp_path_factory.mktemp("any") / "table.csv"
    quoted = [
        ['"' + values[i % len(values)].replace('"', '""') + '"' for i in range(num)]
        for values in [*columns, targets]
    ]
    names = [*(f"c{i}" for i in range(len(columns))), "y"]
    lines = [names, *zip(*quoted, strict=True)]
    path.write_text("\n".join(map(",".join, lines)), encoding="utf-8")
    used_or_refused(path)


@given(place=st.integers(0, 2**16), value=st.integers(0, 255), keep=st.floats(0, 1))
def test_any_damage_to_an_archive_is_harmless(tmp_path_factory, place, value, keep):
    path = tmp_path_factory.mktemp("any") / "arrays.npz"
    np.savez(path, x=X, y=Y)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    for content in (data, data[: int(keep * len(data))]):
        path.write_bytes(bytes(content))
        used_or_refused(path)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("table.csv", "", [], "is empty, expected a row of names and rows of values"),
        ("table.csv", csv(a=number, price=other), [], "argument --target: say which column to "),
        ("table.csv", GOOD, ["--target", "z"], "there is no column 'z': choose from `a`, `b`, `y`"),
        ("table.csv", GOOD, ["--ood-classes", "1"], "the target is a number and has no classes"),
        ("table.xlsx", "PK", [], "is no .csv or .npz file: save the sheet as CSV"),
        ("arrays.npz", "garbage", [], "is no .npz file, expected arrays `x` and `y`"),
        (None, "", [], "there is no file '"),
    ],
)
def test_the_command_line_says_it_in_one_line(name, content, arguments, message, tmp_path, capsys):
    path = tmp_path / (name or "missing.csv")
    if name:
        path.write_text(content)
    output = tmp_path / "results"
    assert main(["compare", "--data", str(path), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("funcbayes compare: error: ")
    assert error.count("\n") == 1
    assert not output.exists()
