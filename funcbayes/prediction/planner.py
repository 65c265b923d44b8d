"""Which way of running the samples is fastest for this model, batch and device.

The first sample runs alone and is counted: its operations, those before anything random
happens, its kernels, and its largest tensor. From these follows what each strategy would cost;
the counts are kept on the model for the next call with the same shapes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcbayes.core import operations, trees
from funcbayes.core.memory import available_bytes, gigabytes
from funcbayes.core.model import Model
from funcbayes.posteriors import Draws
from funcbayes.prediction.forward import one_sample

# A number of noise, in operations of one core.
_NUMBER = 230.0
# How much faster convolutions are on images whose channels come last, which batched ones are not.
_CHANNELS_LAST = 0.8
# What a core is worth that shares large matrix products, where there are no convolutions.
_SHARING_PRODUCTS = 0.95
# How much slower passes side by side are where what they work on leaves the cores' common cache,
# and bytes of that.
_SPILLED, _COMMON_CACHE = 1.15, 2**25
_CPU_BUDGET = 2 * 2**30
# The part of the memory that is free that a prediction takes at most.
_SHARE = 0.5


class Profile(NamedTuple):
    """What one sample costs.

    Attributes:
        shared: operations before the first uncertain parameter or dropout, which a batched
            call does once.
        sampled: the other operations.
        kernels: how many of torch's kernels a pass runs.
        largest: bytes of the largest tensor on the way.
        stochastic: whether anything sampled was used at all.
        channels_last: whether the inputs may come in that memory format.
        batchable: whether vmap can batch the model, as far as is known.
    """

    shared: float
    sampled: float
    kernels: int
    largest: int
    stochastic: bool
    channels_last: bool
    batchable: bool


@dataclass(frozen=True)
class Plan:
    """How the samples of a prediction are run, and why. `print` shows it as a table.

    Attributes:
        strategy: "vmap", "loop" or "threads", as `predict` takes them.
        chunk_size: samples in one batched pass; 1: each sample has a pass of its own.
        num_samples: samples that are planned for.
        threads: passes that run at a time.
        channels_last: whether images are given in that memory format.
        profile: what was counted in one sample's pass.
        draw_bytes: memory that one sample's parameters take.
        budget: bytes that the passes may take.
        costs: what each strategy would cost, in operations of one core; empty where there was
            no choice.
        reason: why the strategy was chosen.
    """

    strategy: str
    chunk_size: int
    num_samples: int
    threads: int
    channels_last: bool
    profile: Profile
    draw_bytes: int
    budget: int
    costs: dict[str, float]
    reason: str

    @property
    def peak_bytes(self) -> int:
        """Memory for parameters and activations at a time, by estimate."""
        return self.threads * self.chunk_size * sample_bytes(self.profile, self.draw_bytes)

    def __str__(self) -> str:
        """The plan as a table."""
        one = self.profile
        at_once = f"{self.chunk_size} a pass" if self.chunk_size > 1 else "a pass each"
        rows = {
            "strategy": f'"{self.strategy}": {self.reason}',
            "samples": f"{self.num_samples}, {at_once}"
            + (f", {self.threads} passes at a time" if self.threads > 1 else ""),
            "operations": f"{one.sampled:.3g} a sample, {one.shared:.3g} that all samples share,"
            f" {one.kernels} kernels a pass",
            "bytes": f"{gigabytes(self.draw_bytes)} a sample's parameters,"
            f" {gigabytes(one.largest)} the largest activation",
            "memory": f"about {gigabytes(self.peak_bytes)} of a budget of {gigabytes(self.budget)}",
        }
        if self.channels_last:
            rows["format"] = "channels last, which convolutions on CPU prefer"
        if self.costs:
            best = min(self.costs.values())
            rows["cost"] = ", ".join(
                f"{name} {cost / best:.2f}"
                for name, cost in sorted(self.costs.items(), key=lambda item: item[1])
            )
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


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
    counter = operations.Counter()
    sampled_leaves = trees.tensor_leaves((sample.params, sample.constants))
    with counter, _FirstUse(sampled_leaves, counter):
        outputs = one_sample(model, sample, x, counter.mark)
    shared = counter.operations if counter.marked is None else counter.marked
    sampled = counter.operations - shared
    stochastic = counter.marked is not None
    return outputs, Profile(
        shared, sampled, counter.kernels, counter.largest, stochastic, False, True
    )


def plan(
    profile: Profile,
    num_samples: int,
    *,
    strategy: str,
    chunk_size: int | None,
    draw_size: int,
    draw_bytes: int,
    device: torch.device,
    budget: int | None,
) -> Plan:
    """How to run the samples.

    Args:
        profile: what one sample costs.
        num_samples: how many samples there are.
        strategy: the user's; "auto" takes what costs least.
        chunk_size: most samples in one batched pass; None: what fits into memory.
        draw_size: numbers that are drawn for a sample.
        draw_bytes: memory that a sample's parameters take.
        device: where the model lies.
        budget: bytes that the passes may take; None: half of what is free, on CPU 2 GiB at most.
    """
    budget = memory_budget(device) if budget is None else budget
    fitting = max(1, budget // sample_bytes(profile, draw_bytes))
    cpu = device.type == "cpu"
    cores = torch.get_num_threads() if cpu else 1
    # A pass each in all workers, or as many samples in each as fit and share the work evenly.
    shares = min(math.ceil(num_samples / cores), max(1, fitting // cores))
    whole = min(num_samples, fitting)
    if chunk_size is not None:
        shares, whole = min(shares, chunk_size), min(num_samples, chunk_size)
    ways = {"vmap": ("vmap", whole), "loop": ("loop", 1), "threads": ("threads", 1)}
    costs: dict[str, float] = {}
    if strategy != "auto":
        name, reason = strategy, "as was asked for"
        if strategy == "threads" and chunk_size is not None:
            ways["threads"] = ("threads", shares)
        if strategy == "threads" and not cpu:
            # Streams, and autocast of other devices, are a thread's own.
            size = 1 if chunk_size is None else shares
            ways["threads"] = ("vmap" if size > 1 else "loop", size)
            reason = "one thread feeds the device"
    elif num_samples == 1:
        name, reason = "loop", "there is one sample"
    elif not cpu:
        name = "vmap" if profile.batchable else "loop"
        reason = "one batched pass fills the device" if profile.batchable else _UNBATCHABLE
    else:
        costs = _costs(profile, num_samples, draw_size, cores)
        ways["threads, batched"] = ("threads", shares)
        if whole < num_samples:
            # Passes in turn: no better than a share a core, and more memory.
            costs.pop("vmap", None)
        name = min(costs, key=lambda way: costs[way])
        reason = _REASONS[name] if profile.batchable else _UNBATCHABLE
    way, size = ways[name]
    passes = math.ceil(num_samples / size)
    threads = min(cores, passes) if way == "threads" else 1
    last = profile.channels_last and (way, size) == ("threads", 1)
    return Plan(way, size, num_samples, threads, last, profile, draw_bytes, budget, costs, reason)


def _costs(profile: Profile, num: int, draw_size: int, cores: int) -> dict[str, float]:
    """What each way costs on CPU, in operations of one core."""
    sampled = profile.sampled
    one_pass = operations.PASS + operations.KERNEL * profile.kernels
    noise = _NUMBER * draw_size
    together = cores * operations.SHARING if cores > 1 else 1
    batched = sampled * operations.BATCHED + noise
    per_core = math.ceil(num / cores)
    one_by_one = together if profile.channels_last else max(1, cores * _SHARING_PRODUCTS)
    costs = {"loop": num * (one_pass + noise + (profile.shared + sampled) / one_by_one)}
    if profile.batchable:
        costs["vmap"] = one_pass + (profile.shared + num * batched) / together
    if cores > 1:
        format_gain = _CHANNELS_LAST if profile.channels_last else 1
        if cores * sample_bytes(profile, 0) > _COMMON_CACHE:
            format_gain *= _SPILLED
        each = one_pass + noise + (profile.shared + sampled) * format_gain
        costs["threads"] = operations.START + per_core * each
        if profile.batchable:
            whole = cores * one_pass + profile.shared + per_core * batched
            costs["threads, batched"] = operations.START + whole
    return costs


_REASONS = {
    "vmap": "so little is computed that calls would take longer, and threads too",
    "loop": "large operations, on one core or such that cores share them well",
    "threads": "large operations: one sample's tensors stay in the cache of one core",
    "threads, batched": "small operations: each core has its share of the samples in one pass",
}
_UNBATCHABLE = "vmap cannot batch this model"


def calls_matter(plan: Plan) -> bool:
    """Whether Python takes more than a tenth of what the cores take for a pass."""
    one = plan.profile
    computed = one.shared + plan.chunk_size * one.sampled * operations.BATCHED
    return 10 * (operations.PASS + operations.KERNEL * one.kernels) > computed


def memory_budget(device: torch.device) -> int:
    """Bytes that a prediction may take where the user does not say."""
    free = int(_SHARE * available_bytes(device))
    return min(free, _CPU_BUDGET) if device.type == "cpu" else free


def sample_bytes(profile: Profile, draw_bytes: int) -> int:
    """Memory that one sample of a batched pass takes, by estimate."""
    # A few tensors of the largest size live at once: input, output, workspace of an operation.
    return max(1, draw_bytes + 4 * profile.largest)


def plan_key(posterior: Any, x: Any) -> Any:
    """What a profile depends on, beside the model."""
    shapes = tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
        for leaf in trees.tensor_leaves(x)
    )
    # What is no tensor may switch the network's ways.
    others = repr([leaf for leaf in trees.leaves(x) if not isinstance(leaf, Tensor)])
    masks = getattr(posterior, "rate", None), getattr(posterior, "per", None)
    types = sorted({leaf.device.type for leaf in trees.tensor_leaves(x)})
    return shapes, others, type(posterior), masks, tuple(map(_autocast, types))


def _autocast(device_type: str) -> torch.dtype | None:
    """The dtype of autocast, where it is on."""
    # torch raises an error for devices that have none, such as "meta".
    if not torch.amp.is_autocast_available(device_type):
        return None
    on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


class _FirstUse(TorchFunctionMode):
    """Marks the counter at the first function that takes a sampled tensor."""

    def __init__(self, sampled: list[Tensor], counter: operations.Counter) -> None:
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
