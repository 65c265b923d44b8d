"""The temperature of logits, which `Categorical` and `Bernoulli` share."""

import math
from numbers import Real

from torch import Tensor

from funcbayes.core.likelihoods.common import describe, known_false


def checked_temperature(value: float | Tensor) -> float | Tensor:
    """A temperature, once it is known to be one; a tensor's value only where it can be known.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: not positive and finite, or a tensor that is not floating point or has axes.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise ValueError(
                f"`temperature` has dtype {value.dtype}, expected floating point: convert it by "
                "`temperature.float()`"
            )
        if value.ndim:
            raise ValueError(
                f"`temperature` has shape {tuple(value.shape)}, expected (): one number divides "
                "all logits"
            )
        if known_false(value.isfinite() & (value > 0)):
            raise ValueError(
                f"`temperature` is {value.item():g}, expected positive and finite: a learnt one is "
                "kept positive as the exponential of a free parameter"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`temperature` is {describe(value)}, expected a number or a tensor with no axes"
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"`temperature` is {value}, expected positive and finite: above 1 it softens the "
            "probabilities, below 1 it sharpens them"
        )
    return float(value)


def tempered(values: Tensor, temperature: float | Tensor) -> Tensor:
    """`values` divided by the temperature, in their own dtype."""
    if isinstance(temperature, Tensor):
        return values / temperature.to(dtype=values.dtype, device=values.device)
    return values if temperature == 1 else values / temperature


def same_temperature(mine: float | Tensor, theirs: float | Tensor) -> bool:
    """The same number or the same tensor object."""
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return mine is theirs
    return mine == theirs
