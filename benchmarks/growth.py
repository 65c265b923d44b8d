"""How the time of a prediction grows with samples, inputs and parameters."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import funcbayes as fb
from benchmarks import peers
from benchmarks.cells import trajectory
from benchmarks.models import Setting
from benchmarks.peers import BASELINE
from benchmarks.plans import AUTO
from funcbayes.cli.bench.networks import NUM_CLASSES
from funcbayes.cli.bench.timing import in_turn
from funcbayes.core.memory import available_bytes

# A baseline that takes longer than this for one call is left out from there on.
PATIENCE = 20.0
BUDGET = 3.0
# A size of which ten copies would not fit is left out: state, both libraries' samples, and air.
COPIES = 30


class Curve(NamedTuple):
    """What grows, and the cases.

    Attributes:
        name: what is on the axis.
        title: what is held fixed.
        sizes: the values that are run.
        case: for a device and a size the network, the inputs and the number of samples.
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    case: Callable[[torch.device, int], tuple[nn.Module, Tensor, int]]


def _mlp(device: torch.device, num: int, num_samples: int) -> tuple[nn.Module, Tensor, int]:
    setting = Setting(device)
    return setting.build("mlp"), setting.inputs("mlp", num)[0], num_samples


def _wide(device: torch.device, num_params: int) -> tuple[nn.Module, Tensor, int]:
    """An MLP 64-h-h-10 of about so many parameters."""
    width = max(1, round(((76**2 + 4 * num_params) ** 0.5 - 76) / 2))
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, NUM_CLASSES),
    )
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    return net.eval().to(device), x.to(device), 5


CURVES = (
    Curve(
        "samples",
        "MLP of 536 k parameters, 16 inputs",
        (1, 3, 10, 30, 100, 300, 1000),
        lambda device, n: _mlp(device, 16, n),
    ),
    Curve(
        "inputs",
        "MLP of 536 k parameters, 20 samples",
        (1, 4, 16, 64, 256, 1024, 4096),
        lambda device, n: _mlp(device, n, 20),
    ),
    Curve(
        "parameters",
        "MLP of growing width, 16 inputs, 5 samples",
        (10**4, 10**5, 10**6, 10**7, 10**8),
        _wide,
    ),
)


def run(curve: Curve, device: torch.device, sizes: Iterable[int] | None = None) -> dict[str, Any]:
    """Times the default strategy and the plain loop at every size.

    Returns:
        `name`, `title`, `points` (each `size`, and seconds by side, None where it was left out
        and `left_out` says why) and `slopes`: by side the exponent of the size that the time
        grows with over the upper half of the sizes.
    """
    points: list[dict[str, Any]] = []
    patient = True
    for size in curve.sizes if sizes is None else sizes:
        if curve.name == "parameters" and COPIES * 4 * size > available_bytes(device):
            points.append({"size": size, "seconds": {}, "left_out": "not enough memory"})
            continue
        net, x, num_samples = curve.case(device, size)
        sides = _sides(net, x, num_samples, baseline=patient)
        timings = in_turn(sides, budget=BUDGET, min_rounds=3, max_rounds=30)
        medians = {side: timings.of(side).median for side in timings.seconds}
        patient = patient and medians.get(BASELINE, 0) < PATIENCE
        points.append({"size": size, "seconds": medians})
    return {
        "name": curve.name,
        "title": curve.title,
        "points": points,
        "slopes": {side: _slope(points, side) for side in (AUTO, BASELINE)},
    }


def _sides(
    net: nn.Module, x: Tensor, num_samples: int, *, baseline: bool
) -> dict[str, Callable[[], Any]]:
    model = fb.Model.from_module(net)
    state = fb.swag.init(model.params)
    for iterate in trajectory(net):
        state = fb.swag.update(state, fb.Model.from_module(iterate).params)
    posterior = fb.swag.posterior(state, var_clamp=1e-6)
    likelihood = fb.likelihoods.Categorical()
    sides: dict[str, Callable[[], Any]] = {
        AUTO: lambda: fb.predict(
            model, posterior, x, key=0, num_samples=num_samples, likelihood=likelihood
        )
    }
    incerto, _ = peers.load("incerto.bayesian")
    if baseline and incerto is not None:
        swag = incerto.SWAG(copy.deepcopy(net), num_samples=num_samples)
        for iterate in trajectory(net):
            swag.collect_model(iterate)
        sides[BASELINE] = lambda: swag.predict(x)
    return sides


def _slope(points: list[dict[str, Any]], side: str) -> float | None:
    known = [(p["size"], p["seconds"][side]) for p in points if p["seconds"].get(side)]
    upper = known[len(known) // 2 :]
    if len(upper) < 2:
        return None
    sizes, seconds = np.log(np.array(upper, dtype=float)).T
    return float(np.polyfit(sizes, seconds, 1)[0])
