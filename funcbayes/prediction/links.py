"""From a normal distribution over logits to class probabilities.

Shapes: `mean` `[..., classes]`, `covariance` `[..., classes, classes]`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def probit(
    mean: Float[Tensor, "*batch classes"], variance: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch classes"]:
    """softmax(f / √(1 + π/8 v)): logits shrunk by their own variances.

    Source:
        MacKay (1992), doi:10.1162/neco.1992.4.5.720, for two classes; Gibbs (1997) for more.
    """
    return (mean * _shrinkage(variance)).softmax(-1)


def sigmoid_probit(
    mean: Float[Tensor, "*batch"], variance: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """σ(f / √(1 + π/8 v)), for independent binary labels."""
    return (mean * _shrinkage(variance)).sigmoid()


def _shrinkage(variance: Tensor) -> Tensor:
    return (1 + math.pi / 8 * variance).rsqrt()


def laplace_bridge(
    mean: Float[Tensor, "*batch classes"],
    covariance: Float[Tensor, "*batch classes classes"],
    *,
    normalized: bool = False,
) -> Float[Tensor, "*batch classes"]:
    """The mean of the Dirichlet whose Laplace approximation in logits is the given normal.

    The logits are first conditioned on their sum being 0, which softmax does not see.

    Args:
        mean: of the logits.
        covariance: of the logits.
        normalized: whether logits and variances are rescaled first, so that the mean variance is
            √(classes / 2): the bridge is poor where variances are large.

    Source:
        Hobbhahn, Kristiadi and Hennig (2022), arXiv:2003.01227, equations 9 and 10 and, for the
        rescaling, appendix; the concentration is taken in logarithms, which do not overflow.
    """
    num = mean.shape[-1]
    rows = covariance.sum(-1)
    total = rows.sum(-1, keepdim=True)
    # Without any variance there is nothing to condition on.
    weight = torch.where(total > 0, rows / torch.where(total > 0, total, 1), 1 / num)
    mean = mean - weight * mean.sum(-1, keepdim=True)
    variance = covariance.diagonal(dim1=-2, dim2=-1) - weight * rows
    variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)
    if normalized:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(num / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    # log of exp(f) / classes² · Σ exp(−f)
    last = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(num)
    first = math.log(1 - 2 / num) if num > 2 else -math.inf
    log_alpha = torch.logaddexp(last, torch.full_like(last, first)) - variance.log()
    return log_alpha.softmax(-1)
