"""One forward pass under sampled parameters, buffers and masks, in each way to run it."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from funcbayes.core import trees, uses, workers
from funcbayes.core.batching import is_out_of_memory, map_samples
from funcbayes.core.data import batch_size
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.core.random import Coupled, Key
from funcbayes.posteriors import Draws, MaskStreams
from funcbayes.posteriors.base import noise_format
from funcbayes.prediction import recording

# The most memory that a model keeps for noise from one prediction to the next.
_KEPT_BYTES = 2**27
# What is known of a format before there is a recording.
_UNSEEN, _SEEN = object(), object()


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


def _recorded(model: Model, draws: Draws, x: Any) -> Any:
    """What `all_samples` gives; from the third pass of a form on by a recording."""
    inputs = recording.inputs_of(model, draws, x)
    if inputs is None:
        return all_samples(model, draws, x)
    scratch, key = model._scratch, recording.form(inputs)
    found = scratch.recordings.get(key, _UNSEEN)
    if found is _UNSEEN:
        scratch.remember(scratch.recordings, key, _SEEN)
    elif found is _SEEN:
        outputs, made = recording.record(lambda: all_samples(model, draws, x), inputs)
        scratch.remember(scratch.recordings, key, made)
        return outputs
    elif found is not None:
        return found(inputs)
    return all_samples(model, draws, x)


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


def evaluate(
    model: Model,
    posterior: Any,
    key: Key | Coupled | None,
    x: Any,
    start: int,
    stop: int,
    *,
    batched: bool,
    small: bool = False,
) -> Any:
    """Outputs `[samples, batch, *out]` of samples start … stop − 1.

    Args:
        model: the network.
        posterior: what the samples are drawn from.
        key: their key.
        x: inputs.
        start: number of the first sample.
        stop: one past the number of the last one.
        batched: whether they run in one batched pass; otherwise there is one sample.
        small: whether a batched pass takes so little that a recording of it pays.
    """
    with _kept_buffer(model, posterior, stop - start) as rows:
        draws = posterior.draw(key, start, stop, rows)
        if batched:
            run = _recorded if small else all_samples
            return apart(run(model, draws, x), rows)
        outputs = apart(one_sample(model, only(draws), x), rows)
    return trees.tensor_map(lambda leaf: leaf.unsqueeze(0), outputs)


def apart(outputs: Any, buffer: Tensor | None) -> Any:
    """The outputs, copied where they are views of the buffer, which the next draw fills."""
    if buffer is None:
        return outputs
    memory = buffer.untyped_storage().data_ptr()
    return trees.tensor_map(
        lambda leaf: leaf.clone() if leaf.untyped_storage().data_ptr() == memory else leaf, outputs
    )


def noise_buffer(model: Model, posterior: Any, rows: int) -> Tensor | None:
    """An uninitialised buffer for `rows` samples; None where the posterior needs none."""
    size = posterior.draw_size
    if not size:
        return None
    dtype, device = noise_format(model.params)
    with torch.inference_mode(False):  # so that it may be filled again in any mode
        return torch.empty(rows, size, dtype=dtype, device=device)


@contextmanager
def _kept_buffer(model: Model, posterior: Any, rows: int) -> Iterator[Tensor | None]:
    """A buffer as `noise_buffer` gives it, on CPU in memory that the model keeps for the next time.

    Elsewhere kernels still wait to read it when this ends, and a prediction on another stream
    would not wait for them; there, torch's allocator keeps memory, and minds the streams.
    """
    size = rows * posterior.draw_size
    dtype, device = noise_format(model.params)
    if not size or device.type != "cpu":
        yield noise_buffer(model, posterior, rows)
        return
    kept = model._scratch.buffers
    try:
        flat = kept.pop()
    except IndexError:
        flat = None
    if flat is None or flat.numel() < size or (flat.dtype, flat.device) != (dtype, device):
        buffer = noise_buffer(model, posterior, rows)
        flat = None if buffer is None else buffer.view(-1)
    try:
        yield None if flat is None else flat[:size].view(rows, -1)
    finally:
        if flat is not None:
            others = sum(other.numel() for other in tuple(kept))
            if (others + flat.numel()) * flat.element_size() <= _KEPT_BYTES:
                kept.append(flat)


def in_turn(
    run: Callable[[int, int], Any], start: int, stop: int, chunk_size: int
) -> Iterator[Any]:
    """`run(a, b)` of ranges of samples, one after the other.

    Where memory runs out, the rest goes on in ranges of half the size.
    """
    while start < stop:
        size = min(chunk_size, stop - start)
        try:
            outputs = run(start, start + size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            chunk_size = size // 2
            continue
        start += size
        yield outputs


def in_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in one worker: for small work between passes in threads.

    torch shares some operations, softmax among them, however small they are, and the threads
    that had a part wait for more on the cores that the workers need.
    """
    if workers.bound():
        return work(*arguments)
    return workers.submit(work, *arguments).result()


def in_threads(
    run: Callable[[int, int], Any], start: int, stop: int, chunk_size: int
) -> Iterator[Any]:
    """`run(a, b)` of ranges of samples in order, one range a worker at a time.

    Each worker keeps its samples in its own core's cache, which one call for all samples does
    not.
    """
    if workers.bound():
        yield from in_turn(run, start, stop, chunk_size)
        return

    def work(a: int, b: int) -> Any:
        return trees.concatenate(list(in_turn(run, a, b, b - a)))

    at_once = 2 * torch.get_num_threads()
    waiting: list[Future[Any]] = []
    try:
        for a in range(start, stop, chunk_size):
            waiting.append(workers.submit(work, a, min(a + chunk_size, stop)))
            # A bounded queue, so that outputs do not pile up before they are merged.
            if len(waiting) > at_once:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()
        for future in waiting:
            if not future.cancelled():
                future.exception()  # waits: nothing goes on behind the caller's back
