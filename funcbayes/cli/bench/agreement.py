"""Whether two sides computed the same: a comparison of two times says nothing if they did not.

Each function returns None where they did, and otherwise a few words on how they differ.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def moments(prediction: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of a prediction, or the first two of a tuple."""
    if hasattr(prediction, "mean"):
        return prediction.mean, prediction.variance
    return prediction[0], prediction[1]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def prediction_difference(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], *, num_samples: int
) -> str | None:
    """Compares means and variances of one prediction over independent draws.

    The bounds are wide (a variance from 20 draws is known to a third, and a batch of one
    has ten of them, which go together): they catch a missing softmax, noise of another size
    or no noise at all.
    """
    (mean, variance), (their_mean, their_variance) = ours, theirs
    if mean.shape != their_mean.shape:
        return f"mean of shape {tuple(mean.shape)}"
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        return "not finite"
    ratio = (variance.mean() / their_variance.mean()).item()
    if not 0.1 < ratio < 10:
        return f"variance {ratio:.3g} times the baseline's"
    error = (mean - their_mean).abs().mean()
    scale = ((variance + their_variance) / num_samples).sqrt().mean()
    if not error < 4 * scale + 1e-4:
        return f"mean off by {(error / scale).item():.3g} standard errors"
    return None


def moments_difference(
    ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-3
) -> str | None:
    """Compares several tensors, each with its counterpart."""
    for mine, other in zip(ours, theirs, strict=True):
        difference = tensor_difference(mine, other, tolerance)
        if difference:
            return difference
    return None


def tensor_difference(ours: Tensor, theirs: Tensor, tolerance: float = 1e-3) -> str | None:
    """Compares two tensors by the norm of their difference.

    The default allows for float32 sums over thousands of terms in another order.
    """
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)}"
    error = ((ours - theirs).norm() / theirs.norm()).item()
    return None if error < tolerance else f"relative difference {error:.2g}"
