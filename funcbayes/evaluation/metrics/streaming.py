"""What the streaming metrics share: sums over data, or the data themselves.

A metric is updated batch by batch, and its value is that of all batches as one. States are
sums where sums suffice; they, and gathered scores, are float64 whatever the inputs are, so that
ten thousand batches of one datum end where one batch of ten thousand does.
"""

from typing import Any

import torch
from torch import Tensor

from funcbayes.exceptions import NotFittedError
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from torchmetrics import Metric


class StreamingMetric(Metric):
    """A `torchmetrics.Metric` that computes in float64 and survives a batch that it refuses.

    Args:
        kwargs: those of `torchmetrics.Metric`, such as `sync_on_compute`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # It is also the dtype with which a process without data takes part in a gather.
        self.set_dtype(torch.float64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns the value of this batch alone.

        Args:
            args: those of `update`.
            kwargs: those of `update`.

        Returns:
            What `compute` gives after this batch only.
        """
        before = {k: list(v) if isinstance(v, list) else v for k, v in vars(self).items()}
        try:
            return super().forward(*args, **kwargs)
        except Exception:
            # torchmetrics has set the state aside by now: one bad batch would take all with it.
            vars(self).update(before)
            raise

    def add_sum(self, name: str, *shape: int) -> None:
        """Declares a sum, which batches, merged metrics and processes add up."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_list(self, name: str) -> None:
        """Declares scores that are kept, one for each datum."""
        self.add_state(name, [], dist_reduce_fx="cat")

    def append(self, **scores: Tensor) -> None:
        """Keeps the scores `[batch]` of one batch, each under the name it was declared by."""
        for name, values in scores.items():
            getattr(self, name).append(values.to(self.device))

    def gathered(self, name: str) -> Tensor:
        """The kept scores of all batches; within `compute`, of all processes."""
        kept = getattr(self, name)
        # Processes that gather leave one tensor instead of the list.
        kept = kept if isinstance(kept, Tensor) else torch.cat(kept or [torch.zeros(0)])
        self.check_seen(len(kept), name.replace("_", " "))
        return kept

    def check_seen(self, count: int, what: str = "data") -> None:
        """Raises NotFittedError where there is nothing to compute from."""
        if not count:
            raise NotFittedError(
                f"{type(self).__name__} has seen no {what}: call `update` before `compute`"
            )


class MeanOverData(StreamingMetric):
    """The mean of one score a datum: a sum and a count.

    Args:
        state: name of the sum. `MetricCollection` takes metrics to be the same where the names
            and, after one batch, the values of their states are equal: what sums something
            else needs another name.
        kwargs: those of `torchmetrics.Metric`.
    """

    count: Tensor

    def __init__(self, state: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sum = state or f"sum_of_{type(self).__name__}"
        self.add_sum(self._sum)
        self.add_sum("count")

    def add(self, scores: Tensor) -> None:
        """Adds the scores of one batch, of any shape and on any device."""
        setattr(self, self._sum, getattr(self, self._sum) + scores.sum().to(self.device))
        self.count = self.count + scores.numel()

    def compute(self) -> Tensor:
        """The mean over all data so far, float64 `[]`."""
        self.check_seen(int(self.count))
        return getattr(self, self._sum) / self.count
