"""Threads of one core each: samples, rows of noise and masks are computed side by side in them.

Where each piece of work is small, two cores gain more from a piece each than from sharing every
operation; and what one piece touches stays in its core's cache.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Below this many numbers a row, starting threads costs more than it saves.
THREADS_FROM = 100_000
# Pieces for each worker: more even out what the cores are given, and each costs a call.
_PIECES = 2
# From this many numbers on, torch shares an operation among its threads.
_SHARED_FROM = 32768

_worker = threading.local()
_lock = threading.Lock()


def bound() -> bool:
    """Whether work must stay in this thread: a worker, or one with modes of the caller's."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return inside() or modes > 0


def inside() -> bool:
    """Whether this thread is a worker: one that waited for workers could wait for itself."""
    return getattr(_worker, "is_one", False)


def pool() -> ThreadPoolExecutor:
    """As many workers as torch has threads; torch's operations run on one core in each."""
    with _lock:
        return _pool(torch.get_num_threads(), os.getpid())


def over_rows(
    work: Callable[[int, int], None], num_rows: int, row_size: int, device: torch.device
) -> None:
    """Calls `work(start, stop)` for ranges that cover all rows, in the workers where that pays.

    Args:
        work: writes rows start … stop − 1 of something; without gradients. It must let go of
            the interpreter lock, as torch's and NumPy's functions do.
        num_rows: how many rows there are.
        row_size: numbers in each.
        device: where they lie; on others than the CPU this thread does the work.

    Raises:
        Exception: whatever `work` raised first, after all of it has come to an end.
    """
    workers = torch.get_num_threads()
    if device.type != "cpu" or min(workers, num_rows) == 1 or row_size < THREADS_FROM or inside():
        work(0, num_rows)
        return
    pieces = min(num_rows, _PIECES * workers)
    bounds = [num_rows * i // pieces for i in range(pieces + 1)]
    results([submit(work, a, b) for a, b in itertools.pairwise(bounds)])


def alone(work: Callable[[], T], like: Iterable[Tensor]) -> T:
    """`work()`, in one worker where it computes with tensors as large as `like`.

    In the place of operations that torch shares among its threads: those wait for more of the
    same, for about eight milliseconds on the cores that the workers would need.
    """
    shared = any(t.numel() > _SHARED_FROM and t.device.type == "cpu" for t in like)
    if not shared or torch.get_num_threads() == 1 or inside():
        return work()
    return submit(work).result()


def submit(work: Callable[..., T], *arguments: Any) -> Future[T]:
    """Has a worker call `work(*arguments)` under this thread's modes, and without gradients."""
    # Modes are a thread's own, and inference tensors can be written to in that mode only.
    inference = torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def call() -> T:
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
            torch.autocast("cpu", dtype=dtype, enabled=autocast),
        ):
            return work(*arguments)

    return pool().submit(call)


def results(waiting: Sequence[Future[T]]) -> list[T]:
    """What the calls returned, or the first error, when all of them have come to an end."""
    for error in [future.exception() for future in waiting]:
        if error is not None:
            raise error
    return [future.result() for future in waiting]


@lru_cache(maxsize=4)
def _pool(workers: int, pid: int) -> ThreadPoolExecutor:
    del pid  # forks lose threads: the key makes a child start its own
    ready = threading.Barrier(workers)

    def start() -> None:
        torch.set_num_threads(1)
        # A thread's first look takes over the number that was set last anywhere: look now.
        torch.get_num_threads()
        _worker.is_one = True
        ready.wait()

    threads = ThreadPoolExecutor(workers, thread_name_prefix="funcbayes")
    for future in [threads.submit(start) for _ in range(workers)]:
        future.result()
    # torch hands the number that was set last to threads that start later.
    torch.set_num_threads(workers)
    return threads
