"""Calls that are affine in a network's parameters: seen, and answered in another way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funcbayes.core import trees, uses
from funcbayes.core.model import Model
from funcbayes.curvature import contractions
from funcbayes.curvature.perturbation import plain, with_graph
from funcbayes.posteriors import Draws
from funcbayes.prediction import planner

_AFFINE = (contractions.Linear, contractions.Conv, contractions.Added)


class Call(NamedTuple):
    """A call that is affine in its parameters.

    Attributes:
        func: the function.
        rule: its family.
        arguments: its arguments by name, the parameters under "weight" and "bias".
        weight: number of the leaf that "weight" is; None: no uncertain parameter.
        bias: likewise.
    """

    func: Callable[..., Tensor]
    rule: contractions.Rule
    arguments: contractions.Arguments
    weight: int | None
    bias: int | None

    def output(self, **replaced: Any) -> Tensor:
        """What the call gives, with other arguments in the place of its own."""
        return self.rule.forward(self.func, {**self.arguments, **replaced})[1]


class Uses(uses.Interpreter):
    """Answers each call that is affine in leaves of known numbers by `answer`."""

    def __init__(self, numbers: dict[int, int]) -> None:
        """Takes the numbers of leaves by their identity."""
        rules: dict[Callable[..., Any], uses.Rule] = {
            func: self._rule(func)
            for func, (rule, _) in contractions.RULES.items()
            if isinstance(rule, _AFFINE)
        }
        rules[F.multi_head_attention_forward] = self._multi_head_attention
        super().__init__(rules)
        self.numbers = numbers

    def answer(self, call: Call) -> Tensor:
        """What stands for the output of a call."""
        raise NotImplementedError

    def _unknown(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _is_leaf(self, value: Any) -> bool:
        return id(value) in self.numbers

    def _rule(self, func: Callable[..., Any]) -> uses.Rule:
        def rule(*args: Any, **kwargs: Any) -> Any:
            if not any(map(self._is_leaf, (*args, *kwargs.values()))):
                return func(*args, **kwargs)
            found = contractions.bind(func, args, kwargs, self._is_leaf)
            if found is None or self._is_leaf(found[1]["input"]):
                return self._unknown(func, args, kwargs)
            known, arguments = found
            weight, bias = (self.numbers.get(id(arguments[name])) for name in ("weight", "bias"))
            return self.answer(Call(func, known, arguments, weight, bias))

        return rule

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        if not any(map(self._is_leaf, (*args, *kwargs.values()))):
            return F.multi_head_attention_forward(*args, **kwargs)
        with self:
            return uses.multi_head_attention(*args, **kwargs)


class Watching(Uses):
    """Answers the calls, and tells `seen` of everything else that a leaf is given to."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answers by rule where there is one."""
        if func in self.rules:
            return super().__torch_function__(func, types, args, kwargs)
        return self._unknown(func, args, kwargs or {})

    def seen(self, number: int, name: str, *, takes_values: bool) -> None:
        """Is told of a function that was called with a leaf.

        Args:
            number: of the leaf.
            name: of the function.
            takes_values: whether its result may depend on more than the leaf's format.
        """
        raise NotImplementedError

    def _unknown(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        found = [i for i in map(self._number, trees.leaves((args, kwargs))) if i is not None]
        if not found:
            return result
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = f".{getattr(getattr(func, '__self__', None), '__name__', 'attribute')}"
        # Also those of a comparison, or of numbers that are none of torch's.
        taken = {self._number(leaf) for leaf in trees.leaves(uses.values_taken(func, args, kwargs))}
        for i in found:
            self.seen(i, name, takes_values=i in taken)
        return result

    def _number(self, value: Any) -> int | None:
        return self.numbers.get(id(value))


class Recorder(Watching):
    """Notes the calls, and passes nothing of their parameters on to autograd.

    Attributes:
        calls: with tensors like their outputs.
        others: the first other function that a leaf was given to, by its number.
        drawn: numbers of leaves whose values may go on from such a function.
    """

    def __init__(self, numbers: dict[int, int]) -> None:
        """Takes the numbers of leaves by their identity."""
        super().__init__(numbers)
        self.calls: list[tuple[Call, Tensor]] = []
        self.others: dict[int, str] = {}
        self.drawn: set[int] = set()

    def answer(self, call: Call) -> Tensor:
        """What the call gives."""
        names = ("weight", "bias")
        output = call.output(
            **{
                name: call.arguments[name].detach()
                for name in names
                if self._is_leaf(call.arguments[name])
            }
        )
        # Nothing but the shapes is asked of the call later: let go of the input.
        arguments = {name: call.arguments[name] for name in names}
        self.calls.append((call._replace(arguments=arguments), _like(output)))
        return output

    def seen(self, number: int, name: str, *, takes_values: bool) -> None:
        """Notes it down."""
        self.others.setdefault(number, name)
        if takes_values:
            self.drawn.add(number)


def record(model: Model, mean: Sequence[Tensor], x: Any) -> tuple["Recorder", set[int]]:
    """Runs the network once, and notes what it does with each parameter.

    Args:
        model: the network.
        mean: values of the leaves of its parameters.
        x: inputs.

    Returns:
        The calls, and the numbers of the leaves that the outputs depend on in any other way.
        Autograd knows of those that Python sees no call of (scripted code, a custom
        `autograd.Function`).

    Raises:
        ValueError: the network draws from torch's global generator.
    """
    with torch.inference_mode(False), with_graph(mean[0].device):
        leaves = [leaf.requires_grad_() for leaf in plain(list(mean))]
        recorder = Recorder({id(leaf): i for i, leaf in enumerate(leaves)})
        params = trees.unflatten(leaves, model.params)
        with recorder:
            outputs, _ = planner.measure(
                model, Draws(params, plain(model.constants), None), plain(x)
            )
        roots = [leaf for leaf in trees.tensor_leaves(outputs) if leaf.requires_grad]
        ones = [torch.ones_like(root) for root in roots]
        grads = torch.autograd.grad(roots, leaves, ones, allow_unused=True) if roots else ()
    return recorder, recorder.drawn | {i for i, grad in enumerate(grads) if grad is not None}


def _like(output: Tensor) -> Tensor:
    """A tensor of that shape, in the dtype that its noise has, without memory of its own."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.empty((), dtype=dtype, device=output.device).expand(output.shape)
