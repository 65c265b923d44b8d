"""Curvature of the loss at the parameters: Fisher and GGN, summed over the data."""

from funcbayes.curvature.diagonal import CurvatureSums, curvature_sums, empirical_fisher, ggn

__all__ = ["CurvatureSums", "curvature_sums", "empirical_fisher", "ggn"]
