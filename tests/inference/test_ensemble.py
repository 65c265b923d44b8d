"""Ensembles: the vectorised step against members trained one by one, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from funcbayes.core import random, trees, workers
from funcbayes.core.likelihoods import Categorical, Gaussian
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.inference import ensemble, members
from funcbayes.inference.ensemble import EnsembleState

OPTIMIZERS = {
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda leaves: torch.optim.Adam(leaves, lr=1e-2),
    "adamw": lambda leaves: torch.optim.AdamW(leaves, lr=1e-2, amsgrad=True),
    "nadam": lambda leaves: torch.optim.NAdam(leaves, lr=1e-2),
    "radam": lambda leaves: torch.optim.RAdam(leaves, lr=1e-2),
    "adamax": lambda leaves: torch.optim.Adamax(leaves, lr=1e-2),
    "adagrad": lambda leaves: torch.optim.Adagrad(leaves, lr=1e-2),
    "adadelta": lambda leaves: torch.optim.Adadelta(leaves, lr=1.0),
    "rmsprop": lambda leaves: torch.optim.RMSprop(leaves, lr=1e-3, centered=True),
    "rprop": lambda leaves: torch.optim.Rprop(leaves, lr=1e-3),
    "asgd": lambda leaves: torch.optim.ASGD(leaves, lr=1e-2),
}
ADAM = OPTIMIZERS["adam"]


def conv_net(*, dropout=0.0, momentum=0.1):
    return nn.Sequential(
        # A bias here has gradient zero but for rounding, whose sign Adam and Rprop follow.
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(3 * 16, 4),
    ).double()


def small_net():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def images(sizes=(6, 5, 7), *, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 1, 6, 6, generator=gen, dtype=torch.float64),
            torch.randint(4, (n,), generator=gen),
        )
        for n in sizes
    ]


def table(num=16, *, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=gen, dtype=torch.float64)
    return x, torch.randint(2, (num,), generator=gen)


def build(module_fn, num, seed=0):
    torch.manual_seed(seed)
    return [module_fn() for _ in range(num)]


def train_alone(net, data, factory, num_epochs):
    """A plain training loop of one member."""
    net.train()
    steps = factory(list(net.parameters()))
    for _ in range(num_epochs):
        for x, y in data:
            steps.zero_grad()
            F.cross_entropy(net(x), y).backward()
            steps.step()


def assert_members_equal(state, nets, *, rtol=1e-9, atol=1e-11):
    for i, net in enumerate(nets):
        tensors = dict(net.state_dict())
        assert_close(
            {k: v[i] for k, v in {**state.params, **state.constants}.items()},
            {k: tensors[k] for k in {**state.params, **state.constants}},
            rtol=rtol,
            atol=atol,
        )


@pytest.fixture(params=["one pass of all", "a pass a core"])
def way(request, monkeypatch):
    """Both ways to run the members' passes, whatever is faster here; counts those in workers."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    alone = request.param == "a pass a core"
    monkeypatch.setattr(members, "_costs_less", lambda *args: alone)
    submitted = []
    submit = workers.submit

    def counted(*args):
        submitted.append(args)
        return submit(*args)

    monkeypatch.setattr(workers, "submit", counted)
    yield request.param
    assert bool(submitted) == alone


# -- training ------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_one_vectorised_step_equals_training_members_one_by_one(name, caplog):
    nets, data = build(conv_net, 3), images()
    model, state = ensemble.from_modules(nets)
    trained = ensemble.fit(
        model,
        state,
        data,
        key=0,
        likelihood=Categorical(),
        optimizer=OPTIMIZERS[name],
        num_epochs=3,
    )
    assert not caplog.text  # no loop in place of the batched step
    for net in nets:
        train_alone(net, data, OPTIMIZERS[name], 3)
    # 9 steps in float64, 1e-16 each, times what dividing by a small gradient amplifies.
    assert_members_equal(trained, nets)
    assert not torch.equal(trained.params["5.weight"], state.params["5.weight"])
    assert trained.constants["1.num_batches_tracked"].tolist() == [9, 9, 9]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.lstm(x)[0][:, -1]))


def recurrent_net():
    return Recurrent().double()


@pytest.mark.parametrize("make", ["recurrent", "batch norm without momentum"])
def test_models_that_vmap_cannot_batch_are_looped_over(make, caplog):
    if make == "recurrent":
        nets = build(recurrent_net, 2)
        data = [(torch.randn(6, 5, 3).double(), torch.randint(2, (6,))) for _ in range(2)]
    else:  # torch's cumulative average reads its counter as a Python number
        nets, data = build(lambda: conv_net(momentum=None), 2), images()
    model, state = ensemble.from_modules(nets)
    trained = ensemble.fit(
        model, state, data, key=0, likelihood=Categorical(), optimizer=ADAM, num_epochs=2
    )
    assert caplog.text.count("vmap cannot batch") == 1  # once, not once a step
    for net in nets:
        train_alone(net, data, ADAM, 2)
    assert_members_equal(trained, nets)


@pytest.mark.parametrize("inputs_require_grad", [True, False])  # False: a pass a core
def test_training_changes_nothing_that_was_given(inputs_require_grad, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(members, "_costs_less", lambda *args: True)
    nets = build(lambda: conv_net(dropout=0.3), 2)
    nets[0].eval()
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    model, state = ensemble.from_modules(nets)
    start = trees.clone(state)
    data = [(x.requires_grad_(inputs_require_grad), y) for x, y in images()]
    rng = torch.get_rng_state()
    trained = ensemble.fit(
        model, state, data, key=0, likelihood=Categorical(), optimizer=ADAM, num_epochs=1
    )
    assert torch.equal(torch.get_rng_state(), rng)
    assert_close(state, start, rtol=0, atol=0)
    for net, tensors in zip(nets, before, strict=True):
        assert_close(dict(net.state_dict()), tensors, rtol=0, atol=0)
        assert all(p.grad is None for p in net.parameters())
    assert [nets[0].training, nets[1].training] == [False, True]
    assert all(x.grad is None for x, _ in data)
    assert not any(leaf.requires_grad for leaf in trees.leaves(trained))


def test_the_state_and_the_posterior_are_copies():
    nets = build(small_net, 2)
    _, state = ensemble.from_modules(nets)
    before = trees.clone(state)
    posterior = ensemble.posterior(state)
    with torch.no_grad():
        for net in nets:
            for p in net.parameters():
                p.add_(1)
    assert_close(state, before, rtol=0, atol=0)
    assert_close(posterior.params, before.params, rtol=0, atol=0)
    assert posterior.constants == {}


@pytest.mark.usefixtures("way")
def test_frozen_parameters_stay_each_members_own():
    nets, (x, y) = build(small_net, 3), table()
    model, state = ensemble.from_modules(nets, bayesian=lambda name: name.startswith("2"))
    assert sorted(state.constants) == ["0.bias", "0.weight"]
    trained = ensemble.fit(
        model, state, (x, y), key=0, likelihood=Categorical(), optimizer=ADAM, num_epochs=4
    )
    assert_close(trained.constants, state.constants, rtol=0, atol=0)
    for net in nets:
        train_alone(net, [(x, y)], lambda p: ADAM(p[2:]), 4)
    assert_members_equal(trained, nets)


def test_the_callback_sees_every_step():
    model, state = ensemble.from_modules(build(small_net, 2))
    x, y = table()
    seen = []
    ensemble.fit(
        model,
        state,
        [(x[:8], y[:8]), (x[8:], y[8:])],
        key=0,
        likelihood=Categorical(),
        optimizer=ADAM,
        num_epochs=2,
        callback=lambda step, losses: seen.append((step, losses)),
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    expected, _ = ensemble.losses(model, state, (x[:8], y[:8]), key=0, likelihood=Categorical())
    assert_close(seen[0][1], expected)
    assert not seen[0][1].requires_grad


# -- losses --------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_losses_and_their_gradients_equal_the_loop():
    nets, (x, y) = build(conv_net, 3), images((6,))[0]
    model, state = ensemble.from_modules(nets)
    params = trees.tree_map(lambda p: p.clone().requires_grad_(), state.params)
    values, constants = ensemble.losses(
        model, EnsembleState(params, state.constants), (x, y), key=0, likelihood=Categorical()
    )
    grads = dict(zip(params, torch.autograd.grad(values.sum(), list(params.values())), strict=True))
    for i, net in enumerate(nets):
        loss = F.cross_entropy(net.train()(x), y)
        loss.backward()
        assert_close(values[i], loss, rtol=1e-12, atol=0)
        expected = {name: p.grad for name, p in net.named_parameters()}
        assert_close(trees.index(grads, i), expected, rtol=1e-10, atol=1e-13)
        assert_close(trees.index(constants, i), dict(net.named_buffers()), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("way")
def test_losses_can_be_differentiated_twice_and_with_any_weights():
    nets, batch = build(small_net, 3), table()
    model, state = ensemble.from_modules(nets)

    def derivatives(params):
        values, _ = ensemble.losses(
            model, EnsembleState(params, state.constants), batch, key=0, likelihood=Categorical()
        )
        leaves = trees.leaves(params)
        grads = torch.autograd.grad(values @ weights, leaves, create_graph=True)
        return grads, torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    stacks = trees.tree_map(lambda p: p.clone().requires_grad_(), state.params)
    first, second = derivatives(stacks)
    for i, net in enumerate(nets):
        own = list(net.parameters())
        loss = weights[i] * F.cross_entropy(net(batch[0]), batch[1])
        grads = torch.autograd.grad(loss, own, create_graph=True)
        assert_close([g[i].detach() for g in first], [g.detach() for g in grads])
        expected = torch.autograd.grad(sum(g.square().sum() for g in grads), own)
        assert_close([g[i] for g in second], list(expected))


class Idle(nn.Module):
    """One of its parameters is not used."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("trained", [("used", "idle"), ("idle",)])
def test_an_unused_parameter_has_no_gradient(trained):
    nets = build(lambda: Idle().double(), 2)
    model, state = ensemble.from_modules(nets, bayesian=lambda name: name.startswith(trained))
    stacks = trees.tree_map(lambda p: p.clone().requires_grad_(), state.params)
    values, _ = ensemble.losses(
        model, EnsembleState(stacks, state.constants), table(), key=0, likelihood=Categorical()
    )
    if values.requires_grad:
        grads = torch.autograd.grad(values.sum(), list(stacks.values()), allow_unused=True)
        for name, grad in zip(stacks, grads, strict=True):
            assert (grad is None or not grad.any()) == name.startswith("idle")
    else:
        assert trained == ("idle",)


def test_what_is_no_parameter_keeps_its_gradient(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(members, "_costs_less", lambda *args: True)
    nets, (x, y) = build(small_net, 2), table()
    model, state = ensemble.from_modules(nets)
    x.requires_grad_()
    values, _ = ensemble.losses(model, state, (x, y), key=0, likelihood=Categorical())
    (grad,) = torch.autograd.grad(values.sum(), x)
    (expected,) = torch.autograd.grad(sum(F.cross_entropy(net(x), y) for net in nets), x)
    assert_close(grad, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_likelihood_learns_keeps_its_gradient(frozen, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(members, "_costs_less", lambda *args: True)
    nets, (x, _) = build(small_net, 2), table()
    model, state = ensemble.from_modules(nets)
    if not frozen:
        state = state._replace(params={n: p.requires_grad_() for n, p in state.params.items()})
    y, std = torch.zeros(len(x), 2, dtype=x.dtype), torch.tensor(0.7, requires_grad=True)
    for _ in range(2):  # the second time it is known
        values, _ = ensemble.losses(model, state, (x, y), key=0, likelihood=Gaussian(std))
        (grad,) = torch.autograd.grad(values.sum(), std)
        expected = sum(Gaussian(std).nll(net(x), y).mean() for net in nets)
        assert_close(grad, torch.autograd.grad(expected, std)[0])


def test_tangents_go_through(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(members, "_costs_less", lambda *args: True)
    model, state = ensemble.from_modules(build(small_net, 2))

    def losses(params):
        now = EnsembleState(params, state.constants)
        return ensemble.losses(model, now, table(), key=0, likelihood=Categorical())[0]

    ones = trees.tree_map(torch.ones_like, state.params)
    _, expected = torch.func.jvp(losses, (state.params,), (ones,))
    with torch.autograd.forward_ad.dual_level():
        dual = trees.tree_map(torch.autograd.forward_ad.make_dual, state.params, ones)
        tangent = torch.autograd.forward_ad.unpack_dual(losses(dual)).tangent
    assert_close(tangent, expected)


@pytest.mark.usefixtures("way")
def test_autograd_refuses_what_was_written_over_or_freed():
    model, state = ensemble.from_modules(build(small_net, 2))
    stacks = trees.tree_map(lambda p: p.clone().requires_grad_(), state.params)
    for spoil in (False, True):
        values, _ = ensemble.losses(
            model, EnsembleState(stacks, state.constants), table(), key=0, likelihood=Categorical()
        )
        if spoil:
            with torch.no_grad():
                for stack in stacks.values():
                    stack.add_(1)
        else:
            values.sum().backward()
        with pytest.raises(RuntimeError, match=r"second time|inplace operation"):
            values.sum().backward()


@pytest.mark.usefixtures("way")
def test_weight_decay_leaves_an_unused_parameter_alone():
    model, state = ensemble.from_modules(build(lambda: Idle().double(), 2))
    trained = ensemble.fit(
        *(model, state, table()),
        key=0,
        likelihood=Categorical(),
        optimizer=lambda leaves: torch.optim.AdamW(leaves, lr=0.1, weight_decay=0.5),
        num_epochs=3,
    )
    for name, stack in trained.params.items():
        assert torch.equal(stack, state.params[name]) == name.startswith("idle")


def test_a_network_that_draws_for_itself_is_not_run_in_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(members, "_costs_less", lambda *args: True)
    monkeypatch.setattr(workers, "submit", None)
    model, state = ensemble.from_modules(build(lambda: Noisy().double(), 2))
    rng = torch.get_rng_state()
    values, _ = ensemble.losses(model, state, table(), key=1, likelihood=Categorical())
    assert values.shape == (2,)
    assert torch.equal(torch.get_rng_state(), rng)


def test_much_computation_goes_to_the_cores_and_little_does_not(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(members, "run", None)
    model, state = ensemble.from_modules(build(lambda: nn.Linear(400, 400), 3))
    for rows, much in ((1, False), (4000, True)):
        batch = torch.randn(rows, 400), torch.zeros(rows, dtype=torch.long)

        def member(form, params, constants, i, x=batch[0]):
            return model.apply(params, form(x))

        assert (members.own_format(model, member, *state, batch) is not None) == much


@pytest.mark.usefixtures("way")
def test_each_member_can_have_a_batch_of_its_own():
    nets = build(conv_net, 2)
    model, state = ensemble.from_modules(nets)
    (x, y), (u, v) = images((6, 6))
    values, constants = ensemble.losses(
        model,
        state,
        (torch.stack([x, u]), torch.stack([y, v])),
        key=0,
        likelihood=Categorical(),
        per_member=True,
    )
    for i, (a, b) in enumerate([(x, y), (u, v)]):
        assert_close(values[i], F.cross_entropy(nets[i].train()(a), b).detach(), rtol=1e-12, atol=0)
        assert_close(trees.index(constants, i), dict(nets[i].named_buffers()), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("way")
def test_dropout_masks_are_a_function_of_key_and_member(caplog):
    # Members of one value each, so that they differ by their masks alone.
    net = conv_net(dropout=0.5)
    model, state = ensemble.from_modules([copy.deepcopy(net) for _ in range(4)])
    batch = images((6,))[0]

    def losses(state, key):
        return ensemble.losses(model, state, batch, key=key, likelihood=Categorical())[0]

    values = losses(state, 7)
    assert not caplog.text
    assert len(set(values.tolist())) == 4
    assert_close(losses(state, 7), values, rtol=0, atol=0)
    assert_close(losses(trees.tree_map(lambda p: p[:2], state), 7), values[:2], rtol=1e-12, atol=0)
    assert not torch.allclose(losses(state, 8), values)
    for i in range(4):  # one member alone, outside vmap, under its own key
        with KeyedDropout([random.fold_in(7, i)], always=False):
            outputs, _ = model.apply_train(model.params, batch[0])
        assert_close(values[i], F.cross_entropy(outputs, batch[1]), rtol=1e-12, atol=0)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        x = self.linear(x)
        return x + torch.randn(2, dtype=x.dtype) if self.training else x


def test_other_noise_in_training_comes_from_the_key_too():
    model, state = ensemble.from_modules(build(lambda: Noisy().double(), 2))
    rng = torch.get_rng_state()

    def losses(key):
        return ensemble.losses(model, state, table(), key=key, likelihood=Categorical())[0]

    assert_close(losses(1), losses(1), rtol=0, atol=0)
    assert not torch.allclose(losses(1), losses(2))
    assert torch.equal(torch.get_rng_state(), rng)


# -- bootstrap -----------------------------------------------------------------------------


def mean_model():
    """A model whose maximum-likelihood fit is the mean of the targets that it sees."""
    return Model(lambda params, x: params.expand(x.shape[0], 1), torch.zeros(1).double())


def test_bootstrap_gives_each_member_one_fixed_resample_of_the_data():
    members, num = 4, 30
    model = mean_model()
    state = EnsembleState(torch.zeros(members, 1).double(), {})
    y = torch.randn(num, 1, dtype=torch.float64)
    x = torch.zeros(num, 1, dtype=torch.float64)
    trained = ensemble.fit(
        model,
        state,
        (x, y),
        key=3,
        likelihood=Gaussian(),
        # A Newton step for the mean squared error, from any start.
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=1.0),
        num_epochs=3,
        bootstrap=True,
    )
    rows_key = random.split(3)[1]
    for i in range(members):
        rows = random.randint(random.fold_in(random.fold_in(rows_key, 0), i), 0, num, (num,))
        assert_close(trained.params[i, 0], y[rows, 0].mean(), rtol=0, atol=1e-13)
    # Without bootstrap all members agree on the mean of all.
    same = ensemble.fit(
        model,
        state,
        (x, y),
        key=3,
        likelihood=Gaussian(),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=1.0),
        num_epochs=1,
    )
    assert_close(same.params, y.mean().expand(members, 1), rtol=0, atol=1e-13)


def test_bootstrap_means_spread_as_the_standard_error():
    members, num = 2000, 25
    y = torch.randn(num, 1, dtype=torch.float64)
    trained = ensemble.fit(
        mean_model(),
        EnsembleState(torch.zeros(members, 1).double(), {}),
        (torch.zeros(num, 1).double(), y),
        key=0,
        likelihood=Gaussian(),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=1.0),
        num_epochs=1,
        bootstrap=True,
    )
    variance = y.var(correction=0) / num
    z_mean = (trained.params.mean() - y.mean()) / (variance / members).sqrt()
    # The bootstrap mean is near normal, so its sample variance has relative variance 2/M.
    z_var = (trained.params.var() / variance - 1) / math.sqrt(2 / members)
    assert abs(float(z_mean)) < 5
    assert abs(float(z_var)) < 5


# -- init and from_modules -----------------------------------------------------------------


def test_init_gives_each_member_its_own_key():
    rng = torch.get_rng_state()
    model, three = ensemble.init(small_net, key=5, num_members=3)
    _, two = ensemble.init(small_net, key=5, num_members=2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_close(two, trees.tree_map(lambda p: p[:2], three), rtol=0, atol=0)
    assert not torch.equal(three.params["0.weight"][0], three.params["0.weight"][1])
    with torch.random.fork_rng():
        torch.manual_seed(random.seed(random.fold_in(5, 1)))
        assert_close(trees.index(three.params, 1), Model.from_module(small_net()).params)
    assert set(model.params) == set(three.params)


def test_init_puts_the_generators_back_when_the_builder_raises():
    rng = torch.get_rng_state()

    def broken():
        torch.randn(3)
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        ensemble.init(broken, key=0, num_members=2)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_init_are_refused():
    net = small_net()
    with pytest.raises(TypeError, match=r"`module_fn` is a int, expected a function .* lambda"):
        ensemble.init(3, key=0, num_members=2)
    with pytest.raises(ValueError, match="`num_members` is 0, expected at least 1"):
        ensemble.init(small_net, key=0, num_members=0)
    with pytest.raises(ValueError, match=r"`module_fn\(\) #1` is the same object as .*build a new"):
        ensemble.init(lambda: net, key=0, num_members=2)
    with pytest.raises(TypeError, match=r"`module_fn\(\) #0` is a NoneType, expected an nn.Module"):
        ensemble.init(lambda: None, key=0, num_members=2)
    with pytest.raises(ValueError, match="`bayesian` selects no parameter"):
        ensemble.init(small_net, key=0, num_members=2, bayesian=lambda name: False)


@pytest.mark.usefixtures("unchecked")
def test_members_that_are_not_independent_or_not_alike_are_refused():
    a, b = build(small_net, 2)
    with pytest.raises(ValueError, match="`nets` is empty, expected at least one module"):
        ensemble.from_modules([])
    with pytest.raises(TypeError, match="`nets` is one Sequential, expected a list of modules"):
        ensemble.from_modules(a)
    with pytest.raises(TypeError, match=r"`nets\[1\]` is a str, expected an nn.Module"):
        ensemble.from_modules([a, "b"])
    with pytest.raises(ValueError, match=r"`nets\[2\]` is the same object as `nets\[0\]`"):
        ensemble.from_modules([a, b, a])
    b[2].weight = a[2].weight
    with pytest.raises(
        ValueError, match=r"`nets\[1\]\['2.weight'\]` shares its memory with `nets\[0\]\['2.weight'"
    ):
        ensemble.from_modules([a, b])
    wide = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with pytest.raises(ValueError, match=r"`nets\[1\].0` is Linear\(in_features=3, out_features=6"):
        ensemble.from_modules([a, wide])
    relu = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with pytest.raises(
        ValueError, match=r"`nets\[1\].1` is ReLU\(\) and `nets\[0\].1` is Tanh\(\)"
    ):
        ensemble.from_modules([a, relu])
    with pytest.raises(ValueError, match=r"`nets\[0\].2` exists and `nets\[1\].2` does not"):
        ensemble.from_modules([a, a[:2]])
    frozen = small_net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nets\[1\].params\['0.weight'\] is missing"):
        ensemble.from_modules([a, frozen])


def test_members_whose_own_parameters_differ_in_shape_are_refused():
    class Own(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(
        ValueError, match=r"`nets\[1\].params\['scale'\]` has shape \(3,\), expected"
    ):
        ensemble.from_modules([Own(2), Own(3)])


def test_a_tied_parameter_within_a_member_is_no_sharing():
    def tied():
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        net[2].weight = net[0].weight
        return net

    nets, (x, y) = build(tied, 2), table()
    model, state = ensemble.from_modules(nets)
    assert "2.weight" not in state.params
    trained = ensemble.fit(
        model, state, (x, y), key=0, likelihood=Categorical(), optimizer=ADAM, num_epochs=3
    )
    for net in nets:
        train_alone(net, [(x, y)], ADAM, 3)
    assert_members_equal(trained, nets)


# -- bad input -----------------------------------------------------------------------------


class Whole(torch.optim.Optimizer):
    """Steps along the gradient divided by the norm of the whole tensor."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(self.param_groups[0]["lr"] * p.grad / p.grad.norm())


class Sign(Whole):
    """Elementwise, though torch has no such one."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(self.param_groups[0]["lr"] * p.grad.sign())


def fit_small(**changes):
    model, state = ensemble.from_modules(build(small_net, 2))
    call = {"key": 0, "likelihood": Categorical(), "optimizer": ADAM, "num_epochs": 1}
    call |= changes
    return ensemble.fit(model, call.pop("state", state), call.pop("data", table()), **call)


def test_an_elementwise_optimizer_from_elsewhere_is_taken():
    fit_small(optimizer=Sign)


@pytest.mark.parametrize(
    "name", ["LBFGS", "Adafactor", "SparseAdam", "Muon", "one that needs the whole tensor"]
)
def test_an_optimizer_that_would_mix_members_is_refused(name):
    if name == "Muon":  # stacked biases are matrices, which it takes

        def factory(leaves):
            return torch.optim.Muon([p for p in leaves if p.dim() == 2])

    else:
        factory = getattr(torch.optim, name, Whole)
    with pytest.raises(TypeError, match=r"which mixes the numbers of a tensor .*from_modules"):
        fit_small(optimizer=factory)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_fit_are_refused():
    other = torch.zeros(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"`optimizer` is a SGD, expected a function"):
        fit_small(optimizer=torch.optim.SGD([other], lr=0.1))
    with pytest.raises(TypeError, match=r"`optimizer` gives a list, expected a function"):
        fit_small(optimizer=lambda leaves: leaves)
    with pytest.raises(ValueError, match="over other tensors than the leaves it was given"):
        fit_small(optimizer=lambda leaves: torch.optim.SGD([other], lr=0.1))
    with pytest.raises(ValueError, match="`num_epochs` is 0, expected at least 1"):
        fit_small(num_epochs=0)
    with pytest.raises(TypeError, match="`key` is a str, expected a non-negative integer"):
        fit_small(key="seed")
    with pytest.raises(ValueError, match="`data` yielded no data"):
        fit_small(data=[])
    x, y = table()
    with pytest.raises(ValueError, match=r"`data` yielded no data.*exhausted generator"):
        fit_small(data=iter([(x, y)]), num_epochs=2)
    with pytest.raises(ValueError, match=r"`targets` has dtype torch.float32"):
        fit_small(data=(x, y.float()))
    with pytest.raises(ValueError, match=r"`targets` .*2"):
        fit_small(data=(x, y + 1))
    with pytest.raises(ValueError, match=r"`targets` has shape"):
        fit_small(data=(x, y[:, None].expand(-1, 3)))


def test_a_state_of_another_model_is_refused():
    _, other = ensemble.from_modules(build(lambda: nn.Linear(3, 2).double(), 2))
    with pytest.raises(ValueError, match=r"`state.params` has another structure: .*is missing"):
        fit_small(state=other)
    model, state = ensemble.from_modules(build(conv_net, 2))
    state.constants["1.running_mean"] = state.constants["1.running_mean"][:1]
    with pytest.raises(ValueError, match=r"leading axes are .*expected one length for all"):
        ensemble.losses(model, state, images()[0], key=0, likelihood=Categorical())


def test_a_batch_for_each_member_needs_the_axis():
    model, state = ensemble.from_modules(build(small_net, 2))
    x, y = table()
    with pytest.raises(ValueError, match=r"`batch\[0\]` has shape \(16, 3\), expected \(2, N, …\)"):
        ensemble.losses(model, state, (x, y), key=0, likelihood=Categorical(), per_member=True)


def test_targets_of_all_members_are_looked_at_once(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # all in one pass
    seen = []

    class Watched(Categorical):
        def check(self, outputs, targets):
            seen.append(tuple(targets.shape))
            super().check(outputs, targets)

    model, state = ensemble.from_modules(build(small_net, 3))
    x, y = (torch.stack([leaf] * 3) for leaf in table())
    arguments = {"key": 0, "likelihood": Watched(), "per_member": True}
    ensemble.losses(model, state, (x, y), **arguments)
    assert seen == [(3 * 16,)]
    # What is wrong is said of the member it is wrong with.
    y = y.clone()
    y[1, 2] = 7
    with pytest.raises(ValueError, match="`targets` holds labels from 0 to 7"):
        ensemble.losses(model, state, (x, y), **arguments)
    assert seen[1:] == [(3 * 16,), (16,), (16,)]
    with pytest.raises(ValueError, match=r"`targets` has shape \(16, 1\)"):
        ensemble.losses(model, state, (x, y[..., None]), **arguments)


def test_a_loss_that_is_not_finite_names_step_and_member_and_leaves_the_state():
    model, state = ensemble.from_modules(build(small_net, 3))
    state.params["2.bias"][1] = math.nan
    before = trees.clone(state)
    with pytest.raises(ValueError, match=r"the loss of member 1 is not finite at step 0 \(epoch 0"):
        ensemble.fit(
            model, state, table(), key=0, likelihood=Categorical(), optimizer=ADAM, num_epochs=1
        )
    assert_close(state, before, rtol=0, atol=0, equal_nan=True)

    model, state = ensemble.from_modules(build(small_net, 2))
    before, (x, y) = trees.clone(state), table()
    bad = x.clone()
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"member 0, 1 is not finite at step 1 \(epoch 0\)"):
        ensemble.fit(
            model,
            state,
            [(x, y), (bad, y)],
            key=0,
            likelihood=Categorical(),
            optimizer=ADAM,
            num_epochs=1,
        )
    assert_close(state, before, rtol=0, atol=0)


def test_an_ensemble_learns():
    x, _ = table(64)
    y = (x[:, 0] > 0).long()
    model, state = ensemble.init(small_net, key=0, num_members=3)
    trained = ensemble.fit(
        model,
        state,
        [(x[i::4], y[i::4]) for i in range(4)],
        key=1,
        likelihood=Categorical(),
        optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.1),
        num_epochs=15,
    )
    values, _ = ensemble.losses(model, trained, (x, y), key=0, likelihood=Categorical())
    assert float(values.max()) < 0.1
