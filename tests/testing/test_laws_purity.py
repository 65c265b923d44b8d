"""`check_pure` lets sound calls pass and names what an unsound one changed."""

import dataclasses
import random as python_random
import re
import sys
import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.posteriors import Diagonal, DropoutMasks
from funcbayes.testing.laws import check_pure
from funcbayes.testing.laws.snapshots import Snapshot

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def network(*, plain=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm, drop = (nn.Identity(),) * 2 if plain else (nn.BatchNorm1d(6), nn.Dropout(0.2))
        net = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), drop, nn.Linear(6, 3))
    net.train()  # a mode and gradients of the user's own
    net[2].eval()
    net(X).sum().backward()
    return net


@pytest.fixture(autouse=True)
def _process_is_put_back():
    """The planted bugs change the process."""
    with torch.random.fork_rng():
        threads, numpy_state = torch.get_num_threads(), np.random.get_state()  # noqa: NPY002
        yield
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


# -- sound calls ---------------------------------------------------------------------------


def posteriors(params):
    std = trees.tree_map(lambda p: torch.full_like(p, 0.1), params)
    diagonal = Diagonal(params, std)
    members = diagonal.sample(0, 3)
    return {
        "diagonal": diagonal,
        "empirical": fb.posteriors.Empirical(members, {}),
        "mixture": fb.posteriors.mixture([diagonal, diagonal]),
        "masks": DropoutMasks(params, None, "row"),
    }


@pytest.mark.parametrize("family", ["diagonal", "empirical", "mixture", "masks"])
@pytest.mark.parametrize("strategy", ["auto", "vmap", "threads", "loop"])
def test_predictions_are_pure(family, strategy):
    net = network()
    model = fb.Model.from_module(net)
    posterior = posteriors(trees.clone(model.params))[family]

    def call():
        fb.predict(model, posterior, X, key=0, num_samples=3, strategy=strategy)

    check_pure(call, [net, model, posterior, {"x": X}])


class Odd(nn.Module):
    """Tied weights, no buffer, an empty leaf, a scalar, a sparse gradient, a cache, a NaN."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.table = nn.Embedding(3, 4, sparse=True)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("nothing", None)
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0]), persistent=False)
        self.cache, self.calls, self.names = {}, 0, ["a"]
        self.config = SimpleNamespace(width=4, myself=self)
        self.lock_free = threading.local

    def forward(self, x):
        self.calls += 1
        self.cache[self.calls] = x
        self.names.append("b")
        return self.second(self.first(x)) * self.scale.float() + self.table.weight.sum(0)


def test_an_odd_network_passes():
    net = Odd()
    net.table(torch.tensor([0, 1])).sum().backward()  # a sparse gradient
    assert net.table.weight.grad.is_sparse
    model = fb.Model.from_module(net)
    posterior = posteriors(trees.clone(model.params))["diagonal"]
    check_pure(lambda: fb.predict(model, posterior, X, key=0, num_samples=2), [net, posterior])
    with pytest.raises(AssertionError, match=r"cache` gained 1 .* did `watched\[0\].calls`, "):
        check_pure(lambda: net(X), [net, posterior])


def test_other_things_than_modules_are_watched():
    lazy = nn.LazyLinear(3)
    weird = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with torch.inference_mode():
        inference = torch.ones(2)
    watched = [
        lazy, weird, inference, torch.ones(2, device="meta"), torch.eye(2).to_sparse(), 1.5, None,
        np.ones(3), np.array([None]), np.random.default_rng(0), np.random.RandomState(0),
        python_random.Random(0), torch.Generator(), {1, 2}, torch.ones(2, dtype=torch.complex64),
        torch.randn(2, 2).T.conj(), threading.Lock(), check_pure, float("nan"),
    ]  # fmt: skip
    check_pure(lambda: None, watched)
    check_pure(lambda: None, None)


def test_a_call_without_a_forward_pass_needs_no_fault():
    net, calls = network(), []
    check_pure(lambda: calls.append(1), net)
    assert len(calls) == 1


def test_every_forward_pass_is_made_to_raise_once():
    net, reached = network(plain=True).eval(), []

    def call():
        for i in range(3):
            net(X)
            reached.append(i)

    check_pure(call, net)
    # Undisturbed; raised after 0, 1 and 2 full passes; undisturbed.
    assert reached == [0, 1, 2, 0, 0, 1, 0, 1, 2]
    check_pure(call, net, raises=False)
    assert reached[9:] == [0, 1, 2]


def test_of_many_forward_passes_some_are_made_to_raise():
    net, calls = network(plain=True).eval(), []

    def call():
        calls.append(0)
        for _ in range(100):
            net(X)
            calls[-1] += 1

    check_pure(call, net)
    assert len(calls) == 26
    assert calls[0] == calls[-1] == 100
    assert calls[1:5] == [0, 1, 2, 3]
    assert calls[-4:-1] == [97, 98, 99]


@pytest.mark.parametrize("wrap", ["list", "method", "instance", "object"])
def test_the_parts_that_are_called_are_made_to_raise(wrap):
    net = network(plain=True).eval()
    watched: Any = net
    if wrap == "list":
        watched = nn.ModuleList([net])
    elif wrap == "method":
        watched = nn.Module()
        watched.model = net
    elif wrap == "object":
        watched = SimpleNamespace(net=net)
    else:  # a forward pass of the instance's own
        plain = net.forward
        net.forward = lambda x: plain(x) + 1

    def call():
        net.eval()
        net(X)

    check_pure(call, watched)

    def careless():
        net.train()
        net(X)
        net.eval()

    with pytest.raises(AssertionError, match=r"forward pass 1 was made to raise.* mode"):
        check_pure(careless, watched)


def test_the_network_of_a_watched_model_is_made_to_raise():
    net = network(plain=True).eval()
    model = fb.Model.from_module(net)

    def careless():
        torch.set_grad_enabled(False)
        model.apply(model.params, X)
        torch.set_grad_enabled(True)

    with pytest.raises(AssertionError, match=r"forward pass 1 was made to raise, torch.is_grad"):
        check_pure(careless, model)


CLASSES = {
    "MCDropout": lambda net: fb.MCDropout(net),
    "DeepEnsemble": lambda net: fb.DeepEnsemble(network, 2),
    "SWAG": lambda net: fb.SWAG(net),
    "LaplaceApproximation": lambda net: fb.LaplaceApproximation(net),
    "VariationalBayesNN": lambda net: fb.VariationalBayesNN(4, [3], 2),
}


@pytest.mark.parametrize("name", CLASSES)
def test_predictions_of_the_classes_are_pure(name):
    net = network()
    method = CLASSES[name](net)
    if name == "SWAG":
        method.collect_model(net)
        method.collect_model(net)
    if name == "LaplaceApproximation":
        method.fit([(X, torch.zeros(5, dtype=torch.int64))])
    method.predict(X, key=0)  # the first prediction makes the method's model
    check_pure(lambda: method.predict(X, key=0), [net, method])


def test_passes_in_threads_are_counted():
    net = network(plain=True).eval()
    model = fb.Model.from_module(net)
    posterior = posteriors(trees.clone(model.params))["diagonal"]
    raised = []

    def call():
        try:
            fb.predict(model, posterior, X, key=0, num_samples=4, strategy="threads")
        except Exception as error:
            raised.append(type(error).__name__)
            raise

    check_pure(call, net)
    assert set(raised) == {"FaultError"}
    assert len(raised) >= 4


def test_an_error_of_the_call_itself_is_passed_on():
    with pytest.raises(ZeroDivisionError):
        check_pure(lambda: 1 / 0, network())


# -- planted bugs --------------------------------------------------------------------------


def in_place(net):
    with torch.no_grad():
        net[0].weight[0, 1] += 1


def in_place_and_back(net):
    with torch.no_grad():
        net[0].weight.neg_().neg_()


def moved_memory(net):
    net[0].weight.data = net[0].weight.data.clone()


def replaced_parameter(net):
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


def forward_in_training_mode(net):
    net(X)


def eval_mode(net):
    net.eval()


def left_hook(net):
    net[4].register_forward_pre_hook(lambda *_: None)


def left_tensor_hook(net):
    net[0].weight.register_hook(lambda grad: grad)


def left_global_hook(net):
    GLOBAL.append(register_module_forward_hook(lambda *_: None))


GLOBAL: list[Any] = []


def cleared_gradient(net):
    net.zero_grad()


def zeroed_gradient(net):
    net.zero_grad(set_to_none=False)


def accumulated_gradient(net):
    net[2:](net[0](X).tanh()).sum().backward()


def frozen(net):
    net[0].requires_grad_(False)


def new_attribute(net):
    net[0].last_input = X


def no_dropout(net):
    net[3].p = 0.0


def replaced_module(net):
    net[2] = nn.Tanh().eval()


def lost_module(net):
    del net[4]


def other_class(net):
    parametrize.register_parametrization(net[0], "weight", nn.Identity())


def other_dtype(net):
    net.double()


def new_buffer(net):
    net[0].register_buffer("seen", torch.zeros(1))


def torch_random(net):
    torch.rand(1)


def numpy_random(net):
    np.random.rand()  # noqa: NPY002


def python_randomness(net):
    python_random.random()


def threads(net):
    torch.set_num_threads(torch.get_num_threads() + 1)


def grad_mode(net):
    torch.set_grad_enabled(False)


def default_dtype(net):
    torch.set_default_dtype(torch.float64)


BUGS = [
    (in_place, r"`watched.0.weight` changed, entry \(0, 1\): is .*, was .*, 1 apart; 1 of 24"
     " numbers differ.* Likely cause: an operation in place"),
    (in_place_and_back, "`watched.0.weight` was written to, and its numbers put back"),
    (moved_memory, "`watched.0.weight` holds its numbers in other memory"),
    (replaced_parameter, "`watched.0.weight` is another Parameter than before"),
    (forward_in_training_mode, r"`watched.1.running_mean` changed, .*so did .*num_batches_tracked"
     ".*training mode, which moves a batch norm's statistics"),
    (eval_mode, "`watched` was in training mode and is in evaluation mode.*without the way back"),
    (left_hook, "`watched.4` has other hooks than before.*handle was not removed"),
    (left_tensor_hook, "`watched.0.weight` has other hooks"),
    (left_global_hook, "the hooks for all modules"),
    (cleared_gradient, "`watched.0.weight.grad` was a Tensor and is None.*zero_grad"),
    (zeroed_gradient, "`watched.0.weight.grad` changed, .*zero_grad"),
    (accumulated_gradient, "`watched.0.weight.grad` changed, .*backward"),
    (frozen, "`watched.0.weight` had requires_grad=True and has requires_grad=False"),
    (new_attribute, r"`watched.0` gained last_input \(attribute\).*an assignment"),
    (no_dropout, "`watched.3.p` was 0.2 and is 0.0"),
    (replaced_module, "`watched.2` is another Tanh"),
    (lost_module, r"`watched` lost 4 \(module\)"),
    (other_class, "`watched.0` was a Linear and is a ParametrizedLinear"),
    (other_dtype, "`watched.0.weight` was .*float32.* and is .*float64"),
    (new_buffer, r"`watched.0` gained seen \(buffer\)"),
    (torch_random, "torch's global generator was moved.*without a key"),
    (numpy_random, "NumPy's global generator was moved"),
    (python_randomness, "Python's global generator was moved"),
    (threads, r"torch.get_num_threads\(\) was \d+ and is \d+.*not put back"),
    (grad_mode, r"torch.is_grad_enabled\(\) was True and is False"),
    (default_dtype, r"torch.get_default_dtype\(\) was torch.float32 and is torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "message"), [pytest.param(*b, id=b[0].__name__) for b in BUGS])
def test_a_planted_bug_is_named(bug, message, monkeypatch):
    if bug is python_randomness:  # where beartype is loaded, Python's generator is not watched
        monkeypatch.delitem(sys.modules, "beartype", raising=False)
    net = network()
    with pytest.raises(AssertionError, match=r"^check_pure: after the call, " + message):
        check_pure(lambda: bug(net), net)
    while GLOBAL:
        GLOBAL.pop().remove()


def put_back_after_success_only(setter, back):
    def call(net):
        previous = setter(net)
        net(X)
        back(net, previous)

    return call


def set_train(net):
    net.train()


def set_eval(net, _):
    net.eval()


def add_hook(net):
    return net[0].register_forward_hook(lambda *_: None)


def set_threads(net):
    previous = torch.get_num_threads()
    torch.set_num_threads(previous + 1)
    return previous


HALF_WAY = {
    "mode": (set_train, set_eval, "`watched` was in evaluation mode and is in training mode"),
    "hook": (add_hook, lambda _, handle: handle.remove(), "`watched.0` has other hooks"),
    "threads": (
        set_threads,
        lambda _, previous: torch.set_num_threads(previous),
        r"torch.get_num_threads\(\) was",
    ),
    "grad mode": (
        lambda net: torch.set_grad_enabled(False),
        lambda *_: torch.set_grad_enabled(True),
        r"torch.is_grad_enabled\(\) was True",
    ),
    "attribute": (
        lambda net: setattr(net[0], "busy", True),
        lambda net, _: delattr(net[0], "busy"),
        "`watched.0` gained busy",
    ),
}


@pytest.mark.parametrize("name", HALF_WAY)
def test_what_is_put_back_after_success_only_is_named(name):
    setter, back, message = HALF_WAY[name]
    net = network(plain=True).eval()
    call = put_back_after_success_only(setter, back)
    check_pure(lambda: call(net), net, raises=False)
    with pytest.raises(
        AssertionError, match=r"after the call's forward pass 1 was made to raise, " + message
    ):
        check_pure(lambda: call(net), net)


def test_a_later_pass_is_named():
    net = network(plain=True).eval()

    def call():
        net(X)
        net(X)
        net[0].weight.requires_grad_(False)
        net(X)
        net[0].weight.requires_grad_(True)

    with pytest.raises(
        AssertionError, match=r"forward pass 3 was made to raise, `watched.0.weight"
    ):
        check_pure(call, net)


def test_a_call_that_no_longer_works_is_named():
    net, entered = network(plain=True).eval(), []

    def call():
        if entered:
            raise RuntimeError("already running")
        entered.append(1)
        net(X)
        entered.clear()

    with pytest.raises(AssertionError, match=r"the call itself raises RuntimeError.*half-done"):
        check_pure(call, net)


class Scaled(NamedTuple):
    mean: dict[str, torch.Tensor]
    names: list[str]


@dataclasses.dataclass
class WithState:
    mean: torch.Tensor
    seen: int = 0


class Plain:
    def __init__(self):
        self.generator = torch.Generator()
        self.cache = {}
        self.parts = [WithState(torch.zeros(2))]


class Slots:
    __slots__ = ("mean",)

    def __init__(self):
        self.mean = torch.zeros(2)


@pytest.mark.parametrize(
    ("make", "bug", "message"),
    [
        (lambda: Scaled({"w": torch.ones(2, 3)}, []), lambda s: s.mean["w"][1, 2].mul_(2),
         r"`watched.mean\['w'\]` changed, entry \(1, 2\): is 2, was 1"),
        (lambda: Scaled({"w": torch.ones(2)}, []), lambda s: s.mean.update(b=torch.ones(1)),
         r"`watched.mean` gained 'b' \(entry\)"),
        (lambda: Scaled({"w": torch.ones(2)}, []), lambda s: s.names.append("x"),
         r"`watched.names` gained 0"),
        (Plain, lambda p: torch.rand(1, generator=p.generator), "`watched.generator` was moved"),
        (Plain, lambda p: p.cache.update(a=1), "`watched.cache` gained 'a'"),
        (Plain, lambda p: p.parts[0].mean.add_(1), r"`watched.parts\[0\].mean` changed"),
        (Plain, lambda p: setattr(p.parts[0], "seen", 1), r"`watched.parts\[0\].seen` was 0 and"),
        (Slots, lambda s: s.mean.add_(1), "`watched.mean` changed"),
        (lambda: [torch.zeros(())], lambda t: t[0].add_(1), r"`watched\[0\]` changed, is 1, was 0"),
        (lambda: torch.tensor([0.0]), lambda t: t.neg_(), "entry .0.: is -0, was 0"),
        (lambda: np.zeros(2), lambda a: a.fill(1), "`watched` changed"),
        (lambda: {3}, lambda s: s.add(4), "`watched` gained 4"),
        (lambda: fb.Model(lambda p, x: x, {"w": torch.ones(1)}), lambda m: m.params["w"].add_(1),
         r"`watched.params\['w'\]` changed"),
    ],
)  # fmt: skip
def test_a_bug_in_a_state_is_named(make, bug, message):
    watched = make()
    with pytest.raises(AssertionError, match=message):
        check_pure(lambda: bug(watched), watched)


def test_a_buffer_that_was_none_is_named():
    net = Odd()
    with pytest.raises(AssertionError, match=r"`watched.nothing` was None and is a Tensor"):
        check_pure(lambda: setattr(net, "nothing", torch.ones(1)), net)


def test_an_untied_weight_is_named():
    net = Odd()

    def untie():
        net.second.weight = nn.Parameter(net.first.weight.detach().clone())

    with pytest.raises(AssertionError, match=r"`watched.second.weight` is another Parameter"):
        check_pure(untie, net)


def test_a_message_lists_the_other_changes():
    net = network()
    with pytest.raises(AssertionError, match=re.escape("(so did `watched.0.bias`, ")):
        check_pure(lambda: trees.tree_map(lambda p: p.data.add_(1), list(net.parameters())), net)


def test_a_snapshot_of_nothing_changed_is_none():
    assert Snapshot([network()]).difference() is None
