"""The memory that one call needs."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def peak_memory(side: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that one call needed on a device above what was held there before it.

    On the CPU, what the process held; meaningful in one that does nothing else: memory that was
    freed before the call but is still the process's own hides as much of the call's peak.
    On CUDA, what torch's allocator had given out.
    None where the operating system does not tell (it is asked through Linux's /proc).
    """
    return _on_cuda(side, device) if device.type == "cuda" else _on_cpu(side)


def _on_cuda(side: Callable[[], object], device: torch.device) -> float:
    # cuBLAS gets its workspace with the first product, and keeps it: it is not the call's.
    square = torch.ones(8, 8, device=device)
    torch.mm(square, square)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    side()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


def _on_cpu(side: Callable[[], object]) -> float | None:
    with suppress(OSError):  # where it is not allowed, the mark is the whole process's so far
        Path("/proc/self/clear_refs").write_text("5")
    held = _status_megabytes("VmRSS")
    if held is None:
        return None
    side()
    # Not `getrusage`'s ru_maxrss: that one survives `exec`, so a child process would
    # report the peak of the parent that started it.
    peak = _status_megabytes("VmHWM")
    return None if peak is None else max(0.0, peak - held)


def _status_megabytes(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return None
