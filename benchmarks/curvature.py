"""Cells of curvature: Fisher and GGN, diagonal and by Kronecker factors, and what follows."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcbayes as fb
from benchmarks import peers
from benchmarks.models import Setting
from benchmarks.peers import BASELINE
from benchmarks.plans import CLASS, DECOMPOSED, FUNCTION, LOOP, OURS, Plan, Side
from funcbayes.cli.bench.agreement import flat, moments_difference, tensor_difference

LIKELIHOOD = fb.likelihoods.Categorical()


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


def plan_fisher(model_name: str, num: int, setting: Setting) -> Plan:
    num = 4 if setting.toy else num
    net = setting.build(model_name)
    x, y = setting.inputs(model_name, num)
    loader = OneBatch(x, y)
    plan = Plan(agree=partial(tensor_difference, tolerance=tolerance(model_name, setting)))

    def class_side(library, prior_precision: float) -> Side:
        laplace = library.LaplaceApproximation(copy.deepcopy(net), prior_precision=prior_precision)

        def fit():
            laplace.fit(loader, device=setting.device)
            return laplace.posterior_precision

        return Side(fit, lambda precision: num * flat(precision.values()))

    # A prior precision of 1 would drown the Fisher's small entries in float32; ours
    # refuses 0.
    plan.add_peer(BASELINE, "incerto.bayesian", partial(class_side, prior_precision=0.0))
    plan.sides[CLASS] = class_side(fb, prior_precision=1e-20)
    model = fb.Model.from_module(net)
    plan.sides[FUNCTION] = Side(
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
    own = {BASELINE, CLASS, FUNCTION, "one gradient"}
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


def tolerance(model_name: str, setting: Setting) -> float:
    """How far two sides may differ, in norm."""
    # On the ResNet, either side's largest entries are off their values in float64 by a per cent,
    # where the two agree to 1e-15 (measured); elsewhere float32 keeps the usual tolerance.
    return 1e-2 if model_name.startswith("resnet") else setting.tolerance


# GGN


def plan_ggn(model_name: str, num: int, setting: Setting) -> Plan:
    """The exact diagonal GGN of one batch."""
    num = 4 if setting.toy else num
    net = setting.build(model_name)
    x, y = setting.inputs(model_name, num)
    plan = Plan(
        baseline=LOOP, agree=partial(tensor_difference, tolerance=tolerance(model_name, setting))
    )
    theirs = copy.deepcopy(net)
    plan.sides[LOOP] = Side(lambda: loop_ggn(theirs, x), flat)
    model = fb.Model.from_module(net)
    plan.sides[FUNCTION] = Side(
        lambda: fb.curvature.ggn(model, (x, y), LIKELIHOOD),
        lambda curvature: flat(curvature.diagonal(model.params).values()),
    )
    plan.add_peer("BackPACK", "backpack", lambda lib: backpack_ggn_side(lib, net, x, y))
    add_laplace_torch(plan, "DiagLaplace", net, OneBatch(x, y), lambda la: la.H.detach())
    return plan


def loop_ggn(net: nn.Module, x: Tensor) -> list[Tensor]:
    """A datum at a time, a column of the root of the softmax's Hessian at a time."""
    params = list(net.parameters())
    total = [torch.zeros_like(p) for p in params]
    for datum in x.split(1):
        logits = net(datum)
        probs = logits.detach().softmax(-1)[0]
        root = probs.sqrt().diag() - torch.outer(probs, probs.sqrt())
        for column in root.T:
            grads = torch.autograd.grad(logits, params, column[None], retain_graph=True)
            for sums, g in zip(total, grads, strict=True):
                sums += g.square()
    return total


def backpack_ggn_side(backpack, net: nn.Module, x: Tensor, y: Tensor) -> Side:
    extensions, _ = peers.load("backpack.extensions")
    if any(isinstance(module, nn.TransformerEncoder) for module in net.modules()):
        raise TypeError("BackPACK has no rule for attention")
    theirs = backpack.extend(copy.deepcopy(net))
    loss_function = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def call():
        theirs.zero_grad()
        loss = loss_function(theirs(x), y)
        with backpack.backpack(extensions.DiagGGNExact()):
            loss.backward()
        return [p.diag_ggn_exact for p in theirs.parameters()]

    return Side(call, flat)


def add_laplace_torch(
    plan: Plan, structure: str, net: nn.Module, loader: "OneBatch", value: Callable[[Any], Tensor]
) -> None:
    """A side for each backend that has the exact GGN; all are rivals, with BackPACK."""

    def side(curvature: Any, backend: str) -> Side:
        laplace, _ = peers.load("laplace")
        theirs = getattr(laplace, structure)(
            copy.deepcopy(net), "classification", backend=getattr(curvature, backend)
        )

        def call():
            theirs.fit(loader)
            return theirs

        return Side(call, value)

    for backend, module in (
        ("CurvlinopsGGN", "curvlinops"),
        ("BackPackGGN", "backpack"),
        ("AsdlGGN", "asdl"),
    ):
        name = f"laplace-torch {backend}"
        if structure == "DiagLaplace" and module == "curvlinops":
            # The diagonal of a linear operator, entry by entry: a minute for the MLP.
            plan.absent[name] = "left out: far slower than the plain loop"
            continue
        plan.add_peer(name, f"laplace.curvature.{module}", partial(side, backend=backend))
    plan.rivals = plan.secondary = tuple(n for n in plan.sides if n not in OURS and n != LOOP)


def plan_kfac(model_name: str, num: int, setting: Setting) -> Plan:
    """Kronecker factors of the exact GGN of one batch, which the peer decomposes at once."""
    num = 4 if setting.toy else num
    net = setting.build(model_name)
    x, y = setting.inputs(model_name, num)
    plan = Plan(
        baseline=None, agree=partial(tensor_difference, tolerance=tolerance(model_name, setting))
    )
    model = fb.Model.from_module(net)

    def fit() -> Any:
        return fb.laplace.fit(model, (x, y), likelihood=LIKELIHOOD, structure="kronecker")

    def value(state: Any) -> Tensor:
        return flat(state.curvature.diagonal(model.params).values())

    plan.sides[FUNCTION] = Side(fit, value)
    plan.sides[DECOMPOSED] = Side(lambda: fb.laplace.decompose(fit()), value)
    add_laplace_torch(plan, "KronLaplace", net, OneBatch(x, y), lambda la: la.H.diag().detach())
    return plan


# The linearised predictive


def plan_linearized(model_name: str, structure: str, num: int, setting: Setting) -> Plan:
    """Means and covariances of the outputs under a Laplace approximation that is fitted."""
    num = 3 if setting.toy else num
    net = setting.build(model_name)
    x, _ = setting.inputs(model_name, num)
    data = setting.inputs(model_name, 4, seed=2)
    plan = Plan(
        baseline=None, agree=partial(moments_difference, tolerance=tolerance(model_name, setting))
    )
    last_layer = structure == "last-layer"
    *_, (head, _) = (pair for pair in net.named_modules() if isinstance(pair[1], nn.Linear))
    model = fb.Model.from_module(
        net, bayesian=(lambda name: name.startswith(head)) if last_layer else (lambda name: True)
    )
    state = fb.laplace.fit(
        model, data, likelihood=LIKELIHOOD, structure="dense" if last_layer else structure
    )
    posterior = fb.laplace.posterior(state, prior_precision=10.0)
    plan.sides[FUNCTION] = Side(
        lambda: fb.linearized(model, posterior, x),
        lambda predictive: (predictive.mean, predictive.covariance),
    )

    def theirs(laplace: Any) -> Side:
        kinds = {
            "diagonal": laplace.DiagLaplace,
            "kronecker": laplace.KronLaplace,
            "last-layer": laplace.FullLLLaplace,
        }
        la = kinds[structure](copy.deepcopy(net), "classification", prior_precision=10.0)
        la.fit(OneBatch(*data))
        return Side(
            lambda: la._glm_predictive_distribution(x),
            lambda result: tuple(tensor.detach() for tensor in result),
        )

    plan.add_peer("laplace-torch", "laplace", theirs)
    plan.rivals = plan.secondary = tuple(n for n in plan.sides if n != FUNCTION)
    return plan
