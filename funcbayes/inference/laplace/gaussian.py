"""The Gaussian of a state and a prior, block by block: its factors, and its evidence's parts.

Everything is relative to the prior: with S = P₀^{-1/2}, the posterior precision is
P = S⁻¹ (I + S H S / T) S⁻¹, and the middle is what is factorised. It has the same scale whatever
the units of the parameters, and log det P − log det P₀ is its log determinant, which is exactly 0
where the data say nothing.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core import trees
from funcbayes.curvature.blocks import (
    Block,
    Curvature,
    DenseBlock,
    DiagonalBlock,
    EigenKroneckerBlock,
    KroneckerBlock,
    LowRankBlock,
)
from funcbayes.inference.checks import check_state
from funcbayes.inference.laplace.noise import at_noise
from funcbayes.inference.laplace.priors import (
    Prior,
    check_curvature,
    check_temperature,
    prior_precisions,
)
from funcbayes.inference.laplace.state import LaplaceState, Noise, eigh, label
from funcbayes.posteriors import Diagonal
from funcbayes.posteriors.block_normal import BlockNormal
from funcbayes.posteriors.factors import (
    DenseFactor,
    DiagonalFactor,
    Factor,
    KroneckerFactor,
    LowRankFactor,
)

# What is added to the diagonal where a Cholesky factorisation fails, in units of the rounding of
# the mean diagonal entry, is at most this: the sum over the data has rounded by about as much.
MAX_JITTER = 1e3
# Eigenvalues down to minus this, in units of the rounding of the largest, are roundings of 0.
ROUNDINGS = 1e2


def posterior(
    state: LaplaceState,
    *,
    prior_precision: Prior = 1.0,
    temperature: float | Tensor = 1.0,
    noise_std: float | Tensor | None = None,
) -> Diagonal | BlockNormal:
    """N(mean, (H/T + prior precision)⁻¹), with H the curvature and T the temperature.

    Args:
        state: from `fit`.
        prior_precision: 1/variance of the prior N(0, 1/prior_precision): a number for all
            parameters, or a tree like the parameters whose leaves are a number for the tensor
            or a tensor of its shape. Kronecker blocks take one number for a tensor. Weight
            decay λ in a mean loss over N data is λ·N.
        temperature: T > 0; below 1 the posterior is sharper than Bayes' (a "cold" one).
        noise_std: σ of a Gaussian likelihood, in units of the targets: a number, or `[D]` after
            a fit with `per_output_noise`. None: that of the fit.

    Returns:
        A `Diagonal` normal where every block of the curvature is diagonal, otherwise a
        `BlockNormal`; differentiable in `prior_precision`, `temperature` and `noise_std`.

    Raises:
        TypeError: an option is not a number or a tensor, or `state` is no state.
        ValueError: an option is not positive and finite, or has another structure or shape
            (the message names the leaf), `noise_std` is given and the state has no noise, or
            the posterior precision is not positive definite, as with a Hessian away from a
            minimum. Inside `vmap` and `torch.compile` values are not looked at: what would
            fail is NaN there.
    """
    check_state(state, LaplaceState, "laplace.fit")
    check_curvature(state.curvature, state.mean)
    temperature = check_temperature(temperature)
    priors = prior_precisions(prior_precision, state.curvature, state.mean)
    curvature, _ = at_noise(state, noise_std)
    factors = {
        names: block_factor(block, priors[names], temperature, names)
        for names, block in curvature.blocks.items()
    }
    stds = {n[0]: f.std for n, f in factors.items() if isinstance(f, DiagonalFactor)}
    if len(stds) == len(factors):
        leaves = [
            stds[name].reshape(leaf.shape).to(leaf.dtype)
            for name, leaf in zip(trees.names(state.mean), trees.leaves(state.mean), strict=True)
        ]
        return Diagonal(state.mean, trees.unflatten(leaves, state.mean))
    return BlockNormal(state.mean, factors)


def decompose(state: LaplaceState) -> LaplaceState:
    """Finds the eigenvalues and eigenvectors of the blocks once, for many priors.

    `posterior` and `log_marginal_likelihood` then give the same (to rounding), without
    factorising anything again where the prior has one number for all of a block.

    Args:
        state: from `fit`; not modified.

    Returns:
        Kronecker blocks become `EigenKroneckerBlock`s, dense ones `LowRankBlock`s with all
        eigenvalues; others stay. Negative eigenvalues that are roundings of 0 are 0 after it.
        A state with a curvature for each output stays as it is: its eigenvectors depend on
        the noise.

    Raises:
        TypeError: `state` is no state.
    """
    check_state(state, LaplaceState, "laplace.fit")
    check_curvature(state.curvature, state.mean)
    if isinstance(state.noise, Noise) and state.noise.std.dim():
        return state
    return state._replace(curvature=decomposed(state.curvature))


def decomposed(
    curvature: Curvature,
    dense: Callable[[tuple[str, ...]], bool] = lambda names: True,
    *,
    eps: float | None = None,
) -> Curvature:
    """The curvature with Kronecker blocks, and the dense ones chosen, by their eigenvalues.

    Args:
        curvature: without an axis of outputs.
        dense: which dense blocks are chosen, by the leaves of the group.
        eps: relative rounding of the curvature; None: that of its dtype.
    """
    blocks: dict[tuple[str, ...], Block] = {}
    for names, block in curvature.blocks.items():
        if isinstance(block, KroneckerBlock):
            block = _eigenbasis(block, names)
        elif isinstance(block, DenseBlock) and dense(names):
            values, vectors = _clean_eigh(block, eps, names)
            block = LowRankBlock(values.flip(-1), vectors.flip(-1))
        blocks[names] = block
    return Curvature(blocks)


def without_roundings(curvature: Curvature, eps: float) -> Curvature:
    """Dense blocks with 0 for negative eigenvalues that are roundings of it.

    In a wider dtype than that of the sums, roundings would count as negative eigenvalues.

    Args:
        curvature: in the wider dtype; its tensors may have leading axes.
        eps: relative rounding of the sums.
    """
    blocks: dict[tuple[str, ...], Block] = {}
    for names, block in curvature.blocks.items():
        if isinstance(block, DenseBlock):
            values, vectors = _clean_eigh(block, eps, names)
            block = DenseBlock((vectors * values.unsqueeze(-2)) @ vectors.mT)
        blocks[names] = block
    return Curvature(blocks)


def _clean_eigh(
    block: DenseBlock, eps: float | None, names: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    _check_finite(block.matrix, names)
    values, vectors = eigh(block.matrix)
    eps = torch.finfo(values.dtype).eps if eps is None else eps
    floor = -ROUNDINGS * eps * values[..., -1:].abs()
    return torch.where((values < 0) & (values >= floor), 0.0, values), vectors


def block_factor(
    block: Block, prior: Tensor, temperature: float | Tensor, names: tuple[str, ...]
) -> Factor:
    """The covariance (H/T + P₀)⁻¹ of a group, as a factor.

    Args:
        block: H.
        prior: the diagonal of P₀, a scalar or the flat vector `[n]`.
        temperature: T.
        names: the leaves of the group.
    """
    if isinstance(block, KroneckerBlock):
        block = _eigenbasis(block, names)
    match block:
        case DiagonalBlock():
            relative = _relative(block.diagonal() / prior, temperature, names)
            return DiagonalFactor((relative * prior).rsqrt())
        case EigenKroneckerBlock():
            relative = _relative(block.eigenvalues / prior, temperature, names)
            return KroneckerFactor(
                (relative * prior).rsqrt(), block.output_basis, block.input_basis
            )
        case LowRankBlock():
            values, basis = _low_rank_relative(block, prior, names)
            scale = _relative(values, temperature, names).rsqrt()
            rows = block.vectors.shape[:-1]
            std = prior.rsqrt().expand(rows.numel()).reshape(rows)
            return LowRankFactor(std, basis, scale)
        case DenseBlock():
            rows = block.matrix.shape[:-1]
            root = prior.sqrt().expand(rows.numel()).reshape(*rows, 1)
            return DenseFactor(root * _relative_root(block, prior, temperature, names))


def log_det_ratio(
    block: Block, prior: Tensor, temperature: float | Tensor, names: tuple[str, ...]
) -> Float[Tensor, ""]:
    """Log det(H/T + P₀) − log det P₀ of a group, without cancellation.

    Args:
        block: H.
        prior: the diagonal of P₀, a scalar or the flat vector `[n]`.
        temperature: T.
        names: the leaves of the group.
    """
    match block:
        case DiagonalBlock():
            values = block.diagonal() / prior
        case KroneckerBlock():
            values = _eigenbasis(block, names, vectors=False).eigenvalues / prior
        case EigenKroneckerBlock():
            values = block.eigenvalues / prior
        case LowRankBlock():
            values, _ = _low_rank_relative(block, prior, names, vectors=False)
        case DenseBlock():
            root = _relative_root(block, prior, temperature, names)
            return 2 * root.diagonal(dim1=-2, dim2=-1).log().sum()
    _relative(values, temperature, names)
    return (values / temperature).log1p().sum()


def _eigenbasis(
    block: KroneckerBlock, names: tuple[str, ...], *, vectors: bool = True
) -> EigenKroneckerBlock:
    """A Kronecker block by its eigenvalues, which are not negative."""
    inputs = block.inputs / block.count[..., None, None, None]
    for factor in (inputs, block.outputs):
        _check_finite(factor, names)
    if vectors:
        (a, right), (b, left) = eigh(inputs), eigh(block.outputs)
    else:
        # The gradients of eigenvalues alone have no differences of eigenvalues in them.
        a, b = torch.linalg.eigvalsh(inputs), torch.linalg.eigvalsh(block.outputs)
        right, left = inputs, block.outputs
    values = b.clamp(min=0).unsqueeze(-1) * a.clamp(min=0).unsqueeze(-2)
    return EigenKroneckerBlock(values, left, right)


def _low_rank_relative(
    block: LowRankBlock, prior: Tensor, names: tuple[str, ...], *, vectors: bool = True
) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[blocks, k]` and eigenvectors `[blocks, m, k]` of S H S."""
    if prior.dim() == 0:
        return block.eigenvalues / prior, block.vectors
    scaled = prior.rsqrt().reshape(*block.vectors.shape[:-1], 1) * block.vectors
    basis, triangle = torch.linalg.qr(scaled)
    inner = (triangle * block.eigenvalues.unsqueeze(-2)) @ triangle.mT
    _check_finite(inner, names)
    if not vectors:
        return torch.linalg.eigvalsh(inner), basis
    values, rotation = eigh(inner)
    return values, basis @ rotation


def _relative(values: Tensor, temperature: float | Tensor, names: tuple[str, ...]) -> Tensor:
    """Eigenvalues of the posterior precision relative to the prior's, once they are positive."""
    relative = 1 + values / temperature
    if _known(((relative > 0) & relative.isfinite()).all()) is False:
        _check_finite(relative, names)
        _refuse(relative.min(), names)
    # Where values cannot be looked at, the root of a negative one is NaN.
    return relative


def _relative_root(
    block: DenseBlock, prior: Tensor, temperature: float | Tensor, names: tuple[str, ...]
) -> Tensor:
    """The lower Cholesky factor of I + S H S / T."""
    rows = block.matrix.shape[:-1]
    inverse_root = prior.rsqrt().expand(rows.numel()).reshape(*rows, 1)
    matrix = inverse_root * block.matrix * inverse_root.mT / temperature
    identity = torch.eye(rows[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + identity
    root, info = torch.linalg.cholesky_ex(matrix)
    # LAPACK takes infinity for positive.
    finite = root.diagonal(dim1=-2, dim2=-1).isfinite().all()
    succeeded = _known((info == 0).all() & finite)
    if succeeded:
        return root
    if succeeded is None:
        return torch.where((info == 0)[..., None, None], root, torch.nan)
    _check_finite(matrix, names)
    size = matrix.detach().diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None]
    jitter = torch.finfo(matrix.dtype).eps
    limit = MAX_JITTER * jitter
    while jitter <= limit:
        root, info = torch.linalg.cholesky_ex(matrix + jitter * size * identity)
        if bool((info == 0).all()):
            return root
        jitter *= 10
    _refuse(torch.linalg.eigvalsh(matrix.detach()).min(), names)


def _check_finite(matrix: Tensor, names: tuple[str, ...]) -> None:
    """Before eigenvectors are looked for, of which torch says only that there are none."""
    if _known(matrix.isfinite().all()) is False:
        raise ValueError(
            f"the posterior precision of {label(names)} has NaN or infinite entries, expected"
            " finite ones: the curvature, or its ratio to the temperature and the prior's"
            " precision, overflows"
        )


def _refuse(smallest: Tensor, names: tuple[str, ...]) -> NoReturn:
    found = float(smallest)
    raise ValueError(
        f"the posterior precision of {label(names)} is not positive definite: in units of the prior"
        f" precision its smallest eigenvalue is {found:.3g}, expected a positive one. The curvature"
        " is indefinite, as a Hessian is away from a minimum: train to a minimum, fit with"
        f' curvature="ggn", or take a `prior_precision` more than {max(1 - found, 1.0):.3g} times'
        " as large"
    )


def _known(condition: Tensor) -> bool | None:
    """A 0-d condition; None where a transform hides its value."""
    if torch.compiler.is_compiling():
        return None
    try:
        return bool(condition)
    except RuntimeError:
        return None
