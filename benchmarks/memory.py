"""The memory that one call needs."""

from collections.abc import Callable
from pathlib import Path


def peak_memory(side: Callable[[], object]) -> float | None:
    """Megabytes that one call needed above what the process held before it.

    Meaningful in a process that does nothing else, since the high-water mark is one of the
    whole process: what was freed before the call hides as much of the call's own peak.
    None where the operating system does not tell (it is asked through Linux's /proc).
    """
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
