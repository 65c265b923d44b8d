"""Curvature of the loss at the parameters: Fisher, GGN and Hessian, summed over the data."""

from funcbayes.curvature.blocks import (
    Block,
    Curvature,
    DenseBlock,
    DiagonalBlock,
    EigenKroneckerBlock,
    KroneckerBlock,
    LowRankBlock,
)
from funcbayes.curvature.layout import Report, report
from funcbayes.curvature.sums import (
    CurvatureSums,
    curvature_sums,
    empirical_fisher,
    ggn,
    hessian,
    monte_carlo_fisher,
)

__all__ = [
    "Block",
    "Curvature",
    "CurvatureSums",
    "DenseBlock",
    "DiagonalBlock",
    "EigenKroneckerBlock",
    "KroneckerBlock",
    "LowRankBlock",
    "Report",
    "curvature_sums",
    "empirical_fisher",
    "ggn",
    "hessian",
    "monte_carlo_fisher",
    "report",
]
