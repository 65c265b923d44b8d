"""Covariances of groups of parameters, each by a root: Σ = R Rᵀ.

The flat vector of a group holds the entries of its leaves one behind the other, in the order of
the parameter tree; n is its length. Every factor has

- `scale(z)`, R z: standard normal noise becomes a deviation from the mean;
- `project(v)`, Rᵀ v: vᵀ Σ v = |project(v)|², the variance of v·θ;
- `whiten(d)`, R⁻¹ d: dᵀ Σ⁻¹ d = |whiten(d)|²; `whiten(scale(z))` is z;
- `log_det()`, log det Σ, and `variance()`, diag Σ.

Vectors may have any leading axes. Arithmetic is in the wider dtype of vector and factor, and in
float32 at least. All is differentiable in the vectors and in every field, and made of batched
operations alone, so that it passes through `vmap`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class DiagonalFactor(NamedTuple):
    """Σ = diag(std²).

    Attributes:
        std: standard deviations, positive, `[n]`.
    """

    std: Float[Tensor, "*stack n"]

    @property
    def size(self) -> int:
        """Length n of the group's vector."""
        return self.std.shape[-1]

    def scale(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R z, with R = diag(std)."""
        wide, std = _widened(_checked(z, self.size, "z"), self.std)
        return wide * std

    def project(self, v: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Rᵀ v."""
        wide, std = _widened(_checked(v, self.size, "v"), self.std)
        return wide * std

    def whiten(self, d: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R⁻¹ d."""
        wide, std = _widened(_checked(d, self.size, "d"), self.std)
        return wide / std

    def log_det(self) -> Float[Tensor, ""]:
        """The covariance's log determinant, log det Σ."""
        return _log_det(self.std)

    def variance(self) -> Float[Tensor, " n"]:
        """The covariance's diagonal, diag Σ."""
        (std,) = _widened(self.std)
        return std.square()


class KroneckerFactor(NamedTuple):
    """Σ = Q diag(std²) Qᵀ with Q = Q_o ⊗ Q_i, for each group of output channels.

    The flat vector is that of one weight, seen as `[groups, o, i]`; groups is 1 but for grouped
    convolutions. R = Q diag(std).

    Attributes:
        std: standard deviations along the eigenvectors, positive, `[groups, o, i]`.
        output_basis: Q_o, orthonormal columns, `[groups, o, o]`.
        input_basis: Q_i, orthonormal columns, `[groups, i, i]`.
    """

    std: Float[Tensor, "*stack groups o i"]
    output_basis: Float[Tensor, "*stack groups o o"]
    input_basis: Float[Tensor, "*stack groups i i"]

    @property
    def size(self) -> int:
        """Length of the group's vector: n = groups · o · i."""
        return self.std.shape[-3:].numel()

    def scale(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R z: Q_o (std ⊙ Z) Q_iᵀ."""
        matrices = self._matrices(z, "z")
        return self._rotated(matrices * self.std, transposed=False).reshape(z.shape)

    def project(self, v: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Rᵀ v: std ⊙ (Q_oᵀ V Q_i)."""
        rotated = self._rotated(self._matrices(v, "v"), transposed=True)
        return (rotated * self.std).reshape(v.shape)

    def whiten(self, d: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R⁻¹ d: (Q_oᵀ D Q_i) / std."""
        rotated = self._rotated(self._matrices(d, "d"), transposed=True)
        return (rotated / self.std).reshape(d.shape)

    def log_det(self) -> Float[Tensor, ""]:
        """The covariance's log determinant, log det Σ."""
        return _log_det(self.std)

    def variance(self) -> Float[Tensor, " n"]:
        """The covariance's diagonal, diag Σ."""
        std, left, right = (x.square() for x in _widened(*self))
        return (left @ std @ right.mT).flatten()

    def _matrices(self, vectors: Tensor, name: str) -> Tensor:
        """`[samples, groups, o, i]`."""
        wide, _ = _widened(_checked(vectors, self.size, name), self.std)
        return wide.reshape(wide.shape[:-1].numel(), *self.std.shape[-3:])

    def _rotated(self, x: Tensor, *, transposed: bool) -> Tensor:
        """Q_o X Q_iᵀ, or Q_oᵀ X Q_i, of `[samples, groups, o, i]`."""
        x, left, right = _widened(x, self.output_basis, self.input_basis)
        left, right = (left.mT, right) if transposed else (left, right.mT)
        if left.shape[0] == 1:
            # As one product with samples · o rows, and one with the same basis a sample.
            return (left[0] @ (x[:, 0] @ right[0])).unsqueeze(1)
        # Groups go first: behind the samples, the product would copy each basis once a sample.
        x = x.transpose(0, 1)
        num_groups, num, o, i = x.shape
        x = (x.reshape(num_groups, num * o, i) @ right).view(num_groups, num, o, i)
        x = left @ x.transpose(1, 2).reshape(num_groups, o, num * i)
        return x.view(num_groups, o, num, i).permute(2, 0, 1, 3)


class DenseFactor(NamedTuple):
    """Σ = (L Lᵀ)⁻¹, for the whole group or for equal parts of it. R = L⁻ᵀ.

    Attributes:
        precision_root: L, the lower Cholesky root of the precision, `[blocks, m, m]`, with zeros
            above the diagonal. The flat vector is `blocks` parts of m entries.
    """

    precision_root: Float[Tensor, "*stack blocks m m"]

    @property
    def size(self) -> int:
        """Length of the group's vector: n = blocks · m."""
        return self.precision_root.shape[-3:-1].numel()

    def scale(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R z: the solution x of Lᵀ x = z."""
        wide, root = _widened(_columns(self, z, "z"), self.precision_root)
        return _rows(torch.linalg.solve_triangular(root.mT, wide, upper=True), z)

    def project(self, v: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Rᵀ v: the solution x of L x = v."""
        wide, root = _widened(_columns(self, v, "v"), self.precision_root)
        return _rows(torch.linalg.solve_triangular(root, wide, upper=False), v)

    def whiten(self, d: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R⁻¹ d: Lᵀ d."""
        wide, root = _widened(_columns(self, d, "d"), self.precision_root)
        return _rows(root.mT @ wide, d)

    def log_det(self) -> Float[Tensor, ""]:
        """The covariance's log determinant, log det Σ."""
        return -_log_det(self.precision_root.diagonal(dim1=-2, dim2=-1))

    def variance(self) -> Float[Tensor, " n"]:
        """The covariance's diagonal, diag Σ; inverts L, in m³/3 multiplications a block."""
        (root,) = _widened(self.precision_root)
        identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        inverse = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)
        return inverse.square().sum(-2).flatten()


class LowRankFactor(NamedTuple):
    """Σ = R Rᵀ with R = diag(std) (I + Y diag(basis_scale − 1) Yᵀ), whole or for equal parts.

    The posterior of a low-rank curvature under a diagonal prior: `std` is the prior's, which the
    curvature shrinks by `basis_scale` along k directions. k may be 0.

    Attributes:
        std: standard deviations outside of the k directions, positive, `[blocks, m]`.
        basis: Y, orthonormal columns, `[blocks, m, k]`. Formulas here rest on YᵀY = I: where it
            holds to ε, `whiten` is right to ε / min(basis_scale), relative.
        basis_scale: factors on the standard deviation along the columns, positive, `[blocks, k]`.
    """

    std: Float[Tensor, "*stack blocks m"]
    basis: Float[Tensor, "*stack blocks m k"]
    basis_scale: Float[Tensor, "*stack blocks k"]

    @property
    def size(self) -> int:
        """Length of the group's vector: n = blocks · m."""
        return self.std.shape[-2:].numel()

    def scale(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R z."""
        x, std, basis, factors = _widened(_columns(self, z, "z"), *self)
        return _rows(std.unsqueeze(-1) * _stretched(x, basis, factors - 1), z)

    def project(self, v: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Rᵀ v."""
        x, std, basis, factors = _widened(_columns(self, v, "v"), *self)
        return _rows(_stretched(std.unsqueeze(-1) * x, basis, factors - 1), v)

    def whiten(self, d: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """R⁻¹ d, with (I + Y diag(s − 1) Yᵀ)⁻¹ = I + Y diag(1/s − 1) Yᵀ."""
        x, std, basis, factors = _widened(_columns(self, d, "d"), *self)
        return _rows(_stretched(x / std.unsqueeze(-1), basis, 1 / factors - 1), d)

    def log_det(self) -> Float[Tensor, ""]:
        """The covariance's log determinant, log det Σ."""
        return _log_det(self.std) + _log_det(self.basis_scale)

    def variance(self) -> Float[Tensor, " n"]:
        """The covariance's diagonal, diag Σ."""
        std, basis, factors = (x.square() for x in _widened(*self))
        # Apart, so that rounding cannot make it negative where the directions span all there is.
        outside = (1 - basis.sum(-1)).clamp_min(0)
        inside = (basis @ factors.unsqueeze(-1)).squeeze(-1)
        return (std * (outside + inside)).flatten()


Factor = DiagonalFactor | KroneckerFactor | DenseFactor | LowRankFactor


def _stretched(x: Tensor, basis: Tensor, by: Tensor) -> Tensor:
    """(I + Y diag(by) Yᵀ) x, of columns `[blocks, m, samples]`."""
    return x + basis @ (by.unsqueeze(-1) * (basis.mT @ x))


def _columns(factor: DenseFactor | LowRankFactor, vectors: Tensor, name: str) -> Tensor:
    """`[..., n]` as `[blocks, m, samples]`: what a triangular solve is fastest with."""
    _checked(vectors, factor.size, name)
    blocks, m = factor[0].shape[:2]
    return vectors.reshape(vectors.shape[:-1].numel(), blocks, m).permute(1, 2, 0)


def _rows(columns: Tensor, like: Tensor) -> Tensor:
    return columns.permute(2, 0, 1).reshape(like.shape)


def _checked(vectors: Tensor, size: int, name: str) -> Tensor:
    if vectors.dim() == 0 or vectors.shape[-1] != size:
        raise ValueError(
            f"`{name}` has shape {tuple(vectors.shape)}, expected [..., {size}]: one entry a"
            " parameter of the group"
        )
    return vectors


def _widened(*tensors: Tensor) -> list[Tensor]:
    """All in their widest dtype, float32 at least."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def _log_det(std: Tensor) -> Tensor:
    """2 Σ log std. Summed in float64: millions of terms that are not small."""
    (wide,) = _widened(std)
    return 2 * wide.log().sum(dtype=torch.float64).to(wide.dtype)
