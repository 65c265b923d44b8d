"""Uncertainty of predictions from posterior samples, and their scores.

For classification every function takes `samples` `[samples, batch, classes]`: the class
probabilities of each posterior sample, as `Predictive.samples` and the classes'
`predict(..., return_samples=True)` give them, or logits with `logits=True`. For regression they
take the means `[samples, batch, *out]` of each sample and the noise about them.

All but `select_batch` pass through `vmap` and `torch.compile`, so they check shapes and dtypes
and never the values of tensors; all but the quantiles and intervals are differentiable.
Entropies are in nats; float16 and bfloat16 are computed, and returned, in float32.
"""

from funcbayes.evaluation.uncertainty.classification import (
    Decomposition,
    decompose,
    disagreement,
    ensemble_diversity,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    variation_ratio,
)
from funcbayes.evaluation.uncertainty.common import check_floating as check_floating
from funcbayes.evaluation.uncertainty.common import check_targets as check_targets
from funcbayes.evaluation.uncertainty.joint import (
    Selection,
    joint_entropy,
    joint_mutual_information,
    select_batch,
)
from funcbayes.evaluation.uncertainty.regression import (
    Interval,
    VarianceDecomposition,
    decompose_variance,
    mixture_interval,
    mixture_quantiles,
    sample_interval,
    sample_quantiles,
)
from funcbayes.evaluation.uncertainty.scores import (
    ReliabilityBins,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)

__all__ = [
    "Decomposition",
    "Interval",
    "ReliabilityBins",
    "Selection",
    "VarianceDecomposition",
    "brier_score",
    "decompose",
    "decompose_variance",
    "disagreement",
    "ensemble_diversity",
    "expected_calibration_error",
    "expected_entropy",
    "joint_entropy",
    "joint_mutual_information",
    "mixture_interval",
    "mixture_quantiles",
    "mutual_information",
    "negative_log_likelihood",
    "predictive_entropy",
    "reliability_bins",
    "sample_interval",
    "sample_quantiles",
    "select_batch",
    "variation_ratio",
]
