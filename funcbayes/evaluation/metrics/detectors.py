"""Detection of out-of-distribution inputs by a score; higher means stranger.

The curves are scikit-learn's. torchmetrics' would put scores outside [0, 1] through a sigmoid
and tie the large ones, and entropies are such scores.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcbayes.evaluation.metrics import checks
from funcbayes.evaluation.metrics.streaming import StreamingMetric
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


class DetectionMetrics(NamedTuple):
    """How well a score tells out-of-distribution inputs from in-distribution ones.

    Attributes:
        auroc: area under the ROC curve; 0.5 is guessing.
        aupr: average precision, out-of-distribution inputs being the positives; their share
            is guessing.
        fpr95: share of out-of-distribution inputs accepted where 95 % of the others are.
    """

    auroc: float
    aupr: float
    fpr95: float


def detection(
    in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]
) -> DetectionMetrics:
    """AUROC, AUPR and FPR95 at once.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        The three figures.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.
    """
    labelled = _labelled(in_scores, out_scores)
    return DetectionMetrics(_auroc(*labelled), _aupr(*labelled), _fpr95(*labelled))


def auroc(in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]) -> float:
    """Probability that an out-of-distribution input scores above an in-distribution one.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        Area under the ROC curve, 0 to 1; ties count one half.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.
    """
    return _auroc(*_labelled(in_scores, out_scores))


def aupr(in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]) -> float:
    """Area under the precision–recall curve; out-of-distribution inputs are the positives.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        Average precision, 0 to 1: the precision at each threshold, weighted by the recall
        that the threshold adds. Unlike the trapezoid rule it does not flatter (Davis and
        Goadrich, 2006, doi:10.1145/1143844.1143874). It depends on how many of the inputs
        are out-of-distribution; with all scores equal it is their share.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.
    """
    return _aupr(*_labelled(in_scores, out_scores))


def fpr95(in_scores: Float[Tensor, " inside"], out_scores: Float[Tensor, " outside"]) -> float:
    """False positive rate at 95 % true positive rate; in-distribution inputs are the positives.

    Args:
        in_scores: score of each in-distribution input; higher means stranger.
        out_scores: score of each out-of-distribution input.

    Returns:
        Share of out-of-distribution inputs accepted by the strictest threshold that accepts
        at least 95 % of the in-distribution ones.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: scores are empty, not finite, or have not one axis.

    Source:
        Liang et al. (2018), arXiv:1706.02690, section 4.3.
    """
    return _fpr95(*_labelled(in_scores, out_scores))


class _Detection(StreamingMetric):
    """Keeps the scores of all inputs: no curve follows from sums."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_list("in_scores")
        self.add_list("out_scores")

    def update(
        self, scores: Float[Tensor, " batch"], *, outside: bool | Bool[Tensor, " batch"]
    ) -> None:
        """Adds the scores of a batch.

        Args:
            scores: score of each input, `[batch]`; higher means stranger.
            outside: whether the inputs are out-of-distribution: all or none of them, or each
                `[batch]`.

        Raises:
            TypeError: `scores` is not a floating-point tensor, or `outside` not boolean.
            ValueError: `scores` is empty, not finite, or has not one axis, or `outside` is
                not one boolean for each of them.
        """
        scores = checks.checked_scores(scores, "scores")
        if isinstance(outside, bool):
            self.append(**{"out_scores" if outside else "in_scores": scores})
            return
        if not isinstance(outside, Tensor) or outside.dtype != torch.bool:
            raise TypeError(
                f"`outside` is {checks.kind(outside)}, expected True, False, or a tensor of "
                "booleans, one for each score"
            )
        if outside.shape != scores.shape:
            raise ValueError(
                f"`outside` has shape {tuple(outside.shape)}, expected {tuple(scores.shape)}: "
                "one boolean for each score"
            )
        self.append(in_scores=scores[~outside], out_scores=scores[outside])

    def _kept(self) -> tuple[np.ndarray, np.ndarray]:
        return _joined(self.gathered("in_scores"), self.gathered("out_scores"))

    def _result(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)


class AUROC(_Detection):
    """Streaming `auroc`; it keeps the score of each input.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The area of all inputs so far, float64 `[]`."""
        return self._result(_auroc(*self._kept()))


class AUPR(_Detection):
    """Streaming `aupr`; it keeps the score of each input.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The area of all inputs so far, float64 `[]`."""
        return self._result(_aupr(*self._kept()))


class FPR95(_Detection):
    """Streaming `fpr95`; it keeps the score of each input.

    Args:
        kwargs: those of `torchmetrics.Metric`.
    """

    def compute(self) -> Tensor:
        """The rate of all inputs so far, float64 `[]`."""
        return self._result(_fpr95(*self._kept()))


def _auroc(is_outside: np.ndarray, scores: np.ndarray) -> float:
    return float(roc_auc_score(is_outside, scores))


def _aupr(is_outside: np.ndarray, scores: np.ndarray) -> float:
    return float(average_precision_score(is_outside, scores))


def _fpr95(is_outside: np.ndarray, scores: np.ndarray) -> float:
    # Every threshold is wanted: a curve without its collinear points can step over 95 %.
    fpr, tpr, _ = roc_curve(1 - is_outside, -scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def _labelled(in_scores: Tensor, out_scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    inside = checks.checked_scores(in_scores, "in_scores")
    return _joined(inside, checks.checked_scores(out_scores, "out_scores"))


def _joined(in_scores: Tensor, out_scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    scores = torch.cat([in_scores.cpu(), out_scores.cpu()])
    return np.repeat([0, 1], [len(in_scores), len(out_scores)]), scores.numpy()
