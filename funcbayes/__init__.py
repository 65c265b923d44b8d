"""Bayesian deep learning for PyTorch in the style of JAX.

Parameters are pytrees, methods are pure functions, randomness is an explicit key, and the
posterior samples of a prediction are evaluated in one batched forward pass.
"""

from funcbayes import curvature, posteriors
from funcbayes.core import likelihoods, random
from funcbayes.core.model import Model
from funcbayes.evaluation import uncertainty
from funcbayes.exceptions import NotFittedError
from funcbayes.inference import dropout, ensemble, laplace, swag, vi
from funcbayes.modules import (
    SWAG,
    BaseBayesianMethod,
    DeepEnsemble,
    GaussianLinear,
    LaplaceApproximation,
    MCDropout,
    VariationalBayesNN,
)
from funcbayes.prediction import Predictive, predict

__version__ = "0.1.0"

__all__ = [
    "SWAG",
    "BaseBayesianMethod",
    "DeepEnsemble",
    "GaussianLinear",
    "LaplaceApproximation",
    "MCDropout",
    "Model",
    "NotFittedError",
    "Predictive",
    "VariationalBayesNN",
    "__version__",
    "curvature",
    "dropout",
    "ensemble",
    "laplace",
    "likelihoods",
    "posteriors",
    "predict",
    "random",
    "swag",
    "uncertainty",
    "vi",
]
