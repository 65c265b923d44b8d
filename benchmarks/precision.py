"""What narrower and wider arithmetic costs and gains in a prediction."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import funcbayes as fb
from benchmarks.models import Setting
from benchmarks.plans import FORMATS, Plan, Side
from funcbayes.cli.bench.agreement import moments

STD = 0.01


def plan_precision(model_name: str, num: int, num_samples: int, setting: Setting) -> Plan:
    """Predictions of the same samples, drawn once, in several formats."""
    num, num_samples = (4, 3) if setting.toy else (num, num_samples)
    net = setting.build(model_name)
    x, _ = setting.inputs(model_name, num)
    model = fb.Model.from_module(net)
    std = {name: torch.full_like(p, STD) for name, p in model.params.items()}
    stack = fb.posteriors.Diagonal(model.params, std).sample(0, num_samples)

    def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}

    def predict(
        model: fb.Model, stack: dict[str, Tensor], x: Tensor, context: AbstractContextManager[Any]
    ) -> fb.Predictive:
        posterior = fb.posteriors.Empirical(stack, {})
        with context:
            return fb.predict(
                model, posterior, x, key=None, likelihood=fb.likelihoods.Categorical()
            )

    wide_model = model.replace(double(model.params), double(model.constants))
    wide = partial(predict, wide_model, double(stack), x.double(), nullcontext())
    exact = [t.double() for t in moments(wide())]

    def error(result: Any) -> dict[str, float]:
        mean, variance = (t.double() for t in moments(result))
        return {
            "mean": float((mean - exact[0]).abs().max()),
            "std": float((variance.sqrt() - exact[1].sqrt()).abs().max()),
        }

    plan = Plan(baseline=FORMATS[0], error=error)
    for name in FORMATS[:-1]:
        narrow = torch.autocast(
            setting.device.type, getattr(torch, name), enabled=name != FORMATS[0]
        )
        plan.sides[name] = Side(partial(predict, model, stack, x, narrow))
    plan.sides[FORMATS[-1]] = Side(wide)
    return plan
