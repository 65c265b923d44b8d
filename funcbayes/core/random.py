"""Randomness as a value: immutable keys, and draws that are functions of a key.

A key is the entropy and the spawn path of a NumPy `SeedSequence`; it seeds a fresh
`torch.Generator` wherever numbers are needed, so no draw reads or moves global state.
The same key gives the same numbers on one kind of device; CPU and CUDA generators
differ from each other.

Source:
    O'Neill (2015), "Developing a seed_seq alternative", whose hash `SeedSequence` uses;
    the split / fold_in vocabulary is that of JAX.
"""

import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Paths are words behind a tag, so that no chain of splits and folds spells another's path.
_SPLIT, _FOLD = 0, 1
_WORD = 2**32
# Below this many numbers a row, starting threads costs more than it saves.
_THREADS_FROM = 100_000


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
    return Key(_integer(value, name, 2**128), ())


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


def normal(
    key: KeyLike,
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    """Standard normal numbers of the given shape."""
    return torch.randn(
        tuple(shape), generator=generator(key, device), dtype=dtype, device=device or "cpu"
    )


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
    key: KeyLike,
    start: int,
    stop: int,
    num: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Float[Tensor, "rows num"]:
    """Standard normal numbers, one stream a row: row i depends on `(key, start + i)` alone.

    This is what makes a posterior sample independent of the chunk it is drawn in.

    Args:
        key: the parent key; row i is drawn from `fold_in(key, start + i)`.
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
    parent = as_key(key)
    if out is None:
        out = torch.empty(stop - start, num, dtype=dtype, device=device or "cpu")
    elif out.shape != (stop - start, num):
        raise ValueError(f"`out` has shape {tuple(out.shape)}, expected {(stop - start, num)}")
    rows = out.unbind(0)
    generators = [generator(fold_in(parent, start + i), out.device) for i in range(len(rows))]

    def fill(i: int) -> None:
        rows[i].normal_(generator=generators[i])

    fill_rows(fill, len(rows), num, out.device)
    return out


def fill_rows(
    fill: Callable[[int], None], num_rows: int, row_size: int, device: torch.device
) -> None:
    """Calls `fill(i)` for every row, on CPU in threads where the rows are long enough.

    torch draws from a generator on one core, and lets go of the interpreter lock meanwhile.
    """
    workers = torch.get_num_threads()
    if device.type == "cpu" and min(workers, num_rows) > 1 and row_size >= _THREADS_FROM:
        # Inference mode is a thread's own, and its tensors can be written in it only.
        inference = torch.is_inference_mode_enabled()

        def work(i: int) -> None:
            with torch.inference_mode(inference):
                fill(i)

        list(_pool(workers, os.getpid()).map(work, range(num_rows)))
    else:
        for i in range(num_rows):
            fill(i)


@lru_cache(maxsize=2)
def _pool(workers: int, pid: int) -> ThreadPoolExecutor:
    # `pid` keys the cache: threads do not survive a fork.
    del pid
    return ThreadPoolExecutor(workers, thread_name_prefix="funcbayes-noise")


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
