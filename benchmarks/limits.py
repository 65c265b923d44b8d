"""What the machine can do at most, measured in the same run as what is compared with it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils import benchmark

MIN_SECONDS = 0.5


class Work(NamedTuple):
    """What a job cannot do without.

    Attributes:
        operations: of its matrix products and convolutions, one multiplication and one addition
            being two; what all samples share counts once.
        bytes: of parameters: what is sampled is written once and read once, members are read.
    """

    operations: float
    bytes: float


class Limits(NamedTuple):
    """Rates, a second.

    Attributes:
        operations: the best of matrix products and a convolution, in float32 as torch is set: on
            CUDA with the tensor cores' TF32 where that is allowed.
        bytes: read and written by a copy that is larger than the caches.
    """

    operations: float
    bytes: float


def measure(device: torch.device, *, min_seconds: float = MIN_SECONDS) -> Limits:
    """Both rates of a device, the current one, with as many threads as torch has."""
    rates = []
    # What takes two cores a millisecond is over on a GPU before it is full.
    sizes, images = ((1024, 2048), 64) if device.type == "cpu" else ((4096, 8192), 1024)
    for size in sizes:
        a = torch.randn(size, size, device=device)
        rates.append(2 * size**3 / _seconds("a @ a", {"a": a}, min_seconds))
    x = torch.randn(images, 64, 32, 32, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device)
    operations = 2 * images * 64 * 9 * 64 * 32 * 32
    call = {"conv2d": F.conv2d, "x": x, "weight": weight}
    rates.append(operations / _seconds("conv2d(x, weight, padding=1)", call, min_seconds))
    source = torch.empty(2**26, device=device).fill_(1)
    target = torch.empty_like(source)
    copies = {"source": source, "target": target}
    moved = 2 * source.numel() * source.element_size()
    return Limits(max(rates), moved / _seconds("target.copy_(source)", copies, min_seconds))


def seconds(work: Work, limits: dict[str, float]) -> float:
    """The least time for some work: the longer of computing and moving it."""
    return max(work.operations / limits["operations"], work.bytes / limits["bytes"])


def _seconds(statement: str, names: dict[str, Any], min_seconds: float) -> float:
    timer = benchmark.Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_seconds).median
