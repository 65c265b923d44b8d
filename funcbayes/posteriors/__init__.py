"""Distributions over parameter pytrees; how they were fitted is not their business."""

from funcbayes.posteriors.base import Draws, MaskStreams, Posterior
from funcbayes.posteriors.diagonal import Diagonal
from funcbayes.posteriors.dropout_masks import DropoutMasks
from funcbayes.posteriors.empirical import Empirical
from funcbayes.posteriors.low_rank import LowRank
from funcbayes.posteriors.mixture import Mixture, mixture

__all__ = [
    "Diagonal",
    "Draws",
    "DropoutMasks",
    "Empirical",
    "LowRank",
    "MaskStreams",
    "Mixture",
    "Posterior",
    "mixture",
]
