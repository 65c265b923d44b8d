"""Laplace approximation: a Gaussian at trained parameters, from the curvature of the loss there.

The curvature is summed over the data and kept apart from the prior, so the prior, the temperature
and the noise of a Gaussian likelihood are chosen after the fit, at little cost.

Source:
    MacKay (1992), doi:10.1162/neco.1992.4.3.448; Daxberger et al. (2021), arXiv:2106.14806,
    section 2, for deep networks.
"""

from funcbayes.inference.laplace.evidence import log_marginal_likelihood
from funcbayes.inference.laplace.gaussian import decompose, posterior
from funcbayes.inference.laplace.online import OnlineHistory, OnlineInfo, OnlineResult, online
from funcbayes.inference.laplace.state import LaplaceState, Noise, fit, merge
from funcbayes.inference.laplace.tune import TuneResult, tune
from funcbayes.inference.laplace.validation import ValidationResult, tune_by_validation

__all__ = [
    "LaplaceState",
    "Noise",
    "OnlineHistory",
    "OnlineInfo",
    "OnlineResult",
    "TuneResult",
    "ValidationResult",
    "decompose",
    "fit",
    "log_marginal_likelihood",
    "merge",
    "online",
    "posterior",
    "tune",
    "tune_by_validation",
]
