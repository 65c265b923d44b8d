"""Curvature matrices by blocks: what is kept of each, and what it stands for.

A curvature is a symmetric matrix over all parameters, block-diagonal over groups of leaves. Each
block is a NamedTuple of sums over the data, so curvatures of disjoint data add up leaf by leaf,
pass through `vmap`, and are saved like any tree.

The flat vector of a group holds the entries of its leaves one behind the other, in the order of
the parameter tree. Shapes below are those of one curvature; a stack of them has leading axes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.trees import TensorTree


class DiagonalBlock(NamedTuple):
    """The diagonal alone.

    Attributes:
        values: shaped like the one leaf that it covers.
    """

    values: Tensor

    def diagonal(self) -> Tensor:
        """The diagonal, `[n]`."""
        return self.values.flatten()

    def to_dense(self) -> Tensor:
        """The matrix, `[n, n]`."""
        return self.diagonal().diag()


class KroneckerBlock(NamedTuple):
    """B ⊗ A for each group of output channels, with A = `inputs` / `count` and B = `outputs`.

    The weight is seen as `[groups, o, i]`; groups is 1 but for grouped convolutions.

    Attributes:
        inputs: Σ a aᵀ over the data and the positions where the weight is used,
            `[groups, i, i]`; with the reduced form of weight sharing, over the data, of the
            inputs averaged over positions.
        outputs: Σ g gᵀ over data, columns and positions, `[groups, o, o]`; with the reduced
            form, of the gradients summed over positions.
        count: number of terms in `inputs`. Shape [].
    """

    inputs: Float[Tensor, "*stack groups i i"]
    outputs: Float[Tensor, "*stack groups o o"]
    count: Float[Tensor, "*stack"]  # pyright: ignore[reportIncompatibleMethodOverride]

    def diagonal(self) -> Tensor:
        """The diagonal, `[n]`."""
        a = self.inputs.diagonal(dim1=-2, dim2=-1) / self.count
        b = self.outputs.diagonal(dim1=-2, dim2=-1)
        return (b.unsqueeze(-1) * a.unsqueeze(-2)).flatten()

    def to_dense(self) -> Tensor:
        """The matrix, `[n, n]`."""
        a = (self.inputs / self.count).contiguous()  # torch.kron refuses other strides
        return torch.block_diag(
            *(torch.kron(b.contiguous(), a) for a, b in zip(a, self.outputs, strict=True))
        )


class EigenKroneckerBlock(NamedTuple):
    """Q diag(eigenvalues) Qᵀ, Q = Q_o ⊗ Q_i, for each group of output channels.

    Attributes:
        eigenvalues: `[groups, o, i]`, never negative. With "ekfac" the exact diagonal of the
            curvature in this basis, a sum over the data; otherwise products of the eigenvalues
            of the Kronecker factors.
        output_basis: eigenvectors of the output factor as columns, `[groups, o, o]`.
        input_basis: eigenvectors of the input factor as columns, `[groups, i, i]`.
    """

    eigenvalues: Float[Tensor, "*stack groups o i"]
    output_basis: Float[Tensor, "*stack groups o o"]
    input_basis: Float[Tensor, "*stack groups i i"]

    def diagonal(self) -> Tensor:
        """The diagonal, `[n]`."""
        left, right = self.output_basis.square(), self.input_basis.square()
        return (left @ self.eigenvalues @ right.mT).flatten()

    def to_dense(self) -> Tensor:
        """The matrix, `[n, n]`."""
        parts = []
        for values, left, right in zip(*self, strict=True):
            basis = torch.kron(left.contiguous(), right.contiguous())
            parts.append((basis * values.flatten()) @ basis.T)
        return torch.block_diag(*parts)


class DenseBlock(NamedTuple):
    """The matrix itself, or equal parts along its diagonal.

    Attributes:
        matrix: `[blocks, m, m]`. The flat vector is `blocks` parts of m entries: one for a
            joint matrix, one a row for the rows of an embedding.
    """

    matrix: Float[Tensor, "*stack blocks m m"]

    def diagonal(self) -> Tensor:
        """The diagonal, `[n]`."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).flatten()

    def to_dense(self) -> Tensor:
        """The matrix, `[n, n]`."""
        return torch.block_diag(*self.matrix)


class LowRankBlock(NamedTuple):
    """V diag(eigenvalues) Vᵀ with orthonormal columns V.

    Attributes:
        eigenvalues: `[blocks, k]`, largest first.
        vectors: `[blocks, m, k]`; parts along the diagonal as in `DenseBlock`.
    """

    eigenvalues: Float[Tensor, "*stack blocks k"]
    vectors: Float[Tensor, "*stack blocks m k"]

    def diagonal(self) -> Tensor:
        """The diagonal, `[n]`."""
        return (self.vectors.square() @ self.eigenvalues.unsqueeze(-1)).flatten()

    def to_dense(self) -> Tensor:
        """The matrix, `[n, n]`."""
        scaled = self.vectors * self.eigenvalues.unsqueeze(-2)
        return torch.block_diag(*(scaled @ self.vectors.mT))


Block = DiagonalBlock | KroneckerBlock | EigenKroneckerBlock | DenseBlock | LowRankBlock


class Curvature(NamedTuple):
    """A block-diagonal curvature matrix, a sum over the data.

    Attributes:
        blocks: by the names of the leaves that a block covers, in the order of the tree; each
            leaf is in exactly one block.
    """

    blocks: dict[tuple[str, ...], Block]

    def diagonal(self, like: TensorTree) -> TensorTree:
        """The diagonal, a tree like the parameters.

        Args:
            like: the parameters.
        """
        shapes = {
            name: leaf.shape
            for name, leaf in zip(trees.names(like), trees.leaves(like), strict=True)
        }
        found: dict[str, Tensor] = {}
        for names, block in self.blocks.items():
            sizes = [shapes[name].numel() for name in names]
            for name, part in zip(names, block.diagonal().split(sizes), strict=True):
                found[name] = part.view(shapes[name])
        return trees.unflatten([found[name] for name in trees.names(like)], like)

    def to_dense(self, like: TensorTree) -> Float[Tensor, "P P"]:
        """The whole matrix in the order of the flat parameter vector, 0 between blocks.

        For small models and for tests: P² numbers.

        Args:
            like: the parameters.
        """
        sizes = {
            name: leaf.numel()
            for name, leaf in zip(trees.names(like), trees.leaves(like), strict=True)
        }
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += size
        any_leaf = trees.leaves(self)[0]
        dense = any_leaf.new_zeros(total, total)
        for names, block in self.blocks.items():
            where = torch.cat(
                [torch.arange(starts[n], starts[n] + sizes[n], device=dense.device) for n in names]
            )
            dense[where[:, None], where] = block.to_dense()
        return dense
