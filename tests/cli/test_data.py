"""Data sets of the command line: bundled, and what is made of users' own files."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcbayes.cli.data import DATA, ShuffledBatches, load
from funcbayes.cli.data.columns import numbers
from funcbayes.cli.data.splits import MIN_CLASS_ROWS, MIN_ROWS, Encoded, Shares, Target, split


def parts(data):
    return data.train, data.validation, data.test


def write_csv(folder, columns, *, name="table.csv", **options):
    path = folder / name
    pd.DataFrame(columns).to_csv(path, index=False, **options)
    return path


def noise(num, seed=0):
    return np.random.default_rng(seed).normal(size=num).round(3)


@pytest.mark.parametrize("name", DATA)
def test_every_bundled_set_is_complete_and_reproducible(name):
    data, again, other = (load(name, key=k) for k in (3, 3, 4))
    assert data.name == name
    for part in parts(data):
        assert part.inputs.dtype == torch.float32
        assert len(part.inputs) == len(part.targets)
        assert part.inputs.isfinite().all()
    if data.task == "classification":
        assert (data.target_mean, data.target_std) == (0, 1)
        for part in parts(data):
            assert part.targets.dtype == torch.int64
            assert part.targets.unique().tolist() == list(range(len(data.classes)))
    else:
        assert data.classes == ()
        assert data.train.targets.dtype == torch.float32
        # Standardised by the training rows. n roundings of float32, at magnitudes below 4.
        assert abs(data.train.targets.mean()) < 1e-5
        assert abs(data.train.targets.std(correction=0) - 1) < 1e-5
    if data.features:
        assert data.train.inputs.shape[1] == len(data.features)
        assert data.train.inputs.mean(0).abs().max() < 1e-5
        assert (data.train.inputs.std(0, correction=0) - 1).abs().max() < 1e-5
    for part, same, different in zip(parts(data), parts(again), parts(other), strict=True):
        assert torch.equal(part.inputs, same.inputs)
        assert torch.equal(part.targets, same.targets)
        assert not torch.equal(part.inputs, different.inputs)
    assert all(note.endswith(".") and "\n" not in note for note in data.notes)


@pytest.mark.parametrize(
    ("name", "rows", "shape"),
    [
        ("digits", (216, 506, 721), (1, 8, 8)),
        ("breast-cancer", (114, 171, 284), (30,)),
        ("diabetes", (221, 89, 132), (10,)),
        ("two-moons", (100, 100, 300), (2,)),
        ("gap", (100, 100, 300), (1,)),
    ],
)
def test_bundled_sizes(name, rows, shape):
    data = load(name, key=0)
    assert tuple(len(part.targets) for part in parts(data)) == rows
    assert data.train.inputs.shape[1:] == shape
    assert (data.ood is None) == (name != "digits")


def test_splits_are_disjoint_and_stratified():
    data = load("digits", ood_classes=["3"], key=0)
    assert data.classes == ("0", "1", "2", "4", "5", "6", "7", "8", "9")
    images = torch.cat([*(part.inputs for part in parts(data)), data.ood])
    # The data set holds no image twice, so every one is in exactly one part.
    assert len(images) == len(images.flatten(1).unique(dim=0)) == 1797
    assert images.min() == 0
    assert images.max() == 1
    for part in parts(data):
        counts = part.targets.bincount(minlength=9)
        assert counts.min() > 0.8 * counts.max()


def test_digits_hold_out_eight_and_nine_unless_told_otherwise():
    assert load("digits", key=0).classes == tuple("01234567")
    every = load("digits", ood_classes=(), key=0)
    assert every.ood is None
    assert every.classes == tuple("0123456789")


@given(
    counts=st.lists(st.integers(MIN_CLASS_ROWS, 40), min_size=2, max_size=30).filter(
        lambda counts: sum(counts) >= MIN_ROWS
    ),
    key=st.integers(0, 2**32),
)
def test_every_part_has_every_class_and_every_row_has_a_part(counts, key):
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = torch.arange(len(labels)).float().unsqueeze(1)
    data = split(
        "any",
        Target(labels, tuple(map(str, range(len(counts))))),
        lambda train: Encoded(rows, ("row",), None, None, drawable=False, notes=()),
        shares=Shares(train=0.5, test=0.3),
        ood_classes=(),
        key=key,
    )
    for part in parts(data):
        assert part.targets.unique().tolist() == list(range(len(counts)))
        assert part.targets.tolist() == labels[part.inputs[:, 0].long()].tolist()
    assert torch.equal(torch.cat([part.inputs for part in parts(data)]).sort(0).values, rows)


def test_batches_are_reshuffled_each_epoch_and_whole():
    data = load("digits", key=0).train
    batches = ShuffledBatches(data, batch_size=32, key=1)
    first, second = ([inputs for inputs, _ in batches] for _ in range(2))
    assert len(first) == len(batches) == len(data.targets) // 32
    assert all(len(inputs) == 32 for inputs in first)
    assert not torch.equal(first[0], second[0])
    again = [inputs for inputs, _ in ShuffledBatches(data, batch_size=32, key=1)]
    assert torch.equal(torch.cat(again), torch.cat(first))


@pytest.mark.parametrize("name", ["gap", "two-moons"])
def test_grids_reach_beyond_the_data(name):
    data = load(name, key=0)
    inputs = torch.cat([part.inputs for part in parts(data)])
    low, high = inputs.amin(0), inputs.amax(0)
    reach = 0.3 * (high - low)
    assert (data.grid.amin(0) < low - reach).all()
    assert (data.grid.amax(0) > high + reach).all()
    if name == "gap":
        assert (data.grid.diff(dim=0) > 0).all()
        own = inputs * data.input_std + data.input_mean
        assert not ((own > -0.7 + 1e-6) & (own < 0.5 - 1e-6)).any()
        assert -1 - 1e-6 <= own.min() < -0.95
        assert 0.95 < own.max() <= 1 + 1e-6
    else:
        side = int(len(data.grid) ** 0.5)
        plane = data.grid.reshape(side, side, 2)
        # Entry [i, j]: the j-th first, the i-th second coordinate, both ascending.
        assert torch.equal(plane[0, :, 0], plane[-1, :, 0])
        assert torch.equal(plane[:, 0, 1], plane[:, -1, 1])
        assert (plane[0, :, 0].diff() > 0).all()
        assert (plane[:, 0, 1].diff() > 0).all()


def test_gap_is_a_cosine_with_noise_of_a_tenth():
    data = load("gap", key=0)
    inputs = torch.cat([part.inputs for part in parts(data)])[:, 0]
    targets = torch.cat([part.targets for part in parts(data)])
    x = inputs * data.input_std + data.input_mean
    residual = targets * data.target_std + data.target_mean - (4 * x + 0.8).cos()
    # 500 rows: the standard error of the standard deviation is 0.0032, of the mean 0.0045.
    assert abs(residual.std() - 0.1) < 5 * 0.0032
    assert abs(residual.mean()) < 5 * 0.0045


def test_a_table_of_every_kind_of_column(tmp_path):
    num = 80
    rng = np.random.default_rng(0)
    age = rng.integers(20, 60, num).astype(float).astype(object)
    age[:3], age[3] = None, "unknown"
    city = rng.choice(["Ulm", "Bonn", "Kiel"], num).astype(object)
    city[5] = "NA"
    path = write_csv(
        tmp_path,
        {
            "id": range(100, 100 + num),
            "age": age,
            "city": city,
            "since": [f"2020-03-{1 + i % 28:02}" for i in range(num)],
            "name": [f"person {i}" for i in range(num)],
            "unit": "kg",
            "nothing": None,
            "kind": np.where(rng.random(num) < 0.4, "sick", "well"),
        },
    )
    data = load(str(path), target="kind", key=0)
    assert data.name == "table.csv"
    assert data.task == "classification"
    assert data.classes == ("sick", "well")
    assert data.features == ("age", "city=Bonn", "city=Kiel", "city=Ulm")
    assert [len(part.targets) for part in parts(data)] == [40, 16, 24]
    # Categories stay zeros and ones.
    assert data.input_mean[1:].tolist() == [0, 0, 0]
    assert data.input_std[1:].tolist() == [1, 1, 1]
    for part in parts(data):
        assert torch.equal(part.inputs[:, 1:].sum(1), torch.ones(len(part.targets)))
    assert data.grid is None
    text = "\n".join(data.notes)
    for sentence in (
        "`kind` is predicted as one of 2 classes (classification): 'sick', 'well'.",
        "`id`: left out, a number that names the row",
        "`since`: left out, dates or times such as '2020-03-01'",
        "`name`: left out, text that differs in almost every row.",
        "`unit`: left out, it is the same in every training row.",
        "`nothing`: left out, it is empty in every training row.",
        "`age`: 1 value taken for missing among its numbers, 'unknown'.",
        "`age`: 4 missing values filled with the median ",
        "`city`: 1 missing value filled with the most frequent value ",
        "`city`: text, a column of zeros and ones for each value.",
        "standardised by the mean and the standard deviation of the training rows.",
    ):
        assert sentence in text
    assert all("\n" not in note and note.endswith(".") for note in data.notes)


def test_many_columns_share_a_note(tmp_path):
    columns = {f"c{i}": np.where(np.arange(60) % 9 == i, np.nan, noise(60, i)) for i in range(8)}
    data = load(str(write_csv(tmp_path, columns | {"y": noise(60, 9)})), key=0)
    assert (
        "Missing values filled with the median of the training rows: `c0`, `c1`, `c2`, `c3`, `c4`, "
        "`c5`, `c6`, `c7`." in data.notes
    )


def test_nothing_is_taken_from_the_test_and_validation_rows(tmp_path):
    num = 100
    city = np.array(["Ulm", "Bonn", "Kiel", "Bonn"] * 25, dtype=object)
    columns = {"row": noise(num) + 10 * np.arange(num), "b": noise(num, 1), "city": city}
    columns |= {"same": np.ones(num), "kilo": np.full(num, "kg", object), "y": noise(num, 2)}
    before = load(str(write_csv(tmp_path, columns)), key=0)

    def rows(part):
        row = part.inputs[:, 0] * before.input_std[0] + before.input_mean[0]
        return (row / 10).round().long().numpy()

    unseen = np.concatenate([rows(before.validation), rows(before.test)])
    for name, value in {"b": 1e6, "city": "Rome", "y": -1e6, "same": 2, "kilo": "g"}.items():
        columns[name] = columns[name].copy()
        columns[name][unseen] = value
    columns["b"][unseen[:5]] = np.nan
    after = load(str(write_csv(tmp_path, columns)), key=0)
    assert torch.equal(after.train.inputs, before.train.inputs)
    assert torch.equal(after.train.targets, before.train.targets)
    assert after.features == before.features
    assert torch.equal(after.input_mean, before.input_mean)
    assert torch.equal(after.input_std, before.input_std)
    assert (after.target_mean, after.target_std) == (before.target_mean, before.target_std)
    assert not torch.equal(after.test.inputs, before.test.inputs)
    # What no training row has is none of the categories.
    assert not after.test.inputs[:, 2:].any()
    # Filled with the median of the training rows, not of all, which is a million now.
    median = np.median(columns["b"][rows(before.train)])
    filled = after.validation.inputs[np.isin(rows(after.validation), unseen[:5]), 1]
    own = filled * after.input_std[1] + after.input_mean[1]
    torch.testing.assert_close(own, torch.full_like(own, median), rtol=0, atol=1e-6)


def test_rare_categories_share_a_column(tmp_path):
    num = 400
    rng = np.random.default_rng(0)
    city = [f"city {int(value)}" for value in rng.exponential(15, num)]
    path = write_csv(tmp_path, {"a": noise(num), "city": city, "y": noise(num, 1)})
    data = load(str(path), key=0)
    assert len(data.features) == 21
    assert data.features[-1] == "city=(other)"
    assert any("rare values joined into one column." in note for note in data.notes)
    for part in parts(data):
        assert torch.equal(part.inputs[:, 1:].sum(1), torch.ones(len(part.targets)))


def test_a_category_may_be_called_other(tmp_path):
    kinds = ["other" if i % 2 else ("q" if i % 4 else f"r{i}") for i in range(60)]
    path = write_csv(tmp_path, {"kind": kinds, "kind=q": noise(60), "y": noise(60, 1)})
    data = load(str(path), key=0)
    assert data.features == ("kind=q", "kind=other", "kind=q", "kind=(other)")


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_tables_of_one_or_two_numbers_can_be_drawn(columns, tmp_path):
    inputs = {f"x{i}": 50 + 7 * noise(60, i) for i in range(columns)}
    data = load(str(write_csv(tmp_path, inputs | {"y": noise(60, 5)})), key=0)
    if columns == 3:
        assert data.grid is None
        return
    assert data.grid.shape[1] == columns
    own = data.grid * data.input_std + data.input_mean
    values = np.stack(list(inputs.values()), 1)
    assert (own.amin(0).numpy() < values.min(0)).all()
    assert (own.amax(0).numpy() > values.max(0)).all()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"sep": ";"}, "Columns are separated by semicolons."),
        ({"sep": "\t"}, "Columns are separated by tabs."),
        ({"sep": "|"}, "Columns are separated by vertical bars."),
        ({"sep": ";", "decimal": ","}, "`größe`: numbers are read with a decimal comma."),
        ({"decimal": ","}, "`größe`: numbers are read with a decimal comma."),
        ({"encoding": "utf-8-sig"}, ""),
        ({"encoding": "utf-16"}, ""),
        ({"encoding": "latin-1"}, "The file is not in UTF-8 and was read as Latin-1"),
        ({"lineterminator": "\r\n"}, ""),
        ({"lineterminator": "\r"}, ""),
        ({"quoting": 1}, ""),
        ({"float_format": "  %.3f "}, ""),
        ({"name": "table.TSV", "sep": "\t"}, ""),
    ],
)
def test_dialects_of_csv_say_the_same(options, note, tmp_path):
    columns = {"größe": noise(60), "stadt": ["Köln", "Bonn"] * 30, "y": noise(60, 1)}
    want = load(str(write_csv(tmp_path, columns)), key=0)
    data = load(str(write_csv(tmp_path, columns, **options)), key=0)
    assert data.features == want.features == ("größe", "stadt=Bonn", "stadt=Köln")
    for part, other in zip(parts(data), parts(want), strict=True):
        assert torch.equal(part.inputs, other.inputs)
        assert torch.equal(part.targets, other.targets)
    assert note in "\n".join(data.notes)


def test_empty_lines_and_trailing_separators_do_not_matter(tmp_path):
    path = write_csv(tmp_path, {"a": noise(60), "b": noise(60, 2), "y": noise(60, 1)})
    want = load(str(path), key=0)
    lines = path.read_text().splitlines()
    for text in (
        "\n" + "\n\n".join(lines) + "\n,,\n",
        "\n".join(f"{line}," for line in lines),
        "\n".join([lines[0], *(f"{line},," for line in lines[1:])]),
    ):
        path.write_text(text)
        data = load(str(path), key=0)
        assert torch.equal(data.train.inputs, want.train.inputs)


@pytest.mark.parametrize(
    ("written", "comma_decimals", "want"),
    [
        (["1,234", "12,345,678", "-1"], False, [1234, 12345678, -1]),
        (["1,234.5", "1,000"], False, [1234.5, 1000]),
        (["1 234,5", "12"], False, [1234.5, 12]),
        (["1.234,5", "1.234", "+0,5"], False, [1234.5, 1234, 0.5]),
        (["1,23", "4,567"], False, [1.23, 4.567]),
        (["1,234", "5,678"], False, [1234, 5678]),
        (["1,234", "5,678"], True, [1.234, 5.678]),
        (["1'234.5", "9’876"], False, [1234.5, 9876]),
        (["$1,200.50", "$ 3", "4"], False, [1200.5, 3, 4]),
        (["12 %", "3.5%"], False, [12, 3.5]),
        (["−5", "3e-2"], False, [-5, 0.03]),
        (["1.5", "x", "2"], False, [1.5, np.nan, 2]),
        (["x", "1,2,3"], False, [np.nan, np.nan]),
    ],
)
def test_ways_to_write_numbers(written, comma_decimals, want):
    number, _ = numbers(pd.Series(written), comma_decimals=comma_decimals)
    np.testing.assert_array_equal(number, want)


@given(
    values=st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=20),
    style=st.sampled_from(["{:,}", "{:_}", "{}", "${:,}", "{:,}.00"]),
)
def test_grouped_integers_come_back(values, style):
    # Python groups by commas or underscores; the latter stand for spaces here.
    written = pd.Series([style.format(value).replace("_", " ") for value in values])
    number, _ = numbers(written, comma_decimals=False)
    np.testing.assert_array_equal(number, values)


@pytest.mark.parametrize(
    ("targets", "task", "classes"),
    [
        (["b", "a", "c"], "classification", ("a", "b", "c")),
        (["3", "10", "1"], "classification", ("1", "3", "10")),
        (["2.0", "1.0", "3.0"], "classification", ("1", "2", "3")),
        (["0.5", "1.5"], "classification", ("0.5", "1.5")),
        (["yes", "no"], "classification", ("no", "yes")),
        (["True", "False"], "classification", ("False", "True")),
        (["none", "mild", "severe"], "classification", ("mild", "none", "severe")),
        (["1", "2", "other"], "classification", ("1", "2", "other")),
        ([str(10**20 + i) for i in range(3)], "classification", None),
        (["0.5", "1.5", "2.5"], "regression", ()),
        ([str(i) for i in range(30)], "regression", ()),
        (["unknown", *(str(i) for i in range(30))], "regression", ()),
        (["1,5", "2,5", "3,25"], "regression", ()),
    ],
)
def test_the_task_is_guessed(targets, task, classes, tmp_path):
    num = 10 * len(targets) if len(targets) < 10 else 4 * len(targets)
    repeated = (targets * num)[:num]
    path = write_csv(tmp_path, {"a": noise(num), "y": repeated})
    data = load(str(path), key=0)
    assert data.task == task
    assert data.classes == (tuple(sorted(targets)) if classes is None else classes)


def test_the_guess_can_be_overruled(tmp_path):
    path = str(write_csv(tmp_path, {"a": noise(100), "y": [1, 2, 3, 4, 5] * 20}))
    guessed = load(path, key=0)
    assert guessed.task == "classification"
    assert "To predict `y` as a number, add --task regression." in guessed.notes
    data = load(path, task="regression", key=0)
    assert data.task == "regression"
    targets = torch.cat([part.targets for part in parts(data)]) * data.target_std
    assert (targets + data.target_mean).round().unique().tolist() == [1, 2, 3, 4, 5]
    path = str(write_csv(tmp_path, {"a": noise(100), "y": [0.5, 1.5, 2.5, 3.5] * 25}))
    assert load(path, key=0).task == "regression"
    assert load(path, task="classification", key=0).classes == ("0.5", "1.5", "2.5", "3.5")


def test_labels_that_start_at_one_are_numbered_from_zero(tmp_path):
    path = write_csv(tmp_path, {"a": noise(60), "label": [1, 2, 3] * 20})
    data = load(str(path), key=0)
    assert data.classes == ("1", "2", "3")
    assert data.train.targets.unique().tolist() == [0, 1, 2]
    text = "\n".join(data.notes)
    assert "`label` is taken for the target, by its name." in text
    assert "The labels 1 to 3 are numbered from 0 inside and keep their names." in text


@pytest.mark.parametrize("name", ["target", "Label", "CLASS", "y"])
def test_a_target_of_a_usual_name_is_found(name, tmp_path):
    path = write_csv(tmp_path, {"a": noise(60), name: noise(60, 1), "z": noise(60, 2)})
    assert f"`{name}` is taken for the target, by its name." in load(str(path), key=0).notes


def test_rows_without_a_target_are_left_out(tmp_path):
    targets = ["" if i < 5 else "ab"[i % 2] for i in range(60)]
    a = noise(60)
    a[:5] = np.inf  # Not even looked at.
    data = load(str(write_csv(tmp_path, {"a": a, "y": targets})), key=0)
    assert sum(len(part.targets) for part in parts(data)) == 55
    assert "5 rows left out whose `y` is missing." in data.notes
    numbers = [("unknown" if i < 3 else i / 7) for i in range(60)]
    data = load(str(write_csv(tmp_path, {"a": noise(60), "y": numbers})), key=0)
    assert "3 rows left out whose `y` is missing or is text ('unknown')." in data.notes


def test_a_class_of_a_file_is_held_out(tmp_path):
    kinds = ["rare"] * 3 + ["a", "b"] * 30
    path = str(write_csv(tmp_path, {"x": noise(63), "city": ["u", "v", "w"] * 21, "y": kinds}))
    data = load(path, ood_classes=["rare"], key=0)
    assert data.classes == ("a", "b")
    assert data.ood.shape == (3, 4)
    own = data.ood[:, 0] * data.input_std[0] + data.input_mean[0]
    torch.testing.assert_close(own.double(), torch.from_numpy(noise(63)[:3]), rtol=0, atol=1e-5)


def test_a_file_without_a_suffix_given_as_a_path(tmp_path):
    path = write_csv(tmp_path, {"a": noise(60), "y": noise(60, 1)})
    data, other = load("", file=path, key=0), load(str(path), key=0)
    assert torch.equal(data.train.inputs, other.train.inputs)


X = np.random.default_rng(0).normal(size=(60, 3))
Y = np.arange(60) % 3


def load_npz(folder, *, name="arrays.npz", options=(), **arrays):
    np.savez(folder / name, **arrays)
    return load(str(folder / name), key=0, **dict(options))


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (Y, ("0", "1", "2")),
        (Y[:, None], ("0", "1", "2")),
        (Y.astype(np.float32) + 1, ("1", "2", "3")),
        (Y.astype(np.uint8), ("0", "1", "2")),
        (np.array(["b", "a", "é"])[Y], ("a", "b", "é")),
        (np.array([b"b", b"a", b"\xe9"])[Y], ("a", "b", "é")),
        (Y > 0, ("False", "True")),
        (np.array([2**64 - 1, 2**64 - 2, 2**64 - 3], dtype=np.uint64)[Y], None),
        (X[:, 0], ()),
        (X[:, :1].astype(np.float16), ()),
    ],
)
def test_targets_of_an_npz_file(targets, classes, tmp_path):
    data = load_npz(tmp_path, x=X, y=targets)
    want = classes if classes is not None else tuple(str(2**64 - i) for i in (3, 2, 1))
    assert data.classes == want
    assert data.task == ("classification" if want else "regression")


def test_inputs_of_an_npz_file(tmp_path):
    data = load_npz(tmp_path, x=X, y=Y)
    assert data.features == ("x0", "x1", "x2")
    assert [len(part.targets) for part in parts(data)] == [30, 12, 18]
    one = load_npz(tmp_path, x=X[:, 0], y=np.sin(X[:, 0]))
    assert one.features == ("x",)
    assert one.train.inputs.shape == (30, 1)
    assert one.grid.shape[1] == 1
    assert load_npz(tmp_path, X=X, Y=Y).features == data.features
    # A running number is time here and not the name of a row.
    assert load_npz(tmp_path, x=np.arange(60), y=X[:, 0]).features == ("x",)
    holes = X.copy()
    holes[4, 1] = np.nan
    filled = load_npz(tmp_path, x=holes, y=Y)
    assert any(n.startswith("`x1`: 1 missing value filled with the median") for n in filled.notes)
    # Rows without a target are not even looked at.
    holes[:5], targets = np.inf, np.where(np.arange(60) < 5, np.nan, Y)
    data = load_npz(tmp_path, x=holes, y=targets)
    assert sum(len(part.targets) for part in parts(data)) == 55
    assert "5 rows left out whose `y` is missing." in data.notes


def test_images_of_an_npz_file(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3, 8, 9), dtype=np.uint8)
    data = load_npz(tmp_path, x=pixels, y=Y)
    assert data.train.inputs.shape == (30, 3, 8, 9)
    assert data.features == ()
    assert data.input_mean is None
    assert "Pixels are scaled from 0 … 255 to 0 … 1." in data.notes
    assert 0.9 < data.train.inputs.max() <= 1
    last = load_npz(tmp_path, x=np.moveaxis(pixels, 1, 3), y=Y)
    assert torch.equal(last.train.inputs, data.train.inputs)
    assert "The last axis of the images is taken for their channels." in last.notes
    gray = load_npz(tmp_path, x=pixels[:, 0], y=Y)
    assert torch.equal(gray.train.inputs, data.train.inputs[:, :1])
    # Already between 0 and 1, of whatever dtype.
    for share in (pixels / 255, (pixels > 99), (pixels > 99).astype(np.uint8)):
        same = load_npz(tmp_path, x=share, y=Y).train.inputs
        assert 0 <= same.min() < 0.01
        assert 0.99 < same.max() <= 1
    wide = load_npz(tmp_path, x=rng.normal(7, 3, (60, 1, 8, 8)), y=Y)
    assert abs(wide.train.inputs.mean()) < 1e-5
    assert abs(wide.train.inputs.std() - 1) < 1e-5
    assert any("standardised by the training images' mean" in note for note in wide.notes)
