"""Priors and temperatures as they are given, turned into what the blocks of a curvature take."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.likelihoods.common import known_false
from funcbayes.core.trees import TensorTree
from funcbayes.curvature.blocks import Curvature, EigenKroneckerBlock, KroneckerBlock

Groups = dict[tuple[str, ...], Tensor]
"""A tensor for each block of a curvature: a scalar, or the group's flat vector `[n]`."""

Prior = float | Tensor | TensorTree


def prior_precisions(prior_precision: Any, curvature: Curvature, mean: TensorTree) -> Groups:
    """The prior precision of each block: a scalar where one number stands for all of it.

    Raises:
        TypeError: a precision is not a number or a tensor.
        ValueError: one is not positive and finite, has another shape than its leaf, or stands
            for an entry where the block takes one for the tensor; the tree has other leaves.
    """
    values = _by_leaf(prior_precision, mean, "prior_precision", _positive)
    shapes = _shapes(mean)
    groups: Groups = {}
    for names, block in curvature.blocks.items():
        like = trees.leaves(block)[0]
        parts = [values[name][1] for name in names]
        for name in names:
            _check_representable(*values[name], like.dtype)
        if _one_number(parts):
            groups[names] = torch.as_tensor(parts[0], dtype=like.dtype, device=like.device)
            continue
        if isinstance(block, KroneckerBlock | EigenKroneckerBlock):
            where, part = values[names[0]]
            raise ValueError(
                f"`{where}` has shape {tuple(part.shape)}, expected a number: a Kronecker"
                " structure takes one prior precision for a tensor. One for each entry fits"
                ' structure="dense", "block_diagonal", "diagonal" or "low_rank"'
            )
        groups[names] = torch.cat([_spread(values[n][1], shapes[n], like) for n in names])
    return groups


def deviations(prior_mean: Any, curvature: Curvature, mean: TensorTree) -> Groups:
    """θ − μ₀ for each block, its flat vector.

    Raises:
        TypeError: a mean is not a number or a tensor.
        ValueError: one is not finite or has another shape than its leaf; the tree has other
            leaves.
    """
    values = _by_leaf(prior_mean, mean, "prior_mean", _finite)
    found = dict(zip(trees.names(mean), trees.leaves(mean), strict=True))
    groups: Groups = {}
    for names, block in curvature.blocks.items():
        like = trees.leaves(block)[0]
        theta = torch.cat([found[name].to(like.dtype).flatten() for name in names])
        parts = [_spread(values[name][1], found[name].shape, like) for name in names]
        groups[names] = theta - torch.cat(parts)
    return groups


def leaf_precisions(prior_precision: Any, mean: TensorTree) -> TensorTree:
    """The prior precision of each leaf, a scalar or a tensor of its shape; a tree like `mean`.

    Raises:
        TypeError: as for `prior_precisions`.
        ValueError: as for `prior_precisions`.
    """
    values = _by_leaf(prior_precision, mean, "prior_precision", _positive).values()
    # Numbers in float64, in which more of them are positive and finite than by default.
    return trees.unflatten(
        [value if isinstance(value, Tensor) else _float64(value) for _, value in values],
        mean,
    )


def leaf_deviations(prior_mean: Any, mean: TensorTree) -> TensorTree:
    """θ − μ₀, a tree like `mean`.

    Raises:
        TypeError: as for `deviations`.
        ValueError: as for `deviations`.
    """
    values = _by_leaf(prior_mean, mean, "prior_mean", _finite).values()
    leaves = trees.leaves(mean)
    return trees.unflatten(
        [
            leaf - torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device)
            for leaf, (_, value) in zip(leaves, values, strict=True)
        ],
        mean,
    )


def check_temperature(value: Any) -> float | Tensor:
    """The temperature, once it is known to be one positive number."""
    if isinstance(value, Tensor) and value.dim():
        raise ValueError(f"`temperature` has shape {tuple(value.shape)}, expected a scalar")
    return _positive(value, "temperature")


def positive(value: Any, name: str) -> float | Tensor:
    """A number or tensor that is positive and finite, as far as its values can be known."""
    return _positive(value, name)


def check_number(value: Any, name: str) -> float:
    """A plain number that is positive and finite."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` is a {type(value).__name__}, expected a number")
    return float(_positive(value, name))


def check_curvature(curvature: Any, mean: TensorTree) -> None:
    """Refuses a curvature that does not cover every parameter once.

    Raises:
        TypeError: it is something else.
        ValueError: it covers other leaves, or one of them more than once.
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"`state.curvature` is a {type(curvature).__name__}, expected a Curvature: the result"
            " of laplace.fit, or of a function of funcbayes.curvature"
        )
    covered = [name for names in curvature.blocks for name in names]
    expected = trees.names(mean)
    if sorted(covered) != sorted(expected):
        missing = [name for name in expected if name not in covered]
        extra = [name for name in covered if name not in expected]
        twice = [name for name in set(covered) if covered.count(name) > 1]
        parts = [f"'{name}' has no block" for name in missing[:3]]
        parts += [f"'{name}' is not a parameter" for name in extra[:3]]
        parts += [f"'{name}' is in two blocks" for name in sorted(twice)[:3]]
        raise ValueError(
            "`state.curvature` does not belong to `state.mean`, expected each parameter in one"
            f" block: {'; '.join(parts)}"
        )


def _by_leaf(given: Any, mean: TensorTree, argument: str, check: Any) -> dict[str, tuple[str, Any]]:
    """For each leaf its name in messages and its number or tensor."""
    if _is_scalar(given):
        value = check(given, argument)
        return dict.fromkeys(trees.names(mean), (argument, value))
    if not trees.same_structure(given, mean):
        raise ValueError(_other_structure(given, mean, argument))
    found = {}
    pairs = zip(trees.leaves_with_names(given), trees.leaves(mean), strict=True)
    for name, ((path, value), leaf) in zip(trees.names(mean), pairs, strict=True):
        path = f"{argument}{path}"
        if isinstance(value, Tensor) and value.dim() and value.shape != leaf.shape:
            shape, wanted = tuple(value.shape), tuple(leaf.shape)
            hint = ": was it transposed?" if shape == wanted[::-1] else ""
            raise ValueError(f"`{path}` has shape {shape}, expected () or {wanted}{hint}")
        found[name] = path, check(value, path)
    return found


def _other_structure(given: Any, mean: TensorTree, argument: str) -> str:
    found = {name for name, _ in trees.leaves_with_names(given)}
    expected = {name for name, _ in trees.leaves_with_names(mean)}
    parts = [f"{argument}{name} is missing" for name in sorted(expected - found)[:3]]
    parts += [f"{argument}{name} is not expected" for name in sorted(found - expected)[:3]]
    came = type(given).__name__
    if isinstance(given, Tensor):
        came += f" of shape {tuple(given.shape)}"
    return (
        f"`{argument}` is a {came}, expected a number, or a tree like the parameters of"
        f" numbers or of tensors of their shapes: {'; '.join(parts) or 'its containers differ'}"
    )


def _float64(value: float) -> Tensor:
    # On CPU, whatever the default device: there it goes with tensors of any.
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _one_number(parts: list[Any]) -> bool:
    """Whether one scalar stands for all leaves of a group, without looking at tensors' values."""
    first = parts[0]
    if isinstance(first, Tensor):
        return first.dim() == 0 and all(part is first for part in parts)
    return all(not isinstance(part, Tensor) and part == first for part in parts)


def _spread(value: Any, shape: torch.Size, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.expand(shape).flatten()


def _shapes(mean: TensorTree) -> dict[str, torch.Size]:
    return dict(zip(trees.names(mean), (leaf.shape for leaf in trees.leaves(mean)), strict=True))


def _is_scalar(value: Any) -> bool:
    return (isinstance(value, Real) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and value.dim() == 0
    )


def _positive(value: Any, name: str) -> float | Tensor:
    value = _real(value, name)
    if isinstance(value, Tensor):
        if known_false(((value > 0) & value.isfinite()).all()):
            came = f"{float(value)}" if value.dim() == 0 else f"as low as {float(value.min())}"
            raise ValueError(f"`{name}` is {came}, expected positive and finite")
    elif not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value}, expected positive and finite")
    return value


def _check_representable(name: str, value: float | Tensor, dtype: torch.dtype) -> None:
    """A precision is positive and finite in the dtype of its block, too."""
    tensor = value if isinstance(value, Tensor) else _float64(value)
    rounded = tensor.to(dtype)
    if known_false(((rounded > 0) & rounded.isfinite()).all()):
        wrong = tensor[~((rounded > 0) & rounded.isfinite())].flatten()[0]
        raise ValueError(
            f"`{name}` is {float(wrong):g}, which is {float(wrong.to(dtype)):g} in {dtype}, the"
            " curvature's dtype, expected positive and finite there"
        )


def _finite(value: Any, name: str) -> float | Tensor:
    value = _real(value, name)
    if isinstance(value, Tensor):
        if known_false(value.isfinite().all()):
            raise ValueError(f"`{name}` holds NaN or infinity, expected finite numbers")
    elif not math.isfinite(value):
        raise ValueError(f"`{name}` is {value}, expected a finite number")
    return value


def _real(value: Any, name: str) -> float | Tensor:
    if not isinstance(value, Real | Tensor) or isinstance(value, bool):
        raise TypeError(f"`{name}` is a {type(value).__name__}, expected a number or a tensor")
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"`{name}` has dtype {value.dtype}, expected a real number")
        return value
    return float(value)
