"""Snapshots of everything that a pure call leaves alone, and sentences about what it did not."""

import dataclasses
import random as python_random
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils import _python_dispatch

from funcbayes.core.model import Model
from funcbayes.testing.laws.comparing import bits, describe

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size,
    torch.layout,
)  # fmt: skip

_CAUSES = {
    "values": "an operation in place; clone before writing, or pass tensors by"
    " torch.func.functional_call, whose writes stay outside",
    "buffer": "a forward pass in training mode, which moves a batch norm's statistics, or a"
    " module that writes to its buffers; give torch.func.functional_call clones of them",
    "memory": "tensors swapped in and out of the module, which another thread would have seen",
    "gradient": "`backward()` or `zero_grad()` on the user's own parameters; take"
    " torch.autograd.grad or torch.func.grad of copies",
    "training": "`train()` or `eval()` without the way back; work on a copy, or put the mode"
    " back in a `finally`",
    "hooks": "a hook whose handle was not removed; remove it in a `finally`",
    "generator": "random numbers without a key, or a generator seeded globally; draw by"
    " funcbayes.random",
    "setting": "a setting that was not put back; use a context manager, or a `finally`",
    "other": "an assignment to an attribute or a container of the user's; work on a copy",
}


class Snapshot:
    """The state of some objects and of the process, to compare with a later moment.

    Args:
        watched: modules, models, tensors, generators, arrays, posteriors and other objects with
            attributes, in any nesting of dicts, lists, tuples and NamedTuples.
        name: what they are called in messages.

    Attributes:
        networks: the modules among them that are not part of another, and those of models.
    """

    def __init__(self, watched: Any, name: str = "watched") -> None:
        self.seen: dict[tuple[str, str], Any] = {}
        self._watched = watched
        # Objects that live on keep their number, so that a new one cannot take it.
        self._alive: dict[int, Any] = {}
        self._name = name
        self.networks: list[nn.Module] = []
        self._see(name, watched, deep=True)
        self.process = _process_state()

    def difference(self) -> tuple[str, str] | None:
        """What changed since, as a sentence, and its likely cause; None for nothing."""
        now = Snapshot(self._watched, self._name)
        found = [
            (f"`{where}`", aspect, value, now.seen[where, aspect])
            for (where, aspect), value in self.seen.items()
            if (where, aspect) in now.seen and not same_value(value, now.seen[where, aspect])
        ]
        found += [
            (name, _aspect_of_process(name), value, now.process[name])
            for name, value in self.process.items()
            if name in now.process and not same_value(value, now.process[name])
        ]
        if not found:
            return None
        where, aspect, before, after = found[0]
        text = f"{where} {_change(aspect, before, after)}"
        others = list(dict.fromkeys(name for name, *_ in found if name != where))
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            text += f" (so did {', '.join(others[:3])}{more})"
        if ".grad`" in where:
            aspect = "gradient"
        return text, _CAUSES.get(aspect, _CAUSES["other"])

    def _see(self, where: str, value: Any, *, deep: bool, aspect: str = "values") -> None:
        """Records a value, and what it is made of.

        Args:
            where: the way to it.
            value: the value.
            deep: whether objects of unknown classes are looked into. Not inside modules, whose
                attributes may hold anything: a logger, an experiment tracker.
            aspect: what a change of its numbers is called.
        """
        if isinstance(value, _PLAIN):
            self.seen[where, "object"] = (type(value), repr(value))
            return
        self.seen[where, "object"] = (type(value), id(value))
        if id(value) in self._alive:
            return
        self._alive[id(value)] = value
        if isinstance(value, Tensor):
            self._see_tensor(where, value, aspect)
        elif isinstance(value, nn.Module):
            self.networks += [value] if deep else []
            self._see_module(where, value)
        elif isinstance(value, Model):
            template = getattr(value, "_template", None)
            self.networks += [] if template is None else [template]
            self._see(f"{where}.params", value.params, deep=deep)
            self._see(f"{where}.constants", value.constants, deep=deep)
        elif isinstance(value, np.ndarray):
            described = (value.dtype.str, value.shape, value.tobytes())
            self.seen[where, "array"] = value.copy() if value.dtype.hasobject else described
        elif isinstance(value, torch.Generator):
            self.seen[where, "generator"] = value.get_state()
        elif isinstance(value, np.random.Generator):
            self.seen[where, "generator"] = repr(value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self.seen[where, "generator"] = _legacy_state(value.get_state())
        elif isinstance(value, python_random.Random):
            self.seen[where, "generator"] = value.getstate()
        elif isinstance(value, Mapping):
            self.seen[where, "entries"] = list(map(repr, value))
            for key, item in value.items():
                self._see(f"{where}[{key!r}]", item, deep=deep)
        elif isinstance(value, list | tuple):
            self.seen[where, "entries"] = list(range(len(value)))
            names = getattr(value, "_fields", None)
            for i, item in enumerate(value):
                self._see(f"{where}.{names[i]}" if names else f"{where}[{i}]", item, deep=deep)
        elif isinstance(value, set | frozenset):
            self.seen[where, "entries"] = sorted(map(repr, value))
        elif _is_open(value, deep=deep):
            attributes = _attributes(value)
            self.seen[where, "attributes"] = sorted(attributes)
            for name, item in attributes.items():
                self._see(f"{where}.{name}", item, deep=deep)

    def _see_tensor(self, where: str, tensor: Tensor, aspect: str) -> None:
        if nn.parameter.is_lazy(tensor):
            return
        self.seen[where, "format"] = (tensor.dtype, tuple(tensor.shape), str(tensor.device))
        self.seen[where, "requires_grad"] = tensor.requires_grad
        if not tensor.is_meta:
            self.seen[where, aspect] = _Numbers(tensor)
        if tensor.layout == torch.strided:
            version = None if tensor.is_inference() else tensor._version
            self.seen[where, "memory"] = (tensor.data_ptr(), tensor.stride(), version)
        hooks = [getattr(tensor, name, None) for name in _TENSOR_HOOKS]
        self.seen[where, "hooks"] = [list(map(id, h.values())) if h else [] for h in hooks]
        if tensor.is_leaf:  # asking others for their gradient warns
            self._see(f"{where}.grad", tensor.grad, deep=False, aspect="gradient")

    def _see_module(self, where: str, module: nn.Module) -> None:
        attributes = vars(module)
        self.seen[where, "attributes"] = sorted(attributes)
        for name, value in list(attributes.items()):
            if name == "training":
                self.seen[where, "training"] = value
            elif name in ("_parameters", "_buffers", "_modules"):
                kind = name.strip("_")
                self.seen[where, kind] = list(value)
                aspect = "buffer" if name == "_buffers" else "values"
                for key, item in value.items():
                    self._see(f"{where}.{key}", item, deep=False, aspect=aspect)
            elif "hooks" in name and isinstance(value, dict):
                hooks = self.seen.setdefault((where, "hooks"), {})
                hooks[name] = [id(hook) for hook in value.values()]
                self._alive.update((id(hook), hook) for hook in value.values())
            else:
                self._see(f"{where}.{name}", value, deep=False)


def _is_open(value: Any, *, deep: bool) -> bool:
    """Whether an object of some class counts as made of its attributes."""
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        return not isinstance(value, type)
    opaque = isinstance(value, type | types.ModuleType | types.FunctionType | types.MethodType)
    # A logger, a lock, a thread change on their own.
    return deep and not opaque and type(value).__module__ not in sys.stdlib_module_names


def _attributes(value: Any) -> dict[str, Any]:
    slots = [getattr(part, "__slots__", ()) for part in type(value).__mro__]
    names = [name for part in slots for name in ([part] if isinstance(part, str) else part)]
    there = {name: getattr(value, name) for name in names if hasattr(value, name)}
    there.pop("__weakref__", None)
    return {**there, **getattr(value, "__dict__", {})}


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class _Numbers:
    """The numbers of a tensor at one moment."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()

    def same(self, other: "_Numbers") -> bool:
        ours, theirs = self.tensor, other.tensor
        if (ours.dtype, ours.shape, ours.device, ours.layout) != (
            theirs.dtype, theirs.shape, theirs.device, theirs.layout,
        ):  # fmt: skip
            return False
        return torch.equal(bits(ours), bits(theirs))

    def change(self, other: "_Numbers") -> str:
        before, now = self.tensor, other.tensor
        if before.shape != now.shape or before.dtype != now.dtype:
            return f"was {_format(before)} and is {_format(now)}"
        differ = bits(before) != bits(now)
        return "changed, " + describe(now, before, differ, words="is {}, was {}")


def _legacy_state(state: Any) -> tuple[Any, ...]:
    return state[0], state[1].tobytes(), *state[2:]


def _python_generator_is_ours() -> bool:
    """Whether Python's global generator moves only where something draws random numbers.

    beartype draws from it to choose the items of a container that it checks.
    """
    return "beartype" not in sys.modules


def global_generators() -> dict[str, Any]:
    """The states of the global generators, by the name that messages give them."""
    state: dict[str, Any] = {
        "torch's global generator": torch.get_rng_state(),
        "NumPy's global generator": _legacy_state(np.random.get_state()),  # noqa: NPY002
    }
    if _python_generator_is_ours():
        state["Python's global generator"] = python_random.getstate()
    if torch.cuda.is_initialized():
        for i, generator in enumerate(torch.cuda.get_rng_state_all()):
            state[f"torch's global generator on cuda:{i}"] = generator
    return state


def _process_state() -> dict[str, Any]:
    """What belongs to the process or the thread, by the name that messages give it."""
    return {
        **global_generators(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_num_interop_threads()": torch.get_num_interop_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.is_autocast_enabled('cuda')": torch.is_autocast_enabled("cuda"),
        "torch.are_deterministic_algorithms_enabled()": (
            torch.are_deterministic_algorithms_enabled()
        ),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.backends.mha.get_fastpath_enabled()": torch.backends.mha.get_fastpath_enabled(),
        "the stack of torch function modes": torch._C._len_torch_function_stack(),
        "the stack of torch dispatch modes": len(
            _python_dispatch._get_current_dispatch_mode_stack()
        ),
        "the stack of torch.func transforms": (
            torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        ),
        "the hooks for all modules": [
            list(map(id, getattr(torch_modules, name).values())) for name in _GLOBAL_HOOKS
        ],
    }


_GLOBAL_HOOKS = [
    name
    for name, value in vars(torch_modules).items()
    if name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
]


def _aspect_of_process(name: str) -> str:
    return "generator" if "generator" in name else "hooks" if "hooks" in name else "setting"


def same_value(before: Any, after: Any) -> bool:
    """Whether two recorded values are equal."""
    if isinstance(before, _Numbers) and isinstance(after, _Numbers):
        return before.same(after)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return all(a is b for a, b in zip(before.flat, after.flat, strict=False))
    return type(before) is type(after) and before == after


def _change(aspect: str, before: Any, after: Any) -> str:
    if isinstance(before, _Numbers):
        return before.change(after)
    match aspect:
        case "object":
            was, now = (
                value if isinstance(value, str) else f"a {kind.__name__}"
                for kind, value in (before, after)
            )
            return f"is another {now[2:]} than before" if was == now else f"was {was} and is {now}"
        case "memory" if before[0] != after[0] or before[1] != after[1]:
            return "holds its numbers in other memory than before"
        case "memory":
            return "was written to, and its numbers put back"
        case "training":
            return f"was in {_mode(before)} mode and is in {_mode(after)} mode"
        case "requires_grad":
            return f"had requires_grad={before} and has requires_grad={after}"
        case "hooks":
            return "has other hooks than before"
        case "generator":
            return "was moved"
        case "attributes" | "entries" | "parameters" | "buffers" | "modules":
            what = "entry" if aspect == "entries" else aspect.removesuffix("s")
            gone = [name for name in before if name not in after]
            new = [name for name in after if name not in before]
            if not gone and not new:
                return f"has its {aspect} in another order"
            words = [f"gained {', '.join(map(str, new[:3]))}"] if new else []
            words += [f"lost {', '.join(map(str, gone[:3]))}"] if gone else []
            return f"{' and '.join(words)} ({what})"
        case "array":
            return "changed"
        case _:
            return f"was {before} and is {after}"


def _mode(training: Any) -> str:
    return {True: "training", False: "evaluation"}.get(training, repr(training))


def _format(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
