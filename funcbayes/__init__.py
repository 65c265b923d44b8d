"""Bayesian deep learning for PyTorch in the style of JAX.

Parameters are pytrees, methods are pure functions, randomness is an explicit key, and the
posterior samples of a prediction are evaluated in one batched forward pass.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from funcbayes import curvature, posteriors
from funcbayes.checkpoint import load, save
from funcbayes.core import likelihoods, random
from funcbayes.core.model import Model
from funcbayes.evaluation import calibration, conformal, uncertainty
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
from funcbayes.prediction import (
    LinearizedPredictive,
    Plan,
    Predictive,
    explain,
    linearized,
    predict,
)

if TYPE_CHECKING:
    from funcbayes import testing
    from funcbayes.evaluation import metrics, plots

__version__ = "0.1.0"

__all__ = [
    "SWAG",
    "BaseBayesianMethod",
    "DeepEnsemble",
    "GaussianLinear",
    "LaplaceApproximation",
    "LinearizedPredictive",
    "MCDropout",
    "Model",
    "NotFittedError",
    "Plan",
    "Predictive",
    "VariationalBayesNN",
    "__version__",
    "calibration",
    "conformal",
    "curvature",
    "dropout",
    "ensemble",
    "explain",
    "laplace",
    "likelihoods",
    "linearized",
    "load",
    "metrics",
    "plots",
    "posteriors",
    "predict",
    "random",
    "save",
    "swag",
    "testing",
    "uncertainty",
    "vi",
]

# They need the extras `report` and `testing`, so they are imported when they are asked for.
_ON_DEMAND = {
    "metrics": "funcbayes.evaluation.metrics",
    "plots": "funcbayes.evaluation.plots",
    "testing": "funcbayes.testing",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'funcbayes' has no attribute {name!r}")
    return import_module(_ON_DEMAND[name])
