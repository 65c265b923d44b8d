"""What is timed: each cell does one job in several ways, the plain loop among them."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import funcbayes as fb
from benchmarks.curvature import plan_fisher, plan_ggn, plan_kfac, plan_linearized
from benchmarks.limits import Work
from benchmarks.models import Setting
from benchmarks.peers import BASELINE
from benchmarks.plans import (
    ACTIVATION,
    AUTO,
    CLASS,
    FUNCTION,
    LOOP,
    STEP,
    STRATEGIES,
    Cell,
    Plan,
    Side,
)
from benchmarks.precision import plan_precision
from benchmarks.variational import plan_vi_step
from funcbayes.cli.bench.agreement import moments, moments_difference, prediction_difference

NUM_SAMPLES = 20

Moments = tuple[Tensor, Tensor]


# Prediction with sampled weights


def plan_swag(
    model_name: str, num: int, num_samples: int, strategies: Sequence[str], setting: Setting
) -> Plan:
    num, num_samples = (4, 3) if setting.toy else (num, num_samples)
    net = setting.build(model_name)
    x, _ = setting.inputs(model_name, num)
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


def plan_laplace(model_name: str, num: int, setting: Setting) -> Plan:
    num, num_samples = (4, 3) if setting.toy else (num, NUM_SAMPLES)
    net = setting.build(model_name)
    x, _ = setting.inputs(model_name, num)
    plan = Plan(agree=partial(prediction_difference, num_samples=num_samples))
    # The precision is all that the timing depends on, and only through the size of the
    # noise (std 0.01): a few data are enough to fit.
    data = [setting.inputs(model_name, 4, seed=2)]
    prior_precision = 1e4

    def fitted(library) -> Side:
        laplace = library.LaplaceApproximation(
            copy.deepcopy(net), prior_precision=prior_precision, num_samples=num_samples
        )
        laplace.fit(data, device=setting.device)
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


def plan_kronecker(model_name: str, num: int, setting: Setting) -> Plan:
    """Samples of a Kronecker-factored Laplace posterior; the original has none."""
    num, num_samples = (4, 3) if setting.toy else (num, NUM_SAMPLES)
    net = setting.build(model_name)
    x, _ = setting.inputs(model_name, num)
    plan = Plan(
        baseline=LOOP,
        agree=partial(prediction_difference, num_samples=num_samples),
        rivals=("laplace-torch",),
    )
    data = setting.inputs(model_name, 32, seed=2)
    prior_precision = 1e4
    model = fb.Model.from_module(net)
    state = fb.laplace.fit(
        model, [data], likelihood=fb.likelihoods.Categorical(), structure="kronecker"
    )
    posterior = fb.laplace.posterior(state, prior_precision=prior_precision)

    def loop() -> Moments:
        stack = posterior.sample(0, num_samples)
        with torch.no_grad():
            outputs = [
                functional_call(net, {name: p[i] for name, p in stack.items()}, (x,))
                for i in range(num_samples)
            ]
            samples = torch.stack(outputs).softmax(-1)
        return samples.mean(0), samples.var(0)

    plan.sides[LOOP] = Side(loop, lambda result: result)
    add_strategies(plan, model, posterior, x, num_samples, (AUTO,))

    def theirs(laplace) -> Side:
        fitted = laplace.Laplace(
            copy.deepcopy(net),
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            prior_precision=prior_precision,
        )
        fitted.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 32))

        def value(samples: Tensor) -> Moments:
            return samples.mean(0), samples.var(0)

        call = partial(fitted.predictive_samples, x, pred_type="nn", n_samples=num_samples)
        return Side(call, value)

    plan.add_peer("laplace-torch", "laplace", theirs)
    return plan


def plan_vi(num: int, setting: Setting) -> Plan:
    """Predictions of a variational network, and by draws of pre-activations."""
    num, num_samples = (4, 3) if setting.toy else (num, NUM_SAMPLES)
    sizes = (12, [8, 6], 10) if setting.toy else (784, [512, 256], 10)
    x, _ = setting.inputs("mlp", num)
    torch.manual_seed(0)
    ours = fb.VariationalBayesNN(*sizes, num_samples=num_samples).to(setting.device)
    plan = Plan(agree=partial(prediction_difference, num_samples=num_samples))

    def incerto_side(incerto) -> Side:
        theirs = incerto.VariationalBayesNN(*sizes, num_samples=num_samples)
        theirs.load_state_dict(ours.state_dict())
        theirs.to(setting.device)
        return Side(lambda: theirs.predict(x), moments)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    plan.sides[CLASS] = Side(lambda: ours.predict(x), moments)
    model, posterior = ours._posterior()
    add_strategies(plan, model, posterior, x, num_samples, (AUTO,))
    call = plan.sides[AUTO].call
    plan.sides[ACTIVATION] = Side(lambda: call(noise="activation"), moments)
    return plan


def plan_swag_update(model_name: str, setting: Setting) -> Plan:
    """One weight iterate taken into the moments."""
    net = setting.build(model_name)
    plan = Plan()

    def incerto_side(incerto) -> Side:
        swag = incerto.SWAG(copy.deepcopy(net))
        return Side(lambda: swag.collect_model(net))

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    ours = fb.SWAG(copy.deepcopy(net))
    plan.sides[CLASS] = Side(lambda: ours.collect_model(net))
    params = fb.Model.from_module(net).params
    state = fb.swag.init(params, max_rank=ours.max_rank)

    def update() -> None:
        nonlocal state
        state = fb.swag.update(state, params)

    plan.sides[FUNCTION] = Side(update)
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
    one = fb.explain(model, posterior, x, num_samples=num_samples)
    touches = 2 if posterior.draw_size else 1
    num_bytes = touches * one.draw_bytes * (1 if posterior_is_fixed(posterior) else one.num_samples)
    operations = one.profile.shared + one.num_samples * one.profile.sampled
    plan.work = Work(operations, num_bytes)


def posterior_is_fixed(posterior: Any) -> bool:
    """Whether all samples have the same parameters, as under dropout masks."""
    return isinstance(posterior, fb.posteriors.DropoutMasks)


def trajectory(net: nn.Module) -> Iterator[nn.Module]:
    """Five iterates about the network's weights, some per cent of them apart."""
    generator = torch.Generator().manual_seed(3)
    start = [p.detach().clone() for p in net.parameters()]
    iterate = copy.deepcopy(net)
    for _ in range(5):
        with torch.no_grad():
            for p, center in zip(iterate.parameters(), start, strict=True):
                noise = torch.randn(p.shape, generator=generator).to(p.device)
                p.copy_(center + 0.05 * (center.abs().mean() + 1e-3) * noise)
        yield iterate


# Monte Carlo dropout


def plan_dropout(model_name: str, num: int, setting: Setting) -> Plan:
    num, num_samples = (4, 3) if setting.toy else (num, NUM_SAMPLES)
    net = setting.build(model_name, dropout=True)
    x, _ = setting.inputs(model_name, num)
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


# Ensembles


def members(model_name: str, num_members: int, setting: Setting) -> list[nn.Module]:
    return [setting.build(model_name, seed=seed) for seed in range(num_members)]


def plan_ensemble_predict(model_name: str, num_members: int, num: int, setting: Setting) -> Plan:
    num_members, num = (3, 4) if setting.toy else (num_members, num)
    nets = members(model_name, num_members, setting)
    x, _ = setting.inputs(model_name, num)
    agree = partial(moments_difference, tolerance=setting.tolerance)
    plan = Plan(agree=agree, secondary=STRATEGIES)

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


def plan_ensemble_step(model_name: str, num_members: int, num: int, setting: Setting) -> Plan:
    """One optimizer step of every member on one batch."""
    num_members, num = (3, 4) if setting.toy else (num_members, num)
    batch = setting.inputs(model_name, num)
    plan = Plan()

    def incerto_side(incerto) -> Side:
        fresh = iter(members(model_name, num_members, setting))
        ensemble = incerto.DeepEnsemble(lambda: next(fresh), num_models=num_members)
        optimizers = [torch.optim.Adam(net.parameters()) for net in ensemble.models]
        loss_function = nn.CrossEntropyLoss()

        def call():
            for i, optimizer in enumerate(optimizers):
                ensemble.train_member(i, [batch], optimizer, loss_function, 1, setting.device)

        return Side(call)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    model, state = fb.ensemble.from_modules(members(model_name, num_members, setting))
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

    plan.sides[STEP] = Side(call)
    return plan


def plan_ensemble_fit(model_name: str, num_members: int, num: int, setting: Setting) -> Plan:
    """An epoch of ten batches for every member, from the same start each time."""
    num_members, num, num_batches = (3, 4, 2) if setting.toy else (num_members, num, 10)
    batches = [setting.inputs(model_name, num, seed=i) for i in range(num_batches)]
    nets = members(model_name, num_members, setting)
    plan = Plan()

    def incerto_side(incerto) -> Side:
        fresh = iter(copy.deepcopy(nets))
        ensemble = incerto.DeepEnsemble(lambda: next(fresh), num_models=num_members)
        loss_function = nn.CrossEntropyLoss()

        def call():
            for i, net in enumerate(ensemble.models):
                optimizer = torch.optim.Adam(net.parameters())
                ensemble.train_member(i, batches, optimizer, loss_function, 1, setting.device)

        return Side(call)

    plan.add_peer(BASELINE, "incerto.bayesian", incerto_side)
    model, state = fb.ensemble.from_modules(nets)
    plan.sides[FUNCTION] = Side(
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
                    partial(plan_swag, model_name, num, NUM_SAMPLES, strategies),
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
    for model_name in ("mlp", "lenet"):
        for num_samples in (5, 100):
            cells.append(
                Cell(
                    f"predict/swag/{model_name}/N=16/S={num_samples}",
                    partial(plan_swag, model_name, 16, num_samples, ()),
                    seconds=8,
                    in_quick=False,
                    in_full_only=True,
                )
            )
        for num in (1, 16):
            cells.append(
                Cell(
                    f"kronecker/{model_name}/N={num}",
                    partial(plan_kronecker, model_name, num),
                    seconds=8,
                )
            )
    for num in (1, 16, 128, 1024):
        cells.append(Cell(f"predict/vi/mlp/N={num}", partial(plan_vi, num), seconds=8))
    for num in (16, 128):
        cells.append(
            Cell(
                f"vi-step/mlp/N={num}",
                partial(plan_vi_step, num),
                seconds=8,
                memory=(BASELINE, FUNCTION, "posteriors") if num == 128 else (),
            )
        )
    for model_name in ("mlp", "lenet", "resnet-w16", "transformer"):
        cells.append(
            Cell(
                f"precision/{model_name}/N=128",
                partial(plan_precision, model_name, 128, NUM_SAMPLES),
                seconds=10,
                in_quick=model_name == "mlp",
            )
        )
    for model_name in ("mlp", "lenet", "resnet-w16", "transformer", "resnet-w64"):
        cells.append(
            Cell(
                f"swag-update/{model_name}/K=20",
                partial(plan_swag_update, model_name),
                seconds=4,
                in_full_only=model_name == "resnet-w64",
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
                memory=(BASELINE, FUNCTION, "BackPACK"),
            )
        )
        cells.append(
            Cell(
                f"ggn/{model_name}/N={num}",
                partial(plan_ggn, model_name, num),
                seconds=30,
                in_quick=model_name == "mlp",
                memory=(LOOP, FUNCTION, "BackPACK"),
            )
        )
        cells.append(
            Cell(
                f"kfac/{model_name}/N={num}",
                partial(plan_kfac, model_name, num),
                seconds=30,
                in_quick=model_name == "mlp",
                memory=(FUNCTION, "laplace-torch CurvlinopsGGN"),
            )
        )
        for structure in ("diagonal", "kronecker", "last-layer"):
            cells.append(
                Cell(
                    f"linearized/{structure}/{model_name}/N=16",
                    partial(plan_linearized, model_name, structure, 16),
                    seconds=20,
                    in_quick=model_name == "mlp",
                    memory=(FUNCTION, "laplace-torch"),
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
