"""The memory that one call needs."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def peak_memory(side: Callable[[], object]) -> float | None:
    """Megabytes that one call needed above what the process held before it.

    Meaningful in a process that does nothing else: memory that was freed before the call but
    is still the process's own hides as much of the call's peak.
    None where the operating system does not tell (it is asked through Linux's /proc).
    """
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
