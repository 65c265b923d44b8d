"""How much memory there is, asked before it is taken; and what is freed, kept for the next use."""

import os
import time
from functools import lru_cache

import numpy as np
import torch

# The largest block whose release teaches glibc, less what it writes beside it.
_TEACHES = 2**25 - 2**16
# Seconds for which an answer holds: to ask takes as long as a small network's forward pass.
_LOOK_EVERY = 0.1


def available_bytes(device: torch.device) -> int:
    """Memory that can be had on a device without swapping, by estimate.

    Args:
        device: CPU or CUDA; for others there is no telling, and the answer is very large.
    """
    now = int(time.monotonic() / _LOOK_EVERY)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _available_on_cuda(index, now)
    if device.type != "cpu":
        return 2**62
    return _available_on_cpu(now)


@lru_cache(maxsize=32)  # more than there are devices
def _available_on_cuda(index: int, now: int) -> int:
    del now  # a new number makes it look again
    # The driver takes for used what torch's allocator keeps for the next tensor.
    kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return int(torch.cuda.mem_get_info(index)[0]) + kept


@lru_cache(maxsize=1)
def _available_on_cpu(now: int) -> int:
    del now  # a new number makes it look again
    found = [2**62]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    found.append(int(line.split()[1]) * 1024)
    except OSError:  # not Linux
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found)


@lru_cache(maxsize=1)
def keep_freed() -> None:
    """Has the C library keep the memory of freed tensors of up to 32 MB.

    glibc gives every block back to the system that is larger than the largest one that it has
    seen freed so far, 128 kB at first, and each page of a new block costs a fault: a third of
    the time of a small network's training step. So one block, of which no page is ever
    touched, is taken and freed. Other C libraries do not mind.
    """
    np.empty(_TEACHES, np.uint8)


def gigabytes(num_bytes: float) -> str:
    """A number of bytes for a message."""
    if num_bytes < 1e8:
        return f"{num_bytes / 1e6:.3g} MB"
    return f"{num_bytes / 1e9:.3g} GB"
