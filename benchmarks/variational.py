"""One training step of variational inference, by the original classes, by ours, and by peers."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import funcbayes as fb
from benchmarks import peers
from benchmarks.models import Setting
from benchmarks.peers import BASELINE
from benchmarks.plans import CLASS, FUNCTION, Plan, Side
from funcbayes.core import trees

NUM_DRAWS = 5
LEARNING_RATE = 1e-3


def plan_vi_step(num: int, setting: Setting) -> Plan:
    """Loss of five draws, its gradient, and a step of Adam."""
    num = 4 if setting.toy else num
    sizes = (12, [8, 6], 10) if setting.toy else (784, [512, 256], 10)
    x, y = setting.inputs("mlp", num)
    plan = Plan(rivals=("posteriors",))

    def of_class(library: Any) -> Side:
        torch.manual_seed(0)
        net = library.VariationalBayesNN(*sizes).to(setting.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)

        def call() -> None:
            optimizer.zero_grad()
            net.variational_loss(x, y, num_samples=NUM_DRAWS).backward()
            optimizer.step()

        return Side(call)

    plan.add_peer(BASELINE, "incerto.bayesian", of_class)
    plan.sides[CLASS] = of_class(fb)

    net = setting.build("mlp")
    model = fb.Model.from_module(net)
    state = fb.vi.init(model.params)
    leaves = trees.leaves(state)
    optimizer = torch.optim.Adam(leaves, lr=LEARNING_RATE)
    likelihood = fb.likelihoods.Categorical()
    step = 0

    def call() -> None:
        nonlocal step
        optimizer.zero_grad()
        loss, _ = fb.vi.negative_elbo(
            state,
            model,
            (x, y),
            key=fb.random.fold_in(0, step),
            likelihood=likelihood,
            num_data=num,
            num_samples=NUM_DRAWS,
        )
        loss.backward()
        optimizer.step()
        step += 1

    plan.sides[FUNCTION] = Side(call)
    plan.add_peer("posteriors", "posteriors", lambda library: posteriors_side(library, net, x, y))
    return plan


def posteriors_side(posteriors: Any, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Side:
    torchopt, reason = peers.load("torchopt")
    if torchopt is None:
        raise RuntimeError(reason)
    theirs = copy.deepcopy(net)
    params = {name: p.detach().clone() for name, p in theirs.named_parameters()}

    def log_posterior(params: dict[str, torch.Tensor], batch: Any) -> tuple[torch.Tensor, Any]:
        inputs, labels = batch
        logits = torch.func.functional_call(theirs, params, inputs)
        prior = sum(-0.5 * p.square().sum() for p in params.values())
        return -F.cross_entropy(logits, labels) + prior / len(labels), torch.zeros(())

    transform = posteriors.vi.diag.build(
        log_posterior,
        torchopt.adam(lr=LEARNING_RATE),
        temperature=1 / len(y),
        n_samples=NUM_DRAWS,
        init_log_sds=-3.0,
    )
    state = transform.init(params)

    def call() -> None:
        nonlocal state
        state, _ = transform.update(state, (x, y))

    return Side(call)
