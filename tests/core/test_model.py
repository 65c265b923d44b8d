"""The network as a pure function: right answers, and a module that nobody touched."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.testing import assert_close

from funcbayes.core import trees
from funcbayes.core.model import Model
from funcbayes.testing import networks
from tests.snapshots import assert_unchanged, snapshot

KINDS = list(networks.LOGIT_KINDS)
F64 = torch.float64


def perturbed(params, scale=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        name: p + scale * torch.randn(p.shape, generator=gen, dtype=p.dtype)
        for name, p in params.items()
    }


def reference(net, params, x, *, train=False):
    """The network with other weights, by a deep copy and assignment."""
    twin = copy.deepcopy(net).train(train)
    with torch.no_grad():
        for name, value in params.items():
            twin.get_parameter(name).copy_(value)
        return twin(*x) if isinstance(x, tuple) else twin(x)


# -- what is a parameter -------------------------------------------------------------------


def test_the_default_is_all_that_requires_grad():
    net = networks.make("convolution")
    net[0].weight.requires_grad_(False)
    model = Model.from_module(net)
    assert set(model.params) == {"0.bias", "1.weight", "1.bias", "5.weight", "5.bias"}
    assert set(model.constants) == {
        "0.weight",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    tensors = (*model.params.values(), *model.constants.values())
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_predicate_selects_by_name_whatever_requires_grad():
    net = networks.make("linear").requires_grad_(False)
    model = Model.from_module(net, bayesian=lambda name: name.startswith("3"))
    assert set(model.params) == {"3.weight", "3.bias"}
    assert set(model.constants) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("alias", ["first.weight", "second.weight"])
def test_a_tied_weight_is_one_leaf_found_under_each_of_its_names(alias):
    net = networks.make("tied", dtype=F64)
    model = Model.from_module(net, bayesian=lambda name: name == alias)
    assert list(model.params) == ["first.weight"]
    x = networks.inputs("tied", 3, dtype=F64)
    params = perturbed(model.params)
    assert_close(model.apply(params, x), reference(net, params, x))


def test_a_module_under_two_names_is_one_set_of_leaves():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    model = Model.from_module(net, bayesian=lambda name: name.startswith("2"))
    assert set(model.params) == {"0.weight", "0.bias"}
    params, x = perturbed(model.params), torch.randn(2, 3)
    assert_close(model.apply(params, x), reference(net, params, x))


def test_nothing_selected_is_an_error():
    net = networks.make("linear")
    with pytest.raises(ValueError, match=r"`bayesian` selects no parameter, .* one of '0.weight'"):
        Model.from_module(net, bayesian=lambda name: name == "typo")
    with pytest.raises(ValueError, match=r"no parameter of `net` requires gradients .*'0.weight'"):
        Model.from_module(net.requires_grad_(False))
    with pytest.raises(ValueError, match=r"no parameter of `net` .* none at all"):
        Model.from_module(nn.ReLU())


def test_lazy_modules_are_refused_until_they_have_run():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(ValueError, match=r"parameter '0.weight' is not initialised yet: run one"):
        Model.from_module(net)
    with pytest.raises(ValueError, match=r"buffer '1.running_mean' is not initialised yet"):
        Model.from_module(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))
    net.eval()(torch.randn(4, 2))
    assert set(Model.from_module(net).params) == {"0.weight", "0.bias"}


def test_what_is_no_module_or_no_parameter_is_refused():
    with pytest.raises(TypeError, match=r"`net` is a function|Type-check error"):
        Model.from_module(lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`params\['k'\]` has dtype torch.int64"):
        Model(apply=lambda p, x: x, params={"k": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"`params\['k'\]` is a float"):
        Model(apply=lambda p, x: x, params={"k": 1.0})
    with pytest.raises(ValueError, match="`params` has no leaves"):
        Model(apply=lambda p, x: x, params=[])
    with pytest.raises(ValueError, match="expected a real floating-point dtype"):
        Model(apply=lambda p, x: x, params=torch.ones(2, dtype=torch.complex64))


# -- the forward pass ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_apply_equals_the_module_with_these_weights(kind):
    net = networks.make(kind, dtype=F64)
    net.train()  # apply evaluates in evaluation mode all the same
    model = Model.from_module(net)
    x = networks.inputs(kind, 4, dtype=F64)
    for seed in range(2):
        params = perturbed(model.params, seed=seed)
        assert_close(model.apply(params, x), reference(net, params, x))
    assert_close(model.apply(model.params, x), reference(net, {}, x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recurrent"])
def test_apply_is_differentiable_and_batches(kind):
    net = networks.make(kind, dtype=F64)
    model = Model.from_module(net)
    x = networks.inputs(kind, 4, dtype=F64)

    def loss(params):
        return model.apply(params, x).square().sum()

    params = perturbed(model.params)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    tensors = {**model.constants, **leaves}
    functional_call(copy.deepcopy(net), tensors, networks.arguments(x)).square().sum().backward()
    assert_close(grad(loss)(params), {name: leaf.grad for name, leaf in leaves.items()})

    stacked = trees.stack([perturbed(model.params, seed=seed) for seed in range(3)])
    if "attention" not in kind:  # its fused kernels have no batching rule: `uses` is for that
        rows = [model.apply(trees.index(stacked, i), x) for i in range(3)]
        assert_close(vmap(lambda p: model.apply(p, x))(stacked), torch.stack(rows))


class Branches(nn.Module):
    """Two inputs, nested outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, a, b=None):
        h = self.layer(a)
        h = h if b is None else h + b
        return {"h": h, "parts": (h[:, :1], h[:, 1:])}


def test_a_tuple_is_positional_arguments_and_outputs_are_pytrees():
    net = Branches().double()
    model = Model.from_module(net)
    a, b = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64)
    for x in [(a,), (a, b), a]:
        assert_close(model.apply(model.params, x), reference(net, {}, x))


def test_constants_replace_those_of_the_same_name():
    net = networks.make("convolution", dtype=F64)
    model = Model.from_module(net, bayesian=lambda name: name.startswith("5"))
    x = networks.inputs("convolution", 4, dtype=F64)
    constants = {
        "1.running_mean": torch.randn(4, dtype=F64),
        "0.weight": torch.randn_like(net[0].weight),
    }
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[1].running_mean.copy_(constants["1.running_mean"])
        twin[0].weight.copy_(constants["0.weight"])
        assert_close(model.apply(model.params, x, constants), twin(x))


def test_names_that_the_model_does_not_have_are_refused():
    model = Model.from_module(networks.make("convolution"))
    x = networks.inputs("convolution", 2)
    wrong = {"5.weigth" if name == "5.weight" else name: p for name, p in model.params.items()}
    for call in (model.apply, model.apply_train):
        with pytest.raises(ValueError, match=r"params\['5.weight'\] is missing"):
            call(wrong, x)
        with pytest.raises(ValueError, match="`params` has another structure"):
            call({**model.params, "extra": torch.zeros(1)}, x)
        with pytest.raises(ValueError, match=r"`constants` has \['runing'\], expected names among"):
            call(model.params, x, {"runing": torch.zeros(4)})
    pure = Model(apply=lambda p, x: x @ p, params=torch.eye(2))
    with pytest.raises(ValueError, match=r"`constants` has \['c'\], expected names among: none"):
        pure.apply(pure.params, torch.eye(2), {"c": torch.zeros(1)})


def test_pure_functions_are_models():
    w, c = torch.randn(2, 3), torch.randn(3)
    model = Model(apply=lambda p, x: x @ p["w"], params={"w": w})
    x = torch.randn(5, 2)
    assert model.constants == {}
    assert_close(model.apply({"w": 2 * w}, x), 2 * x @ w)
    outputs, constants = model.apply_train(model.params, x)
    assert_close(outputs, x @ w)
    assert constants == {}
    shifted = Model(apply=lambda p, x, k: x @ p["w"] + k["c"], params={"w": w}, constants={"c": c})
    assert_close(shifted.apply(shifted.params, x), x @ w + c)
    assert_close(shifted.apply(shifted.params, x, {"c": 2 * c}), x @ w + 2 * c)
    single = Model(apply=lambda p, x: x @ p, params=w)  # a tensor is a tree
    assert_close(single.apply(w, x), x @ w)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_really_replaced(layer):
    # These layers also keep their weights in a list of their own.
    net = layer(3, 4, num_layers=2, bidirectional=True).double()
    model = Model.from_module(net)
    x = torch.randn(5, 2, 3, dtype=F64)
    zeros = trees.zeros_like(model.params)
    assert not bool(model.apply(zeros, x)[0].any())
    params = perturbed(model.params)
    assert_close(model.apply(params, x), reference(net, params, x))
    assert_close(model.apply(model.params, x), reference(net, {}, x))


class Symmetric(nn.Module):
    def forward(self, x):
        return x + x.T


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh())


def symmetric():
    net = nn.Sequential(nn.Linear(3, 3))
    register_parametrization(net[0], "weight", Symmetric())
    return net


def spectral():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)))


# torch has no batching rule for the normed weight: it loops, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("make", [weight_normed, symmetric, spectral])
def test_parametrized_modules(make):
    net = make().double().eval()
    model = Model.from_module(net)
    x = torch.randn(2, 3, dtype=F64)
    before = snapshot(net)
    params = perturbed(model.params)
    expected = torch.stack([reference(net, p, x) for p in (params, model.params)])
    assert_close(model.apply(params, x), expected[0])
    both = trees.stack([params, model.params])
    assert_close(vmap(lambda p: model.apply(p, x))(both), expected)
    assert_unchanged(net, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_by_hook():
    net = nn.utils.weight_norm(nn.Linear(3, 3)).double()
    net(torch.randn(2, 3, dtype=F64)).sum().backward()  # leaves a non-leaf `weight` behind
    model = Model.from_module(net)
    assert set(model.params) == {"bias", "weight_g", "weight_v"}
    params, x = perturbed(model.params), torch.randn(2, 3, dtype=F64)
    weight = net.weight
    assert_close(model.apply(params, x), reference_by_call(net, params, x))
    assert net.weight is weight


def reference_by_call(net, params, x):
    v, g = params["weight_v"], params["weight_g"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T + params["bias"]


# -- the module is shared, and not touched ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_shared_and_training_in_place_is_seen(kind):
    net = networks.make(kind)
    model = Model.from_module(net)
    own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, tensor in {**model.params, **model.constants}.items():
        assert tensor.data_ptr() == own[name].data_ptr()
    x = networks.inputs(kind, 3)
    before = model.apply(model.params, x)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    net(*networks.arguments(x)).square().sum().backward()
    optimizer.step()
    after = model.apply(model.params, x)
    assert not torch.allclose(before, after)
    assert_close(after, net(*networks.arguments(x)).detach())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_touches_the_module(kind, training):
    net = networks.make(kind).train(training)
    x = networks.inputs(kind, 3)
    net(*networks.arguments(x)).square().sum().backward()
    before = snapshot(net)
    model = Model.from_module(net)
    params = perturbed(model.params)
    originals = trees.clone((model.params, model.constants, params))
    model.apply(params, x)
    with torch.random.fork_rng():  # dropout without a key draws from the global generator
        model.apply_train(params, x)
    grad(lambda p: model.apply(p, x).sum())(params)
    assert_unchanged(net, before)
    assert_close((model.params, model.constants, params), originals, rtol=0, atol=0)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def forward(self, x):
        self.calls.add_(1)
        x = self.norm(x)
        self.trace = x
        if bool(x.isnan().any()):
            raise RuntimeError("half-way")
        return x


def test_a_forward_pass_that_raises_leaves_everything_as_it_was():
    net = Fails()
    good, bad = torch.randn(4, 2), torch.full((4, 2), torch.nan)
    before = snapshot(net)
    model = Model.from_module(net)
    expected = model.apply(model.params, good)
    params = perturbed(model.params)
    for call in (model.apply, model.apply_train):
        with pytest.raises(RuntimeError, match="half-way"):
            call(params, bad)
    assert_unchanged(net, before)
    assert_close(model.apply(model.params, good), expected, rtol=0, atol=0)


class Stateful(nn.Module):
    """Keeps a counter, its last output, a lazily made buffer, and writes to a buffer in eval."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(2))
        self.calls = 0
        self.last = None

    def forward(self, x):
        self.calls += 1
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.full((2,), float(self.calls)))
        self.total += x.mean(0)
        out = self.layer(x) * self.calls + self.total + self.table
        out = out if self.last is None else out + self.last
        self.last = out
        return out


def test_one_call_does_not_see_what_another_left_behind():
    net = Stateful()
    x = torch.randn(3, 2)
    before = snapshot(net)
    model = Model.from_module(net)
    first = model.apply(model.params, x)
    model.apply(perturbed(model.params), x + 1)
    grad(lambda p: model.apply(p, x).sum())(model.params)
    vmap(lambda p: model.apply(p, x))(trees.stack([model.params, model.params]))
    assert_close(model.apply(model.params, x), first, rtol=0, atol=0)
    assert_unchanged(net, before)
    assert (net.calls, net.last) == (0, None)
    outputs, constants = model.apply_train(model.params, x)
    assert_close(outputs, first)
    assert_close(constants, {"total": x.mean(0)})  # a buffer written to is handed back
    assert not bool(net.total.any())


def test_changes_of_the_module_after_the_model_was_made_do_not_show():
    net = networks.make("linear")
    model = Model.from_module(net)
    x = networks.inputs("linear", 3)
    expected = model.apply(model.params, x)
    net[1] = nn.Sigmoid()
    net.train()
    assert_close(model.apply(model.params, x), expected, rtol=0, atol=0)


def test_hooks_of_the_module_run():
    net = networks.make("linear")
    seen = []
    net[0].register_forward_hook(lambda module, args, out: out * 2)
    net.register_forward_pre_hook(lambda module, args: seen.append(module))
    model = Model.from_module(net)
    x = networks.inputs("linear", 3)
    outputs = model.apply(model.params, x)
    assert len(seen) == 1
    assert seen[0] is not net  # a copy of it
    assert_close(outputs, net(x).detach())


# -- training mode -------------------------------------------------------------------------


def test_apply_train_returns_the_buffers_and_modifies_none():
    net = networks.make("convolution", dtype=F64)
    net[3].p = 0.0
    before = snapshot(net)
    model = Model.from_module(net, bayesian=lambda name: not name.startswith("0"))
    x, params = networks.inputs("convolution", 4, dtype=F64), perturbed(model.params)
    twin = copy.deepcopy(net).train()
    with torch.no_grad():
        for name, value in params.items():
            twin.get_parameter(name).copy_(value)
        expected = twin(x)
    outputs, constants = model.apply_train(params, x)
    assert_close(outputs, expected)
    assert_close(constants, dict(twin.named_buffers()))  # without the frozen parameters
    assert_unchanged(net, before)

    # A second step goes on from what it is given, and leaves that alone, too.
    given = trees.clone(constants)
    twin(x)
    _, again = model.apply_train(params, x, constants)
    assert_close(again, dict(twin.named_buffers()))
    assert_close(constants, given, rtol=0, atol=0)


@pytest.mark.parametrize("num", [1, 3])
def test_apply_train_works_under_vmap_with_stacked_buffers(num):
    net = networks.make("convolution", dtype=F64)
    net[3].p = 0.0
    model = Model.from_module(net)
    x = networks.inputs("convolution", 3, dtype=F64)
    params = trees.stack([perturbed(model.params, seed=i) for i in range(num)])
    own = [trees.tree_map(lambda c, i=i: c + i, model.constants) for i in range(num)]
    constants = trees.stack(own)
    outputs, buffers = vmap(lambda p, c: model.apply_train(p, x, c))(params, constants)
    for i in range(num):
        expected = model.apply_train(trees.index(params, i), x, trees.index(constants, i))
        assert_close(trees.index((outputs, buffers), i), expected)


def test_modules_held_in_evaluation_mode_stay_there():
    net = networks.make("convolution").train()
    net[1].eval()
    net[3].p = 0.0
    model = Model.from_module(net)
    x = networks.inputs("convolution", 4)
    outputs, constants = model.apply_train(model.params, x)
    assert_close(outputs, net(x).detach())
    assert_close(constants, model.constants, rtol=0, atol=0)
    # A network that is as a whole in evaluation mode trains as a whole.
    model = Model.from_module(net.eval())
    assert not torch.equal(
        model.apply_train(model.params, x)[1]["1.running_mean"], net[1].running_mean
    )


# -- many threads, copies ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["convolution", "recurrent", "tied"])
def test_threads_at_once_give_right_answers(kind):
    net = networks.make(kind, dtype=F64)
    model = Model.from_module(net)
    x = networks.inputs(kind, 3, dtype=F64)
    settings = [perturbed(model.params, seed=i) for i in range(24)]
    expected = [model.apply(params, x) for params in settings]
    model = Model.from_module(net)  # without the copy that the calls above have made
    start = threading.Barrier(6)

    def work(worker):
        start.wait()
        return {i: model.apply(settings[i], x) for i in range(worker, len(settings), 6)}

    with ThreadPoolExecutor(6) as pool:
        results = {i: y for part in pool.map(work, range(6)) for i, y in part.items()}
    assert_close([results[i] for i in range(len(settings))], expected, rtol=0, atol=0)


class Meeting(nn.Module):
    """Waits half-way, until as many calls as the barrier wants are inside."""

    barrier = threading.Barrier(1)  # of the class: copies share it

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x):
        x = x @ self.weight
        Meeting.barrier.wait(timeout=30)
        return x @ self.weight


def test_calls_that_overlap_do_not_see_each_others_weights(monkeypatch):
    model = Model.from_module(Meeting())
    model.apply(model.params, torch.eye(2))  # leaves one copy behind, which only one may borrow
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(3))
    weights = [torch.full((2, 2), float(i)) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda w: model.apply({"weight": w}, torch.eye(2)), weights))
    assert_close(results, [w @ w for w in weights])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_models_are_copied_and_pickled(kind, how):
    net = networks.make(kind)
    model = Model.from_module(net)
    x = networks.inputs(kind, 2)
    expected = model.apply(model.params, x)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_close(twin.apply(twin.params, x), expected)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert_close(twin.apply(twin.params, x), expected)


def test_a_module_that_cannot_be_copied_is_named():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].guard = threading.Lock()
    with pytest.raises(TypeError, match=r"`net` cannot be copied, as its attribute '0.guard' can"):
        Model.from_module(net)


def test_an_embedding_with_max_norm_does_not_write_to_the_users_weight():
    net = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2)).eval()
    before = net[0].weight.detach().clone()
    model = Model.from_module(net)
    x = torch.tensor([0, 3])
    found = model.apply(model.params, x)
    assert torch.equal(net[0].weight, before)
    torch.testing.assert_close(found, net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused_by_name():
    with pytest.raises(TypeError, match="TorchScript module"):
        Model.from_module(torch.jit.script(nn.Linear(2, 2)))


class WritesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, x):
        x -= 1.0
        return self.linear(self.relu(x))


def test_a_network_that_writes_to_its_inputs_leaves_the_users_alone():
    net = WritesInput().eval()
    model = Model.from_module(net)
    x = torch.ones(2, 3)
    expected = net(x.clone())
    for _ in range(3):
        torch.testing.assert_close(model.apply(model.params, x), expected)
        outputs = torch.func.vmap(lambda row: model.apply(model.params, row[None]))(x)
        torch.testing.assert_close(outputs[:, 0], expected)
    assert (x == 1).all()


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.total, self.cache, self.seen = torch.zeros(2), {}, []

    def forward(self, x):
        self.total.add_(1.0)
        self.seen.append(x)
        if "scale" not in self.cache:
            self.cache["scale"] = self.linear.weight.sum()
        return self.linear(x) * self.cache["scale"] + self.total


def test_what_a_forward_pass_leaves_in_containers_and_tensors_is_forgotten():
    net = Remembers().eval()
    model = Model.from_module(net)
    x = torch.ones(1, 3)
    doubled = {name: 2 * p for name, p in model.params.items()}
    first = model.apply(model.params, x)
    other = model.apply(doubled, x)
    torch.testing.assert_close(model.apply(model.params, x), first)
    torch.testing.assert_close(other - 1, 4 * (first - 1))
    assert not net.total.any()
    assert not net.cache
    assert not net.seen


class Overwrites(nn.Module):
    """Clips a weight, rescales a frozen one, and gives a third new memory, at every call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)
        self.second.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.first.weight.clamp_(-0.1, 0.1)
            self.second.weight.mul_(0.9)
        self.second.bias.data = 0.5 * self.second.bias.data
        if x.isnan().any():
            raise FloatingPointError
        return self.second(self.first(x))


@pytest.mark.parametrize("method", ["apply", "apply_train"])
def test_a_network_that_overwrites_its_weights_leaves_those_of_the_user(method):
    net, fresh = Overwrites(), Overwrites()
    fresh.load_state_dict(net.state_dict())
    before, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(4, 3)
    pointers = {k: v.data_ptr() for k, v in net.state_dict().items()}
    model, want = Model.from_module(net), fresh(x)
    call = getattr(model, method)
    with pytest.raises(FloatingPointError):
        call(model.params, x * float("nan"))
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            outputs = call(model.params, x)
        torch.testing.assert_close(outputs if method == "apply" else outputs[0], want)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.data_ptr() == pointers[name], name
    for name, value in (model.params | model.constants).items():
        assert value.data_ptr() == pointers[name], name


def test_a_model_at_other_values_leaves_the_first_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model, x = Model.from_module(net), torch.randn(4, 2)
    params = {name: p + 1 for name, p in model.params.items()}
    mean = torch.ones(3)
    moved = model.replace(params, {"1.running_mean": mean})
    torch.testing.assert_close(
        moved.apply(moved.params, x), model.apply(params, x, {"1.running_mean": mean})
    )
    assert not torch.equal(moved.apply(moved.params, x), model.apply(model.params, x))
    assert model.params["0.weight"] is not params["0.weight"]
    assert torch.equal(model.constants["1.running_mean"], torch.zeros(3))
    with pytest.raises(ValueError, match="`params`"):
        model.replace({"weight": torch.ones(3)})
    with pytest.raises(ValueError, match="`constants` has"):
        model.replace(params, {"mean": mean})
