"""Laws 2 and 3 for predictions: not the chunks nor the strategy, only the samples matter."""

from collections.abc import Sequence
from typing import Any

import torch

from funcbayes.core import random, trees
from funcbayes.core.data import batch_size
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.core.random import Key, KeyLike
from funcbayes.posteriors import Draws
from funcbayes.posteriors.base import check_num_samples
from funcbayes.prediction.predict import predict
from funcbayes.testing.laws.comparing import check_same, needs

# The message of `predict` where vmap has no rule for the network.
_REFUSED = "vmap cannot batch"


def check_chunk_invariant(
    model: Model,
    posterior: Any,
    x: Any,
    *,
    key: KeyLike = 0,
    num_samples: int = 7,
    chunk_sizes: Sequence[int] = (1, 2, 3, 7),
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that predictions depend neither on the chunk size nor on how many samples there are.

    Chunks are those of the batched pass; of a network that vmap cannot batch only the second
    half is tested.

    Args:
        model: the network.
        posterior: over its parameters, with `draw` and `draw_size`.
        x: inputs.
        key: the key to sample with.
        num_samples: how many samples.
        chunk_sizes: the sizes that are compared with chunks of one sample.
        rtol: allowed relative to each number.
        atol: allowed beside it. None for both: half of the digits of the dtype (√eps) of the
            largest number. A network in float64 makes the sharper test.

    Raises:
        TypeError: the posterior lacks `draw` or `draw_size`.
        AssertionError: the law does not hold; the message names chunk, sample and entry.
    """
    law = "check_chunk_invariant"
    needs(law, posterior, "draw", "draw_size")
    check_num_samples(num_samples)
    close = {"law": law, "rtol": rtol, "atol": atol, "samples": True}

    def outputs(strategy: str, num: int, chunk: int | None) -> Any:
        options: Any = {"strategy": strategy, "num_samples": num, "chunk_size": chunk}
        return predict(model, posterior, x, key=key, return_samples=True, **options).samples

    cause = (
        "`draw(key, start, stop)` uses something of the whole range, such as one generator or one"
        " mask for all, or a moment over its samples; make sample i of (key, i) alone"
    )
    try:
        one_by_one = outputs("vmap", num_samples, 1)
    except ValueError as error:
        if _REFUSED not in str(error):
            raise
        one_by_one = outputs("auto", num_samples, None)
    else:
        for chunk in chunk_sizes:
            found = outputs("vmap", num_samples, chunk)
            what = f"predictions with chunk_size={chunk} against chunk_size=1"
            check_same(found, one_by_one, what=what, cause=cause, **close)
    for fewer in sorted({1, num_samples // 2, num_samples - 1} - {0}):
        expected = trees.tensor_map(lambda leaf, n=fewer: leaf[:n], one_by_one)
        what = f"predictions with num_samples={fewer} against the first of {num_samples}"
        found = outputs("auto", fewer, None)
        check_same(found, expected, what=what, cause=cause, **close)


def check_vectorised_equals_loop(
    model: Model,
    posterior: Any,
    x: Any,
    *,
    key: KeyLike = 0,
    num_samples: int = 7,
    strategies: Sequence[str] = ("auto", "vmap", "threads"),
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Checks that `funcbayes.predict` gives what a plain Python loop over samples gives.

    The loop is written out here: one `draw` and one `model.apply` a sample.

    Args:
        model: the network.
        posterior: over its parameters, with `draw` and `draw_size`.
        x: inputs.
        key: the key to sample with.
        num_samples: how many samples.
        strategies: those of `predict` that are compared with the loop. "vmap" is left out where
            vmap has no rule for the network.
        rtol: allowed relative to each number.
        atol: allowed beside it. None for both: half of the digits of the dtype (√eps) of the
            largest number. A network in float64 makes the sharper test.

    Raises:
        TypeError: the posterior lacks `draw` or `draw_size`.
        AssertionError: the law does not hold; the message names strategy, sample and entry.
    """
    law = "check_vectorised_equals_loop"
    needs(law, posterior, "draw", "draw_size")
    check_num_samples(num_samples)
    parent = random.as_key(key)
    expected = _loop(model, posterior, x, parent, num_samples)
    for strategy in strategies:
        options: Any = {"strategy": strategy, "num_samples": num_samples, "return_samples": True}
        try:
            found = predict(model, posterior, x, key=parent, **options).samples
        except ValueError as error:
            if strategy == "vmap" and _REFUSED in str(error):
                continue
            raise
        check_same(
            found,
            expected,
            law=law,
            what=f"predictions with strategy={strategy!r} against a plain loop",
            cause="the network or `draw` does something else for many samples than for one: a"
            " shared mask, a statistic over what it takes for the batch, a state it keeps from"
            " call to call",
            rtol=rtol,
            atol=atol,
            samples=True,
        )


@torch.no_grad()
def _loop(model: Model, posterior: Any, x: Any, key: Key, num: int) -> Any:
    results = []
    for i in range(num):
        drawn: Draws = posterior.draw(key, i, i + 1)
        params, constants = trees.index((drawn.params, drawn.constants), 0)
        # Copies: a posterior may draw the next sample into the same memory, and networks
        # may return views.
        outputs = _outputs(model, params, constants, drawn, x)
        results.append(trees.clone(outputs))
    return trees.stack(results)


def _outputs(model: Model, params: Any, constants: Any, drawn: Draws, x: Any) -> Any:
    masks = drawn.masks
    if params is None:
        params = model.params if masks is None else masks.params
    if masks is None:
        return model.apply(params, x, constants)
    rows = [x]
    if masks.per == "batch":  # every row meets the same mask, as a batch of one
        rows = [
            trees.tensor_map(lambda leaf, r=r: leaf[r : r + 1], x) for r in range(batch_size(x))
        ]
    outputs = []
    for row in rows:
        with KeyedDropout([masks.keys[0]], rate=masks.rate, always=True):
            outputs.append(model.apply(params, row, constants))
    return trees.tree_map(lambda *parts: torch.cat(parts), *outputs)
