"""Samples of Kronecker-factored weights that are never formed.

Such a sample is W = W̄ + Q_o (S ⊙ Z) Q_iᵀ, and to form it takes o·i·(o + i) multiplications, more
than a forward pass on many data. But a Wᵀ = a W̄ᵀ + ((a Q_i)(S ⊙ Z)ᵀ) Q_oᵀ: on the rows of a small
batch this is much less. So a network whose linear maps have such weights is a network of the same
noise with independent weights, S ⊙ Z, between two fixed rotations. That one is an ordinary
`Model`, with an ordinary posterior: `rotated` makes both. Samples are those of the posterior
itself, to rounding.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.model import Model, Scratch
from funcbayes.core.trees import TensorTree
from funcbayes.curvature import contractions
from funcbayes.posteriors import BlockNormal
from funcbayes.posteriors.factors import DiagonalFactor, KroneckerFactor
from funcbayes.prediction import affine, planner

# Names of the constants that a rotated weight brings, before its number.
_MEAN, _OUTPUTS, _INPUTS = "mean of rotated ", "output basis of rotated ", "input basis of rotated "


class ChangedUsesError(RuntimeError):
    """The network does not use its parameters as it did when it was looked at."""

    def __init__(self) -> None:
        super().__init__("the network does not use its parameters as it did for the same shapes")


class Plan(NamedTuple):
    """Which weights are rotated.

    Attributes:
        times: by the number of the leaf, how often it is used in a pass.
        scratch: of the rotated model.
    """

    times: dict[int, int]
    scratch: Scratch


def rotated(model: Model, posterior: Any, x: Any) -> tuple[Model, Any]:
    """The model and the posterior, as they are sampled with the fewest operations.

    Args:
        model: the network.
        posterior: of its parameters.
        x: the inputs that it is for.

    Returns:
        A model with the outputs of `model`, and a posterior over its parameters; the two
        themselves where no weight is better not formed.
    """
    factors = _factors(posterior) if isinstance(posterior, BlockNormal) else {}
    if not factors:
        return model, posterior
    plans, key = model._scratch.plans, _key(posterior, x)
    if key not in plans:
        try:
            times = _times(model, posterior, factors, x)
        except Exception:
            # What fails here comes again where weights are formed, or does not matter there.
            times = {}
        model._scratch.remember(plans, key, Plan(times, Scratch()))
    plan: Plan = plans[key]
    if not plan.times:
        return model, posterior

    means = trees.leaves(posterior.mean)
    names = trees.names(posterior.mean)
    constants = dict(model.constants)
    spread = dict(posterior.factors)
    for i in plan.times:
        factor = factors[i]
        constants[f"{_MEAN}{i}"] = means[i]
        constants[f"{_OUTPUTS}{i}"] = factor.output_basis[0]
        constants[f"{_INPUTS}{i}"] = factor.input_basis[0]
        spread[(names[i],)] = DiagonalFactor(factor.std.flatten())
        means[i] = means[i].new_zeros(()).expand(means[i].shape)
    mean = trees.unflatten(means, posterior.mean)

    def apply(params: TensorTree, inputs: Any, constants: dict[str, Tensor]) -> Any:
        leaves = trees.leaves(params)
        rotation = _Rotation({id(leaves[i]): i for i in plan.times}, constants)
        own = {name: constants[name] for name in model.constants}
        with rotation:
            outputs = model.apply(params, inputs, own)
        if rotation.times != plan.times:
            raise ChangedUsesError
        return outputs

    turned = Model(apply, mean, constants)
    turned._scratch = plan.scratch
    turned._scratch.buffers = model._scratch.buffers
    return turned, BlockNormal(mean, spread)


def forget(model: Model, posterior: Any, x: Any) -> None:
    """Has the weights formed from now on: the network's calls depend on more than shapes."""
    plan = Plan({}, Scratch())
    model._scratch.remember(model._scratch.plans, _key(posterior, x), plan)


def _key(posterior: BlockNormal, x: Any) -> Any:
    kinds = tuple((names, type(factor)) for names, factor in posterior.factors.items())
    return "rotated", planner.plan_key(posterior, x), kinds


def _factors(posterior: BlockNormal) -> dict[int, KroneckerFactor]:
    """Those of matrices, by the number of the leaf."""
    numbers = {name: i for i, name in enumerate(trees.names(posterior.mean))}
    means = trees.leaves(posterior.mean)
    found = {}
    for names, factor in posterior.factors.items():
        if not isinstance(factor, KroneckerFactor) or len(names) != 1 or names[0] not in numbers:
            continue
        mean = means[numbers[names[0]]]
        formats = {(part.dtype, part.device) for part in (mean, *factor)}
        if mean.dim() == 2 and factor.std.shape == (1, *mean.shape) and len(formats) == 1:
            found[numbers[names[0]]] = factor
    return found


def _times(
    model: Model, posterior: BlockNormal, factors: dict[int, KroneckerFactor], x: Any
) -> dict[int, int]:
    """How often each weight is used that is better not formed."""
    means = [leaf.detach() for leaf in trees.leaves(posterior.mean)]
    recorder, drawn = affine.record(model, means, x)
    times: dict[int, int] = {}
    rows: dict[int, int] = {}
    for call, output in recorder.calls:
        if call.bias is not None:
            drawn = drawn | {call.bias}
        if call.weight in factors and isinstance(call.rule, contractions.Linear):
            features = means[call.weight].shape[0]
            times[call.weight] = times.get(call.weight, 0) + 1
            rows[call.weight] = rows.get(call.weight, 0) + output.numel() // features
        elif call.weight is not None:
            drawn = drawn | {call.weight}

    def pays(i: int) -> bool:
        o, inputs = means[i].shape
        formed = o * inputs * (o + inputs) + rows[i] * o * inputs
        return rows[i] * (2 * o * inputs + o**2 + inputs**2) < formed

    return {i: times[i] for i in times if i not in drawn and pays(i)}


class _Rotation(affine.Watching):
    """Turns inputs and outputs of linear maps whose weights are S ⊙ Z.

    Args:
        numbers: of these weights, by identity.
        constants: means and bases.
    """

    def __init__(self, numbers: dict[int, int], constants: dict[str, Tensor]) -> None:
        super().__init__(numbers)
        self.constants = constants
        self.times: dict[int, int] = {}

    def answer(self, call: affine.Call) -> Tensor:
        i = call.weight
        if i is None or call.bias is not None or not isinstance(call.rule, contractions.Linear):
            raise ChangedUsesError
        self.times[i] = self.times.get(i, 0) + 1
        given, bias = call.arguments["input"], call.arguments["bias"]
        # What does not depend on the sample comes first.
        whole = F.linear(given, self.constants[f"{_MEAN}{i}"])
        turned = given @ self.constants[f"{_INPUTS}{i}"]
        drawn = F.linear(turned, call.arguments["weight"])
        output = whole + F.linear(drawn, self.constants[f"{_OUTPUTS}{i}"])
        return output if bias is None else output + bias

    def seen(self, number: int, name: str, *, takes_values: bool) -> None:
        if takes_values:
            raise ChangedUsesError
