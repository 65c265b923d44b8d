"""Variational inference as classes: a linear layer and a network of such layers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from funcbayes.core import random, trees
from funcbayes.core.model import Model, Scratch
from funcbayes.core.random import KeyLike
from funcbayes.inference import vi
from funcbayes.modules import common
from funcbayes.modules.base import SamplingMethod
from funcbayes.posteriors import Diagonal


class GaussianLinear(nn.Module):
    """A linear layer with independent Gaussian weights, for variational inference.

    The standard deviations are softplus(rho). The posterior starts as wide as the prior,
    N(0, prior_std²), with means drawn from it.

    Args:
        in_features: inputs.
        out_features: outputs.
        prior_std: standard deviation of the prior.

    Attributes:
        weight_mu: means of the weights, `[out, in]`.
        weight_rho: `[out, in]`; std = softplus(rho).
        bias_mu: means of the biases, `[out]`.
        bias_rho: `[out]`.

    Raises:
        ValueError: an argument is not positive.

    Source:
        Blundell et al. (2015), arXiv:1505.05424.
    """

    def __init__(self, in_features: int, out_features: int, prior_std: float = 1.0) -> None:
        super().__init__()
        self.in_features = common.positive_int(in_features, "in_features")
        self.out_features = common.positive_int(out_features, "out_features")
        self.prior_std = common.positive(prior_std, "prior_std")
        # softplus⁻¹ in the form that overflows for no prior_std: log(eˢ − 1) = s + log(1 − e⁻ˢ).
        rho = prior_std + math.log(-math.expm1(-prior_std))
        self.weight_mu = nn.Parameter(torch.randn(out_features, in_features) * prior_std)
        self.weight_rho = nn.Parameter(torch.full((out_features, in_features), rho))
        self.bias_mu = nn.Parameter(torch.zeros(out_features))
        self.bias_rho = nn.Parameter(torch.full((out_features,), rho))

    def forward(
        self, x: Float[Tensor, "*batch inputs"], *, key: KeyLike | None = None
    ) -> Float[Tensor, "*batch outputs"]:
        """Draws weight and bias once, and applies them.

        Args:
            x: `[..., in_features]`.
            key: what they are drawn from. None: torch's global generator.

        Returns:
            `[..., out_features]`, differentiable in the parameters.
        """
        if key is None:
            noise = torch.randn_like(self.weight_mu), torch.randn_like(self.bias_mu)
        else:
            like = {"dtype": self.weight_mu.dtype, "device": self.weight_mu.device}
            weight_key, bias_key = random.split(key)
            noise = (
                random.normal(weight_key, self.weight_mu.shape, **like),
                random.normal(bias_key, self.bias_mu.shape, **like),
            )
        weight = torch.addcmul(self.weight_mu, F.softplus(self.weight_rho), noise[0])
        bias = torch.addcmul(self.bias_mu, F.softplus(self.bias_rho), noise[1])
        return F.linear(x, weight, bias)

    def kl_divergence(self) -> Float[Tensor, ""]:
        """KL divergence from the posterior to the prior, in nats; differentiable."""
        return vi.kl_divergence(
            self._state(), prior_std=common.positive(self.prior_std, "prior_std")
        )

    def _state(self) -> vi.ViState:
        return vi.ViState(
            {"weight": self.weight_mu, "bias": self.bias_mu},
            {"weight": self.weight_rho, "bias": self.bias_rho},
        )

    def extra_repr(self) -> str:
        """Sizes and prior, for printing."""
        return f"{self.in_features}, {self.out_features}, prior_std={self.prior_std}"


class VariationalBayesNN(SamplingMethod):
    """A ReLU network of `GaussianLinear` layers, trained by variational inference.

    `variational_loss` is per datum, as is that of `funcbayes.vi`: the average negative log
    likelihood of the batch plus KL / (number of data). By the published contract the number of
    data is that of the batch; then each batch counts the whole KL term, and with B batches an
    epoch the prior counts B times too much. `num_data` is the size of the data set.

    Args:
        in_features: inputs.
        hidden_sizes: widths of the hidden layers; none for a linear model.
        out_features: outputs.
        prior_std: standard deviation of the prior of every weight.
        num_samples: draws for a prediction.

    Attributes:
        layers: the `GaussianLinear` layers, an `nn.ModuleList`.

    Raises:
        TypeError: `hidden_sizes` is a number.
        ValueError: a size, `prior_std` or `num_samples` is not positive.

    Source:
        Blundell et al. (2015), arXiv:1505.05424.

    Examples:
        >>> import torch, funcbayes as fb
        >>> net = fb.VariationalBayesNN(4, [8], 3)
        >>> x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.long)
        >>> net.variational_loss(x, y, num_data=500).backward()
        >>> mean, variance = net.predict(x)
    """

    def __init__(
        self,
        in_features: int,
        hidden_sizes: Sequence[int],
        out_features: int,
        prior_std: float = 1.0,
        num_samples: int = 20,
    ) -> None:
        super().__init__()
        self.prior_std = common.positive(prior_std, "prior_std")
        self.num_samples = common.positive_int(num_samples, "num_samples")
        if isinstance(hidden_sizes, int):
            raise TypeError(
                f"`hidden_sizes` is {hidden_sizes}, expected a list of widths: for one hidden layer"
                f" write [{hidden_sizes}]"
            )
        sizes = [in_features, *hidden_sizes, out_features]
        self.layers = nn.ModuleList(
            GaussianLinear(n_in, n_out, prior_std) for n_in, n_out in pairwise(sizes)
        )
        # Plans and memory, from one prediction to the next.
        self._scratch = Scratch()

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """One draw of the network, from torch's global generator.

        Args:
            x: `[batch, in_features]`.

        Returns:
            `[batch, out_features]`, differentiable.
        """
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x

    def kl_divergence(self) -> Float[Tensor, ""]:
        """KL divergence from the posterior to the prior, in nats, over all layers."""
        return torch.stack([layer.kl_divergence() for layer in self._layers()]).sum()

    def variational_loss(
        self,
        x: Tensor,
        y: Tensor,
        num_samples: int = 10,
        kl_weight: float = 1.0,
        *,
        num_data: int | None = None,
        likelihood: Any = "classification",
        key: KeyLike | None = None,
    ) -> Float[Tensor, ""]:
        """Negative evidence lower bound of a batch, in nats per datum.

        Args:
            x: inputs `[batch, in_features]`.
            y: targets: class labels, or real numbers like the outputs.
            num_samples: draws to average over; all in one batched pass.
            kl_weight: factor on the KL divergence.
            num_data: what the KL divergence is divided by: the size of the data set. None:
                `len(x)`, as published.
            likelihood: "classification", "regression" (a Gaussian with unit variance, constants
                included), or one of `funcbayes.likelihoods`, whose parameters may be learnt.
            key: what the weights are drawn from. None: a key drawn from torch's global
                generator.

        Returns:
            A scalar to differentiate.

        Raises:
            ValueError: an argument is out of range, or targets do not fit the outputs.
        """
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"`kl_weight` is {kl_weight}, expected a finite number of at least 0")
        model, state = self._functional()
        num_data = common.positive_int(len(x) if num_data is None else num_data, "num_data")
        loss, _ = vi.negative_elbo(
            state,
            model,
            (x, y),
            key=common.key_or_draw(key),
            likelihood=common.resolve_likelihood(likelihood),
            num_data=num_data,
            num_samples=common.positive_int(num_samples, "num_samples"),
            kl_weight=0.0,
        )
        # The layers' own KL: each may have a prior of its own.
        return loss + kl_weight / num_data * self.kl_divergence()

    def _posterior(self) -> tuple[Model, Diagonal]:
        model, state = self._functional()
        return model, vi.posterior(state)

    def _layers(self) -> list[GaussianLinear]:
        return list(self.layers)  # pyright: ignore[reportReturnType]

    def _functional(self) -> tuple[Model, vi.ViState]:
        states = [layer._state() for layer in self._layers()]
        state = vi.ViState([s.mean for s in states], [s.rho for s in states])
        model = Model(apply=_relu_network, params=trees.tensor_map(Tensor.detach, state.mean))
        model._scratch = self._scratch
        return model, state


def _relu_network(params: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    for i, layer in enumerate(params):
        x = F.linear(F.relu(x) if i else x, layer["weight"], layer["bias"])
    return x
