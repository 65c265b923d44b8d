"""Pytrees of tensors. The only file that touches torch's private pytree module.

Nested dicts, lists, tuples and NamedTuples are trees; everything else is a leaf.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

TensorTree = Any
"""A pytree whose leaves are tensors. An alias for readers: torch has no type for it."""


def tree_map(f: Callable[..., Any], tree: TensorTree, *rest: TensorTree) -> TensorTree:
    """Applies `f` leaf by leaf to trees of one structure."""
    # A tenth of the time, for the commonest trees.
    if isinstance(tree, Tensor):
        return f(tree, *rest)
    if _is_flat(tree) and all(_same_keys(r, tree) for r in rest):
        return {name: f(leaf, *[r[name] for r in rest]) for name, leaf in tree.items()}
    return pytree.tree_map(f, tree, *rest)


def tensor_map(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """Applies `f` to the tensor leaves; other leaves (None, numbers, strings) stay."""
    if isinstance(tree, Tensor):
        return f(tree)
    if _is_flat(tree):
        return {name: f(leaf) for name, leaf in tree.items()}
    return pytree.tree_map_only(Tensor, f, tree)


def leaves(tree: TensorTree) -> list[Any]:
    """The leaves in the order of the structure."""
    if _is_flat(tree):
        return list(tree.values())
    if type(tree) in (tuple, list) or pytree.is_namedtuple(tree):
        return [leaf for part in tree for leaf in leaves(part)]
    return pytree.tree_leaves(tree)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The leaves that are tensors."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _is_flat(tree: Any) -> bool:
    """Whether the tree is one dict of tensors."""
    return type(tree) is dict and all(isinstance(leaf, Tensor) for leaf in tree.values())


def _same_keys(tree: TensorTree, flat: TensorTree) -> bool:
    """Whether a tree is a dict with the keys of a flat one, in their order."""
    return _is_flat(flat) and type(tree) is dict and list(tree) == list(flat)


def leaves_with_names(tree: TensorTree) -> list[tuple[str, Any]]:
    """The leaves with their paths, written as Python subscripts: `['fc.weight']`."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    return [(pytree.keystr(path), leaf) for path, leaf in paths]


def names(tree: TensorTree) -> list[str]:
    """One name a leaf, in order: its key in a flat dict of tensors, its path in other trees."""
    if isinstance(tree, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items()
    ):
        return list(tree)
    return [name for name, _ in leaves_with_names(tree)]


def unflatten(new_leaves: Sequence[Any], like: TensorTree) -> TensorTree:
    """A tree with the structure of `like` and the given leaves."""
    return pytree.tree_unflatten(list(new_leaves), pytree.tree_structure(like))


def same_structure(a: TensorTree, b: TensorTree) -> bool:
    """Whether two trees have one structure (leaf shapes aside)."""
    return pytree.tree_structure(a) == pytree.tree_structure(b)


def num_elements(tree: TensorTree) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.numel() for leaf in leaves(tree))


def zeros_like(tree: TensorTree) -> TensorTree:
    """A tree of zeros."""
    return tree_map(torch.zeros_like, tree)


def clone(tree: TensorTree) -> TensorTree:
    """Detached copies of the tensor leaves, in contiguous memory."""
    return tensor_map(lambda x: x.detach().clone(memory_format=torch.contiguous_format), tree)


def concatenate(parts: Sequence[Any]) -> Any:
    """Joins trees along the leading axis of their tensor leaves; others are those of the first."""
    if len(parts) == 1:
        return parts[0]
    return tree_map(
        lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0],  # pyright: ignore[reportArgumentType]
        *parts,
    )


def stack(trees: Sequence[TensorTree]) -> TensorTree:
    """Joins trees of one structure along a new leading axis of each leaf.

    Raises:
        ValueError: there are no trees, or they differ in structure or in a leaf shape.
    """
    if not trees:
        raise ValueError("`trees` is empty, expected at least one tree")
    for i, tree in enumerate(trees[1:], start=1):
        check_like(tree, trees[0], name=f"trees[{i}]")
    return tree_map(lambda *parts: torch.stack(parts), *trees)


def index(tree: TensorTree, i: int) -> TensorTree:
    """Entry i of every leaf's leading axis, as views."""
    return tensor_map(lambda x: x[i], tree)


def unstack(tree: TensorTree) -> list[TensorTree]:
    """The entries along the leading axis, as views."""
    return [index(tree, i) for i in range(leading_size(tree))]


def leading_size(tree: TensorTree) -> int:
    """The length of the leading axis that all tensor leaves share.

    Raises:
        ValueError: there is no tensor leaf, one is a scalar, or the lengths differ.
    """
    found = {leaf.shape[0] if leaf.dim() else None for leaf in tensor_leaves(tree)}
    if len(found) == 1 and None not in found:
        return int(found.pop())  # pyright: ignore[reportArgumentType]
    sizes = {
        name: leaf.shape[0] if leaf.dim() else None
        for name, leaf in leaves_with_names(tree)
        if isinstance(leaf, Tensor)
    }
    raise ValueError(
        f"leading axes are {sizes or 'absent (no tensor)'}, expected one length for all"
    )


def ravel(tree: TensorTree, *, batch_dims: int = 0) -> Tensor:
    """One tensor `[*batch, numbers]` with all leaves, in order.

    No copy where the leaves already lie one behind the other in one storage, as those
    that `unravel` gives do.
    """
    parts = [
        leaf.reshape(*leaf.shape[:batch_dims], leaf.shape[batch_dims:].numel())
        for leaf in leaves(tree)
    ]
    if not parts:
        raise ValueError("the tree has no leaves, so there is nothing to ravel")
    full = [part for part in parts if part.shape[-1]] or parts
    return _joined_view(full) if _lie_in_order(full) else torch.cat(parts, dim=-1)


def unravel(flat: Tensor, like: TensorTree, *, batch_dims: int = 0) -> TensorTree:
    """Views of `flat` (`[*batch, numbers]`) with the structure and shapes of `like`.

    Leaves of another dtype than `flat` are the exception: they are converted copies.

    Raises:
        ValueError: `flat` holds another number of entries than `like`.
    """
    template = leaves(like)
    sizes = [leaf.numel() for leaf in template]
    if flat.shape[-1] != sum(sizes):
        raise ValueError(f"`flat` has {flat.shape[-1]} entries, expected {sum(sizes)}")
    batch = flat.shape[:batch_dims]
    parts = torch.split(flat, sizes, dim=-1)
    return unflatten(
        [
            part.view((*batch, *leaf.shape)).to(leaf.dtype)
            for part, leaf in zip(parts, template, strict=True)
        ],
        like,
    )


def _lie_in_order(parts: list[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False
    first = parts[0]
    offset = first.storage_offset()
    try:
        storage = first.untyped_storage().data_ptr()
        for part in parts:
            if (
                part.dtype != first.dtype
                or part.untyped_storage().data_ptr() != storage
                or part.storage_offset() != offset
                or _row_strides(part) != _row_strides(first)
                or (part.shape[-1] > 1 and part.stride(-1) != 1)
            ):
                return False
            offset += part.shape[-1]
    except (RuntimeError, NotImplementedError):  # a tensor without storage: inside vmap or grad
        return False
    # A view of the first leaf's storage would pass on the first leaf's derivative only.
    return not any(
        part.requires_grad or forward_ad.unpack_dual(part).tangent is not None for part in parts
    )


def _row_strides(part: Tensor) -> list[int]:
    # Along an axis of length 1 a stride means nothing, and torch gives any.
    return [s for n, s in zip(part.shape[:-1], part.stride()[:-1], strict=True) if n > 1]


def _joined_view(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    size = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
    return first.as_strided(size, (*first.stride()[:-1], 1))


def in_transform(tree: Any) -> bool:
    """Whether a leaf belongs to `torch.func.vmap` or `grad`, where values cannot be read."""
    # torch has no public test for this.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(wrapped(leaf) for leaf in tensor_leaves(tree))


def check_like(tree: TensorTree, like: TensorTree, *, name: str, batch_dims: int = 0) -> None:
    """Checks that a tree has the structure and the leaf shapes of another.

    Args:
        tree: the tree to check.
        like: what is expected.
        name: the argument's name in the message.
        batch_dims: leading axes of `tree`'s leaves that `like` does not have.

    Raises:
        ValueError: structure or a leaf shape differs; the message names the leaf.
    """
    flat = _same_keys(tree, like)
    if (flat or same_structure(tree, like)) and all(
        isinstance(leaf, Tensor)
        and leaf.dim() >= batch_dims
        and leaf.shape[batch_dims:] == wanted.shape
        for leaf, wanted in zip(tree.values() if flat else leaves(tree), leaves(like), strict=True)
    ):
        return
    # Something is wrong: find out what, now with names.
    found, expected = dict(leaves_with_names(tree)), dict(leaves_with_names(like))
    missing = [path for path in expected if path not in found]
    extra = [path for path in found if path not in expected]
    if missing or extra:
        differences = [f"{name}{path} is missing" for path in missing[:3]]
        differences += [f"{name}{path} is not expected" for path in extra[:3]]
        raise ValueError(f"`{name}` has another structure: {'; '.join(differences)}")
    if not same_structure(tree, like):
        if list(found) != list(expected):
            raise ValueError(
                f"`{name}` has its leaves in the order {_first(found)}, expected that of"
                f" {_first(expected)}: build the dict in this order"
            )
        raise ValueError(
            f"`{name}` is a {type(tree).__name__} of {pytree.tree_structure(tree)}, "
            f"expected {pytree.tree_structure(like)}"
        )
    for path, leaf in found.items():
        if not isinstance(leaf, Tensor):
            raise ValueError(f"`{name}{path}` is a {type(leaf).__name__}, expected a tensor")
        shape, wanted = tuple(leaf.shape[batch_dims:]), tuple(expected[path].shape)
        if leaf.dim() < batch_dims:
            raise ValueError(
                f"`{name}{path}` has shape {tuple(leaf.shape)}, expected {batch_dims} leading"
                f" axes before {wanted}"
            )
        if shape != wanted:
            hint = ": was it transposed?" if shape == wanted[::-1] else ""
            raise ValueError(f"`{name}{path}` has shape {shape}, expected {wanted}{hint}")


def _first(paths: Iterable[str], num: int = 5) -> str:
    paths = list(paths)
    return ", ".join(paths[:num]) + (", …" if len(paths) > num else "")


def is_finite(tree: Any) -> bool:
    """Whether no entry is NaN or infinite; reads values, so not for use in a transform."""
    found = [
        leaf.detach()
        for leaf in tensor_leaves(tree)
        if leaf.is_floating_point() or leaf.is_complex()
    ]
    if not found:
        return True
    try:
        return _has_finite_norms(found) or all(bool(torch.isfinite(leaf).all()) for leaf in found)
    except (RuntimeError, NotImplementedError):  # a dtype or a layout that has no norm
        return all(bool(torch.isfinite(_dense(leaf)).all()) for leaf in found)


def _has_finite_norms(found: list[Tensor]) -> bool:
    # One pass without temporaries, and on one core: threads that share a small operation go on
    # waiting for more, for about eight milliseconds on the cores of those that work.
    # A norm is finite only if every entry is; it may overflow.
    norms = torch._foreach_norm(found)  # pyright: ignore[reportPrivateImportUsage]
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.cpu() for norm in norms]
    return math.isfinite(norms[0] if len(norms) == 1 else torch.stack(norms).sum())


def _dense(leaf: Tensor) -> Tensor:
    leaf = leaf.to_dense() if leaf.layout != torch.strided else leaf
    return leaf.float() if leaf.is_floating_point() else leaf


def check_finite(tree: TensorTree, *, name: str) -> None:
    """Checks that no leaf holds NaN or infinity; reads values, so not for use in a transform.

    Raises:
        ValueError: a leaf does; the message names it.
    """
    if is_finite(tree):
        return
    for path, leaf in leaves_with_names(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            bad = leaf.numel() - int(torch.isfinite(leaf).sum())
            if bad:
                raise ValueError(
                    f"`{name}{path}` has {bad} of {leaf.numel()} entries NaN or infinite, expected"
                    " finite numbers: did training diverge?"
                )


def signature(inputs: Any) -> Any:
    """All that the plan of a forward pass depends on: not the values, not the number of data."""
    return tuple(
        (name, tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else (name, repr(x))
        for name, x in leaves_with_names(inputs)
    )
