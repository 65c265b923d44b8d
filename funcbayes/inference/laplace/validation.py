"""Prior precision and temperature by how well held-out data are predicted."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcbayes.core.trees import TensorTree
from funcbayes.inference.checks import check_state, check_training
from funcbayes.inference.laplace.gaussian import decomposed, posterior
from funcbayes.inference.laplace.noise import at_noise
from funcbayes.inference.laplace.priors import (
    Prior,
    check_curvature,
    check_number,
    check_temperature,
)
from funcbayes.inference.laplace.state import LaplaceState
from funcbayes.inference.laplace.tune import check_prior, start, tree_of
from funcbayes.posteriors.base import check_num_samples

METHODS = ("grid", "gradient")
DEFAULT_GRID = tuple(10.0 ** (i / 2) for i in range(-8, 9))


class ValidationResult(NamedTuple):
    """What predicts the held-out data best, as `posterior` takes it.

    Attributes:
        prior_precision: shape [], or a tree like the parameters of scalars or of tensors of
            the leaves' shapes.
        noise_std: as given.
        temperature: as given, or learnt. Shape [].
        nll: what `nll` gave at these. Shape [].
        history: what it gave for each entry of the grid, or at each step.
    """

    prior_precision: Tensor | TensorTree
    noise_std: Any
    temperature: Any
    nll: Float[Tensor, ""]
    history: Float[Tensor, " steps"]


def tune_by_validation(
    state: LaplaceState,
    nll: Callable[[Any], Any],
    *,
    method: str = "grid",
    prior_precisions: Sequence[float] | Tensor | None = None,
    prior: str = "scalar",
    learn_temperature: bool = False,
    prior_precision: Prior = 1.0,
    temperature: float | Tensor = 1.0,
    noise_std: float | Tensor | None = None,
    num_steps: int = 100,
    learning_rate: float = 0.1,
) -> ValidationResult:
    """Chooses the prior precision by the negative log likelihood of data held out.

    ```python
    def nll(posterior):
        pred = fb.predict(model, posterior, x, key=0, num_samples=30, likelihood=likelihood)
        ...  # how bad `pred` is for the targets, in nats


    tuned = fb.laplace.tune_by_validation(state, nll)
    posterior = fb.laplace.posterior(state, prior_precision=tuned.prior_precision)
    ```

    Args:
        state: from `fit`; not modified.
        nll: gives a number or a 0-d tensor, lower is better, for a posterior. With one key for
            all calls, or the choice is between random numbers. For "gradient" differentiable
            in the posterior.
        method: "grid" tries one precision for all parameters after the other; "gradient"
            descends in the logarithms by Adam and keeps the best.
        prior_precisions: the grid. None: 10⁻⁴ to 10⁴, two a decade. Only with "grid".
        prior: "scalar", "per_tensor" or "per_element" with "gradient"; "scalar" with "grid".
        learn_temperature: whether the temperature is chosen too; only with "gradient".
        prior_precision: where "gradient" starts.
        temperature: as for `posterior`; where "gradient" starts if it is learnt.
        noise_std: as for `posterior`; it stays, since `nll` has a likelihood of its own.
        num_steps: of "gradient".
        learning_rate: of "gradient", in units of the logarithm.

    Returns:
        Fields that `posterior` takes by the same names, and how it went.

    Raises:
        RuntimeError: "gradient" in inference mode.
        TypeError: an option has the wrong type, or `nll` gives something else than a number.
        ValueError: an option is unknown, not positive or does not go with `method`, no value
            of `nll` is finite, or it is not differentiable.

    Warns:
        UserWarning: the best of the grid is at one of its ends, or some of its values gave no
            finite `nll`.
    """
    check_state(state, LaplaceState, "laplace.fit")
    check_curvature(state.curvature, state.mean)
    check_prior(prior)
    if not callable(nll):
        raise TypeError(f"`nll` is a {type(nll).__name__}, expected a function of a posterior")
    if method not in METHODS:
        known = ", ".join(f'"{choice}"' for choice in METHODS)
        raise ValueError(f"`method` is {method!r}, expected one of {known}")
    if method == "grid" and (prior != "scalar" or learn_temperature):
        option = f"`prior` is {prior!r}" if prior != "scalar" else "`learn_temperature` is True"
        raise ValueError(
            f'{option}, which a grid of one precision for all does not have: use method="gradient"'
        )
    if method == "gradient" and prior_precisions is not None:
        raise ValueError(
            '`prior_precisions` is a grid, expected None with method="gradient": give the start by'
            " `prior_precision`"
        )
    check_temperature(temperature)
    # Neither changes between candidates. Dense blocks stay: their Cholesky factors are cheaper
    # than eigenvectors, and samples then are those of the user's posterior.
    with torch.no_grad():
        curvature, loss = at_noise(state, noise_std)
        fixed = state._replace(
            curvature=decomposed(curvature, lambda names: False), loss=loss, noise=()
        )
    if method == "grid":
        best, temperature, value, history = _grid(fixed, nll, prior_precisions, temperature)
    else:
        check_training(None)
        check_num_samples(num_steps, name="num_steps")
        best, temperature, value, history = _descend(
            fixed,
            nll,
            prior,
            start(prior, prior_precision, state.mean),
            temperature,
            learn_temperature=learn_temperature,
            num_steps=num_steps,
            learning_rate=check_number(learning_rate, "learning_rate"),
        )
    return ValidationResult(best, noise_std, temperature, value, history)


def _grid(
    state: LaplaceState, nll: Callable[[Any], Any], grid: Any, temperature: Any
) -> tuple[Tensor, Any, Tensor, Tensor]:
    if grid is None:
        grid = DEFAULT_GRID
    if not isinstance(grid, Tensor | Sequence) or isinstance(grid, str):
        raise TypeError(
            f"`prior_precisions` is a {type(grid).__name__}, expected a list of numbers, or None"
        )
    entries = grid.flatten().tolist() if isinstance(grid, Tensor) else grid
    grid = sorted(check_number(p, "prior_precisions") for p in entries)
    if not grid:
        raise ValueError("`prior_precisions` is empty, expected at least one number")
    with torch.no_grad():
        values = torch.stack(
            [
                _value(nll(posterior(state, prior_precision=p, temperature=temperature))).detach()
                for p in grid
            ]
        )
    finite = values.isfinite()
    if not bool(finite.any()):
        raise ValueError(
            f"`nll` is not finite for any prior precision from {grid[0]:g} to {grid[-1]:g},"
            " expected a finite number: is a probability 0, or do the predictions overflow?"
        )
    best = int(torch.where(finite, values, math.inf).argmin())
    if not bool(finite.all()):
        warnings.warn(
            f"`nll` is not finite for {int((~finite).sum())} of {len(grid)} prior precisions, which"
            " are left out",
            stacklevel=3,
        )
    if len(grid) > 1 and best in (0, len(grid) - 1):
        side = "below" if best == 0 else "above"
        warnings.warn(
            f"the best prior precision is {grid[best]:g}, at an end of the grid: better ones may"
            f" lie {side}, so widen `prior_precisions`",
            stacklevel=3,
        )
    found = torch.full((), grid[best], dtype=torch.float64, device=values.device)
    return found, temperature, values[best], values


def _descend(
    state: LaplaceState,
    nll: Callable[[Any], Any],
    prior: str,
    log_prior: list[Tensor],
    temperature: Any,
    *,
    learn_temperature: bool,
    num_steps: int,
    learning_rate: float,
) -> tuple[Any, Any, Tensor, Tensor]:
    leaves = [value.clone().requires_grad_() for value in log_prior]
    log_temperature = None
    if learn_temperature:
        log_temperature = torch.as_tensor(temperature, device=leaves[0].device)
        log_temperature = log_temperature.detach().to(leaves[0]).log()
        leaves.append(log_temperature.requires_grad_())
    optimizer = torch.optim.Adam(leaves, lr=learning_rate)
    best: tuple[Tensor, list[Tensor]] | None = None
    history = []
    for _ in range(num_steps + 1):
        with torch.enable_grad():
            candidate = posterior(
                state,
                prior_precision=tree_of(prior, leaves[: len(log_prior)], state.mean),
                temperature=temperature if log_temperature is None else log_temperature.exp(),
            )
            value = _value(nll(candidate))
            if not value.requires_grad:
                raise ValueError(
                    "`nll` has no gradient, expected a tensor that is differentiable in the"
                    ' posterior: leave out no_grad and item(), or use method="grid"'
                )
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        history.append(value.detach())
        if not bool(value.isfinite()):
            break
        if best is None or bool(value < best[0]):
            best = value.detach(), [leaf.detach().clone() for leaf in leaves]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
    if best is None:
        raise ValueError(
            f"`nll` is {float(history[0])} at the start, expected a finite number: give another"
            " `prior_precision` to start from"
        )
    found, kept = best
    if log_temperature is not None:
        *kept, last = kept
        temperature = last.exp()
    return tree_of(prior, kept, state.mean), temperature, found, torch.stack(history)


def _value(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return value.reshape(())
    if isinstance(value, float | int) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    came = type(value).__name__
    if isinstance(value, Tensor):
        came += f" of shape {tuple(value.shape)} and dtype {value.dtype}"
    raise TypeError(f"`nll` gives a {came}, expected a number: the sum or the mean over the data")
