"""What the classes share: prediction from a posterior, and checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcbayes import prediction
from funcbayes.core import trees, workers
from funcbayes.core.model import Model
from funcbayes.core.random import Key, KeyLike
from funcbayes.modules import common

Moments = tuple[Any, ...]
"""`(mean, variance)`, or `(mean, variance, samples)`."""


class BaseBayesianMethod(nn.Module, ABC):
    """What the methods share: prediction with uncertainty, and checkpoints.

    `state_dict` and `load_state_dict` are those of any module, also as part of a larger one; the
    statistics of a method are additional entries, copied both ways. A checkpoint that does not
    fit leaves the object as it was.
    """

    _state_keys: tuple[str, ...] = ()
    _optional_state_keys: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._network = common.SameNetwork()

    @abstractmethod
    def predict(self, x: Any, return_samples: bool = False, **kwargs: Any) -> Moments:
        """Predicts with posterior samples.

        Args:
            x: inputs `[batch, ...]`, a tensor or a pytree of tensors; a tuple is passed to
                the network as positional arguments.
            return_samples: whether the samples are returned as well.
            **kwargs: options of the method.

        Returns:
            `(mean, variance)`, each `[batch, *out]`, or `(mean, variance, samples)` with
            samples `[num_samples, batch, *out]`. Where the network returns a dict or a tuple,
            so is each of them. Mean and unbiased variance are over the samples: the variance
            is epistemic, without the noise of the data.
        """

    @torch.no_grad()
    def _predict(
        self,
        model: Model,
        posterior: Any,
        x: Any,
        *,
        return_samples: bool,
        normalize_output: bool,
        key: Key | None,
        num_samples: int | None,
        chunk_size: int | None,
    ) -> Moments:
        result = prediction.predict(
            model,
            posterior,
            x,
            key=key,
            num_samples=num_samples,
            chunk_size=chunk_size,
            return_samples=return_samples,
            transform=softmax_of_logits if normalize_output else None,
        )
        if return_samples:
            return result.mean, result.variance, result.samples
        return result.mean, result.variance

    # -- checkpoints: what a method adds to the entries of its modules -------------------------

    def _method_state(self) -> dict[str, Any]:
        """The method's own entries by key (without prefix); may alias."""
        return {}

    def _set_method_state(self, values: dict[str, Any]) -> None:
        """Takes entries like those of `_method_state`, or raises and changes nothing."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self._method_state().items():
            destination[prefix + key] = trees.clone(value)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        own = {prefix + key: key for key in (*self._state_keys, *self._optional_state_keys)}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        missing = [prefix + key for key in self._state_keys if prefix + key not in state_dict]
        missing_keys.extend(missing)
        if missing:
            return
        try:
            self._set_method_state({own[key]: state_dict[key] for key in own if key in state_dict})
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{type(self).__name__}: {error}")

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copies a checkpoint's parameters, buffers and statistics into this object.

        Args:
            state_dict: what `state_dict()` returned; not modified.
            strict: whether missing and unexpected keys are errors. Otherwise, statistics of
                which a key is missing stay as they are.
            assign: as in `torch.nn.Module.load_state_dict`; statistics are copied either way.

        Returns:
            The missing and the unexpected keys.

        Raises:
            RuntimeError: keys are missing or unexpected, or a shape does not fit; the message
                names them, and the object is what it was before.
        """
        before = [
            (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
            for module in self.modules()
        ]
        values = [(t, t.detach().clone()) for t in (*self.parameters(), *self.buffers())]
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except Exception:
            for module, attributes, parameters, buffers in before:
                vars(module).update(attributes)
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            raise


class SamplingMethod(BaseBayesianMethod):
    """A method that predicts with draws from a posterior over one network."""

    num_samples: int
    # Whether `_posterior` computes with tensors as large as the parameters.
    _computes_posterior = True

    @abstractmethod
    def _posterior(self) -> tuple[Model, Any]:
        """The network as a function, and the distribution of its parameters.

        Raises:
            NotFittedError: there is none yet.
        """

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        return_samples: bool = False,
        normalize_output: bool = True,
        *,
        key: KeyLike | None = None,
        num_samples: int | None = None,
        chunk_size: int | None = None,
    ) -> Moments:
        """Predicts with posterior samples.

        Args:
            x: inputs `[batch, ...]`, a tensor or a pytree of tensors; a tuple is passed to
                the network as positional arguments.
            return_samples: whether the samples are returned as well.
            normalize_output: whether softmax over the last axis is applied to each sample's
                output if that is 2-D with more than one column; where the network returns a
                dict or a tuple, to each such tensor in it.
            key: what the samples are drawn from. None: a key drawn from torch's global
                generator, so `torch.manual_seed` governs it.
            num_samples: how many. None: as constructed.
            chunk_size: most samples in one batched pass. None: what fits into memory.

        Returns:
            `(mean, variance)`, each `[batch, *out]`, or `(mean, variance, samples)` with
            samples `[num_samples, batch, *out]`.

        Raises:
            NotFittedError: the method has not seen any data yet.
            ValueError: an argument is out of range.
        """
        large = self.parameters() if self._computes_posterior else ()
        model, posterior = workers.alone(self._posterior, large)
        return self._predict(
            model,
            posterior,
            x,
            return_samples=return_samples,
            normalize_output=normalize_output,
            key=common.key_or_draw(key),
            num_samples=common.positive_int(
                self.num_samples if num_samples is None else num_samples, "num_samples"
            ),
            chunk_size=chunk_size,
        )


def with_fixed(
    network: common.SameNetwork,
    net: nn.Module,
    drawn: frozenset[str],
    mean: Mapping[str, Tensor],
) -> Model:
    """A model with the parameters named in `drawn` uncertain, the others at their means."""
    model = network.get(
        net, drawn, lambda: Model.from_module(net, bayesian=lambda name: name in drawn)
    )
    for name, value in mean.items():
        if name in model.constants:
            model.constants[name] = value.to(model.constants[name])
    return model


def in_format_of(params: dict[str, Tensor], posterior: Any) -> Any:
    """The posterior in the dtype and on the device of the network, which may have moved."""
    return type(posterior)(
        *(trees.tree_map(lambda v, p: v.to(p), field, params) for field in posterior)
    )


def softmax_of_logits(outputs: Tensor) -> Tensor:
    """Softmax of outputs `[samples, batch, classes]`; what has another shape stays."""
    logits = outputs.dim() == 3 and outputs.shape[-1] > 1
    return outputs.softmax(-1) if logits else outputs
