"""Per-datum output gradients: `vmap(grad)` over perturbations of the outputs of known uses.

Let f(ε, θ_general; x, y) be one datum's loss in which the k-th known use of parameters
computes `op(a, W, b) + ε_k`. One `vmap(grad(f, argnums=(0, 1), has_aux=True))` at ε = 0, the
recorded a as the auxiliary output, gives every datum's output gradients and, in the same pass,
the per-datum gradients of those parameters alone that have a use without a rule. The weights
themselves are constants of the pass, so the `[batch, parameters]` tensor never exists.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp, vmap

from funcbayes.core import trees, uses
from funcbayes.core.likelihoods import Likelihood
from funcbayes.core.model import Model
from funcbayes.curvature import contractions
from funcbayes.curvature.contractions import Arguments, Rule

_CHANGED = "under vmap the model does not use its parameters as it did on one datum"


class Use(NamedTuple):
    """One use of parameters that a rule knows, as the forward pass of one datum makes it.

    Attributes:
        rule: the rule that knows it.
        options: the rule's options for this call.
        weight: number of the parameter leaf that is the weight; None where the weight is
            something else, or takes the general path.
        bias: the same of the bias.
        output: an empty tensor with the shape and dtype of the output.
        overwritten: whether the model writes to the recorded tensor later on.
    """

    rule: Rule
    options: Any
    weight: int | None
    bias: int | None
    output: Tensor
    overwritten: bool


class Plan(NamedTuple):
    """What one datum's forward pass does with the parameters.

    Attributes:
        uses: the known uses, in the order of the calls.
        general: numbers of the leaves with a use that no rule knows.
        outputs: the model's outputs for one datum.
        bytes_per_datum: an estimate of the memory of the pass, without Hessian columns.
        bytes_per_column: the same for each column after the first.
        unbatchable: whether vmap has turned out to have no rule for the model.
    """

    uses: tuple[Use, ...]
    general: tuple[int, ...]
    outputs: Any
    bytes_per_datum: int
    bytes_per_column: int
    unbatchable: bool


class Gradients(NamedTuple):
    """What the pass over some data gives.

    Attributes:
        nll: `[batch]`.
        recorded: for each use `[batch, *shape]`.
        outputs: for each use, the gradients at its output `[batch, columns, *shape]`.
        general: for each general leaf, its gradients `[batch, columns, *shape]`.
    """

    nll: Tensor
    recorded: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    general: tuple[Tensor, ...]


class _Recorder(uses.Interpreter):
    """Meets every known use of the given leaves, and hands it to `on_use`."""

    def __init__(
        self,
        numbers: dict[int, int],
        on_use: Callable[[Callable[..., Any], Rule, Arguments, int | None, int | None], Tensor],
    ):
        composites = {
            F.multi_head_attention_forward: uses.multi_head_attention,
            F.scaled_dot_product_attention: uses.attention,
        }
        super().__init__(
            {func: partial(self._known, func) for func in contractions.RULES}
            | {func: partial(self._parts, parts) for func, parts in composites.items()}
        )
        self.numbers = numbers
        self.on_use = on_use

    def _known(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = contractions.bind(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        rule, arguments = found
        weight = self.numbers.get(id(arguments.get("weight")))
        bias = self.numbers.get(id(arguments.get("bias")))
        if weight is None and bias is None:
            return func(*args, **kwargs)
        return self.on_use(func, rule, arguments, weight, bias)

    def _parts(self, parts: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return parts(*args, **kwargs)


def discover(model: Model, leaves: Sequence[Tensor], x: Any, constants: Any) -> Plan:
    """Finds every known use of every parameter in the forward pass of one datum.

    A leaf takes the general path if the outputs depend on it in any other way. That is asked
    of autograd: the pass is made with the leaves of known uses detached, and whatever leaf the
    graph of the outputs still reaches has another use, also where Python sees no call at all
    (a view, a custom `autograd.Function`, scripted code).

    Args:
        model: the model.
        leaves: its parameters, in order; plain tensors.
        x: inputs of one datum, a batch of one.
        constants: replaces the model's constants.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found: list[tuple[Use, Tensor, int]] = []

    def on_use(func, rule, arguments, weight, bias) -> Tensor:
        for name, number in (("weight", weight), ("bias", bias)):
            if number is not None:
                arguments[name] = leaves[number].detach()
        recorded, output = rule.forward(func, arguments)
        # Detached memory of the size of the pass's perturbation keeps the graph alive, so that
        # the hook below counts what the pass will save.
        epsilon = torch.zeros_like(output, requires_grad=True)
        use = Use(rule, rule.options(arguments), weight, bias, output.detach(), False)
        found.append((use, recorded, recorded._version))
        return output + epsilon

    shared = {_storage(tensor) for tensor in (*leaves, *(constants or model.constants).values())}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in shared:
            saved[_storage(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
    counting = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with _with_graph(leaves[0].device), _Recorder(numbers, on_use), counting:
        outputs = model.apply(trees.unflatten(leaves, model.params), x, constants)
    roots = [leaf for leaf in trees.tensor_leaves(outputs) if leaf.requires_grad]
    reached = (
        torch.autograd.grad(roots, leaves, [r.detach() for r in roots], allow_unused=True)
        if roots
        else [None] * len(leaves)
    )
    general = tuple(number for number, g in enumerate(reached) if g is not None)

    known: list[Use] = []
    kept = 0
    for use, recorded, version in found:
        weight = None if use.weight in general else use.weight
        bias = None if use.bias in general else use.bias
        if weight is None and bias is None:
            continue
        kept += recorded.numel() * recorded.element_size()
        overwritten = recorded._version != version
        known.append(use._replace(weight=weight, bias=bias, overwritten=overwritten))
    columns = sum(u.output.numel() * u.output.element_size() for u in known)
    columns += sum(leaves[i].numel() * leaves[i].element_size() for i in general)
    # Twice: the backward pass holds about as much again as the forward pass saved.
    return Plan(
        uses=tuple(known),
        general=general,
        outputs=trees.tensor_map(Tensor.detach, outputs),
        bytes_per_datum=2 * (kept + sum(saved.values()) + columns),
        bytes_per_column=2 * columns,
        unbatchable=False,
    )


def per_datum_gradients(
    model: Model,
    leaves: Sequence[Tensor],
    plan: Plan,
    x: Any,
    y: Any,
    constants: Any,
    likelihood: Likelihood,
    *,
    root: bool,
) -> Gradients:
    """The one pass over some data.

    Args:
        model: the model.
        leaves: its parameters, in order; plain tensors.
        plan: of one datum of the same shapes.
        x: inputs, a tree with a leading batch axis.
        y: targets, a tree with a leading batch axis.
        constants: replaces the model's constants.
        likelihood: gives the loss.
        root: whether to send back the columns of the likelihood's Hessian root instead of the
            gradient of the loss.
    """
    epsilon = tuple(torch.zeros_like(use.output) for use in plan.uses)
    general = tuple(leaves[number] for number in plan.general)
    chosen = set(plan.general)
    numbers = {id(leaf): i for i, leaf in enumerate(leaves) if i not in chosen}

    def forward(epsilon, general, x) -> tuple[Any, tuple[Tensor, ...]]:
        recorded: list[Tensor] = []

        def on_use(func, rule, arguments, weight, bias) -> Tensor:
            a, output = rule.forward(func, arguments)
            position = len(recorded)
            use = plan.uses[position] if position < len(plan.uses) else None
            if (
                use is None
                or (use.rule, use.weight, use.bias) != (rule, weight, bias)
                or use.output.shape != output.shape
            ):
                raise RuntimeError(_CHANGED)
            recorded.append(a.clone() if use.overwritten else a)
            return output + epsilon[position]

        params = list(leaves)
        for number, leaf in zip(plan.general, general, strict=True):
            params[number] = leaf
        with _Recorder(numbers, on_use):
            outputs = model.apply(trees.unflatten(params, model.params), x, constants)
        if len(recorded) != len(plan.uses):
            raise RuntimeError(_CHANGED)
        return outputs, tuple(recorded)

    def loss(epsilon, general, x, y) -> tuple[Tensor, Any]:
        outputs, recorded = forward(epsilon, general, x)
        nll = likelihood.nll(outputs, y).sum()
        return nll, (nll, recorded)

    def gradient(x_tensors, y_tensors):
        x, y = batch_of_one(x_tensors), batch_of_one(y_tensors)
        if not root:
            grads, (nll, recorded) = grad(loss, argnums=(0, 1), has_aux=True)(
                epsilon, general, x, y
            )
            outputs, others = trees.tree_map(lambda g: g.unsqueeze(0), grads)
            return nll, recorded, outputs, others
        result, pull_back, recorded = vjp(  # pyright: ignore[reportAssignmentType]
            lambda epsilon, general: forward(epsilon, general, x), epsilon, general, has_aux=True
        )
        columns = likelihood.hessian_root(result)
        outputs, others = vmap(pull_back)(columns)
        return likelihood.nll(result, y).sum(), recorded, outputs, others

    def batch_of_one(tree):
        return trees.tensor_map(lambda leaf: leaf.unsqueeze(0), tree)

    x_leaves, y_leaves = trees.leaves(x), trees.leaves(y)

    def with_structure(x_tensors, y_tensors):
        return gradient(_fill(x_leaves, x_tensors, x), _fill(y_leaves, y_tensors, y))

    with uses.batchable():
        nll, recorded, outputs, others = vmap(with_structure)(
            trees.tensor_leaves(x), trees.tensor_leaves(y)
        )
    return Gradients(nll, recorded, outputs, others)


def _fill(leaves: list[Any], tensors: list[Tensor], like: Any) -> Any:
    """The tree `like`, whose leaves are given, with other tensors."""
    remaining: Iterator[Tensor] = iter(tensors)
    filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return trees.unflatten(filled, like)


def looped_squares(
    model: Model,
    leaves: Sequence[Tensor],
    x: Any,
    y: Any,
    constants: Any,
    likelihood: Likelihood,
    totals: Sequence[Tensor],
    *,
    root: bool,
) -> Tensor:
    """One datum after the other, by plain autograd: for models that vmap cannot batch.

    Args:
        model: the model.
        leaves: its parameters, in order; plain tensors.
        x: inputs, a tree with a leading batch axis.
        y: targets, a tree with a leading batch axis.
        constants: replaces the model's constants.
        likelihood: gives the loss.
        totals: for each leaf the sum that squared gradients are added to, in place.
        root: as for `per_datum_gradients`.

    Returns:
        The sum of the negative log likelihoods.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = torch.zeros((), dtype=totals[0].dtype, device=totals[0].device)
    for n in range(trees.tensor_leaves(x)[0].shape[0]):
        x_n, y_n = trees.tensor_map(lambda leaf, n=n: leaf[n : n + 1], (x, y))
        with _with_graph(loss.device):
            outputs = model.apply(trees.unflatten(leaves, model.params), x_n, constants)
            nll = likelihood.nll(outputs, y_n).sum()
        loss += nll.detach()
        if root:
            heads = trees.tensor_leaves(outputs)
            columns = trees.tensor_leaves(
                likelihood.hessian_root(trees.tensor_map(Tensor.detach, outputs))
            )
            pairs = [(heads, list(column)) for column in zip(*columns, strict=True)]
        else:
            pairs = [([nll], [torch.ones_like(nll)])]
        for i, (heads, cotangents) in enumerate(pairs):
            if not any(head.requires_grad for head in heads):
                continue
            grads = torch.autograd.grad(
                heads, leaves, cotangents, retain_graph=i + 1 < len(pairs), allow_unused=True
            )
            for total, g in zip(totals, grads, strict=True):
                if g is not None:
                    total += g.to(total.dtype).square()
    return loss


@contextmanager
def undisturbed() -> Iterator[None]:
    """Plain tensors, whatever modes the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _with_graph(device: torch.device) -> ExitStack:
    """Gradients on. cuDNN is off: it refuses to differentiate recurrent layers in eval mode."""
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    if device.type == "cuda":
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    return stack


def plain(tree: Any) -> Any:
    """Detached tensors that autograd may save: inference tensors are copied."""
    return trees.tensor_map(lambda t: t.clone() if t.is_inference() else t.detach(), tree)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, for one, has none
        return id(tensor)
