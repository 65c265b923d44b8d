"""Which block of the curvature each parameter gets: structures, by name or by pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.model import Model, check_model
from funcbayes.curvature import contractions, perturbation
from funcbayes.curvature.perturbation import Plan

STRUCTURES = ("diagonal", "kronecker", "ekfac", "dense", "block_diagonal", "low_rank")
Structure = str | Mapping[str, str]

# Beside Kronecker factors, a parameter without such factors gets an exact block of at most so
# many numbers (64 MB in float32); a larger one is kept as a diagonal.
SMALL_BLOCK = 2**24


@dataclass(frozen=True)
class Group:
    """Leaves that share a block.

    Attributes:
        numbers: of the leaves, in the order of the tree.
        names: of the leaves.
        kind: "diagonal", "kronecker", "ekfac", "dense" (one block), "rows" (one block for each
            row of a matrix) or "low_rank".
        size: how many numbers the block holds; of "low_rank": how many each of its vectors has.
        why: for the report: why a leaf did not get what the structure says; empty where it did.
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    kind: str
    size: int
    why: str


def groups(
    names: Sequence[str], leaves: Sequence[Tensor], plan: Plan, structure: Structure
) -> tuple[Group, ...]:
    """The groups of leaves, in the order of their first leaves.

    Args:
        names: of the leaves.
        leaves: the parameters.
        plan: what the model does with them.
        structure: as for `ggn`.

    Raises:
        ValueError: the mapping leaves a parameter out, or has a pattern that none matches.
    """
    found: list[Group] = []
    for pattern, kind in _patterns(structure).items():
        own = [i for i, name in enumerate(names) if _first(structure, name) == pattern]
        if kind in ("dense", "low_rank"):
            num = sum(leaves[i].numel() for i in own)
            size = num**2 if kind == "dense" else num
            found.append(_group(own, names, kind, size))
        else:
            found.extend(_single(i, names, leaves[i], plan, kind) for i in own)
    return tuple(sorted(found, key=lambda group: group.numbers))


def check_structure(structure: Any, names: Sequence[str]) -> None:
    """Refuses what is no structure of parameters with these names.

    Raises:
        TypeError: neither a name nor a mapping.
        ValueError: an unknown name; a mapping that leaves a parameter out, or with a pattern that
            is no parameter's first.
    """
    known = ", ".join(f'"{name}"' for name in STRUCTURES)
    if not isinstance(structure, str | Mapping):
        raise TypeError(
            f"`structure` is a {type(structure).__name__}, expected one of {known}, or a mapping"
            ' of patterns on parameter names to these, e.g. {"head.*": "dense", "*": "diagonal"}'
        )
    for pattern, kind in _patterns(structure).items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"`structure` has the key {pattern!r}, expected a pattern on parameter names, a str"
            )
        where = "`structure`" if isinstance(structure, str) else f"`structure[{pattern!r}]`"
        if kind not in STRUCTURES:
            raise ValueError(f"{where} is {kind!r}, expected one of {known}")
    matched = [_first(structure, name) for name in names]
    if None in matched:
        raise ValueError(
            f"`structure` has no pattern for '{names[matched.index(None)]}' (its patterns are"
            f' {list(_patterns(structure))}): end it with "*" for all others'
        )
    for pattern in _patterns(structure):
        if pattern not in matched:
            shown = ", ".join(f"'{name}'" for name in names[:5]) + (", …" if len(names) > 5 else "")
            raise ValueError(
                f"`structure[{pattern!r}]` is the first match of no parameter, expected one of"
                f" {shown}: the first pattern that fits is taken"
            )


def _patterns(structure: Structure) -> dict[str, str]:
    return {"*": structure} if isinstance(structure, str) else dict(structure)


def _first(structure: Structure, name: str) -> str | None:
    if isinstance(structure, str):
        return "*"
    return next((p for p in structure if p == name or fnmatchcase(name, p)), None)


def _group(
    numbers: Sequence[int], names: Sequence[str], kind: str, size: int, why: str = ""
) -> Group:
    return Group(tuple(numbers), tuple(names[i] for i in numbers), kind, size, why)


def _single(number: int, names: Sequence[str], leaf: Tensor, plan: Plan, kind: str) -> Group:
    """The group of one leaf, in a structure that treats leaves one by one."""
    size = leaf.numel()
    if kind == "diagonal":
        return _group([number], names, "diagonal", size)
    if kind == "block_diagonal":
        return _group([number], names, "dense", size**2)
    used = [(use, use.weight == number) for use in plan.uses if number in (use.weight, use.bias)]
    # Several uses share their factors, if they see the weight as the same matrix.
    forms = {(use.rule.name, contractions.groups(use.options)) for use, _ in used}
    linear = all(is_weight and use.rule.is_linear for use, is_weight in used)
    if number not in plan.general and linear and len(forms) == 1:
        ((_, num_groups),) = forms
        rows = leaf.shape[0] // num_groups
        held = num_groups * (rows**2 + (size // leaf.shape[0]) ** 2)
        return _group([number], names, kind, held + (size if kind == "ekfac" else 0))
    what = _what(number, plan, used)
    if size**2 <= SMALL_BLOCK:
        return _group([number], names, "dense", size**2, f"{what}: an exact block")
    if leaf.dim() == 2 and (held := size * leaf.shape[1]) <= SMALL_BLOCK:
        return _group([number], names, "rows", held, f"{what}: an exact block for each row")
    why = f"{what}, and too large for a block: its diagonal"
    return _group([number], names, "diagonal", size, why)


def _what(number: int, plan: Plan, used: Sequence[Any]) -> str:
    if number in plan.general:
        functions = ", ".join(plan.unknown.get(number, ())) or "code that Python does not see"
        return f"used by {functions}, for which there are no factors"
    if not used:
        return "not used"
    names = sorted({f"{use.rule.name} {'weight' if w else 'bias'}" for use, w in used})
    return "a " + " and ".join(names)


@dataclass(frozen=True)
class Row:
    """What the curvature does with one parameter.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        path: the uses that a rule knows, or "general" for per-datum gradients as a whole.
        block: the kind of block.
        why: why it is not the usual path or block; empty where it is.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    block: str
    why: str


@dataclass(frozen=True)
class Report:
    """Which way each parameter takes; `str` of it is a table.

    Attributes:
        rows: one a parameter, in the order of the tree.
        whole_batches: whether the pass runs on whole batches rather than under `vmap`; None
            where one datum was given, from which that cannot be told.
    """

    rows: tuple[Row, ...]
    whole_batches: bool | None

    def __str__(self) -> str:
        """A table with one line a parameter."""
        head = ("parameter", "shape", "path", "block", "why")
        cells = [
            (row.name, "×".join(map(str, row.shape)) or "scalar", row.path, row.block, row.why)
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *cells)
        )


def report(model: Model, x: Any, *, structure: Structure = "diagonal") -> Report:
    """Says which way each parameter takes through a curvature, and why.

    A parameter takes a rule if everything that the outputs owe to it comes from uses that a rule
    knows (linear maps, convolutions, embeddings, norms, sums and products with it); otherwise its
    per-datum gradients are formed in the same pass ("general"). Both are exact.

    Args:
        model: the network.
        x: inputs with a leading batch axis; two data or more tell whether batches run whole.
        structure: as for `ggn`.

    Raises:
        TypeError: `model` is not a Model, or `structure` not a structure.
        ValueError: `structure` does not fit the parameters.
    """
    check_model(model)
    names = trees.names(model.params)
    check_structure(structure, names)
    with perturbation.undisturbed():
        x = perturbation.plain(x)
        leaves = [perturbation.plain(leaf) for leaf in trees.leaves(model.params)]
        constants = perturbation.plain(model.constants) or None
        one = trees.tensor_map(lambda t: t[:1], x)
        plan = perturbation.discover(model, leaves, one, constants)
        size = trees.tensor_leaves(x)[0].shape[0]
        columns = lambda outputs, _: trees.tensor_map(lambda t: torch.ones_like(t)[None], outputs)  # noqa: E731
        plan = perturbation.examine(model, leaves, plan, x, None, constants, columns)
    kinds = {i: group for group in groups(names, leaves, plan, structure) for i in group.numbers}
    rows = []
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        group = kinds[number]
        rows.append(Row(name, tuple(leaf.shape), _path(number, plan), group.kind, group.why))
    return Report(tuple(rows), plan.layout is not None if size > 1 else None)


def _path(number: int, plan: Plan) -> str:
    if number in plan.general:
        return "general (" + (", ".join(plan.unknown.get(number, ())) or "not seen") + ")"
    counts: dict[str, int] = {}
    for use in plan.uses:
        for role, leaf in (("weight", use.weight), ("bias", use.bias)):
            if leaf == number:
                name = f"{use.rule.name} {role}"
                counts[name] = counts.get(name, 0) + 1
    if not counts:
        return "unused"
    return ", ".join(name + (f" ×{n}" if n > 1 else "") for name, n in counts.items())
