"""Products of a curvature matrix with vectors, without the matrix.

H V costs a few passes of the network for each column of V, whatever the size of H, so it serves
where H itself is too large: eigenpairs, the trace, conjugate gradients. The vectors go forward
through the network as tangents, meet the curvature of the loss in the outputs, and come back as
cotangents; all columns share one evaluation of the network.

The network is applied to whole batches, in evaluation mode.

Source:
    Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147, for the Hessian; Schraudolph (2002),
    doi:10.1162/08997660260028683, for the generalised Gauss-Newton matrix and the Fisher.
"""

# ruff: noqa: FBT001, FBT002 (the rules at the end have torch's signatures)

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from funcbayes.core import trees, uses
from funcbayes.core.batching import is_out_of_memory
from funcbayes.core.data import batch_size, batches
from funcbayes.core.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    check_likelihood,
    hessian_root,
)
from funcbayes.core.model import Model, check_model
from funcbayes.curvature import perturbation

logger = logging.getLogger("funcbayes")

KINDS = ("ggn", "hessian", "empirical_fisher")

# Memory that one pass may take for activations and their tangents, and for the tangents of
# the parameters; data and columns at a time follow from it.
CHUNK_BYTES = 2**28
# Columns at a time that are worth more than data at a time: they share the network's evaluation.
WORTHWHILE_COLUMNS = 8

# Their `nll` has the matrix of `hessian_root` as its Hessian, whatever the targets.
_EXACT = (Bernoulli, Categorical, Gaussian, Poisson)

Columns = tuple[Tensor, ...]
"""For each chosen leaf `[columns, *shape]`."""


class CurvatureOperator:
    """V ↦ H V over a whole data set, which is gone through once a product.

    ```python
    import torch
    from torch import nn

    from funcbayes.core.likelihoods import Categorical
    from funcbayes.core.model import Model
    from funcbayes.curvature.products import CurvatureOperator

    model = Model.from_module(nn.Linear(4, 3))
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    operator = CurvatureOperator(model, data, Categorical(), "ggn")
    product = operator(torch.randn(operator.size, 2))  # [15, 2]
    ```

    Attributes:
        size: n, the number of entries of the chosen leaves.
        dtype: of the products: that of the chosen leaves, at least float32.
        device: of the products.
        num_products: how often the data were gone through.
        num_data: how many data there are; None before the first product.
    """

    def __init__(
        self,
        model: Model,
        data: Any,
        likelihood: Likelihood,
        kind: str = "ggn",
        *,
        leaves: Sequence[Tensor] | None = None,
        chosen: Sequence[int] | None = None,
        constants: Any = None,
        column_weights: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> None:
        """Keeps what the products need; no datum is read yet.

        Args:
            model: the network, at whose parameters the curvature is taken.
            data: an iterable of `(inputs, targets)` batches that can be gone through again and
                again, or one such pair. It must give the same data each time, in any order.
            likelihood: as for `curvature_product`.
            kind: as for `curvature_product`.
            leaves: as for `curvature_product`; None: the leaves of `model.params`.
            chosen: as for `curvature_product`; None: all.
            constants: as for `curvature_product`.
            column_weights: as for `curvature_product`.
            chunk_size: as for `curvature_product`.

        Raises:
            TypeError: as for `curvature_product`.
            ValueError: `data` is an iterator, which is exhausted after one product; otherwise as
                for `curvature_product`.
        """
        check_reiterable(data)
        check_model(model)
        if leaves is None:
            leaves = trees.leaves(model.params)
        if chosen is None:
            chosen = range(len(leaves))
        self._problem = _problem(
            model, leaves, chosen, likelihood, kind, constants, column_weights, chunk_size
        )
        self._data = data
        self.size = self._problem.size
        self.dtype = self._problem.dtype
        self.device = self._problem.device
        self.num_products = 0
        self.num_data: int | None = None

    def __call__(self, vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """H V.

        Args:
            vectors: V, a column a vector.

        Raises:
            TypeError: as for `curvature_product`.
            ValueError: `data` gave another number of data than before; otherwise as for
                `curvature_product`.
        """
        product, num_data = _product(self._problem, self._data, vectors)
        if self.num_data not in (None, num_data):
            raise ValueError(
                f"`data` gave {num_data} data on pass {self.num_products + 1} and {self.num_data}"
                " before, expected the same data on every pass: materialise it, as by"
                " `data = list(data)`"
            )
        self.num_data = num_data
        self.num_products += 1
        return product


def check_reiterable(data: Any) -> None:
    """Refuses an iterator, which can be gone through only once.

    Raises:
        ValueError: it is one.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"`data` is an iterator (a {type(data).__name__}), which is exhausted after one pass,"
            " expected an iterable that can be gone through repeatedly: pass a DataLoader or"
            " `list(data)`"
        )


def curvature_product(
    model: Model,
    leaves: Sequence[Tensor],
    chosen: Sequence[int],
    data: Any,
    likelihood: Likelihood,
    kind: str,
    vectors: Float[Tensor, "n k"],
    *,
    constants: Any = None,
    column_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "n k"]:
    """H V with the curvature H of the chosen leaves, summed over the data.

    Args:
        model: the network.
        leaves: its parameters, in order, at which the curvature is taken.
        chosen: numbers of the leaves that H is over; the others are constants. Its flat vector
            holds their entries one leaf behind the other, in the order given here.
        data: an iterable of `(inputs, targets)` batches, or one such pair.
        likelihood: gives the loss and its curvature in the outputs.
        kind: "ggn" (Σ JᵀΛJ), "hessian" (of Σ −log p(y | f(x))) or "empirical_fisher" (Σ g gᵀ, g
            the gradient of one datum's −log p).
        vectors: V, a column a vector.
        constants: replaces the model's constants.
        column_weights: w ≥ 0, with a shape that broadcasts to that of one datum's outputs; Λ
            becomes diag(√w) Λ diag(√w). A mask restricts Λ to some outputs: with `Gaussian`,
            whose Λ is diagonal, the parts of H that single outputs make. For "ggn" alone.
        chunk_size: data at a time; None: as many as fit `CHUNK_BYTES` by estimate. Memory and
            speed depend on it, the result does not (to rounding).

    Returns:
        H V, in at least float32.

    Raises:
        TypeError: `data` does not yield pairs, or an argument has the wrong type.
        ValueError: `data` yields nothing, targets do not fit the outputs, a shape is wrong, the
            product is NaN or infinite, or an option is unknown.
    """
    problem = _problem(
        model, leaves, chosen, likelihood, kind, constants, column_weights, chunk_size
    )
    return _product(problem, data, vectors)[0]


def hessian_dense(
    model: Model,
    leaves: Sequence[Tensor],
    chosen: Sequence[int],
    data: Any,
    likelihood: Likelihood,
    *,
    kind: str = "hessian",
    constants: Any = None,
    column_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "n n"]:
    """The matrix itself, from its products with unit vectors, in one pass over the data.

    Args:
        model: as for `curvature_product`.
        leaves: as for `curvature_product`.
        chosen: as for `curvature_product`.
        data: as for `curvature_product`.
        likelihood: as for `curvature_product`.
        kind: as for `curvature_product`.
        constants: as for `curvature_product`.
        column_weights: as for `curvature_product`.
        chunk_size: as for `curvature_product`.

    Returns:
        H, exactly symmetric. Costs n products: for small groups of leaves.

    Raises:
        TypeError: as for `curvature_product`.
        ValueError: as for `curvature_product`.
    """
    problem = _problem(
        model, leaves, chosen, likelihood, kind, constants, column_weights, chunk_size
    )
    total = torch.zeros(problem.size, problem.size, dtype=problem.dtype, device=problem.device)

    def add(start: int, stop: int, rows: Tensor) -> None:
        total[start:stop] += rows

    _accumulate(problem, data, problem.size, _unit_vectors(problem), add)
    trees.check_finite(total, name="curvature")
    return (total + total.mT) / 2


def hessian_diagonal(
    model: Model,
    leaves: Sequence[Tensor],
    chosen: Sequence[int],
    data: Any,
    likelihood: Likelihood,
    *,
    kind: str = "hessian",
    constants: Any = None,
    column_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, " n"]:
    """The diagonal of the matrix, from its products with unit vectors, in one pass over the data.

    Args:
        model: as for `curvature_product`.
        leaves: as for `curvature_product`.
        chosen: as for `curvature_product`.
        data: as for `curvature_product`.
        likelihood: as for `curvature_product`.
        kind: as for `curvature_product`.
        constants: as for `curvature_product`.
        column_weights: as for `curvature_product`.
        chunk_size: as for `curvature_product`.

    Returns:
        The diagonal of H; exact. Costs n products, as H does, but the memory of a few.

    Raises:
        TypeError: as for `curvature_product`.
        ValueError: as for `curvature_product`.
    """
    problem = _problem(
        model, leaves, chosen, likelihood, kind, constants, column_weights, chunk_size
    )
    total = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)

    def add(start: int, stop: int, rows: Tensor) -> None:
        total[start:stop] += rows[:, start:stop].diagonal()

    _accumulate(problem, data, problem.size, _unit_vectors(problem), add)
    trees.check_finite(total, name="curvature")
    return total


class _Problem(NamedTuple):
    """What a product needs besides the data and the vectors; checked."""

    model: Model
    leaves: list[Tensor]
    chosen: tuple[int, ...]
    likelihood: Likelihood
    kind: str
    constants: Any
    column_weights: Tensor | None
    chunk_size: int | None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[number] for number in self.chosen)

    @property
    def size(self) -> int:
        return sum(leaf.numel() for leaf in self.weights)

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def dtype(self) -> torch.dtype:
        dtype = torch.float32
        for leaf in self.weights:
            dtype = torch.promote_types(dtype, leaf.dtype)
        return dtype

    def outputs(self, weights: Sequence[Tensor], x: Any) -> Any:
        params = list(self.leaves)
        for number, leaf in zip(self.chosen, weights, strict=True):
            params[number] = leaf
        return self.model.apply(trees.unflatten(params, self.model.params), x, self.constants)


class _Plan(NamedTuple):
    """What is known of the network for inputs of some shape.

    Attributes:
        outputs: those of one datum.
        bytes_per_datum: memory of what a backward pass of one datum needs.
        looped: whether torch lacks a rule for the batched pass.
        recurrent: whether recurrent layers that cuDNN computes are to be differentiated.
    """

    outputs: Any
    bytes_per_datum: int
    looped: bool
    recurrent: bool


def _problem(
    model: Any,
    leaves: Sequence[Tensor],
    chosen: Sequence[int],
    likelihood: Any,
    kind: Any,
    constants: Any,
    column_weights: Any,
    chunk_size: Any,
) -> _Problem:
    check_model(model)
    check_likelihood(likelihood)
    if kind not in KINDS:
        known = ", ".join(f'"{k}"' for k in KINDS)
        raise ValueError(f"`kind` is {kind!r}, expected one of {known}")
    if len(leaves) != len(trees.leaves(model.params)):
        raise ValueError(
            f"`leaves` has {len(leaves)} tensors, expected {len(trees.leaves(model.params))}, the"
            " leaves of `model.params`"
        )
    chosen = tuple(chosen)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(len(leaves))):
        raise ValueError(
            f"`chosen` is {chosen}, expected different numbers from 0 to {len(leaves) - 1}, at"
            " least one"
        )
    if column_weights is not None:
        _check_column_weights(column_weights, kind)
    if chunk_size is not None:
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
            raise TypeError(f"`chunk_size` is {chunk_size!r}, expected an int or None")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` is {chunk_size}, expected at least 1, or None")
    with perturbation.undisturbed():
        leaves = [perturbation.plain(leaf) for leaf in leaves]
        if constants is None and any(c.is_inference() for c in model.constants.values()):
            constants = model.constants
        constants, column_weights = perturbation.plain((constants, column_weights))
    return _Problem(model, leaves, chosen, likelihood, kind, constants, column_weights, chunk_size)


def _check_column_weights(column_weights: Any, kind: str) -> None:
    if kind != "ggn":
        raise ValueError(
            f'`column_weights` came with `kind` "{kind}", expected "ggn": they are factors of its'
            " matrix Λ in the outputs"
        )
    if not isinstance(column_weights, Tensor):
        raise TypeError(
            f"`column_weights` is a {type(column_weights).__name__}, expected a tensor that"
            " broadcasts to the outputs of one datum"
        )
    if not bool((torch.isfinite(column_weights) & (column_weights >= 0)).all()):
        raise ValueError(
            "`column_weights` has entries that are negative, NaN or infinite, expected finite"
            " numbers of at least 0"
        )


def _product(problem: _Problem, data: Any, vectors: Any) -> tuple[Tensor, int]:
    if not isinstance(vectors, Tensor):
        raise TypeError(f"`vectors` is a {type(vectors).__name__}, expected a tensor")
    if vectors.dim() != 2 or vectors.shape[0] != problem.size:
        raise ValueError(
            f"`vectors` has shape {tuple(vectors.shape)}, expected ({problem.size}, k), a column a"
            " vector over the entries of the chosen leaves"
        )
    with perturbation.undisturbed():
        rows = perturbation.plain(vectors).mT
        total = torch.zeros(rows.shape, dtype=problem.dtype, device=problem.device)

    def columns(start: int, stop: int) -> Tensor:
        return rows[start:stop]

    def add(start: int, stop: int, products: Tensor) -> None:
        total[start:stop] += products

    num_data = _accumulate(problem, data, len(rows), columns, add)
    names = trees.names(problem.model.params)
    check_curvature([names[i] for i in problem.chosen], [total], problem.likelihood)
    return total.mT, num_data


def _unit_vectors(problem: _Problem) -> Callable[[int, int], Tensor]:
    def columns(start: int, stop: int) -> Tensor:
        rows = torch.zeros(stop - start, problem.size, dtype=problem.dtype, device=problem.device)
        rows[:, start:stop].fill_diagonal_(1)
        return rows

    return columns


def _accumulate(
    problem: _Problem,
    data: Any,
    num_columns: int,
    columns: Callable[[int, int], Tensor],
    add: Callable[[int, int, Tensor], None],
) -> int:
    """Hands the products of each part of the data with each part of the columns to `add`.

    Args:
        problem: what is multiplied.
        data: what it is summed over.
        num_columns: how many columns there are.
        columns: gives columns `start` to `stop` as rows, `[stop − start, n]`.
        add: takes `start`, `stop` and their products, `[stop − start, n]`.

    Returns:
        The number of data.
    """
    scratch, num_data = problem.model._scratch, 0
    for number, (x, y) in enumerate(batches(data)):
        size = batch_size(x)
        for name, leaf in trees.leaves_with_names(x):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != size):
                raise ValueError(
                    f"inputs{name} of batch {number} of `data` has shape {tuple(leaf.shape)},"
                    f" expected a leading batch axis of {size}, as the first of the inputs has"
                )
        with perturbation.undisturbed():
            x, y = perturbation.plain((x, y))
            signature = ("product", problem.kind, problem.chosen, trees.signature(x))
            plan: _Plan | None = scratch.plans.get(signature)
            if plan is None:
                plan = _discover(problem, trees.tensor_map(lambda t: t[:1], x))
            _check_outputs(problem, plan.outputs, y, size)
            step, width = _at_a_time(problem, plan, num_columns)
            for start in range(0, size, step):
                rows = slice(start, start + step)
                part = trees.tensor_map(lambda t, rows=rows: t[rows], (x, y))
                plan = _part_products(problem, plan, part, num_columns, width, columns, add)
            scratch.remember(scratch.plans, signature, plan)
        num_data += size
    return num_data


def _part_products(
    problem: _Problem,
    plan: _Plan,
    part: tuple[Any, Any],
    num_columns: int,
    width: int,
    columns: Callable[[int, int], Tensor],
    add: Callable[[int, int, Tensor], None],
) -> _Plan:
    """The products of some data with all columns; gives the plan for the rest."""
    done = 0
    if not plan.looped:
        try:
            with _twice_differentiable(problem.device, recurrent=plan.recurrent):
                multiply = _batched(problem, *part)
                for start in range(0, num_columns, width):
                    stop = min(start + width, num_columns)
                    products = multiply(_as_leaves(problem, columns(start, stop)))
                    add(start, stop, _as_rows(products, problem.dtype))
                    done = stop
            return plan
        except (RuntimeError, NotImplementedError) as error:
            # The forward pass ran, so what fails is its tangents or their batching, and torch
            # says so in many words. A true error comes again in the loop.
            if is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0].split(". ")[0]
            logger.warning(
                "no batched curvature products for this model (%s): columns run one by one", reason
            )
            plan = plan._replace(looped=True)
    differentiable = _twice_differentiable(problem.device, recurrent=plan.recurrent)
    with differentiable, torch.enable_grad():
        multiply = _looped(problem, *part)
        for start in range(done, num_columns, width):
            stop = min(start + width, num_columns)
            products = multiply(_as_leaves(problem, columns(start, stop)))
            add(start, stop, _as_rows(products, problem.dtype))
    return plan


def _batched(problem: _Problem, x: Any, y: Any) -> Callable[[Columns], Columns]:
    """The products with some data's curvature, all columns at once, tangents forward."""
    likelihood, weights = problem.likelihood, problem.weights
    if problem.kind == "hessian":

        def loss(weights: tuple[Tensor, ...]) -> Tensor:
            return likelihood.nll(problem.outputs(weights, x), y).sum()

        return vmap(lambda tangent: jvp(grad(loss), (weights,), (tangent,))[1])

    def heads(weights: tuple[Tensor, ...]) -> Any:
        outputs = problem.outputs(weights, x)
        return likelihood.nll(outputs, y) if problem.kind == "empirical_fisher" else outputs

    values, pull_back = vjp(heads, weights)  # pyright: ignore[reportAssignmentType]
    middle = _middle(problem, values, y)

    def multiply(columns: Columns) -> Columns:
        tangents = vmap(lambda tangent: jvp(heads, (weights,), (tangent,))[1])(columns)
        return vmap(pull_back)(middle(tangents))[0]

    return multiply


def _looped(problem: _Problem, x: Any, y: Any) -> Callable[[Columns], Columns]:
    """The same by plain autograd, backward twice, one column after the other."""
    likelihood = problem.likelihood
    weights = tuple(leaf.detach().requires_grad_() for leaf in problem.weights)
    outputs = problem.outputs(weights, x)

    def columnwise(multiply: Callable[[Columns], Sequence[Tensor]]) -> Callable[[Columns], Columns]:
        def multiply_all(columns: Columns) -> Columns:
            products = [multiply(column) for column in zip(*columns, strict=True)]
            return tuple(torch.stack(leaf) for leaf in zip(*products, strict=True))

        return multiply_all

    if problem.kind == "hessian":
        slope = _grad([likelihood.nll(outputs, y).sum()], weights, None, create_graph=True)
        return columnwise(lambda column: _grad(slope, weights, column))

    heads = likelihood.nll(outputs, y) if problem.kind == "empirical_fisher" else outputs
    tensors = trees.tensor_leaves(heads)
    middle = _middle(problem, trees.tensor_map(Tensor.detach, heads), y)
    # The backward pass is linear in its cotangent, and its transpose pushes tangents forward.
    dummies = [torch.zeros_like(head).requires_grad_() for head in tensors]
    pulled = _grad(tensors, weights, dummies, create_graph=True)

    def multiply(column: Columns) -> Sequence[Tensor]:
        tangents = trees.unflatten(_grad(pulled, dummies, column), heads)
        cotangents = middle(trees.tensor_map(lambda t: t.unsqueeze(0), tangents))
        return _grad(tensors, weights, [c[0] for c in trees.tensor_leaves(cotangents)])

    return columnwise(multiply)


def _grad(
    heads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    *,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    """`torch.autograd.grad` that is zero where nothing depends on the inputs."""
    kept = [i for i, head in enumerate(heads) if head.requires_grad]
    if not kept:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return torch.autograd.grad(
        [heads[i] for i in kept],
        inputs,
        None if cotangents is None else [cotangents[i] for i in kept],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _middle(problem: _Problem, outputs: Any, y: Any) -> Callable[[Any], Any]:
    """Applies Λ to tangents `[columns, batch, *out]` of the outputs; to the Fisher's, nothing."""
    if problem.kind == "empirical_fisher":
        return lambda tangents: tangents
    likelihood = problem.likelihood
    if type(likelihood) in _EXACT:
        # Not the columns of the root: with many positions they are far more than the outputs.
        pull_back = vjp(grad(lambda f: likelihood.nll(f, y).sum()), outputs)[1]

        def multiply_one(u: Tensor) -> Tensor:
            if isinstance(likelihood, Categorical):
                # Λ ignores what all logits have in common. Without the share of the top class,
                # u - Σ pᵢuᵢ does not cancel where that class is all but certain.
                axis = likelihood.class_dim
                u = u - u.gather(axis, outputs.argmax(axis, keepdim=True))
            return pull_back(u)[0]

        multiply = vmap(multiply_one)  # pyright: ignore[reportAssignmentType]
    else:
        root = trees.tensor_map(lambda r: r.flatten(2), hessian_root(likelihood, outputs, y))
        factors = trees.tensor_leaves(root)

        def multiply(tangents: Any) -> Any:
            parts = trees.tensor_leaves(tangents)
            inner = torch.stack(
                [
                    torch.einsum("rbo,cbo->crb", r, u.flatten(2))
                    for r, u in zip(factors, parts, strict=True)
                ]
            ).sum(0)
            products = [
                torch.einsum("crb,rbo->cbo", inner, r).view_as(u)
                for r, u in zip(factors, parts, strict=True)
            ]
            return trees.unflatten(products, tangents)

    if problem.column_weights is None:
        return multiply
    scale = problem.column_weights.sqrt().to(outputs.dtype)
    return lambda tangents: scale * multiply(scale * tangents)


def _discover(problem: _Problem, x: Any) -> _Plan:
    """The plan, from a forward pass of one datum."""
    weights = tuple(leaf.detach().requires_grad_() for leaf in problem.weights)
    tensors = (*problem.leaves, *(problem.constants or problem.model.constants).values())
    shared = {_storage(tensor) for tensor in (*tensors, *weights)}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in shared:
            saved[_storage(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    counting = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    differentiable = _twice_differentiable(problem.device, recurrent=False)
    with differentiable, torch.enable_grad(), counting:
        outputs = problem.outputs(weights, x)
    heads = sum(t.numel() * t.element_size() for t in trees.tensor_leaves(outputs))
    return _Plan(
        outputs=trees.tensor_map(Tensor.detach, outputs),
        bytes_per_datum=sum(saved.values()) + heads,
        looped=False,
        recurrent=perturbation.meets_cudnn_recurrence(outputs),
    )


def _check_outputs(problem: _Problem, one: Any, y: Any, size: int) -> None:
    # The outputs of one datum stand for those of all, so that a wrong label is refused with
    # a message before it becomes an index.
    problem.likelihood.check(trees.tensor_map(lambda t: t[:1].expand(size, *t.shape[1:]), one), y)
    weights = problem.column_weights
    if weights is None:
        return
    if not isinstance(one, Tensor):
        raise TypeError(
            f"the model returns a {type(one).__name__}, expected a tensor beside `column_weights`"
        )
    shape, came = one.shape[1:], weights.shape
    tail = shape[len(shape) - len(came) :]
    if len(came) > len(shape) or any(a not in (1, b) for a, b in zip(came, tail, strict=True)):
        raise ValueError(
            f"`column_weights` has shape {tuple(came)}, expected one that broadcasts to"
            f" {tuple(shape)}, the outputs of one datum"
        )


def _at_a_time(problem: _Problem, plan: _Plan, num_columns: int) -> tuple[int, int]:
    """How many data, and how many columns, one pass takes."""
    per_column = 3 * problem.size * torch.empty((), dtype=problem.dtype).element_size()
    # The tangents of all that the backward pass needs, and the cotangents on the way back.
    per_datum = 2 * plan.bytes_per_datum + 1
    width = max(WORTHWHILE_COLUMNS, CHUNK_BYTES // (16 * per_datum))
    width = max(1, min(num_columns, width, CHUNK_BYTES // per_column))
    step = problem.chunk_size or max(1, CHUNK_BYTES // (per_datum * (1 + width)))
    return step, width


def _as_leaves(problem: _Problem, rows: Tensor) -> Columns:
    """Rows `[columns, n]` as `[columns, *shape]` for each chosen leaf."""
    weights = problem.weights
    parts = rows.split([leaf.numel() for leaf in weights], dim=1)
    return tuple(
        part.reshape(len(rows), *leaf.shape).to(leaf.dtype)
        for part, leaf in zip(parts, weights, strict=True)
    )


def _as_rows(columns: Columns, dtype: torch.dtype) -> Tensor:
    return torch.cat([leaf.detach().flatten(1).to(dtype) for leaf in columns], dim=1)


@contextmanager
def _twice_differentiable(device: torch.device, *, recurrent: bool) -> Iterator[None]:
    """Without kernels that cannot be differentiated twice, forward or under vmap.

    Those of attention, embeddings and weight norm are replaced; cuDNN's recurrent ones need
    training mode.

    Args:
        device: of the model.
        recurrent: whether there are any.
    """
    without = perturbation.without_cudnn(device) if recurrent else nullcontext()
    with uses.Interpreter({**uses.batchable().rules, **_RULES}), without:
        yield


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding` whose derivatives agree in all directions.

    Torch's takes the row of `padding_idx` for a constant backward but not forward, and counts
    the indices of the whole batch in `scale_grad_by_freq`, which is no property of the function:
    here such a row is a constant, and gradients are not scaled.
    """
    del scale_grad_by_freq, sparse
    out = F.embedding(input, weight, max_norm=max_norm, norm_type=norm_type)
    if padding_idx is None:
        return out
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, out.detach(), out)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag` by its parts where the bags are of one length: its kernel has no jvp."""
    if offsets is not None or input.dim() != 2 or mode == "max" or padding_idx is not None:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            per_sample_weights, include_last_offset, padding_idx,
        )  # fmt: skip
    out = F.embedding(input, weight, max_norm=max_norm, norm_type=norm_type)
    if per_sample_weights is not None:
        out = out * per_sample_weights.unsqueeze(-1)
    return out.mean(1) if mode == "mean" else out.sum(1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm` by its parts: its kernel has no jvp, and a wrong second derivative."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: uses.layer_norm,
    F.instance_norm: uses.instance_norm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
}


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, for one, has none
        return id(tensor)


def check_curvature(names: Sequence[str], numbers: Sequence[Tensor], likelihood: Any) -> None:
    """Refuses NaN and infinite values.

    Args:
        names: of the parameters that the numbers belong to.
        numbers: blocks or products of the curvature.
        likelihood: what the curvature is of.

    Raises:
        ValueError: a value is not finite; the message says what may be the reason.
    """
    if trees.is_finite(list(numbers)):
        return
    reason = (
        "does a gradient overflow, does the network take a root or a logarithm of 0, or do the"
        " inputs hold infinite values?"
    )
    if getattr(likelihood, "hessian_needs_targets", False):
        reason = (
            "is the negative log likelihood convex in the outputs at every datum? A Hessian in"
            " them with a negative eigenvalue has no root. Or " + reason
        )
    raise ValueError(f"the curvature of {listed(names)} is not finite: {reason}")


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
