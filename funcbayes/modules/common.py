"""Arguments, devices, losses and checkpoint entries, as the classes take them."""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcbayes.core import random, trees
from funcbayes.core.data import batches
from funcbayes.core.likelihoods import Categorical, Gaussian, Likelihood
from funcbayes.core.random import Key, KeyLike


def positive_int(value: Any, name: str) -> int:
    """The value as an integer of at least 1, or a ValueError that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"`{name}` is {value!r}, expected an integer of at least 1")
    return number


def positive(value: Any, name: str) -> float:
    """The value as a finite positive float, or a ValueError that names the argument."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` is {value!r}, expected a finite positive number")
    return number


def checked_likelihood(value: Any) -> str:
    """The name of a likelihood, or a ValueError that lists the names."""
    if value not in ("classification", "regression"):
        raise ValueError(f"`likelihood` is {value!r}, expected 'classification' or 'regression'")
    return value


def checked_scale(value: Any) -> Literal["mean", "sum"]:
    """How curvature is gathered over the data, or a ValueError that lists the ways."""
    if value not in ("mean", "sum"):
        raise ValueError(
            f"`data_scale` is {value!r}, expected 'mean' (as published) or 'sum' (the proper"
            " posterior)"
        )
    return value


def check_module(value: Any, name: str = "model") -> None:
    """Raises TypeError for what is no module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` is a {type(value).__name__}, expected a torch.nn.Module")


def draw_key() -> Key:
    """A key from torch's global generator, which moves on."""
    return random.key(int(torch.randint(2**63 - 1, (), device="cpu")))


def key_or_draw(key: KeyLike | None) -> Key:
    """The key given; None draws one, so that `torch.manual_seed` governs it."""
    return draw_key() if key is None else random.as_key(key)


class SameNetwork:
    """Keeps what was made of a network for as long as the network stays what it is.

    Making a `Model` copies the module's structure, which takes longer than a small network's
    prediction. In-place changes of tensors need no new one, since a model shares them.
    """

    def __init__(self) -> None:
        self._parts: list[Any] | None = None
        self._values: list[Any] = []
        self._made: Any = None
        self._snapshot: _Snapshot | None = None

    def get(self, net: nn.Module, also: Any, make: Callable[[], Any]) -> Any:
        """The last result of `make`, or a new one where `net` or `also` is another."""
        if self._snapshot is not None and self._snapshot.holds(net) and also == self._values[-1]:
            return self._made
        parts, values = _structure(net)
        values.append(also)
        known = self._parts
        if (
            parts is None
            or known is None
            or len(parts) != len(known)
            or any(a is not b for a, b in zip(parts, known, strict=True))
            or values != self._values
        ):
            self._made = make()
            self._parts, self._values = parts, values
        # Only where everything that may change is a table, a list or a tensor that was seen.
        self._snapshot = None if parts is None else _Snapshot(net, parts)
        return self._made

    def __reduce__(self) -> tuple[type["SameNetwork"], tuple[()]]:
        return SameNetwork, ()  # a copy of an object is about another network


class _Snapshot:
    """A network's tables and tensors, for a quick look whether they are still the same.

    That two objects are one is all that it sees, so it may say no where nothing has changed.
    """

    def __init__(self, net: nn.Module, parts: list[Any]) -> None:
        self._net = net
        modules = list(net.modules())
        tables = [vars(module) for module in modules]
        lists: list[Any] = []
        for module in modules:
            for value in vars(module).values():
                _containers(value, tables, lists)
        self._empty = [table for table in tables if not table]
        self._tables = [(table, list(table), list(table.values())) for table in tables if table]
        self._lists = [(live, list(live)) for live in lists]
        self._tensors = [(part, *_form(part)) for part in parts if isinstance(part, Tensor)]

    def holds(self, net: nn.Module) -> bool:
        """Whether all is as it was."""
        return (
            net is self._net
            and not any(self._empty)
            and all(
                len(table) == len(values)
                and all(map(operator.is_, table.values(), values))
                and list(table) == names
                for table, names, values in self._tables
            )
            and all(
                len(live) == len(items) and all(map(operator.is_, live, items))
                for live, items in self._lists
            )
            and all(_form(tensor) == (memory, form) for tensor, memory, form in self._tensors)
        )


def _containers(value: Any, tables: list[Any], lists: list[Any]) -> None:
    """Adds the tables and lists in an attribute, at any depth, to those known."""
    if isinstance(value, dict):
        tables.append(value)
        for item in value.values():
            _containers(item, tables, lists)
    elif isinstance(value, list | set):
        lists.append(value)
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _containers(item, tables, lists)


def _form(tensor: Tensor) -> tuple[int, Any]:
    """Where a tensor lies, and in which format."""
    # `.to()` and `.data =` put other memory under the same parameter.
    form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
    return tensor.data_ptr(), form


_ATOMS = (
    *(bool, int, float, complex, str, bytes, type, type(None)),
    *(torch.dtype, torch.device, torch.memory_format, FunctionType, BuiltinFunctionType, ref),
)


_TABLES = (OrderedDict, dict, set)


def _structure(net: nn.Module) -> tuple[list[Any] | None, list[Any]]:
    """What a network consists of: parts to compare by `is`, and values to compare by `==`.

    The parts are None where an attribute is of a kind that may change unseen.
    """
    parts: list[Any] = []
    values: list[Any] = []

    def visit(value: Any) -> bool:
        parts.append(value)
        if isinstance(value, Tensor):
            try:
                values.append(_form(value))
            except RuntimeError:  # a subclass without memory of its own
                return False
            return True
        if isinstance(value, dict):
            return all(visit(k) and visit(v) for k, v in value.items())
        if isinstance(value, list | tuple | set | frozenset):
            return all(visit(item) for item in value)
        return isinstance(value, (nn.Module, *_ATOMS))

    for part in net.modules():
        for name, value in vars(part).items():
            # Most of a module's attributes are tables of hooks, without entries.
            if type(value) in _TABLES and not value:
                parts.append(value)
            # Predictions run in evaluation mode, whatever the network's.
            elif name != "training" and not visit(value):
                return None, []
    return parts, values


def every(name: str) -> bool:
    """Selects every parameter."""
    return True


def call(module: nn.Module, x: Any) -> Any:
    """Calls a module by the convention of `Model.from_module`."""
    return module(*x) if isinstance(x, tuple) and not hasattr(x, "_fields") else module(x)


class _CrossEntropy(Categorical):
    """`Categorical` that takes class probabilities as targets as well."""

    def check(self, outputs: Any, targets: Any) -> None:
        if not self._soft(outputs, targets):
            super().check(outputs, targets)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self._soft(outputs, targets):
            return super().nll(outputs, targets)
        log_probs = F.log_softmax(outputs, self.class_dim)
        return -(targets * log_probs).flatten(1).sum(1)

    def _soft(self, outputs: Any, targets: Any) -> bool:
        return (
            isinstance(outputs, Tensor)
            and isinstance(targets, Tensor)
            and targets.is_floating_point()
            and targets.shape == outputs.shape
            and outputs.shape[self.class_dim] > 1
        )


class _UnitGaussian(Gaussian):
    """`Gaussian` with unit variance that takes integer targets as well."""

    def check(self, outputs: Any, targets: Any) -> None:
        super().check(outputs, self._real(outputs, targets))

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().nll(outputs, self._real(outputs, targets))

    def _real(self, outputs: Any, targets: Any) -> Any:
        both = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
        return targets.to(outputs.dtype) if both else targets


class Criterion(Likelihood):
    """A scalar loss in the place of a likelihood, for training: it has `check` and `nll` only."""

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        self._criterion = criterion

    def check(self, outputs: Any, targets: Any) -> None:
        """Takes anything: what fits is the criterion's business."""

    def nll(self, outputs: Any, targets: Any) -> Tensor:
        """The loss as that of one datum, so that a mean over data leaves it as it is."""
        loss = self._criterion(outputs, targets)
        if loss.dim():
            raise ValueError(
                f"`criterion` gives a tensor of shape {tuple(loss.shape)}, expected a scalar: use"
                " reduction='mean'"
            )
        return loss.reshape(1)


def resolve_likelihood(value: Any) -> Any:
    """A likelihood by the name that the classes use, or the likelihood itself."""
    if not isinstance(value, str):
        if not (hasattr(value, "nll") and hasattr(value, "check")):
            raise ValueError(
                f"`likelihood` is a {type(value).__name__}, expected 'classification',"
                " 'regression' or one of funcbayes.likelihoods"
            )
        return value
    if checked_likelihood(value) == "regression":
        return _UnitGaussian()
    # torch's cross-entropy has the classes on axis 1.
    return _CrossEntropy(class_dim=1)


def trainable(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that require gradients."""
    return frozenset(name for name, p in module.named_parameters() if p.requires_grad)


def loaded(
    value: Any, like: dict[str, Tensor], name: str, *, wide: bool = False, finite: bool = True
) -> dict[str, Tensor]:
    """Copies of a checkpoint's tensors, in the order and format of `like` (or in float64)."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` is a {type(value).__name__}, expected a dict of tensors")
    ordered = {key: value[key] for key in like if key in value}
    ordered |= {key: leaf for key, leaf in value.items() if key not in like}
    trees.check_like(ordered, like, name=name)
    if finite:
        trees.check_finite(ordered, name=name)
    return {
        key: leaf.detach().to(
            like[key].device, torch.float64 if wide else like[key].dtype, copy=True
        )
        for key, leaf in ordered.items()
    }


def apply_wide(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Applies `fn` of `nn.Module._apply`, but never leaves less than float32."""

    def apply(leaf: Tensor) -> Tensor:
        moved = fn(leaf)
        dtype = torch.promote_types(moved.dtype, torch.float32)
        return moved if moved.dtype == dtype else leaf.to(moved.device, dtype)

    return trees.tensor_map(apply, tree)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first tensor is."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def training_device(module: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device given; None: the module's own, but CUDA, if there is one, for the CPU."""
    if device is not None:
        return torch.device(device)
    own = device_of(module)
    return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own


class OnDevice:
    """A loader whose batches come on a device."""

    def __init__(self, data: Any, device: torch.device, name: str) -> None:
        self._data, self._device, self._name = data, device, name

    def __iter__(self) -> Iterator[Any]:
        for pair in batches(self._data, name=self._name):
            yield trees.tensor_map(lambda leaf: leaf.to(self._device), pair)
