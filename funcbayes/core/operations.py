"""What a forward pass computes, counted as it runs, and what that costs on CPU cores."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from funcbayes.core import random

# Costs in operations of one core, at about 1e11 a second, as measured on two CPU cores. A pass
# costs this much beside its operations, and each of its kernels that much: the interpreter's time.
PASS, KERNEL = 5e7, 4e6
# To hand work to threads and to wait for them.
START = 4e7
# How much slower a batched pass is than single ones, since its tensors leave the cache.
BATCHED = 1.4
# What a core is worth that shares every operation with the others: they wait for each other.
SHARING = 0.75


class OwnRandomnessError(ValueError):
    """A network draws from torch's global generator."""


class Counter(TorchDispatchMode):
    """Counts the operations and the largest result among what reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0
        self.kernels = 0
        self.largest = 0
        self.marked: float | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's hook for it: otherwise the first prediction imports the compiler, 1.8 s.
        return False

    def mark(self) -> None:
        """Notes that from here on the samples differ."""
        if self.marked is None:
            self.marked = self.operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _draws_globally(func, args, kwargs or {}):
            raise OwnRandomnessError(random.OWN_RANDOMNESS)
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        if not func.is_view:
            self.kernels += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def _draws_globally(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is about to draw from torch's global generator."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name == "generator" and value is not None:
            return False
        # Attention and dropout carry the tag also where they drop nothing.
        if argument.name in ("p", "dropout_p", "dropout") and value == 0:
            return False
        if argument.name in ("train", "training") and not value:
            return False
    return True
