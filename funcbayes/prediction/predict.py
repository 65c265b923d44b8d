"""Predictions under a posterior: any model, any posterior, one call."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from funcbayes.core import images, random, trees
from funcbayes.core.batching import is_unbatchable, log_unbatchable
from funcbayes.core.data import batch_size
from funcbayes.core.likelihoods import Likelihood, check_likelihood
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import Coupled, Key, RowsKey
from funcbayes.posteriors import DropoutMasks, Empirical
from funcbayes.posteriors.base import check_num_samples
from funcbayes.prediction import activation, forward, planner, rotated
from funcbayes.prediction.predictive import Predictive, RunningMoments

# Outputs that are kept before their moments are taken.
_GROUP_BYTES = 2**25

Strategy = Literal["auto", "vmap", "loop", "threads"]
NoiseSpace = Literal["weight", "activation"]


@torch.no_grad()
def predict(
    model: Model,
    posterior: Any,
    x: Any,
    *,
    key: RowsKey | None,
    num_samples: int | None = None,
    likelihood: Likelihood | None = None,
    strategy: Strategy = "auto",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    return_samples: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
    noise: NoiseSpace = "weight",
    approximate: bool = False,
) -> Predictive:
    """Predicts with posterior samples.

    Sample i depends on `(key, i)` alone, so the result does not depend on the strategy or the
    chunk size, but for rounding. No gradients are computed, and nothing of the user's changes.

    Args:
        model: the network.
        posterior: a distribution over its parameters, e.g. of `funcbayes.swag.posterior`.
        x: inputs, a pytree of tensors with a leading batch axis, on the parameters' device.
        key: what the samples are drawn from. None only where nothing is drawn: members of
            an `Empirical` posterior with `num_samples=None`. For normal posteriors,
            `funcbayes.random.antithetic(key)` or `orthogonal(key)` gives samples in pairs or
            fours, with less noise to draw and less variance.
        num_samples: how many samples. None: every member of an `Empirical` posterior once,
            in order; an error for the others.
        likelihood: what the outputs mean. With it, `mean` is that of the probabilities (or
            of the regression mean) and entropies and the aleatoric variance are there; None:
            moments of the outputs as they are.
        strategy: "vmap" is one batched forward pass; "loop" one pass a sample; "threads" one
            pass a core at a time, of `chunk_size` samples (None: one), and off the CPU the same
            passes in turn; "auto" what should be fastest, as `explain` tells.
        chunk_size: most samples in one batched pass; None: what fits into memory. Halved as
            often as needed where memory runs out.
        memory_budget: bytes that parameters and activations may take at a time, by estimate;
            a single sample may take more. None: half of what is free, on CPU at most 2 GiB.
        return_samples: whether `Predictive.samples` is kept.
        transform: applied to outputs without a likelihood before moments are taken.
        noise: "weight": a sample is one network, the same for every row of `x`. "activation":
            what each linear map gives is drawn, anew for every row, in place of its weights
            (local reparametrisation), for posteriors of independent normals. The predictive of
            each row is the same as with "weight", and faster to have; what two rows of one
            sample have to do with each other is lost. So is any agreement of the numbers drawn
            with those of "weight".
        approximate: what noise="activation" may do where it is not exact. False: nothing, it is
            an error. True: a weight that meets several positions of an input (sequences,
            convolutions), or is used in several places, is drawn anew at each, which leaves
            out the correlation between them; a parameter that is used in any other way than by
            a linear map (a norm's gain, an embedding) is drawn itself, once a sample, exactly.
            No effect on noise="weight".

    Returns:
        The predictive distribution.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the parameters are not finite or do not fit
            the model; `strategy="vmap"` and vmap cannot batch the model; `noise="activation"`
            and the parameters are not independent normals, or it would not be exact (the
            message names the parameter).

    Warns:
        UserWarning: the posterior is dropout, and no dropout was active in the forward pass.

    Source:
        Kingma, Salimans and Welling (2015), arXiv:1506.02557, for `noise="activation"`.
    """
    num, parent = _check(model, posterior, x, key, num_samples, strategy, chunk_size, memory_budget)
    if likelihood is not None:
        check_likelihood(likelihood)
    if transform is not None and (likelihood is not None or not callable(transform)):
        raise ValueError(
            f"`transform` is {transform!r}, expected a function, and no `likelihood` beside it:"
            " a likelihood has its own link"
        )

    def gathered(model: Model, posterior: Any) -> Predictive:
        run = _Run(model, posterior, parent, x, num, chunk_size, memory_budget)
        moments = RunningMoments(likelihood, transform, keep_samples=return_samples)
        for outputs, threads in run.outputs(strategy):
            if threads > 1 and _bytes(outputs) < _GROUP_BYTES:
                forward.in_worker(moments.add, outputs)
            else:
                moments.add(outputs)
        return moments.result()

    try:
        return gathered(*_in_space(noise, model, posterior, x, approximate=approximate))
    except rotated.ChangedUsesError:
        rotated.forget(model, posterior, x)
        return gathered(model, posterior)


@torch.no_grad()
def explain(
    model: Model,
    posterior: Any,
    x: Any,
    *,
    num_samples: int | None = None,
    strategy: Strategy = "auto",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    noise: NoiseSpace = "weight",
    approximate: bool = False,
) -> planner.Plan:
    """How `predict` would run the samples with the same arguments, and why.

    One sample's forward pass is run and counted.

    Args:
        model: as for `predict`.
        posterior: as for `predict`.
        x: as for `predict`.
        num_samples: as for `predict`; None: 30, or all members of an `Empirical` posterior.
        strategy: as for `predict`.
        chunk_size: as for `predict`.
        memory_budget: as for `predict`.
        noise: as for `predict`.
        approximate: as for `predict`.

    Returns:
        The plan; `print(plan)` shows strategy, operations, bytes and costs.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range or does not fit the model.

    Examples:
        >>> import torch, funcbayes as fb
        >>> model = fb.Model.from_module(torch.nn.Linear(4, 3))
        >>> posterior = fb.vi.posterior(fb.vi.init(model.params))
        >>> fb.explain(model, posterior, torch.ones(5, 4)).strategy
        'vmap'
    """
    if num_samples is None and not isinstance(posterior, Empirical):
        num_samples = 30
    num, parent = _check(model, posterior, x, 0, num_samples, strategy, chunk_size, memory_budget)

    def planned(model: Model, posterior: Any) -> planner.Plan:
        run = _Run(model, posterior, parent or random.key(0), x, num, chunk_size, memory_budget)
        return run.plan(strategy, run.profile()[1], num)

    try:
        return planned(*_in_space(noise, model, posterior, x, approximate=approximate))
    except rotated.ChangedUsesError:
        rotated.forget(model, posterior, x)
        return planned(model, posterior)


def _in_space(
    noise: str, model: Model, posterior: Any, x: Any, *, approximate: bool
) -> tuple[Model, Any]:
    """The model and the posterior whose samples are drawn."""
    if noise not in get_args(NoiseSpace):
        raise ValueError(f"`noise` is {noise!r}, expected one of {get_args(NoiseSpace)}")
    if noise == "weight":
        return rotated.rotated(model, posterior, x)
    return activation.reparametrised(model, posterior, x, approximate=approximate)


class _UnbatchableError(Exception):
    """vmap has no rule for what the model does."""


class _Run(NamedTuple):
    """One call's arguments."""

    model: Model
    posterior: Any
    key: Key | Coupled | None
    x: Any
    num: int
    chunk_size: int | None
    memory_budget: int | None

    def outputs(self, strategy: str) -> Iterator[tuple[Any, int]]:
        """Outputs in chunks with a leading sample axis, and how many threads made them."""
        done = 0
        first, profile = self.profile()
        if first is not None:
            yield _with_sample_axis(first), 1
            done = 1
        if isinstance(self.posterior, DropoutMasks) and not profile.stochastic:
            warnings.warn(
                "no dropout was active in the forward pass: all samples are identical and their"
                " variance is zero",
                UserWarning,
                stacklevel=5,
            )
        while done < self.num:
            plan = self.plan(strategy, profile, self.num - done)
            try:
                for outputs in self._by(plan, done):
                    yield outputs, plan.threads
                    done += trees.leading_size(outputs)
            except _UnbatchableError as error:
                if strategy != "auto":
                    raise ValueError(
                        f"`strategy` is '{strategy}', but vmap cannot batch this model ({error}):"
                        " use strategy='auto', which then runs its samples one by one"
                    ) from error
                log_unbatchable(error)
                profile = profile._replace(batchable=False)
                self._remember(profile)

    def plan(self, strategy: str, profile: planner.Profile, num: int) -> planner.Plan:
        """How to run `num` samples."""
        leaf = trees.tensor_leaves(self.model.params)[0]
        numbers = max(self.posterior.draw_size, trees.num_elements(self.model.params))
        return planner.plan(
            profile,
            num,
            strategy=strategy,
            chunk_size=self.chunk_size,
            draw_size=self.posterior.draw_size,
            draw_bytes=numbers * leaf.element_size(),
            device=leaf.device,
            budget=self.memory_budget,
        )

    def profile(self) -> tuple[Any, planner.Profile]:
        """What a sample costs; and sample 0's outputs where it had to run for that, else None."""
        known = self.model._scratch.plans.get(planner.plan_key(self.posterior, self.x))
        if known is not None:
            return None, known
        outputs, profile = self._measured()
        self._remember(profile)
        return outputs, profile

    def _remember(self, profile: planner.Profile) -> None:
        scratch, key = self.model._scratch, planner.plan_key(self.posterior, self.x)
        scratch.remember(scratch.plans, key, profile)

    def _measured(self) -> tuple[Any, planner.Profile]:
        """Outputs and profile of sample 0."""
        buffer = forward.noise_buffer(self.model, self.posterior, 1)
        sample = forward.only(self.posterior.draw(self.key, 0, 1, buffer))
        if images.meet_convolutions(self.model, self.x):
            try:
                outputs, profile = planner.measure(self.model, sample, images.channels_last(self.x))
                outputs = forward.apart(outputs, buffer)
                return outputs, profile._replace(channels_last=True)
            except RuntimeError:
                pass  # a `view` that needs the usual memory format, or a fault that comes again
        outputs, profile = planner.measure(self.model, sample, self.x)
        return forward.apart(outputs, buffer), profile

    def _by(self, plan: planner.Plan, done: int) -> Iterator[Any]:
        x = images.channels_last(self.x) if plan.channels_last else self.x
        batched = plan.strategy == "vmap" or plan.chunk_size > 1
        small = batched and planner.calls_matter(plan)

        def run(start: int, stop: int) -> Any:
            try:
                return forward.evaluate(
                    *(self.model, self.posterior, self.key, x, start, stop),
                    batched=batched,
                    small=small,
                )
            except (RuntimeError, NotImplementedError) as error:
                if batched and is_unbatchable(error):
                    raise _UnbatchableError(str(error).split("\n")[0]) from error
                raise

        go = forward.in_threads if plan.strategy == "threads" else forward.in_turn
        chunks = go(run, done, self.num, plan.chunk_size)
        return chunks if plan.strategy == "vmap" else _grouped(chunks)


def _grouped(chunks: Iterator[Any]) -> Iterator[Any]:
    """Several outputs at a time, for fewer merges of moments.

    Many small operations on this thread would wait for the cores that the workers hold.
    """
    group: list[Any] = []
    size = 0
    for outputs in chunks:
        group.append(outputs)
        size += _bytes(outputs)
        if size >= _GROUP_BYTES:
            yield trees.concatenate(group)
            group, size = [], 0
    if group:
        yield trees.concatenate(group)


def _check(
    model: Model,
    posterior: Any,
    x: Any,
    key: RowsKey | None,
    num_samples: int | None,
    strategy: str,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[int, Key | Coupled | None]:
    check_model(model)
    if not hasattr(posterior, "draw"):
        raise TypeError(
            f"`posterior` is a {type(posterior).__name__}, expected a posterior: a state becomes"
            " one by its method's `posterior`, e.g. funcbayes.swag.posterior(state)"
        )
    if strategy not in get_args(Strategy):
        raise ValueError(f"`strategy` is {strategy!r}, expected one of {get_args(Strategy)}")
    if chunk_size is not None:
        check_num_samples(chunk_size, name="chunk_size")
    if memory_budget is not None:
        check_num_samples(memory_budget, name="memory_budget")
    batch_size(x)
    trees.check_finite(posterior, name="posterior")
    if isinstance(posterior, Empirical):
        trees.check_like(posterior.params, model.params, name="posterior.mean", batch_dims=1)
    elif hasattr(posterior, "mean"):
        trees.check_like(posterior.mean, model.params, name="posterior.mean")
    if num_samples is None:
        if not hasattr(posterior, "num_members"):
            raise ValueError(
                "`num_samples` is None, expected a number: only an Empirical posterior (an"
                " ensemble) has a number of members of its own"
            )
        return posterior.num_members, None
    num = check_num_samples(num_samples)
    if key is None:
        raise ValueError(
            "`key` is None, expected a key or an integer seed: samples are drawn from it"
        )
    return num, random.as_rows_key(key)


def _with_sample_axis(outputs: Any) -> Any:
    return trees.tensor_map(lambda leaf: leaf.unsqueeze(0), outputs)


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in trees.tensor_leaves(tree))
