"""What is timed: each cell does one job in several ways, the plain loop among them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcbayes as fb
from benchmarks import models, peers
from benchmarks.peers import BASELINE
from funcbayes.cli.bench.agreement import (
    flat,
    moments,
    moments_difference,
    prediction_difference,
    tensor_difference,
)

NUM_SAMPLES = 20
CLASS = "class"
AUTO = "auto"
STRATEGIES = ("vmap", "loop", "threads")
# The sides that are ours: they must run and agree with the baseline. The last stands for
# all of a cell's where it could not even be built.
OURS = (CLASS, AUTO, "function", "step", *STRATEGIES, "funcbayes")


class Side(NamedTuple):
    """One way of doing a cell's job.

    Attributes:
        call: what is timed.
        value: takes what `call` returned to the tensors that `Plan.agree` compares; not
            timed. None: there is nothing to compare.
    """

    call: Callable[[], Any]
    value: Callable[[Any], Any] | None = None


@dataclass
class Plan:
    """A cell that is ready to run.

    Attributes:
        sides: by name, the baseline (where it is installed) first.
        absent: sides that cannot run here, and why.
        agree: how two values differ, or None where they are of one and the same quantity.
        secondary: sides that may be timed in fewer rounds.
        rivals: other libraries, the fastest of which is a second thing to compare with.
    """

    sides: dict[str, Side] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    agree: Callable[[Any, Any], str | None] | None = None
    secondary: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    def add_peer(self, name: str, module: str, make: Callable[[Any], Side]) -> None:
        """Adds a side of another library, or the reason why there is none."""
        peer, reason = peers.load(module)
        if peer is None:
            self.absent[name] = reason
            return
        try:
            self.sides[name] = make(peer)
        except Exception as error:
            self.absent[name] = peers.one_line(error)


@dataclass(frozen=True)
class Cell:
    """A job.

    Attributes:
        name: group, method, model and size, joined by slashes.
        plan: builds it; True for a toy size, which the tests use.
        seconds: time to spend on it.
        in_quick: whether a quick run has it.
        memory: sides whose peak memory is measured, each in its own process.
    """

    name: str
    plan: Callable[[bool], Plan]
    seconds: float
    in_quick: bool = True
    memory: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


# Prediction with sampled weights


def plan_swag(model_name: str, num: int, strategies: Sequence[str], toy: bool) -> Plan:
    num, num_samples = (4, 3) if toy else (num, NUM_SAMPLES)
    net = models.build(model_name, toy=toy)
    x, _ = models.inputs(model_name, num, toy=toy)
    plan = Plan(
        agree=partial(prediction_difference, num_samples=num_samples), secondary=tuple(strategies)
    )

    def incerto_side(incerto) -> Side:
        swag = incerto.SWAG(copy.deepcopy(net), num_samples=num_samples)
        for iterate in trajectory(net):
            swag.collect_model(iterate)
        return Side(lambda: swag.predict(x), moments)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)

    ours = fb.SWAG(copy.deepcopy(net), num_samples=num_samples)
    model = fb.Model.from_module(net)
    state = fb.swag.init(model.params)
    for iterate in trajectory(net):
        ours.collect_model(iterate)
        state = fb.swag.update(state, fb.Model.from_module(iterate).params)
    plan.sides[CLASS] = Side(lambda: ours.predict(x), moments)
    posterior = fb.swag.posterior(state, var_clamp=1e-6)
    add_strategies(plan, model, posterior, x, num_samples, (AUTO, *strategies))
    return plan


def plan_laplace(model_name: str, num: int, toy: bool) -> Plan:
    num, num_samples = (4, 3) if toy else (num, NUM_SAMPLES)
    net = models.build(model_name, toy=toy)
    x, _ = models.inputs(model_name, num, toy=toy)
    plan = Plan(agree=partial(prediction_difference, num_samples=num_samples))
    # The precision is all that the timing depends on, and only through the size of the
    # noise (std 0.01): a few data are enough to fit.
    data = [models.inputs(model_name, 4, toy=toy, seed=2)]
    prior_precision = 1e4

    def fitted(library) -> Side:
        laplace = library.LaplaceApproximation(
            copy.deepcopy(net), prior_precision=prior_precision, num_samples=num_samples
        )
        laplace.fit(data, device="cpu")
        return Side(lambda: laplace.predict(x), moments)

    plan.add_peer(BASELINE, "incerto.bayesian", fitted)
    plan.sides[CLASS] = fitted(fb)
    model = fb.Model.from_module(net)
    state = fb.laplace.fit(
        model, data, likelihood=fb.likelihoods.Categorical(), curvature="empirical_fisher"
    )
    posterior = fb.laplace.posterior(state, prior_precision=prior_precision)
    add_strategies(plan, model, posterior, x, num_samples, (AUTO,))
    return plan


def add_strategies(
    plan: Plan,
    model: fb.Model,
    posterior: Any,
    x: Tensor,
    num_samples: int | None,
    strategies: Iterable[str],
) -> None:
    likelihood = fb.likelihoods.Categorical()
    for strategy in strategies:
        call = partial(
            fb.predict,
            model,
            posterior,
            x,
            key=0,
            num_samples=num_samples,
            likelihood=likelihood,
            strategy=strategy,
        )
        plan.sides[strategy] = Side(call, moments)


def trajectory(net: nn.Module) -> Iterator[nn.Module]:
    """Five iterates about the network's weights, some per cent of them apart."""
    generator = torch.Generator().manual_seed(3)
    start = [p.detach().clone() for p in net.parameters()]
    iterate = copy.deepcopy(net)
    for _ in range(5):
        with torch.no_grad():
            for p, center in zip(iterate.parameters(), start, strict=True):
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(center + 0.05 * (center.abs().mean() + 1e-3) * noise)
        yield iterate


# Monte Carlo dropout


def plan_dropout(model_name: str, num: int, toy: bool) -> Plan:
    num, num_samples = (4, 3) if toy else (num, NUM_SAMPLES)
    net = models.build(model_name, dropout=True, toy=toy)
    x, _ = models.inputs(model_name, num, toy=toy)
    agree = partial(prediction_difference, num_samples=num_samples)
    plan = Plan(agree=agree, secondary=STRATEGIES)

    def incerto_side(incerto) -> Side:
        theirs = copy.deepcopy(net)
        if model_name == "transformer":
            # In eval mode its fused path has no dropout, so the loop would be faster and
            # its variance zero. There is no batch norm that train mode would disturb.
            theirs.train()
        mc_dropout = incerto.MCDropout(theirs, num_samples=num_samples, dropout_rate=0.1)
        return Side(lambda: mc_dropout.predict(x), moments)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    ours = fb.MCDropout(copy.deepcopy(net), num_samples=num_samples, dropout_rate=0.1)
    plan.sides[CLASS] = Side(lambda: ours.predict(x), moments)
    model = fb.Model.from_module(net)
    posterior = fb.dropout.posterior(model, rate=0.1)
    add_strategies(plan, model, posterior, x, num_samples, (AUTO, *STRATEGIES))
    return plan


# Diagonal Fisher


class OneBatch:
    """A loader of one batch that is collated already, with the `dataset` that some ask for."""

    def __init__(self, x: Tensor, y: Tensor):
        self.dataset = range(len(x))
        self.batch = (x, y)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch])

    def __len__(self) -> int:
        return 1


def plan_fisher(model_name: str, num: int, toy: bool) -> Plan:
    num = 4 if toy else num
    net = models.build(model_name, toy=toy)
    x, y = models.inputs(model_name, num, toy=toy)
    loader = OneBatch(x, y)
    # On the ResNet, either side's largest entries are off their values in float64 by a per cent,
    # where the two agree to 1e-15 (measured); elsewhere float32 keeps the usual tolerance.
    loose = model_name.startswith("resnet")
    plan = Plan(agree=partial(tensor_difference, tolerance=1e-2 if loose else 1e-3))

    def class_side(library, prior_precision: float) -> Side:
        laplace = library.LaplaceApproximation(copy.deepcopy(net), prior_precision=prior_precision)

        def fit():
            laplace.fit(loader, device="cpu")
            return laplace.posterior_precision

        return Side(fit, lambda precision: num * flat(precision.values()))

    # A prior precision of 1 would drown the Fisher's small entries in float32; ours
    # refuses 0.
    plan.add_peer(BASELINE, "incerto.bayesian", partial(class_side, prior_precision=0.0))
    plan.sides[CLASS] = class_side(fb, prior_precision=1e-20)
    model = fb.Model.from_module(net)
    plan.sides["function"] = Side(
        lambda: fb.laplace.fit(
            model, loader, likelihood=fb.likelihoods.Categorical(), curvature="empirical_fisher"
        ),
        lambda state: flat(state.curvature.diagonal(model.params).values()),
    )

    unit = copy.deepcopy(net)

    def one_gradient():
        unit.zero_grad()
        F.cross_entropy(unit(x), y).backward()

    plan.sides["one gradient"] = Side(one_gradient)
    plan.add_peer("BackPACK", "backpack", lambda backpack: backpack_side(backpack, net, x, y))
    for backend, module in (
        ("CurvlinopsEF", "curvlinops"),
        ("BackPackEF", "backpack"),
        ("AsdlEF", "asdl"),
    ):
        plan.add_peer(
            f"laplace-torch {backend}",
            f"laplace.curvature.{module}",
            lambda curvature, backend=backend: laplace_torch_side(
                getattr(curvature, backend), net, loader
            ),
        )
    if model_name == "mlp":
        plan.add_peer("posteriors", "posteriors", lambda lib: posteriors_side(lib, net, x, y))
    else:
        # `jacrev` over the batch: one call would take longer than all other sides together.
        plan.absent["posteriors"] = "left out: far slower than the plain loop"
    own = {BASELINE, CLASS, "function", "one gradient"}
    plan.rivals = plan.secondary = tuple(name for name in plan.sides if name not in own)
    return plan


def backpack_side(backpack, net: nn.Module, x: Tensor, y: Tensor) -> Side:
    extensions, _ = peers.load("backpack.extensions")
    if any(isinstance(module, nn.TransformerEncoder) for module in net.modules()):
        raise TypeError("BackPACK has no rule for attention")
    theirs = backpack.extend(copy.deepcopy(net))
    loss_function = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def call():
        theirs.zero_grad()
        loss = loss_function(theirs(x), y)
        with backpack.backpack(extensions.SumGradSquared()):
            loss.backward()
        return [p.sum_grad_squared for p in theirs.parameters()]

    return Side(call, flat)


def laplace_torch_side(backend, net: nn.Module, loader: OneBatch) -> Side:
    laplace, _ = peers.load("laplace")
    theirs = laplace.DiagLaplace(copy.deepcopy(net), "classification", backend=backend)

    def call():
        theirs.fit(loader)
        return theirs.H

    return Side(call, lambda values: values.detach())


def posteriors_side(posteriors, net: nn.Module, x: Tensor, y: Tensor) -> Side:
    theirs = copy.deepcopy(net)
    params = {name: p.detach() for name, p in theirs.named_parameters()}

    def log_likelihood(params, batch):
        inputs, labels = batch
        logits = torch.func.functional_call(theirs, params, inputs)
        return -F.cross_entropy(logits, labels, reduction="none"), torch.zeros(())

    transform = posteriors.laplace.diag_fisher.build(log_likelihood, per_sample=True)

    def call():
        return transform.update(transform.init(params), (x, y))[0].prec_diag

    return Side(call, lambda values: flat(values.values()))


# Ensembles


def members(model_name: str, num_members: int, toy: bool) -> list[nn.Module]:
    return [models.build(model_name, toy=toy, seed=seed) for seed in range(num_members)]


def plan_ensemble_predict(model_name: str, num_members: int, num: int, toy: bool) -> Plan:
    num_members, num = (3, 4) if toy else (num_members, num)
    nets = members(model_name, num_members, toy)
    x, _ = models.inputs(model_name, num, toy=toy)
    plan = Plan(agree=moments_difference, secondary=STRATEGIES)

    def ensemble(library) -> Side:
        fresh = iter(copy.deepcopy(nets))
        ensemble = library.DeepEnsemble(lambda: next(fresh), num_models=num_members)
        return Side(lambda: ensemble.predict(x), moments)

    plan.add_peer(BASELINE, "incerto.bayesian", ensemble)
    plan.sides[CLASS] = ensemble(fb)
    model, state = fb.ensemble.from_modules(nets)
    posterior = fb.ensemble.posterior(state)
    add_strategies(plan, model, posterior, x, None, (AUTO, *STRATEGIES))
    return plan


def plan_ensemble_step(model_name: str, num_members: int, num: int, toy: bool) -> Plan:
    """One optimizer step of every member on one batch."""
    num_members, num = (3, 4) if toy else (num_members, num)
    batch = models.inputs(model_name, num, toy=toy)
    plan = Plan()

    def incerto_side(incerto) -> Side:
        fresh = iter(members(model_name, num_members, toy))
        ensemble = incerto.DeepEnsemble(lambda: next(fresh), num_models=num_members)
        optimizers = [torch.optim.Adam(net.parameters()) for net in ensemble.models]
        loss_function = nn.CrossEntropyLoss()

        def call():
            for i, optimizer in enumerate(optimizers):
                ensemble.train_member(i, [batch], optimizer, loss_function, 1, "cpu")

        return Side(call)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    model, state = fb.ensemble.from_modules(members(model_name, num_members, toy))
    params = {name: p.detach().clone().requires_grad_() for name, p in state.params.items()}
    likelihood = fb.likelihoods.Categorical()
    optimizer = torch.optim.Adam(list(params.values()), fused=True)
    constants = state.constants

    def call():
        nonlocal constants
        optimizer.zero_grad()
        losses, constants = fb.ensemble.losses(
            model, fb.ensemble.EnsembleState(params, constants), batch, key=0, likelihood=likelihood
        )
        losses.sum().backward()
        optimizer.step()

    plan.sides["step"] = Side(call)
    return plan


def plan_ensemble_fit(model_name: str, num_members: int, num: int, toy: bool) -> Plan:
    """An epoch of ten batches for every member, from the same start each time."""
    num_members, num, num_batches = (3, 4, 2) if toy else (num_members, num, 10)
    batches = [models.inputs(model_name, num, toy=toy, seed=i) for i in range(num_batches)]
    nets = members(model_name, num_members, toy)
    plan = Plan()

    def incerto_side(incerto) -> Side:
        fresh = iter(copy.deepcopy(nets))
        ensemble = incerto.DeepEnsemble(lambda: next(fresh), num_models=num_members)
        loss_function = nn.CrossEntropyLoss()

        def call():
            for i, net in enumerate(ensemble.models):
                optimizer = torch.optim.Adam(net.parameters())
                ensemble.train_member(i, batches, optimizer, loss_function, 1, "cpu")

        return Side(call)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    model, state = fb.ensemble.from_modules(nets)
    plan.sides["function"] = Side(
        lambda: fb.ensemble.fit(
            model,
            state,
            batches,
            key=0,
            likelihood=fb.likelihoods.Categorical(),
            optimizer=torch.optim.Adam,
            num_epochs=1,
        )
    )
    return plan


def all_cells() -> list[Cell]:
    cells = []
    both = (BASELINE, AUTO)
    forward = {
        "mlp": (1, 16, 128, 1024),
        "lenet": (1, 16, 128),
        "resnet-w16": (1, 16, 64),
        "transformer": (1, 16, 128),
        "resnet-w64": (1, 16),
    }
    for model_name, sizes in forward.items():
        for num in sizes:
            largest, wide = num == sizes[-1], model_name == "resnet-w64"
            # One vmap over grouped convolutions of that size takes most of a minute.
            strategies = STRATEGIES[1:] if wide and num > 1 else STRATEGIES
            cells.append(
                Cell(
                    f"predict/swag/{model_name}/N={num}",
                    partial(plan_swag, model_name, num, strategies),
                    seconds=20 if wide else 10,
                    in_quick=not wide,
                    memory=both if largest else (),
                )
            )
            cells.append(
                Cell(
                    f"predict/laplace/{model_name}/N={num}",
                    partial(plan_laplace, model_name, num),
                    seconds=15 if wide else 5,
                    # What differs from SWAG's cell is the noise's size alone.
                    in_quick=num == 1 and not wide,
                )
            )
    for model_name, sizes in {**forward, "lenet": (1, 16, 64)}.items():
        if model_name == "resnet-w64":
            continue
        for num in sizes:
            cells.append(
                Cell(
                    f"dropout/{model_name}/N={num}",
                    partial(plan_dropout, model_name, num),
                    seconds=8,
                )
            )
    for model_name, num in (("mlp", 256), ("lenet", 128), ("resnet-w16", 64), ("transformer", 64)):
        cells.append(
            Cell(
                f"fisher/{model_name}/N={num}",
                partial(plan_fisher, model_name, num),
                seconds=20,
                memory=(BASELINE, "function"),
            )
        )
    for model_name, num_members, sizes in (
        ("small-mlp", 5, (1, 16, 128)),
        ("small-mlp", 20, (1, 16, 128)),
        ("lenet", 20, (16,)),
    ):
        for num in sizes:
            cells.append(
                Cell(
                    f"ensemble-predict/{model_name}/M={num_members}/N={num}",
                    partial(plan_ensemble_predict, model_name, num_members, num),
                    seconds=5,
                )
            )
    for model_name, num_members in (("small-mlp", 5), ("small-mlp", 20), ("lenet", 20)):
        for job, plan in (("step", plan_ensemble_step), ("fit", plan_ensemble_fit)):
            if job == "fit" and model_name == "lenet":
                continue
            cells.append(
                Cell(
                    f"ensemble-{job}/{model_name}/M={num_members}/N=64",
                    partial(plan, model_name, num_members, 64),
                    seconds=10,
                )
            )
    return cells
