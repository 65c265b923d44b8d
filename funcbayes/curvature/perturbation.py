"""Per-datum output gradients: `vmap(grad)` over perturbations of the outputs of known uses.

Let f(ε, θ_general; x) be one datum's outputs, in which the k-th known use of parameters computes
`op(a, W, b) + ε_k`. One `vmap(vjp(f))` at ε = 0, the recorded a as the auxiliary output, pulls
every datum's cotangents back to the outputs of the uses and, in the same pass, to those
parameters alone that have a use without a rule. The weights themselves are constants of the
pass, so the `[batch, parameters]` tensor never exists.

Where every parameter has a rule, the per-datum axis need not be vmap's: the network may run on
the whole batch, and autograd gives the same cotangents, faster. That holds if no datum sees
another, and if it is known which axis of each use is that of the data. Both are found out by
running two data both ways.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp, vmap

from funcbayes.core import trees, uses
from funcbayes.core.batching import is_out_of_memory
from funcbayes.core.model import Model
from funcbayes.curvature import contractions
from funcbayes.curvature.contractions import Arguments, Rule


class ChangedUsesError(RuntimeError):
    """The model does not use its parameters as it did on the datum that was looked at."""

    def __init__(self) -> None:
        super().__init__("the model does not use its parameters as it did on one datum")


Columns = Callable[[Any, Any], Any]
"""`columns(outputs, extra)`: what is sent back from the outputs `[batch, *out]`, a tree like them
with leaves `[columns, batch, *out]`. `extra` is whatever it needs of each datum (targets, noise),
a tree with a leading batch axis."""


class Use(NamedTuple):
    """One use of parameters that a rule knows, as the forward pass of one datum makes it.

    Attributes:
        rule: the rule that knows it.
        options: the rule's options for this call.
        weight: number of the parameter leaf that is the weight; None where the weight is
            something else, or takes the general path.
        bias: the same of the bias.
        recorded: an empty tensor with the shape and dtype of what is recorded.
        output: an empty tensor with the shape and dtype of the output.
        overwritten: whether the model writes to the recorded tensor later on.
    """

    rule: Rule
    options: Any
    weight: int | None
    bias: int | None
    recorded: Tensor
    output: Tensor
    overwritten: bool


class DataAxis(NamedTuple):
    """Where the data are in a tensor of the pass over a whole batch.

    Attributes:
        axis: the axis that is as many times longer as there are data.
        outer: whether the datum is the slower index along it.
    """

    axis: int
    outer: bool

    def first(self, x: Tensor, size: int, lead: int) -> Tensor:
        """`[size, *shape of one datum]`, after `lead` axes that stay in front."""
        axis = self.axis + lead
        own = x.shape[axis] // size
        x = x.unflatten(axis, (size, own) if self.outer else (own, size))
        return x.movedim(axis if self.outer else axis + 1, 0)


class Layout(NamedTuple):
    """How a whole batch is run.

    Attributes:
        recorded: for each use, where the data are in what is recorded.
        outputs: for each use, where they are in the output.
        copies: whether the model gets copies of the outputs, because it writes to them.
    """

    recorded: tuple[DataAxis, ...]
    outputs: tuple[DataAxis, ...]
    copies: bool


class Plan(NamedTuple):
    """What one datum's forward pass does with the parameters.

    Attributes:
        uses: the known uses, in the order of the calls.
        general: numbers of the leaves with a use that no rule knows.
        unknown: by number of a leaf, the functions without a rule that took it.
        outputs: the model's outputs for one datum.
        bytes_per_datum: an estimate of the memory of the pass, without further columns.
        bytes_per_column: the same for each column after the first.
        unbatchable: whether vmap has turned out to have no rule for the model.
        layout: how to run whole batches; None where that is not possible, or not known.
        examined: whether `layout` is known.
        recurrent: whether recurrent layers that cuDNN computes are to be differentiated.
    """

    uses: tuple[Use, ...]
    general: tuple[int, ...]
    unknown: dict[int, tuple[str, ...]]
    outputs: Any
    bytes_per_datum: int
    bytes_per_column: int
    unbatchable: bool
    layout: Layout | None
    examined: bool
    recurrent: bool


class Gradients(NamedTuple):
    """What the pass over some data gives.

    Attributes:
        values: the outputs of the model, a tree with leaves `[batch, *out]`.
        recorded: for each use `[batch, *shape]`.
        outputs: for each use, the gradients at its output `[batch, columns, *shape]`.
        general: for each general leaf, its gradients `[batch, columns, *shape]`.
    """

    values: Any
    recorded: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    general: tuple[Tensor, ...]


class _Recorder(uses.Interpreter):
    """Meets every known use of the given leaves, and hands it to `on_use`."""

    def __init__(
        self,
        numbers: dict[int, int],
        on_use: Callable[[Callable[..., Any], Rule, Arguments, int | None, int | None], Tensor],
        on_unknown: Callable[[Callable[..., Any], int], None] | None = None,
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
        self.on_unknown = on_unknown

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if self.on_unknown is not None and func not in self.rules:
            self._note(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)

    def _note(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self.on_unknown is None:
            return
        for leaf in trees.tensor_leaves((args, kwargs)):
            number = self.numbers.get(id(leaf))
            if number is not None:
                self.on_unknown(func, number)

    def _known(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(id(arg) in self.numbers for arg in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        found = contractions.bind(func, args, kwargs, self._is_leaf)
        if found is None:
            self._note(func, args, kwargs)
            return func(*args, **kwargs)
        rule, arguments = found
        weight = self.numbers.get(id(arguments.get("weight")))
        bias = self.numbers.get(id(arguments.get("bias")))
        if weight is None and bias is None:
            return func(*args, **kwargs)
        return self.on_use(func, rule, arguments, weight, bias)

    def _is_leaf(self, value: Any) -> bool:
        return id(value) in self.numbers

    def _parts(self, parts: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return parts(*args, **kwargs)


def discover(
    model: Model, leaves: Sequence[Tensor], x: Any, constants: Any, *, recurrent: bool = False
) -> Plan:
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
        recurrent: whether it is known already that the plan's `recurrent` is True.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found: list[tuple[Use, Tensor, int]] = []
    unknown: dict[int, list[str]] = {}

    def on_use(func, rule, arguments, weight, bias) -> Tensor:
        for name, number in (("weight", weight), ("bias", bias)):
            if number is not None:
                arguments[name] = leaves[number].detach()
        recorded, output = rule.forward(func, arguments)
        # Detached memory of the size of the pass's perturbation keeps the graph alive, so that
        # the hook below counts what the pass will save.
        epsilon = torch.zeros_like(output, requires_grad=True)
        options = rule.options(arguments)
        use = Use(rule, options, weight, bias, recorded.detach(), output.detach(), False)
        found.append((use, recorded, recorded._version))
        return output + epsilon

    def on_unknown(func: Callable[..., Any], number: int) -> None:
        name = getattr(func, "__name__", str(func))
        names = unknown.setdefault(number, [])
        if name == "__get__":  # an attribute: `.T`, `.shape`, `.dtype`
            name = f".{getattr(getattr(func, '__self__', None), '__name__', 'attribute')}"
        if name not in names:
            names.append(name)

    shared = {_storage(tensor) for tensor in (*leaves, *(constants or model.constants).values())}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in shared:
            saved[_storage(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    numbers = {id(leaf): number for number, leaf in enumerate(leaves)}
    counting = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    graph = with_graph(leaves[0].device, recurrent=recurrent)
    with graph, _Recorder(numbers, on_use, on_unknown), counting:
        outputs = model.apply(trees.unflatten(leaves, model.params), x, constants)
    if not recurrent and meets_cudnn_recurrence(outputs):
        return discover(model, leaves, x, constants, recurrent=True)
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
        uses=tuple(
            use._replace(
                recorded=torch.empty_like(use.recorded), output=torch.empty_like(use.output)
            )
            for use in known
        ),
        general=general,
        unknown={number: tuple(unknown.get(number, ())) for number in general},
        outputs=trees.tensor_map(Tensor.detach, outputs),
        bytes_per_datum=2 * (kept + sum(saved.values()) + columns),
        bytes_per_column=2 * columns,
        unbatchable=False,
        layout=None,
        examined=bool(general) or not known,
        recurrent=recurrent,
    )


class _Pass(NamedTuple):
    """A forward pass with perturbed uses."""

    model: Model
    leaves: Sequence[Tensor]
    plan: Plan
    constants: Any

    def __call__(
        self,
        x: Any,
        general: Sequence[Tensor],
        mark: Callable[[int, Tensor], Tensor],
        *,
        alone: bool,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Outputs, and what the uses record.

        Args:
            x: inputs.
            general: replaces the general leaves.
            alone: whether `x` is one datum, so that the shapes must be the plan's.
            mark: gives what the model gets as the output of the use of that number.
        """
        plan = self.plan
        chosen = set(plan.general)
        numbers = {id(leaf): i for i, leaf in enumerate(self.leaves) if i not in chosen}
        recorded: list[Tensor] = []

        def on_use(func, rule, arguments, weight, bias) -> Tensor:
            position = len(recorded)
            use = plan.uses[position] if position < len(plan.uses) else None
            if use is None or (use.rule, use.weight, use.bias) != (rule, weight, bias):
                raise ChangedUsesError
            a, output = rule.forward(func, arguments)
            if alone and use.output.shape != output.shape:
                raise ChangedUsesError
            recorded.append(a.clone() if use.overwritten else a)
            return mark(position, output)

        params = list(self.leaves)
        for number, leaf in zip(plan.general, general, strict=True):
            params[number] = leaf
        with _Recorder(numbers, on_use):
            outputs = self.model.apply(
                trees.unflatten(params, self.model.params), x, self.constants
            )
        if len(recorded) != len(plan.uses):
            raise ChangedUsesError
        return outputs, tuple(recorded)


def gradients_by_vmap(
    model: Model,
    leaves: Sequence[Tensor],
    plan: Plan,
    x: Any,
    extra: Any,
    constants: Any,
    columns: Columns,
) -> Gradients:
    """The one pass over some data, each a batch of one under `vmap`.

    Args:
        model: the model.
        leaves: its parameters, in order; plain tensors.
        plan: of one datum of the same shapes.
        x: inputs, a tree with a leading batch axis.
        extra: for `columns`, a tree with a leading batch axis.
        constants: replaces the model's constants.
        columns: what is sent back from the outputs.
    """
    run = _Pass(model, leaves, plan, constants)
    epsilon = tuple(torch.zeros_like(use.output) for use in plan.uses)
    general = tuple(leaves[number] for number in plan.general)

    def of_one(x_tensors, extra_tensors):
        x_one = _batch_of_one(_fill(x_leaves, x_tensors, x))
        extra_one = _batch_of_one(_fill(extra_leaves, extra_tensors, extra))
        result, pull_back, recorded = vjp(  # pyright: ignore[reportAssignmentType]
            lambda epsilon, general: run(x_one, general, _plus(epsilon), alone=True),
            epsilon,
            general,
            has_aux=True,
        )
        outputs, others = vmap(pull_back)(columns(result, extra_one))
        return _of_the_one(result), recorded, outputs, others

    x_leaves, extra_leaves = trees.leaves(x), trees.leaves(extra)
    with uses.batchable():
        return Gradients(*vmap(of_one)(trees.tensor_leaves(x), trees.tensor_leaves(extra)))


def _plus(epsilon: Sequence[Tensor]) -> Callable[[int, Tensor], Tensor]:
    return lambda position, output: output + epsilon[position]


def gradients_by_loop(
    model: Model,
    leaves: Sequence[Tensor],
    plan: Plan,
    x: Any,
    extra: Any,
    constants: Any,
    columns: Columns,
) -> Gradients:
    """As `gradients_by_vmap`, one datum after the other: for models that vmap cannot batch."""
    parts = []
    size = trees.tensor_leaves(x)[0].shape[0]
    for n in range(size):
        x_one, extra_one = trees.tensor_map(lambda leaf, n=n: leaf[n : n + 1], (x, extra))
        parts.append(_by_autograd(model, leaves, plan, x_one, extra_one, constants, columns))
    return trees.tree_map(lambda *leaf: torch.cat(leaf), *parts)


def without_rules(plan: Plan, num_leaves: int) -> Plan:
    """A plan in which all leaves take the general path, for models whose uses differ by datum."""
    return plan._replace(uses=(), general=tuple(range(num_leaves)), layout=None, examined=True)


def _by_autograd(model, leaves, plan, x, extra, constants, columns) -> Gradients:
    """One datum, without a transform."""
    run = _Pass(model, leaves, plan, constants)
    with with_graph(leaves[0].device, recurrent=plan.recurrent):
        epsilon = [torch.zeros_like(use.output, requires_grad=True) for use in plan.uses]
        general = [leaves[number].detach().requires_grad_() for number in plan.general]
        outputs, recorded = run(x, general, _plus(epsilon), alone=True)
        values = trees.tensor_map(Tensor.detach, outputs)
        sent = columns(values, extra)
        grads = _pulled(outputs, sent, [*epsilon, *general], one_by_one=True)
    num = len(epsilon)
    return Gradients(
        values,
        tuple(a.detach().unsqueeze(0) for a in recorded),
        tuple(g.unsqueeze(0) for g in grads[:num]),
        tuple(g.unsqueeze(0) for g in grads[num:]),
    )


def gradients_by_batch(
    model: Model,
    leaves: Sequence[Tensor],
    plan: Plan,
    x: Any,
    extra: Any,
    constants: Any,
    columns: Columns,
) -> Gradients:
    """As `gradients_by_vmap`, by the network on the whole batch; `plan.layout` must be known."""
    if plan.layout is None:
        raise RuntimeError("it is not known where the data are in this model's tensors")
    size = trees.tensor_leaves(x)[0].shape[0]
    values, recorded, grads = _whole_batch(
        model, leaves, plan, x, extra, constants, columns, copies=plan.layout.copies
    )
    return Gradients(
        values,
        tuple(
            axis.first(a, size, 0) for axis, a in zip(plan.layout.recorded, recorded, strict=True)
        ),
        tuple(axis.first(g, size, 1) for axis, g in zip(plan.layout.outputs, grads, strict=True)),
        (),
    )


def _whole_batch(
    model, leaves, plan, x, extra, constants, columns, *, copies: bool
) -> tuple[Any, tuple[Tensor, ...], list[Tensor]]:
    """Outputs, recorded tensors as they came, and gradients `[columns, *shape]` as they came."""
    nodes: list[Tensor] = []
    versions: list[int] = []

    def mark(position: int, output: Tensor) -> Tensor:
        # A use of tensors without a graph begins it; the others have one already.
        node = output if output.requires_grad else output.detach().requires_grad_()
        nodes.append(node)
        versions.append(node._version)
        return node.clone() if copies else node

    with with_graph(leaves[0].device, recurrent=plan.recurrent):
        outputs, recorded = _Pass(model, leaves, plan, constants)(x, (), mark, alone=False)
        if [node._version for node in nodes] != versions:
            # Autograd would differentiate to what it was overwritten with.
            raise RuntimeError("the model writes to the output of a use")
        values = trees.tensor_map(Tensor.detach, outputs)
        sent = columns(values, extra)
        grads = _pulled(outputs, sent, nodes, one_by_one=False)
    return values, tuple(a.detach() for a in recorded), grads


def _pulled(outputs: Any, sent: Any, to: list[Tensor], *, one_by_one: bool) -> list[Tensor]:
    """Gradients `[columns, *shape]` of cotangents `[columns, *out]` of the outputs."""
    pairs = [
        (root, column)
        for root, column in zip(
            trees.tensor_leaves(outputs), trees.tensor_leaves(sent), strict=True
        )
        if root.requires_grad
    ]
    num = trees.tensor_leaves(sent)[0].shape[0]
    if not pairs:
        return [x.new_zeros(num, *x.shape) for x in to]
    roots = [root for root, _ in pairs]
    columns = [column for _, column in pairs]

    def filled(grads: Sequence[Tensor | None], *lead: int) -> list[Tensor]:
        return [
            x.new_zeros(*lead, *x.shape) if g is None else g for x, g in zip(to, grads, strict=True)
        ]

    if num > 1 and not one_by_one:
        grads = torch.autograd.grad(roots, to, columns, is_grads_batched=True, allow_unused=True)
        return filled(grads, num)
    each = [
        filled(
            torch.autograd.grad(
                roots, to, [c[i] for c in columns], retain_graph=i + 1 < num, allow_unused=True
            )
        )
        for i in range(num)
    ]
    return (
        [torch.stack(g) for g in zip(*each, strict=True)]
        if num > 1
        else [g.unsqueeze(0) for g in each[0]]
    )


def examine(
    model: Model,
    leaves: Sequence[Tensor],
    plan: Plan,
    x: Any,
    extra: Any,
    constants: Any,
    columns: Columns,
) -> Plan:
    """Finds out whether whole batches may be run, on two data; gives the plan that knows.

    Args:
        model: as for `gradients_by_vmap`.
        leaves: as for `gradients_by_vmap`.
        plan: one that is not examined yet.
        x: as for `gradients_by_vmap`.
        extra: as for `gradients_by_vmap`.
        constants: as for `gradients_by_vmap`.
        columns: as for `gradients_by_vmap`.
    """
    if plan.examined or trees.tensor_leaves(x)[0].shape[0] < 2:
        return plan
    x, extra = trees.tensor_map(lambda leaf: leaf[:2], (x, extra))
    plan = plan._replace(examined=True)
    for copies in (False, True):
        try:
            # cuDNN may take another algorithm for each, and round to 10 bits in either (TF32):
            # more than the two may differ by.
            with without_cudnn(leaves[0].device):
                whole = _whole_batch(
                    model, leaves, plan, x, extra, constants, columns, copies=copies
                )
                # Under vmap, so that a model that looks at values, and might do otherwise on
                # other data, is found out.
                each = gradients_by_vmap(model, leaves, plan, x, extra, constants, columns)
        except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            continue  # it fails on batches: the other ways will say why, if they fail too
        layout = _layout(whole, each, copies=copies)
        if layout is not None:
            return plan._replace(layout=layout)
    return plan


def _layout(whole: Any, each: Gradients, *, copies: bool) -> Layout | None:
    """Where the data are, if both ways agree."""
    values, recorded, grads = whole
    if not all(map(_alike, trees.tensor_leaves(values), trees.tensor_leaves(each.values))):
        return None
    inputs = [_data_axis(a, b, 0, _FORWARD) for a, b in zip(recorded, each.recorded, strict=True)]
    outputs = [_data_axis(a, b, 1, _BACKWARD) for a, b in zip(grads, each.outputs, strict=True)]
    found_in = tuple(axis for axis in inputs if axis is not None)
    found_out = tuple(axis for axis in outputs if axis is not None)
    if len(found_in) < len(inputs) or len(found_out) < len(outputs):
        return None
    return Layout(found_in, found_out, copies)


def _alike(a: Tensor, b: Tensor) -> bool:
    return _same(a, b, _FORWARD)


# How far, in norm, the two ways may differ on two data: well above rounding (the gradients of a
# deep network in float32 are that rough) and well below what a datum that sees another changes.
_FORWARD, _BACKWARD = 1e-4, 2e-2


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype != wide:
        tolerance = max(tolerance, 4 * torch.finfo(a.dtype).eps)
    a, b = a.to(wide), b.to(wide)
    return bool((a - b).norm() <= tolerance * b.norm())


def _data_axis(whole: Tensor, each: Tensor, lead: int, tolerance: float) -> DataAxis | None:
    """The axis of the data in `whole`, `each` being `[data, *lead, *shape]`; None if none fits."""
    size, shape = each.shape[0], each.shape[1 + lead :]
    if whole.dim() != lead + len(shape):
        return None
    for axis, (length, own) in enumerate(zip(whole.shape[lead:], shape, strict=True)):
        rest = [i for i in range(len(shape)) if i != axis]
        if length != size * own or any(whole.shape[lead + i] != shape[i] for i in rest):
            continue
        for outer in (True, False):
            candidate = DataAxis(axis, outer)
            if _same(candidate.first(whole, size, lead), each, tolerance):
                return candidate
    return None


def _batch_of_one(tree: Any) -> Any:
    return trees.tensor_map(lambda leaf: leaf.unsqueeze(0), tree)


def _of_the_one(tree: Any) -> Any:
    return trees.tensor_map(lambda leaf: leaf.squeeze(0), tree)


def _fill(leaves: list[Any], tensors: list[Tensor], like: Any) -> Any:
    """The tree `like`, whose leaves are given, with other tensors."""
    remaining: Iterator[Tensor] = iter(tensors)
    filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return trees.unflatten(filled, like)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Plain tensors, whatever modes the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def with_graph(device: torch.device, *, recurrent: bool = True) -> ExitStack:
    """Gradients on.

    Args:
        device: of the model.
        recurrent: whether there may be recurrent layers: cuDNN is off then, which refuses to
            differentiate them in evaluation mode.
    """
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    if recurrent:
        stack.enter_context(without_cudnn(device))
    return stack


# What each pass that is without cuDNN found the setting to be, the first one's first.
_found_cudnn: list[bool] = []
_cudnn_lock = threading.Lock()


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Without cuDNN, or AMD's MIOpen, where the device is CUDA's.

    The setting is the whole process's: the last of the threads that are inside puts it back.
    Nothing else is set: `torch.backends.cudnn.flags` sets determinism and precision as well, and
    raises an error where `torch.backends.fp32_precision` was set before.
    """
    if device.type != "cuda":
        yield
        return
    with _cudnn_lock:
        _found_cudnn.append(torch.backends.cudnn.enabled)
        torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        with _cudnn_lock:
            before = _found_cudnn.pop()
            if not _found_cudnn:
                torch._C._set_cudnn_enabled(before)


def meets_cudnn_recurrence(outputs: Any) -> bool:
    """Whether autograd goes from the outputs through recurrent layers that cuDNN computed.

    The graph knows it of scripted layers, too, which no mode sees.
    """
    waiting = [leaf.grad_fn for leaf in trees.tensor_leaves(outputs)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith(("CudnnRnn", "MiopenRnn")):
            return True
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


def plain(tree: Any) -> Any:
    """Detached tensors that autograd may save: inference tensors are copied."""
    return trees.tensor_map(lambda t: t.clone() if t.is_inference() else t.detach(), tree)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, for one, has none
        return id(tensor)
