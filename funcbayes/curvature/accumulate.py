"""Sums over the data of what each kind of block keeps, from the gradients of a pass.

Source:
    Martens (2020), arXiv:1412.1193, for the generalised Gauss-Newton matrix and the (empirical)
    Fisher; Martens and Grosse (2015), arXiv:1503.05671, and Grosse and Martens (2016),
    arXiv:1602.01407, for Kronecker factors; George et al. (2018), arXiv:1806.03884, for
    eigenvalues corrected in their basis; Eschenhagen et al. (2023), arXiv:2311.00636, for the
    expanded and the reduced form of weight sharing; Dangel, Kunstner and Hennig (2020),
    arXiv:1912.10985, for diagonals of Linear and convolution. Departs from all in that the
    gradients are those at the outputs of parameter uses, so that no special layers or hooks are
    needed, and weights used more than once, or in a way that has no rule, are exact.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcbayes.curvature.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenKroneckerBlock,
    KroneckerBlock,
)
from funcbayes.curvature.contractions import SLICE_BYTES, Embedding, sum_of_squares
from funcbayes.curvature.layout import Group
from funcbayes.curvature.perturbation import Gradients, Plan, Use

# Per-datum gradients that are multiplied with each other, at a time: large enough for the
# matrix product to run at full speed, small beside the matrix.
_PRODUCT_BYTES = 2**24


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


class LeafGradients(NamedTuple):
    """One parameter's per-datum gradients, not formed until they are asked for.

    Attributes:
        shape: of the parameter.
        dtype: what sums are taken in.
        parts: its known uses; empty where it took the general path, or is not used.
        whole: its gradients `[batch, columns, *shape]` where it took the general path.
        batch: number of data.
        columns: number of columns.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[_Part, ...]
    whole: Tensor | None
    batch: int
    columns: int

    def of(self, rows: slice) -> Tensor:
        """Gradients `[rows, columns, *shape]` of some data."""
        if self.whole is not None:
            return self.whole[rows]
        if not self.parts:
            num = len(range(*rows.indices(self.batch)))
            raise ValueError(f"an unused parameter has no gradients (of {num} data)")
        total = self.parts[0].gradients(rows, self.shape)
        for part in self.parts[1:]:
            total = total + part.gradients(rows, self.shape)
        return total

    @property
    def used(self) -> bool:
        """Whether the outputs depend on it at all."""
        return self.whole is not None or bool(self.parts)

    def squares(self) -> Tensor:
        """Σ over data and columns of the squared gradients, `[*shape]`."""
        if self.whole is not None:
            return sum_of_squares(self.whole)
        if len(self.parts) == 1:
            return self.parts[0].squares(self.shape)
        total = self.parts[0].grads.new_zeros(self.shape)
        for rows in self.slices(SLICE_BYTES, self.columns * self.shape.numel()):
            total += sum_of_squares(self.of(rows))
        return total

    def slices(self, limit: int, numbers_per_datum: int) -> Iterator[slice]:
        """Slices of the data of which `numbers_per_datum` each fit into `limit` bytes."""
        size = torch.empty((), dtype=self.dtype).element_size()
        step = max(1, limit // max(1, size * numbers_per_datum))
        for start in range(0, self.batch, step):
            yield slice(start, start + step)

    def forms(self, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """For each use as a linear map, its `input_form` and `output_form` of some data."""
        for part in self.parts:
            rule, options = part.use.rule, part.use.options
            yield (
                rule.input_form(options, part.recorded[rows], self.shape),
                rule.output_form(options, part.grads[rows], self.shape),
            )

    def form_numbers(self) -> int:
        """How many numbers the larger of both forms of a use has, for one datum."""
        most = 1
        for part in self.parts:
            a, g = next(self._replace(parts=(part,)).forms(slice(0, 1)))
            most = max(most, a.numel(), g.numel())
        return most

    @property
    def transposed(self) -> bool:
        """Whether the forms are those of the transposed weight."""
        return self.parts[0].use.rule.transposed


def leaf_gradients(
    plan: Plan,
    gradients: Gradients,
    number: int,
    shape: torch.Size,
    dtype: torch.dtype,
    columns: slice = slice(None),
) -> LeafGradients:
    """The gradients of one parameter in a pass.

    Args:
        plan: of the pass.
        gradients: what it gave.
        number: of the leaf.
        shape: of the leaf.
        dtype: what sums are to be taken in.
        columns: which of the columns.
    """
    values = gradients.general or gradients.outputs
    batch, num = values[0].shape[0], values[0][:1, columns].shape[1]
    whole = None
    if number in plan.general:
        whole = gradients.general[plan.general.index(number)][:, columns].to(dtype)
    parts = tuple(
        _Part(use, is_weight, _widen(recorded, dtype), grads[:, columns].to(dtype))
        for use, recorded, grads in zip(
            plan.uses, gradients.recorded, gradients.outputs, strict=True
        )
        for own, is_weight in ((use.weight, True), (use.bias, False))
        if own == number
    )
    return LeafGradients(shape, dtype, parts, whole, batch, num)


def _widen(recorded: Tensor, dtype: torch.dtype) -> Tensor:
    return recorded.to(dtype) if recorded.is_floating_point() else recorded


class Accumulator:
    """A block's sums so far."""

    def add(self, leaves: Sequence[LeafGradients]) -> None:
        """Adds some data, given the gradients of the leaves of the group."""
        raise NotImplementedError

    def block(self) -> Block:
        """The sums as a block."""
        raise NotImplementedError


class _Diagonal(Accumulator):
    def __init__(self, leaf: Tensor, dtype: torch.dtype) -> None:
        self.leaf, self.dtype = leaf, dtype
        self.total: Tensor | None = None

    def add(self, leaves) -> None:
        if not leaves[0].used:
            return
        squares = leaves[0].squares()
        if self.total is None:
            self.total = squares.contiguous()  # made for this sum alone
        else:
            self.total += squares

    def block(self) -> DiagonalBlock:
        if self.total is None:
            return DiagonalBlock(
                torch.zeros_like(self.leaf, dtype=self.dtype, memory_format=torch.contiguous_format)
            )
        return DiagonalBlock(self.total)


class _Dense(Accumulator):
    def __init__(self, leaves: Sequence[Tensor], dtype: torch.dtype) -> None:
        size = sum(leaf.numel() for leaf in leaves)
        self.total = torch.zeros(size, size, dtype=dtype, device=leaves[0].device)

    def add(self, leaves) -> None:
        size = len(self.total)
        columns = leaves[0].columns
        # At least a few rows a product: with fewer than entries, the matrix is read for little.
        for rows in leaves[0].slices(max(_PRODUCT_BYTES, 2**9 * size), columns * size):
            parts = []
            for leaf in leaves:
                if leaf.used:
                    parts.append(leaf.of(rows).flatten(2).flatten(0, 1))
                else:
                    num = len(range(*rows.indices(leaf.batch))) * columns
                    parts.append(self.total.new_zeros(num, leaf.shape.numel()))
            each = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            self.total.addmm_(each.T, each)

    def block(self) -> DenseBlock:
        return DenseBlock(_symmetric(self.total).unsqueeze(0))


class _Rows(Accumulator):
    """A block for each row of a matrix."""

    def __init__(self, leaf: Tensor, dtype: torch.dtype) -> None:
        rows, size = leaf.shape
        self.total = torch.zeros(rows, size, size, dtype=dtype, device=leaf.device)

    def add(self, leaves) -> None:
        (leaf,) = leaves
        if not leaf.used:
            return
        part = leaf.parts[0] if len(leaf.parts) == 1 else None
        if part is not None and isinstance(rule := part.use.rule, Embedding):
            places, grads = rule.row_gradients(
                part.use.options, part.recorded, part.grads, leaf.shape
            )
            step = max(1, _PRODUCT_BYTES // (4 * leaf.shape[1] ** 2))
            for where, g in zip(places.split(step), grads.split(step), strict=True):
                self.total.index_add_(0, where, g.mT @ g)
            return
        for rows in leaf.slices(_PRODUCT_BYTES, leaf.columns * leaf.shape.numel()):
            g = leaf.of(rows).flatten(0, 1).transpose(0, 1)  # [rows of the matrix, data, size]
            self.total.baddbmm_(g.mT, g)

    def block(self) -> DenseBlock:
        return DenseBlock(_symmetric(self.total))


class _Kronecker(Accumulator):
    def __init__(self, leaf: Tensor, dtype: torch.dtype, sharing: str) -> None:
        self.leaf, self.dtype, self.reduced = leaf, dtype, sharing == "reduce"
        self.inputs = self.outputs = leaf.new_empty(0)
        self.count = 0
        self.transposed = False

    def add(self, leaves) -> None:
        (leaf,) = leaves
        if not leaf.parts:
            raise ValueError(
                "`structure` is 'kronecker', but which uses the network makes of its weights"
                " differs between data: use another structure"
            )
        self.transposed = leaf.transposed
        for rows in leaf.slices(_PRODUCT_BYTES, leaf.form_numbers()):
            for a, g in leaf.forms(rows):
                if self.reduced:
                    a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
                self.count += a.shape[0] * a.shape[2]
                a = a.transpose(0, 1).flatten(1, 2)  # [groups, data · positions, i]
                g = g.permute(2, 0, 1, 3, 4).flatten(1, 3)
                if not self.inputs.numel():
                    self.inputs = a.new_zeros(a.shape[0], a.shape[2], a.shape[2])
                    self.outputs = g.new_zeros(g.shape[0], g.shape[2], g.shape[2])
                self.inputs.baddbmm_(a.mT, a)
                self.outputs.baddbmm_(g.mT, g)

    def block(self) -> KroneckerBlock:
        count = torch.full((), self.count, dtype=self.dtype, device=self.leaf.device)
        inputs, outputs = _symmetric(self.inputs), _symmetric(self.outputs)
        if self.transposed:
            inputs, outputs = outputs, inputs
        return KroneckerBlock(inputs, outputs, count)


class _Corrected(Accumulator):
    """The diagonal of the curvature in the basis of Kronecker factors."""

    def __init__(self, basis: EigenKroneckerBlock) -> None:
        self.basis = basis
        self.total = torch.zeros_like(basis.eigenvalues)

    def add(self, leaves) -> None:
        (leaf,) = leaves
        left, right = self.basis.output_basis, self.basis.input_basis
        if leaf.transposed:
            left, right = right, left
        size = leaf.form_numbers() + leaf.columns * leaf.shape.numel()
        for rows in leaf.slices(_PRODUCT_BYTES, size):
            total = None
            forms = [(a @ right, g @ left) for a, g in leaf.forms(rows)]
            if len(forms) == 1 and forms[0][0].shape[2] == 1:
                a, g = forms[0]
                g = g.square().sum(1)[:, :, 0]
                squares = torch.einsum("ngo,ngi->goi", g, a[:, :, 0].square())
            else:
                for a, g in forms:
                    # [data, columns, groups, o, i]
                    product = g.mT @ a.unsqueeze(1)
                    total = product if total is None else total + product
                squares = total.square().sum((0, 1))  # pyright: ignore[reportOptionalMemberAccess]
            self.total += squares.mT if leaf.transposed else squares

    def block(self) -> EigenKroneckerBlock:
        return self.basis._replace(eigenvalues=self.total)


def accumulator(
    group: Group,
    leaves: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    sharing: str,
    basis: Block | None = None,
) -> Accumulator:
    """An empty sum for a group.

    Args:
        group: of leaves.
        leaves: all parameters.
        dtype: what to sum in.
        sharing: "expand" or "reduce", for Kronecker factors.
        basis: the basis of corrected eigenvalues; None: the Kronecker factors themselves.
    """
    own = [leaves[i] for i in group.numbers]
    if group.kind == "dense":
        return _Dense(own, dtype)
    if group.kind == "rows":
        return _Rows(own[0], dtype)
    if group.kind in ("kronecker", "ekfac"):
        if isinstance(basis, EigenKroneckerBlock):
            return _Corrected(basis)
        return _Kronecker(own[0], dtype, sharing)
    return _Diagonal(own[0], dtype)


def _symmetric(matrix: Tensor) -> Tensor:
    """Exactly symmetric: the two halves of a product may round differently."""
    return (matrix + matrix.mT) / 2


def eigenbasis(block: KroneckerBlock) -> EigenKroneckerBlock:
    """A Kronecker block in its eigenbasis.

    Args:
        block: of one curvature, or of a stack.
    """
    right, input_basis = torch.linalg.eigh(block.inputs)
    left, output_basis = torch.linalg.eigh(block.outputs)
    # Factors are sums of squares: what is below 0 is rounding.
    right, left = right.clamp_min(0), left.clamp_min(0)
    right = right / block.count[..., None, None]
    return EigenKroneckerBlock(left.unsqueeze(-1) * right.unsqueeze(-2), output_basis, input_basis)
