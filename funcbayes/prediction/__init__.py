"""From a posterior to predictions; which method made the posterior is not its business."""

from funcbayes.prediction.linearized import LinearizedPredictive, linearized
from funcbayes.prediction.predict import Strategy, predict
from funcbayes.prediction.predictive import Predictive

__all__ = ["LinearizedPredictive", "Predictive", "Strategy", "linearized", "predict"]
