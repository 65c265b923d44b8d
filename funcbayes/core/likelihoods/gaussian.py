"""Gaussian likelihoods: fixed or learned noise, and noise that the network predicts."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.likelihoods.common import (
    LOG_2PI,
    LOG_2PI_E,
    aligned,
    check_finite_targets,
    check_float_targets,
    describe,
    diagonal_columns,
    fill_like,
    float_outputs,
    known_false,
    normal_entropy,
    sum_datum,
    sum_outputs,
    tensor,
    widen,
)
from funcbayes.core.random import KeyLike


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Targets with normal noise of a known standard deviation about the outputs.

    Outputs `[batch, *out]`, floating-point targets with the same shape; a last axis of length one
    may be missing on either side. The outputs of a datum are independent, and an entropy is that
    of the joint distribution along the last axis: `[batch, D]` and `[batch]` outputs give
    `[batch]`, `[batch, T, D]` gives `[batch, T]`.

    Two Gaussians are equal if their `noise_std` is the same number or the same tensor object.

    Attributes:
        noise_std: σ in the units of the targets, positive and finite: a number for all outputs,
            or a tensor that broadcasts to `*out` (`[D]`: one value for each output). A tensor
            may require gradients, and is kept, not copied.

    Raises:
        TypeError: `noise_std` is neither a number nor a tensor.
        ValueError: `noise_std` is an integer tensor, or not positive and finite.
    """

    noise_std: float | int | Tensor = 1.0

    def __post_init__(self) -> None:
        """Checks the option; the value of a tensor only where it can be known."""
        std = self.noise_std
        if isinstance(std, Tensor):
            if not std.is_floating_point():
                raise ValueError(
                    f"`noise_std` has dtype {std.dtype}, expected floating point: convert it by "
                    "`noise_std.float()`"
                )
            if known_false((std.isfinite() & (std > 0)).all()):
                raise ValueError(
                    f"`noise_std` holds values from {std.min().item():g} to "
                    f"{std.max().item():g}, expected positive and finite standard deviations: "
                    "a learnt one is kept positive as the exponential of a free parameter"
                )
            return
        if isinstance(std, bool) or not isinstance(std, Real):
            raise TypeError(
                f"`noise_std` is {describe(std)}, expected a number or a tensor: turn arrays and "
                "lists into tensors by `torch.as_tensor`"
            )
        if not (math.isfinite(std) and std > 0):
            raise ValueError(
                f"`noise_std` is {std}, expected positive and finite: it is the standard deviation "
                "of the targets about the outputs, in their units"
            )
        object.__setattr__(self, "noise_std", float(std))

    def __eq__(self, other: object) -> bool:
        """Same number or same tensor object."""
        if not isinstance(other, Gaussian):
            return NotImplemented
        mine, theirs = self.noise_std, other.noise_std
        if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
            return mine is theirs
        return mine == theirs

    def __hash__(self) -> int:
        """By value for a number, by identity for a tensor."""
        return hash((Gaussian, self.noise_std))

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that do not belong together; see `Likelihood.check`.

        Args:
            outputs: means, floating point.
            targets: floating point, finite.

        Raises:
            TypeError: not a tensor.
            ValueError: integer or non-finite targets, a shape that does not fit, or a `noise_std`
                that does not broadcast to the outputs of a datum.
        """
        outputs = float_outputs(outputs)
        targets = self._values(outputs, tensor(targets, "targets"))
        self._std(outputs)
        check_finite_targets(targets)

    def nll(
        self, outputs: Float[Tensor, "batch *out"], targets: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " batch"]:
        """½((y - f)/σ)² + log σ + ½ log 2π, summed over a datum's outputs.

        Args:
            outputs: means.
            targets: floating point, the shape of `outputs`.

        Returns:
            `[batch]`, in nats.

        Raises:
            ValueError: the dtype or shape of `targets` or `noise_std` does not fit `outputs`.
        """
        targets = self._values(float_outputs(outputs), targets)
        mean, std = widen(outputs), self._std(outputs)
        z = (targets.to(mean.dtype) - mean) / std
        return sum_datum(z.square() / 2 + (std.log() + LOG_2PI / 2))

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """The means: `outputs` as they are.

        Args:
            outputs: means.
        """
        return widen(outputs)

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """The noise variance σ², with the shape of `outputs`.

        Args:
            outputs: means.
        """
        return fill_like(outputs, self._std(outputs).square())

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *positions"]:
        """½ log 2πeσ², summed over the last axis; the same whatever the means.

        Args:
            outputs: means.

        Returns:
            `[batch, *out[:-1]]`, in nats.
        """
        terms = self._std(outputs).log() + LOG_2PI_E / 2
        return sum_outputs(fill_like(outputs, terms))

    def predictive_entropy(
        self, mean: Float[Tensor, "batch *out"], total_variance: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "batch *positions"]:
        """Entropy of independent normals with the mixture's moments: an upper bound on its own.

        Args:
            mean: not used; an entropy does not depend on it.
            total_variance: variance of the targets under the mixture.

        Returns:
            `[batch, *out[:-1]]`, in nats, summed over the last axis.
        """
        del mean
        return normal_entropy(total_variance)

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws targets with the shape of `outputs`; see `Likelihood.sample`.

        Args:
            key: a key or an int.
            outputs: means.
        """
        mean = widen(outputs)
        z = random.normal(key, mean.shape, dtype=mean.dtype, device=mean.device)
        return mean + self._std(outputs) * z

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "columns batch *out"]:
        """One column 1/σ for each output of a datum; exact for any target.

        Args:
            outputs: means.

        Returns:
            `[outputs of a datum, *outputs.shape]`.
        """
        root = fill_like(outputs, self._std(outputs).reciprocal())
        return diagonal_columns(root).to(outputs.dtype)

    def _std(self, outputs: Tensor) -> Tensor:
        """σ as a tensor that broadcasts to `outputs`, and not along their batch axis."""
        dtype = widen(outputs).dtype
        std = self.noise_std
        if not isinstance(std, Tensor):
            return torch.full((), std, dtype=dtype, device=outputs.device)
        shape, out = tuple(std.shape), tuple(outputs.shape[1:])
        fits = len(shape) <= len(out) and all(
            s in (1, o) for s, o in zip(shape, out[len(out) - len(shape) :], strict=True)
        )
        if not fits:
            raise ValueError(
                f"`noise_std` has shape {shape}, expected one that broadcasts to {out}, the "
                f"outputs of one datum (`outputs` has shape {tuple(outputs.shape)}): give a "
                "number, one value for each output, or use HeteroscedasticGaussian() for noise "
                "that differs between data"
            )
        return std.to(dtype=dtype, device=outputs.device)

    def _values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_float_targets(targets)
        fix = "one value for each output: give the network as many outputs as there are targets"
        return aligned(targets, tuple(outputs.shape), outputs, fix)


@dataclass(frozen=True, kw_only=True)
class HeteroscedasticGaussian:
    """Targets with normal noise whose variance the network predicts too.

    Outputs `[batch, *positions, 2 D]`: on the last axis D means, then D log variances. Targets
    `[batch, *positions, D]`, floating point; an axis D = 1 may be missing. Entropies are those of
    the joint distribution along the last axis, `[batch, *positions]`.
    """

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that do not belong together; see `Likelihood.check`.

        Args:
            outputs: means and log variances, floating point.
            targets: floating point, finite.

        Raises:
            TypeError: not a tensor.
            ValueError: an odd number of outputs, integer or non-finite targets, or a shape that
                does not fit.
        """
        outputs = float_outputs(outputs)
        targets = self._values(outputs, tensor(targets, "targets"))
        check_finite_targets(targets)

    def nll(
        self, outputs: Float[Tensor, "batch *out"], targets: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " batch"]:
        """½(y - m)² exp(-s) + ½ s + ½ log 2π, summed over a datum's targets.

        Args:
            outputs: means m and log variances s.
            targets: floating point, the shape of the means.

        Returns:
            `[batch]`, in nats.

        Raises:
            ValueError: the dtype or shape of `targets` does not fit `outputs`.
        """
        targets = self._values(float_outputs(outputs), targets)
        mean, log_var = self._halves(outputs)
        # Half the exponent, squared last: at s = -100 exp(-s) overflows and 0 · inf is NaN.
        z = (targets.to(mean.dtype) - mean) * (-log_var / 2).exp()
        return sum_datum((z.square() + log_var + LOG_2PI) / 2)

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *mean"]:
        """The means, the first half of the last axis.

        Args:
            outputs: means and log variances.
        """
        return self._halves(outputs)[0]

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *mean"]:
        """The predicted noise variances exp(s), with the shape of the means.

        Args:
            outputs: means and log variances.
        """
        return self._halves(outputs)[1].exp()

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *positions"]:
        """½(s + log 2πe), summed over the last axis.

        Args:
            outputs: means and log variances.

        Returns:
            `[batch, *positions]`, in nats.
        """
        return sum_outputs((self._halves(outputs)[1] + LOG_2PI_E) / 2)

    def predictive_entropy(
        self, mean: Float[Tensor, "batch *mean"], total_variance: Float[Tensor, "batch *mean"]
    ) -> Float[Tensor, "batch *positions"]:
        """Entropy of independent normals with the mixture's moments: an upper bound on its own.

        Args:
            mean: not used; an entropy does not depend on it.
            total_variance: variance of the targets under the mixture.

        Returns:
            `[batch, *positions]`, in nats, summed over the last axis.
        """
        del mean
        return normal_entropy(total_variance)

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws targets with the shape of the means; see `Likelihood.sample`.

        Args:
            key: a key or an int.
            outputs: means and log variances.
        """
        mean, log_var = self._halves(outputs)
        z = random.normal(key, mean.shape, dtype=mean.dtype, device=mean.device)
        return mean + (log_var / 2).exp() * z

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "columns batch *out"]:
        """Root of the Fisher diag(exp(-s), ½): one column for each output of a datum.

        The Hessian itself depends on the targets and is indefinite; this is its expectation over
        targets drawn from p(y | outputs).

        Args:
            outputs: means and log variances.

        Returns:
            `[outputs of a datum, *outputs.shape]`.
        """
        _, log_var = self._halves(outputs)
        root = torch.cat([(-log_var / 2).exp(), torch.full_like(log_var, math.sqrt(0.5))], -1)
        return diagonal_columns(root).to(outputs.dtype)

    def _halves(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances."""
        if outputs.ndim < 2 or outputs.shape[-1] % 2 or outputs.shape[-1] == 0:
            raise ValueError(
                f"`outputs` has shape {tuple(outputs.shape)}, expected [batch, ..., 2 D] with D "
                "means and D log variances on the last axis: give the network two outputs for "
                "each target, or use Gaussian() for means alone"
            )
        mean, log_var = widen(outputs).chunk(2, -1)
        return mean, log_var

    def _values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_float_targets(targets)
        shape = tuple(self._halves(outputs)[0].shape)
        fix = "one value for each pair of outputs, a mean and a log variance"
        return aligned(targets, shape, outputs, fix)
