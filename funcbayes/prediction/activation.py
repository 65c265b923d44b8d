"""Local reparametrisation: what a layer gives is drawn, in place of its weights.

Where every entry of W and b is an independent normal, a W^T + b is normal as well, with mean
a W̄^T + b̄ and variance a² (σ_W²)^T + σ_b². So a network whose weights are uncertain is a network
with the mean weights, and with standard normal noise behind each of its linear maps. That one
is an ordinary `Model` whose parameters are the noise: `reparametrised` makes it.

Source:
    Kingma, Salimans and Welling (2015), arXiv:1506.02557, section 2.2; Molchanov, Ashukha and
    Vetrov (2017), arXiv:1701.05369, equation 17, for convolutions.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from funcbayes.core import trees
from funcbayes.core.data import batch_size
from funcbayes.core.model import Model
from funcbayes.core.random import Coupled, Key
from funcbayes.core.trees import TensorTree
from funcbayes.curvature import contractions
from funcbayes.posteriors import BlockNormal, Diagonal, Draws, LowRank
from funcbayes.posteriors.base import noise_rows
from funcbayes.posteriors.diagonal import shift_scale
from funcbayes.posteriors.factors import DiagonalFactor
from funcbayes.prediction import affine, planner


class Noise(NamedTuple):
    """N(0, I) over the noise of a reparametrised network, in the place of a posterior.

    Attributes:
        outputs: one leaf a use of parameters, like what the use gives; the values mean nothing.
        mean: means of the parameters that are drawn themselves.
        std: their standard deviations.
    """

    outputs: list[Tensor]
    mean: list[Tensor]
    std: list[Tensor]

    @property
    def draw_size(self) -> int:
        """Numbers that one sample takes in a draw's buffer."""
        return trees.num_elements((self.outputs, self.mean))

    def draw(self, key: Key | Coupled, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Posterior.draw` has it."""
        like = (self.outputs, self.mean)
        rows = noise_rows(like, key, start, stop, self.draw_size, out)
        outputs, z = trees.unravel(rows, like, batch_dims=1)
        drawn = shift_scale(self.mean, self.std, z, in_place=out is not None)
        return Draws((outputs, drawn), None, None)


def reparametrised(model: Model, posterior: Any, x: Any, *, approximate: bool) -> tuple[Model, Any]:
    """The model as a function of the noise behind its uncertain linear maps, and that noise.

    Args:
        model: the network.
        posterior: independent normals over its parameters.
        x: the inputs that it is for.
        approximate: whether a weight that acts at several positions of a datum, or in several
            places, may be drawn anew at each. Parameters that do not act by a linear map are
            then drawn themselves, once a sample, which is exact.

    Returns:
        A model with the outputs of `model`, and a posterior over its parameters. Those are
        the two themselves where `model` uses no uncertain parameter.

    Raises:
        ValueError: the parameters are not independent normals; the network draws from torch's
            global generator; without `approximate`, the predictive of a datum would not be
            exact.
    """
    std = trees.leaves(_std(posterior))
    mean = [leaf.detach() for leaf in trees.leaves(posterior.mean)]  # each an object of its own
    plan_key = "activation", planner.plan_key(posterior, x)
    plan = model._scratch.plans.get(plan_key)
    if plan is None:
        plan = _discover(model, mean, x)
        model._scratch.remember(model._scratch.plans, plan_key, plan)
    if plan.inexact is not None and not approximate:
        raise ValueError(plan.inexact)
    if not plan.outputs and not plan.drawn:
        return model, posterior

    local = [i for i in range(len(mean)) if i not in plan.drawn]
    variances = {i: _wide(std[i].detach().to(mean[i].dtype)).square() for i in local}
    noise = Noise(list(plan.outputs), [mean[i] for i in plan.drawn], [std[i] for i in plan.drawn])
    # The moments of the first use are those of all samples, if nothing was drawn before it.
    shared: dict[int, tuple[Tensor, Tensor]] | None = None if plan.drawn else {}

    def apply(params: tuple[list[Tensor], list[Tensor]], inputs: Any) -> Any:
        outputs, drawn = params
        leaves = list(mean)
        for i, leaf in zip(plan.drawn, drawn, strict=True):
            leaves[i] = leaf
        sampler = _Sampler({id(leaves[i]): i for i in local}, variances, outputs, shared)
        with sampler:
            result = model.apply(trees.unflatten(leaves, model.params), inputs)
        sampler.check_all_used()
        return result

    noisy = Model(apply, (noise.outputs, noise.mean))
    # Not the recordings: those are of another function.
    noisy._scratch.plans = model._scratch.plans
    noisy._scratch.buffers = model._scratch.buffers
    return noisy, noise


def _std(posterior: Any) -> TensorTree:
    """The standard deviations of independent normals.

    Raises:
        ValueError: the posterior is something else.
    """
    if isinstance(posterior, Diagonal) or (isinstance(posterior, LowRank) and not posterior.rank):
        return posterior.std
    if isinstance(posterior, BlockNormal) and all(
        isinstance(factor, DiagonalFactor) for factor in posterior.factors.values()
    ):
        return trees.tree_map(torch.sqrt, posterior.variance)
    raise ValueError(
        f"`posterior` is a {type(posterior).__name__}, but noise='activation' draws each"
        " parameter's part on its own, so it takes independent normals, such as Diagonal (of"
        " funcbayes.vi, of Laplace's diagonal structure, of SWAG with max_rank=0): use"
        " noise='weight'"
    )


def _wide(x: Tensor) -> Tensor:
    # The square of a standard deviation of 1e-4 is 0 in float16.
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Sampler(affine.Uses):
    """Draws the output of every use.

    Args:
        numbers: of the parameters' means, by identity.
        variances: by number.
        noise: standard normal, one tensor a use, in the order of the calls.
        shared: where the moments of the first use are kept for other samples; None: nowhere.
    """

    def __init__(
        self,
        numbers: dict[int, int],
        variances: dict[int, Tensor],
        noise: Sequence[Tensor],
        shared: dict[int, tuple[Tensor, Tensor]] | None,
    ) -> None:
        super().__init__(numbers)
        self.variances = variances
        self.noise = noise
        self.shared = shared
        self.done = 0

    def answer(self, call: affine.Call) -> Tensor:
        if self.done == len(self.noise):
            _refuse_other_uses()
        noise = self.noise[self.done]
        mean, std = self._moments(call)
        self.done += 1
        if mean.shape != noise.shape:
            _refuse_other_uses()
        return torch.addcmul(mean, std, noise).to(mean.dtype)

    def _moments(self, call: affine.Call) -> tuple[Tensor, Tensor]:
        if self.shared is None or self.done:
            return call.output(), self._std(call)
        if 0 not in self.shared:
            moments = call.output(), self._std(call)
            if trees.in_transform(moments):
                return moments
            self.shared[0] = moments
        return self.shared[0]

    def _std(self, call: affine.Call) -> Tensor:
        """Standard deviation of the output, of a shape that broadcasts to it."""
        weight, bias = (None if i is None else self.variances[i] for i in (call.weight, call.bias))
        if weight is None or isinstance(call.rule, contractions.Added):
            variance = weight if bias is None else bias
            assert variance is not None  # a call without either is not answered
            if isinstance(call.rule, contractions.Conv):
                variance = variance.view(-1, *(1,) * call.rule.dims)
            return variance.sqrt()
        square = call.arguments["input"].to(weight.dtype).square()
        device = weight.device.type
        # In the range of half precision, small variances would be 0.
        with torch.autocast(device, enabled=False):
            variance = call.output(input=square, weight=weight, bias=bias)
        if isinstance(call.rule, contractions.Conv):
            # Fast convolutions subtract, and can round a variance of 0 to less.
            variance = variance.clamp_min(0)
        return variance.sqrt()

    def check_all_used(self) -> None:
        """Refuses a pass that made fewer calls than the plan has."""
        if self.done != len(self.noise):
            _refuse_other_uses()


def _refuse_other_uses() -> NoReturn:
    raise ValueError(
        "the network uses its parameters in another way than it did for inputs of the same"
        " shapes: noise='activation' needs one order of calls for all values, so use"
        " noise='weight'"
    )


# -- Plan ----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What becomes of each parameter.

    Attributes:
        outputs: like what each use gives, in the order of the calls.
        drawn: numbers of the leaves that are drawn themselves.
        inexact: why the predictive of a datum is not exact, for an error; None: it is.
    """

    outputs: tuple[Tensor, ...]
    drawn: tuple[int, ...]
    inexact: str | None


def _discover(model: Model, mean: Sequence[Tensor], x: Any) -> Plan:
    """Sees what the forward pass does with each parameter.

    A leaf that the outputs depend on in any other way than by an affine call is drawn itself.
    """
    num = batch_size(x)
    recorder, drawn = affine.record(model, mean, x)
    times = Counter(i for call, _ in recorder.calls for i in (call.weight, call.bias))
    shared: dict[int, str] = {}
    for call, output in recorder.calls:
        rows = output.numel() // max(1, _features(call))
        batched = output.shape[:1] == (num,) or output.shape[:2] == (1, num)
        once = rows == 1 or (rows == num and batched)
        for i in (call.weight, call.bias):
            if i is None or (once and times[i] == 1):
                continue
            if isinstance(call.rule, contractions.Added):
                # Drawing what is added costs less than drawing the sum, and is exact.
                recorder.others.setdefault(i, call.rule.name)
                drawn.add(i)
            elif times[i] > 1:
                shared.setdefault(i, f"is used {times[i]} times in one forward pass")
            else:
                what = "rows" if not isinstance(call.rule, contractions.Conv) else "positions"
                shared.setdefault(i, f"meets {rows} {what} in {call.rule.name} for {num} inputs")
    kept = [
        output for call, output in recorder.calls if not {call.weight, call.bias} <= drawn | {None}
    ]
    return Plan(tuple(kept), tuple(sorted(drawn)), _inexact(model, recorder, drawn, shared))


def _features(call: affine.Call) -> int:
    """Numbers that the use gives for one row, or at one position."""
    weight: Tensor = call.arguments["weight"]
    if isinstance(call.rule, contractions.Added):
        return weight.numel()
    return weight.shape[1] if call.rule.transposed else weight.shape[0]


def _inexact(
    model: Model, recorder: affine.Recorder, drawn: set[int], shared: dict[int, str]
) -> str | None:
    names = trees.names(model.params)
    for i, name in enumerate(names):
        if i in drawn:
            used = recorder.others.get(i, "a function that cannot be seen")
            return (
                f"parameter '{name}' is used by {used}, and not by a linear map of one row for"
                " each input, so noise='activation' cannot draw what it gives: pass"
                " approximate=True, which draws this parameter itself, or noise='weight'"
            )
        if i in shared:
            return (
                f"parameter '{name}' {shared[i]}, so what it gives is not independent, and"
                " noise='activation' would not be exact: pass approximate=True, which draws each"
                " place on its own, or noise='weight'"
            )
    return None
