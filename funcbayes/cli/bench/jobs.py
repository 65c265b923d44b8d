"""What is timed: each cell does one job by the plain Python loop and by funcbayes."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from funcbayes.cli.bench.agreement import (
    flat,
    moments,
    moments_difference,
    prediction_difference,
    tensor_difference,
)
from funcbayes.cli.bench.networks import NETWORKS, Network
from funcbayes.core import random, trees
from funcbayes.core.likelihoods import Categorical
from funcbayes.core.model import Model
from funcbayes.curvature import empirical_fisher
from funcbayes.inference import dropout, ensemble, swag
from funcbayes.prediction import predict

NUM_SAMPLES = 10
NUM_MEMBERS = 5
BATCHES = (8, 32)
LOOP = "plain loop"
# The side of funcbayes that a user gets without asking for another.
DEFAULT = "funcbayes"
STRATEGIES = ("vmap", "loop", "threads")

TITLES = {
    "swag": f"Prediction with a SWAG posterior, {NUM_SAMPLES} samples",
    "dropout": f"Prediction with Monte Carlo dropout, {NUM_SAMPLES} samples",
    "fisher": "Diagonal empirical Fisher of one batch",
    "ensemble": f"One training step of an ensemble, {NUM_MEMBERS} members",
}


class Plan(NamedTuple):
    """A cell that is ready to run.

    Attributes:
        sides: what is timed, by name; the plain loop first.
        differ: how what a side of funcbayes returned differs from what the loop returned, or
            None where they are the same.
    """

    sides: dict[str, Callable[[], Any]]
    differ: Callable[[Any, Any], str | None]


class Cell(NamedTuple):
    """A job on one network and one batch size.

    Attributes:
        job: what is done, a key of `TITLES`.
        network: a key of `NETWORKS`.
        batch: how many inputs.
        plan: builds it.
    """

    job: str
    network: str
    batch: int
    plan: Callable[[], Plan]


class Setting(NamedTuple):
    """What a cell is built from.

    Attributes:
        network: the network.
        x: inputs.
        y: labels.
        device: where all tensors are.
        toy: whether the networks have a few units only.
    """

    network: Network
    x: Tensor
    y: Tensor
    device: torch.device
    toy: bool

    def build(self, *, dropout: bool = False, seed: int = 0) -> nn.Module:
        """The network, on its device."""
        return self.network.build(dropout=dropout, toy=self.toy, seed=seed).to(self.device)

    @property
    def tolerance(self) -> float:
        """Of relative differences: convolutions on CUDA round to TF32."""
        return 1e-3 if self.device.type == "cpu" else 1e-2


def all_cells(device: torch.device, *, toy: bool = False) -> Iterator[Cell]:
    """Every job on every network and batch size."""
    plans = {"swag": _swag, "dropout": _dropout, "fisher": _fisher, "ensemble": _ensemble}
    for job, make in plans.items():
        for name, network in NETWORKS.items():
            for batch in BATCHES:
                plan = partial(_plan, make, network, batch, device, toy=toy)
                yield Cell(job, name, batch, plan)


def _plan(
    make: Callable[[Setting], Plan],
    network: Network,
    batch: int,
    device: torch.device,
    *,
    toy: bool,
) -> Plan:
    x, y = network.inputs(min(batch, 4) if toy else batch, toy=toy)
    return make(Setting(network, x.to(device), y.to(device), device, toy))


def _predictions(model: Model, posterior: Any, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The sides of funcbayes, one a strategy."""

    def side(strategy: Any) -> Callable[[], Any]:
        return lambda: predict(
            model,
            posterior,
            x,
            key=0,
            num_samples=NUM_SAMPLES,
            likelihood=Categorical(),
            strategy=strategy,
        )

    return {DEFAULT: side("auto"), **{name: side(name) for name in STRATEGIES}}


def _mean_and_variance(probs: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(probs)
    return stacked.mean(0), stacked.var(0)


def _swag(setting: Setting) -> Plan:
    net, x = setting.build(), setting.x
    model = Model.from_module(net)
    state = swag.init(model.params, max_rank=5)
    for i in range(8):
        key = random.fold_in(random.key(1), i)

        def near(p: Tensor, key: Any = key) -> Tensor:
            noise = random.normal(key, p.shape, dtype=p.dtype, device=p.device)
            return p + 0.05 * (p.abs().mean() + 1e-3) * noise

        state = swag.update(state, trees.tree_map(near, model.params))
    posterior = swag.posterior(state)
    key = random.key(0)

    @torch.no_grad()
    def loop() -> tuple[Tensor, Tensor]:
        probs = []
        for i in range(NUM_SAMPLES):
            # The same draws as those of `predict`, so that the sides can be compared.
            params = trees.index(posterior.draw(key, i, i + 1).params, 0)
            probs.append(functional_call(net, params, (x,)).softmax(-1))
        return _mean_and_variance(probs)

    def differ(ours: Any, theirs: tuple[Tensor, Tensor]) -> str | None:
        return moments_difference(moments(ours), theirs, setting.tolerance)

    return Plan({LOOP: loop, **_predictions(model, posterior, x)}, differ)


def _dropout(setting: Setting) -> Plan:
    net, x = setting.build(dropout=True), setting.x
    model = Model.from_module(net)
    # No network here has anything but dropout that training mode changes.
    active = copy.deepcopy(net).train()

    @torch.no_grad()
    def loop() -> tuple[Tensor, Tensor]:
        return _mean_and_variance([active(x).softmax(-1) for _ in range(NUM_SAMPLES)])

    def differ(ours: Any, theirs: tuple[Tensor, Tensor]) -> str | None:
        # The loop's masks are torch's own and others than those of funcbayes.
        return prediction_difference(moments(ours), theirs, num_samples=NUM_SAMPLES)

    return Plan({LOOP: loop, **_predictions(model, dropout.posterior(model), x)}, differ)


def _fisher(setting: Setting) -> Plan:
    net, x, y = setting.build(), setting.x, setting.y
    model = Model.from_module(net)
    params = list(net.parameters())

    def loop() -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in params]
        for i in range(len(x)):
            loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
            for total, grad in zip(sums, torch.autograd.grad(loss, params), strict=True):
                total.addcmul_(grad, grad)
        return sums

    def differ(ours: dict[str, Tensor], theirs: list[Tensor]) -> str | None:
        return tensor_difference(flat(ours.values()), flat(theirs), setting.tolerance)

    def ours() -> dict[str, Tensor]:
        return empirical_fisher(model, (x, y), Categorical()).diagonal(model.params)

    return Plan({LOOP: loop, DEFAULT: ours}, differ)


def _ensemble(setting: Setting) -> Plan:
    x, y = setting.x, setting.y
    nets = [setting.build(seed=i) for i in range(NUM_MEMBERS)]
    model, state = ensemble.from_modules(nets)
    for net in nets:
        net.train()
    adams = [torch.optim.Adam(net.parameters(), fused=True) for net in nets]

    # Both return gradients that the next step replaces and does not write to.
    def loop() -> list[list[Tensor]]:
        grads = []
        for net, adam in zip(nets, adams, strict=True):
            adam.zero_grad()
            F.cross_entropy(net(x), y).backward()
            adam.step()
            grads.append([_grad(p) for p in net.parameters()])
        return grads

    params = trees.tree_map(lambda p: p.requires_grad_(), trees.clone(state.params))
    adam = torch.optim.Adam(trees.leaves(params), fused=True)

    def step() -> list[Tensor]:
        adam.zero_grad()
        stacked = ensemble.EnsembleState(params, state.constants)
        losses, _ = ensemble.losses(model, stacked, (x, y), key=0, likelihood=Categorical())
        losses.sum().backward()
        adam.step()
        return [_grad(p) for p in params.values()]

    def differ(ours: list[Tensor], theirs: list[list[Tensor]]) -> str | None:
        stacked = map(torch.stack, zip(*theirs, strict=True))
        return tensor_difference(flat(ours), flat(stacked), setting.tolerance)

    return Plan({LOOP: loop, DEFAULT: step}, differ)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
