"""Deep ensembles: members stacked along a leading axis and trained in one vectorised step.

Source:
    Lakshminarayanan, Pritzel, Blundell (2017), "Simple and scalable predictive uncertainty
    estimation using deep ensembles", arXiv:1612.01474 (without its adversarial examples).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcbayes.core import random, trees
from funcbayes.core.batching import map_samples
from funcbayes.core.data import batch_size, batches
from funcbayes.core.likelihoods import Likelihood, check_likelihood
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model, check_model
from funcbayes.core.random import Key, KeyLike
from funcbayes.core.trees import TensorTree, check_finite, check_like, tree_map
from funcbayes.inference import members
from funcbayes.inference.checks import check_state, check_training
from funcbayes.inference.seeding import seeded
from funcbayes.posteriors import Empirical
from funcbayes.posteriors.base import check_num_samples

Optimizer = torch.optim.Optimizer

_MADE_BY = "ensemble.init, ensemble.from_modules or ensemble.fit"


class EnsembleState(NamedTuple):
    """The members, stacked.

    Attributes:
        params: tree like the model's parameters, leaves `[members, *shape]`.
        constants: dict like the model's constants (buffers and frozen parameters), leaves
            `[members, *shape]`: each member has its own batch-norm statistics.
    """

    params: TensorTree
    constants: dict[str, Tensor]


def init(
    module_fn: Callable[[], nn.Module],
    *,
    key: KeyLike,
    num_members: int,
    bayesian: Callable[[str], bool] | None = None,
) -> tuple[Model, EnsembleState]:
    """Builds an ensemble of independently initialised members.

    Args:
        module_fn: builds one freshly initialised module, a new one at each call.
        key: member i is built with torch's generators seeded by `(key, i)`; their state
            is afterwards what it was before.
        num_members: how many.
        bayesian: which parameters train, by name. None: all that require gradients.

    Returns:
        The model (of one member's structure), and the members' parameters and buffers.

    Raises:
        TypeError: `module_fn` is not callable, or does not return an `nn.Module`.
        ValueError: `num_members` is not positive, or the members are not independent
            modules of one architecture.
    """
    if not callable(module_fn) or isinstance(module_fn, nn.Module):
        raise TypeError(
            f"`module_fn` is a {type(module_fn).__name__}, expected a function without arguments"
            " that builds a module, such as lambda: Net()"
        )
    check_num_samples(num_members, name="num_members")
    key = random.as_key(key)
    nets: list[nn.Module] = []
    # All devices by name: torch warns where it has to guess among several.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for i in range(num_members):
            torch.manual_seed(random.seed(random.fold_in(key, i)))
            nets.append(module_fn())
    return _stack_modules(
        nets, bayesian, name="module_fn() #{}", fix="build a new module at each call"
    )


def from_modules(
    nets: Sequence[nn.Module], *, bayesian: Callable[[str], bool] | None = None
) -> tuple[Model, EnsembleState]:
    """Makes an ensemble of given modules, trained or not.

    Args:
        nets: modules of one architecture. Their values are copied: training them on does
            not change the state, and they are not modified.
        bayesian: which parameters are the members' own to train, by name. None: all that
            require gradients.

    Returns:
        The model (whose structure and modes are those of `nets[0]`), and the stacked
        parameters and buffers.

    Raises:
        TypeError: an entry is not an `nn.Module`.
        ValueError: there are none, an object appears twice, two share a trainable
            parameter, or they differ in architecture; the message names the leaf.
    """
    if isinstance(nets, nn.Module) and not isinstance(nets, nn.ModuleList):
        raise TypeError(f"`nets` is one {type(nets).__name__}, expected a list of modules")
    nets = list(nets)
    if not nets:
        raise ValueError("`nets` is empty, expected at least one module")
    return _stack_modules(nets, bayesian, name="nets[{}]", fix="give each member its own")


def losses(
    model: Model,
    state: EnsembleState,
    batch: tuple[Any, Any],
    *,
    key: KeyLike,
    likelihood: Likelihood,
    per_member: bool = False,
) -> tuple[Float[Tensor, " members"], dict[str, Tensor]]:
    """Each member's mean negative log likelihood on a batch, in training mode.

    One vectorised pass over all members, or, on CPU where each computes much, a pass a core, in
    which its gradient is taken as well. A model that vmap cannot batch is looped over.

    Args:
        model: the model that `init` or `from_modules` returned. Not modified.
        state: the members; the losses are differentiable in `state.params`.
        batch: `(inputs, targets)`, shared by the members.
        key: member i draws its dropout masks from `fold_in(key, i)`. Fold in the step
            number, or every step uses the same masks.
        likelihood: one of `funcbayes.likelihoods`.
        per_member: whether every leaf of `batch` is `[members, N, …]`, a batch for each.

    Returns:
        The losses in nats per datum, and the stacked constants after the pass (batch norm
        has seen the batch), without gradient. `state` is not modified.

    Raises:
        TypeError: the network's output or the targets are not a tensor.
        ValueError: `state` is not like `model`; targets of the wrong dtype, shape or range;
            with `per_member`, a leaf without a leading axis for the members.
    """
    return _losses(model, state, batch, random.as_key(key), likelihood, per_member=per_member)


def fit(
    model: Model,
    state: EnsembleState,
    data: Any,
    *,
    key: KeyLike,
    likelihood: Likelihood,
    optimizer: Callable[[list[Tensor]], Optimizer],
    num_epochs: int,
    bootstrap: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> EnsembleState:
    """Trains all members by maximum likelihood, one vectorised step a batch.

    The same as training them one by one on the same batches, as long as the optimizer
    treats every number by itself.

    Args:
        model: the model that `init` or `from_modules` returned. Not modified.
        state: where the members start. Not modified.
        data: iterable of `(inputs, targets)` pairs, such as a `DataLoader`, or one such
            pair. Gone through once an epoch.
        key: dropout masks depend on `(key, step, member)`, resampled rows on
            `(key, batch of the epoch, member)`.
        likelihood: one of `funcbayes.likelihoods`.
        optimizer: makes the optimizer from the list of stacked leaves `[members, *shape]`,
            such as `lambda leaves: torch.optim.Adam(leaves, lr=1e-3)`. Any elementwise one:
            an optimizer from elsewhere than torch.optim is first tried on small tensors
            (so `optimizer` is called more than once).
        num_epochs: passes over the data.
        bootstrap: whether each member sees its own resample, with replacement, of each
            batch's rows. A member keeps the same rows of the k-th batch in every epoch:
            with `data` one pair, or a loader that does not shuffle, that is a bootstrap
            sample of the data (stratified by batch). A shuffling loader makes other batches
            every epoch, so there every member comes to see all data in the end.
        callback: called after each step with the number of steps done and the members'
            losses `[members]` on that step's batch, in nats per datum.

    Returns:
        The trained members, without gradients.

    Raises:
        RuntimeError: inference mode is on.
        TypeError: `callback` or `optimizer` is not such a function, or the optimizer mixes the
            numbers of a tensor (LBFGS, Adafactor, Muon, …); outputs or targets that are not
            tensors.
        ValueError: a bad argument, a loader that yields nothing, targets of the wrong dtype,
            shape or range, or a loss that is not finite (the message names step and members).
    """
    check_training(callback)
    num_members = _check_state(state, model)
    check_num_samples(num_epochs, name="num_epochs")
    mask_key, row_key = random.split(random.as_key(key))
    params = tree_map(lambda p: p.requires_grad_(), trees.clone(state.params))
    constants = trees.clone(state.constants)
    leaves = trees.leaves(params)
    steps = _make_optimizer(optimizer, leaves)

    step = 0
    for epoch in range(num_epochs):
        for number, batch in enumerate(batches(data)):
            if bootstrap:
                batch = _resample(batch, random.fold_in(row_key, number), num_members)
            with torch.enable_grad():
                values, constants = _losses(
                    model,
                    EnsembleState(params, constants),
                    batch,
                    random.fold_in(mask_key, step),
                    likelihood,
                    per_member=bootstrap,
                    quiet=step > 0,
                )
                total = values.sum()
            if not bool(values.isfinite().all()):
                which = (~values.isfinite()).nonzero().flatten().tolist()
                raise ValueError(
                    f"the loss of member {', '.join(map(str, which))} is not finite at step {step}"
                    f" (epoch {epoch}), expected finite numbers. Check the inputs for NaN, or lower"
                    " the learning rate"
                )
            # A sum over members, so each gets the gradient of its own loss. Not backward():
            # that would also reach tensors of the user's that require gradients.
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad
            steps.step()
            step += 1
            if callback is not None:
                callback(step, values.detach())
    params = tree_map(torch.Tensor.detach, params)
    check_finite(params, name="params")
    return EnsembleState(params, constants)


def posterior(state: EnsembleState) -> Empirical:
    """The members as a posterior: each parameter draw comes with its own buffers."""
    check_state(state, EnsembleState, _MADE_BY)
    return Empirical(trees.clone(state.params), trees.clone(state.constants))


def _losses(
    model: Model,
    state: EnsembleState,
    batch: tuple[Any, Any],
    key: Key,
    likelihood: Likelihood,
    *,
    per_member: bool,
    quiet: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    num_members = _check_state(state, model)
    check_likelihood(likelihood)
    inputs, targets = batch
    if per_member:
        for path, leaf in trees.leaves_with_names((inputs, targets)):
            if isinstance(leaf, Tensor) and (leaf.dim() < 2 or leaf.shape[0] != num_members):
                raise ValueError(
                    f"`batch{path}` has shape {tuple(leaf.shape)}, expected"
                    f" ({num_members}, N, …): per_member=True takes a batch for each member"
                )
    keys = [random.fold_in(key, i) for i in range(num_members)]
    index = torch.arange(num_members, device=trees.leaves(state.params)[0].device)

    def member(
        params: TensorTree, constants: dict[str, Tensor], i: Tensor, *own: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        with KeyedDropout(keys, i, always=False):
            return model.apply_train(params, own[0] if own else inputs, constants)

    def together(leaves: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        params = trees.unflatten(leaves, state.params)
        stacks = (params, state.constants, index, *((inputs,) if per_member else ()))
        # A compiled graph cannot seed generators: there, vmap refuses a network that draws
        # from them.
        keyed = not torch.compiler.is_compiling()
        with seeded(key, index.device) if keyed else nullcontext():
            outputs, buffers = map_samples(member, *stacks, keyed=keyed, quiet=quiet)
        if per_member:
            _check_each(likelihood, outputs, targets, num_members)
        else:
            likelihood.check(trees.index(outputs, 0), targets)
        in_dims = (0, 0 if per_member else None)
        nll = torch.vmap(likelihood.nll, in_dims=in_dims)(outputs, targets)
        return nll.mean(1), trees.tensor_map(torch.Tensor.detach, buffers)

    def alone(
        form: members.Format, params: TensorTree, constants: dict[str, Tensor], i: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own_inputs, own_targets = trees.index(batch, i) if per_member else batch
        with KeyedDropout(keys[i : i + 1], None, always=False):
            outputs, buffers = model.apply_train(params, form(own_inputs), constants)
        likelihood.check(outputs, own_targets)
        return likelihood.nll(outputs, own_targets).mean(), buffers

    leaves = trees.leaves(state.params)
    form = members.own_format(model, alone, state.params, state.constants, batch)
    found = None
    if form is not None:
        try:
            found = members.run(
                partial(alone, form), state.params, state.constants, lambda new: together(new)[0]
            )
        except members.OtherGradientsError:
            members.forget(model, state.params, batch)
    losses, buffers = together(leaves) if found is None else found
    return losses, {**state.constants, **buffers}


def _check_each(likelihood: Likelihood, outputs: Any, targets: Any, num_members: int) -> None:
    """Refuses outputs and targets that do not belong together, of any member."""
    if all(isinstance(x, Tensor) and x.dim() > 1 for x in (outputs, targets)):
        # A check waits for a device: once, where nothing is wrong.
        try:
            return likelihood.check(outputs.flatten(0, 1), targets.flatten(0, 1))
        except (TypeError, ValueError):
            pass  # the member's own check says what, of its own shapes
    for i in range(num_members):
        likelihood.check(trees.index(outputs, i), targets[i])


# Each treats every number by itself (with scalars such as the step that all share).
_ELEMENTWISE = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
}


def _make_optimizer(factory: Callable[[list[Tensor]], Optimizer], leaves: list[Tensor]) -> Any:
    expected = (
        "expected a function from a list of tensors to a torch.optim.Optimizer, such as"
        " lambda leaves: torch.optim.Adam(leaves, lr=1e-3)"
    )
    if not callable(factory):
        raise TypeError(f"`optimizer` is a {type(factory).__name__}, {expected}")
    made = factory(leaves)
    if not isinstance(made, Optimizer):
        raise TypeError(f"`optimizer` gives a {type(made).__name__}, {expected}")
    trained = {id(p) for group in made.param_groups for p in group["params"]}
    if not trained or trained - {id(leaf) for leaf in leaves}:
        raise ValueError(
            "`optimizer` made an optimizer over other tensors than the leaves it was given, so"
            f" the members would not train; {expected}"
        )
    if type(made) not in _ELEMENTWISE and not _is_elementwise(factory):
        raise TypeError(
            f"`optimizer` gives a {type(made).__name__}, which mixes the numbers of a tensor (or"
            " needs a closure), so on stacked leaves it would mix members; expected an"
            " elementwise one such as SGD, Adam or AdamW. Otherwise train the members one by"
            " one and join them with ensemble.from_modules"
        )
    return made


def _is_elementwise(factory: Callable[[list[Tensor]], Optimizer]) -> bool:
    """Whether three steps on a stack of two tensors equal those on each alone."""

    def train(start: Tensor) -> Tensor:
        leaf = start.clone().requires_grad_()
        steps = factory([leaf])
        for _ in range(3):
            leaf.grad = leaf.detach().sin() + 0.1
            steps.step()
        return leaf.detach()

    pair = torch.linspace(-1, 3, 24, dtype=torch.float64, device="cpu").reshape(2, 3, 4)
    # An optimizer of any origin may raise anything on a tensor or a step that it cannot take.
    try:
        whole, parts = train(pair), torch.stack([train(one) for one in pair])
    except Exception:
        return False
    return torch.allclose(whole, parts, rtol=1e-9, atol=1e-12)


def _resample(batch: tuple[Any, Any], key: Key, num_members: int) -> tuple[Any, Any]:
    """Rows of the batch, drawn with replacement for each member: leaves [members, N, …]."""
    size = batch_size(batch[0])
    rows = torch.stack(
        [random.randint(random.fold_in(key, i), 0, size, (size,)) for i in range(num_members)]
    )
    return trees.tensor_map(lambda leaf: leaf[rows.to(leaf.device)], tuple(batch))


def _stack_modules(
    nets: list[nn.Module], bayesian: Callable[[str], bool] | None, *, name: str, fix: str
) -> tuple[Model, EnsembleState]:
    names = [name.format(i) for i in range(len(nets))]
    for net, own in zip(nets, names, strict=True):
        if not isinstance(net, nn.Module):
            raise TypeError(f"`{own}` is a {type(net).__name__}, expected an nn.Module")
    models = [Model.from_module(net, bayesian) for net in nets]
    # One owner a tensor: a member that shares a parameter would be counted twice, and the
    # ensemble would look surer than it is.
    owners: dict[tuple[int, torch.device], str] = {}
    for i, (net, model, own) in enumerate(zip(nets, models, names, strict=True)):
        first = next(j for j in range(i + 1) if nets[j] is net)
        if first != i:
            raise ValueError(
                f"`{own}` is the same object as `{names[first]}`, so the two would always agree;"
                f" expected independent members: {fix}"
            )
        _check_architecture(net, nets[0], own, names[0])
        check_like(model.params, models[0].params, name=f"{own}.params")
        check_like(model.constants, models[0].constants, name=f"{own}.constants")
        taken = {}
        for path, leaf in trees.leaves_with_names(model.params):
            place = (leaf.data_ptr(), leaf.device)
            if leaf.numel() and place in owners:
                raise ValueError(
                    f"`{own}{path}` shares its memory with `{owners[place]}`, expected independent"
                    f" members: {fix}"
                )
            taken[place] = own + path
        owners |= taken
    with torch.no_grad():
        params = trees.stack([model.params for model in models])
        constants = trees.stack([model.constants for model in models])
    return models[0], EnsembleState(trees.clone(params), trees.clone(constants))


def _check_architecture(net: nn.Module, like: nn.Module, name: str, like_name: str) -> None:
    """Parameters alone do not tell ReLU from Tanh, or one stride from another."""
    ours, theirs = dict(net.named_modules()), dict(like.named_modules())
    for path in {**theirs, **ours}:
        a, b = ours.get(path), theirs.get(path)
        where = f".{path}" if path else ""
        if a is None or b is None:
            raise ValueError(
                f"`{(name if b is None else like_name)}{where}` exists and"
                f" `{(like_name if b is None else name)}{where}` does not, expected members of one"
                " architecture"
            )
        # Only torch's own say all that matters, and nothing else, in their extra_repr.
        known = type(a).__module__.startswith("torch.nn.")
        if type(a) is not type(b) or (known and a.extra_repr() != b.extra_repr()):
            raise ValueError(
                f"`{name}{where}` is {type(a).__name__}({a.extra_repr()}) and `{like_name}{where}`"
                f" is {type(b).__name__}({b.extra_repr()}), expected members of one architecture"
            )


def _check_state(state: EnsembleState, model: Model) -> int:
    """Checks the stacks against the model; returns the number of members."""
    check_model(model)
    check_state(state, EnsembleState, _MADE_BY)
    check_like(state.params, model.params, name="state.params", batch_dims=1)
    check_like(state.constants, model.constants, name="state.constants", batch_dims=1)
    return trees.leading_size((state.params, state.constants))
