"""The categorical likelihood: one of C classes."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.likelihoods.common import (
    describe,
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
class Categorical:
    """One of C classes a datum or a position, from C logits: softmax(outputs / temperature).

    Outputs `[batch, classes]`, `[batch, positions, classes]`, or with `class_dim=1`
    `[batch, classes, height, width]`. Targets are integer labels in [0, C) with the shape of
    `outputs` without the class axis. Means and variances are those of the one-hot label.

    Two Categoricals are equal if their `class_dim` is, and their `temperature` is the same number
    or the same tensor object.

    Attributes:
        class_dim: the axis of `outputs` that holds the classes; not 0, the batch axis.
        temperature: divides the logits, everywhere; positive and finite: a number, or a tensor
            with no axes. A tensor may require gradients, and is kept, not copied.
            `funcbayes.calibration.fit_temperature` fits one. It is not the temperature of a
            posterior.

    Raises:
        TypeError: `class_dim` is not an int, or `temperature` neither a number nor a tensor.
        ValueError: `class_dim` is 0, or `temperature` has axes, an integer dtype or a value that
            is not positive and finite.
    """

    class_dim: int = -1
    temperature: float | int | Tensor = 1.0

    def __post_init__(self) -> None:
        """Checks the options."""
        if not isinstance(self.class_dim, int) or isinstance(self.class_dim, bool):
            raise TypeError(
                f"`class_dim` is {describe(self.class_dim)}, expected an int: the axis of "
                "`outputs` that holds the classes"
            )
        if self.class_dim == 0:
            raise ValueError(
                "`class_dim` is 0, which is the batch axis of `outputs`, expected another axis: "
                "-1 for [batch, classes], 1 for [batch, classes, height, width]"
            )
        object.__setattr__(self, "temperature", checked_temperature(self.temperature))

    def __eq__(self, other: object) -> bool:
        """Same axis, and same number or same tensor object."""
        if not isinstance(other, Categorical) or type(other) is not type(self):
            return NotImplemented
        same = same_temperature(self.temperature, other.temperature)
        return same and self.class_dim == other.class_dim

    def __hash__(self) -> int:
        """By value for numbers, by identity for a tensor."""
        return hash((Categorical, self.class_dim, self.temperature))

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that do not belong together; see `Likelihood.check`.

        Args:
            outputs: logits, floating point.
            targets: labels, an integer dtype, in [0, C).

        Raises:
            TypeError: not a tensor.
            ValueError: one logit, soft or one-hot labels, non-integer labels, labels outside
                [0, C), a shape that does not fit, or `class_dim` not an axis of `outputs`.
        """
        outputs = float_outputs(outputs)
        targets = self._labels(outputs, tensor(targets, "targets"))
        classes = outputs.shape[self._class_axis(outputs)]
        if known_false(((targets >= 0) & (targets < classes)).all()):
            low, high = int(targets.min()), int(targets.max())
            if low == 1 and high == classes:
                fix = "labels that start at 1 become right by `targets - 1`"
            elif low == -100:
                fix = "-100 looks like an ignore index: leave such data out"
            else:
                fix = "give the network one output for each class, or renumber the labels"
            raise ValueError(
                f"`targets` holds labels from {low} to {high}, expected 0 to {classes - 1} for "
                f"`outputs` with {classes} classes on axis {self.class_dim}: {fix}"
            )

    def nll(
        self, outputs: Float[Tensor, "batch *out"], targets: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " batch"]:
        """-log softmax(outputs / temperature)[targets], summed over a datum's positions.

        Args:
            outputs: logits.
            targets: labels, an integer dtype, the shape of `outputs` without the class axis.

        Returns:
            `[batch]`, in nats.

        Raises:
            ValueError: the dtype or shape of `targets` does not fit `outputs`.
        """
        targets = self._labels(float_outputs(outputs), targets).long()
        log_probs, axis = self._log_probs(outputs), self._class_axis(outputs)
        return -sum_datum(log_probs.gather(axis, targets.unsqueeze(axis)))

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Class probabilities softmax(outputs / temperature).

        Args:
            outputs: logits.
        """
        return self._log_probs(outputs).exp()

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
        """Variance p(1 - p) of each entry of the one-hot label.

        Args:
            outputs: logits.
        """
        log_probs = self._log_probs(outputs)
        # 1 - p as -expm1(log p): exact to rounding also where p is next to 1.
        return log_probs.exp() * -log_probs.expm1()

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *positions"]:
        """Entropy of the label, between 0 and log C.

        Args:
            outputs: logits.

        Returns:
            The shape of `outputs` without the class axis, in nats.
        """
        log_probs = self._log_probs(outputs)
        # A logit of -inf (a masked class) has p log p = 0, not 0 · -inf.
        terms = log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
        return -terms.sum(self._class_axis(outputs))

    def predictive_entropy(
        self, mean: Float[Tensor, "batch *out"], total_variance: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "batch *positions"]:
        """Entropy of the mean probabilities: exact for the mixture.

        Args:
            mean: average of the class probabilities over the samples.
            total_variance: not used; the mean determines it.

        Returns:
            The shape of `mean` without the class axis, in nats.
        """
        del total_variance
        return entr(widen(mean)).sum(self._class_axis(mean))

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws labels by the Gumbel-max trick; see `Likelihood.sample`.

        Args:
            key: a key or an int.
            outputs: logits.

        Returns:
            int64 labels, the shape of `outputs` without the class axis.
        """
        logits = tempered(widen(outputs), self.temperature)
        u = random.uniform(key, logits.shape, dtype=logits.dtype, device=logits.device)
        # u = 0 gives -inf, a class not chosen; its mirror image 1 - u would give +inf.
        gumbel = -(-u.log()).log()
        return (logits + gumbel).argmax(self._class_axis(outputs))

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "columns batch *out"]:
        """Columns r_c with (diag(p) - ppᵀ)/T² = Σ_c r_c r_cᵀ at each position; for any target.

        T is the temperature. diag(p) - ppᵀ has rank C - 1, so its Cholesky factor needs one
        column (one backward pass) less than √p_c (e_c - p), half as many for two classes. In log
        space it does not cancel where p is next to 1.

        Args:
            outputs: logits.

        Returns:
            `[positions · (classes - 1), *outputs.shape]`: a column belongs to one position and is
            zero at all others.

        Source:
            Tanabe and Sagae (1992), An exact Cholesky decomposition and the generalized inverse
            of the variance-covariance matrix of the multinomial distribution, Journal of the
            Royal Statistical Society B 54(1), 211-219: with q_j = Σ_{i≥j} p_i,
            L_jj = √(p_j q_{j+1} / q_j) and L_ij = -p_i √(p_j / (q_j q_{j+1})) for i > j.
        """
        axis = self._class_axis(outputs)
        log_p = self._log_probs(outputs).movedim(axis, -1)
        # Finite also for masked classes; a quarter of the range keeps the sums below finite.
        log_p = log_p.clamp_min(torch.finfo(log_p.dtype).min / 4)
        classes, positions = log_p.shape[-1], log_p.shape[1:-1]
        log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)

        half = (log_p[..., :-1] - log_q[..., :-1] - log_q[..., 1:]) / 2
        not_below = torch.ones(classes, classes - 1, dtype=torch.bool, device=log_p.device).triu()
        # Elsewhere the exponent may overflow: masked before exp, or its gradient is NaN.
        exponents = (log_p[..., :, None] + half[..., None, :]).masked_fill(not_below, -math.inf)
        diagonal = (half + log_q[..., 1:]).exp()
        root = torch.diagonal_scatter(-exponents.exp(), diagonal, 0, -2, -1)
        root = tempered(root.movedim(-1, 0), self.temperature)  # [C - 1, batch, *positions, C]

        batch, num = len(outputs), math.prod(positions)
        root = root.reshape(classes - 1, batch, num, classes)
        if num > 1:
            own = torch.eye(num, dtype=torch.bool, device=log_p.device)[:, None, None, :, None]
            root = torch.where(own, root, 0)  # [num, C - 1, batch, num, C]
        columns = root.reshape(num * (classes - 1), batch, *positions, classes)
        return columns.movedim(-1, axis + 1).to(outputs.dtype)

    def _class_axis(self, outputs: Tensor) -> int:
        """The class axis counted from the front, once it is known to be sound."""
        axis = self.class_dim + outputs.ndim if self.class_dim < 0 else self.class_dim
        if outputs.ndim < 2 or not 0 < axis < outputs.ndim:
            raise ValueError(
                f"`outputs` has shape {tuple(outputs.shape)}, expected [batch, *out] with the "
                f"classes on axis {self.class_dim}, which is not the batch axis: set `class_dim` "
                "to the axis that holds the logits, or use Bernoulli() for one logit a datum"
            )
        if outputs.shape[axis] < 2:
            raise ValueError(
                f"`outputs` has shape {tuple(outputs.shape)}, {outputs.shape[axis]} logit on class "
                f"axis {self.class_dim}, expected at least 2: use Bernoulli() for one logit"
            )
        return axis

    def _log_probs(self, outputs: Tensor) -> Tensor:
        logits = tempered(widen(outputs), self.temperature)
        return F.log_softmax(logits, self._class_axis(outputs))

    def _labels(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`targets`, once dtype and shape are known to be those of labels for `outputs`."""
        axis = self._class_axis(outputs)
        shape, got = tuple(outputs.shape), tuple(targets.shape)
        expected = shape[:axis] + shape[axis + 1 :]
        if got == shape:
            raise ValueError(
                f"`targets` has the shape of `outputs`, {got}, expected labels of shape "
                f"{expected}: soft and one-hot labels are not supported, turn them into labels "
                f"by `targets.argmax({self.class_dim})`"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(
                f"`targets` has dtype {targets.dtype}, expected integer class labels: convert "
                "them by `targets.long()`, or use Gaussian() for regression"
            )
        if got == expected:
            return targets
        if got == (*expected, 1):
            fix = "drop the last axis by `targets.squeeze(-1)`"
        else:
            other = [a for a in range(1, len(shape)) if shape[:a] + shape[a + 1 :] == got]
            fix = "one label a datum and position, is one of the two transposed or cut off?"
            if other:
                fix = f"are the classes on another axis, Categorical(class_dim={other[0]})?"
        raise ValueError(
            f"`targets` has shape {got}, expected {expected} for `outputs` of shape {shape} with "
            f"classes on axis {self.class_dim}: {fix}"
        )
