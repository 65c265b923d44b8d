"""Batched passes of small networks, noted down once and then run without the interpreter.

`vmap`, the module's calls and the rules for composites decide in Python which kernels run. For
a small network this takes longer than the kernels, and is the same for every call with inputs
of one shape: so the second call notes the kernels down, and later ones run them one after the
other. The results are the same to the bit.

What could come out otherwise another time is not noted down: a network that reads values of its
inputs (a branch, `.item()`, NumPy), draws random numbers, or uses tensors that are neither inputs
nor parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from funcbayes.core import trees, uses
from funcbayes.core.model import Model
from funcbayes.posteriors import Draws

# Kernels that draw numbers, or whose results have shapes that depend on values.
_VALUES = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
}
_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
}


class Recording(NamedTuple):
    """The kernels of one batched pass.

    Attributes:
        run: takes the tensors of parameters, constants and inputs, in this order, and gives
            those of the outputs.
        like: a tree with the structure of the outputs.
    """

    run: Callable[..., Sequence[Tensor]]
    like: Any

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The outputs."""
        return trees.unflatten(self.run(*inputs), self.like)


def inputs_of(model: Model, draws: Draws, x: Any) -> list[Tensor] | None:
    """All that a batched pass depends on, in order; None where a recording may not stand for it."""
    if (
        draws.masks is not None
        or draws.params is None
        or not isinstance(x, Tensor)
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    ):
        return None
    constants = {**model.constants, **(draws.constants or {})}
    found = [*trees.leaves(draws.params), *constants.values(), x]
    return found if all(type(leaf) in (Tensor, torch.nn.Parameter) for leaf in found) else None


def form(inputs: Sequence[Tensor]) -> Any:
    """What a recording depends on, beside the model."""
    formats = tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in inputs)
    return formats, inputs[-1].device, torch.get_default_dtype(), torch.is_inference_mode_enabled()


def record(evaluate: Callable[[], Any], inputs: Sequence[Tensor]) -> tuple[Any, Recording | None]:
    """Runs a batched pass and notes its kernels down.

    Args:
        evaluate: the pass, a function of `inputs` alone as far as anyone can tell.
        inputs: the tensors that it takes.

    Returns:
        The outputs, and the recording; None in its place where it could not stand for the pass.
    """
    tape = _Tape(inputs)
    with tape, _Watch(tape):
        outputs = evaluate()
    return outputs, tape.recording(outputs)


class _Tape(TorchDispatchMode):
    """Notes the kernels down, until something cannot be."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.sound = True
        self._graph = fx.Graph()
        # Weak, so that a recorded pass takes no more memory than another.
        self._nodes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for i, leaf in enumerate(inputs):
            self._nodes[leaf] = self._graph.placeholder(f"input_{i}")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def recording(self, outputs: Any) -> Recording | None:
        """What was noted down for these outputs."""
        nodes = [self._node(leaf) for leaf in trees.leaves(outputs)]
        if not self.sound:
            return None
        self._graph.output(tuple(nodes))
        module = fx.GraphModule(torch.nn.Module(), self._graph)
        like = trees.tree_map(lambda _: None, outputs)
        return Recording(module.forward, like)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.sound:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not _VALUES.isdisjoint(func.tags):
            self.sound = False
            return
        if func in _VIEWS and _same_view(args[0], result):
            self._nodes[result] = self._node(args[0])
            return
        noted = trees.tensor_map(self._node, (args, kwargs))
        if not self.sound:
            return
        node = self._graph.call_function(func, *noted)
        if isinstance(result, Tensor):
            self._nodes[result] = node
            return
        if not isinstance(result, tuple | list):
            self.sound = False
            return
        for i, part in enumerate(result):
            if isinstance(part, Tensor):
                self._nodes[part] = self._graph.call_function(_item, (node, i))
            elif part is not None:
                self.sound = False

    def _node(self, leaf: Any) -> Any:
        known = self._nodes.get(leaf)
        self.sound = self.sound and known is not None
        return known


class _Watch(TorchFunctionMode):
    """Spoils the tape where Python learns a value from a tensor."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_known(func, result):
            self._tape.sound = False
        return result


def _is_known(func: Any, result: Any) -> bool:
    """Whether what a function gave is tensors alone, or follows from their formats."""
    if isinstance(result, Tensor) or func in uses.FORMAT or result is None:
        return True
    if getattr(func, "__name__", "") == "__get__":  # an attribute, such as `shape`
        return True
    return all(isinstance(leaf, Tensor) for leaf in trees.leaves(result))


def _item(parts: Sequence[Tensor], i: int) -> Tensor:
    return parts[i]


def _same_view(of: Tensor, result: Tensor) -> bool:
    return (
        of.shape == result.shape
        and of.stride() == result.stride()
        and of.data_ptr() == result.data_ptr()
        and of.dtype == result.dtype
    )
