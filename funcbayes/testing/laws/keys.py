"""Law 2 for draws: one sample, one key."""

import math
import random as python_random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcbayes.core import random, trees
from funcbayes.core.random import Key, KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors import Draws
from funcbayes.posteriors.base import check_num_samples, noise_format
from funcbayes.testing.laws.comparing import DRAW_ROUNDINGS, check_same, fail, needs, place
from funcbayes.testing.laws.snapshots import global_generators, same_value

_OTHER_KEYS = 8


def check_key_determinism(posterior: Any, *, key: KeyLike = 0, num_samples: int = 8) -> None:
    """Checks that sample i of a posterior is a function of `(key, i)` and of nothing else.

    In turn: two calls of `sample` agree bit for bit, and so do an integer and its
    `funcbayes.random.key`; global generators (torch's, NumPy's, Python's) are neither moved nor
    read; fewer samples are a prefix of more; `draw`, where there is one, gives the same rows
    for any range, with and without a buffer, masks and constants included; other keys, derived
    ones among them, give other samples; and samples that were taken do not change when more
    are. Rows that come from another call may differ by 16 units in the last place of a leaf's
    largest number, as a matrix product of another size does.

    Args:
        posterior: has `sample`, and perhaps `draw` and `draw_size`.
        key: the key to sample with.
        num_samples: how many samples, at least 2.

    Raises:
        TypeError: `posterior` has no `sample`.
        ValueError: `num_samples` is below 2.
        AssertionError: the law does not hold; the message says where.
    """
    law = "check_key_determinism"
    needs(law, posterior, "sample")
    if check_num_samples(num_samples) < 2:
        raise ValueError(f"`num_samples` is {num_samples}, expected at least 2")
    parent = random.as_key(key)
    live, first = _sample(law, posterior, parent, num_samples, global_seed=1)
    _check_globals(law, posterior, parent, num_samples, first)
    if not parent.path:
        _, same = _sample(law, posterior, parent.entropy, num_samples, global_seed=1)
        what = f"`sample({parent.entropy}, …)` against `sample(funcbayes.random.key(…), …)`"
        cause = "the key is used as it comes; take either by funcbayes.random.as_key"
        check_same(same, first, law=law, what=what, cause=cause, exact=True, samples=True)
    _check_rows(law, posterior, parent, num_samples, first)
    _check_other_keys(law, posterior, parent, num_samples, first)
    check_same(
        live,
        first,
        law=law,
        what="samples that were taken, after more were",
        cause="they are views of memory that the next call writes to; return fresh tensors",
        exact=True,
        samples=True,
    )


def _sample(
    law: str, posterior: Any, key: KeyLike, num: int, *, global_seed: int
) -> tuple[TensorTree, TensorTree]:
    """Samples as they came, and copies of them; global generators are put back."""
    with _seeded_globally(global_seed):
        before = global_generators()
        try:
            samples = posterior.sample(key, num)
        except (TypeError, ValueError, RuntimeError) as error:
            fail(
                law,
                f"`sample({key!r}, {num})` raised {error!r}",
                "the key is used as it comes; take either form by funcbayes.random.as_key, and"
                " make a generator of it by funcbayes.random.generator",
            )
        for name, state in global_generators().items():
            if name in before and not same_value(before[name], state):
                fail(
                    law,
                    f"`sample` moved {name}",
                    "random numbers are drawn without a generator; draw by funcbayes.random, or"
                    " pass generator=funcbayes.random.generator(key)",
                )
    for name, leaf in trees.leaves_with_names(samples):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num:
            came = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            fail(law, f"`sample(key, {num})`, {place(name)}: {came}, expected shape ({num}, …)")
    return samples, trees.clone(samples)


@contextmanager
def _seeded_globally(seed: int) -> Iterator[None]:
    """Seeds the global generators, and puts them back."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    legacy, python = np.random.get_state(), python_random.getstate()  # noqa: NPY002

    with torch.random.fork_rng(devices=cuda):
        # Not `torch.manual_seed`: it leaves a seed behind for CUDA, where that is not in use.
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed)  # noqa: NPY002
        python_random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(legacy)  # noqa: NPY002
            python_random.setstate(python)


def _check_globals(law: str, posterior: Any, key: Key, num: int, first: TensorTree) -> None:
    """Two calls agree, whatever the global generators hold."""
    _, second = _sample(law, posterior, key, num, global_seed=2)
    if _equal(first, second):
        return
    # Again as the first time: does it come back?
    _, third = _sample(law, posterior, key, num, global_seed=1)
    cause = (
        "a global generator is read, by torch.initial_seed() perhaps; draw by funcbayes.random"
        if _equal(first, third)
        else "the posterior holds a generator or another state that a call moves; make a generator"
        " in each call by funcbayes.random.generator(key)"
    )
    what = "two calls of `sample` with one key"
    check_same(second, first, law=law, what=what, cause=cause, exact=True, samples=True)


def _check_rows(law: str, posterior: Any, key: Key, num: int, whole: TensorTree) -> None:
    """Prefixes, ranges and buffers give the same rows."""
    same = {"law": law, "roundings": DRAW_ROUNDINGS, "samples": True}
    shared = (
        "one generator serves several samples; make one a sample, by"
        " funcbayes.random.fold_in(key, i) or funcbayes.random.normal_rows"
    )
    for fewer in sorted({1, num // 2, num - 1}):
        _, part = _sample(law, posterior, key, fewer, global_seed=1)
        what = f"`sample(key, {fewer})` against the first rows of `sample(key, {num})`"
        expected = trees.tensor_map(lambda leaf, n=fewer: leaf[:n], whole)
        check_same(part, expected, what=what, cause=shared, **same)
    if not hasattr(posterior, "draw"):
        return
    all_rows = _draw(law, posterior, key, 0, num, None)
    size = getattr(posterior, "draw_size", 0)
    for start, stop in sorted({(0, num), (0, 1), (1, 2), (1, num), (num // 2, num)}):
        expected = trees.tensor_map(lambda leaf, a=start, b=stop: leaf[a:b], whole)
        for buffered in (False, True) if size else (False,):
            out = None
            if buffered:
                dtype, device = noise_format(whole)
                # NaN, so that what is read before it is written shows.
                out = torch.full((stop - start, size), math.nan, dtype=dtype, device=device)
            drawn = _draw(law, posterior, key, start, stop, out)
            what = f"`draw(key, {start}, {stop}{', buffer' if buffered else ''})`"
            cause = shared
            if buffered:
                cause = "the buffer is read before it is written, or too few numbers are written"
            if drawn.params is not None:
                against = f" against rows {start} to {stop - 1} of `sample(key, {num})`"
                check_same(drawn.params, expected, what=what + against, cause=cause, **same)
            against = f", constants and masks, against rows of `draw(key, 0, {num})`"
            check_same(
                _beside(drawn),
                _beside(all_rows, start, stop),
                what=what + against,
                cause=cause,
                **same,
            )


def _draw(law: str, posterior: Any, key: Key, start: int, stop: int, out: Tensor | None) -> Draws:
    # Only draws without a buffer are differentiable.
    with torch.set_grad_enabled(torch.is_grad_enabled() and out is None):
        drawn = posterior.draw(key, start, stop, out)
    if not isinstance(drawn, Draws):
        came = type(drawn).__name__
        fail(law, f"`draw` returned a {came}, expected a funcbayes.posteriors.Draws")
    return drawn


def _beside(drawn: Draws, start: int = 0, stop: int | None = None) -> Any:
    """What a draw holds beside parameters, or some rows of it."""
    constants = trees.tensor_map(lambda leaf: leaf[start:stop], drawn.constants)
    if drawn.masks is None:
        return constants, None
    masks = drawn.masks
    return constants, (masks.keys[start:stop], masks.rate, masks.per, masks.params)


def _check_other_keys(law: str, posterior: Any, key: Key, num: int, first: TensorTree) -> None:
    if not _is_random(posterior, first):
        return
    groups = {
        "other seeds": [random.key((key.entropy + 1 + i) % 2**128) for i in range(_OTHER_KEYS)],
        "keys derived by fold_in": [random.fold_in(key, i) for i in range(_OTHER_KEYS)],
        "keys derived by split": random.split(key, _OTHER_KEYS),
    }
    for name, others in groups.items():
        # Several, since members of a small ensemble may come in one order for two keys.
        if all(_equal(_sample(law, posterior, k, num, global_seed=1)[1], first) for k in others):
            fail(
                law,
                f"{_OTHER_KEYS} {name} gave the samples of {key!r}",
                "the key, or its `path`, is ignored; make generators by"
                " funcbayes.random.generator(key), seeds by funcbayes.random.seed(key)",
            )


def _is_random(posterior: Any, samples: TensorTree) -> bool:
    """Whether another key can be expected to give other samples."""
    if hasattr(posterior, "variance"):
        variances = trees.leaves(posterior.variance)
        return any(map(_shows, variances, trees.leaves(samples)))
    return any(bool((leaf != leaf[:1]).any()) for leaf in trees.leaves(samples))


def _shows(variance: Tensor, x: Tensor) -> bool:
    """Whether a stated variance is more than rounding at the size of the numbers."""
    if not x.numel():
        return False
    rounding = torch.finfo(x.dtype).eps * x.double().abs().amax(0)
    return bool((variance.double().sqrt() > 4 * rounding).any())


def _equal(a: TensorTree, b: TensorTree) -> bool:
    try:
        check_same(a, b, law="", what="", exact=True)
    except AssertionError:
        return False
    return True
