"""What the uncertainties share: checks, and probabilities in log space."""

import math

import torch
from torch import Tensor


def work_dtype(value: Tensor) -> torch.dtype:
    """The dtype to compute in, at least float32."""
    # Sums of float16 lose whole digits, and its smallest probability is 6e-8.
    return torch.promote_types(value.dtype, torch.float32)


def check_floating(value: Tensor, name: str) -> None:
    """Raises TypeError unless `value` is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"`{name}` is {kind(value)}, expected a floating-point tensor")


def check_targets(targets: Tensor, batch: int) -> None:
    """Raises TypeError or ValueError unless `targets` are `batch` integers."""
    dtype = targets.dtype if isinstance(targets, Tensor) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(
            f"`targets` is {kind(targets)}, expected an integer tensor of class indices: "
            "use `targets.long()`"
        )
    if targets.shape != (batch,):
        raise ValueError(
            f"`targets` has shape {tuple(targets.shape)}, expected ({batch},): "
            "one class index for each row of the batch"
        )


def check_samples(samples: Tensor) -> None:
    """Raises TypeError or ValueError unless `samples` is a `[samples, batch, classes]` tensor."""
    check_floating(samples, "samples")
    if samples.ndim != 3 or 0 in samples.shape:
        raise ValueError(
            f"`samples` has shape {tuple(samples.shape)}, expected [samples, batch, classes], "
            "none of them 0; `predict(..., return_samples=True)` returns it"
        )


def kind(value: object) -> str:
    """What came, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"a {type(value).__name__}"


def log_probs(samples: Tensor, *, logits: bool) -> Tensor:
    """Log probabilities in the work dtype, with a finite number for log 0.

    Its exponential is 0 all the same, and 0 · log 0 is then 0, with a finite gradient.
    """
    check_samples(samples)
    samples = samples.to(work_dtype(samples))
    if logits:
        return samples.log_softmax(-1).clamp_min(log_zero(samples))
    # Not `samples > 0`, which would make a zero of NaN.
    zero = samples == 0
    return torch.where(zero, log_zero(samples), torch.where(zero, 1, samples).log())


def log_zero(like: Tensor) -> float:
    """A number for log 0: differences and sums of four of them are still finite."""
    return torch.finfo(like.dtype).min / 4


def mean_log_probs(log_probs: Tensor) -> Tensor:
    """Logarithm of the mean over the first axis, the samples."""
    return log_probs.logsumexp(0) - math.log(log_probs.shape[0])


def expectation(log_probs: Tensor, values: Tensor) -> Tensor:
    """Σ_c p_c values_c over the last axis."""
    return (log_probs.exp() * values).sum(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last axis, nats."""
    # An entropy is not negative, its rounding error can be: log p may come out above 0.
    return -expectation(log_probs, log_probs).clamp_max(0)


def divergence(log_probs: Tensor, log_mean: Tensor) -> Tensor:
    """How far the samples are from their mean: E_s p̄ h(p_s/p̄), h(r) = r log r − r + 1.

    Summed over the last axis this is E_s KL(p_s ‖ p̄): what h adds has mean 0 over the samples.
    But no term is negative, and where the samples agree the terms are small themselves, where
    those of the divergence, or the two entropies whose difference it is, cancel.

    Args:
        log_probs: log p_s, `[samples, *shape]`.
        log_mean: log p̄, `[*shape]`.

    Returns:
        E_s h(p_s/p̄), `[*shape]`, to be weighted by p̄.
    """
    ratio = log_probs - log_mean
    return (ratio.exp() * ratio - ratio.expm1()).clamp_min(0).mean(0)
