"""The figures of predictions: proper scores, calibration, detection and selective prediction.

Functions take predictive distributions or scores, check values as well as shapes, and return
Python numbers. Each has a streaming class, a `torchmetrics.Metric`, for data that come in
batches: its value is that of the function on all of them, to rounding. Everything is computed
in float64. Needs the extra `report`.

- Classification: `accuracy`, `negative_log_likelihood`, `brier_score`,
  `expected_calibration_error`, `adaptive_calibration_error`; `Accuracy`,
  `NegativeLogLikelihood`, `BrierScore`, `ExpectedCalibrationError`, `AdaptiveCalibrationError`.
- Detection: `auroc`, `aupr`, `fpr95`; `AUROC`, `AUPR`, `FPR95`.
- Selective prediction: `risk_coverage`, `aurc`; `RiskCoverageCurve`, `AURC`.
- Regression: `rmse`, `mae`, `gaussian_nll`, `mixture_nll`, `gaussian_crps`, `mixture_crps`,
  `sample_crps`; `RMSE`, `MAE`, `GaussianNLL`, `MixtureNLL`, `GaussianCRPS`, `MixtureCRPS`,
  `SampleCRPS`.
- Intervals: `interval_score`, `coverage`, `sharpness`; `IntervalScore`, `Coverage`, `Sharpness`.

`classification`, `detection` and `regression` give the figures of a table in one call.

The curves of detection are scikit-learn's, the classes' machinery is torchmetrics'. Scores that
are a mean over data are written here once, for the function and the class: torchmetrics sums
them in float32, and keeps all data for the calibration error, where sums suffice.

>>> import torch
>>> from funcbayes.evaluation import metrics
>>> nll = metrics.NegativeLogLikelihood()
>>> for batch in torch.full((3, 8, 2), 0.5):
...     nll.update(batch, torch.zeros(8, dtype=torch.long))
>>> round(nll.compute().item(), 6)
0.693147
"""

from funcbayes.evaluation.metrics.classifiers import (
    Accuracy,
    AdaptiveCalibrationError,
    BrierScore,
    ClassificationMetrics,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    accuracy,
    adaptive_calibration_error,
    brier_score,
    classification,
    expected_calibration_error,
    negative_log_likelihood,
)
from funcbayes.evaluation.metrics.detectors import (
    AUPR,
    AUROC,
    FPR95,
    DetectionMetrics,
    aupr,
    auroc,
    detection,
    fpr95,
)
from funcbayes.evaluation.metrics.intervals import (
    Coverage,
    IntervalScore,
    Sharpness,
    coverage,
    interval_score,
    sharpness,
)
from funcbayes.evaluation.metrics.regressors import (
    MAE,
    RMSE,
    GaussianCRPS,
    GaussianNLL,
    MixtureCRPS,
    MixtureNLL,
    RegressionMetrics,
    SampleCRPS,
    gaussian_crps,
    gaussian_nll,
    mae,
    mixture_crps,
    mixture_nll,
    regression,
    rmse,
    sample_crps,
)
from funcbayes.evaluation.metrics.selective import (
    AURC,
    RiskCoverage,
    RiskCoverageCurve,
    aurc,
    risk_coverage,
)

__all__ = [
    "AUPR",
    "AURC",
    "AUROC",
    "FPR95",
    "MAE",
    "RMSE",
    "Accuracy",
    "AdaptiveCalibrationError",
    "BrierScore",
    "ClassificationMetrics",
    "Coverage",
    "DetectionMetrics",
    "ExpectedCalibrationError",
    "GaussianCRPS",
    "GaussianNLL",
    "IntervalScore",
    "MixtureCRPS",
    "MixtureNLL",
    "NegativeLogLikelihood",
    "RegressionMetrics",
    "RiskCoverage",
    "RiskCoverageCurve",
    "SampleCRPS",
    "Sharpness",
    "accuracy",
    "adaptive_calibration_error",
    "aupr",
    "aurc",
    "auroc",
    "brier_score",
    "classification",
    "coverage",
    "detection",
    "expected_calibration_error",
    "fpr95",
    "gaussian_crps",
    "gaussian_nll",
    "interval_score",
    "mae",
    "mixture_crps",
    "mixture_nll",
    "negative_log_likelihood",
    "regression",
    "risk_coverage",
    "rmse",
    "sample_crps",
    "sharpness",
]
