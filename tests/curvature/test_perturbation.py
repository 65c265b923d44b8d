"""Which settings of cuDNN the passes run with, by networks that ask for it as they run.

Without a CUDA device, a function by the name of cuDNN's kernel stands for it, and the setting is
made as on CUDA.
"""

import threading

import pytest
import torch
from torch import nn

from funcbayes.core import likelihoods, trees
from funcbayes.core.model import Model
from funcbayes.curvature import ggn, hessian, perturbation

CUDA = torch.device("cuda")
CATEGORICAL = likelihoods.Categorical()


@pytest.fixture
def as_on_cuda(monkeypatch):
    without_cudnn = perturbation.without_cudnn
    monkeypatch.setattr(perturbation, "without_cudnn", lambda device: without_cudnn(CUDA))


class CudnnRnn(torch.autograd.Function):
    """Refuses to be differentiated, as cuDNN's recurrent kernels do in evaluation mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


class Recurrent(nn.Module):
    def forward(self, x):
        return CudnnRnn.apply(x) if torch.backends.cudnn.enabled else 2 * x


class Watch(nn.Module):
    """Notes how cuDNN is set."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        self.note(torch.backends.cudnn.enabled)
        return x


def data():
    torch.manual_seed(0)
    return torch.randn(5, 3), torch.randint(0, 2, (5,))


def watched(*parts):
    """A model of a network with these parts, and a list of how cuDNN was set in each pass."""
    torch.manual_seed(0)
    seen = []
    watch = Watch(lambda enabled: seen.append(enabled))
    return Model.from_module(nn.Sequential(nn.Linear(3, 4), *parts, watch, nn.Linear(4, 2))), seen


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


FITS = {
    "ggn": lambda model: ggn(model, data(), CATEGORICAL),
    "hessian": lambda model: hessian(model, data(), CATEGORICAL),
    "low_rank": lambda model: ggn(model, data(), CATEGORICAL, structure="low_rank", rank=2),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_recurrent_layers_are_differentiated_without_cudnn(fit, as_on_cuda):
    model, seen = watched(Recurrent())
    found = fit(model)
    assert False in seen  # with cuDNN it would have been refused
    assert torch.backends.cudnn.enabled
    expected = fit(watched(Twice())[0])
    torch.testing.assert_close(trees.leaves(found), trees.leaves(expected))


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_other_networks_keep_cudnn(fit, as_on_cuda, monkeypatch):
    monkeypatch.setattr(perturbation, "examine", lambda model, leaves, plan, *rest: plan)
    model, seen = watched()
    fit(model)
    assert seen
    assert all(seen)


def test_whole_batches_are_compared_with_single_data_in_one_setting(as_on_cuda):
    model, seen = watched()
    x, y = data()
    leaves = trees.leaves(model.params)
    plan = perturbation.discover(model, leaves, x[:1], None)
    assert not plan.recurrent
    seen.clear()
    columns = lambda outputs, _: torch.ones_like(outputs)[None]  # noqa: E731
    plan = perturbation.examine(model, leaves, plan, x, y, None, columns)
    assert plan.layout is not None
    assert seen == [False, False]
    assert torch.backends.cudnn.enabled


def settings():
    backends = torch.backends
    return (
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.rnn.fp32_precision,
        backends.fp32_precision,
    )


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("precision", ["none", "ieee", "tf32"])
def test_settings_are_put_back_also_after_an_error(precision, enabled):
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = precision
        torch.backends.cudnn.enabled = enabled
        expected = settings()
        with perturbation.without_cudnn(CUDA):
            assert settings() == (False, *expected[1:])
            with perturbation.without_cudnn(CUDA):
                assert not torch.backends.cudnn.enabled
            assert not torch.backends.cudnn.enabled
        assert settings() == expected
        with pytest.raises(KeyError), perturbation.without_cudnn(CUDA):
            raise KeyError
        assert settings() == expected
        with perturbation.without_cudnn(torch.device("cpu")):
            assert settings() == expected
    finally:
        torch.backends.fp32_precision = before
        torch.backends.cudnn.enabled = True


def test_threads_that_overlap_put_the_setting_back():
    inside, go_on = threading.Event(), threading.Event()

    def first():
        with perturbation.without_cudnn(CUDA):
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with perturbation.without_cudnn(CUDA):
        go_on.set()
        thread.join()
        # The first is out before the second.
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("kind", ["CudnnRnn", "plain", "none"])
def test_the_graph_knows_of_recurrent_kernels(kind):
    x = torch.ones(3, requires_grad=kind != "none")
    y = CudnnRnn.apply(x.exp()) if kind == "CudnnRnn" else 2 * x.exp()
    assert perturbation.meets_cudnn_recurrence({"a": x, "b": y.sum()}) == (kind == "CudnnRnn")


@pytest.mark.cuda
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_on_cuda(cell):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = cell(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    net = Last().double()
    x, y = torch.randn(5, 6, 3).double(), torch.randint(0, 2, (5,))
    for fit in (ggn, hessian):
        expected = fit(Model.from_module(net), (x, y), CATEGORICAL)
        moved = Model.from_module(Last().double().cuda())
        moved = moved.replace({k: v.cuda() for k, v in Model.from_module(net).params.items()})
        found = fit(moved, (x.cuda(), y.cuda()), CATEGORICAL)
        for a, b in zip(trees.leaves(found), trees.leaves(expected), strict=True):
            torch.testing.assert_close(a.cpu(), b)
    assert torch.backends.cudnn.enabled


@pytest.mark.cuda
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_convolutions_on_cuda_run_whole_and_alike_with_and_without_cudnn(norm):
    torch.manual_seed(0)
    parts = [part for _ in range(6) for part in (nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU())]
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 36, 3)).cuda().eval()
    x, y = torch.randn(7, 8, 6, 6, device="cuda"), torch.randint(0, 3, (7,), device="cuda")
    model = Model.from_module(net)
    found = ggn(model, (x, y), CATEGORICAL)
    (plan,) = model._scratch.plans.values()
    assert plan.layout is not None
    with perturbation.without_cudnn(CUDA):
        expected = ggn(Model.from_module(net), (x, y), CATEGORICAL)
    for a, b in zip(trees.leaves(found), trees.leaves(expected), strict=True):
        # Convolutions in TF32 round to 2⁻¹¹, and there are six, forward and back; squared.
        assert (a - b).norm() <= 0.05 * b.norm()
