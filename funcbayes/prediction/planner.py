"""Which way of running the samples is fastest for this model, batch and device.

The first sample runs alone and is counted: its operations, those before anything random
happens, and its largest tensor. From that the rest is planned; the plan is kept on the model
for the next call with the same shapes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from funcbayes.core import random, trees
from funcbayes.core.model import Model
from funcbayes.posteriors import Draws
from funcbayes.prediction.forward import one_sample

# Below this many operations a sample, one batched call saves more in calls of small kernels
# than it loses in cache; from there on the cache decides. Measured on two CPU cores.
_SMALL = 1e8
# How much slower a batched call then is than a single sample at a time: sampled weights make
# grouped convolutions, sampled masks only longer batches.
_BATCHED_WEIGHTS, _BATCHED_MASKS = 3.0, 1.3
# What two cores with a sample each gain over two cores on one sample.
_THREADS_GAIN = 1.3
_CPU_BUDGET = 2 * 2**30
_CUDA_SHARE = 0.5


class Profile(NamedTuple):
    """What one sample costs.

    Attributes:
        shared: operations before the first uncertain parameter or dropout, which a batched
            call does once.
        sampled: the other operations.
        largest: bytes of the largest tensor on the way.
        stochastic: whether anything sampled was used at all.
        channels_last: whether the inputs may come in that memory format.
        batchable: whether vmap can batch the model, as far as is known.
    """

    shared: float
    sampled: float
    largest: int
    stochastic: bool
    channels_last: bool
    batchable: bool


def measure(model: Model, sample: Draws, x: Any) -> tuple[Any, Profile]:
    """Runs one sample, and counts.

    Args:
        model: the network.
        sample: a sample without its sample axis.
        x: inputs.

    Returns:
        The sample's outputs, and its profile.

    Raises:
        ValueError: the network draws from torch's global generator.
    """
    counter = _Counter()
    sampled_leaves = trees.tensor_leaves((sample.params, sample.constants))
    with counter, _FirstUse(sampled_leaves, counter):
        outputs = one_sample(model, sample, x, counter.mark)
    shared = counter.operations if counter.marked is None else counter.marked
    sampled = counter.operations - shared
    stochastic = counter.marked is not None
    return outputs, Profile(shared, sampled, counter.largest, stochastic, False, True)


def choose(profile: Profile, num_samples: int, *, masks: bool, device: torch.device) -> str:
    """The strategy that is fastest for the samples that are left."""
    if num_samples == 1:
        return "loop"
    if device.type != "cpu":
        return "vmap" if profile.batchable else "loop"
    parallel = torch.get_num_threads() > 1
    one_at_a_time = "threads" if parallel else "loop"
    if not profile.batchable:
        return one_at_a_time
    if profile.sampled < _SMALL:
        return "vmap"
    penalty = _BATCHED_MASKS if masks else _BATCHED_WEIGHTS
    batched = profile.shared + num_samples * profile.sampled * penalty
    single = num_samples * (profile.shared + profile.sampled)
    return "vmap" if batched < single / (_THREADS_GAIN if parallel else 1) else one_at_a_time


def chunk_for(profile: Profile, num_samples: int, draw_bytes: int, device: torch.device) -> int:
    """How many samples fit into memory in one batched call."""
    budget: float = _CPU_BUDGET
    if device.type == "cuda":
        budget = _CUDA_SHARE * torch.cuda.mem_get_info(device)[0]
    # A few tensors of the largest size live at once: input, output, workspace of an operation.
    activations = 4 * profile.largest
    return max(1, min(num_samples, int(budget / max(1, draw_bytes + activations))))


def plan_key(posterior: Any, x: Any) -> Any:
    """What a profile depends on, beside the model."""
    shapes = tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
        for leaf in trees.tensor_leaves(x)
    )
    # What is no tensor may switch the network's ways.
    others = repr([leaf for leaf in trees.leaves(x) if not isinstance(leaf, Tensor)])
    masks = getattr(posterior, "rate", None), getattr(posterior, "per", None)
    return shapes, others, type(posterior), masks, torch.is_autocast_enabled("cpu")


class _Counter(TorchDispatchMode):
    """Counts the operations and the largest result among what reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0
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
            raise ValueError(random.OWN_RANDOMNESS)
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
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


class _FirstUse(TorchFunctionMode):
    """Marks the counter at the first function that takes a sampled tensor."""

    def __init__(self, sampled: list[Tensor], counter: _Counter) -> None:
        super().__init__()
        self._sampled = {id(leaf) for leaf in sampled}
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._counter.marked is None and any(
            id(leaf) in self._sampled for leaf in trees.leaves((args, kwargs))
        ):
            self._counter.mark()
        return func(*args, **(kwargs or {}))
