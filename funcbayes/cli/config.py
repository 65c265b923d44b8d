"""The configuration of `funcbayes compare`: command line over file over defaults."""

import difflib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from funcbayes.cli.errors import UsageError

METHOD_NAMES = (
    "swag",
    "laplace",
    "laplace-head",
    "laplace-diagonal",
    "laplace-kronecker",
    "vi",
    "dropout",
    "ensemble",
)
TASK_NAMES = ("classification", "regression")


class Configuration(NamedTuple):
    """What determines the figures.

    Attributes:
        data: name of a bundled data set, or path of a file.
        target: the column of a file to predict; None looks for one.
        task: "classification" or "regression"; None lets the data decide.
        methods: names of the methods in the order of the table, without the plain network.
        samples: posterior samples a prediction.
        epochs: passes over the training split; None for as many as the data need.
        seed: the first seed, of splits, weights and draws.
        seeds: how many seeds, from the first on.
        ood_classes: labels that are held out of the training; None for the data set's own.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    data: str = "digits"
    target: str | None = None
    task: Literal["classification", "regression"] | None = None
    methods: tuple[str, ...] = METHOD_NAMES
    samples: int = 30
    epochs: int | None = None
    seed: int = 0
    seeds: int = 1
    ood_classes: tuple[str, ...] | None = None
    device: str = "auto"


OPTIONS = {
    ("method" if field == "methods" else field.replace("_", "-")): field
    for field in Configuration._fields
}
"""From an option's name, on the command line and in a file, to its field."""


def resolve(arguments: Mapping[str, Any], file: Path | None) -> Configuration:
    """Puts the configuration together.

    Args:
        arguments: from an option's name to its value; None where it was not given.
        file: a TOML file with the same names; None for none.

    Raises:
        UsageError: the file cannot be read, or an entry is unknown or does not fit.
    """
    chosen = {} if file is None else _read(file)
    chosen |= {name: check(name, value) for name, value in arguments.items() if value is not None}
    return Configuration(**{OPTIONS[name]: value for name, value in chosen.items()})


def to_toml(configuration: Configuration) -> str:
    """The text of a file that gives this configuration; what is None is left out."""
    entries = _given(configuration)
    # A name of a file holds wherever the configuration is read.
    if Path(configuration.data).is_file():
        entries["data"] = os.path.abspath(configuration.data)
    # A JSON string, number or list of strings is one in TOML too, but for the character 127.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()]
    return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"


def command_line(configuration: Configuration, output: Path) -> str:
    """The command that makes the same figures, quoted for a shell."""
    words = ["funcbayes", "compare"]
    for name, value in _given(configuration).items():
        if name == "method":
            words += [word for method in value for word in ("--method", method)]
        elif isinstance(value, list):
            words += [f"--{name}", *value]
        else:
            words += [f"--{name}", str(value)]
    return shlex.join([*words, "--output", str(output)])


def check(name: str, value: object) -> Any:
    """Checks one option's value, from the command line or a file.

    Args:
        name: the option's.
        value: an integer, a text, or for several values a list of texts.

    Returns:
        The value as `Configuration` has it.

    Raises:
        ValueError: it does not fit; the message says what came and what was expected.
    """
    match name:
        case "samples" | "epochs" | "seeds":
            return _integer(value, least=1)
        case "seed":
            return _integer(value, least=0)
        case "method":
            named = [value] if isinstance(value, str) else value
            if not isinstance(named, list | tuple):
                raise ValueError(f"it is {value!r}, expected names among {', '.join(METHOD_NAMES)}")
            for one in named:
                one_of(METHOD_NAMES, _text(one), "method")
            # In the order of the table, each once.
            return tuple(method for method in METHOD_NAMES if method in named)
        case "ood-classes":
            labels = [value] if isinstance(value, str | int) else value
            # A label that is a number may be written as one in a file.
            if not isinstance(labels, list | tuple) or any(
                isinstance(label, bool) or not isinstance(label, str | int) for label in labels
            ):
                raise ValueError(f"it is {value!r}, expected a list of labels")
            return tuple(dict.fromkeys(map(str, labels)))
        case "task":
            return one_of(TASK_NAMES, _text(value), "task")
        case "device":
            text = _text(value)
            number = text.removeprefix("cuda:")
            numbered = number != text and re.fullmatch("[0-9]{1,3}", number)
            if text not in ("auto", "cpu", "cuda") and not numbered:
                raise ValueError(f"it is '{text}', expected auto, cpu, cuda or cuda:N")
            return text
        case _:
            return _text(value)


def one_of(names: Collection[str], text: str, kind: str) -> str:
    """The text itself, if it is one of the names.

    Raises:
        ValueError: it is none; the message says which one it may be meant to be.
    """
    if text in names:
        return text
    raise ValueError(
        f"there is no {kind} '{text}': {did_you_mean(text, names)}choose from {', '.join(names)}"
    )


def did_you_mean(text: str, names: Collection[str]) -> str:
    """A question with a blank behind it, or nothing where no name is close."""
    close = difflib.get_close_matches(text, names, n=1)
    return f"did you mean '{close[0]}'? " if close else ""


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            entries = tomllib.load(stream)
    except OSError as error:
        raise UsageError(
            f"argument --config: '{file}' cannot be read ({error.strerror}): name a TOML file "
            "such as the config.toml of an earlier output"
        ) from error
    # Not only TOMLDecodeError: a number of 5000 digits, brackets 3000 deep.
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"argument --config: '{file}' is not TOML ({error}): write lines such as samples = 30"
        ) from error
    checked = {}
    for written, value in entries.items():
        name = written.replace("_", "-")
        if name not in OPTIONS:
            raise UsageError(
                f"'{file}' has an entry '{written}', which is no option: "
                f"{did_you_mean(name, OPTIONS)}choose from {', '.join(OPTIONS)}"
            )
        try:
            checked[name] = check(name, value)
        except ValueError as error:
            raise UsageError(f"'{file}', entry '{written}': {error}") from error
    return checked


def _given(configuration: Configuration) -> dict[str, Any]:
    values = ((name, getattr(configuration, field)) for name, field in OPTIONS.items())
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values
        if value is not None
    }


def _integer(value: object, *, least: int) -> int:
    number = value
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"it is {_shown(value)}, expected an integer of at least {least}")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it is {_shown(value)}, expected text in quotes")
    return value


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    # As TOML has it, where that is JSON's way.
    plain = isinstance(value, bool | int | float | Sequence)
    return json.dumps(value, default=str) if plain else str(value)
