"""Files of states and posteriors: safetensors with the structure in the header, no pickle.

A file is what safetensors defines (eight bytes with the header's length, a JSON header, the
tensors' bytes), so its readers open it. It is written and read here and not by that package,
which opens a file by its name twice and maps it: a file that is replaced meanwhile would give
one file's header with the other's numbers, and one that is cut short would end the process.
Here the bytes that are verified are those that are returned, and saving copies one leaf at a
time.

The header's entry `funcbayes` holds the structure as JSON, and the SHA-256 of the whole file
with the digest's own digits set to 0. It tells accidents, not forgers: whoever can write the
file can write the digest. A forged file can still do no more than give other numbers, since
nothing in it is executed or imported.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from funcbayes.core import trees
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import Key
from funcbayes.curvature.blocks import (
    Curvature,
    DenseBlock,
    DiagonalBlock,
    EigenKroneckerBlock,
    KroneckerBlock,
    LowRankBlock,
)
from funcbayes.evaluation.conformal import IntervalsState, SetsState
from funcbayes.inference.ensemble import EnsembleState
from funcbayes.inference.laplace import LaplaceState, Noise
from funcbayes.inference.swag import SwagState
from funcbayes.inference.vi import ViState
from funcbayes.posteriors import (
    BlockNormal,
    DenseFactor,
    Diagonal,
    DiagonalFactor,
    DropoutMasks,
    Empirical,
    KroneckerFactor,
    LowRank,
    LowRankFactor,
    Mixture,
)
from funcbayes.posteriors.block_normal import check_groups

# 2 has tuples as keys of dicts. A file without any is written as 1, for older readers.
_FORMAT = 2
# Saving, and JSON, go down by recursion.
_MAX_DEPTH = 100
_NO_DIGEST = b"0" * 64
# The digest comes first, so it lies at one place in every file.
_MAGIC = b'{"__metadata__":{"funcbayes":"{\\"'
_BEFORE_DIGEST = _MAGIC + b'digest\\":\\"'

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_OWN_TYPES = (
    *(SwagState, LaplaceState, Noise, ViState, EnsembleState),
    *(Diagonal, LowRank, BlockNormal, Empirical, Mixture, DropoutMasks),
    *(DiagonalFactor, KroneckerFactor, DenseFactor, LowRankFactor),
    *(Curvature, DiagonalBlock, KroneckerBlock, EigenKroneckerBlock, DenseBlock, LowRankBlock),
    *(SetsState, IntervalsState),
    Key,
)
# A user's class of the same name is another one: its name has no such prefix.
_TYPE_NAMES: dict[type, str] = {kind: f"funcbayes.{kind.__name__}" for kind in _OWN_TYPES}


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Writes a state or a posterior to a file.

    The file appears whole or not at all: until the last byte is on the disk, `path` is what it
    was. (A process that is killed meanwhile leaves a file `.funcbayes-….tmp` in the folder.)

    Args:
        path: where to; a file that is there is replaced.
        state: any state, posterior or curvature of funcbayes, a NamedTuple of your own, or
            dicts (with strings or tuples of strings as keys), lists and tuples of them, at most
            100 levels deep. Leaves are tensors, None, booleans, numbers and strings. Leaves that
            share memory are written once each.

    Raises:
        TypeError: a leaf cannot be stored, or a key is neither a string nor a tuple of strings;
            the message names it.
        ValueError: a leaf has no values: it belongs to a `torch.func` transform, or is a meta
            tensor; `state` is nested too deeply; or `path` is neither a file nor free, but a
            device or a pipe.
        OSError: the folder of `path` does not exist (`FileNotFoundError`) or may not be written
            to (`PermissionError`), `path` is a folder (`IsADirectoryError`), the disk is full.
    """
    encoder = _Encoder()
    structure = encoder.node(state, "state")
    # Widest first, as safetensors has it: every tensor is then aligned.
    leaves = dict(
        sorted(encoder.leaves.items(), key=lambda item: -item[1].dtype.to_real().itemsize)
    )
    header = _header(type(state).__name__, structure, leaves, encoder.format)
    target = _target(path)
    temporary = target.with_name(f".funcbayes-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if target.exists():
                shutil.copymode(target, temporary)
            _write(file, header, leaves.values())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # As it comes, it names the temporary file or none.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def load(
    path: str | os.PathLike[str],
    *,
    model: Model | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    types: Iterable[type] = (),
) -> Any:
    """Reads what `save` wrote, and verifies every byte of it.

    Args:
        path: the file.
        model: the model that the state belongs to: the names and shapes of its parameters are
            compared with those in the file (and its constants with those of an ensemble). None:
            the file is taken as it is.
        device: where the tensors go. None: the CPU, wherever they were when they were saved.
        dtype: a floating-point dtype that all floating-point leaves are converted to. None: as
            they were saved.
        types: NamedTuple classes of your own that the file holds. They are looked up by name
            among these only; nothing is imported by a name in the file.

    Returns:
        An equal state in memory of its own, every leaf contiguous. Leaves that required
        gradients when they were saved do so again, as leaves of a new graph: an optimizer over
        a loaded `ViState` goes on training it.

    Raises:
        FileNotFoundError: there is no such file; `IsADirectoryError` where it is a folder.
        TypeError: `model` is not a `funcbayes.Model`, `dtype` is not a floating-point dtype, or
            `types` holds something else than NamedTuple classes.
        ValueError: the file is truncated, was changed since, was written by a newer funcbayes,
            or is not one of funcbayes; it holds a type that is not in `types`, or a state of
            another model than `model`; or `device` is not available.
    """
    if model is not None:
        check_model(model)
    device = _available(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` is {dtype!r}, expected a floating-point torch.dtype")
    known = _by_name(types)
    structure, tensors = _read(Path(path))

    def finish(name: str, *, is_complex: bool, requires_grad: bool) -> Tensor:
        leaf = tensors.pop(name)  # so that one leaf at a time is there twice
        if requires_grad and not leaf.is_floating_point():
            raise TypeError(f"{name} is {leaf.dtype}")
        if is_complex:
            leaf = _as_complex(leaf)
        leaf = leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)
        return leaf.requires_grad_(requires_grad)

    try:
        state = _decode(structure, known, finish)
    except _UnknownTypeError as error:
        raise ValueError(f"`{path}` holds {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _changed(path, "its structure does not fit its tensors") from error
    if model is not None:
        try:
            _check_fits(state, model)
        except ValueError as error:
            raise ValueError(f"`{path}` does not fit `model`: {error}") from None
    return state


# Writing


class _Encoder:
    """Takes a state apart: the structure as JSON has it, and `leaves`, the tensors by path."""

    def __init__(self) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.format = 1

    def node(self, value: Any, where: str, depth: int = 0) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            _check_storable(value, where)
            self.leaves[where] = value
            return {
                "tensor": where,
                "complex": value.is_complex(),
                "requires_grad": value.requires_grad,
            }
        if depth >= _MAX_DEPTH:
            raise ValueError(
                f"`state` is nested more than {_MAX_DEPTH} levels deep (at `{where[:60]}…`),"
                f" expected at most {_MAX_DEPTH}: flatten it, or does it contain itself?"
            )
        kind, names = type(value), getattr(value, "_fields", None)
        if isinstance(value, tuple) and names is not None:
            named = zip(names, value, strict=True)
            fields = {name: self.node(part, f"{where}.{name}", depth + 1) for name, part in named}
            return {"type": _TYPE_NAMES.get(kind, kind.__name__), "fields": fields}
        if kind in (list, tuple):
            parts = [self.node(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(value)]
            return {kind.__name__: parts}
        if isinstance(value, dict) and kind in (dict, OrderedDict):
            items = value.items()
            parts = [
                [self.key(key, where), self.node(part, f"{where}[{key!r}]", depth + 1)]
                for key, part in items
            ]
            return {kind.__name__: parts}
        raise TypeError(
            f"`{where}` is a {kind.__name__}, which cannot be stored, expected a tensor, None,"
            " a boolean, a number, a string, or a dict, list, tuple or NamedTuple of them"
        )

    def key(self, key: Any, where: str) -> str | list[str]:
        """A string as it is, a tuple of strings as a list: JSON tells the two apart."""
        if type(key) is str:
            return key
        if type(key) is tuple and all(type(part) is str for part in key):
            self.format = 2
            return list(key)
        raise TypeError(
            f"`{where}` has the key {key!r}, a {type(key).__name__}, expected strings or tuples of"
            " strings as keys: only those can be stored"
        )


def _check_storable(leaf: Tensor, where: str) -> None:
    if trees.in_transform(leaf):
        raise ValueError(
            f"`{where}` belongs to a torch.func transform and has no values of its own: call"
            " `save` outside of vmap and grad"
        )
    if leaf.device.type == "meta":
        raise ValueError(f"`{where}` is a meta tensor, which has no values to save")
    if type(leaf) not in (Tensor, nn.Parameter, nn.Buffer):
        kind = f"a {type(leaf).__name__}"
    elif leaf.layout != torch.strided or leaf.is_nested:
        kind = f"a tensor of layout {leaf.layout}"
    elif leaf.dtype.to_real() not in _CODES:
        kind = f"a tensor of dtype {leaf.dtype}"
    else:
        return
    raise TypeError(f"`{where}` is {kind}, which cannot be stored, expected a dense tensor")


def _header(kind: str, structure: Any, leaves: dict[str, Tensor], file_format: int) -> bytes:
    from funcbayes import __version__  # which imports this module

    content = {
        "digest": _NO_DIGEST.decode(),
        "format": file_format,
        "version": __version__,
        "type": kind,
        "structure": structure,
    }
    header: dict[str, Any] = {"__metadata__": {"funcbayes": _json(content)}}
    begin = 0
    for name, leaf in leaves.items():
        end = begin + leaf.numel() * leaf.element_size()
        header[name] = {
            "dtype": _CODES[leaf.dtype.to_real()],
            "shape": [*leaf.shape, 2] if leaf.is_complex() else list(leaf.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = _json(header).encode()
    return text + b" " * (-len(text) % 8)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _write(file: BinaryIO, header: bytes, leaves: Iterable[Tensor]) -> None:
    digest = hashlib.sha256()

    def parts() -> Iterator[bytes | memoryview]:
        yield len(header).to_bytes(8, "little")
        yield header
        yield from map(_contents, leaves)

    for part in parts():
        file.write(part)
        digest.update(part)
    file.seek(8 + len(_BEFORE_DIGEST))
    file.write(digest.hexdigest().encode())


def _contents(leaf: Tensor) -> memoryview:
    leaf = leaf.detach().cpu().resolve_conj().resolve_neg()
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    return leaf.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to replace, behind all links."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"`path` is '{path}', a folder, expected the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"`path` is '{path}', but there is no folder '{target.parent}': make it first"
        )
    if target.exists() and not target.is_file():
        raise ValueError(f"`path` is '{path}', which is no regular file: name another one")
    for place in (target.parent, target):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(
                f"`path` is '{path}', but '{place}' may not be written to: name another file, or"
                " change the permissions"
            )
    return target


# Reading


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The structure, and the tensors by name, in host memory. Everything is verified."""
    if path.is_dir():
        raise IsADirectoryError(f"`path` is '{path}', a folder, expected the name of a file")
    if path.exists() and not path.is_file():  # a pipe would block
        raise _not_ours(path, "it is no regular file")
    if not path.exists():
        raise FileNotFoundError(f"`path` is '{path}', but there is no such file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, path, size)
        content, entries = _parse_header(header, path)
        end = 8 + len(header) + max((entry[-1] for entry in entries.values()), default=0)
        if size < end:
            raise _truncated(path, size, end)
        if size > end:
            raise _changed(path, f"it has {size} bytes, expected {end}")

        at = len(_BEFORE_DIGEST)
        stored = header[at : at + 64]
        digest = hashlib.sha256(len(header).to_bytes(8, "little"))
        digest.update(header[:at] + _NO_DIGEST + header[at + 64 :])
        tensors = {}
        for name, (dtype, shape, begin, end) in entries.items():
            # Named, since it must not follow `torch.set_default_device`.
            leaf = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
            buffer = leaf.numpy().data
            if file.readinto(buffer) != len(buffer):
                raise _truncated(path, file.tell(), size)
            digest.update(buffer)
            tensors[name] = leaf.view(dtype).view(shape)
    if digest.hexdigest().encode() != stored:
        raise _changed(path, "its contents do not have its digest")
    return content["structure"], tensors


def _read_header(file: BinaryIO, path: Path, size: int) -> bytes:
    start = file.read(8 + len(_MAGIC))
    if not _MAGIC.startswith(start[8:]):
        raise _not_ours(path, "it does not begin as one")
    if len(start) < 8 + len(_MAGIC):
        raise _truncated(path, size, 8 + len(_MAGIC))
    length = int.from_bytes(start[:8], "little")
    if size < 8 + length:  # before anything of that length is read
        raise _truncated(path, size, 8 + length)
    file.seek(8)
    return file.read(length)


_Entry = tuple[torch.dtype, list[int], int, int]


def _parse_header(header: bytes, path: Path) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """The structure with what goes with it, and the tensors' entries in the order of the data."""
    try:
        entries = json.loads(header)
        content = json.loads(entries.pop("__metadata__")["funcbayes"])
        written_in = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _changed(path, "its header cannot be read") from error
    if type(written_in) is int and written_in > _FORMAT:
        raise ValueError(
            f"`{path}` was written by a newer funcbayes ({content.get('version')}, format"
            f" {written_in}), expected format {_FORMAT} or older: update funcbayes"
        )
    readable = type(written_in) is int and written_in >= 1
    if not readable or "structure" not in content or not header.startswith(_BEFORE_DIGEST):
        raise _changed(path, "its header cannot be read")
    try:
        parsed = {name: _parse_entry(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _changed(path, "a tensor's entry in its header cannot be read") from error
    parsed = dict(sorted(parsed.items(), key=lambda item: item[1][-2:]))
    at = 0
    for _, _, begin, end in parsed.values():
        if begin != at:
            raise _changed(path, "its tensors do not follow one another")
        at = end
    return content, parsed


def _parse_entry(entry: Any) -> _Entry:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = (*shape, begin, end)
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"shape {shape}, offsets {begin} and {end}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"shape {shape} of {dtype} in {end - begin} bytes")
    return dtype, shape, begin, end


def _as_complex(pairs: Tensor) -> Tensor:
    try:
        return torch.view_as_complex(pairs)
    except RuntimeError as error:  # another shape or dtype
        raise TypeError(str(error)) from None


class _UnknownTypeError(Exception):
    pass


def _decode(node: Any, known: dict[str, type], finish: Callable[..., Tensor]) -> Any:
    def inner(part: Any) -> Any:
        return _decode(part, known, finish)

    match node:
        case None | bool() | int() | float() | str():
            return node
        case {"tensor": name, "complex": is_complex, "requires_grad": requires_grad}:
            return finish(name, is_complex=is_complex, requires_grad=requires_grad)
        case {"list": parts}:
            return [inner(part) for part in parts]
        case {"tuple": parts}:
            return tuple(inner(part) for part in parts)
        case {"dict": parts}:
            return {_key(key): inner(part) for key, part in parts}
        case {"OrderedDict": parts}:
            return OrderedDict((_key(key), inner(part)) for key, part in parts)
        case {"type": name, "fields": fields}:
            kind: Any = _find(name, list(fields), known)
            values = {**getattr(kind, "_field_defaults", {})}
            values.update((field, inner(part)) for field, part in fields.items())
            return kind._make(values[field] for field in kind._fields)
    raise TypeError(f"unknown node {node!r}")


def _key(key: Any) -> str | tuple[str, ...]:
    if isinstance(key, list) and all(isinstance(part, str) for part in key):
        return tuple(key)
    if isinstance(key, str):
        return key
    raise TypeError(f"unknown key {key!r}")


def _find(name: str, fields: list[str], known: dict[str, type]) -> type:
    kind: Any = known.get(name)
    if kind is None:
        raise _UnknownTypeError(
            f"a {name}, which this version of funcbayes does not have: update it"
            if name.startswith("funcbayes.")
            else f"a {name}, which is not in `types`: pass the class, as in types=({name},)"
        )
    given = {*fields, *getattr(kind, "_field_defaults", {})}
    if not set(fields) <= set(kind._fields) <= given:
        ours = name.startswith("funcbayes.")
        raise _UnknownTypeError(
            f"a {name} with the fields {', '.join(fields)}, but the class now has"
            f" {', '.join(kind._fields)}: load it with the "
            f"{'version of funcbayes' if ours else 'class'} that it was saved with"
        )
    return kind


def _by_name(types: Iterable[type]) -> dict[str, type]:
    known = {name: kind for kind, name in _TYPE_NAMES.items()}
    for kind in (types,) if isinstance(types, type) else types:
        if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
            raise TypeError(f"`types` holds {kind!r}, expected classes made with NamedTuple")
        if known.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(
                f"`types` holds two classes named {kind.__name__}, expected one of each name"
            )
    return known


def _available(device: torch.device | str | int | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`device` is {str(device)!r}, which is not available here ({reason}): leave it out to"
            " load to the CPU"
        ) from None
    return found


def _check_fits(state: Any, model: Model) -> None:
    found = list(_parameter_trees(state, "state"))
    if not found and hasattr(state, "_fields"):
        raise ValueError(
            f"`state` is a {type(state).__name__}, which has neither `mean` nor `params` to compare"
            " with: load it without `model`"
        )
    for name, tree, like, batch_dims in found or [("state", state, "params", 0)]:
        if like == "names":
            check_groups(tree, trees.names(model.params), name=name)
        else:
            trees.check_like(tree, getattr(model, like), name=name, batch_dims=batch_dims)


# The trees beside `mean` or `params` that are like the parameters, and their leading axes.
_LIKE_PARAMS: dict[type, dict[str, int]] = {
    SwagState: {"sum_sq_dev": 0, "deviations": 1},
    ViState: {"rho": 0},
    Diagonal: {"std": 0},
    LowRank: {"std": 0, "factor": 1},
}


def _parameter_trees(state: Any, where: str) -> Iterator[tuple[str, Any, str, int]]:
    """What has to be like the model's params, constants or names, and its leading axes."""
    fields = getattr(state, "_fields", ())
    members = isinstance(state, EnsembleState | Empirical)
    batch_dims = int(members)
    for name in ("mean", "params"):
        if name in fields:
            yield f"{where}.{name}", getattr(state, name), "params", batch_dims
    for name, leading in _LIKE_PARAMS.get(type(state), {}).items():
        yield f"{where}.{name}", getattr(state, name), "params", leading
    for kind, name in ((BlockNormal, "factors"), (Curvature, "blocks")):
        if isinstance(state, kind):
            yield f"{where}.{name}", getattr(state, name), "names", 0
    if isinstance(state, LaplaceState):
        yield from _parameter_trees(state.curvature, f"{where}.curvature")
    if members and state.constants:
        yield f"{where}.constants", state.constants, "constants", batch_dims
    if {"mean", "params"} & set(fields) or isinstance(state, Curvature | Tensor):
        return
    if isinstance(state, dict):
        parts = [(f"{where}[{key!r}]", part) for key, part in state.items()]
    elif fields:
        parts = [(f"{where}.{name}", part) for name, part in zip(fields, state, strict=True)]
    elif isinstance(state, list | tuple):
        parts = [(f"{where}[{i}]", part) for i, part in enumerate(state)]
    else:
        return
    for name, part in parts:
        yield from _parameter_trees(part, name)


# What can be wrong with a file


def _truncated(path: Path, size: int, expected: int) -> ValueError:
    return ValueError(
        f"`{path}` is truncated: it has {size} bytes, expected at least {expected}; copy or save it"
        " again"
    )


def _changed(path: str | os.PathLike[str], how: str) -> ValueError:
    return ValueError(f"`{path}` was changed after it was saved: {how}; copy or save it again")


def _not_ours(path: Path, why: str) -> ValueError:
    return ValueError(
        f"`{path}` is not a file of funcbayes: {why}, expected one that `funcbayes.save` wrote"
    )
