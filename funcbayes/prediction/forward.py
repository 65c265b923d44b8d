"""One forward pass under sampled parameters, buffers and masks, in each way to run it."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcbayes.core import trees, uses
from funcbayes.core.batching import map_samples
from funcbayes.core.data import batch_size
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.core.random import Key
from funcbayes.posteriors import Draws, MaskStreams
from funcbayes.posteriors.base import noise_format

# The most memory that a model keeps for noise from one prediction to the next.
_KEPT_BYTES = 2**27


def only(draws: Draws) -> Draws:
    """The one sample that `draws` holds, its leaves without the sample axis (as views)."""
    params, constants = trees.index((draws.params, draws.constants), 0)
    return Draws(params, constants, draws.masks)


def one_sample(
    model: Model, sample: Draws, x: Any, on_draw: Callable[[], None] | None = None
) -> Any:
    """Outputs `[batch, *out]` of a sample that `only` gave.

    Args:
        model: the network.
        sample: what replaces the model's parameters and constants, and the masks.
        x: inputs.
        on_draw: called before each dropout mask is drawn.
    """
    return _forward(model, sample.params, sample.constants, sample.masks, None, x, on_draw)


def all_samples(model: Model, draws: Draws, x: Any) -> Any:
    """Outputs `[samples, batch, *out]` in one batched forward pass.

    What does not depend on the sample is evaluated once: everything below the first uncertain
    parameter, and everything before the first dropout.
    """

    def one(params: Any, constants: Any, index: Tensor | None) -> Any:
        return _forward(model, params, constants, draws.masks, index, x, None)

    index = None
    if draws.masks is not None:
        device = trees.tensor_leaves(model.params)[0].device
        index = torch.arange(len(draws.masks.keys), device=device)
    arguments = (draws.params, draws.constants, index)
    axes = tuple(None if argument is None else 0 for argument in arguments)
    # Masks are drawn inside, from generators of their own: "same" lets that pass.
    randomness = "error" if draws.masks is None else "same"
    # Where masks are drawn, their interpreter does what `batchable` does.
    with uses.batchable() if draws.masks is None else nullcontext():
        return vmap(one, in_dims=axes, randomness=randomness)(*arguments)


def _forward(
    model: Model,
    params: Any,
    constants: Any,
    masks: MaskStreams | None,
    index: Tensor | None,
    x: Any,
    on_draw: Callable[[], None] | None,
) -> Any:
    if params is None:
        params = model.params if masks is None else masks.params
    if masks is None:
        return model.apply(params, x, constants)

    def run(inputs: Any) -> Any:
        dropout = KeyedDropout(masks.keys, index, rate=masks.rate, always=True, on_draw=on_draw)
        with dropout:
            return model.apply(params, inputs, constants)

    # Without rows there is nothing to map over, and the shapes come from the network.
    if masks.per == "row" or batch_size(x) == 0:
        return run(x)

    # One mask for all rows: each row is a batch of one, and all of them meet the same mask.
    def one_row(row: Any) -> Any:
        outputs = run(trees.tensor_map(lambda leaf: leaf.unsqueeze(0), row))
        return trees.tensor_map(lambda leaf: leaf.squeeze(0), outputs)

    return map_samples(one_row, x, keyed=True, quiet=True)


def noise_buffer(model: Model, posterior: Any, rows: int) -> Tensor | None:
    """An uninitialised buffer for `rows` samples; None where the posterior needs none."""
    size = posterior.draw_size
    if not size:
        return None
    dtype, device = noise_format(model.params)
    with torch.inference_mode(False):  # so that it may be filled again in any mode
        return torch.empty(rows, size, dtype=dtype, device=device)


@contextmanager
def kept_buffer(model: Model, posterior: Any, rows: int) -> Iterator[Tensor | None]:
    """A buffer as `noise_buffer` gives it, in memory that the model keeps for the next time."""
    size = rows * posterior.draw_size
    try:
        flat = model._scratch.buffers.pop()
    except IndexError:
        flat = None
    dtype, device = noise_format(model.params)
    if flat is None or flat.numel() < size or (flat.dtype, flat.device) != (dtype, device):
        buffer = noise_buffer(model, posterior, rows)
        flat = None if buffer is None else buffer.view(-1)
    try:
        yield None if flat is None or not size else flat[:size].view(rows, -1)
    finally:
        if flat is not None and flat.numel() * flat.element_size() <= _KEPT_BYTES:
            model._scratch.buffers.append(flat)


def apart(outputs: Any, buffer: Tensor | None) -> Any:
    """The outputs, copied where they are views of the buffer, which the next draw fills."""
    if buffer is None:
        return outputs
    memory = buffer.untyped_storage().data_ptr()
    return trees.tensor_map(
        lambda leaf: leaf.clone() if leaf.untyped_storage().data_ptr() == memory else leaf, outputs
    )


def one_by_one(
    model: Model, posterior: Any, key: Key | None, x: Any, start: int, stop: int
) -> Iterator[Any]:
    """Outputs of samples start … stop − 1 in order: the plain loop."""
    buffer = noise_buffer(model, posterior, 1)
    for i in range(start, stop):
        yield apart(one_sample(model, only(posterior.draw(key, i, i + 1, buffer)), x), buffer)


def in_threads(
    model: Model, posterior: Any, key: Key | None, x: Any, start: int, stop: int
) -> Iterator[Any]:
    """Outputs of samples start … stop − 1 in order, one sample a worker at a time.

    Each worker keeps its sample in its own core's cache, which a batched call with many rows
    does not, and holds one sample's parameters in memory.
    """
    if getattr(_worker, "is_one", False) or torch._C._len_torch_function_stack() > 0:
        # A worker that waited for workers could wait for itself; and a mode of the caller's
        # is its own thread's.
        yield from one_by_one(model, posterior, key, x, start, stop)
        return
    workers = torch.get_num_threads()
    buffers = threading.local()
    inference = torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(i: int) -> Any:
        # Modes are a thread's own: carry the caller's over.
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
            torch.autocast("cpu", dtype=dtype, enabled=autocast),
        ):
            if not hasattr(buffers, "row"):
                buffers.row = noise_buffer(model, posterior, 1)
            sample = only(posterior.draw(key, i, i + 1, buffers.row))
            return apart(one_sample(model, sample, x), buffers.row)

    with _pools_lock:
        pool = _single_threaded_pool(workers, os.getpid())
    waiting: list[Future[Any]] = []
    try:
        for i in range(start, stop):
            waiting.append(pool.submit(work, i))
            # A bounded queue, so that outputs do not pile up before they are merged.
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()
        for future in waiting:
            if not future.cancelled():
                future.exception()  # waits: nothing goes on behind the caller's back


_worker = threading.local()
_pools_lock = threading.Lock()


@lru_cache(maxsize=4)
def _single_threaded_pool(workers: int, pid: int) -> ThreadPoolExecutor:
    """Workers whose torch operations run on one core each; `pid` because forks lose threads."""
    del pid
    ready = threading.Barrier(workers)

    def start() -> None:
        torch.set_num_threads(1)
        # A thread's first look takes over the number that was set last anywhere: look now.
        torch.get_num_threads()
        _worker.is_one = True
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="funcbayes-samples")
    for future in [pool.submit(start) for _ in range(workers)]:
        future.result()
    # torch hands the number that was set last to threads that start later.
    torch.set_num_threads(workers)
    return pool
