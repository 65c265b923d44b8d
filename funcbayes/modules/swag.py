"""SWAG as a class."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funcbayes.core import trees
from funcbayes.core.model import Model
from funcbayes.core.random import KeyLike
from funcbayes.exceptions import NotFittedError
from funcbayes.inference import swag
from funcbayes.modules import common
from funcbayes.modules.base import SamplingMethod, in_format_of, with_fixed
from funcbayes.posteriors import Diagonal, Empirical, LowRank


class SWAG(SamplingMethod):
    """SWAG: a Gaussian from the weights along the path of SGD.

    The moments are Welford's, in float32 at least, so the variance does not drown in rounding.
    The covariance is the diagonal at full scale; with `max_rank` it is the paper's, half of the
    diagonal and half of the low-rank part. Parameters that did not require gradients when they
    were collected are frozen: they have a mean, and no noise. (Where no parameter requires
    gradients, the flags say nothing, and all are drawn.)

    A checkpoint has the published entries `_swag_mean`, `_swag_sq_mean` (the mean of the squares)
    and `_swag_n_models`, and one of our own, `_swag_moments`, with what these lose: the exact
    spread, the deviations of the low-rank part, and which parameters are frozen. Checkpoints
    without it load; there, a variance is the difference of two numbers that were rounded to
    float32, and 0 where that is negative. The published class refuses `_swag_moments` as an
    unexpected key: remove it from a checkpoint for that class.

    Args:
        model: the network; `predict` uses its structure and buffers.
        num_samples: draws for a prediction.
        var_clamp: least variance of a parameter that is drawn.
        max_rank: deviations to keep for the low-rank part; 0 for the diagonal alone.

    Attributes:
        mean: means of the weights, a dict by parameter name.
        sq_mean: means of the squared weights, a dict by parameter name, made from mean and
            variance at each access.
        n_models: how many models were collected.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Maddox et al. (2019), arXiv:1902.02476; Welford (1962),
        doi:10.1080/00401706.1962.10490022.

    Examples:
        >>> import torch, funcbayes as fb
        >>> net = torch.nn.Linear(4, 3)
        >>> method = fb.SWAG(net)
        >>> for _ in range(3):  # in place of epochs of training
        ...     method.collect_model(net)
        >>> mean, variance = method.predict(torch.ones(2, 4))
    """

    _state_keys = ("_swag_mean", "_swag_sq_mean", "_swag_n_models")
    _optional_state_keys = ("_swag_moments",)

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 20,
        var_clamp: float = 1e-6,
        *,
        max_rank: int = 0,
    ) -> None:
        super().__init__()
        common.check_module(model)
        self.model = model
        self.num_samples = common.positive_int(num_samples, "num_samples")
        self.var_clamp = common.positive(var_clamp, "var_clamp")
        self.max_rank = max_rank
        state = swag.init(dict(model.named_parameters()), max_rank=max_rank)
        # The count stays on the CPU, where reading it waits for nothing.
        self._state = state._replace(count=state.count.new_zeros((), device="cpu"))
        # Names of the parameters that are drawn, of all models collected so far.
        self._drawn: frozenset[str] = frozenset()
        self._batch_norm_draws: Empirical | None = None
        if max_rank:
            # The deviations are nowhere else.
            self._state_keys = (*self._state_keys, *self._optional_state_keys)
            self._optional_state_keys = ()

    @property
    def mean(self) -> dict[str, Tensor]:
        """Means of the weights by parameter name; zeros before any collection."""
        return self._state.mean

    @property
    def sq_mean(self) -> dict[str, Tensor]:
        """Means of the squared weights by parameter name; zeros before any collection."""
        count = max(self.n_models, 1)
        return trees.tree_map(
            lambda m, s: m.square() + s / count, self._state.mean, self._state.sum_sq_dev
        )

    @property
    def n_models(self) -> int:
        """How many models were collected."""
        return int(self._state.count)

    def collect_model(self, model: nn.Module) -> None:
        """Adds the weights of a model to the moments.

        Args:
            model: the network in training, or another with the same parameters; not kept.

        Raises:
            ValueError: its parameters have other names or shapes, or are not finite. The
                moments are then what they were before.
        """
        common.check_module(model)
        mean, named = self.mean, dict(model.named_parameters())
        params = {
            name: p.detach().to(mean[name].device) if name in mean else p.detach()
            for name, p in named.items()
        }
        self._state = swag.update(self._state, params)
        self._drawn |= (
            frozenset(name for name, p in named.items() if p.requires_grad)
            or common.trainable(self.model)
            or self._drawn
            or frozenset(params)
        )
        self._batch_norm_draws = None

    @torch.no_grad()
    def sample_parameters(self, *, key: KeyLike | None = None) -> dict[str, Tensor]:
        """Draws the parameters once.

        Args:
            key: what they are drawn from. None: a key drawn from torch's global generator.

        Returns:
            All parameters by name; the frozen ones are their means.

        Raises:
            NotFittedError: no model was collected yet.
        """
        model, posterior = self._gaussian()
        draw = trees.index(posterior.sample(common.key_or_draw(key), 1), 0)
        constants = trees.clone(model.constants)
        return {name: draw[name] if name in draw else constants[name] for name in self.mean}

    def reestimate_batch_norm(
        self, data_loader: Any, *, key: KeyLike | None = None, num_samples: int | None = None
    ) -> None:
        """Draws parameters, and gives each draw the batch-norm statistics that belong to it.

        The statistics in the network belong to the weights that training ended with, so
        predictions of a network with batch norm are poor without this. It takes one pass over
        the data for all draws. `predict` then takes its samples from these draws (in random
        order, again from the start where more are asked for), until a model is collected or a
        checkpoint is loaded; they are not part of `state_dict`.

        Args:
            data_loader: iterable of `(inputs, targets)` pairs; the targets are not read.
            key: what the draws are drawn from. None: a key drawn from torch's global generator.
            num_samples: how many. None: as constructed.

        Raises:
            NotFittedError: no model was collected yet.
            ValueError: the loader yields nothing, or `num_samples` is out of range.
        """
        num_samples = self.num_samples if num_samples is None else num_samples
        num_samples = common.positive_int(num_samples, "num_samples")
        model, posterior = self._gaussian()
        data = common.OnDevice(data_loader, common.device_of(self.model), "data_loader")
        self._batch_norm_draws = swag.reestimate_batch_norm(
            model, posterior, data, key=common.key_or_draw(key), num_samples=num_samples
        )

    def _posterior(self) -> tuple[Model, Any]:
        model, posterior = self._gaussian()
        return model, self._batch_norm_draws or posterior

    def _gaussian(self) -> tuple[Model, Diagonal | LowRank]:
        if self.n_models == 0:
            raise NotFittedError("SWAG has collected no model: call `collect_model` first")
        model = with_fixed(self._network, self.model, self._drawn, self.mean)
        count, *moments = self._state
        drawn = [{name: m[name] for name in model.params} for m in moments]
        posterior = swag.posterior(
            swag.SwagState(count, *drawn), var_clamp=common.positive(self.var_clamp, "var_clamp")
        )
        return model, in_format_of(model.params, posterior)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)
        count, mean, sum_sq_dev, deviations = self._state
        self._state = swag.SwagState(
            count,
            common.apply_wide(fn, mean),
            common.apply_wide(fn, sum_sq_dev),
            trees.tensor_map(fn, deviations),
        )
        if self._batch_norm_draws is not None:
            self._batch_norm_draws = trees.tensor_map(fn, self._batch_norm_draws)
        return self

    def _method_state(self) -> dict[str, Any]:
        own = {
            "sum_sq_dev": self._state.sum_sq_dev,
            "deviations": self._state.deviations,
            "frozen": [name for name in self.mean if self.n_models and name not in self._drawn],
        }
        return {
            "_swag_mean": self.mean,
            "_swag_sq_mean": self.sq_mean,
            "_swag_n_models": self.n_models,
            "_swag_moments": own,
        }

    def _set_method_state(self, values: dict[str, Any]) -> None:
        count = operator.index(values["_swag_n_models"])
        if count < 0:
            raise ValueError(f"`_swag_n_models` is {count}, expected at least 0")
        like = self._state
        state = swag.SwagState(torch.zeros_like(like.count), *trees.zeros_like(like[1:]))
        drawn: frozenset[str] = frozenset()
        if count:
            mean = common.loaded(values["_swag_mean"], like.mean, "_swag_mean")
            squares = common.loaded(values["_swag_sq_mean"], like.mean, "_swag_sq_mean", wide=True)
            own = values.get("_swag_moments")
            if own is None:
                centre = common.loaded(values["_swag_mean"], like.mean, "_swag_mean", wide=True)
                spread = {
                    name: ((squares[name] - centre[name].square()).clamp_min(0) * count).to(m)
                    for name, m in mean.items()
                }
                deviations = trees.zeros_like(like.deviations)
                drawn = common.trainable(self.model) or frozenset(mean)
            else:
                spread = common.loaded(
                    own["sum_sq_dev"], like.sum_sq_dev, "_swag_moments.sum_sq_dev"
                )
                deviations = common.loaded(
                    own["deviations"], like.deviations, "_swag_moments.deviations"
                )
                drawn = frozenset(mean) - frozenset(own["frozen"])
            state = swag.SwagState(torch.full_like(like.count, count), mean, spread, deviations)
        self._state, self._drawn, self._batch_norm_draws = state, drawn, None
