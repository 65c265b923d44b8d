"""The top eigenvalues of a symmetric matrix that is known by its products with vectors.

A block Krylov method: the space spanned by a random block, its image, the image of that, and so
on; the eigenpairs of the matrix projected on that space are the approximations. (`torch.lobpcg`
is of the same family but takes tensors only, no function.)

Source:
    Golub and Underwood (1977), doi:10.1016/B978-0-12-587260-7.50018-2, for the block Lanczos
    method; Wu and Simon (2000), doi:10.1137/S0895479898334605, for thick restarts; Musco and
    Musco (2015), arXiv:1504.05477, for the convergence from a random start whatever the gaps.
    Departs from them in that every block is orthogonalised against all others, twice, and that
    the projection is computed rather than taken to be block-tridiagonal: in float32 the short
    recurrence brings spurious copies of eigenvalues, and both cost little beside the products.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import random

ORDERS = ("magnitude", "algebraic")

# Columns beyond the rank, which make the last eigenvalues that are wanted converge as fast as
# the gap behind these allows.
OVERSAMPLING = 5
# Blocks kept before a restart: as many as fit the bytes, between the two numbers.
BASIS_BYTES = 2**31
FEWEST_BLOCKS, MOST_BLOCKS = 4, 10
# Below this many times eps of the largest eigenvalue there is only the products' rounding.
ROUNDING = 50


class EigenInfo(NamedTuple):
    """How the eigenpairs were found.

    Attributes:
        num_products: products with a block of vectors, each a pass over the data.
        num_vectors: vectors that were multiplied, over all products.
        residual: the largest |H v − λ v| of the pairs returned, relative to the largest |λ| met.
        smallest: the smallest vᵀ H v met with |v| = 1, an upper bound on the smallest
            eigenvalue: clearly below 0, it proves that the matrix is indefinite.
        converged: whether every pair is within the tolerance.
    """

    num_products: int
    num_vectors: int
    residual: float
    smallest: float
    converged: bool


def num_held(size: int, rank: int, item_bytes: int) -> int:
    """How many vectors `top_eigenpairs` holds at a time.

    Args:
        size: of H.
        rank: how many eigenvalues are looked for.
        item_bytes: of a number.
    """
    rank, width = min(rank, size), _width(size, rank)
    return _basis_rows(size, width, item_bytes) + 2 * width + rank


def _width(size: int, rank: int) -> int:
    return min(size, rank + OVERSAMPLING)


def _basis_rows(size: int, width: int, item_bytes: int) -> int:
    blocks = min(MOST_BLOCKS, max(FEWEST_BLOCKS, BASIS_BYTES // (width * size * item_bytes)))
    return min(size, blocks * width)


def top_eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    order: str = "magnitude",
    tolerance: float | None = None,
    max_products: int = 60,
) -> tuple[Float[Tensor, " rank"], Float[Tensor, "size rank"], EigenInfo]:
    """The largest eigenvalues and their eigenvectors.

    Args:
        product: V ↦ H V for V `[size, k]`, with H symmetric.
        size: of H.
        rank: how many; `size` where it is larger.
        dtype: of the vectors, float32 or float64.
        device: of the vectors.
        order: which are largest: "magnitude" (largest |λ|, so that the result is the best
            approximation of H of that rank) or "algebraic" (largest λ). The same for a matrix
            without negative eigenvalues.
        tolerance: on |H v − λ v| relative to |λ| of the pair; rounding errors are allowed for.
            The relative error of an eigenvalue is at most this, and about its square where the
            gaps are wide. None: 1e-3 in float32, 1e-6 in float64.
        max_products: most products; the result is then the best so far, and says so.

    Returns:
        The eigenvalues, largest first; orthonormal eigenvectors as columns; and how they were
        found. Eigenvalues that cannot be told from 0 are 0, as are those beyond the rank of H.

    Raises:
        ValueError: `rank` or `max_products` is below 1, `order` is unknown, or a product has a
            wrong shape or is NaN or infinite.
    """
    for name, number in (("size", size), ("rank", rank), ("max_products", max_products)):
        if number < 1:
            raise ValueError(f"`{name}` is {number}, expected at least 1")
    if order not in ORDERS:
        raise ValueError(f'`order` is {order!r}, expected "magnitude" or "algebraic"')
    rank = min(rank, size)
    width = _width(size, rank)
    eps = torch.finfo(dtype).eps
    if tolerance is None:
        tolerance = 1e-3 if eps > 1e-10 else 1e-6
    limit = _basis_rows(size, width, torch.empty((), dtype=dtype).element_size())

    # Vectors are rows here, one behind the other in memory. H maps the span of `basis` into
    # that of `basis` and `block`; `projected` is H within `basis`.
    basis = torch.empty(limit, size, dtype=dtype, device=device)
    block = _random_rows(width, size, dtype, device)
    projected = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    kept, num_products, num_vectors, smallest = 0, 0, 0, float("inf")
    while True:
        new = len(block)
        image = _image(product, block)
        num_products += 1
        num_vectors += new
        basis[kept : kept + new] = block
        kept += new
        image, inner = _orthogonal_part(image, basis[:kept])
        projected = _bordered(projected, inner.to("cpu", torch.float64))

        values, rotation = torch.linalg.eigh(projected)
        by = values.abs() if order == "magnitude" else values
        descending = by.argsort(descending=True)
        values, rotation = values[descending], rotation[:, descending]
        scale = float(values.abs().max())
        smallest = min(smallest, float(values.min()))
        # H v - λ v is what the newest block's images leave outside of the basis.
        errors = rotation[kept - new :, :rank].mT.to(image) @ image
        residuals = torch.linalg.vector_norm(errors, dim=1).to("cpu", torch.float64)
        allowed = tolerance * values[:rank].abs() + ROUNDING * eps * scale
        converged = bool((residuals <= allowed).all())
        if converged or num_products >= max_products or kept >= size:
            break
        if limit < size and kept + new > limit:
            best = min(kept, max(width, limit // 2), limit - width)
            basis[:best] = rotation[:, :best].mT.to(basis) @ basis[:kept]
            projected, kept = values[:best].diag(), best
        block = _orthonormal(image, basis[:kept], ROUNDING / 5 * eps * scale)
        if not len(block):
            break  # H maps the space into itself: the pairs are exact
    vectors = rotation[:, :rank].mT.to(basis) @ basis[:kept]
    found = values[:rank].clone()
    found[found.abs() <= torch.clamp(residuals, min=ROUNDING * eps * scale)] = 0
    info = EigenInfo(
        num_products,
        num_vectors,
        float(residuals.max()) / scale if scale else 0.0,
        smallest,
        converged,
    )
    return found.to(device, dtype), vectors.mT, info


def _image(product: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
    image = product(block.mT)
    if image.shape != block.mT.shape:
        raise ValueError(
            f"`product` gave {tuple(image.shape)} for vectors {tuple(block.mT.shape)}, expected"
            " the same shape"
        )
    if not bool(torch.isfinite(image).all()):
        raise ValueError("`product` gave NaN or infinite numbers, expected finite ones")
    return image.mT.to(block.dtype)


def _orthogonal_part(image: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `image` without their components along the orthonormal rows of `basis`.

    Returns:
        What is left, and the components `[rows of basis, rows of image]`.
    """
    inner = basis @ image.mT
    image = image - inner.mT @ basis
    # Once more, or what is left keeps the rounding errors of what was taken away.
    again = basis @ image.mT
    return image - again.mT @ basis, inner + again


def _bordered(projected: Tensor, inner: Tensor) -> Tensor:
    """The projected matrix with one block more, whose components are given."""
    old = len(projected)
    corner = (inner[old:] + inner[old:].mT) / 2
    return torch.cat(
        [torch.cat([projected, inner[:old]], 1), torch.cat([inner[:old].mT, corner], 1)]
    )


def _orthonormal(rows: Tensor, basis: Tensor, smallest: float) -> Tensor:
    """Orthonormal rows that span `rows`, but for what is shorter than `smallest`.

    Args:
        rows: orthogonal to `basis`.
        basis: orthonormal rows.
        smallest: singular values of `rows` below it are rounding errors.
    """
    rows = _whitened(rows, smallest)
    # Directions that were short before they got length 1 may lean on the basis again, and on
    # each other.
    rows, _ = _orthogonal_part(rows, basis)
    return _whitened(rows, 0.1)[: basis.shape[1] - len(basis)]


def _whitened(rows: Tensor, smallest: float) -> Tensor:
    """The singular directions of `rows`, longest first, without those below `smallest`.

    By the eigenvalues of the Gram matrix: a QR factorisation of so long rows takes as long as
    the products.
    """
    wide = rows.double()
    squares, rotation = torch.linalg.eigh((wide @ wide.mT).cpu())
    squares, rotation = squares.flip(0), rotation.flip(1)
    lengths = squares.clamp_min(0).sqrt()
    # The entries of `rows` are rounded, and so are those of the Gram matrix.
    noise = 10 * max(torch.finfo(rows.dtype).eps, torch.finfo(wide.dtype).eps ** 0.5)
    kept = lengths > max(smallest, noise * float(lengths[0]))
    return (rotation[:, kept] / lengths[kept]).mT.to(rows) @ rows


def _random_rows(num: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal random rows, always the same."""
    rows = random.normal_rows(0, 0, num, size, dtype=dtype, device=device)
    return torch.linalg.qr(rows.mT)[0].mT
