"""Threads of one core each: samples, rows of noise and masks are computed side by side in them.

Where each piece of work is small, two cores gain more from a piece each than from sharing every
operation; and what one piece touches stays in its core's cache.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

# Below this many numbers a row, starting threads costs more than it saves.
THREADS_FROM = 100_000
# Pieces for each worker: more even out what the cores are given, and each costs a call.
_PIECES = 2

_worker = threading.local()
_lock = threading.Lock()


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
    # Modes are a thread's own, and inference tensors can be written to in that mode only.
    inference = torch.is_inference_mode_enabled()

    def piece(start: int, stop: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(start, stop)

    pieces = min(num_rows, _PIECES * workers)
    bounds = [num_rows * i // pieces for i in range(pieces + 1)]
    threads = pool()
    waiting = [threads.submit(piece, a, b) for a, b in itertools.pairwise(bounds)]
    errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error


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
