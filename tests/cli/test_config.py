"""Options from the command line, a file and the defaults."""

import itertools
import shlex
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcbayes.cli import main
from funcbayes.cli.config import (
    METHOD_NAMES,
    OPTIONS,
    Configuration,
    command_line,
    resolve,
    to_toml,
)
from funcbayes.cli.errors import UsageError

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
labels = st.lists(texts, min_size=1, max_size=3, unique=True).map(tuple)
configurations = st.builds(
    Configuration,
    data=texts,
    target=st.none() | texts,
    task=st.sampled_from([None, "classification", "regression"]),
    methods=st.sets(st.sampled_from(METHOD_NAMES)).map(
        lambda names: tuple(m for m in METHOD_NAMES if m in names)
    ),
    samples=st.integers(1, 10**9),
    epochs=st.none() | st.integers(1, 10**6),
    seed=st.integers(0, 2**62),
    seeds=st.integers(1, 100),
    ood_classes=st.none() | labels,
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
)


def written(tmp_path, text):
    path = tmp_path / "options.toml"
    path.write_text(text, encoding="utf-8")
    return path


@given(configurations)
def test_a_written_file_gives_the_configuration_again(tmp_path_factory, configuration):
    path = written(tmp_path_factory.mktemp("config"), to_toml(configuration))
    assert resolve({}, path) == configuration


def test_the_command_line_wins_over_the_file_over_the_defaults(tmp_path):
    path = written(tmp_path, 'samples = 5\nseed = 3\nood_classes = [1, "two"]\nmethod = "vi"\n')
    got = resolve({"samples": 7, "method": ["ensemble", "swag", "swag"], "seed": None}, path)
    assert got == Configuration(
        samples=7, seed=3, ood_classes=("1", "two"), methods=("swag", "ensemble")
    )
    assert resolve({}, None) == Configuration()


def test_a_file_of_data_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text("a,b\n")
    monkeypatch.chdir(tmp_path)
    entries = tomllib.loads(to_toml(Configuration(data="mine.csv")))
    assert entries["data"] == str(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample = 3", "has an entry 'sample', which is no option: did you mean 'samples'?"),
        ("methods = ['vi']", "'methods', which is no option: did you mean 'method'?"),
        ("output = 'here'", "'output', which is no option: choose from data, target, task,"),
        ("samples = 'many'", "entry 'samples': it is 'many', expected an integer of at least 1"),
        ("samples = true", "entry 'samples': it is true, expected an integer of at least 1"),
        ("epochs = 2.5", "entry 'epochs': it is 2.5, expected an integer of at least 1"),
        ("seed = -1", "entry 'seed': it is -1, expected an integer of at least 0"),
        ("data = 3", "entry 'data': it is 3, expected text in quotes"),
        ("data = 2020-01-01", "entry 'data': it is 2020-01-01, expected text in quotes"),
        ("method = ['swagg']", "there is no method 'swagg': did you mean 'swag'?"),
        ("method = 3", "entry 'method': it is 3, expected names among swag, laplace"),
        ("method = [3]", "entry 'method': it is 3, expected text in quotes"),
        ("ood-classes = [1.5]", "entry 'ood-classes': it is [1.5], expected a list of labels"),
        ("device = 'gpu'", "entry 'device': it is 'gpu', expected auto, cpu, cuda or cuda:N"),
        ("task = 'regress'", "there is no task 'regress': did you mean 'regression'?"),
        ("samples 3", "options.toml' is not TOML (Expected '='"),
    ],
)
def test_a_wrong_entry_is_one_sentence(text, message, tmp_path, capsys):
    path = written(tmp_path, text)
    assert main(["compare", "--config", str(path), "--output", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["missing.toml", ""])
def test_a_file_that_cannot_be_read(name, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read \(.+\): name a TOML file"):
        resolve({}, tmp_path / name)


def test_the_command_is_quoted_for_a_shell():
    configuration = Configuration(
        data="my data.csv", methods=("vi", "swag"), ood_classes=("it's", "b c"), epochs=4
    )
    words = shlex.split(command_line(configuration, Path("an output")))
    assert words[:4] == ["funcbayes", "compare", "--data", "my data.csv"]
    assert words[words.index("--ood-classes") + 1 :][:2] == ["it's", "b c"]
    assert words[-2:] == ["--output", "an output"]
    assert [b for a, b in itertools.pairwise(words) if a == "--method"] == ["vi", "swag"]


def test_every_field_is_an_option():
    assert tuple(OPTIONS.values()) == Configuration._fields
