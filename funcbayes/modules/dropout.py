"""Monte Carlo dropout as a class."""

import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.evaluation import uncertainty
from funcbayes.modules import common
from funcbayes.modules.base import SamplingMethod
from funcbayes.posteriors import DropoutMasks


class MCDropout(SamplingMethod):
    """Monte Carlo dropout: predictions with dropout left on.

    Every dropout of the network counts: all layers of `torch.nn`, the functional forms,
    attention's and recurrent layers' own, also in the transformer's fused evaluation path. The
    network is not modified: `dropout_rate` holds in `forward` and `predict` of this object, and
    the layers keep their own `p`.

    Args:
        model: a network with dropout.
        num_samples: masks to draw for a prediction.
        dropout_rate: replaces the rate of every dropout, also one of 0; but attention and
            recurrent layers whose own rate is 0 have no dropout. None keeps each one's own.
        per: "row": each row of a batch has a mask of its own, as in training; "batch": one
            mask a sample for all rows, so that a sample is one function and its rows are a
            joint prediction.

    Raises:
        ValueError: an argument is out of range.

    Warns:
        UserWarning: the network has no dropout that is or may be active. Dropout that only a
            forward pass can show (functional forms) is looked for in the source of `forward`;
            where it may be there but is not, `predict` warns.

    Source:
        Gal and Ghahramani (2016), arXiv:1506.02142.

    Examples:
        >>> import torch, funcbayes as fb
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 3)
        ... )
        >>> mean, variance = fb.MCDropout(net, dropout_rate=None).predict(torch.ones(2, 4))
        >>> mean.shape, variance.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    _computes_posterior = False

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 20,
        dropout_rate: float | None = 0.1,
        *,
        per: Literal["row", "batch"] = "row",
    ) -> None:
        super().__init__()
        common.check_module(model)
        self.model = model
        self.num_samples = common.positive_int(num_samples, "num_samples")
        self.dropout_rate = _checked_rate(dropout_rate)
        self.per = _checked_per(per)
        if not _may_drop(model, overridden=dropout_rate is not None):
            warnings.warn(
                "MCDropout found no dropout in the model: all samples will be identical and the"
                " variance zero. Add torch.nn.Dropout layers, or, where they have rate 0, give"
                " a dropout_rate",
                UserWarning,
                stacklevel=2,
            )

    def forward(self, x: Any) -> Any:
        """One stochastic pass, for training or as one sample.

        Dropout is active whatever the mode; batch norm follows the network's mode, and gradients
        flow. The masks come from a key that is drawn from torch's global generator.

        Args:
            x: inputs as in `predict`.
        """
        with KeyedDropout([common.draw_key()], rate=self.dropout_rate, always=True):
            return common.call(self.model, x)

    def _posterior(self) -> tuple[Model, DropoutMasks]:
        def make() -> Model:
            bare = next(self.model.parameters(), None) is None
            net = _WithParameter(self.model) if bare else self.model
            return Model.from_module(net, bayesian=common.every)

        model = self._network.get(self.model, None, make)
        return model, DropoutMasks(
            model.params, _checked_rate(self.dropout_rate), _checked_per(self.per)
        )

    def predict_entropy(self, x: Any, **options: Any) -> Float[Tensor, "*batch"]:
        """Entropy of the mean probabilities: the total uncertainty.

        Args:
            x: inputs as in `predict`.
            **options: `normalize_output`, `key`, `num_samples`, `chunk_size` as in `predict`.

        Returns:
            Nats, `[batch]`.

        Raises:
            ValueError: what `predict` returns are not probabilities over the last axis.
        """
        mean = self.predict(x, **options)[0]
        return _over_classes(uncertainty.predictive_entropy, mean[None])

    def predict_mutual_information(self, x: Any, **options: Any) -> Float[Tensor, "*batch"]:
        """Mutual information of label and masks (BALD): the epistemic uncertainty.

        Args:
            x: inputs as in `predict`.
            **options: `normalize_output`, `key`, `num_samples`, `chunk_size` as in `predict`.

        Returns:
            Nats, never negative, `[batch]`.

        Raises:
            ValueError: what `predict` returns are not probabilities over the last axis.

        Source:
            Houlsby et al. (2011), arXiv:1112.5745.
        """
        samples = self.predict(x, return_samples=True, **options)[2]
        return _over_classes(uncertainty.mutual_information, samples)


class _WithParameter(nn.Module):
    """A network without parameters, with one that nothing uses: a `Model` needs some."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.unused = nn.Parameter(torch.zeros((), device=common.device_of(net)))

    def forward(self, *x: Any) -> Any:
        return self.net(*x)


def _checked_rate(value: Any) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"`dropout_rate` is {value}, expected a number in [0, 1), or None for each layer's own"
            " rate"
        )
    return value


def _checked_per(value: Any) -> Literal["row", "batch"]:
    if value not in ("row", "batch"):
        raise ValueError(f"`per` is {value!r}, expected 'row' or 'batch'")
    return value


def _over_classes(measure: Callable[[Tensor], Tensor], samples: Any) -> Tensor:
    """Applies a measure over samples `[samples, batch, classes]` of probabilities."""
    if not isinstance(samples, Tensor) or samples.dim() < 3 or samples.shape[-1] < 2:
        came = tuple(samples.shape[1:]) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"the network's output is {came}, expected class logits [batch, classes] with at"
            " least two classes"
        )
    total = samples.sum(-1)
    # Sums of C rounded probabilities; half precision rounds to 1e-3.
    if bool((samples < 0).any()) or not bool(((total - 1).abs() < 0.01).all()):
        raise ValueError(
            "the predictions are not probabilities over the last axis, so they have no entropy:"
            " leave normalize_output=True for logits [batch, classes], or let the network return"
            " probabilities"
        )
    shape = samples.shape[1:-1]
    return measure(samples.flatten(1, -2)).reshape(shape)


def _may_drop(model: nn.Module, *, overridden: bool) -> bool:
    """Whether some part of the model has active dropout, or a forward that may call it."""
    return any(_part_may_drop(part, overridden=overridden) for part in model.modules())


def _part_may_drop(part: nn.Module, *, overridden: bool) -> bool:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0 or overridden
    if isinstance(part, nn.MultiheadAttention):
        return part.dropout > 0
    if isinstance(part, nn.RNNBase):
        return part.dropout > 0 and part.num_layers > 1
    if type(part).__module__.startswith("torch.nn."):
        return False
    return _names_dropout(part.forward, part, set())


# `F.scaled_dot_product_attention` takes a rate too.
_SIGNS = ("drop", "dot_product_attention")


def _names_dropout(function: Any, part: nn.Module, seen: set[Any]) -> bool:
    """Whether the code of a function, or of functions that it names, speaks of dropout."""
    function = inspect.unwrap(function)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:  # compiled or scripted: only running it tells
        return True
    if code in seen:
        return False
    seen.add(code)
    names, codes = set(), [code]
    while codes:
        inner = codes.pop()
        names.update(inner.co_names, inner.co_freevars)
        for constant in inner.co_consts:
            if isinstance(constant, types.CodeType):
                codes.append(constant)
            elif isinstance(constant, str | tuple):
                names.update([constant] if isinstance(constant, str) else map(str, constant))
    if any(sign in name.lower() for name in names for sign in _SIGNS):
        return True
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    for name in names:
        named = scope.get(name, inspect.getattr_static(part, name, None))
        if not isinstance(named, types.FunctionType):
            continue
        if named.__module__.startswith("torch."):
            if any(sign in named.__name__ for sign in _SIGNS):
                return True
        elif _names_dropout(named, part, seen):
            return True
    return False
