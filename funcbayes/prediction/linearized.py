"""The linearised predictive: the network's first-order expansion about the posterior's mean.

f(x; θ) ≈ f(x; θ*) + J(x)(θ - θ*) is normal under a normal posterior: mean f(x; θ*), covariance
J Σ Jᵀ. The [batch, outputs, parameters] Jacobian is never held: what each parameter adds to the
covariance is contracted from recorded inputs and output gradients, a few data at a time.

Source:
    Immer, Korzepa and Bauer (2021), arXiv:2008.08400; MacKay (1992),
    doi:10.1162/neco.1992.4.3.448.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcbayes.core import memory, random, trees
from funcbayes.core.batching import is_out_of_memory
from funcbayes.core.data import batch_size
from funcbayes.core.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    check_likelihood,
)
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import KeyLike
from funcbayes.curvature import perturbation
from funcbayes.curvature.accumulate import LeafGradients, leaf_gradients
from funcbayes.curvature.perturbation import Gradients, Plan
from funcbayes.posteriors import BlockNormal, Diagonal, LowRank
from funcbayes.posteriors.base import check_num_samples
from funcbayes.posteriors.factors import DiagonalFactor, KroneckerFactor
from funcbayes.prediction import links
from funcbayes.prediction.predictive import Predictive, RunningMoments, normal_predictive

LINKS = ("probit", "bridge", "bridge_normalized", "monte_carlo")

# Memory of one pass, and of the per-datum gradients formed at a time.
_PASS_BYTES, _SLICE_BYTES = 2**28, 2**26
# Memory of the samples of outputs that are drawn at a time.
_SAMPLE_BYTES = 2**26
# Outputs of several positions are taken together up to so many columns.
_COLUMNS = 64


@dataclass(frozen=True)
class LinearizedPredictive:
    """A normal distribution over the network's outputs.

    `C` is the axis of classes, or the last axis of the outputs; it comes last.

    Attributes:
        mean: f(x; θ*), `[batch, *positions, C]`; for outputs `[batch]`, `[batch, 1]`.
        covariance: of the outputs at each position, `[batch, *positions, C, C]`.
        joint_covariance: over all data and outputs, `[batch, *out, batch, *out]` with `*out`
            the axes of `mean` after the first; None unless it was asked for.
    """

    mean: Tensor
    covariance: Tensor
    joint_covariance: Tensor | None
    _likelihood: Likelihood | None
    _class_axis: int | None

    @property
    def variance(self) -> Tensor:
        """Variances of the outputs, like `mean`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    @property
    def total(self) -> Tensor:
        """For a Gaussian likelihood: variance of a new target, `variance` plus the noise's."""
        if not isinstance(self._likelihood, Gaussian):
            raise ValueError(
                "`total` needs the noise: pass `likelihood=funcbayes.likelihoods.Gaussian(...)`"
            )
        return self.variance + self._likelihood.aleatoric(self.mean)

    def sample(self, key: KeyLike, num_samples: int) -> Tensor:
        """Draws outputs: jointly over data and outputs if `joint_covariance` is there.

        Args:
            key: a key or an int.
            num_samples: how many.

        Returns:
            `[num_samples, *mean.shape]`; differentiable.
        """
        num = check_num_samples(num_samples)
        size = self.mean.numel()
        noise = random.normal_rows(
            random.as_key(key), 0, num, size, dtype=self.mean.dtype, device=self.mean.device
        )
        if self.joint_covariance is not None:
            root = _root(self.joint_covariance.reshape(size, size))
            return self.mean + (noise @ root.mT).view(num, *self.mean.shape)
        noise = noise.view(num, *self.mean.shape)
        return self.mean + (_root(self.covariance) @ noise.unsqueeze(-1)).squeeze(-1)

    def predictive(self, *, key: KeyLike | None = None, num_samples: int = 1000) -> Predictive:
        """What `funcbayes.predict` gives, for the linearised network: moments and entropies of y.

        Exact for a Gaussian likelihood or none; otherwise averages over samples of the outputs.

        Args:
            key: what samples are drawn from, where they are.
            num_samples: how many.

        Returns:
            Moments with the axes of the network's outputs; without samples.

        Raises:
            ValueError: no `key` where samples are drawn.
        """
        likelihood = self._likelihood
        if likelihood is None or isinstance(likelihood, Gaussian):
            mean, variance = self._unmoved(self.mean), self._unmoved(self.variance)
            return normal_predictive(mean, variance, likelihood)
        if key is None:
            raise ValueError("`key` is None, expected a key or an integer seed")
        num, key = check_num_samples(num_samples), random.as_key(key)
        moments = RunningMoments(likelihood, None, keep_samples=False)
        step = max(1, _SAMPLE_BYTES // max(1, self.mean.numel() * self.mean.element_size()))
        for number, start in enumerate(range(0, num, step)):
            samples = self.sample(random.fold_in(key, number), min(step, num - start))
            moments.add(self._unmoved(samples, lead=1))
        return moments.result()

    def _unmoved(self, x: Tensor, *, lead: int = 0) -> Tensor:
        """With the axis of classes where the network has it, after `lead` axes."""
        if self._class_axis is None:
            return x.squeeze(-1)
        return x.movedim(-1, self._class_axis + lead)

    def probabilities(
        self, link: str = "probit", *, key: KeyLike | None = None, num_samples: int = 1000
    ) -> Tensor:
        """E[p(class)] for a Categorical or Bernoulli likelihood.

        Args:
            link: "probit"; "bridge", the Laplace bridge, "bridge_normalized", the same with
                variances rescaled; "monte_carlo", averages over samples of the outputs.
            key: what samples are drawn from; for "monte_carlo".
            num_samples: how many; for "monte_carlo".

        Returns:
            Like `mean`, whose last axis holds the classes.

        Raises:
            ValueError: an unknown link, no `likelihood` of classes, or no `key` for samples.
        """
        likelihood = self._likelihood
        if link not in LINKS:
            raise ValueError(f"`link` is {link!r}, expected one of {LINKS}")
        if not isinstance(likelihood, Categorical | Bernoulli):
            raise ValueError(
                "`probabilities` needs a likelihood of classes: pass"
                " `likelihood=funcbayes.likelihoods.Categorical()` to `linearized`"
            )
        if link == "monte_carlo":
            if key is None:
                raise ValueError("`key` is None, expected a key or an integer seed")
            samples = self.sample(key, num_samples) / likelihood.temperature
            if isinstance(likelihood, Categorical):
                return samples.softmax(-1).mean(0)
            return samples.sigmoid().mean(0)
        mean = self.mean / likelihood.temperature
        covariance = self.covariance / likelihood.temperature**2
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        if isinstance(likelihood, Bernoulli):
            if link != "probit":
                raise ValueError(
                    f"`link` is {link!r}, but labels are binary: use 'probit' or 'monte_carlo'"
                )
            return links.sigmoid_probit(mean, variance)
        if link == "probit":
            return links.probit(mean, variance)
        return links.laplace_bridge(mean, covariance, normalized=link == "bridge_normalized")


def _root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ the covariance; by eigenvalues, since it may have no inverse."""
    root, info = torch.linalg.cholesky_ex(covariance)
    if not bool(info.any()):
        return root
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)


def linearized(
    model: Model,
    posterior: Any,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    joint: bool = False,
    chunk_size: int | None = None,
) -> LinearizedPredictive:
    """The predictive distribution of the network linearised at the posterior's mean.

    Differentiable in the posterior's tensors and, where `x` requires gradients, in `x`.

    Args:
        model: the network.
        posterior: a normal distribution over its parameters: of `funcbayes.laplace.posterior`
            (any structure), `funcbayes.swag.posterior` or `funcbayes.vi.posterior`.
        x: inputs, a pytree of tensors with a leading batch axis.
        likelihood: what the outputs mean; says which axis holds the classes. None: the last.
        joint: whether the covariance over all data is computed too.
        chunk_size: data at a time; None: by memory.

    Returns:
        Mean and covariances of the outputs.

    Raises:
        TypeError: an argument has the wrong type, the posterior is not normal, or the network does
            not return one tensor.
        ValueError: the posterior does not fit the model.
        MemoryError: a covariance does not fit into memory; the message says how large it is.
    """
    run = _Run.start(model, posterior, x, likelihood, chunk_size)
    _check_memory(run, joint=joint)
    means, covariances, kept = [], [], []
    size, step = batch_size(x), run.step
    start = 0
    while start < size:
        part = trees.tensor_map(lambda t, s=start, n=step: t[s : s + n], run.x)
        try:
            mean, covariance, gradients = run.chunk(part, keep=joint)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and step > 1:
                step //= 2
                continue
            raise
        means.append(mean)
        covariances.append(covariance)
        kept.append(gradients)
        start += step
    mean, covariance = torch.cat(means), torch.cat(covariances)
    together = None
    if joint:
        together = run.joint(kept).reshape(*mean.shape, *mean.shape)
    axis = run.class_axis
    return LinearizedPredictive(mean, covariance, together, likelihood, axis)


class _Group(NamedTuple):
    """Leaves with a common factor of the covariance."""

    numbers: tuple[int, ...]
    factor: Any


class _Run(NamedTuple):
    """One call's arguments, prepared."""

    model: Model
    leaves: list[Tensor]
    constants: Any
    plan: Plan
    x: Any
    groups: tuple[_Group, ...]
    low_rank: list[Tensor] | None
    example: Tensor
    class_axis: int | None
    step: int
    live: bool

    @staticmethod
    def start(
        model: Model, posterior: Any, x: Any, likelihood: Likelihood | None, chunk_size: int | None
    ) -> "_Run":
        check_model(model)
        if likelihood is not None:
            check_likelihood(likelihood)
        if chunk_size is not None:
            check_num_samples(chunk_size, name="chunk_size")
        if not isinstance(posterior, Diagonal | LowRank | BlockNormal):
            raise TypeError(
                f"`posterior` is a {type(posterior).__name__}, expected a normal distribution over"
                " the parameters: of laplace.posterior, swag.posterior or vi.posterior"
            )
        trees.check_like(posterior.mean, model.params, name="posterior.mean")
        size = batch_size(x)
        if size == 0:
            raise ValueError("`x` holds no data, expected at least one")
        live = torch.is_grad_enabled() and any(t.requires_grad for t in trees.tensor_leaves(x))
        with perturbation.undisturbed():
            leaves = [perturbation.plain(leaf) for leaf in trees.leaves(posterior.mean)]
            formats = trees.leaves(model.params)
            leaves = [a.to(b.dtype) for a, b in zip(leaves, formats, strict=True)]
            constants = None
            if any(constant.is_inference() for constant in model.constants.values()):
                constants = perturbation.plain(model.constants)
            plain_x = perturbation.plain(x)
            signature = ("curvature", trees.signature(x))
            plan: Plan | None = model._scratch.plans.get(signature)
            if plan is None:
                one = trees.tensor_map(lambda t: t[:1], plain_x)
                plan = perturbation.discover(model, leaves, one, constants)
            example = plan.outputs
            if not isinstance(example, Tensor):
                raise TypeError(
                    f"the network returns a {type(example).__name__}, expected one tensor: wrap it"
                    " to return that tensor"
                )
            axis = _class_axis(example, likelihood)
            num_classes = 1 if axis is None else example.shape[axis]
            if not live:
                # Columns as the real pass has them, for one position.
                plan = perturbation.examine(
                    model, leaves, plan, plain_x, None, constants, _Units(axis, 0, 1)
                )
            model._scratch.remember(model._scratch.plans, signature, plan)
        groups, low_rank = _groups(posterior, trees.names(model.params))
        columns = max(num_classes, min(_COLUMNS, example[0].numel()))
        per_datum = plan.bytes_per_datum + (columns - 1) * plan.bytes_per_column + 1
        step = chunk_size or max(1, _PASS_BYTES // per_datum)
        return _Run(
            model, leaves, constants, plan, x if live else plain_x, groups, low_rank, example,
            axis, min(step, size), live,
        )  # fmt: skip

    @property
    def num_classes(self) -> int:
        return 1 if self.class_axis is None else self.example.shape[self.class_axis]

    @property
    def num_positions(self) -> int:
        return self.example[0].numel() // self.num_classes

    def chunk(self, x: Any, *, keep: bool) -> tuple[Tensor, Tensor, Any]:
        """Mean, covariance and, if they are to be kept, the gradients of some data."""
        classes, positions = self.num_classes, self.num_positions
        at_a_time = positions if keep else max(1, _COLUMNS // classes)
        parts, gradients = [], None
        for first in range(0, positions, at_a_time):
            num = min(at_a_time, positions - first)
            gradients = self.gradients(x, first, num)
            if keep:
                break
            whole = self.kernel(gradients)
            whole = whole.unflatten(2, (num, classes)).unflatten(1, (num, classes))
            parts.append(whole.diagonal(dim1=1, dim2=3).movedim(-1, 1))
        assert gradients is not None
        mean = gradients.values
        if self.class_axis is None:
            mean = mean.unsqueeze(-1)
        else:
            mean = mean.movedim(self.class_axis, -1)
        if keep:
            return mean, self.kernel_by_positions(gradients), gradients
        covariance = torch.cat(parts, 1).view(*mean.shape, classes)
        return mean, covariance, None

    def kernel_by_positions(self, gradients: Gradients) -> Tensor:
        """Covariances at each position from the columns of all positions."""
        classes, positions = self.num_classes, self.num_positions
        whole = self.kernel(gradients)
        whole = whole.unflatten(2, (positions, classes)).unflatten(1, (positions, classes))
        values = gradients.values
        mean = (
            values.unsqueeze(-1) if self.class_axis is None else values.movedim(self.class_axis, -1)
        )
        return whole.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(*mean.shape, classes)

    def gradients(self, x: Any, first: int, num: int) -> Gradients:
        columns = _Units(self.class_axis, first, num)
        arguments = (self.model, self.leaves, self.plan, x, None, self.constants, columns)
        if self.live:
            return perturbation.gradients_by_vmap(*arguments)
        with perturbation.undisturbed():
            if self.plan.layout is not None:
                return perturbation.gradients_by_batch(*arguments)
            try:
                return perturbation.gradients_by_vmap(*arguments)
            except (RuntimeError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                return perturbation.gradients_by_loop(*arguments)

    def leaf(self, gradients: Gradients, number: int) -> LeafGradients:
        leaf = self.leaves[number]
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        return leaf_gradients(self.plan, gradients, number, leaf.shape, dtype)

    def kernel(self, gradients: Gradients) -> Tensor:
        """J Σ Jᵀ for each datum, `[data, columns, columns]`."""
        total: Any = 0
        projected: Any = 0
        for group in self.groups:
            own = [self.leaf(gradients, number) for number in group.numbers]
            if not any(leaf.used for leaf in own):
                continue
            total = total + _kernel(own, group.factor)
            if self.low_rank is not None:
                projected = projected + _along(own[0], self.low_rank[group.numbers[0]])
        if self.low_rank is not None:
            total = total + projected @ projected.mT
        if not isinstance(total, Tensor):
            values = gradients.values
            columns = self.num_classes
            return values.new_zeros(values.shape[0], columns, columns)
        return total

    def joint(self, kept: Sequence[Gradients]) -> Tensor:
        """J Σ Jᵀ over all data, `[data · outputs, data · outputs]`."""
        rows = []
        for i, left in enumerate(kept):
            row = []
            for j, right in enumerate(kept):
                row.append(rows[j][i].mT if j < i else self._pair(left, right))
            rows.append(row)
        return torch.cat([torch.cat(row, 1) for row in rows], 0)

    def _pair(self, left: Gradients, right: Gradients) -> Tensor:
        total: Any = 0
        shifts: list[Any] = [0, 0]
        for group in self.groups:
            sides = []
            for gradients in (left, right):
                own = [self.leaf(gradients, number) for number in group.numbers]
                sides.append(own)
            if not any(leaf.used for leaf in sides[0]):
                continue
            total = total + _cross(sides[0], sides[1], group.factor)
            if self.low_rank is not None:
                for k, own in enumerate(sides):
                    shifts[k] = shifts[k] + _along(own[0], self.low_rank[group.numbers[0]])
        if self.low_rank is not None:
            total = total + shifts[0].flatten(0, 1) @ shifts[1].flatten(0, 1).mT
        return total


class _Units:
    """Columns that pick the outputs of some positions, position by position."""

    def __init__(self, axis: int | None, first: int, num: int) -> None:
        self.axis, self.first, self.num = axis, first, num

    def __call__(self, outputs: Tensor, extra: Any) -> Tensor:
        del extra
        shape = outputs.shape[1:]
        numbers = torch.arange(shape.numel(), device=outputs.device).view(shape)
        numbers = numbers.unsqueeze(-1) if self.axis is None else numbers.movedim(self.axis - 1, -1)
        classes = numbers.shape[-1]
        chosen = numbers.reshape(-1)[self.first * classes : (self.first + self.num) * classes]
        units = torch.nn.functional.one_hot(chosen, shape.numel()).to(outputs.dtype)
        units = units.view(len(chosen), 1, *shape)
        return units + torch.zeros_like(outputs).unsqueeze(0)


def _class_axis(example: Tensor, likelihood: Likelihood | None) -> int | None:
    """The axis of the outputs that comes last in the result; None where there is only the batch."""
    if example.dim() < 2:
        return None
    axis = likelihood.class_dim if isinstance(likelihood, Categorical) else -1
    return axis % example.dim()


def _groups(posterior: Any, names: Sequence[str]) -> tuple[tuple[_Group, ...], list[Tensor] | None]:
    if isinstance(posterior, BlockNormal):
        number = {name: i for i, name in enumerate(names)}
        found = tuple(
            _Group(tuple(number[name] for name in own), factor)
            for own, factor in posterior.factors.items()
        )
        return found, None
    stds = trees.leaves(posterior.std)
    diagonal = tuple(_Group((i,), DiagonalFactor(std.flatten())) for i, std in enumerate(stds))
    factor = trees.leaves(posterior.factor) if isinstance(posterior, LowRank) else None
    return diagonal, factor


def _kernel(own: Sequence[LeafGradients], factor: Any) -> Tensor:
    """What a group adds to each datum's covariance, `[data, columns, columns]`."""
    short = _short(own, factor)
    if short is not None:
        return short
    parts = []
    for rows in _slices(own):
        projected = _projected(own, factor, rows)
        parts.append(projected @ projected.mT)
    return torch.cat(parts)


def _short(own: Sequence[LeafGradients], factor: Any) -> Tensor | None:
    """The same where a weight is used once, at one position: nothing of its size is formed.

    J = g ⊗ a and Σ = diag(std²) in some basis: Σ_oi std² (g_o a_i)(g'_o a_i) is g v g'ᵀ with
    v_o = Σ_i std²_oi a_i².
    """
    leaf = own[0]
    if len(own) > 1 or len(leaf.parts) != 1 or leaf.whole is not None:
        return None
    part = leaf.parts[0]
    rule = part.use.rule
    if not part.is_weight or not rule.is_linear:
        return None
    if rule.transposed or not isinstance(factor, DiagonalFactor | KroneckerFactor):
        return None
    if part.grads[0, 0].numel() != leaf.shape[0]:
        return None  # several positions
    a, g = next(leaf.forms(slice(None)))
    if a.shape[1] != 1 or a.shape[2] != 1:
        return None
    a, g = a[:, 0, 0], g[:, :, 0, 0]
    if isinstance(factor, DiagonalFactor):
        variance = factor.std.square().view(g.shape[-1], a.shape[-1])
    else:
        a, g = a @ factor.input_basis[0].to(a), g @ factor.output_basis[0].to(g)
        variance = factor.std[0].square()
    weights = a.square() @ variance.to(a).T
    return (g * weights.unsqueeze(1)) @ g.mT


def _slices(own: Sequence[LeafGradients]) -> Any:
    leaf = own[0]
    size = sum(part.shape.numel() for part in own)
    return leaf.slices(_SLICE_BYTES, 3 * leaf.columns * size)


def _projected(own: Sequence[LeafGradients], factor: Any, rows: slice) -> Tensor:
    """Rᵀ Jᵀ of some data, `[data, columns, n]`."""
    leaf = own[0]
    rotated = isinstance(factor, KroneckerFactor) and leaf.parts and leaf.whole is None
    if rotated and all(p.use.rule.is_linear and p.is_weight for p in leaf.parts):
        left, right = factor.output_basis, factor.input_basis
        if leaf.transposed:
            left, right = right, left
        total: Any = 0
        for a, g in leaf.forms(rows):
            # Into the eigenbasis first: positions are fewer than entries.
            g = g @ left.to(g)
            total = total + g.mT @ (a @ right.to(a)).unsqueeze(1)
        total = total.mT if leaf.transposed else total
        return (total * factor.std.to(total)).flatten(2)
    return factor.project(_jacobian(own, rows))


def _jacobian(own: Sequence[LeafGradients], rows: slice) -> Tensor:
    """Gradients `[data, columns, n]` of some data, all leaves of a group joined."""
    num = len(range(*rows.indices(own[0].batch)))
    like = next(leaf for leaf in own if leaf.used).of(slice(0, 1))
    parts = [
        leaf.of(rows).flatten(2)
        if leaf.used
        else like.new_zeros(num, like.shape[1], leaf.shape.numel())
        for leaf in own
    ]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _along(leaf: LeafGradients, factor: Tensor) -> Tensor:
    """J Fᵀ, `[data, columns, rank]`, for rows F `[rank, *shape]`."""
    if not leaf.used:
        return factor.new_zeros(leaf.batch, leaf.columns, factor.shape[0])
    flat = factor.reshape(factor.shape[0], leaf.shape.numel())
    parts = [leaf.of(rows).flatten(2) @ flat.to(leaf.dtype).T for rows in _slices([leaf])]
    return torch.cat(parts)


def _cross(left: Sequence[LeafGradients], right: Sequence[LeafGradients], factor: Any) -> Tensor:
    """What a group adds between two sets of data, `[data · columns, data · columns]`."""
    rows = []
    for i in _slices(left):
        a = _projected(left, factor, i).flatten(0, 1)
        row = [a @ _projected(right, factor, j).flatten(0, 1).T for j in _slices(right)]
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0)


def _check_memory(run: _Run, *, joint: bool) -> None:
    size, outputs = batch_size(run.x), run.example[0].numel()
    item = max(4, run.example.element_size())
    needed = item * size * outputs * run.num_classes
    if joint:
        needed += 2 * item * (size * outputs) ** 2
    free = memory.available_bytes(run.example.device)
    if needed > free:
        what = "the joint covariance" if joint else "the covariance"
        raise MemoryError(
            f"{what} of {size} data with {outputs} outputs takes {memory.gigabytes(needed)}, and"
            f" {memory.gigabytes(free)} are free: pass fewer data at a time"
        )
