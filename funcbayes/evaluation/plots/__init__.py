"""Pictures of calibration, uncertainty and out-of-distribution detection.

A function draws one panel a method, or one panel with a line a method. Colours are told apart
by every kind of colour vision, and nothing is told by colour alone. Every function returns a
matplotlib `Figure` that belongs to no pyplot state, so nothing is shown, nothing piles up and
any number of threads may draw: write it with `figure.savefig(path)`. Needs the extra `report`.
"""

from funcbayes.evaluation.plots.classifiers import (
    ood_histograms,
    reliability_diagrams,
    risk_coverage_curves,
)
from funcbayes.evaluation.plots.intervals import (
    interval_coverage_curves,
    observed_against_predicted,
)
from funcbayes.evaluation.plots.surfaces import (
    Points,
    Surface,
    regression_bands,
    uncertainty_maps,
)

__all__ = [
    "Points",
    "Surface",
    "interval_coverage_curves",
    "observed_against_predicted",
    "ood_histograms",
    "regression_bands",
    "reliability_diagrams",
    "risk_coverage_curves",
    "uncertainty_maps",
]
