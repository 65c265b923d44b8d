"""Randomness as a value: immutable keys, and draws that are functions of a key.

A key is the entropy and the spawn path of a NumPy `SeedSequence`; it seeds a fresh generator
wherever numbers are needed, so no draw reads or moves global state. The same key gives the
same numbers on one kind of device; CPU and CUDA generators differ from each other.

Source:
    O'Neill (2015), "Developing a seed_seq alternative", whose hash `SeedSequence` uses;
    Box and Muller (1958), doi:10.1214/aoms/1177706645, for normal numbers on CPU, from the bits
    of SFC64 (Doty-Humphrey's "small fast chaotic" generator, NumPy's implementation);
    the split / fold_in vocabulary is that of JAX.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from funcbayes.core import workers

# Paths are words behind a tag, so that no chain of splits and folds spells another's path, nor
# that of the seeds of a parent's items.
_SPLIT, _FOLD, _ITEMS = 0, 1, 2
# Items of a parent whose seeds are drawn together: hashing for each would take longer than what
# many of them draw.
_ITEMS_AT_ONCE = 256
_WORD = 2**32
# The most that the Box–Muller transform takes at a time: in larger blocks its steps leave the
# cache, in smaller ones threads wait for each other's calls.
_BLOCK_BYTES = 2**20
# The most words for which NumPy's function of less overhead pays: it holds the interpreter's lock.
_FEW = 2048
# The words of random bits, unsigned and signed, that a floating number is made of.
_WORDS: dict[Any, tuple[Any, Any]] = {
    np.float32: (np.uint32, np.int32),
    np.float64: (np.uint64, np.int64),
}
_ARRAYS = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}
_OF = {array: dtype for dtype, array in _ARRAYS.items()}


class Key(NamedTuple):
    """An immutable source of randomness.

    Attributes:
        entropy: the seed, 0 ≤ entropy < 2¹²⁸.
        path: how the key was derived from the seed; empty for `key(seed)`.
    """

    entropy: int
    path: tuple[int, ...]


OWN_RANDOMNESS = (
    "the network draws from torch's global generator in evaluation mode, which no key governs:"
    " draw by torch's dropout functions, or make the random numbers an input"
)

KeyLike = Key | SupportsIndex


class Coupled(NamedTuple):
    """A key whose samples come in groups that depend on each other, as `antithetic` makes it.

    Attributes:
        key: what the groups are drawn from.
        size: samples in a group: 2 or 4.
    """

    key: Key
    size: int


RowsKey = Key | SupportsIndex | Coupled
"""What rows of normal numbers, and samples of normal posteriors, are drawn from."""


def key(seed: SupportsIndex) -> Key:
    """Makes a key from a seed.

    Args:
        seed: an integer, 0 ≤ seed < 2¹²⁸.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is out of range.
    """
    return Key(_integer(seed, "seed", 2**128), ())


def as_key(value: object, *, name: str = "key") -> Key:
    """Takes a key, or an integer in place of `key(integer)`.

    Raises:
        TypeError: `value` is neither.
        ValueError: `value` is an integer out of range.
    """
    if isinstance(value, Key):
        return value
    if isinstance(value, Coupled):
        raise TypeError(
            f"`{name}` is a Coupled key, which only samples of normal posteriors can be drawn"
            " from: pass the key itself"
        )
    return Key(_integer(value, name, 2**128), ())


def as_rows_key(value: object, *, name: str = "key") -> Key | Coupled:
    """Takes what `as_key` does, and a coupled key."""
    return value if isinstance(value, Coupled) else as_key(value, name=name)


def antithetic(key: KeyLike) -> Coupled:
    """A key whose samples come in pairs, mean + d and mean − d.

    For `funcbayes.predict` and for `sample` of normal posteriors. Each sample has the
    distribution that it has without; the mean over an even number is exact for what is linear
    in the parameters, and half as much noise is drawn.

    Source:
        Hammersley and Morton (1956), doi:10.1017/S0305004100031455.
    """
    return Coupled(as_key(key), 2)


def orthogonal(key: KeyLike) -> Coupled:
    """A key whose samples come in fours: two antithetic pairs with orthogonal noise.

    As `antithetic`, and a quarter of the noise is drawn. The second pair's noise is the first
    one's, turned by a right angle in pairs of coordinates, of which one that is left over keeps
    its value.
    """
    return Coupled(as_key(key), 4)


def split(key: KeyLike, num: int = 2) -> list[Key]:
    """Derives `num` independent keys.

    Raises:
        ValueError: `num` is negative.
    """
    num = _integer(num, "num", _WORD)
    parent = as_key(key)
    return [Key(parent.entropy, (*parent.path, _SPLIT, i)) for i in range(num)]


def fold_in(key: KeyLike, data: SupportsIndex) -> Key:
    """Derives the key of a numbered item: a step, a sample, a member.

    Args:
        key: the parent.
        data: the number, 0 ≤ data < 2⁶⁴.
    """
    parent = as_key(key)
    data = _integer(data, "data", 2**64)
    return Key(parent.entropy, (*parent.path, _FOLD, data % _WORD, data // _WORD))


def seed(key: KeyLike) -> int:
    """A 63-bit integer that depends on the whole key, for seeding other generators."""
    parent = as_key(key)
    sequence = np.random.SeedSequence(parent.entropy, spawn_key=parent.path)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(key: KeyLike, device: torch.device | str | None = None) -> torch.Generator:
    """A fresh `torch.Generator` on `device`, seeded by the key.

    torch's CPU generator takes 32 bits of a seed, so that two of n keys share a stream with
    probability n²/2³³: 1e-6 for a hundred, 1e-2 for ten thousand.
    """
    return torch.Generator(torch.device(device or "cpu")).manual_seed(seed(key))


class Stream:
    """Random bits that follow from a key, on one device; each call goes on where the last ended.

    On CPU they are those of SFC64 with 192 bits of seed, which come in half the time of torch's
    generator; elsewhere those of the device's `torch.Generator`.
    """

    def __init__(self, key: KeyLike, device: torch.device) -> None:
        """Starts the stream of a key."""
        own = as_key(key)
        if device.type == "cpu":
            # NumPy's stubs do not know that any such object will do.
            self._bits = np.random.SFC64(_seed_sequence(own))  # pyright: ignore[reportArgumentType]
        else:
            self._generator = generator(own, device)

    def words(self, out: Any) -> None:
        """Fills int64 memory, as `memory` gives it, with random bits."""
        if isinstance(out, Tensor):
            out.random_(-(2**63), None, generator=self._generator)
        else:
            out[:] = self.draw(len(out)).view(np.int64)

    def draw(self, num: int) -> Any:
        """As many words, in an array of their own; on CPU."""
        if num <= _FEW:
            return self._bits.random_raw(num)
        bits = np.random.Generator(self._bits)
        return bits.integers(0, 2**64 - 1, num, dtype=np.uint64, endpoint=True)

    def normal(self, out: Any) -> None:
        """Fills a floating row, as `memory` gives it, with standard normal numbers.

        On CPU they go up to 6.8 standard deviations in float32, and to 9.5 in float64.
        """
        if isinstance(out, Tensor):
            out.normal_(generator=self._generator)
        else:
            _fill_normal(out[None], [self])


class _Words(ISeedSequence):
    """A seed that is there already."""

    def __init__(self, words: Any) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """The seed: what SFC64 asks for are three words of 64 bits."""
        return self._words


def _seed_sequence(key: Key) -> ISeedSequence:
    """What seeds the stream of a key: an item's seed comes from its parent's."""
    # Read from the front: only there it is known which words are tags.
    last, end = 0, 0
    while end < len(key.path):
        last, end = end, end + (2 if key.path[end] == _SPLIT else 3)
    if end != len(key.path) or not key.path or key.path[last] != _FOLD:
        return np.random.SeedSequence(key.entropy, spawn_key=key.path)
    block, place = divmod(key.path[-2] + _WORD * key.path[-1], _ITEMS_AT_ONCE)
    return _Words(_seeds_of_items(Key(key.entropy, key.path[:last]), block)[place])


@lru_cache(maxsize=64)
def _seeds_of_items(parent: Key, block: int) -> Any:
    """Seeds of the items that follow one another from `block · _ITEMS_AT_ONCE` on."""
    path = (*parent.path, _ITEMS, block % _WORD, block // _WORD)
    words = np.random.SFC64(np.random.SeedSequence(parent.entropy, spawn_key=path))
    return words.random_raw(3 * _ITEMS_AT_ONCE).reshape(_ITEMS_AT_ONCE, 3)


def _fill_normal(out: Any, streams: Sequence[Stream]) -> None:
    """Fills an array `[streams, numbers]` with normal numbers, each row from its own stream."""
    unsigned, signed = _WORDS[out.dtype.type]
    num, size = out.shape[1], out.itemsize
    blocks = max(1, -(-num * size // _BLOCK_BYTES))
    # As many rows at a time as a block holds: a step takes as long to call as for 10,000 numbers.
    at_once = max(1, _BLOCK_BYTES // max(1, num * size))
    for i in range(blocks):
        a, b = num * i // blocks, num * (i + 1) // blocks
        pairs = -(-(b - a) // 2)
        for first in range(0, len(out), at_once):
            rows = slice(first, first + at_once)
            bits = [stream.draw(-(-2 * pairs * size // 8)) for stream in streams[rows]]
            # One row as such: of several, NumPy copies what is changed in place.
            words, part = (np.stack(bits), out[rows]) if len(bits) > 1 else (bits[0], out[first])
            words = words.view(unsigned)
            angles = words[..., pairs : 2 * pairs].view(signed)
            _box_muller(words[..., :pairs], angles, part[..., a:b])


def _box_muller(lengths: Any, angles: Any, out: Any) -> None:
    """Writes normal numbers `[*rows, numbers]`, made of two words `[*rows, pairs]` for a pair.

    The memory of `lengths` is used up.
    """
    real, size = out.dtype.type, out.itemsize
    pairs = lengths.shape[-1]
    whole = out.shape[-1] - pairs
    # (w + ½)/2³²: never 0, and near 0 as fine as the bits are.
    radius = lengths.view(real)
    np.copyto(radius, lengths, casting="unsafe")
    radius += real(0.5)
    radius *= real(0.5 ** (8 * size))
    np.log(radius, out=radius)
    radius *= real(-2)
    np.sqrt(radius, out=radius)
    cosines, sines = out[..., :pairs], out[..., pairs:]
    np.copyto(cosines, angles, casting="unsafe")
    cosines *= real(math.pi / 2 ** (8 * size - 1))
    np.sin(cosines[..., :whole], out=sines)
    np.cos(cosines, out=cosines)
    cosines *= radius
    sines *= radius[..., :whole]


def outside(device: torch.device) -> AbstractContextManager[Any]:
    """Draws here are no operations that `vmap` or `grad` around them see.

    NumPy's, on CPU, never are. Elsewhere `vmap` would refuse torch's, or draw for each entry
    what a key gives once.
    """
    if device.type == "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """Memory that a stream may fill: an array on CPU, a tensor elsewhere.

    What torch's functions return under `torch.func.grad` is wrapped, so that NumPy cannot see
    its memory; hence a tensor is made of the array when it is full, by `tensor`.
    """
    if device.type == "cpu":
        return np.empty(tuple(shape), _ARRAYS[dtype])
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def tensor(filled: Any) -> Tensor:
    """The tensor of `memory`, without a copy."""
    if isinstance(filled, Tensor):
        return filled
    # An array without entries has strides that torch would take over.
    return (
        torch.from_numpy(filled)
        if filled.size
        else torch.empty(filled.shape, dtype=_OF[filled.dtype.type], device="cpu")
    )


def normal(
    key: KeyLike,
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    """Standard normal numbers of the given shape; inside `vmap`, the same for all entries.

    In a dtype narrower than float32 they are those of float32 on CPU, rounded.
    """
    dtype, device = dtype or torch.get_default_dtype(), torch.device(device or "cpu")
    with outside(device):
        row = memory([math.prod(shape)], _drawn(dtype, device), device)
        Stream(key, device).normal(row)
    return tensor(row).view(tuple(shape)).to(dtype)


def uniform(
    key: KeyLike,
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    """Numbers uniform on [0, 1) of the given shape."""
    return torch.rand(
        tuple(shape), generator=generator(key, device), dtype=dtype, device=device or "cpu"
    )


def bernoulli(
    key: KeyLike,
    probability: float,
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "..."]:
    """Booleans that are True with the given probability.

    Raises:
        ValueError: `probability` is outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"`probability` is {probability}, expected a number in [0, 1]")
    # float64, so that a probability near 0 or 1 is not rounded away.
    return uniform(key, shape, dtype=torch.float64, device=device) < probability


def randint(
    key: KeyLike,
    low: int,
    high: int,
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> Int[Tensor, "..."]:
    """Integers uniform on {low, …, high − 1}.

    Raises:
        ValueError: `high` is not above `low`.
    """
    if not low < high:
        raise ValueError(f"`high` is {high}, expected more than `low`, which is {low}")
    gen = generator(key, device)
    return torch.randint(low, high, tuple(shape), generator=gen, device=device or "cpu")


def permutation(
    key: KeyLike, num: int, *, device: torch.device | str | None = None
) -> Int[Tensor, " num"]:
    """The integers 0 … num − 1 in random order."""
    return torch.randperm(num, generator=generator(key, device), device=device or "cpu")


def normal_rows(
    key: RowsKey,
    start: int,
    stop: int,
    num: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Float[Tensor, "rows num"]:
    """Standard normal numbers, one stream a row: row i depends on `(key, start + i)` alone.

    This is what makes a posterior sample independent of the chunk it is drawn in. Inside `vmap`
    they are the same for all entries.

    Args:
        key: the parent key; row i is drawn from `fold_in(key, start + i)`. Of a coupled key, so
            is each group of rows.
        start: number of the first row.
        stop: one past the number of the last row.
        num: numbers in a row.
        dtype: floating dtype, default torch's default. In float64 the stream is another one.
        device: where the numbers are drawn.
        out: contiguous `[stop − start, num]` buffer to fill and return; `dtype` and `device`
            are then the buffer's.

    Raises:
        ValueError: `out` has another shape.
    """
    found = as_rows_key(key)
    parent, size = found if isinstance(found, Coupled) else (found, 1)
    shape = (stop - start, num)
    if out is None:
        dtype, device = dtype or torch.get_default_dtype(), torch.device(device or "cpu")
        if torch.compiler.is_compiling():
            return _normal_rows(_words_of(parent), size, *(start, stop, num, dtype, device))
    elif out.shape == shape:
        dtype, device = out.dtype, out.device
    else:
        raise ValueError(f"`out` has shape {tuple(out.shape)}, expected {shape}")
    drawn = _drawn(dtype, device)
    if out is None or drawn != dtype:
        with outside(device):
            rows = memory(shape, drawn, device)
    else:
        rows = out.detach().numpy() if device.type == "cpu" else out

    def fill(first: int, last: int) -> None:
        # The first rows of groups are drawn, and the others made of them. What comes before the
        # first group that begins here is made of noise of its own.
        begin = min(first + -(start + first) % size, last)
        draw(rows[first:begin], range(first, begin))
        draw(rows[begin:last:size], range(begin, last, size))
        for i in range(first, last):
            member = (start + i) % size
            if member:
                _couple(rows[i if i < begin else i - member], rows[i], member)

    def draw(into: Any, numbers: Iterable[int]) -> None:
        streams = [Stream(fold_in(parent, (start + i) // size), device) for i in numbers]
        if device.type == "cpu":
            _fill_normal(into, streams)
        else:
            for row, stream in zip(into, streams, strict=True):
                stream.normal(row)

    with outside(device):
        workers.over_rows(fill, len(rows), num, device)
    if out is None:
        return tensor(rows).to(dtype)
    return out if drawn == dtype else out.copy_(tensor(rows))


def _words_of(key: Key) -> list[int]:
    """A key as integers that a graph can hold: four words of entropy, then the path."""
    entropy = [key.entropy // _WORD**i % _WORD for i in range(4)]
    return [*entropy, *key.path]


def _key_of(words: Sequence[int]) -> Key:
    return Key(sum(word * _WORD**i for i, word in enumerate(words[:4])), tuple(words[4:]))


@torch.library.custom_op("funcbayes::normal_rows", mutates_args=())
def _normal_rows(
    words: Sequence[int],
    size: int,
    start: int,
    stop: int,
    num: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`normal_rows` as one node of a compiled graph, which cannot look into NumPy."""
    key = _key_of(words)
    rows_key = key if size == 1 else Coupled(key, size)
    return normal_rows(rows_key, start, stop, num, dtype=dtype, device=device)


@_normal_rows.register_fake
def _(
    words: Sequence[int],
    size: int,
    start: int,
    stop: int,
    num: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(stop - start, num, dtype=dtype, device=device)


def word_rows(keys: Sequence[Key], before: Sequence[int], num: int, device: torch.device) -> Tensor:
    """What streams of several keys give in a later call to `words`, as one node of a graph.

    Args:
        keys: whose streams; their paths have one length.
        before: how many words each of the earlier calls took.
        num: words in this call.
        device: where the streams are.

    Returns:
        int64 `[keys, num]`.
    """
    return _word_rows(
        [word for key in keys for word in _words_of(key)], len(keys), before, num, device
    )


@torch.library.custom_op("funcbayes::word_rows", mutates_args=())
def _word_rows(
    words: Sequence[int], num_keys: int, before: Sequence[int], num: int, device: torch.device
) -> Tensor:
    rows = memory((num_keys, num), torch.int64, device)
    width = len(words) // num_keys
    for i, row in enumerate(rows):
        stream = Stream(_key_of(words[i * width : (i + 1) * width]), device)
        for earlier in before:
            stream.words(memory((earlier,), torch.int64, device))
        stream.words(row)
    return tensor(rows)


@_word_rows.register_fake
def _(
    words: Sequence[int], num_keys: int, before: Sequence[int], num: int, device: torch.device
) -> Tensor:
    return torch.empty(num_keys, num, dtype=torch.int64, device=device)


def _couple(first: Any, out: Any, member: int) -> None:
    """Writes a later member of a group, made of the first one's noise, which it may replace."""
    if member >= 2:
        half = len(first) // 2
        top, bottom = first[:half], first[len(first) - half :]
        turned = (
            (bottom.copy(), top.copy())
            if isinstance(first, np.ndarray)
            else (bottom.clone(), top.clone())
        )
        middle = first[half : len(first) - half]
        out[half : len(out) - half] = middle
        out[:half] = turned[0]
        out[len(out) - half :] = turned[1]
        out[:half] *= -1
    elif out is not first:
        out[:] = first
    if member % 2:
        out *= -1


def _drawn(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that numbers of `dtype` are drawn in."""
    return dtype if device.type != "cpu" or dtype in _ARRAYS else torch.float32


def _integer(value: object, name: str, bound: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"`{name}` is a bool, expected a funcbayes key or an integer")
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(
            f"`{name}` is a {type(value).__name__}, expected a non-negative integer"
            " (or, for a key, the result of `funcbayes.random.key`)"
        ) from None
    if not 0 <= number < bound:
        raise ValueError(f"`{name}` is {number}, expected 0 ≤ {name} < 2**{bound.bit_length() - 1}")
    return number
