"""A network as a pure function of its parameters.

`Model` holds a function `apply(params, x, constants)` beside the trees it is applied to.
`Model.from_module` makes one of an `nn.Module`: it works on structural copies of the module
that share its tensors, so the module itself is never called, never switched to another mode
and never has a tensor swapped, and its weights exist once.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from funcbayes.core.memory import keep_freed
from funcbayes.core.trees import (
    TensorTree,
    check_like,
    in_transform,
    leaves_with_names,
    tensor_leaves,
    tensor_map,
)

Constants = Mapping[str, Tensor]

# The most plans, or recordings, that a model keeps.
_MOST = 256


class Scratch:
    """What predictions with a model leave for the next; empty in a copy or a pickle.

    Attributes:
        plans: how the samples are best run, by shapes.
        recordings: batched passes of small networks, by the formats of what they take.
        buffers: memory for noise, since fresh memory takes longer to map than to fill.
    """

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}
        self.recordings: dict[Any, Any] = {}
        self.buffers: deque[Tensor] = deque()
        keep_freed()

    @staticmethod
    def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
        """Keeps a value, and forgets the oldest beyond a limit."""
        known[key] = value
        while len(known) > _MOST:
            known.pop(next(iter(known)), None)

    def __reduce__(self) -> tuple[type["Scratch"], tuple[()]]:
        return Scratch, ()


class Model:
    """A pure function of parameters and inputs, with the trees it was made from.

    Attributes:
        params: the uncertain parameters, a pytree of tensors. Detached; those of a module
            share its memory, so in-place training of the module is seen here.
        constants: frozen parameters and buffers by name; empty where there are none.
    """

    params: TensorTree
    constants: dict[str, Tensor]

    def __init__(
        self,
        apply: Callable[..., Any],
        params: TensorTree,
        constants: Constants | None = None,
    ) -> None:
        """Makes a model of any pure function.

        Args:
            apply: `apply(params, x)`, or `apply(params, x, constants)` where constants are
                given. Pure, and safe to call from several threads.
            params: the tree of uncertain parameters.
            constants: tensors that are not uncertain, by name.

        Raises:
            TypeError: `apply` is not callable.
            ValueError: `params` has no leaves, or one is not a floating-point tensor.
        """
        if not callable(apply):
            raise TypeError(f"`apply` is a {type(apply).__name__}, expected a function")
        _check_params(params)
        self.params = params
        self.constants = dict(constants or {})
        self._function = apply
        self._scratch = Scratch()

    @classmethod
    def from_module(cls, net: nn.Module, bayesian: Callable[[str], bool] | None = None) -> "Model":
        """Makes a model of a module; the module is not touched, now or later.

        The forward pass is that of evaluation mode. A tuple as input is passed on as
        positional arguments, anything else as one argument (`torch.func.functional_call`'s
        convention). Tied parameters are one leaf, under the first of their names.

        Args:
            net: the module. Its tensors are shared, not copied: training it further in
                place moves `params`. Moving it to another device or dtype does not; make
                a new model then.
            bayesian: which parameters are uncertain, by name, e.g.
                `lambda name: name.startswith("head")`; a tied parameter is if any of its
                names is. None: all that require gradients.

        Returns:
            A model with `params` a dict by name.

        Raises:
            TypeError: `net` is not a module, or cannot be copied.
            ValueError: no parameter is selected, or one is not initialised yet.
        """
        return _ModuleModel(net, bayesian)

    def apply(self, params: TensorTree, x: Any, constants: Constants | None = None) -> Any:
        """Evaluates the network in evaluation mode. Nothing that is passed in changes.

        Args:
            params: tree like `self.params`.
            x: inputs, a pytree with a leading batch axis.
            constants: replaces the constants of the same names; the others are the model's.

        Returns:
            What the network returns: a pytree with a leading batch axis.

        Raises:
            ValueError: for a module, `params` has other names than `self.params`; `constants`
                has a name that the model does not.
        """
        merged = self._merged(constants)
        return self._function(params, x, merged) if merged else self._function(params, x)

    def apply_train(
        self, params: TensorTree, x: Any, constants: Constants | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Evaluates the network in training mode. Nothing that is passed in changes.

        Batch norm normalises with the batch's own statistics. Dropout is active and draws
        from the global generator unless a `funcbayes.core.masks.KeyedDropout` is entered.
        A pure function has one mode only, so this is its `apply`.

        Args:
            params: as for `apply`.
            x: as for `apply`.
            constants: as for `apply`.

        Returns:
            The outputs, and the buffers as the pass left them (without frozen parameters).
        """
        return self.apply(params, x, constants), {}

    def replace(self, params: TensorTree, constants: Constants | None = None) -> "Model":
        """The same network at other parameters.

        Args:
            params: tree like `self.params`.
            constants: replaces the constants of the same names, such as the statistics of batch
                norm; the others are the model's.

        Raises:
            ValueError: `params` is another tree than `self.params`; `constants` has a name that
                the model does not.
        """
        check_like(params, self.params, name="params")
        moved = copy.copy(self)
        moved.params = tensor_map(torch.Tensor.detach, params)
        moved.constants = self._merged(constants)
        return moved

    def _merged(self, constants: Constants | None) -> dict[str, Tensor]:
        unknown = (constants or {}).keys() - self.constants.keys()
        if unknown:
            known = ", ".join(f"'{name}'" for name in self.constants) or "none"
            raise ValueError(f"`constants` has {sorted(unknown)}, expected names among: {known}")
        return {**self.constants, **(constants or {})}


class _ModuleModel(Model):
    def __init__(self, net: nn.Module, bayesian: Callable[[str], bool] | None) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"`net` is a {type(net).__name__}, expected a torch.nn.Module")
        if isinstance(net, torch.jit.ScriptModule):
            raise TypeError(
                "`net` is a TorchScript module, whose tensors cannot be replaced in a call:"
                " pass the module that was scripted"
            )
        chosen, others = _select(net, bayesian)
        _check_params(chosen)
        self.params = chosen
        buffers = _buffers(net)
        self.constants = {**others, **buffers}
        self._buffer_names = tuple(buffers)
        self._written = (*buffers, *_renormalised(net))
        self._written_in_eval = (*_foreign_buffers(net), *_renormalised(net))
        # Looking for ties at every call costs a walk over all modules.
        self._tied = _has_ties(net)
        self._scratch = Scratch()
        # Whether the network writes to its inputs (an activation in place comes first), by
        # mode; unknown before the first call.
        self._writes_inputs: dict[bool, bool] = {}
        # The names of other parameters and buffers that it writes to, likewise.
        self._overwritten: dict[bool, tuple[str, ...]] = {}
        # A module is not safe to call from two threads at once, so each call borrows a
        # copy; the first is made now, so that later changes of `net` don't show.
        self._template = _structural_copy(net)
        self._template.eval()
        self._idle: dict[bool, deque[_Copy]] = {False: deque(), True: deque()}
        self._train_flags = (
            {name: m.training for name, m in net.named_modules()} if net.training else None
        )
        self._training_template = _structural_copy(self._template)
        self._set_training(self._training_template)

    def apply(self, params: TensorTree, x: Any, constants: Constants | None = None) -> Any:
        return self._call(params, x, constants, training=False)[0]

    def apply_train(
        self, params: TensorTree, x: Any, constants: Constants | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        outputs, tensors = self._call(params, x, constants, training=True)
        return outputs, {name: tensors[name] for name in self._buffer_names}

    def _call(
        self, params: TensorTree, x: Any, constants: Constants | None, *, training: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        """The outputs, and the tensors that they were computed with."""
        tensors = self._tensors(params, constants, training=training)
        if torch.compiler.is_compiling():
            return self._traced(tensors, x, training=training), tensors
        writes = self._writes_inputs.get(training)
        if writes is not False:
            x = tensor_map(torch.clone, x)
        # Inference tensors and those inside vmap count no versions: then it stays unknown, and
        # inputs are copied.
        watched = writes is None and not (
            in_transform(x) or any(leaf.is_inference() for leaf in tensor_leaves(x))
        )
        versions = [leaf._version for leaf in tensor_leaves(x)] if watched else []
        with self._borrow(training=training) as module, self._watched(tensors, training=training):
            outputs = functional_call(module, tensors, _arguments(x), tie_weights=self._tied)
        if watched:
            moved = [leaf._version for leaf in tensor_leaves(x)] != versions
            self._writes_inputs[training] = moved
        return outputs, tensors

    def _traced(self, tensors: dict[str, Tensor], x: Any, *, training: bool) -> Any:
        """The outputs, for `torch.compile`: without the bookkeeping, which cannot be traced.

        What a network writes to its inputs is known from a call that was not compiled; until
        then it gets copies.
        """
        if self._writes_inputs.get(training) is not False:
            x = tensor_map(torch.clone, x)
        template = self._training_template if training else self._template
        return functional_call(template, tensors, _arguments(x), tie_weights=self._tied)

    @contextmanager
    def _watched(self, tensors: dict[str, Tensor], *, training: bool) -> Iterator[None]:
        """Puts back what the first pass in a mode writes to its weights, and notes the names.

        From then on the network gets copies of those: a weight clipped or renormalised in
        place is the user's.
        """
        known = training in self._overwritten
        if known or in_transform(tensors) or torch.compiler.is_compiling():
            yield
            return
        mine = self._written if training else self._written_in_eval
        with _unobserved():
            before = {
                name: (tensor.data, tensor.detach().clone())
                for name, tensor in tensors.items()
                if name not in mine
            }
        found: list[str] = []
        try:
            yield
        finally:
            with _unobserved():
                for name, (alias, _) in before.items():
                    if tensors[name].data_ptr() != alias.data_ptr():
                        tensors[name].data = alias
                        found.append(name)
                for name, same in zip(before, _unchanged(before.values()), strict=True):
                    if not same:
                        alias, values = before[name]
                        # An inference tensor may be written to in that mode only.
                        with torch.inference_mode(alias.is_inference()):
                            alias.copy_(values)
                        found.append(name)
        self._overwritten[training] = tuple(found)

    def _tensors(
        self, params: TensorTree, constants: Constants | None, *, training: bool
    ) -> dict[str, Tensor]:
        if not isinstance(params, Mapping) or params.keys() != self.params.keys():
            # `functional_call` would take the module's own tensor where a name is missing.
            check_like(params, self.params, name="params")
        tensors = self._merged(constants)
        tensors |= params
        written = self._written if training else self._written_in_eval
        for name in (*written, *self._overwritten.get(training, ())):
            # A forward pass may write to these, and they are the user's.
            tensors[name] = tensors[name].clone()
        return tensors

    @contextmanager
    def _borrow(self, *, training: bool) -> Iterator[nn.Module]:
        idle = self._idle[training]
        try:
            copied = idle.pop()
        except IndexError:
            module = _structural_copy(self._template)
            if training:
                self._set_training(module)
            copied = _Copy(module)
        try:
            yield copied.module
        finally:
            copied.restore()
            idle.append(copied)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave out the copies of the module that wait to be borrowed.
        return {**vars(self), "_idle": {False: deque(), True: deque()}}

    def _set_training(self, module: nn.Module) -> None:
        # Modules that the user holds in evaluation mode inside a training network stay there.
        module.train()
        for name, part in module.named_modules():
            if self._train_flags is not None:
                part.training = self._train_flags.get(name, True)


class _Copy:
    """A copy of the module that forgets what a forward pass leaves behind.

    A cache, a counter or the last output, kept as an attribute or in a container that is one,
    would make the result depend on the calls before, and hold their memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._dicts = [(vars(part), dict(vars(part))) for part in module.modules()]
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        own = {id(t) for t in (*module.parameters(), *module.buffers())}
        for live, _ in list(self._dicts):
            for value in live.values():
                if isinstance(value, dict):  # buffers and hooks among them
                    self._dicts.append((value, dict(value)))
                elif isinstance(value, list):
                    self._lists.append((value, list(value)))
                elif (
                    isinstance(value, Tensor) and id(value) not in own and not value.is_inference()
                ):
                    self._tensors.append((value, value.detach().clone(), value._version))

    def restore(self) -> None:
        for live, first in self._dicts:
            if live or first:
                live.clear()
                live.update(first)
        for live, first in self._lists:
            live[:] = first
        for i, (tensor, first, version) in enumerate(self._tensors):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(first)
                self._tensors[i] = (tensor, first, tensor._version)


@contextmanager
def _unobserved() -> Iterator[None]:
    """Hides torch operations from the modes around, which look at those of the network."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _unchanged(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether each tensor still has the values that it had; waits for a device once."""
    same = [((now == then) | (now.isnan() & then.isnan())).all() for now, then in pairs]
    return torch.stack([flag.to(same[0].device) for flag in same]).tolist() if same else []


def _foreign_buffers(net: nn.Module) -> list[str]:
    """Buffers of modules that are not torch's own, which may write to them in any mode."""
    own = {
        id(buffer)
        for part in net.modules()
        for buffer in part.buffers(recurse=False)
        if not type(part).__module__.startswith("torch.nn.modules.")
    }
    return [name for name, buffer in net.named_buffers() if id(buffer) in own]


def _renormalised(net: nn.Module) -> list[str]:
    """The weights that embeddings with `max_norm` write to whenever they are used."""
    renormalising = {
        id(part.weight)
        for part in net.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None
    }
    return [name for name, p in net.named_parameters() if id(p) in renormalising]


def check_model(model: object) -> None:
    """Refuses what is no `Model`.

    Raises:
        TypeError: it is something else; a module is told how to become one.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` is a {type(model).__name__}, expected a funcbayes.Model: make one with"
            " funcbayes.Model.from_module(net)"
        )


def _has_ties(net: nn.Module) -> bool:
    named = (net.named_parameters, net.named_buffers)
    return any(
        sum(1 for _ in each()) != sum(1 for _ in each(remove_duplicate=False)) for each in named
    )


def _arguments(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) and not hasattr(x, "_fields") else (x,)


def _select(
    net: nn.Module, bayesian: Callable[[str], bool] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if bayesian is not None and not callable(bayesian):
        raise TypeError(
            f"`bayesian` is {bayesian!r}, expected a predicate on parameter names, such as"
            ' lambda name: name.startswith("head")'
        )
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(_uninitialized("parameter", name))
        names.setdefault(id(parameter), []).append(name)
    chosen: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        if bayesian is None:
            selected = parameter.requires_grad
        else:
            selected = any(bayesian(alias) for alias in names[id(parameter)])
        (chosen if selected else others)[name] = parameter.detach()
    if not chosen:
        known = ", ".join(f"'{name}'" for name in list(others)[:5]) or "none at all"
        if bayesian is None:
            raise ValueError(
                f"no parameter of `net` requires gradients (it has {known}): pass `bayesian`, a"
                " predicate on names, to select the uncertain ones"
            )
        raise ValueError(
            f"`bayesian` selects no parameter, expected at least one of {known}"
            + (", …" if len(others) > 5 else "")
        )
    return chosen, others


def _buffers(net: nn.Module) -> dict[str, Tensor]:
    buffers = dict(net.named_buffers())
    for name, buffer in buffers.items():
        if isinstance(buffer, nn.parameter.UninitializedBuffer):
            raise ValueError(_uninitialized("buffer", name))
    return {name: buffer.detach() for name, buffer in buffers.items()}


def _uninitialized(kind: str, name: str) -> str:
    return f"{kind} '{name}' is not initialised yet: run one forward pass of the lazy module first"


def _check_params(params: TensorTree) -> None:
    named = leaves_with_names(params)
    if not named:
        raise ValueError("`params` has no leaves, expected a pytree of floating-point tensors")
    for name, leaf in named:
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"`params{name}` is a {type(leaf).__name__}, expected a floating-point tensor"
            )
        if not leaf.is_floating_point():
            raise ValueError(
                f"`params{name}` has dtype {leaf.dtype}, expected a real floating-point dtype:"
                " pass it among the constants"
            )


def _structural_copy(net: nn.Module) -> nn.Module:
    """A copy of the module tree that shares parameters and buffers with the original.

    Other tensors among its attributes are copied: a forward pass may write to them.
    """
    shared: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}

    def share(value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in shared:
                shared[id(value)] = value.detach().clone()
        elif isinstance(value, list | tuple):
            for item in value:
                share(item)
        elif isinstance(value, dict):
            for item in value.values():
                share(item)

    for module in net.modules():
        for value in vars(module).values():
            share(value)
    with torch.no_grad():
        try:
            return copy.deepcopy(net, memo=dict(shared))
        except Exception as error:
            where = _uncopyable(net, shared)
            raise TypeError(
                f"`net` cannot be copied, as {where} cannot ({error}): remove what does not belong"
                " to the computation, or give its class a `__deepcopy__`"
            ) from error


def _uncopyable(net: nn.Module, shared: dict[int, Any]) -> str:
    for name, module in net.named_modules():
        for attribute, value in vars(module).items():
            if attribute != "_modules":
                try:
                    copy.deepcopy(value, memo=dict(shared))
                except Exception:
                    return f"its attribute '{name + '.' if name else ''}{attribute}'"
    return f"a {type(net).__name__}"
