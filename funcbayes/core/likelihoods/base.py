"""The interface of a likelihood."""

from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

from jaxtyping import Float, Shaped
from torch import Tensor

from funcbayes.core.random import KeyLike

# Classes whose objects are likelihoods: to look at one takes a tenth of a small prediction.
_known: WeakSet[type] = WeakSet()


def check_likelihood(likelihood: object) -> None:
    """Refuses what is no likelihood, such as its name or its class.

    Raises:
        TypeError: it is something else.
    """
    if type(likelihood) in _known:
        return
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        came = likelihood.__name__ if isinstance(likelihood, type) else repr(likelihood)
        raise TypeError(
            f"`likelihood` is {came}, expected a likelihood such as"
            " funcbayes.likelihoods.Categorical()"
        )
    _known.add(type(likelihood))


def hessian_root(likelihood: Any, outputs: Any, targets: Any) -> Any:
    """Columns r_c with Λ = Σ_c r_c r_cᵀ for each datum; what the GGN takes from any likelihood.

    `likelihood.hessian_root(outputs, targets)` where the likelihood has an attribute
    `hessian_needs_targets` that is True, `likelihood.hessian_root(outputs)` otherwise.

    Args:
        likelihood: of this module, or one's own.
        outputs: raw outputs of the network, `[batch, *out]`.
        targets: what `likelihood.nll` takes beside them.

    Returns:
        `[columns, *outputs.shape]`.
    """
    if getattr(likelihood, "hessian_needs_targets", False):
        return likelihood.hessian_root(outputs, targets)
    return likelihood.hessian_root(outputs)


@runtime_checkable
class Likelihood(Protocol):
    """The interface of a likelihood; write one's own with these methods.

    `outputs` is `[batch, *out]`; `*mean` stands for the axes of `inverse_link(outputs)` after the
    batch axis, usually `*out`. Except for `check`, the methods are pure functions that must work
    under `torch.func` transforms, with a batch of one too.

    A likelihood whose `hessian_root` cannot do without the targets says so by a class attribute
    `hessian_needs_targets = True`, and takes them as a second argument (see the function
    `hessian_root`). Where only the negative log likelihood is known, `NegativeLogLikelihood`
    makes a likelihood of it.
    """

    def check(self, outputs: object, targets: object) -> None:
        """Refuses outputs and targets that do not belong together.

        Called by fitting functions at the door. Values are only looked at outside transforms.

        Args:
            outputs: what the model returned.
            targets: what the data loader gave.

        Raises:
            TypeError: not a tensor.
            ValueError: a wrong dtype, shape or value; the message says which and the fix.
        """
        ...

    def nll(
        self, outputs: Float[Tensor, "batch *out"], targets: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " batch"]:
        """-log p(targets | outputs) of each datum, in nats, summed over a datum's positions.

        Args:
            outputs: raw outputs of the network, `[batch, *out]`.
            targets: one target a datum or a position.

        Returns:
            `[batch]`, normalising constants included.

        Raises:
            ValueError: the dtype or shape of `targets` does not fit `outputs`.
        """
        ...

    def inverse_link(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *mean"]:
        """E[y | outputs]: probabilities or the mean, what a prediction reports.

        Args:
            outputs: raw outputs of the network, `[batch, *out]`.
        """
        ...

    def aleatoric(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *mean"]:
        """Var[y | outputs], elementwise, with the shape of `inverse_link(outputs)`.

        Args:
            outputs: raw outputs of the network, `[batch, *out]`.
        """
        ...

    def entropy(self, outputs: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *positions"]:
        """Entropy of p(y | outputs) in nats, one value a distribution.

        Args:
            outputs: raw outputs of the network, `[batch, *out]`.
        """
        ...

    def predictive_entropy(
        self,
        mean: Float[Tensor, "batch *mean"],
        total_variance: Float[Tensor, "batch *mean"],
    ) -> Float[Tensor, "batch *positions"]:
        """Entropy in nats of the mixture of p(y | outputs) over posterior samples.

        Args:
            mean: average over the samples of `inverse_link(outputs)`.
            total_variance: Var[y] under the mixture: the average of `aleatoric(outputs)` plus
                the variance over the samples of `inverse_link(outputs)`.

        Returns:
            With the shape of `entropy(outputs)`.
        """
        ...

    def sample(self, key: KeyLike, outputs: Float[Tensor, "batch *out"]) -> Shaped[Tensor, "..."]:
        """Draws targets from p(y | outputs).

        Args:
            key: a key or an int; the same key and outputs give the same targets. Inside `vmap`
                its `randomness` says whether all lanes use the same random numbers ("same") or
                each its own ("different"); normal numbers are the same in any case.
            outputs: raw outputs of the network, `[batch, *out]`.

        Returns:
            Targets that `check` and `nll` take beside these outputs.
        """
        ...

    def hessian_root(
        self, outputs: Float[Tensor, "batch *out"]
    ) -> Float[Tensor, "columns batch *out"]:
        """Columns r_c with Λ = Σ_c r_c r_cᵀ for each datum, Λ the Hessian of `nll` in outputs.

        The exact middle factor of the generalised Gauss-Newton matrix JᵀΛJ. Where the Hessian
        depends on the targets, Λ is its expectation over them (the Fisher), unless
        `hessian_needs_targets`.

        Args:
            outputs: raw outputs of the network, `[batch, *out]`.

        Returns:
            `[columns, *outputs.shape]` in the dtype of `outputs`. The number of columns is the
            likelihood's choice: a bound on the rank of Λ.
        """
        ...
