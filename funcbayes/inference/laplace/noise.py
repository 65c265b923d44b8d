"""The curvature and the loss at another noise than that of the fit."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core.likelihoods.common import known_false
from funcbayes.curvature.blocks import (
    Block,
    Curvature,
    DenseBlock,
    DiagonalBlock,
    EigenKroneckerBlock,
    KroneckerBlock,
    LowRankBlock,
)
from funcbayes.inference.laplace.priors import positive
from funcbayes.inference.laplace.state import LaplaceState, Noise, label, sum_of_low_rank


def at_noise(state: LaplaceState, noise_std: Any) -> tuple[Curvature, Float[Tensor, ""]]:
    """The curvature, without an axis of outputs, and the loss at a noise.

    Args:
        state: from `laplace.fit`.
        noise_std: σ, as for `laplace.posterior`. None: that of the fit.

    Raises:
        TypeError: `noise_std` is not a number or a tensor.
        ValueError: it is not positive and finite, has another shape than the state's noise, or
            the state has none.
    """
    noise = state.noise
    if not isinstance(noise, Noise):
        if noise_std is None:
            return state.curvature, state.loss
        raise ValueError(
            "`noise_std` is given, but the state has no noise that could be changed, expected"
            " None: it was not fitted with a Gaussian likelihood, or with one whose noise differs"
            " between outputs (those can be changed after a fit with per_output_noise=True)"
        )
    if noise_std is None and noise.std.dim() == 0:
        return state.curvature, state.loss
    std = noise.std if noise_std is None else _checked(noise_std, noise)
    ratio = noise.std / std
    loss = state.loss
    if noise_std is not None:
        terms = 0.5 * noise.squared_error * (std**-2 - noise.std**-2)
        loss = loss + (terms - noise.num_targets * ratio.log()).sum().to(loss.dtype)
    # NOTE: exact at the fit's own noise, where the ratio is 1 and its logarithm 0.
    weights = ratio**noise.power
    scale = _scaled if noise.std.dim() == 0 else _summed
    blocks = {names: scale(b, weights, names) for names, b in state.curvature.blocks.items()}
    return Curvature(blocks), loss


def _checked(noise_std: Any, noise: Noise) -> Tensor:
    value = positive(noise_std, "noise_std")
    value = torch.as_tensor(value, dtype=noise.std.dtype, device=noise.std.device)
    if value.dim() and value.shape != noise.std.shape:
        came = f"`noise_std` has shape {tuple(value.shape)}"
        if noise.std.dim() == 0:
            raise ValueError(
                f"{came}, expected a number: for one of each output, fit with per_output_noise=True"
            )
        raise ValueError(f"{came}, expected a number or one for each of {len(noise.std)} outputs")
    return value.expand(noise.std.shape)


def _scaled(block: Block, weight: Tensor, names: tuple[str, ...]) -> Block:
    match block:
        case DiagonalBlock():
            return DiagonalBlock(block.values * weight.to(block.values.dtype))
        case KroneckerBlock():
            return block._replace(outputs=block.outputs * weight.to(block.outputs.dtype))
        case EigenKroneckerBlock() | LowRankBlock():
            values = block.eigenvalues * weight.to(block.eigenvalues.dtype)
            return block._replace(eigenvalues=values)
        case DenseBlock():
            return DenseBlock(block.matrix * weight.to(block.matrix.dtype))
    raise TypeError(f"the block of {label(names)} is a {type(block).__name__}, expected a block")


def _summed(block: Block, weights: Tensor, names: tuple[str, ...]) -> Block:
    """Σ_d w_d H_d over the leading axis."""

    def add(x: Tensor) -> Tensor:
        return torch.einsum("d,d...->...", weights.to(x.dtype), x)

    for field in block:
        if field.dim() == 0 or field.shape[0] != len(weights):
            raise ValueError(
                f"the block of {label(names)} has shape {tuple(field.shape)}, expected a leading"
                f" axis for the {len(weights)} outputs of `state.noise`: fit with"
                " per_output_noise=True"
            )
    match block:
        case DiagonalBlock():
            return DiagonalBlock(add(block.values))
        case KroneckerBlock():
            return KroneckerBlock(block.inputs[0], add(block.outputs), block.count[0])
        case EigenKroneckerBlock():
            for basis in (block.output_basis, block.input_basis):
                if known_false((basis == basis[:1]).all()):
                    raise ValueError(
                        f"the block of {label(names)} has another basis for each output, expected"
                        ' one for all: fit with structure="kronecker"'
                    )
            return EigenKroneckerBlock(
                add(block.eigenvalues), block.output_basis[0], block.input_basis[0]
            )
        case DenseBlock():
            return DenseBlock(add(block.matrix))
        case LowRankBlock():
            values = block.eigenvalues * weights.to(block.eigenvalues.dtype)[:, None, None]
            blocks, rows = block.vectors.shape[1:3]
            # The outputs' columns side by side: [blocks, m, D k].
            return sum_of_low_rank(
                values.movedim(0, 1).reshape(blocks, -1),
                block.vectors.permute(1, 2, 0, 3).reshape(blocks, rows, -1),
            )
    raise TypeError(f"the block of {label(names)} is a {type(block).__name__}, expected a block")
