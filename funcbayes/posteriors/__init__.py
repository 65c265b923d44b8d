"""Distributions over parameter pytrees; how they were fitted is not their business."""

from funcbayes.posteriors.base import Draws, MaskStreams, Posterior
from funcbayes.posteriors.block_normal import BlockNormal
from funcbayes.posteriors.diagonal import Diagonal
from funcbayes.posteriors.dropout_masks import DropoutMasks
from funcbayes.posteriors.empirical import Empirical
from funcbayes.posteriors.factors import (
    DenseFactor,
    DiagonalFactor,
    KroneckerFactor,
    LowRankFactor,
)
from funcbayes.posteriors.low_rank import LowRank
from funcbayes.posteriors.mixture import Mixture, mixture

__all__ = [
    "BlockNormal",
    "DenseFactor",
    "Diagonal",
    "DiagonalFactor",
    "Draws",
    "DropoutMasks",
    "Empirical",
    "KroneckerFactor",
    "LowRank",
    "LowRankFactor",
    "MaskStreams",
    "Mixture",
    "Posterior",
    "mixture",
]
