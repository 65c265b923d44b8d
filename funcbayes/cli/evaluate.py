"""What is reported of one fitted method: figures, times, memory and predictions."""

import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcbayes.cli.choose import Fitted
from funcbayes.cli.data import Splits
from funcbayes.core import trees
from funcbayes.core.random import Key
from funcbayes.evaluation import metrics
from funcbayes.evaluation.report import METRICS, Prediction, Surface
from funcbayes.posteriors import DropoutMasks, Empirical
from funcbayes.prediction import Predictive


class Evaluation(NamedTuple):
    """One method's figures for one seed.

    Attributes:
        metrics: from a name of `METRICS` to its value on the test split.
        metrics_of_mutual_information: out-of-distribution figures with mutual information in
            place of entropy; empty where there are none.
        seconds: "train", "predict" and, where weights are sampled, "predict_loop".
        memory: peak bytes of tensors that one prediction of the test split makes.
        choices: what the validation split chose.
        prediction: for the pictures.
    """

    metrics: dict[str, float]
    metrics_of_mutual_information: dict[str, float]
    seconds: dict[str, float]
    memory: float
    choices: dict[str, Any]
    prediction: Prediction


def evaluate(fitted: Fitted, data: Splits, key: Key, *, train_seconds: float) -> Evaluation:
    """Predicts the test split, held-out classes and the grid of the pictures.

    Args:
        fitted: what predicts.
        data: the splits, on the device of the network.
        key: of the posterior samples.
        train_seconds: what fitting took.
    """

    def predictive(inputs: Tensor, *, strategy: Any = "auto") -> Predictive:
        return fitted.predict(inputs, key, strategy=strategy)

    inputs, targets = data.test.inputs, data.test.targets
    test = _Moments.of(predictive(inputs), data)
    targets = targets.cpu()
    by_information: dict[str, float] = {}
    ood_total = None
    if data.task == "classification":
        found = metrics.classification(test.mean, targets)._asdict()
    else:
        targets = targets.double() * data.target_std + data.target_mean
        found = metrics.regression(test.mean, test.total, targets)._asdict()
    if data.ood is not None:
        ood = _Moments.of(predictive(data.ood), data)
        ood_total = ood.total
        found |= metrics.detection(test.total, ood.total)._asdict()
        # One network knows no difference of opinion; what is left is rounding.
        if not (isinstance(fitted.posterior, Empirical) and fitted.posterior.num_members == 1):
            by_information = metrics.detection(test.epistemic, ood.epistemic)._asdict()
    surface = None
    if data.grid is not None and data.input_mean is not None and data.input_std is not None:
        smooth = fitted
        if isinstance(fitted.posterior, DropoutMasks):
            # A mask of its own for each point would show as noise; the moments are the same.
            smooth = fitted._replace(posterior=fitted.posterior._replace(per="batch"))
        grid = _Moments.of(smooth.predict(data.grid, key), data)
        surface = Surface(data.grid.cpu() * data.input_std + data.input_mean, *grid)

    device = inputs.device
    seconds = {
        "train": train_seconds,
        "predict": _seconds(lambda: predictive(inputs), device),
    }
    if not fitted.linearized:  # there, no weights are drawn that a loop could go through
        seconds["predict_loop"] = _seconds(lambda: predictive(inputs, strategy="loop"), device)
    # Memory that the model keeps for its noise belongs to a prediction as well.
    fitted.model._scratch.buffers.clear()
    return Evaluation(
        metrics={name: value for name, value in found.items() if name in METRICS},
        metrics_of_mutual_information={n: v for n, v in by_information.items() if n in METRICS},
        seconds=seconds,
        memory=peak_memory(lambda: predictive(inputs), device),
        choices=fitted.choices,
        prediction=Prediction(targets, *test, ood_total, surface),
    )


class _Moments(NamedTuple):
    """Mean, total and epistemic uncertainty as `Prediction` has them, in units of the target."""

    mean: Tensor
    total: Tensor
    epistemic: Tensor

    @classmethod
    def of(cls, predictive: Predictive, data: Splits) -> "_Moments":
        if data.task == "classification":
            three = predictive.mean, predictive.entropy, predictive.mutual_information
            return cls(*(x.cpu() for x in three))
        mean, total = predictive.mean.double().cpu(), predictive.total.double().cpu()
        epistemic = (total - predictive.aleatoric.double().cpu()).clamp_min(0)
        scale = data.target_std
        return cls(mean * scale + data.target_mean, total.sqrt() * scale, epistemic.sqrt() * scale)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Peak bytes of the tensors that a call makes, on top of those that are there already.

    On CUDA the allocator's own count. On CPU the tensors that torch's operations return, in
    this thread (samples that would run in threads run here, one by one): what an operation
    uses inside and gives back is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - start)
    with BaseTorchFunctionMode(), _LiveStorages() as live:
        call()
    return float(live.peak)


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still in use.

    NOTE: not torch.profiler, which reports the allocator's count as well, but writes lines
    of its own to the terminal whenever it starts and stops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's hook for it: otherwise the first call imports the compiler, 1.8 s.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in trees.tensor_leaves((args, kwargs or {})):
            self._known.add(leaf.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for leaf in trees.tensor_leaves(result):
            storage = leaf.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _free(self, size: int) -> None:
        self._live -= size


def _seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Median time of a call that has run before; of fewer calls where they take long."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else nullcontext
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
        if sum(times) > 2:
            break
    return statistics.median(times)
