"""One function over many samples in one batched call, or in a loop where vmap has no rule."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcbayes.core import random, trees, uses

logger = logging.getLogger("funcbayes")


def map_samples(
    fn: Callable[..., Any], *stacked: Any, keyed: bool = False, quiet: bool = False
) -> Any:
    """Applies `fn` to every entry of the leading axis: `vmap(fn)(*stacked)` where that works.

    What vmap cannot batch (`nn.LSTM`, data-dependent control flow) runs as a loop, with one
    log line that says so. Differentiable either way.

    Args:
        fn: takes one entry of each tree of `stacked`; pure.
        stacked: trees whose tensor leaves share a leading axis; others are passed on.
        keyed: whether `fn` draws numbers from keyed generators, as `KeyedDropout` does.
            vmap then lets random functions pass, also those of the network itself.
        quiet: whether the log line is left to the caller.

    Returns:
        The results, stacked along a new leading axis.

    Raises:
        ValueError: `fn` draws random numbers, and is not `keyed`.
    """
    axes = trees.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, stacked)
    try:
        with uses.batchable():
            return vmap(fn, in_dims=axes, randomness="same" if keyed else "error")(*stacked)
    except (RuntimeError, NotImplementedError) as error:
        if "randomness" in str(error):
            raise ValueError(random.OWN_RANDOMNESS) from error
        if not is_unbatchable(error):
            raise
        if not quiet:
            log_unbatchable(error)
    num = trees.leading_size(stacked)
    return trees.stack([fn(*trees.index(stacked, i)) for i in range(num)])


def is_unbatchable(error: Exception) -> bool:
    """Whether an error says that vmap has no rule for what the function does."""
    text = str(error)
    if is_out_of_memory(error) or "randomness" in text:
        return False
    return any(sign in text for sign in ("vmap", "atching rule", "functorch", "BatchedTensor"))


def log_unbatchable(error: Exception) -> None:
    """Says that a loop takes the place of the batched call, and why."""
    reason = str(error).split("\n")[0].split(". ")[0]
    logger.warning("vmap cannot batch this model (%s): its samples run one by one", reason)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
