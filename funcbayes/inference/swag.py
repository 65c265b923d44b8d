"""SWAG: a Gaussian from the weight iterates of SGD, diagonal or low rank plus diagonal.

Source:
    Maddox, Izmailov, Garipov, Vetrov, Wilson (2019), "A simple baseline for Bayesian
    uncertainty in deep learning", arXiv:1902.02476.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from funcbayes.core import random, trees
from funcbayes.core.batching import map_samples
from funcbayes.core.data import batch_size, batches
from funcbayes.core.model import Model
from funcbayes.core.random import KeyLike
from funcbayes.core.trees import TensorTree, check_finite, check_like, tree_map
from funcbayes.core.uses import Interpreter
from funcbayes.exceptions import NotFittedError
from funcbayes.inference.checks import check_state
from funcbayes.posteriors import Diagonal, Empirical, LowRank
from funcbayes.posteriors.base import check_num_samples


class SwagState(NamedTuple):
    """Moments of the weight iterates θ₁ … θₙ seen so far.

    Attributes:
        count: n. Shape [], int64.
        mean: Σθᵢ/n. Tree like the parameters, in units of θ, in float32 or wider.
        sum_sq_dev: Σ(θᵢ − mean)². Tree like the parameters, in units of θ², in float32 or
            wider; the variance of the paper is `sum_sq_dev / count`.
        deviations: the last `max_rank` deviations θᵢ − meanᵢ from the running mean, the
            newest last. Leaves `[max_rank, *shape]` in the parameters' dtype; zeros stand
            before the first iterate.
    """

    count: Int[Tensor, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: TensorTree
    sum_sq_dev: TensorTree
    deviations: TensorTree


def init(params: TensorTree, *, max_rank: int = 0) -> SwagState:
    """Makes the moments of no iterates.

    Args:
        params: tree with the structure, shapes, dtypes and devices of the iterates to come.
            Its values are not read: `params` itself is not an iterate.
        max_rank: how many deviations to keep for the low-rank part; 0 for the diagonal alone.

    Raises:
        TypeError: a leaf is not a floating-point tensor, or `max_rank` is not an integer.
        ValueError: `params` has no leaves, or `max_rank` is negative or 1.
    """
    if not isinstance(max_rank, int) or isinstance(max_rank, bool):
        raise TypeError(f"`max_rank` is a {type(max_rank).__name__}, expected an integer")
    if max_rank < 0 or max_rank == 1:
        raise ValueError(
            f"`max_rank` is {max_rank}, expected 0 (diagonal) or at least 2: the low-rank part"
            " divides by the number of deviations less one"
        )
    named = trees.leaves_with_names(params)
    if not named:
        raise ValueError("`params` has no leaves, expected a tree of tensors")
    for path, leaf in named:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            came = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"`params{path}` is {came}, expected a floating-point tensor")

    def zeros(leaf: Tensor) -> Tensor:
        # In bfloat16 a mean of more than 256 iterates would stop moving.
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        return torch.zeros_like(leaf.detach(), dtype=dtype, memory_format=torch.contiguous_format)

    return SwagState(
        count=torch.zeros((), dtype=torch.int64, device=named[0][1].device),
        mean=tree_map(zeros, params),
        sum_sq_dev=tree_map(zeros, params),
        deviations=tree_map(lambda p: p.detach().new_zeros(max_rank, *p.shape), params),
    )


def update(state: SwagState, params: TensorTree) -> SwagState:
    """Adds one weight iterate to the moments.

    Works under `torch.func.vmap` (MultiSWAG) and `torch.compile`; there the values of the
    iterate are not checked.

    Args:
        state: moments of n iterates; not modified.
        params: iterate n + 1, with the structure and leaf shapes of `state.mean`.
            Detached: no gradient flows into the moments. Copied: training on does not
            change them.

    Returns:
        Moments of n + 1 iterates.

    Raises:
        ValueError: `params` differs from `state.mean` in structure or in a leaf shape, or
            holds NaN or infinity.

    Source:
        Maddox et al. (2019), section 3.2 and algorithm 1; recurrence of Welford (1962),
        doi:10.1080/00401706.1962.10490022. Departs from the authors' code, which keeps
        Σθᵢ²/n and subtracts mean².
    """
    check_state(state, SwagState, "swag.init")
    check_like(params, state.mean, name="params")
    if not _in_transform(params):
        check_finite(params, name="params")
    count = state.count + 1
    # A number where it can be read without waiting; a tensor in a transform and on other devices.
    fast = count.device.type == "cpu" and not _in_transform((state, params))
    share = 1 / int(count) if fast else None

    def moments(m: Tensor, s: Tensor, d: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Detached: the caller passes live training parameters, and keeping their graph would
        # keep every step's activations alive.
        before = p.detach().to(m.dtype) - m
        # Not E[θ²] − E[θ]²: at mean 1, std 1e-4 in float32 that leaves only rounding noise.
        # θ − new mean is (1 − 1/n)(θ − old mean).
        if share is None:
            part = count.to(m).reciprocal()
            mean, after = torch.addcmul(m, before, part), before * (1 - part)
            return mean, torch.addcmul(s, before, after), push(d, after)
        mean = torch.add(m, before, alpha=share)
        pushed = push(d, before * (1 - share)) if len(d) else d
        # Into memory that is there: fresh pages cost more than the arithmetic.
        return mean, torch.addcmul(s, before, before, value=1 - share, out=before), pushed

    # A queue and not a ring: a position that depends on `count` would be a data-dependent
    # index, and the copy is there anyway since `state` must not change.
    def push(d: Tensor, deviation: Tensor) -> Tensor:
        return torch.cat([d[1:], deviation.to(d.dtype).unsqueeze(0)]) if d.shape[0] else d

    # Leaf by leaf, so that a leaf's differences are in cache when they are squared.
    leaves = (trees.leaves(tree) for tree in (*state[1:], params))
    moved = zip(*(moments(*leaf) for leaf in zip(*leaves, strict=True)), strict=True)
    return SwagState(count, *(trees.unflatten(new, params) for new in moved))


def merge(a: SwagState, b: SwagState) -> SwagState:
    """Joins the moments of two disjoint sets of iterates.

    Count, mean and spread are those of all iterates in one state, to rounding. The
    deviations kept are the newest, those of `b` counted as later than those of `a`; each
    stays relative to the running mean of the state that it comes from.

    Args:
        a: moments of some iterates.
        b: moments of other iterates of the same parameters, with the same `max_rank`.

    Raises:
        ValueError: the states differ in structure, in a leaf shape or in `max_rank`.

    Source:
        Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for
        computing sample variances", equation 2.1.
    """
    check_state(a, SwagState, "swag.init", name="a")
    check_state(b, SwagState, "swag.init", name="b")
    check_like(b.mean, a.mean, name="b.mean")
    check_like(b.deviations, a.deviations, name="b.deviations")
    count = a.count + b.count

    def share(like: Tensor) -> Tensor:
        # Of b; 0 where both are empty. Not int / int: that would be float32 for any leaf.
        of_b, of_all = (n.to(like.device, like.dtype) for n in (b.count, count.clamp(min=1)))
        return of_b / of_all

    def join_mean(x: Tensor, y: Tensor) -> Tensor:
        return x + (y - x) * share(x)

    def join_sq_dev(s: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return s + t + (y - x).square() * (a.count.to(x.device, x.dtype) * share(x))

    def newest(d: Tensor, e: Tensor) -> Tensor:
        rank = d.shape[0]
        if rank == 0:
            return d
        # From the back: the rows of b that are filled, then those of a.
        back = torch.arange(rank - 1, -1, -1, device=d.device)
        filled = b.count.to(d.device).clamp(max=rank)
        row = torch.where(back < filled, 2 * rank - 1 - back, rank - 1 - (back - filled))
        return torch.cat([d, e])[row]

    return SwagState(
        count=count,
        mean=tree_map(join_mean, a.mean, b.mean),
        sum_sq_dev=tree_map(join_sq_dev, a.sum_sq_dev, b.sum_sq_dev, a.mean, b.mean),
        deviations=tree_map(newest, a.deviations, b.deviations),
    )


def posterior(
    state: SwagState, *, scale: float | None = None, var_clamp: float = 1e-30
) -> Diagonal | LowRank:
    """Makes the Gaussian of the moments.

    A draw is θ = mean + √scale (√max(var, var_clamp) ⊙ z₁ + D z₂ / √(K − 1)), with K the
    number of deviations kept, D their matrix and var = sum_sq_dev / count. Up to one
    iterate there is no low-rank part.

    Args:
        state: moments of at least one iterate. A stack of states goes through
            `torch.func.vmap(posterior)`.
        scale: factor on the covariance. None: ½ with deviations, the paper's; 1 without
            (`max_rank=0`). 0 leaves the mean.
        var_clamp: least variance of an entry, in units of θ², before scaling.

    Returns:
        `Diagonal` without deviations, otherwise `LowRank`; leaves in the parameters' dtype.

    Raises:
        NotFittedError: no iterate was added yet.
        ValueError: `scale` is negative, `var_clamp` is not positive, or `state` is a stack.

    Source:
        Maddox et al. (2019), equation 1 and its text; the clamp is that of the authors' code.
    """
    check_state(state, SwagState, "swag.init")
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"`scale` is {scale}, expected a finite number of at least 0, or None")
    if not 0 < var_clamp < math.inf:
        raise ValueError(f"`var_clamp` is {var_clamp}, expected a finite positive number")
    if state.count.dim():
        raise ValueError(
            f"`state.count` has shape {tuple(state.count.shape)}, expected (): for a stack of"
            " states use torch.func.vmap(posterior)"
        )
    if not _in_transform(state.count) and int(state.count) == 0:
        raise NotFittedError(
            "`state` has seen no iterate, expected at least one: call swag.update first"
        )
    rank = trees.leaves(state.deviations)[0].shape[0]
    root_scale = math.sqrt((0.5 if rank else 1.0) if scale is None else scale)

    # Once a device, not once a leaf.
    devices = {leaf.device for leaf in trees.leaves(state.mean)}
    counts = {device: state.count.to(device) for device in devices}

    def deviation(s: Tensor, d: Tensor) -> Tensor:
        variance = s / counts[s.device]
        return (root_scale * variance.clamp(min=var_clamp).sqrt()).to(d.dtype)

    def column(d: Tensor, m: Tensor) -> Tensor:
        kept = counts[d.device].to(m.dtype).clamp(max=rank)
        # One iterate deviates from its own mean by zero, so any divisor will do.
        return (d.to(m.dtype) * (root_scale * (kept - 1).clamp(min=1).rsqrt())).to(d.dtype)

    mean = tree_map(lambda m, d: m.to(d.dtype), state.mean, state.deviations)
    std = tree_map(deviation, state.sum_sq_dev, state.deviations)
    if rank == 0:
        return Diagonal(mean, std)
    return LowRank(mean, std, tree_map(column, state.deviations, state.mean))


@torch.no_grad()
def reestimate_batch_norm(
    model: Model, posterior: Any, data: Any, *, key: KeyLike, num_samples: int
) -> Empirical:
    """Draws parameters and gives each draw the batch-norm statistics that belong to it.

    The running statistics in `model` are those of the parameters that training ended
    with; at another draw the activations are shifted and scaled against them. One pass
    over the data serves all draws. Dropout is inactive in it, and so is everything else
    that training mode switches on, except batch norm.

    Args:
        model: the model. Not modified.
        posterior: what to draw from, with `draw(key, start, stop)`.
        data: iterable of `(inputs, targets)` pairs, such as a `DataLoader`, or one such
            pair. The targets are not read.
        key: draw i depends on `(key, i)` alone.
        num_samples: how many draws to take.

    Returns:
        `Empirical` with the draws as stacked parameters, and as stacked constants the
        running mean and variance of each batch-norm layer, `[num_samples, channels]`: the
        average of the batches' means and (unbiased) variances, each batch weighted by its
        number of rows. A model without batch-norm statistics needs none: its draws come
        back with no constants, and one batch of `data` is read to find out.

    Raises:
        TypeError: `posterior` does not draw parameters.
        ValueError: `num_samples` is not positive, `data` yields nothing, a batch has one
            value per channel, or a statistic is not finite.

    Source:
        Maddox et al. (2019), appendix of the experiments: batch-norm statistics are
        re-estimated for each draw. The weights are those of `bn_update` in the authors'
        code; for batches of one size this is also `torch.optim.swa_utils.update_bn`. Both
        leave dropout on, here it is off.
    """
    draws = posterior.draw(random.as_key(key), 0, check_num_samples(num_samples))
    if draws.params is None:
        raise TypeError(
            f"`posterior` is a {type(posterior).__name__}, which draws no parameters; expected"
            " one over parameters, such as Diagonal or LowRank"
        )
    constants = dict(draws.constants or {})
    statistics: dict[str, Tensor] = {}
    rows = 0
    for inputs, _ in batches(data):

        def batch_statistics(
            params: TensorTree, own: dict[str, Tensor], inputs: Any = inputs
        ) -> dict[str, Tensor]:
            return _batch_statistics(model, params, own, inputs)

        new = map_samples(batch_statistics, draws.params, constants)
        if not new:
            return Empirical(draws.params, constants)
        rows += (size := batch_size(inputs))
        for name, value in new.items():
            old = statistics.setdefault(name, torch.zeros_like(value))
            statistics[name] = old + (value - old) * (size / rows)
    check_finite(statistics, name="statistics")
    buffers = {name: value.to(model.constants[name].dtype) for name, value in statistics.items()}
    return Empirical(draws.params, {**constants, **buffers})


def _batch_statistics(
    model: Model, params: TensorTree, constants: dict[str, Tensor], inputs: Any
) -> dict[str, Tensor]:
    """Mean and variance of the batch at every batch norm of one forward pass, by buffer name.

    The pass runs in evaluation mode and only the batch norms with running statistics in
    `model.constants` are switched to those of the batch, so nothing else trains. A layer
    that is called several times gives the average over its calls.
    """
    constants = {**model.constants, **constants}
    # By identity, and beside the name the tensor itself: an id is free again after its death.
    known = {id(buffer): (name, buffer) for name, buffer in constants.items()}
    found: dict[str, list[Tensor]] = {}

    def clone(x: Tensor, **kwargs: Any) -> Tensor:
        # A model evaluates on copies of its buffers: their names go along.
        copy = x.clone(**kwargs)
        if id(x) in known:
            known[id(copy)] = (known[id(x)][0], copy)
        return copy

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,  # noqa: FBT001, FBT002 (the signature is torch's)
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        running = (running_mean, running_var)
        if training or running_mean is None or any(id(buffer) not in known for buffer in running):
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        names = [known[id(buffer)][0] for buffer in running]
        channels = input.shape[1]
        if input.numel() == channels:
            raise ValueError(
                f"a batch of `data` has one value per channel at '{names[0]}' (input shape"
                f" {tuple(input.shape)}), expected several to take a variance over: use larger"
                " batches, or drop_last=True"
            )
        # Made from the input, so that vmap lets the update in place through; momentum 1
        # leaves exactly the statistics of the batch.
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        mean, var = (input.new_zeros(channels, dtype=dtype) for _ in names)
        out = F.batch_norm(input, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
        for name, value in zip(names, (mean, var), strict=True):
            found.setdefault(name, []).append(value)
        return out

    with Interpreter({F.batch_norm: batch_norm, Tensor.clone: clone}):
        model.apply(params, inputs, constants)
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def _in_transform(tree: TensorTree) -> bool:
    """Whether values cannot be read: under `torch.compile`, vmap or grad."""
    return torch.compiler.is_compiling() or trees.in_transform(tree)
