"""Recorded passes give what the network gives, whatever it looks at."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import funcbayes as fb
from funcbayes.prediction.recording import Recording

CALLS = 5


def members(make, num=4):
    torch.manual_seed(0)
    return fb.ensemble.from_modules([make() for _ in range(num)])


def recordings(model):
    return [r for r in model._scratch.recordings.values() if isinstance(r, Recording)]


def check(model, state, inputs, *, recorded=True):
    """Many calls, each with other inputs and weights, against the plain loop."""
    for i in range(CALLS):
        moved = fb.ensemble.EnsembleState(
            {name: p + 0.01 * i for name, p in state.params.items()}, state.constants
        )
        posterior = fb.ensemble.posterior(moved)
        x = inputs(i)
        before = x.clone() if isinstance(x, torch.Tensor) else None
        found = fb.predict(model, posterior, x, key=None, strategy="vmap", return_samples=True)
        expected = fb.predict(model, posterior, x, key=None, strategy="loop", return_samples=True)
        torch.testing.assert_close(found.samples, expected.samples, rtol=1e-5, atol=1e-6)
        if before is not None:
            torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert bool(recordings(model)) == recorded


def rows(i, num=3, width=6):
    return torch.randn(num, width, generator=torch.Generator().manual_seed(i))


def images(i):
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        x *= 2
        return self.last(self.first(x).relu_())


class Parts(nn.Module):
    """Functions of several results, views, and outputs that are a dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        largest, where = self.layer(x).max(-1)
        left, right = self.layer(x).chunk(2, -1)
        return {"a": largest + where, "b": (left - right, right.mT.contiguous().mT)}


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), rows),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), images),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.GELU()), rows),
        (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), lambda i: rows(i)[None]),
        (lambda: nn.Sequential(nn.Identity(), nn.Linear(6, 3), nn.Dropout()), rows),
        (InPlace, rows),
        (Parts, rows),
    ],
    ids=["mlp", "convolution", "layer norm", "transformer", "dropout off", "in place", "parts"],
)
def test_a_recording_gives_what_the_loop_gives(make, inputs):
    check(*members(make), inputs)


def test_a_recording_is_equal_to_the_bit():
    model, state = members(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)))
    posterior = fb.ensemble.posterior(state)
    outputs = [fb.predict(model, posterior, rows(0), key=None).mean for _ in range(CALLS)]
    assert recordings(model)
    # The first call runs a sample alone, to count; the second and the third use vmap.
    assert all(torch.equal(outputs[1], other) for other in outputs[2:])


def test_batch_sizes_and_numbers_of_members_have_their_own():
    model, state = members(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU()))
    for num in (1, 3, 1, 3, 1, 3):
        check(model, state, lambda i, num=num: rows(i, num))
    fewer = fb.ensemble.EnsembleState({n: p[:2] for n, p in state.params.items()}, {})
    check(model, fewer, rows)


READERS = {
    "branch": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.max().item(),
    "float": lambda x: x * float(x.mean()),
    "list": lambda x: x + torch.tensor(x.tolist()),
    "numpy": lambda x: x * float(x.numpy().std()),
    "address": lambda x: x * x.data_ptr() * 0 + x.detach().numpy().mean().item(),
    "equal": lambda x: x * (2 if torch.equal(x, x.clamp_min(-0.5)) else 1),
    "number of results": lambda x: x + len((x > 0).nonzero()),
}


@pytest.mark.parametrize("name", READERS)
def test_networks_that_read_values_follow_their_inputs(name):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x):
            return self.layer(READERS[name](x))

    model, state = members(Reader)
    check(model, state, rows, recorded=False)


def test_tensors_from_elsewhere_are_followed():
    shift = [torch.zeros(6)]

    def apply(params, x):
        return (x + shift[0]) @ params["w"]

    model = fb.Model(apply, {"w": torch.ones(6, 2)})
    posterior = fb.posteriors.Empirical({"w": torch.randn(4, 6, 2)}, {})
    for i in range(CALLS):
        shift[0] = torch.full((6,), float(i))
        found = fb.predict(model, posterior, rows(0), key=None, strategy="vmap").mean
        torch.testing.assert_close(
            found, ((rows(0) + i) @ posterior.params["w"]).mean(0), rtol=1e-5, atol=1e-5
        )


def test_a_network_that_draws_is_refused_at_every_call():
    model = fb.Model(lambda p, x: x @ p["w"] + torch.rand(()), {"w": torch.ones(6, 2)})
    posterior = fb.posteriors.Empirical({"w": torch.randn(4, 6, 2)}, {})
    for _ in range(CALLS):
        with pytest.raises(ValueError, match="global generator"):
            fb.predict(model, posterior, rows(0), key=None)


def test_modes_and_formats_of_the_caller_are_followed():
    model, state = members(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    posterior = fb.ensemble.posterior(state)

    def mean():
        return fb.predict(model, posterior, rows(0), key=None).mean

    for _ in range(CALLS):
        plain = mean()
    assert recordings(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mean().dtype == torch.bfloat16
    with torch.inference_mode():
        for _ in range(CALLS):
            assert mean().is_inference()
    assert not mean().is_inference()

    seen = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Listener():
        listened = mean()
    assert nn.functional.linear in seen
    torch.testing.assert_close(listened, plain)

    def inside(x):
        return fb.predict(model, posterior, x, key=None, strategy="vmap").mean

    torch.testing.assert_close(inside(rows(0)), plain)
    double = fb.ensemble.posterior(
        fb.ensemble.EnsembleState({n: p.double() for n, p in state.params.items()}, {})
    )
    for _ in range(CALLS):
        wide = fb.predict(model, double, rows(0).double(), key=None).mean
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide.float(), plain)


def test_copies_and_pickles_start_without_recordings():
    model, state = members(lambda: nn.Linear(6, 2))
    check(model, state, rows)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not recordings(other)
        check(other, state, rows)


def test_activation_noise_has_no_part_in_the_recordings_of_the_network():
    model = fb.Model.from_module(nn.Linear(6, 2))
    posterior = fb.posteriors.Diagonal(
        model.params, {n: torch.full_like(p, 0.1) for n, p in model.params.items()}
    )
    for i in range(CALLS):
        options = {"key": i, "num_samples": 4, "strategy": "vmap", "return_samples": True}
        local = fb.predict(model, posterior, rows(i), noise="activation", **options)
        again = fb.predict(model, posterior, rows(i), noise="activation", **options)
        torch.testing.assert_close(local.samples, again.samples, rtol=0, atol=0)
        weight = fb.predict(model, posterior, rows(i), **options)
        loop = fb.predict(model, posterior, rows(i), **{**options, "strategy": "loop"})
        torch.testing.assert_close(weight.samples, loop.samples, rtol=1e-5, atol=1e-6)
