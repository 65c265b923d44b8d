"""The Bernoulli likelihood: independent yes-or-no labels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.likelihoods.common import (
    aligned,
    diagonal_columns,
    entr,
    float_outputs,
    known_false,
    sum_datum,
    tensor,
    widen,
)
from funcbayes.core.likelihoods.temperature import (
    checked_temperature,
    same_temperature,
    tempered,
)
from funcbayes.core.random import KeyLike


@dataclass(frozen=True, kw_only=True, eq=False)
class Bernoulli:
    """A yes-or-no label for each output, from one logit each: sigmoid(outputs / temperature).

    One output a datum is binary classification. `[batch, labels]` outputs are multi-label
    classification: given the outputs the labels are independent, any number of them may be 1, and
    `nll` is the sum over a datum's labels.

    Outputs `[batch, *out]`, targets in {0, 1} of any real dtype with the same shape; a last axis
    of length one may be missing on either side. Each output is a distribution of its own, so
    entropies have the shape of `outputs`.

    Two Bernoullis are equal if their `temperature` is the same number or the same tensor object.

    Attributes:
        temperature: divides the logits, everywhere; positive and finite: a number, or a tensor
            with no axes. A tensor may require gradients, and is kept, not copied.
            `funcbayes.calibration.fit_temperature` fits one. It is not the temperature of a
            posterior.

    Raises:
        TypeError: `temperature` is neither a number nor a tensor.
        ValueError: `temperature` has axes, an integer dtype or a value that is not positive and
            finite.
    """

    temperature: float | int | Tensor = 1.0

    def __post_init__(self) -> None:
        """Checks the option."""
        object.__setattr__(self, "temperature", checked_temperature(self.temperature))

    def __eq__(self, other: object) -> bool:
        """Same number or same tensor object."""
        if not isinstance(other, Bernoulli) or type(other) is not type(self):
            return NotImplemented
        return same_temperature(self.temperature, other.temperature)

    def __hash__(self) -> int:
        """By value for a number, by identity for a tensor."""
        return hash((Bernoulli, self.temperature))

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that do not belong together; see `Likelihood.check`.

        Args:
            outputs: logits, floating point.
            targets: 0 and 1, or False and True.

        Raises:
            TypeError: not a tensor.
            ValueError: values outside {0, 1}, or a shape that does not fit.
        """
        outputs = float_outputs(outputs)
        targets = self._labels(outputs, tensor(targets, "targets"))
        if known_false(((targets == 0) | (targets == 1)).all()):
            raise ValueError(
                f"`targets` holds values outside {{0, 1}}, from {targets.min().item():g} to "
                f"{targets.max().item():g}, expected 0 or 1 for every output: turn -1 and 1 or "
                "probabilities into labels by `targets > threshold`, and use Categorical() for "
                "more than two classes"
            )

    def nll(
        self, outputs: Float[Tensor, "batch *out"], targets: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " batch"]:
        """-log p(targets | outputs), summed over a datum's outputs.

        Args:
            outputs: logits.
            targets: 0 and 1, the shape of `outputs`.

        Returns:
            `[batch]`, in nats.

        Raises:
            ValueError: the dtype or shape of `targets` does not fit `outputs`.
        """
        targets = self._labels(float_outputs(outputs), targets)
        logits = self._logits(outputs)
        # Not F.softplus, which is linear from 20 on: 2e-9 off, and of zero curvature.
        return -sum_datum(F.logsigmoid((2 * targets.to(logits.dtype) - 1) * logits))

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Probabilities of 1, sigmoid(outputs / temperature).

        Args:
            outputs: logits.
        """
        return self._logits(outputs).sigmoid()

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Variance p(1 - p) of each label.

        Args:
            outputs: logits.
        """
        logits = self._logits(outputs)
        return logits.sigmoid() * (-logits).sigmoid()

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Entropy of each label, between 0 and log 2, in nats.

        Args:
            outputs: logits.
        """
        logits = self._logits(outputs)
        lowest = torch.finfo(logits.dtype).min  # a logit of ±inf has p log p = 0, not 0 · -inf

        def term(f: Tensor) -> Tensor:
            return f.sigmoid() * F.logsigmoid(f).clamp_min(lowest)

        return -(term(logits) + term(-logits))

    def predictive_entropy(
        self, mean: Float[Tensor, "batch *out"], total_variance: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "batch *out"]:
        """Entropy of the mean probabilities: exact for the mixture.

        Args:
            mean: average of the probabilities of 1 over the samples.
            total_variance: not used; the mean determines it.

        Returns:
            The shape of `mean`, in nats.
        """
        del total_variance
        mean = widen(mean)
        return entr(mean) + entr(1 - mean)

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws labels 0.0 and 1.0 with the shape of `outputs`; see `Likelihood.sample`.

        Args:
            key: a key or an int.
            outputs: logits.
        """
        probs = self.inverse_link(outputs)
        u = random.uniform(key, probs.shape, dtype=probs.dtype, device=probs.device)
        return (u < probs).to(probs.dtype)

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "columns batch *out"]:
        """One column √(p(1 - p))/T for each output of a datum, T the temperature; for any target.

        Args:
            outputs: logits.

        Returns:
            `[outputs of a datum, *outputs.shape]`.
        """
        logits = self._logits(outputs)
        root = ((F.logsigmoid(logits) + F.logsigmoid(-logits)) / 2).exp()
        root = tempered(root, self.temperature)
        return diagonal_columns(root).to(outputs.dtype)

    def _logits(self, outputs: Tensor) -> Tensor:
        return tempered(widen(outputs), self.temperature)

    def _labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        fix = "one 0 or 1 for each logit; use Categorical() where the logits are one per class"
        return aligned(targets, tuple(outputs.shape), outputs, fix)
