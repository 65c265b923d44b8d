"""A likelihood of one's own, from its negative log likelihood alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import grad, jacrev, vmap

from funcbayes.core import trees
from funcbayes.core.likelihoods.base import Likelihood, check_likelihood
from funcbayes.core.likelihoods.common import float_outputs, widen
from funcbayes.core.random import KeyLike


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """The likelihood whose -log p(y | outputs) is a function of yours.

    >>> import torch
    >>> def log_cosh(outputs, targets):
    ...     return torch.log(torch.cosh(targets - outputs)).flatten(1).sum(1)
    >>> robust = NegativeLogLikelihood(log_cosh)
    >>> robust.nll(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]))
    tensor([0.0000, 0.4338])

    Training and curvatures need no more than that. The generalised Gauss-Newton matrix is
    Σ JᵀΛJ with Λ the Hessian of `fn` in the outputs of a datum at its own target, by automatic
    differentiation: exact, and as sound as `fn` is convex in the outputs. What a prediction
    reports (`inverse_link`, `aleatoric`, the entropies) and `sample` are taken from another
    likelihood, `predictive`; write a class with the methods of `Likelihood`, or a subclass of
    this one, where none fits.

    Attributes:
        fn: `fn(outputs, targets)` gives the nll of each datum, `[batch]`, in nats, from outputs
            `[batch, *out]` in at least float32 and the targets of the batch, a tensor or a tree
            of tensors. Row n must depend on row n of the outputs and the targets alone, it must
            be twice differentiable in the outputs and work under `torch.func.vmap`, with a batch
            of one too. A constant that it leaves out is missing from evidences, and matters where
            the constant depends on what is tuned.
        predictive: the likelihood that says what the outputs mean, such as Categorical() for a
            cross-entropy with class weights or smoothed labels, or Gaussian(noise_std=0.3) for a
            robust regression; None where nothing needs to be known. A Monte-Carlo Fisher draws
            targets from it, and is the Fisher of `fn` only if it is the same distribution.

    Raises:
        TypeError: `fn` is not callable, or `predictive` is no likelihood.
    """

    fn: Callable[[Any, Any], Tensor]
    predictive: Likelihood | None = None

    hessian_needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not callable(self.fn) or isinstance(self.fn, type):
            raise TypeError(
                f"`fn` is {self.fn!r}, expected a function of outputs and targets that gives the"
                " negative log likelihood of each datum"
            )
        if self.predictive is not None:
            check_likelihood(self.predictive)

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that `fn` gives no `[batch]` numbers for.

        Calls `fn` once, without a graph.

        Args:
            outputs: floating point, `[batch, *out]`.
            targets: a tensor or a tree of tensors, each `[batch, ...]`.

        Raises:
            TypeError: `outputs` is no tensor, `targets` holds none, or `fn` returns none.
            ValueError: a leaf of `targets` has another leading axis than `outputs`, or `fn`
                returns another shape than `[batch]` or no floating dtype.
        """
        outputs = float_outputs(outputs)
        leaves = [leaf for leaf in trees.leaves(targets) if isinstance(leaf, Tensor)]
        if not leaves:
            raise TypeError(
                f"`targets` is of type {type(targets).__name__} and holds no tensor, expected a"
                " tensor or a tree of tensors: turn arrays and lists into tensors by"
                " `torch.as_tensor`"
            )
        for leaf in leaves:
            if leaf.ndim == 0 or len(leaf) != len(outputs):
                raise ValueError(
                    f"`targets` has a tensor of shape {tuple(leaf.shape)}, expected a leading "
                    f"batch axis of {len(outputs)}, as `outputs` of shape {tuple(outputs.shape)} "
                    "has"
                )
        with torch.no_grad():
            self.nll(outputs, targets)

    def nll(self, outputs: Float[Tensor, "batch *out"], targets: Any) -> Float[Tensor, " batch"]:
        """`fn(outputs, targets)`.

        Args:
            outputs: raw outputs of the network; widened to float32 if they are narrower.
            targets: as `fn` takes them.

        Returns:
            `[batch]`, at least float32.

        Raises:
            TypeError: `fn` returns no tensor.
            ValueError: `fn` returns another shape than `[batch]` or no floating dtype.
        """
        values = self.fn(widen(outputs), targets)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"`fn` returned {type(values).__name__}, expected a tensor of shape"
                f" ({len(outputs)},): the negative log likelihood of each datum"
            )
        if values.shape != (len(outputs),):
            if values.ndim == 0:
                fix = 'no mean or sum over the batch (`reduction="none"` of torch\'s losses)'
            elif values.shape[:1] == outputs.shape[:1]:
                fix = "sum over the outputs of a datum, e.g. by `.flatten(1).sum(1)`"
            else:
                fix = "one number a datum, in the order of the batch"
            raise ValueError(
                f"`fn` returned shape {tuple(values.shape)}, expected ({len(outputs)},) for "
                f"`outputs` of shape {tuple(outputs.shape)}: {fix}"
            )
        if not values.is_floating_point():
            raise ValueError(
                f"`fn` returned dtype {values.dtype}, expected floating point: it must be"
                " differentiable in the outputs"
            )
        return widen(values)

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *mean"]:
        """That of `predictive`.

        Args:
            outputs: raw outputs of the network.

        Raises:
            ValueError: `predictive` is None.
        """
        return self._predictive("inverse_link").inverse_link(outputs)

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *mean"]:
        """That of `predictive`.

        Args:
            outputs: raw outputs of the network.

        Raises:
            ValueError: `predictive` is None.
        """
        return self._predictive("aleatoric").aleatoric(outputs)

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *positions"]:
        """That of `predictive`.

        Args:
            outputs: raw outputs of the network.

        Raises:
            ValueError: `predictive` is None.
        """
        return self._predictive("entropy").entropy(outputs)

    def predictive_entropy(
        self, mean: Float[Tensor, "batch *mean"], total_variance: Float[Tensor, "batch *mean"]
    ) -> Float[Tensor, "batch *positions"]:
        """That of `predictive`.

        Args:
            mean: average of `inverse_link(outputs)` over the samples.
            total_variance: variance of the targets under the mixture.

        Raises:
            ValueError: `predictive` is None.
        """
        return self._predictive("predictive_entropy").predictive_entropy(mean, total_variance)

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws targets from `predictive`.

        Args:
            key: a key or an int.
            outputs: raw outputs of the network.

        Raises:
            ValueError: `predictive` is None.
        """
        return self._predictive("sample").sample(key, outputs)

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"], targets: Any = None
    ) -> Float[Tensor, "columns batch *out"]:
        """Columns r_c with Λ = Σ_c r_c r_cᵀ, Λ the Hessian of `fn` at each datum's own target.

        By automatic differentiation and an eigendecomposition of the matrix over all outputs of
        a datum: `[batch, n, n]` numbers for n of them. Eigenvalues that are negative by rounding
        count as 0; a Λ with a clearly negative eigenvalue has no root, and neither has one that
        is not finite: all columns of that datum are NaN, and so is every sum they enter.

        Clearly means below -c (1 + |Λ| + |g|²), g the gradient of `fn` and c 6e-6 in float32,
        2e-12 in float64, more for n above 50 and 8000. The 1 is for losses that saturate, whose
        Λ is the rounding of terms of about that size: scale outputs and targets so that a
        curvature of c is nothing.

        Args:
            outputs: raw outputs of the network.
            targets: as `fn` takes them.

        Returns:
            `[outputs of a datum, *outputs.shape]`.

        Raises:
            ValueError: without `targets`.
        """
        if targets is None:
            raise ValueError(
                "`hessian_root` of NegativeLogLikelihood needs `targets`, at which the Hessian of"
                " `fn` is taken: call funcbayes.likelihoods.hessian_root(likelihood, outputs,"
                " targets), which gives them to the likelihoods that need them"
            )
        out = outputs.shape[1:]
        if len(outputs) == 0:  # vmap takes no empty batch
            return outputs.new_zeros(out.numel(), *outputs.shape)
        flat = widen(outputs).reshape(len(outputs), out.numel())

        def datum(f: Tensor, y: Any) -> Tensor:
            one = trees.tensor_map(lambda leaf: leaf.unsqueeze(0), y)
            return self.nll(f.reshape(1, *out), one).squeeze(0)

        def slope(f: Tensor, y: Any) -> tuple[Tensor, Tensor]:
            g = grad(datum)(f, y)
            return g, g

        # Reverse over reverse: more losses have two backward passes than a forward derivative.
        hessian, gradient = vmap(jacrev(slope, has_aux=True))(flat, targets)
        sound = hessian.isfinite().all(-1).all(-1)
        # eigh may refuse the whole batch for one matrix that is not finite.
        hessian = torch.where(sound[:, None, None], hessian, 0)
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        # Where a loss saturates, Λ and g both cancel (p - p², p - 1) and rounding is all that is
        # left, so that neither gives its size.
        scale = 1 + values.abs().amax(-1) + gradient.square().sum(-1)
        eps = torch.finfo(flat.dtype).eps
        tolerance = max(flat.shape[1], eps**-0.25) * eps * scale
        sound = sound & (values.amin(-1) >= -tolerance)
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]  # [batch, n, columns]
        root = torch.where(sound[:, None, None], root, torch.nan)
        return root.movedim(-1, 0).reshape(flat.shape[1], *outputs.shape).to(outputs.dtype)

    def _predictive(self, name: str) -> Likelihood:
        if self.predictive is None:
            raise ValueError(
                f"`{name}` needs to know what the outputs mean, which `fn` does not say: give"
                " `predictive`, e.g. NegativeLogLikelihood(fn, Gaussian(noise_std=0.5)), or call"
                " predict with likelihood=None"
            )
        return self.predictive
