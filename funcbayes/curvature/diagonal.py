"""Diagonal curvature: sums over the data of squared per-datum gradients.

Source:
    Martens (2020), arXiv:1412.1193, for the generalised Gauss-Newton matrix and the (empirical)
    Fisher; Dangel, Kunstner and Hennig (2020), arXiv:1912.10985, for the contractions of
    Linear and convolution. Departs from both in that the pass differentiates to perturbations
    of the outputs of parameter uses, so that no special layers or hooks are needed, and weights
    used more than once, or in a way that has no rule, are exact.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.batching import is_out_of_memory
from funcbayes.core.data import batch_size, batches
from funcbayes.core.likelihoods import Likelihood, check_likelihood
from funcbayes.core.model import Model, check_model
from funcbayes.core.trees import TensorTree
from funcbayes.curvature import perturbation
from funcbayes.curvature.contractions import SLICE_BYTES, sum_of_squares
from funcbayes.curvature.perturbation import Gradients, Plan, Use

logger = logging.getLogger("funcbayes")

CURVATURES = ("ggn", "empirical_fisher")
STRUCTURES = ("diagonal",)

# Memory that one pass may take for activations and gradients, from which the number of data
# at a time follows. Larger passes are no faster: they leave the cache at every operation.
CHUNK_BYTES = 2**28


class CurvatureSums(NamedTuple):
    """Curvature, and what else the same pass gives.

    Attributes:
        curvature: tree like the parameters, summed over the data.
        loss: Σ -log p(y | f(x)), in nats. Shape [].
        num_data: how many data were seen. Shape [], int64.
    """

    curvature: TensorTree
    loss: Tensor
    num_data: Tensor


def ggn(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    structure: str = "diagonal",
    chunk_size: int | None = None,
) -> TensorTree:
    """The generalised Gauss-Newton matrix Σ JᵀΛJ over the data, exactly.

    Args:
        model: the network, at whose parameters it is taken.
        data: an iterable of `(inputs, targets)` batches, or one such pair. Each datum is
            given to the model as a batch of one.
        likelihood: gives Λ, the Hessian of -log p(y | outputs) in the outputs.
        structure: which part of it: "diagonal".
        chunk_size: data at a time; None: as many as fit `CHUNK_BYTES` by estimate. Memory
            and speed depend on it, the result does not (to rounding).

    Returns:
        Tree like `model.params`, in at least float32: the diagonal.

    Raises:
        TypeError: `data` does not yield pairs, or an argument has the wrong type.
        ValueError: `data` yields nothing, targets do not fit the outputs, the loss, a weight or
            a gradient is NaN or infinite, or an option is unknown.
    """
    sums = curvature_sums(
        model, data, likelihood, curvature="ggn", structure=structure, chunk_size=chunk_size
    )
    return sums.curvature


def empirical_fisher(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    structure: str = "diagonal",
    chunk_size: int | None = None,
) -> TensorTree:
    """The empirical Fisher Σ g gᵀ, g the gradient of one datum's -log p(y | f(x)), exactly.

    Args:
        model: as for `ggn`.
        data: as for `ggn`.
        likelihood: gives the loss.
        structure: as for `ggn`.
        chunk_size: as for `ggn`.

    Returns:
        Tree like `model.params`, in at least float32: the diagonal.

    Raises:
        TypeError: as for `ggn`.
        ValueError: as for `ggn`.
    """
    sums = curvature_sums(
        model,
        data,
        likelihood,
        curvature="empirical_fisher",
        structure=structure,
        chunk_size=chunk_size,
    )
    return sums.curvature


def curvature_sums(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    curvature: str,
    structure: str = "diagonal",
    chunk_size: int | None = None,
) -> CurvatureSums:
    """The curvature of that name together with the loss and the number of data.

    Args:
        model: as for `ggn`.
        data: as for `ggn`.
        likelihood: as for `ggn`.
        curvature: "ggn" or "empirical_fisher".
        structure: as for `ggn`.
        chunk_size: as for `ggn`.

    Raises:
        TypeError: as for `ggn`.
        ValueError: as for `ggn`.
    """
    _check_options(model, likelihood, curvature, structure, chunk_size)
    trees.check_finite(model.params, name="params")
    trees.check_finite(model.constants, name="constants")
    root = curvature == "ggn"
    with perturbation.undisturbed():
        leaves = [perturbation.plain(leaf) for leaf in trees.leaves(model.params)]
        constants = None
        if any(constant.is_inference() for constant in model.constants.values()):
            constants = perturbation.plain(model.constants)
        totals = [torch.zeros_like(leaf, dtype=_accumulator(leaf.dtype)) for leaf in leaves]
        loss, num_data = torch.zeros((), dtype=totals[0].dtype, device=totals[0].device), 0
    # A plan holds for every fit of this model; the pass notices where it does not.
    plans = model._scratch.plans

    for number, (x, y) in enumerate(batches(data)):
        size = batch_size(x)
        _check_leading_axes(x, size, number)
        with perturbation.undisturbed():
            x, y = perturbation.plain((x, y))
            signature = ("curvature", _signature(x))
            plan: Plan | None = plans.get(signature)
            if plan is None:
                one = trees.tensor_map(lambda t: t[:1], x)
                plan = perturbation.discover(model, leaves, one, constants)
            _check_targets(likelihood, plan.outputs, y, size)
            step = chunk_size or _data_at_a_time(plan, likelihood, root=root)
            for start in range(0, size, step):
                rows = slice(start, start + step)
                part = trees.tensor_map(lambda t, rows=rows: t[rows], (x, y))
                nll, plan = _add_squares(
                    model, leaves, plan, part, constants, likelihood, totals, root=root
                )
                loss += nll
            model._scratch.remember(signature, plan)
            finite = bool(torch.isfinite(loss))
        if not finite:
            raise ValueError(
                f"the loss of batch {number} of `data` is not finite (it is {float(loss)}): did"
                " training diverge, or do the inputs hold NaN or infinite values?"
            )
        num_data += size

    with perturbation.undisturbed():
        count = torch.tensor(num_data, device=loss.device)
    curvature_tree = trees.unflatten(totals, model.params)
    # A finite loss may have an infinite slope: the root of an output that is zero, for one.
    trees.check_finite(curvature_tree, name="curvature")
    return CurvatureSums(curvature_tree, loss, count)


def _add_squares(
    model: Model,
    leaves: Sequence[Tensor],
    plan: Plan,
    data: tuple[Any, Any],
    constants: Any,
    likelihood: Likelihood,
    totals: Sequence[Tensor],
    *,
    root: bool,
) -> tuple[Tensor, Plan]:
    """Adds the squares of some data to `totals`; gives their loss, and the plan for the rest."""
    x, y = data
    if not plan.unbatchable:
        try:
            gradients = perturbation.per_datum_gradients(
                model, leaves, plan, x, y, constants, likelihood, root=root
            )
        except (RuntimeError, NotImplementedError) as error:
            # The plan's forward pass ran, so what fails is its batching, and torch says so in
            # many words (recurrent layers complain of shapes).
            if is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0].split(". ")[0]
            logger.warning("vmap cannot batch this model (%s): its data run in a loop", reason)
            plan = plan._replace(unbatchable=True)
        else:
            _contract(plan, gradients, totals)
            return gradients.nll.sum().to(totals[0].dtype), plan
    nll = perturbation.looped_squares(model, leaves, x, y, constants, likelihood, totals, root=root)
    return nll, plan


def _contract(plan: Plan, gradients: Gradients, totals: Sequence[Tensor]) -> None:
    """Adds the squared gradients of every leaf to its total."""
    for number, g in zip(plan.general, gradients.general, strict=True):
        totals[number].add_(sum_of_squares(g.to(totals[number].dtype)))

    uses_of: dict[int, list[int]] = {}
    for position, use in enumerate(plan.uses):
        for number in (use.weight, use.bias):
            if number is not None:
                uses_of.setdefault(number, []).append(position)
    for number, positions in uses_of.items():
        total = totals[number]
        parts = [
            _Part(
                plan.uses[position],
                plan.uses[position].weight == number,
                _widen(gradients.recorded[position], total.dtype),
                gradients.outputs[position].to(total.dtype),
            )
            for position in positions
        ]
        total.add_(parts[0].squares(total.shape) if len(parts) == 1 else _joined(parts, total))


class _Part(NamedTuple):
    """One parameter's side of one use."""

    use: Use
    is_weight: bool
    recorded: Tensor
    grads: Tensor

    def squares(self, shape: torch.Size) -> Tensor:
        rule, options = self.use.rule, self.use.options
        if self.is_weight:
            return rule.weight_squares(options, self.recorded, self.grads, shape)
        return rule.bias_squares(options, self.grads)

    def gradients(self, rows: slice, shape: torch.Size) -> Tensor:
        rule, options, grads = self.use.rule, self.use.options, self.grads[rows]
        if self.is_weight:
            return rule.weight_gradients(options, self.recorded[rows], grads, shape)
        return rule.bias_gradients(options, grads)


def _joined(parts: Sequence[_Part], total: Tensor) -> Tensor:
    """Several uses of one parameter: their gradients add up before they are squared."""
    squares = torch.zeros_like(total)
    batch, columns = parts[0].grads.shape[:2]
    step = max(1, SLICE_BYTES // (columns * total.numel() * total.element_size()))
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        gradients = parts[0].gradients(rows, total.shape)
        for part in parts[1:]:
            gradients = gradients + part.gradients(rows, total.shape)
        squares += sum_of_squares(gradients)
    return squares


def _widen(recorded: Tensor, dtype: torch.dtype) -> Tensor:
    return recorded.to(dtype) if recorded.is_floating_point() else recorded


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _data_at_a_time(plan: Plan, likelihood: Likelihood, *, root: bool) -> int:
    columns = 1
    if root:
        columns = trees.tensor_leaves(likelihood.hessian_root(plan.outputs))[0].shape[0]
    return max(1, CHUNK_BYTES // (plan.bytes_per_datum + (columns - 1) * plan.bytes_per_column + 1))


def _signature(inputs: Any) -> Any:
    """What the plan of a forward pass depends on: everything but the values of the tensors."""
    return tuple(
        (name, tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else (name, repr(x))
        for name, x in trees.leaves_with_names(inputs)
    )


def _check_targets(likelihood: Likelihood, outputs: Any, targets: Any, size: int) -> None:
    # The outputs of one datum stand for those of all, so that a wrong label is refused with
    # a message before it becomes an index.
    likelihood.check(trees.tensor_map(lambda t: t[:1].expand(size, *t.shape[1:]), outputs), targets)


def _check_leading_axes(x: Any, size: int, number: int) -> None:
    for name, leaf in trees.leaves_with_names(x):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != size):
            raise ValueError(
                f"inputs{name} of batch {number} of `data` has shape {tuple(leaf.shape)}, expected"
                f" a leading batch axis of {size}, as the first of the inputs has"
            )


def _check_options(
    model: Any, likelihood: Any, curvature: Any, structure: Any, chunk_size: Any
) -> None:
    check_model(model)
    check_likelihood(likelihood)
    _check_choice(curvature, CURVATURES, "curvature")
    _check_choice(structure, STRUCTURES, "structure")
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"`chunk_size` is {chunk_size!r}, expected an int or None")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}, expected at least 1, or None")


def _check_choice(value: Any, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` is {value!r}, expected one of {known}")
