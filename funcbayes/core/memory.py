"""How much memory there is, asked before it is taken."""

import os
import time
from functools import lru_cache

import torch

# Seconds for which an answer holds: to ask takes as long as a small network's forward pass.
_LOOK_EVERY = 0.1


def available_bytes(device: torch.device) -> int:
    """Memory that can be had on a device without swapping, by estimate.

    Args:
        device: CPU or CUDA; for others there is no telling, and the answer is very large.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 2**62
    return _available_on_cpu(int(time.monotonic() / _LOOK_EVERY))


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


def gigabytes(num_bytes: float) -> str:
    """A number of bytes for a message."""
    if num_bytes < 1e8:
        return f"{num_bytes / 1e6:.3g} MB"
    return f"{num_bytes / 1e9:.3g} GB"
