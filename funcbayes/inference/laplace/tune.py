"""Prior precisions and noise by the marginal likelihood, after training.

Source:
    MacKay (1992), doi:10.1162/neco.1992.4.3.448, section 4, for the updates by the number of
    well-determined parameters γ; departs from it in that the update of a prior precision goes
    half the way in the logarithm, which cannot oscillate.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.trees import TensorTree
from funcbayes.inference.checks import check_state, check_training
from funcbayes.inference.laplace.evidence import log_marginal_likelihood
from funcbayes.inference.laplace.gaussian import decomposed, without_roundings
from funcbayes.inference.laplace.noise import at_noise
from funcbayes.inference.laplace.priors import (
    Prior,
    check_curvature,
    check_number,
    leaf_deviations,
    leaf_precisions,
)
from funcbayes.inference.laplace.state import LaplaceState, Noise
from funcbayes.posteriors.base import check_num_samples

PRIORS = ("scalar", "per_tensor", "per_element")

# Beyond these a prior says all, or nothing, whatever the units of a network's weights.
PRIOR_LIMITS = (1e-10, 1e10)
# Of the noise, in units of the noise at the fit.
NOISE_LIMITS = (1e-6, 1e6)
# The longest step of a logarithm.
_MAX_STEP = 4.0


class TuneResult(NamedTuple):
    """What maximises the marginal likelihood, as `posterior` takes it.

    Attributes:
        prior_precision: shape [] for "scalar"; otherwise a tree like the parameters of scalars
            or of tensors of the leaves' shapes. In float64.
        noise_std: σ, [] or `[D]`; where it was not learnt, what was given.
        temperature: as given.
        log_marginal_likelihood: at these, in nats. Shape [].
        history: the same before each step and after the last.
        converged: whether it is stationary, as far as the limits allow. Shape [].
    """

    prior_precision: Tensor | TensorTree
    noise_std: Any
    temperature: Any
    log_marginal_likelihood: Float[Tensor, ""]
    history: Float[Tensor, " steps"]
    converged: Bool[Tensor, ""]


def tune(
    state: LaplaceState,
    *,
    prior: str = "scalar",
    learn_noise: bool = False,
    prior_precision: Prior = 1.0,
    prior_mean: Prior = 0.0,
    temperature: float | Tensor = 1.0,
    noise_std: float | Tensor | None = None,
    num_steps: int = 500,
    tolerance: float = 1e-3,
) -> TuneResult:
    """Chooses the prior precision, and the noise, by the marginal likelihood.

    There is no such choice of a temperature: the marginal likelihood grows with it without end,
    since a tempered likelihood is not normalised. See `tune_by_validation`.

    Args:
        state: from `fit`; not modified. Factorised once wherever the prior allows.
        prior: "scalar" for one precision for all parameters, "per_tensor", or "per_element"
            (automatic relevance determination, which can overfit as any choice of many).
        learn_noise: whether the noise of a Gaussian likelihood is chosen too, one number, or
            one for each output after a fit with `per_output_noise`.
        prior_precision: where to start, as for `posterior`; one number with "scalar", numbers
            with "per_tensor".
        prior_mean: as for `log_marginal_likelihood`.
        temperature: as for `posterior`; it stays.
        noise_std: as for `posterior`; where to start if it is learnt.
        num_steps: at most this many.
        tolerance: the largest derivative, in nats per unit of a logarithm, that counts as 0.

    Returns:
        Fields that `posterior` takes by the same names, and how it went.

    Raises:
        RuntimeError: inference mode is on.
        TypeError: an option has the wrong type.
        ValueError: `prior` is unknown or does not go with the state's structure, an option is
            not positive, or `learn_noise` with a state that has no noise.

    Warns:
        UserWarning: it did not converge, or a precision or the noise went to a limit.
    """
    check_state(state, LaplaceState, "laplace.fit")
    check_curvature(state.curvature, state.mean)
    check_training(None)
    check_num_samples(num_steps, name="num_steps")
    tolerance = check_number(tolerance, "tolerance")
    problem = Problem(
        state,
        prior=prior,
        learn_noise=learn_noise,
        prior_precision=prior_precision,
        prior_mean=prior_mean,
        temperature=temperature,
        noise_std=noise_std,
    )
    value, gradients = problem.evidence()
    history = [value]
    while problem.slope(gradients) > tolerance and len(history) <= num_steps:
        problem.step(gradients)
        value, gradients = problem.evidence()
        history.append(value)
    converged = problem.slope(gradients) <= tolerance
    if not converged:
        warnings.warn(
            f"the marginal likelihood is not stationary after {num_steps} steps (a derivative is"
            f" {problem.slope(gradients):.2g} nats): raise `num_steps` or `tolerance`, or start"
            " elsewhere by `prior_precision`",
            stacklevel=2,
        )
    ends = problem.at_limits()
    if ends:
        warnings.warn(
            f"{ends} went to a limit: the marginal likelihood has no maximum inside. Does a tensor"
            " not matter to the outputs, or has it stayed at its prior mean?",
            stacklevel=2,
        )
    return TuneResult(
        problem.prior_precision(),
        problem.noise_std(),
        temperature,
        history[-1],
        torch.stack(history),
        torch.tensor(converged, device="cpu"),
    )


class Problem:
    """The marginal likelihood as a function of logarithms, in float64."""

    def __init__(
        self,
        state: LaplaceState,
        *,
        prior: str,
        learn_noise: bool,
        prior_precision: Prior,
        prior_mean: Prior,
        temperature: float | Tensor,
        noise_std: float | Tensor | None,
    ) -> None:
        """Checks the options, and factorises what no step changes.

        Args:
            state: as for `tune`, as are the others.
            prior: one of `PRIORS`.
            learn_noise: whether the noise is a variable.
            prior_precision: where to start.
            prior_mean: stays.
            temperature: stays.
            noise_std: where to start.
        """
        check_prior(prior)
        noise = state.noise
        if learn_noise and not isinstance(noise, Noise):
            raise ValueError(
                "`learn_noise` is True, but the state has no noise that could be changed: only"
                " fits with funcbayes.likelihoods.Gaussian have (with one `noise_std` for all"
                " outputs, or with per_output_noise=True)"
            )
        log_prior = start(prior, prior_precision, state.mean)
        self._given_noise, self._temperature = noise_std, temperature
        # Also the checks of the options, before anything is computed.
        log_marginal_likelihood(
            state,
            prior_precision=tree_of(prior, log_prior, state.mean),
            prior_mean=prior_mean,
            temperature=temperature,
            noise_std=noise_std,
        )
        self.prior = prior
        with torch.no_grad():
            # The curvature has rounded by that of its own dtype.
            eps = max(torch.finfo(leaf.dtype).eps for leaf in trees.leaves(state.curvature))
            wide = trees.tensor_map(lambda t: t.double() if t.is_floating_point() else t, state)
            if not learn_noise:
                curvature, loss = at_noise(wide, noise_std)
                wide = wide._replace(curvature=curvature, loss=loss, noise=())
            curvature = wide.curvature
            if not (isinstance(wide.noise, Noise) and wide.noise.std.dim()):
                once = {"scalar": True, "per_element": False}
                curvature = decomposed(
                    curvature, lambda names: once.get(prior, len(names) == 1), eps=eps
                )
            if eps > torch.finfo(torch.float64).eps:
                curvature = without_roundings(curvature, eps)
            wide = wide._replace(curvature=curvature)
            shifts = trees.leaves(leaf_deviations(prior_mean, wide.mean))
        self._state: LaplaceState = wide
        self._prior_mean = prior_mean
        # The squared distance from the prior mean that each precision is multiplied with.
        match prior:
            case "scalar":
                self._squares = [torch.stack([s.square().sum() for s in shifts]).sum()]
            case "per_tensor":
                self._squares = [s.square().sum() for s in shifts]
            case _:
                self._squares = [s.square() for s in shifts]
        self.log_prior = log_prior
        self.log_noise: Tensor | None = None
        if learn_noise and isinstance(wide.noise, Noise):
            like = wide.noise.std
            std = like if noise_std is None else torch.as_tensor(noise_std, device=like.device)
            self.log_noise = std.detach().to(like).expand(like.shape).log()

    @property
    def variables(self) -> list[Tensor]:
        """The logarithms of the prior precisions, and of the noise at the end if it is learnt."""
        return [*self.log_prior, *([] if self.log_noise is None else [self.log_noise])]

    @variables.setter
    def variables(self, values: list[Tensor]) -> None:
        if self.log_noise is not None:
            *values, self.log_noise = values
        self.log_prior = list(values)

    def evidence(self) -> tuple[Tensor, list[Tensor]]:
        """The log marginal likelihood, and its derivatives to `variables`."""
        with torch.enable_grad():
            variables = [v.detach().requires_grad_() for v in self.variables]
            log_prior, log_noise = variables[: len(self.log_prior)], self.log_noise
            if log_noise is not None:
                log_noise = variables[-1]
            value = log_marginal_likelihood(
                self._state,
                prior_precision=tree_of(self.prior, log_prior, self._state.mean),
                prior_mean=self._prior_mean,
                temperature=self._temperature,
                noise_std=None if log_noise is None else log_noise.exp(),
            )
            return value.detach(), list(torch.autograd.grad(value, variables))

    def step(self, gradients: list[Tensor]) -> None:
        """One update of all variables by MacKay's fixed points."""
        moved = []
        for log_prior, square, g in zip(self.log_prior, self._squares, gradients, strict=False):
            # The derivative to log p₀ is ½ (γ − p₀ |θ − μ₀|²), with γ the well-determined
            # parameters among those of p₀; γ(p₀) falls more slowly than 1/p₀ in the
            # logarithm, so half a step is a contraction by a half.
            fitted = log_prior.exp() * square
            tiny = torch.finfo(fitted.dtype).tiny
            determined = (2 * g + fitted).clamp(min=tiny)
            change = 0.5 * (determined.log() - fitted.clamp(min=tiny).log())
            change = torch.where((g == 0) & (fitted == 0), 0.0, change)
            moved.append((log_prior + change.clamp(-_MAX_STEP, _MAX_STEP)).clamp(*_PRIOR_LOGS))
        if self.log_noise is not None and isinstance(self._state.noise, Noise):
            # σ² ← (squared error + σ² γ) / number of targets: never negative, never too far.
            num = self._state.noise.num_targets
            change = 0.5 * (gradients[-1] / num).clamp(min=math.expm1(-_MAX_STEP)).log1p()
            moved.append(self._limited_noise(self.log_noise + change.clamp(max=_MAX_STEP)))
        self.variables = moved

    def slope(self, gradients: list[Tensor]) -> float:
        """The largest derivative to a variable that its limits let move."""
        worst = 0.0
        for value, (low, high), g in zip(self.variables, self._limits(), gradients, strict=True):
            free = ~(((value <= low) & (g < 0)) | ((value >= high) & (g > 0)))
            slopes = torch.where(free, g.abs(), 0.0)
            if slopes.numel():
                worst = max(worst, float(slopes.max()))
        return worst

    def at_limits(self) -> str:
        """The variables that are at a limit, for a message; of elements only all."""
        names = ["`prior_precision`"]
        if self.prior != "scalar":
            paths = [path for path, _ in trees.leaves_with_names(self._state.mean)]
            names = [f"`prior_precision{path}`" for path in paths]
        found = []
        for name, value, (low, high) in zip(
            [*names, "`noise_std`"], self.variables, self._limits(), strict=False
        ):
            # With one precision an entry, those that do not matter belong at the limit.
            if value.numel() and bool(((value <= low) | (value >= high)).all()):
                found.append(name)
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    def prior_precision(self) -> Tensor | TensorTree:
        """As `posterior` takes it."""
        return tree_of(self.prior, self.log_prior, self._state.mean)

    def noise_std(self) -> Any:
        """As `posterior` takes it."""
        return self._given_noise if self.log_noise is None else self.log_noise.exp()

    def limit(self) -> None:
        """Puts the variables back inside their limits."""
        moved = [value.clamp(*_PRIOR_LOGS) for value in self.log_prior]
        if self.log_noise is not None:
            moved.append(self._limited_noise(self.log_noise))
        self.variables = moved

    def _limits(self) -> list[tuple[Any, Any]]:
        limits: list[tuple[Any, Any]] = [_PRIOR_LOGS] * len(self.log_prior)
        if self.log_noise is not None:
            limits.append(self._noise_logs())
        return limits

    def _noise_logs(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self._state.noise, Noise)
        fitted = self._state.noise.std.log()
        return fitted + math.log(NOISE_LIMITS[0]), fitted + math.log(NOISE_LIMITS[1])

    def _limited_noise(self, log_noise: Tensor) -> Tensor:
        low, high = self._noise_logs()
        return log_noise.clamp(low, high)


_PRIOR_LOGS = (math.log(PRIOR_LIMITS[0]), math.log(PRIOR_LIMITS[1]))


def check_prior(prior: Any) -> None:
    """Refuses an unknown kind of prior.

    Raises:
        ValueError: it is none of `PRIORS`.
    """
    if prior not in PRIORS:
        known = ", ".join(f'"{choice}"' for choice in PRIORS)
        raise ValueError(f"`prior` is {prior!r}, expected one of {known}")


def start(prior: str, prior_precision: Prior, mean: TensorTree) -> list[Tensor]:
    """The logarithms of precisions, one a variable, in float64.

    Raises:
        ValueError: a tensor of precisions came where there is one number for all of them.
    """
    paths, leaves = zip(*trees.leaves_with_names(mean), strict=True)
    values = trees.leaves(leaf_precisions(prior_precision, mean))
    values = [
        value.detach().double().to(leaf.device) for value, leaf in zip(values, leaves, strict=True)
    ]
    if prior == "per_element":
        return [value.expand(leaf.shape).log() for value, leaf in zip(values, leaves, strict=True)]
    for path, value in zip(paths, values, strict=True):
        if value.dim():
            raise ValueError(
                f"`prior_precision{path}` has shape {tuple(value.shape)}, expected a number to"
                f' start from with prior="{prior}": one for each entry is prior="per_element"'
            )
    if prior == "per_tensor":
        return [value.log() for value in values]
    if not all(float(value) == float(values[0]) for value in values):
        raise ValueError(
            "`prior_precision` has several values, expected one number to start from with"
            ' prior="scalar": one for each tensor goes with prior="per_tensor"'
        )
    return [values[0].log()]


def tree_of(prior: str, log_prior: list[Tensor], mean: TensorTree) -> Tensor | TensorTree:
    """The precisions as `posterior` takes them."""
    precisions = [value.exp() for value in log_prior]
    return precisions[0] if prior == "scalar" else trees.unflatten(precisions, mean)
