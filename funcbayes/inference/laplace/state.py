"""The data's part of a Laplace approximation, and how it is taken and added up."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.likelihoods import Likelihood
from funcbayes.core.likelihoods.common import known_false
from funcbayes.core.model import Model
from funcbayes.core.random import KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.curvature import curvature_sums
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


class Noise(NamedTuple):
    """What it takes to change the noise of a Gaussian likelihood after the fit.

    Attributes:
        std: σ₀, the noise at the fit, in units of the targets. Shape []; `[D]` where each of D
            outputs has its own, and then every tensor of the curvature has a leading axis D,
            one curvature an output.
        squared_error: Σ(y − f)² over the data, with the shape of `std`.
        num_targets: how many targets each entry of `std` applies to. Shape [], int64.
        power: the curvature at another noise σ is the one here times (σ₀/σ)^power. Shape [].
    """

    std: Float[Tensor, "..."]
    squared_error: Float[Tensor, "..."]
    num_targets: Int[Tensor, "..."]
    power: Tensor


class LaplaceState(NamedTuple):
    """The data's part of a Laplace approximation: everything but the prior.

    Attributes:
        mean: the parameters at which the curvature was taken; copies, tree like the parameters.
        curvature: of Σ -log p(y | f(x)), summed over the data, by blocks of parameters, in
            float32 or wider, in units of 1/θ².
        num_data: how many data it is summed over. Shape [], int64.
        loss: Σ -log p(y | f(x)) over the data at `mean`, in nats. Shape [].
        noise: what it takes to change the noise of a Gaussian likelihood; `()` for the others.
    """

    mean: TensorTree
    curvature: Curvature
    num_data: Int[Tensor, "..."]
    loss: Float[Tensor, "..."]
    # Not None where there is none: torch's pytrees take None for a leaf, and `vmap` refuses it.
    noise: Noise | tuple[()]


def fit(
    model: Model,
    data: Any,
    *,
    likelihood: Likelihood,
    structure: Any = "diagonal",
    curvature: str = "ggn",
    sharing: str = "expand",
    rank: int | None = None,
    num_samples: int | None = None,
    key: KeyLike | None = None,
    per_output_noise: bool = False,
    chunk_size: int | None = None,
) -> LaplaceState:
    """Takes the curvature of the loss at the model's parameters, in one pass over the data.

    Args:
        model: a trained network. Its `params` get the posterior; its constants stay as they are.
        data: an iterable of `(inputs, targets)` batches, such as a `DataLoader`, or one such
            pair: the data that the network was trained on, each datum once.
        likelihood: the loss that the network was trained with, as -log p(y | outputs).
        structure: which part of the curvature is kept: "diagonal", "kronecker", "ekfac",
            "dense" (all parameters jointly), "block_diagonal" (dense for each tensor),
            "low_rank", or a mapping from patterns of leaf names to these, of which the first
            that matches a leaf counts.
        curvature: "ggn" for Σ JᵀΛJ with Λ the likelihood's Hessian; "empirical_fisher" for
            Σ g gᵀ with g the gradient of one datum's loss (cheaper, and cruder);
            "monte_carlo_fisher" for the same with targets drawn from the model; "hessian",
            which need not be positive.
        sharing: for "kronecker" and "ekfac", how the positions at which a weight is used for
            one datum are taken together: "expand" or "reduce".
        rank: how many eigenvectors "low_rank" keeps.
        num_samples: targets drawn for each datum by "monte_carlo_fisher".
        key: of what is drawn.
        per_output_noise: whether the noise of each output of a Gaussian likelihood can be
            changed by itself after the fit ("ggn" only); it takes a curvature for each output.
        chunk_size: data at a time; None chooses by memory. The result does not depend on it.

    Returns:
        A state with copies of the parameters, so that training on does not move it.

    Raises:
        TypeError: an argument has the wrong type, or `data` does not yield pairs.
        ValueError: `data` yields nothing, targets do not fit the outputs, a weight, the loss or a
            gradient is NaN or infinite, or an option is unknown.
        MemoryError: a dense block would not fit into memory.
    """
    sums = curvature_sums(
        model,
        data,
        likelihood,
        curvature=curvature,
        structure=structure,
        sharing=sharing,
        rank=rank,
        num_samples=num_samples,
        key=key,
        per_output_noise=per_output_noise,
        chunk_size=chunk_size,
    )
    noise = () if sums.noise is None else Noise(*sums.noise)
    return LaplaceState(trees.clone(model.params), sums.curvature, sums.num_data, sums.loss, noise)


def merge(a: LaplaceState, b: LaplaceState) -> LaplaceState:
    """The state of two disjoint sets of data, fitted at the same parameters.

    Exact for every structure as far as it adds up at all: low-rank blocks keep the sum of both
    (so the rank grows), and the factors of Kronecker blocks add up to those of all data.

    Args:
        a: state of one set of data.
        b: state of the other.

    Raises:
        TypeError: what came is not a state.
        ValueError: the states differ in structure, in a leaf's shape, in the noise, in the bases
            of their eigenvalues, or in the parameters at which they were taken.
    """
    check_state(a, LaplaceState, "laplace.fit", name="a")
    check_state(b, LaplaceState, "laplace.fit", name="b")
    trees.check_like(b.mean, a.mean, name="b.mean")
    others = dict(trees.leaves_with_names(b.mean))
    for name, leaf in trees.leaves_with_names(a.mean):
        if known_false((leaf == others[name]).all()):
            raise ValueError(
                f"`b.mean{name}` differs from `a.mean{name}`: curvatures add up only where both"
                " were taken at the same parameters; fit both states on the same trained model"
            )
    ours, theirs = a.curvature.blocks, b.curvature.blocks
    if list(ours) != list(theirs):
        raise ValueError(
            f"`b.curvature` has blocks of {_groups(theirs)}, expected those of `a`,"
            f" {_groups(ours)}: fit both states with one `structure`"
        )
    noise = _merged_noise(a.noise, b.noise)
    blocks = {names: _added(block, theirs[names], names) for names, block in ours.items()}
    return LaplaceState(a.mean, Curvature(blocks), a.num_data + b.num_data, a.loss + b.loss, noise)


def sum_of_low_rank(
    eigenvalues: Float[Tensor, "*stack blocks k"], vectors: Float[Tensor, "*stack blocks m k"]
) -> LowRankBlock:
    """V diag(eigenvalues) Vᵀ for columns V that are not orthogonal, exactly.

    Args:
        eigenvalues: of any sign.
        vectors: any columns, also more than rows.

    Returns:
        Of rank min(m, k), largest eigenvalue first.
    """
    basis, triangle = torch.linalg.qr(vectors)
    values, rotation = eigh((triangle * eigenvalues.unsqueeze(-2)) @ triangle.mT)
    return LowRankBlock(values.flip(-1), (basis @ rotation).flip(-1))


def eigh(matrix: Float[Tensor, "*stack m m"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors as columns, with a gradient at repeated eigenvalues.

    `torch.linalg.eigh` has gradients of NaN there. Here a derivative turns no eigenvector
    towards another of the same eigenvalue: right wherever the matrix stays zero on its null
    space, whose eigenvalue is the one that repeats. First derivatives only.
    """
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(matrix.detach())
    if not (torch.compiler.is_compiling() or matrix.requires_grad or trees.in_transform(matrix)):
        return values, vectors
    # To first order, with D = Vᵀ M V: eigenvalues are diag D, and Vᵀ dV = dD / gap off it.
    turned = vectors.mT @ matrix @ vectors
    gap = values.unsqueeze(-2) - values.unsqueeze(-1)
    limit = 1e2 * torch.finfo(values.dtype).eps * values.abs().amax(-1)[..., None, None]
    apart = gap.abs() > limit
    turn = torch.where(apart, (turned - turned.detach()) / torch.where(apart, gap, 1.0), 0.0)
    moved = turned.diagonal(dim1=-2, dim2=-1)
    return values + (moved - moved.detach()), vectors + vectors @ turn


def label(names: tuple[str, ...]) -> str:
    """The leaves of a block, for messages."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _added(a: Block, b: Block, names: tuple[str, ...]) -> Block:
    where = f"the block of {label(names)}"
    if type(a) is not type(b):
        raise ValueError(
            f"{where} is a {type(b).__name__} in `b`, expected a {type(a).__name__} as in `a`:"
            " fit both states with one `structure`, and merge before decomposing"
        )
    if isinstance(a, LowRankBlock) and isinstance(b, LowRankBlock):
        _check_shapes(a.vectors[..., :1], b.vectors[..., :1], where)
        return sum_of_low_rank(
            torch.cat([a.eigenvalues, b.eigenvalues], -1), torch.cat([a.vectors, b.vectors], -1)
        )
    for ours, theirs in zip(a, b, strict=True):
        _check_shapes(ours, theirs, where)
    if isinstance(a, EigenKroneckerBlock) and isinstance(b, EigenKroneckerBlock):
        for ours, theirs in ((a.output_basis, b.output_basis), (a.input_basis, b.input_basis)):
            if known_false((ours == theirs).all()):
                raise ValueError(
                    f"{where} has other eigenvectors in `b` than in `a`, and eigenvalues add up"
                    ' in one basis only: fit both states with structure="kronecker" and decompose'
                    " their sum, or fit both with the same basis"
                )
        return a._replace(eigenvalues=a.eigenvalues + b.eigenvalues)
    match a:
        case DiagonalBlock() | DenseBlock() | KroneckerBlock():
            return type(a)(*(x + y for x, y in zip(a, b, strict=True)))
    raise TypeError(f"{where} is a {type(a).__name__}, expected a block of funcbayes.curvature")


def _check_shapes(ours: Tensor, theirs: Tensor, where: str) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{where} has shape {tuple(theirs.shape)} in `b`, expected {tuple(ours.shape)} as in"
            " `a`: were both fitted with the same options?"
        )


def _merged_noise(a: Noise | tuple[()], b: Noise | tuple[()]) -> Noise | tuple[()]:
    if not a and not b:
        return a
    if not isinstance(a, Noise) or not isinstance(b, Noise):
        raise ValueError(
            "one state has a `noise` and the other has none, expected both or neither: fit both"
            " with one likelihood"
        )
    if a.std.shape != b.std.shape or known_false(
        (a.std == b.std).all() & (a.power == b.power).all()
    ):
        raise ValueError(
            f"`b.noise` has std {b.std.tolist()} and power {float(b.power)}, expected"
            f" {a.std.tolist()} and {float(a.power)} as in `a`: fit both with one likelihood"
        )
    return Noise(a.std, a.squared_error + b.squared_error, a.num_targets + b.num_targets, a.power)


def _groups(blocks: dict[tuple[str, ...], Any]) -> str:
    shown = [f"({label(names)})" for names in list(blocks)[:3]]
    return ", ".join(shown) + (", …" if len(blocks) > 3 else "")
