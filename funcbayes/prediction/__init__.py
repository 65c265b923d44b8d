"""From a posterior to predictions; which method made the posterior is not its business."""

from funcbayes.prediction.linearized import LinearizedPredictive, linearized
from funcbayes.prediction.planner import Plan
from funcbayes.prediction.predict import Strategy, explain, predict
from funcbayes.prediction.predictive import Predictive

__all__ = [
    "LinearizedPredictive",
    "Plan",
    "Predictive",
    "Strategy",
    "explain",
    "linearized",
    "predict",
]
