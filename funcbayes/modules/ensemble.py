"""Deep ensembles as a class."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcbayes.core import trees
from funcbayes.core.model import Model
from funcbayes.core.random import Key, KeyLike
from funcbayes.inference import ensemble
from funcbayes.modules import common
from funcbayes.modules.base import BaseBayesianMethod, Moments, softmax_of_logits
from funcbayes.posteriors import Draws, Empirical
from funcbayes.posteriors.empirical import drawn_members


class DeepEnsemble(BaseBayesianMethod):
    """Networks trained independently; their disagreement is the uncertainty.

    Predictions use the members' weights of the moment, so members may be trained in any way
    between predictions. Members of one architecture are evaluated in one batched pass, others
    one by one.

    Args:
        model_fn: makes a member, a new one at each call.
        num_models: how many.

    Attributes:
        models: the members, an `nn.ModuleList`.

    Raises:
        TypeError: `model_fn` is not callable, or makes something else than a module.
        ValueError: `num_models` is below 1, or two members are one object or share all of
            their parameters, and so would always agree.

    Source:
        Lakshminarayanan et al. (2017), arXiv:1612.01474.
    """

    def __init__(self, model_fn: Callable[[], nn.Module], num_models: int = 5) -> None:
        super().__init__()
        if not callable(model_fn) or isinstance(model_fn, nn.Module):
            raise TypeError(
                f"`model_fn` must be callable, it is a {type(model_fn).__name__}: pass a function"
                " that makes a new network, such as `lambda: Net()`"
            )
        self.num_models = common.positive_int(num_models, "num_models")
        members = [model_fn() for _ in range(num_models)]
        for i, member in enumerate(members):
            common.check_module(member, f"model_fn() number {i}")
            for j in range(i):
                _check_independent(members[j], member, j, i)
        self.models = nn.ModuleList(members)

    def forward(self, x: Any, model_idx: int | None = None) -> Any:
        """One member's output, or the average output of all.

        Runs the members as they are: in their own modes, with gradients.

        Args:
            x: inputs as in `predict`.
            model_idx: which member. None: the average over all.
        """
        if model_idx is not None:
            return common.call(self.models[model_idx], x)
        stacked = trees.stack([common.call(member, x) for member in self.models])
        return trees.tensor_map(lambda outputs: outputs.mean(0), stacked)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        return_samples: bool = False,
        normalize_output: bool = True,
        *,
        return_all: bool = False,
        key: KeyLike | None = None,
        num_samples: int | None = None,
        chunk_size: int | None = None,
    ) -> Moments:
        """Predicts with the members as samples.

        Args:
            x: inputs `[batch, ...]`, a tensor or a pytree of tensors; a tuple is passed to
                the network as positional arguments.
            return_samples: whether the members' predictions are returned as well.
            normalize_output: whether softmax over the last axis is applied to each member's
                output, and to each tensor of a dict or tuple, that is 2-D with more than one
                column.
            return_all: deprecated name of `return_samples`.
            key: used with `num_samples` only. None: drawn from torch's global generator.
            num_samples: how many members to draw, in random order. None: each once, in order.
            chunk_size: most members in one batched pass. None: what fits into memory.

        Returns:
            `(mean, variance)`, or `(mean, variance, samples)`.

        Raises:
            ValueError: an argument is out of range.

        Warns:
            DeprecationWarning: `return_all` was given.
        """
        if return_all:
            warnings.warn(
                "`return_all` is deprecated, use `return_samples`",
                DeprecationWarning,
                stacklevel=2,
            )
        if num_samples is not None:
            common.positive_int(num_samples, "num_samples")
        drawn = None if num_samples is None else common.key_or_draw(key)
        return_samples = return_samples or return_all
        members = list(self.models)
        common_network = self._network.get(self.models, None, lambda: _common_network(members))
        if common_network is not None:
            model, tensors = common_network
            return self._predict(
                model,
                _posterior(*tensors),
                x,
                return_samples=return_samples,
                normalize_output=normalize_output,
                key=drawn,
                num_samples=num_samples,
                chunk_size=chunk_size,
            )
        return _predict_one_by_one(
            members,
            x,
            return_samples=return_samples,
            normalize_output=normalize_output,
            key=drawn,
            num_samples=num_samples,
        )

    def train_member(
        self,
        model_idx: int,
        train_loader: Any,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        num_epochs: int = 10,
        device: torch.device | str | None = None,
    ) -> None:
        """Trains one member in place.

        The member trains in training mode and has its own mode again afterwards.

        Args:
            model_idx: which member.
            train_loader: iterable of `(inputs, targets)` pairs, gone through once an epoch.
            optimizer: holds parameters of this member.
            criterion: `criterion(outputs, targets)`, a scalar loss.
            num_epochs: passes over the data.
            device: where to train; the member moves there. None: where the member is, but
                a member on the CPU moves to CUDA if there is one, as published.

        Raises:
            ValueError: `optimizer` holds no trainable parameter of the member, the loader
                yields nothing, or the loss is not finite. Member and optimizer are then what
                they were before the call.
        """
        member = self.models[model_idx]
        if isinstance(num_epochs, bool) or not isinstance(num_epochs, int) or num_epochs < 0:
            raise ValueError(f"`num_epochs` is {num_epochs!r}, expected an integer of at least 0")
        device = common.training_device(member, device)
        member.to(device)
        trainable = {id(p) for p in member.parameters() if p.requires_grad}
        if not any(id(p) in trainable for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"`optimizer` holds no trainable parameter of member {model_idx}, so nothing would"
                f" train: make it from `ensemble.models[{model_idx}].parameters()`"
            )
        modes = [(module, module.training) for module in member.modules()]
        tensors = [*member.parameters(), *member.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        optimizer_before = copy.deepcopy(optimizer.state_dict())
        try:
            member.train()
            with torch.enable_grad():
                for epoch in range(num_epochs):
                    _train_epoch(member, train_loader, optimizer, criterion, device, epoch)
        except Exception:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            optimizer.load_state_dict(optimizer_before)
            raise
        finally:
            for module, mode in modes:
                module.training = mode

    def train_all(
        self,
        train_loader: Any,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        criterion: Callable[[Any, Any], Tensor] | None = None,
        num_epochs: int = 10,
        device: torch.device | str | None = None,
        *,
        likelihood: Any = "classification",
        key: KeyLike | None = None,
        bootstrap: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Trains all members in place, in one vectorised step a batch.

        Args:
            train_loader: iterable of `(inputs, targets)` pairs, gone through once an epoch and
                shared by the members.
            optimizer: makes an elementwise optimizer of a list of tensors, the members'
                parameters stacked; e.g. `torch.optim.Adam` itself, or
                `lambda leaves: torch.optim.SGD(leaves, lr=0.1)`.
            criterion: `criterion(outputs, targets)`, a scalar loss of one member; must work
                under `torch.func.vmap`. None: the negative log likelihood.
            num_epochs: passes over the data.
            device: as in `train_member`, for all members.
            likelihood: "classification", "regression" (unit variance), or one of
                `funcbayes.likelihoods`. Not used if there is a criterion.
            key: what dropout masks and resampled rows are drawn from. None: a key drawn from
                torch's global generator.
            bootstrap: whether each member sees its own resample of every batch.
            callback: called after each step with the number of steps done and the members'
                losses `[members]`.

        Raises:
            TypeError: `optimizer` does not make an optimizer, or one that is not elementwise.
            ValueError: the members differ in architecture or share parameters, the loader
                yields nothing, targets do not fit, or a loss is not finite. The members are
                then what they were before the call.
        """
        members = list(self.models)
        device = common.training_device(members[0], device)
        self.to(device)
        model, state = ensemble.from_modules(members)
        if criterion is not None:
            likelihood = common.Criterion(criterion)  # pyright: ignore[reportAbstractUsage]
        state = ensemble.fit(
            model,
            state,
            common.OnDevice(train_loader, device, "train_loader"),
            key=common.key_or_draw(key),
            likelihood=common.resolve_likelihood(likelihood),
            optimizer=optimizer,
            num_epochs=common.positive_int(num_epochs, "num_epochs"),
            bootstrap=bootstrap,
            callback=callback,
        )
        trained = {**state.constants, **state.params}
        with torch.no_grad():
            for i, member in enumerate(members):
                for name, tensor in (*member.named_parameters(), *member.named_buffers()):
                    tensor.copy_(trained[name][i])

    def diversity(self, x: Any, **options: Any) -> Any:
        """Disagreement of the members: their variance, averaged over the last axis.

        Args:
            x: inputs as in `predict`.
            **options: `normalize_output` and others as in `predict`.

        Returns:
            `[batch]` (without the last axis of the output).
        """
        variance = self.predict(x, **options)[1]
        return trees.tensor_map(lambda v: v.mean(-1), variance)


@torch.no_grad()
def _predict_one_by_one(
    members: list[nn.Module],
    x: Any,
    *,
    return_samples: bool,
    normalize_output: bool,
    key: Key | None,
    num_samples: int | None,
) -> Moments:
    if key is not None and num_samples is not None:
        order = Empirical({"member": torch.arange(len(members), device="cpu")}, {})
        chosen = order.sample(key, num_samples)["member"].tolist()
    else:
        chosen = range(len(members))
    models = {i: Model.from_module(members[i], bayesian=common.every) for i in set(chosen)}
    outputs = {i: model.apply(model.params, x) for i, model in models.items()}
    samples = trees.stack([outputs[i] for i in chosen])
    if normalize_output:
        samples = trees.tensor_map(softmax_of_logits, samples)
    mean = trees.tensor_map(lambda s: s.mean(0), samples)
    ddof = min(1, len(chosen) - 1)
    variance = trees.tensor_map(lambda s: s.var(0, correction=ddof), samples)
    return (mean, variance, samples) if return_samples else (mean, variance)


def _check_independent(a: nn.Module, b: nn.Module, i: int, j: int) -> None:
    own = [{id(p) for p in module.parameters()} for module in (a, b)]
    if a is b or (own[0] and own[0] == own[1]):
        what = "the same object" if a is b else "modules that share all of their parameters"
        raise ValueError(
            f"`model_fn` returned {what} for members {i} and {j}, so they would always agree: let"
            " it make a new network at each call"
        )


def _train_epoch(
    member: nn.Module,
    train_loader: Any,
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Any, Any], Tensor],
    device: torch.device,
    epoch: int,
) -> None:
    for number, (x, y) in enumerate(common.OnDevice(train_loader, device, "train_loader")):
        optimizer.zero_grad()
        loss = criterion(common.call(member, x), y)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss is {loss.item()} in epoch {epoch}, batch {number}, expected a finite"
                " number: check the data, or lower the learning rate"
            )
        loss.backward()
        optimizer.step()


_Lists = dict[str, list[Tensor]]
# Numbers that take less time to stack at once than to look after one by one.
_STACKED_UP_TO = 2**20


def _common_network(members: list[nn.Module]) -> tuple[Model, tuple[_Lists, _Lists]] | None:
    """The function that all members compute with their own tensors; None if they differ.

    Returns:
        A model of the first member, and by name all members' live parameters and buffers.
    """
    if not all(_same_network(members[0], member) for member in members[1:]):
        return None
    params: _Lists = {}
    buffers: _Lists = {}
    for member in members:
        for lists, named in (
            (params, member.named_parameters()),
            (buffers, member.named_buffers()),
        ):
            for name, tensor in named:
                lists.setdefault(name, []).append(tensor.detach())
    return Model.from_module(members[0], bayesian=common.every), (params, buffers)


def _posterior(params: _Lists, constants: _Lists) -> "Empirical | _LiveMembers":
    """The members as they are now.

    What is stacked is never kept: values may change in place, and not all ways leave a trace.
    """
    if sum(leaf.numel() for members in params.values() for leaf in members) > _STACKED_UP_TO:
        return _LiveMembers(params, constants)
    with torch.no_grad():
        return Empirical(
            *({k: torch.stack(v) for k, v in lists.items()} for lists in (params, constants))
        )


class _LiveMembers(NamedTuple):
    """Members as a posterior that stacks no more than the samples that run together.

    Attributes:
        params: by name, one tensor a member.
        constants: likewise.
    """

    params: _Lists
    constants: _Lists

    @property
    def num_members(self) -> int:
        return len(next(iter(self.params.values())))

    @property
    def draw_size(self) -> int:
        return 0

    def draw(self, key: KeyLike | None, start: int, stop: int, out: Tensor | None = None) -> Draws:
        """Samples start … stop − 1, as `Empirical.draw` has it; one alone is not copied."""
        rows: Sequence[int] = range(start, stop)
        if key is not None:
            rows = drawn_members(key, start, stop, self.num_members).tolist()

        def chosen(members: list[Tensor]) -> Tensor:
            if len(rows) == 1:
                return members[rows[0]].detach().unsqueeze(0)
            return torch.stack([members[i].detach() for i in rows])

        params, constants = ({k: chosen(v) for k, v in t.items()} for t in self)
        return Draws(params, constants or None, None)


def _same_network(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules compute one function of their parameters and buffers.

    Where that cannot be known (an attribute that does not compare), the answer is no.
    """
    for (name_a, part_a), (name_b, part_b) in zip_longest(
        a.named_modules(), b.named_modules(), fillvalue=(None, None)
    ):
        if name_a != name_b or type(part_a) is not type(part_b):
            return False
        own, other = vars(part_a), vars(part_b)
        if own.keys() != other.keys():
            return False
        for key, value in own.items():
            if key in ("_parameters", "_buffers"):
                same = _formats(value) == _formats(other[key])
            else:
                same = key in ("_modules", "training") or _equal(value, other[key])
            if not same:
                return False
    return True


def _formats(tensors: dict[str, Tensor | None]) -> list[Any]:
    return [
        (name, None if t is None else (t.shape, t.dtype, t.device)) for name, t in tensors.items()
    ]


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    try:
        return bool(a == b)
    except Exception:  # anything may refuse to be compared
        return False
