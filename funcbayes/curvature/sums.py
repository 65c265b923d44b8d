"""Curvature of the loss at the parameters, summed over the data in one pass.

Source:
    Martens (2020), arXiv:1412.1193, for the generalised Gauss-Newton matrix, the Fisher and the
    empirical Fisher; `funcbayes.curvature.accumulate` names those of the structures.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcbayes.core import memory, random, trees
from funcbayes.core.batching import is_out_of_memory
from funcbayes.core.data import batch_size, batches
from funcbayes.core.likelihoods import Gaussian, Likelihood, check_likelihood, hessian_root
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import Key, KeyLike
from funcbayes.curvature import perturbation
from funcbayes.curvature.accumulate import Accumulator, accumulator, eigenbasis, leaf_gradients
from funcbayes.curvature.blocks import (
    Block,
    Curvature,
    DenseBlock,
    DiagonalBlock,
    KroneckerBlock,
    LowRankBlock,
)
from funcbayes.curvature.eigenpairs import num_held, top_eigenpairs
from funcbayes.curvature.layout import Group, Structure, check_structure, groups
from funcbayes.curvature.perturbation import Columns, Gradients, Plan
from funcbayes.curvature.products import (
    CurvatureOperator,
    check_curvature,
    check_reiterable,
    hessian_dense,
    hessian_diagonal,
    listed,
)

logger = logging.getLogger("funcbayes")

CURVATURES = ("ggn", "empirical_fisher", "monte_carlo_fisher", "hessian")
SHARING = ("expand", "reduce")

# Memory that one pass may take for activations and gradients, from which the number of data
# at a time follows. Larger passes are no faster: they leave the cache at every operation.
CHUNK_BYTES = 2**26
# With fewer data than this at a time, the products of a deep network are too small to be fast:
# such a pass may take more memory.
WORTHWHILE_DATA = 32
MOST_CHUNK_BYTES = 2**28

# What a message calls a kind of block.
_BLOCKS = {
    "dense": "dense one",
    "rows": "one for each row",
    "diagonal": "diagonal",
    "kronecker": "Kronecker product",
    "ekfac": "Kronecker product",
    "low_rank": "one of low rank",
}

# A curvature whose smallest eigenvalue is so far below 0, relative to the largest in magnitude,
# is not positive but for rounding.
_INDEFINITE = 1e-4


class CurvatureSums(NamedTuple):
    """Curvature, and what else the same pass gives.

    Attributes:
        curvature: summed over the data.
        loss: Σ -log p(y | f(x)), in nats. Shape [].
        num_data: how many data were seen. Shape [], int64.
        noise: for a Gaussian likelihood whose noise may be changed afterwards, its standard
            deviation, Σ(y - f)² in the same shape, the number of targets for each of its
            entries, and the power p with which the curvature goes as (1/noise)^p; else None.
    """

    curvature: Curvature
    loss: Tensor
    num_data: Tensor
    noise: tuple[Tensor, Tensor, Tensor, Tensor] | None


def ggn(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    structure: Structure = "diagonal",
    sharing: str = "expand",
    rank: int | None = None,
    num_samples: int | None = None,
    key: KeyLike | None = None,
    chunk_size: int | None = None,
) -> Curvature:
    """The generalised Gauss-Newton matrix Σ JᵀΛJ over the data.

    Args:
        model: the network, at whose parameters it is taken.
        data: an iterable of `(inputs, targets)` batches, or one such pair. Each datum is
            given to the model as a batch of one, or as if it were one.
        likelihood: gives Λ, the Hessian of -log p(y | outputs) in the outputs.
        structure: what is kept of it. "diagonal"; "kronecker": B ⊗ A for each weight matrix or
            convolution, exact blocks for norms, biases and embeddings; "ekfac": the same
            eigenbasis with the exact diagonal in it (two passes over the data); "dense": all of
            it; "block_diagonal": a dense block a tensor; "low_rank": the `rank` largest
            eigenvalues, matrix-free (several passes). Or a mapping of patterns on parameter
            names to these, `{"head.*": "dense", "*": "diagonal"}`: the first that fits counts, and
            the parameters of a "dense" or "low_rank" pattern share one block.
        sharing: Kronecker factors of a weight that is used at many positions of a datum
            (convolutions, sequences): "expand" takes the positions as data, "reduce" averages
            the inputs and sums the gradients over them first.
        rank: how many eigenvalues "low_rank" keeps.
        num_samples: None: Λ exactly. Otherwise its Monte Carlo estimate from so many random
            combinations of its root's columns for each datum: unbiased, and cheaper with many
            outputs.
        key: what these are drawn from.
        chunk_size: data at a time; None: as many as fit `CHUNK_BYTES` by estimate. Memory
            and speed depend on it, the result does not (to rounding).

    Returns:
        The curvature, in at least float32; a sum over the data.

    Raises:
        TypeError: `data` does not yield pairs, or an argument has the wrong type.
        ValueError: `data` yields nothing, targets do not fit the outputs, the loss, a weight or
            a gradient is NaN or infinite, an option is unknown or missing, or `data` is an
            iterator and the structure needs several passes.
        MemoryError: a dense block does not fit into memory; the message says how large it is
            and what would fit.
    """
    return curvature_sums(
        model,
        data,
        likelihood,
        curvature="ggn",
        structure=structure,
        sharing=sharing,
        rank=rank,
        num_samples=num_samples,
        key=key,
        chunk_size=chunk_size,
    ).curvature


def empirical_fisher(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    structure: Structure = "diagonal",
    sharing: str = "expand",
    rank: int | None = None,
    chunk_size: int | None = None,
) -> Curvature:
    """The empirical Fisher Σ g gᵀ, g the gradient of one datum's -log p(y | f(x)).

    Args:
        model: as for `ggn`.
        data: as for `ggn`.
        likelihood: gives the loss.
        structure: as for `ggn`.
        sharing: as for `ggn`.
        rank: as for `ggn`.
        chunk_size: as for `ggn`.

    Raises:
        TypeError: as for `ggn`.
        ValueError: as for `ggn`.
        MemoryError: as for `ggn`.
    """
    return curvature_sums(
        model,
        data,
        likelihood,
        curvature="empirical_fisher",
        structure=structure,
        sharing=sharing,
        rank=rank,
        chunk_size=chunk_size,
    ).curvature


def monte_carlo_fisher(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    key: KeyLike,
    num_samples: int = 1,
    structure: Structure = "diagonal",
    sharing: str = "expand",
    chunk_size: int | None = None,
) -> Curvature:
    """The Fisher Σ E[g gᵀ] with targets drawn from the model, `num_samples` for each datum.

    Args:
        model: as for `ggn`.
        data: as for `ggn`; the targets are not looked at but for the loss.
        likelihood: draws targets, and gives the loss.
        key: what they are drawn from. The result depends on the batches of `data`, not on
            `chunk_size`.
        num_samples: targets for each datum.
        structure: as for `ggn`; not "low_rank".
        sharing: as for `ggn`.
        chunk_size: as for `ggn`.

    Raises:
        TypeError: as for `ggn`.
        ValueError: as for `ggn`.
        MemoryError: as for `ggn`.
    """
    return curvature_sums(
        model,
        data,
        likelihood,
        curvature="monte_carlo_fisher",
        structure=structure,
        sharing=sharing,
        num_samples=num_samples,
        key=key,
        chunk_size=chunk_size,
    ).curvature


def hessian(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    structure: Structure = "diagonal",
    rank: int | None = None,
    chunk_size: int | None = None,
) -> Curvature:
    """The Hessian of Σ -log p(y | f(x)), which need not be positive.

    It takes as many products with vectors as there are parameters ("low_rank": as it takes to
    find the eigenvalues), and the model is given whole batches.

    Args:
        model: as for `ggn`.
        data: as for `ggn`, to be gone through for each block: not an iterator.
        likelihood: gives the loss.
        structure: as for `ggn`; not "kronecker" or "ekfac", which are built from gradients.
        rank: as for `ggn`.
        chunk_size: as for `ggn`.

    Raises:
        TypeError: as for `ggn`.
        ValueError: as for `ggn`.
        MemoryError: as for `ggn`.
    """
    return curvature_sums(
        model,
        data,
        likelihood,
        curvature="hessian",
        structure=structure,
        rank=rank,
        chunk_size=chunk_size,
    ).curvature


class _Problem(NamedTuple):
    """What stays the same in a fit."""

    model: Model
    leaves: list[Tensor]
    constants: Any
    likelihood: Likelihood
    kind: str
    num_samples: int | None
    key: Key | None
    chunk_size: int | None
    dtype: torch.dtype


def curvature_sums(
    model: Model,
    data: Any,
    likelihood: Likelihood,
    *,
    curvature: str,
    structure: Structure = "diagonal",
    sharing: str = "expand",
    rank: int | None = None,
    num_samples: int | None = None,
    key: KeyLike | None = None,
    per_output_noise: bool = False,
    chunk_size: int | None = None,
) -> CurvatureSums:
    """The curvature of that name together with the loss and the number of data.

    Args:
        model: as for `ggn`.
        data: as for `ggn`.
        likelihood: as for `ggn`.
        curvature: "ggn", "empirical_fisher", "monte_carlo_fisher" or "hessian".
        structure: as for `ggn`.
        sharing: as for `ggn`.
        rank: as for `ggn`.
        num_samples: as for `ggn` and `monte_carlo_fisher`.
        key: as for `ggn` and `monte_carlo_fisher`.
        per_output_noise: whether each of D outputs under a Gaussian likelihood gets a curvature
            of its own: all tensors of the curvature then have a leading axis D.
        chunk_size: as for `ggn`.

    Raises:
        TypeError: as for `ggn`.
        ValueError: as for `ggn`.
        MemoryError: as for `ggn`.
    """
    names = _check_options(
        model, likelihood, curvature, structure, sharing, rank, num_samples, key, chunk_size
    )
    _check_per_output(per_output_noise, likelihood, curvature, structure)
    if _passes(structure, curvature):
        check_reiterable(data)
    if not trees.is_finite((model.params, model.constants)):
        trees.check_finite(model.params, name="params")
        trees.check_finite(model.constants, name="constants")
    with perturbation.undisturbed():
        leaves = [perturbation.plain(leaf) for leaf in trees.leaves(model.params)]
        constants = None
        if any(constant.is_inference() for constant in model.constants.values()):
            constants = perturbation.plain(model.constants)
    dtype = torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    problem = _Problem(
        model,
        leaves,
        constants,
        likelihood,
        curvature,
        1 if curvature == "monte_carlo_fisher" and num_samples is None else num_samples,
        None if key is None else random.as_key(key),
        chunk_size,
        dtype,
    )
    sums = _Sums(problem, names, structure, sharing, rank, per_output=per_output_noise)
    sums.go_through(data)
    if any(group.kind == "ekfac" for group in sums.groups) and curvature != "hessian":
        sums = sums.corrected()
        sums.go_through(data)
    blocks = sums.blocks()
    for group in sums.groups:
        if group.kind == "low_rank":
            width = trees.tensor_leaves(sums.example)[0][0].numel()
            outputs = sums.num_outputs if per_output_noise else None
            blocks[group.names] = _low_rank(problem, group, data, rank or 1, outputs, width)
        elif curvature == "hessian":
            blocks[group.names] = _hessian_block(problem, group, data)
    with perturbation.undisturbed():
        count = torch.full((), sums.num_data, device=leaves[0].device)
        noise = sums.noise(per_output=per_output_noise)
    # A finite loss may have an infinite slope: the root of an output that is zero, for one. All
    # blocks at once, so that a device is waited for once; one by one only to name the bad one.
    if not trees.is_finite(list(blocks.values())):
        for own, block in blocks.items():
            check_curvature(own, block, likelihood)
    ordered = {group.names: blocks[group.names] for group in sums.groups}
    return CurvatureSums(Curvature(ordered), sums.loss, count, noise)


def _low_rank(
    problem: _Problem, group: Group, data: Any, rank: int, num_outputs: int | None, width: int
) -> LowRankBlock:
    """The largest eigenvalues of a group's block."""
    parts = []
    for output in range(num_outputs or 1):
        weights = None
        if num_outputs is not None:
            places = torch.arange(width, device=problem.leaves[0].device)
            weights = (places % num_outputs == output).to(problem.dtype)
        operator = CurvatureOperator(
            problem.model,
            data,
            problem.likelihood,
            problem.kind,
            leaves=problem.leaves,
            chosen=group.numbers,
            constants=problem.constants,
            column_weights=weights,
            chunk_size=problem.chunk_size,
        )
        values, vectors, info = top_eigenpairs(
            operator, operator.size, min(rank, operator.size), dtype=operator.dtype,
            device=operator.device,
        )  # fmt: skip
        if not info.converged:
            logger.warning(
                "the largest eigenvalues of %s have not converged after %d passes over the data"
                " (relative residual %.1e)",
                listed(group.names),
                info.num_products,
                info.residual,
            )
        if info.smallest < -_INDEFINITE * float(values.abs().max()):
            logger.warning(
                "the Hessian of %s has negative eigenvalues (at most %.3g, the largest is %.3g),"
                " which its %d largest leave out where they are smaller: train to a minimum, or use"
                " the GGN",
                listed(group.names),
                info.smallest,
                float(values.abs().max()),
                len(values),
            )
        parts.append(LowRankBlock(values.unsqueeze(0), vectors.unsqueeze(0)))
    if num_outputs is None:
        return parts[0]
    return trees.stack(parts)


def _hessian_block(problem: _Problem, group: Group, data: Any) -> Block:
    arguments: dict[str, Any] = {
        "constants": problem.constants,
        "chunk_size": problem.chunk_size,
    }
    if group.kind == "diagonal":
        values = hessian_diagonal(
            problem.model, problem.leaves, group.numbers, data, problem.likelihood, **arguments
        )
        return DiagonalBlock(values.view(problem.leaves[group.numbers[0]].shape))
    matrix = hessian_dense(
        problem.model, problem.leaves, group.numbers, data, problem.likelihood, **arguments
    )
    return DenseBlock(((matrix + matrix.T) / 2).unsqueeze(0))


class _Sums:
    """The accumulators of a fit, and the loop that fills them."""

    def __init__(
        self,
        problem: _Problem,
        names: Sequence[str],
        structure: Structure,
        sharing: str,
        rank: int | None,
        *,
        per_output: bool,
    ) -> None:
        self.problem = problem
        self.names = names
        self.structure = structure
        self.sharing = sharing
        self.rank = rank
        self.per_output = per_output
        self.bases: list[dict[tuple[str, ...], Block]] | None = None
        self.groups: tuple[Group, ...] = ()
        self.accumulators: list[dict[Group, Accumulator]] = []
        with perturbation.undisturbed():
            self.loss = torch.zeros((), dtype=problem.dtype, device=problem.leaves[0].device)
        self.num_data = 0
        self.example: Any = None
        self.squared_error: Tensor | None = None

    def corrected(self) -> "_Sums":
        """Empty sums for a second pass, which corrects eigenvalues in the bases of the first."""
        again = _Sums(
            self.problem,
            self.names,
            self.structure,
            self.sharing,
            self.rank,
            per_output=self.per_output,
        )
        with perturbation.undisturbed():
            again.bases = []
            for accumulators in self.accumulators:
                found: dict[tuple[str, ...], Block] = {}
                for group, sums in accumulators.items():
                    block = sums.block()
                    if group.kind == "ekfac" and isinstance(block, KroneckerBlock):
                        check_curvature(group.names, block, self.problem.likelihood)
                        found[group.names] = eigenbasis(block)
                again.bases.append(found)
            if self.per_output:  # one basis for all outputs, so that they add up
                shared: dict[tuple[str, ...], Block] = {}
                for group in self.groups:
                    if group.kind == "ekfac":
                        each = [sums[group].block() for sums in self.accumulators]
                        total = trees.tree_map(lambda *parts: sum(parts), *each)
                        shared[group.names] = eigenbasis(total)
                again.bases = [shared] * len(self.accumulators)
        return again

    @property
    def num_outputs(self) -> int:
        """D, the length of the outputs' last axis."""
        return int(self.example.shape[-1]) if self.example.dim() > 1 else 1

    def go_through(self, data: Any) -> None:
        """Adds all data."""
        problem = self.problem
        # A plan holds for every fit of this model; the pass notices where it does not.
        plans = problem.model._scratch.plans
        for number, (x, y) in enumerate(batches(data)):
            size = batch_size(x)
            _check_leading_axes(x, size, number)
            with perturbation.undisturbed():
                x, y = perturbation.plain((x, y))
                signature = ("curvature", trees.signature(x))
                plan: Plan | None = plans.get(signature)
                if plan is None:
                    one = trees.tensor_map(lambda t: t[:1], x)
                    plan = perturbation.discover(
                        problem.model, problem.leaves, one, problem.constants
                    )
                _check_targets(problem.likelihood, plan.outputs, y, size)
                if not self.groups:
                    self._start(plan)
                plan = self._add(plan, x, y, number)
                scratch = problem.model._scratch
                scratch.remember(scratch.plans, signature, plan)
                finite = bool(torch.isfinite(self.loss))
            if not finite:
                raise ValueError(
                    f"the loss of batch {number} of `data` is not finite (it is"
                    f" {float(self.loss)}): did training diverge, or do the inputs hold NaN or"
                    " infinite values?"
                )
            self.num_data += size

    def _start(self, plan: Plan) -> None:
        """Empty accumulators, now that it is known what the model does with its parameters."""
        problem = self.problem
        self.example = plan.outputs
        self.groups = groups(self.names, problem.leaves, plan, self.structure)
        num = self.num_outputs if self.per_output else 1
        self._check_memory(num)
        for i in range(num):
            own: dict[Group, Accumulator] = {}
            for group in self.groups:
                if group.kind == "low_rank" or problem.kind == "hessian":
                    continue
                basis = None if self.bases is None else self.bases[i].get(group.names)
                own[group] = accumulator(
                    group, problem.leaves, problem.dtype, sharing=self.sharing, basis=basis
                )
            self.accumulators.append(own)

    def _check_memory(self, num: int) -> None:
        """Refuses sums, of `num` curvatures, that do not fit into memory."""
        problem = self.problem
        item = torch.empty((), dtype=problem.dtype).element_size()
        needed: dict[Group, int] = {}
        for group in self.groups:
            if group.kind == "low_rank":
                vectors = num_held(group.size, self.rank or 1, item)
                needed[group] = item * group.size * vectors
            elif problem.kind != "hessian" or group.kind != "diagonal":
                needed[group] = num * item * group.size
        total = sum(needed.values())
        free = memory.available_bytes(problem.leaves[0].device)
        if total <= free:
            return
        largest = max(needed, key=lambda group: needed[group])
        size = sum(problem.leaves[i].numel() for i in largest.numbers)
        whole = num * item * sum(leaf.numel() for leaf in problem.leaves)
        smaller = f'structure="diagonal" takes {memory.gigabytes(whole)}'
        if largest.kind in ("dense", "rows"):
            smaller += ', "kronecker" a little more, "low_rank" a few times that for each rank'
        taken = memory.gigabytes(needed[largest])
        raise MemoryError(
            f"the curvature takes {memory.gigabytes(total)}, and {memory.gigabytes(free)} are free."
            f" The largest block is the {_BLOCKS[largest.kind]} over the {size:,} numbers of"
            f" {listed(largest.names)} with {taken}: {smaller}; or choose fewer parameters by"
            " `bayesian`"
        )

    def _add(self, plan: Plan, x: Any, y: Any, number: int) -> Plan:
        """Adds a batch; gives the plan for the next."""
        problem = self.problem
        columns, extra = self._columns(x, y, number)
        size = batch_size(x)
        if not any(self.accumulators):
            self._losses_only(plan, x, y, size)
            return plan
        step = problem.chunk_size or _data_at_a_time(plan, self._num_columns(y))
        plan = perturbation.examine(
            problem.model, problem.leaves, plan, x, extra, problem.constants, columns
        )
        for start in range(0, size, step):
            rows = slice(start, start + step)
            part = trees.tensor_map(lambda t, rows=rows: t[rows], (x, extra))
            gradients, plan = _gradients(problem, plan, part[0], part[1], columns)
            self._contract(plan, gradients)
            self._note(gradients.values, trees.tensor_map(lambda t, rows=rows: t[rows], y))
        return plan

    def _columns(self, x: Any, y: Any, number: int) -> tuple[Columns, Any]:
        """What is sent back from the outputs, and what it needs of each datum."""
        problem = self.problem
        likelihood, num, key = problem.likelihood, problem.num_samples, problem.key
        if problem.kind == "empirical_fisher":
            return lambda outputs, y: _slope(likelihood, outputs, y)[None], y
        if problem.kind == "monte_carlo_fisher":
            assert num is not None
            assert key is not None
            outputs = self._outputs(x, batch_size(x))
            batch_key = random.fold_in(key, number)
            drawn = torch.stack(
                [likelihood.sample(random.fold_in(batch_key, i), outputs) for i in range(num)], 1
            )

            def slopes(outputs: Any, drawn: Tensor) -> Tensor:
                each = [_slope(likelihood, outputs, drawn[:, i]) for i in range(num)]
                return torch.stack(each) / num**0.5

            return slopes, drawn
        if num is None:
            return lambda outputs, y: hessian_root(likelihood, outputs, y), y
        assert key is not None
        root = hessian_root(likelihood, self.example, trees.tensor_map(lambda t: t[:1], y))
        width = root.shape[0] * num
        size = batch_size(x)
        noise = random.normal_rows(
            key, self.num_data, self.num_data + size, width, dtype=root.dtype, device=root.device
        ).view(size, num, root.shape[0])

        def combined(outputs: Any, extra: tuple[Any, Tensor]) -> Tensor:
            y, noise = extra
            return (
                torch.einsum("nsc,cn...->sn...", noise, hessian_root(likelihood, outputs, y))
                / num**0.5
            )

        return combined, (y, noise)

    def _num_columns(self, y: Any) -> int:
        """How many columns `_columns` sends back."""
        problem = self.problem
        if problem.kind == "empirical_fisher":
            return 1
        if problem.num_samples is not None:
            return problem.num_samples
        one = trees.tensor_map(lambda t: t[:1], y)
        return hessian_root(problem.likelihood, self.example, one).shape[0]

    def _outputs(self, x: Any, size: int) -> Any:
        """The model's outputs, a datum as a batch of one where batches may not be run whole."""
        problem = self.problem
        params = trees.unflatten(problem.leaves, problem.model.params)
        each = [
            problem.model.apply(
                params, trees.tensor_map(lambda t, i=i: t[i : i + 1], x), problem.constants
            )
            for i in range(size)
        ]
        return torch.cat(each)

    def _losses_only(self, plan: Plan, x: Any, y: Any, size: int) -> None:
        """A batch of which no gradients are needed: the model is given it whole."""
        problem = self.problem
        step = problem.chunk_size or _data_at_a_time(plan, 1)
        params = trees.unflatten(problem.leaves, problem.model.params)
        for start in range(0, size, step):
            rows = slice(start, start + step)
            x_part, y_part = trees.tensor_map(lambda t, rows=rows: t[rows], (x, y))
            self._note(problem.model.apply(params, x_part, problem.constants), y_part)

    def _note(self, outputs: Any, y: Any) -> None:
        """Adds the loss, and squared errors under a Gaussian likelihood."""
        likelihood = self.problem.likelihood
        self.loss += likelihood.nll(outputs, y).sum().to(self.loss.dtype)
        if isinstance(likelihood, Gaussian):
            errors = (y.reshape(outputs.shape).to(self.loss.dtype) - outputs).square()
            if self.per_output:
                errors = errors.reshape(-1, self.num_outputs).sum(0)
            else:
                errors = errors.sum()
            self.squared_error = errors + (0 if self.squared_error is None else self.squared_error)

    def noise(self, *, per_output: bool) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `CurvatureSums.noise`."""
        likelihood, like = self.problem.likelihood, self.loss
        if not isinstance(likelihood, Gaussian) or self.squared_error is None:
            return None
        std = torch.as_tensor(likelihood.noise_std, dtype=like.dtype, device=like.device).detach()
        if per_output:
            std = std.expand(self.num_outputs).clone()
        elif std.dim():
            return None  # one factor cannot change several noises
        num = self.num_data * self.example[0].numel() // self.squared_error.numel()
        power = 4.0 if self.problem.kind == "empirical_fisher" else 2.0
        return (
            std.clone(),
            self.squared_error,
            torch.full((), num, device=like.device),
            torch.full_like(like, power),
        )

    def _contract(self, plan: Plan, gradients: Gradients) -> None:
        num = len(self.accumulators)
        for i, accumulators in enumerate(self.accumulators):
            columns = slice(i, None, num) if num > 1 else slice(None)
            for group, sums in accumulators.items():
                own = [
                    leaf_gradients(
                        plan,
                        gradients,
                        number,
                        self.problem.leaves[number].shape,
                        self.problem.dtype,
                        columns,
                    )
                    for number in group.numbers
                ]
                sums.add(own)

    def blocks(self) -> dict[tuple[str, ...], Block]:
        """The sums as blocks, with a leading axis for the outputs where they are kept apart."""
        with perturbation.undisturbed():
            each = [
                {group.names: sums.block() for group, sums in accumulators.items()}
                for accumulators in self.accumulators
            ]
            return trees.stack(each) if self.per_output else each[0]


def _slope(likelihood: Likelihood, outputs: Any, y: Any) -> Any:
    """The gradient of each datum's loss in the outputs."""

    def loss(outputs: Any) -> Tensor:
        return likelihood.nll(outputs, y).sum()

    with torch.enable_grad():
        if not isinstance(outputs, Tensor) or trees.in_transform((outputs, y)):
            return torch.func.grad(loss)(outputs)
        # A quarter of the time, where no transform is to see it.
        leaf = outputs.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


def _gradients(
    problem: _Problem, plan: Plan, x: Any, extra: Any, columns: Columns
) -> tuple[Gradients, Plan]:
    """One chunk's gradients by the way that is fastest, and the plan for the rest."""
    arguments = (problem.model, problem.leaves)
    rest = (x, extra, problem.constants, columns)
    if plan.layout is not None:
        return perturbation.gradients_by_batch(*arguments, plan, *rest), plan
    if not plan.unbatchable:
        try:
            return perturbation.gradients_by_vmap(*arguments, plan, *rest), plan
        except (RuntimeError, NotImplementedError) as error:
            # The plan's forward pass ran, so what fails is its batching, and torch says so in
            # many words (recurrent layers complain of shapes).
            if is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0].split(". ")[0]
            logger.warning("vmap cannot batch this model (%s): its data run in a loop", reason)
            plan = plan._replace(unbatchable=True)
    try:
        return perturbation.gradients_by_loop(*arguments, plan, *rest), plan
    except perturbation.ChangedUsesError:
        plan = perturbation.without_rules(plan, len(problem.leaves))
        return perturbation.gradients_by_loop(*arguments, plan, *rest), plan


def _data_at_a_time(plan: Plan, columns: int) -> int:
    bytes_per_datum = plan.bytes_per_datum + (columns - 1) * plan.bytes_per_column + 1
    step = max(CHUNK_BYTES // bytes_per_datum, WORTHWHILE_DATA)
    return max(1, min(step, MOST_CHUNK_BYTES // bytes_per_datum))


def _check_targets(likelihood: Likelihood, outputs: Any, targets: Any, size: int) -> None:
    # The outputs of one datum stand for those of all, so that a wrong label is refused with
    # a message before it becomes an index.
    likelihood.check(trees.tensor_map(lambda t: t[:1].expand(size, *t.shape[1:]), outputs), targets)


def _check_leading_axes(x: Any, size: int, number: int) -> None:
    for name, leaf in trees.leaves_with_names(x):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != size):
            raise ValueError(
                f"inputs{name} of batch {number} of `data` has shape {tuple(leaf.shape)}, expected"
                f" a leading batch axis of {size}, as the first of the inputs has"
            )


def _kinds(structure: Structure) -> set[str]:
    return {structure} if isinstance(structure, str) else set(structure.values())


def _passes(structure: Structure, curvature: str) -> bool:
    """Whether the data are gone through more than once."""
    return curvature == "hessian" or bool(_kinds(structure) & {"ekfac", "low_rank"})


def _check_options(
    model: Any,
    likelihood: Any,
    curvature: Any,
    structure: Any,
    sharing: Any,
    rank: Any,
    num_samples: Any,
    key: Any,
    chunk_size: Any,
) -> list[str]:
    check_model(model)
    check_likelihood(likelihood)
    _check_choice(curvature, CURVATURES, "curvature")
    names = trees.names(model.params)
    check_structure(structure, names)
    _check_choice(sharing, SHARING, "sharing")
    _check_count(chunk_size, "chunk_size")
    _check_count(rank, "rank")
    _check_count(num_samples, "num_samples")
    kinds = _kinds(structure)
    if curvature == "hessian" and kinds & {"kronecker", "ekfac"}:
        raise ValueError(
            "`structure` has Kronecker factors, which are built from gradients, but the curvature"
            ' is the Hessian: use "dense", "block_diagonal", "diagonal" or "low_rank", or another'
            " curvature"
        )
    if "low_rank" in kinds:
        if rank is None:
            raise ValueError('`rank` is None, expected the number of eigenvalues of "low_rank"')
        if curvature == "monte_carlo_fisher" or num_samples is not None:
            raise ValueError(
                '`structure` "low_rank" multiplies with the exact curvature, which cannot be'
                ' sampled: use curvature="ggn" without `num_samples`'
            )
    elif rank is not None:
        raise ValueError(f'`rank` is {rank}, which only `structure` "low_rank" has a use for')
    sampled = curvature == "monte_carlo_fisher" or (curvature == "ggn" and num_samples is not None)
    if sampled and key is None:
        raise ValueError(
            "`key` is None, expected a key or an integer seed: samples are drawn from it"
        )
    if not sampled and (num_samples is not None or key is not None):
        raise ValueError(
            f"`num_samples` and `key` are for what is sampled, and curvature {curvature!r} is not:"
            ' leave them out, or use "monte_carlo_fisher", or "ggn" with both'
        )
    return names


def _check_per_output(
    per_output: Any, likelihood: Any, curvature: str, structure: Structure
) -> None:
    if not per_output:
        return
    if not isinstance(likelihood, Gaussian):
        raise ValueError(
            "`per_output_noise` is True, but"
            f" `likelihood` is a {type(likelihood).__name__}, expected a Gaussian"
        )
    if curvature != "ggn":
        raise ValueError(
            f"`per_output_noise` is True, but `curvature` is {curvature!r}, expected 'ggn': only"
            " that is a sum over the outputs"
        )


def _check_count(value: Any, name: str) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, expected an int or None")
    if value < 1:
        raise ValueError(f"`{name}` is {value}, expected at least 1, or None")


def _check_choice(value: Any, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` is {value!r}, expected one of {known}")
