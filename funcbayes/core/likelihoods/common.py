"""What the likelihoods share: checks, and sums over a datum."""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
LOG_2PI_E = LOG_2PI + 1


def widen(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fill_like(outputs: Tensor, values: Tensor) -> Tensor:
    """`values` in the shape of `outputs`.

    Not `values.expand`: under `vmap` that would have no batch axis, which `out_dims` other than 0
    fails on.
    """
    return values + torch.zeros_like(outputs, dtype=values.dtype)


def entr(probs: Tensor) -> Tensor:
    """-p log p, never negative, with a finite gradient at p = 0.

    The clamp is no log(p + eps): it moves only what is outside the normal numbers up to 1.
    """
    return -probs * probs.clamp(torch.finfo(probs.dtype).tiny, 1).log()


def sum_datum(terms: Tensor) -> Tensor:
    """Sums over all axes but the batch."""
    return terms if terms.ndim == 1 else terms.flatten(1).sum(1)


def sum_outputs(terms: Tensor) -> Tensor:
    """Sums over the last axis unless it is the batch."""
    return terms if terms.ndim == 1 else terms.sum(-1)


def normal_entropy(variance: Tensor) -> Tensor:
    """Entropy of normals with these variances, nats, summed over the outputs."""
    return sum_outputs((widen(variance).log() + LOG_2PI_E) / 2)


def diagonal_columns(root: Tensor) -> Tensor:
    """Columns of the diagonal matrices with `root` `[batch, *out]` on the diagonal."""
    size = math.prod(root.shape[1:])
    own = torch.eye(size, dtype=torch.bool, device=root.device).reshape(size, 1, *root.shape[1:])
    return torch.where(own, root, 0)


def describe(value: object) -> str:
    """A value and its type, for messages."""
    return f"{value!r} of type {type(value).__name__}"


def tensor(value: object, name: str) -> Tensor:
    """`value`, once it is known to be a tensor."""
    if not isinstance(value, Tensor):
        fix = "turn arrays and lists into tensors by `torch.as_tensor`"
        if name == "outputs":
            fix = "let the model return its raw outputs alone, or write a likelihood for these"
        raise TypeError(f"`{name}` is of type {type(value).__name__}, expected a tensor: {fix}")
    return value


def float_outputs(value: object) -> Tensor:
    """`outputs`, once they are known to be a floating-point tensor with a batch axis."""
    outputs = tensor(value, "outputs")
    if not outputs.is_floating_point():
        raise ValueError(
            f"`outputs` has dtype {outputs.dtype}, expected floating point: the network's raw "
            "outputs, not labels or predicted classes"
        )
    if outputs.ndim == 0:
        raise ValueError(
            "`outputs` has shape (), expected [batch, *out] with a leading batch axis: add one "
            "to a single datum by `outputs[None]`"
        )
    return outputs


def check_float_targets(targets: Tensor) -> None:
    """Refuses targets that are not floating point."""
    if not targets.is_floating_point():
        raise ValueError(
            f"`targets` has dtype {targets.dtype}, expected floating point for regression: "
            "convert them by `targets.float()`, or use Categorical() if they are class labels"
        )


def check_finite_targets(targets: Tensor) -> None:
    """Refuses NaN and infinity among targets, where values can be read."""
    if known_false(targets.isfinite().all()):
        bad = int((~targets.isfinite()).sum())
        raise ValueError(
            f"`targets` holds {bad} NaN or infinite values of {targets.numel()}, expected finite "
            "ones: drop or impute the data they come from"
        )


def aligned(targets: Tensor, shape: tuple[int, ...], outputs: Tensor, fix: str) -> Tensor:
    """`targets` in exactly `shape`: nothing may broadcast [N, 1] against [N] to [N, N].

    Only a last axis of length one may be missing or surplus.
    """
    got = tuple(targets.shape)
    if got == shape:
        return targets
    if got == (*shape, 1) or (*got, 1) == shape:
        return targets.reshape(shape)
    raise ValueError(
        f"`targets` has shape {got}, expected {shape} for `outputs` of shape "
        f"{tuple(outputs.shape)}: {fix}"
    )


def known_false(condition: Tensor) -> bool:
    """Whether a 0-d condition is false; False where its value cannot be known.

    That is under `vmap` and `torch.compile`, and for fake and meta tensors.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return not bool(condition)
    except RuntimeError:
        return False
