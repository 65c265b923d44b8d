"""What networks draw from torch's global generators in training, made a function of a key."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from funcbayes.core import random
from funcbayes.core.random import Key


@contextmanager
def seeded(key: Key, device: torch.device) -> Iterator[None]:
    """Whatever else a network draws in training (noise, stochastic depth) comes from the key.

    The generators of the CPU and of the device are put back afterwards.

    Args:
        key: gives the seed of both.
        device: on which the network runs.
    """
    devices = [device] if device.type == "cuda" else []
    seed = random.seed(key)
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: that also reaches devices whose state is not put back.
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
