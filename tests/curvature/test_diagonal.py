"""Diagonal curvature against dense float64 references, for every kind of network."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from funcbayes import curvature
from funcbayes.core import likelihoods, trees
from funcbayes.core.model import Model
from funcbayes.curvature import contractions, perturbation

N, CLASSES = 5, 3


def curvature_sums(model, data, likelihood, **options):
    """The sums, with the diagonal as a tree like the parameters."""
    sums = curvature.curvature_sums(model, data, likelihood, **options)
    return sums._replace(curvature=sums.curvature.diagonal(model.params))


def ggn(model, data, likelihood, **options):
    return curvature.ggn(model, data, likelihood, **options).diagonal(model.params)


def empirical_fisher(model, data, likelihood, **options):
    return curvature.empirical_fisher(model, data, likelihood, **options).diagonal(model.params)


CURVATURES = {"ggn": ggn, "empirical_fisher": empirical_fisher}


def dense_reference(model, x, y, likelihood, kind):
    """One datum at a time, by plain autograd; the GGN from the Jacobian and the dense Hessian."""
    leaves = [leaf.clone().requires_grad_() for leaf in trees.leaves(model.params)]
    totals = [torch.zeros_like(leaf) for leaf in leaves]

    def gradients(root):
        return torch.autograd.grad(
            root, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    for n in range(trees.tensor_leaves(x)[0].shape[0]):
        x_n, y_n = trees.tensor_map(lambda t, n=n: t[n : n + 1], (x, y))
        outputs = model.apply(trees.unflatten(leaves, model.params), x_n)
        if kind == "empirical_fisher":
            for total, g in zip(totals, gradients(likelihood.nll(outputs, y_n).sum()), strict=True):
                total += g.square()
            continue
        size = outputs.numel()
        jacobians = [torch.stack(j) for j in zip(*map(gradients, outputs.flatten()), strict=True)]
        at, shape = outputs.detach().flatten(), outputs.shape
        if isinstance(likelihood, likelihoods.HeteroscedasticGaussian):
            # The Fisher of a normal in its mean and its log variance.
            middle = torch.diag(torch.cat([(-at[size // 2 :]).exp(), torch.full_like(at, 0.5)]))
            middle = middle[:size, :size]
        else:
            middle = torch.autograd.functional.hessian(
                lambda f, y=y_n, shape=shape: likelihood.nll(f.view(shape), y).sum(), at
            )
        for total, j in zip(totals, jacobians, strict=True):
            total += torch.einsum("i...,ij,j...->...", j, middle, j)
    return trees.unflatten([total.detach() for total in totals], model.params)


def assert_trees_close(found, expected):
    # Both sides add the same N·columns·positions < 1e4 products of O(1) in another order, so
    # errors stay under 1e4 eps = 2e-12 of the largest entry.
    # A gradient that cancels to zero leaves (1e2 eps)² < 1e-25 of the largest of all.
    largest = max(float(leaf.abs().max()) for leaf in trees.leaves(expected))
    for (name, a), b in zip(trees.leaves_with_names(found), trees.leaves(expected), strict=True):
        atol = 1e-11 * float(b.abs().max()) + 1e-25 * largest
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


class Tied(nn.Module):
    """One matrix as embedding and as output layer, and used twice in between."""

    def __init__(self, vocabulary=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=-1)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, vocabulary)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.mix(torch.tanh(self.mix(self.embed(x))))).mean(1)


class Stray(nn.Module):
    """Parameters used outright, through a view, through a cast, and twice in one call."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 3))
        self.scale = nn.Parameter(torch.randn(3))
        self.viewed = nn.Linear(3, 3)
        self.twice = nn.Linear(3, 3, bias=False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = (x + self.position) * self.scale
        x = torch.tanh(F.linear(x, self.viewed.weight.t(), self.viewed.bias))
        x = x + F.linear(self.twice.weight, self.twice.weight).sum()
        return self.head(self.twice(x).flatten(1))


class Hidden(torch.autograd.Function):
    """A use of a weight that Python's torch functions do not show."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x @ weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


class HiddenUse(nn.Module):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(3, 3)

    def forward(self, x):
        return Hidden.apply(self.square(x), self.square.weight)


class Layouts(nn.Module):
    """Convolutions on unbatched input and with time folded into the batch; a 1-d linear."""

    def __init__(self):
        super().__init__()
        self.frames = nn.Conv2d(1, 2, 2)
        self.whole = nn.Conv1d(2, 2, 3)
        self.head = nn.Linear(2 * 14, CLASSES)

    def forward(self, x):
        x = self.frames(x.flatten(0, 1).unsqueeze(1))
        x = self.whole(x.mean(2).permute(1, 0, 2).flatten(1))
        return self.head(x.flatten()).unsqueeze(0)


class Overwriting(nn.Module):
    """Writes to the input of a layer after the layer has read it, or a copy of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.copies = False

    def forward(self, x):
        h = torch.sin(self.a(x))
        out = self.b(h.clone() if self.copies else h)
        return out + h.mul_(3.0)


class Attention(nn.Module):
    def __init__(self, cross=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 2, 4)) if cross else None
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        query = x if self.query is None else self.query
        return self.head(self.attention(query, x, x, need_weights=self.query is not None)[0]).sum(1)


class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x["a"]) * torch.tanh(self.b(x["b"]))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class Branching(nn.Module):
    """Uses one of two layers, by the value of the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def mlp():
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES)
    )


def conv2d(**options):
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), **options), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip


def frozen():
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def batch_norm():
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 3, 2), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(27, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES),
    )  # fmt: skip
    for part in net:
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    return net


def norms():
    return nn.Sequential(
        nn.LayerNorm((4, 3, 3)), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 2),
        nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.RMSNorm(16), nn.Linear(16, 4),
        nn.LayerNorm(4, bias=False), nn.Linear(4, CLASSES),
    )  # fmt: skip


def weight_norm():
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[2])
    return net


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv1d(4, 4, 2, groups=2, dilation=2, padding="same"), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), nn.Flatten(),
        nn.Linear(96, CLASSES),
    )  # fmt: skip


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Flatten(), nn.Linear(12, CLASSES))


def reals(*shape):
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


IMAGE = reals(4, 5, 6)
NETWORKS = {
    "mlp": (mlp, reals(4)),
    "linear on sequences": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(12, CLASSES)
        ),
        reals(6, 3),
    ),
    "conv2d": (conv2d, IMAGE),
    "conv2d many positions": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 2, 3, stride=2, padding=(1, 2), dilation=(1, 2)),
            nn.Flatten(),
            nn.Linear(2 * 12 * 12, CLASSES),
        ),
        reals(8, 24, 24),
    ),
    "conv2d many positions same": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 2, (4, 3), padding="same"),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(18, CLASSES),
        ),
        reals(8, 12, 12),
    ),
    "conv2d stride, padding": (lambda: conv2d(stride=(2, 1), padding=(1, 2)), IMAGE),
    "conv2d dilation": (lambda: conv2d(dilation=(2, 1)), IMAGE),
    "conv2d groups": (lambda: conv2d(groups=2), IMAGE),
    "conv2d same": (lambda: conv2d(padding="same", dilation=(1, 3)), IMAGE),
    "conv2d valid": (lambda: conv2d(padding="valid"), IMAGE),
    "conv2d circular": (lambda: conv2d(padding=(2, 1), padding_mode="circular"), IMAGE),
    "conv2d without bias": (lambda: conv2d(bias=False), IMAGE),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Flatten(), nn.Linear(96, CLASSES)),
        IMAGE,
    ),
    "conv1d": (conv1d, reals(2, 8)),
    "conv3d": (conv3d, reals(2, 3, 5, 2)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(84, CLASSES)),
        IMAGE,
    ),
    "batch norm": (batch_norm, reals(2, 6, 6)),
    "norms": (norms, reals(4, 3, 3)),
    "weight norm": (weight_norm, reals(4)),
    "layouts": (Layouts, reals(2, 3, 9)),
    "attention": (Attention, reals(3, 4)),
    "cross attention": (lambda: Attention(cross=True), reals(3, 4)),
    "encoder": (encoder, reals(3, 3)),
    "tied": (Tied, lambda: torch.randint(0, 7, (N, 6))),
    "frozen": (frozen, reals(4)),
    "stray": (Stray, reals(4, 3)),
    "hidden use": (HiddenUse, reals(3)),
    "dict input": (DictInput, lambda: {"a": reals(2)(), "b": reals(4)()}),
}
LOOPED = {
    "lstm": (Recurrent, reals(4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), reals(4, 3)),
    "branching": (Branching, reals(3)),
}


def case(name):
    torch.manual_seed(len(name))
    make, inputs = {**NETWORKS, **LOOPED}[name]
    net = make().double()
    if name == "tied":
        classes = 7
    else:
        classes = CLASSES
    return net, inputs(), torch.randint(0, classes, (N,))


# Said by torch of these networks, whoever runs them.
@pytest.mark.filterwarnings("ignore:.*_weight_norm")
@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_dense_reference_in_one_pass(name, kind, caplog):
    net, x, y = case(name)
    model = Model.from_module(net)
    likelihood = likelihoods.Categorical()
    with caplog.at_level(logging.INFO, logger="funcbayes"):
        found = CURVATURES[kind](model, (x, y), likelihood)
    assert not caplog.records  # nothing fell back to a loop
    assert_trees_close(found, dense_reference(model, x, y, likelihood, kind))


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", LOOPED)
def test_what_vmap_cannot_batch_is_exact_and_says_so_once(name, kind, caplog):
    net, x, y = case(name)
    model = Model.from_module(net)
    likelihood = likelihoods.Categorical()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    with caplog.at_level(logging.INFO, logger="funcbayes"):
        found = CURVATURES[kind](model, batches, likelihood, chunk_size=2)
    assert len(caplog.records) == 1
    assert "run in a loop" in caplog.text
    assert_trees_close(found, dense_reference(model, x, y, likelihood, kind))


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (likelihoods.Categorical(), lambda: torch.randint(0, 4, (N,))),
        (likelihoods.Bernoulli(), lambda: torch.randint(0, 2, (N, 4))),
        (likelihoods.Gaussian(noise_std=0.3), reals(4)),
        (likelihoods.Gaussian(noise_std=torch.tensor([0.3, 1.0, 2.0, 0.1])), reals(4)),
        (likelihoods.HeteroscedasticGaussian(), reals(2)),
    ],
    ids=["categorical", "bernoulli", "gaussian", "gaussian per output", "heteroscedastic"],
)
@pytest.mark.parametrize("kind", CURVATURES)
def test_every_likelihood(likelihood, targets, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model, x, y = Model.from_module(net), reals(3)(), targets()
    found = curvature_sums(model, (x, y), likelihood, curvature=kind)
    assert_trees_close(found.curvature, dense_reference(model, x, y, likelihood, kind))
    torch.testing.assert_close(found.loss, likelihood.nll(net(x), y).sum().detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (
            lambda: nn.Sequential(
                nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(18, CLASSES)
            ),
            lambda: torch.randint(0, 4, (N, 6)),
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(),
                nn.Flatten(), nn.Linear(36, CLASSES),
            ),
            reals(2, 4, 4),
        ),
        (
            lambda: nn.Sequential(nn.EmbeddingBag(4, 3), nn.Linear(3, CLASSES)),
            lambda: torch.randint(0, 4, (N, 6)),
        ),
    ],
    ids=["embedding by frequency", "batch norm without statistics", "embedding bag"],
)  # fmt: skip
def test_unusual_calls_are_exact(make, inputs, kind):
    torch.manual_seed(0)
    net, x, y = make().double(), inputs(), torch.randint(0, CLASSES, (N,))
    model, likelihood = Model.from_module(net), likelihoods.Categorical()
    found = CURVATURES[kind](model, (x, y), likelihood)
    assert_trees_close(found, dense_reference(model, x, y, likelihood, kind))


@pytest.mark.parametrize("kind", CURVATURES)
def test_an_input_that_the_model_overwrites_is_remembered(kind):
    torch.manual_seed(0)
    net, x, y = Overwriting().double(), reals(3)(), torch.randint(0, CLASSES, (N,))
    found = CURVATURES[kind](Model.from_module(net), (x, y), likelihoods.Categorical())
    # Plain autograd refuses the network as it is.
    net.copies = True
    expected = dense_reference(Model.from_module(net), x, y, likelihoods.Categorical(), kind)
    assert_trees_close(found, expected)


@pytest.mark.parametrize("kind", CURVATURES)
def test_labels_per_position(kind):
    torch.manual_seed(0)
    net = nn.Conv2d(2, CLASSES, 3, padding=1).double()
    model, x, y = Model.from_module(net), reals(2, 4, 4)(), torch.randint(0, CLASSES, (N, 4, 4))
    likelihood = likelihoods.Categorical(class_dim=1)
    found = CURVATURES[kind](model, (x, y), likelihood)
    assert_trees_close(found, dense_reference(model, x, y, likelihood, kind))


@pytest.mark.parametrize("kind", CURVATURES)
def test_pure_functions_with_any_tree(kind):
    torch.manual_seed(0)
    params = [
        {"w": torch.randn(3, CLASSES).double()},
        (torch.randn(4, 3).double(), torch.randn(()).double()),
    ]

    def apply(params, x, constants):
        return (
            torch.tanh(F.linear(x, params[1][0])) @ constants["mix"] @ params[0]["w"] * params[1][1]
        )

    model = Model(apply=apply, params=params, constants={"mix": torch.randn(4, 3).double()})
    x, y = reals(3)(), torch.randint(0, CLASSES, (N,))
    found = CURVATURES[kind](model, (x, y), likelihoods.Categorical())
    expected = dense_reference(model, x, y, likelihoods.Categorical(), kind)
    assert trees.same_structure(found, params)
    assert_trees_close(found, expected)


@pytest.mark.parametrize(
    ("name", "general"),
    [
        ("mlp", set()),
        ("batch norm", set()),
        ("norms", set()),
        ("attention", set()),
        ("encoder", set()),
        ("tied", set()),
        ("stray", {"viewed.weight", "twice.weight"}),
        ("hidden use", {"square.weight"}),
        ("cross attention", {"query", "attention.in_proj_weight", "attention.in_proj_bias"}),
    ],
)
def test_only_parameters_without_a_rule_take_the_general_path(name, general):
    net, x, _ = case(name)
    model = Model.from_module(net)
    x = trees.tensor_map(lambda t: t[:1], x)
    plan = perturbation.discover(model, trees.leaves(model.params), x, None)
    names = list(model.params)
    assert {names[number] for number in plan.general} == general


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("slice_bytes", [1, 3000])
def test_slices_of_a_contraction_add_up(kind, slice_bytes, monkeypatch):
    monkeypatch.setattr(contractions, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr("funcbayes.curvature.accumulate.SLICE_BYTES", slice_bytes)
    for name in ("conv2d groups", "conv2d many positions", "encoder", "tied"):
        net, x, y = case(name)
        model = Model.from_module(net)
        found = CURVATURES[kind](model, (x, y), likelihoods.Categorical())
        expected = dense_reference(model, x, y, likelihoods.Categorical(), kind)
        assert_trees_close(found, expected)


NET, X, Y = case("conv2d groups")
MODEL = Model.from_module(NET)
WHOLE = {
    kind: curvature_sums(MODEL, (X, Y), likelihoods.Categorical(), curvature=kind)
    for kind in CURVATURES
}


@given(
    kind=st.sampled_from(sorted(CURVATURES)),
    order=st.permutations(range(N)),
    cuts=st.sets(st.integers(1, N - 1)),
    chunk_size=st.none() | st.integers(1, N + 1),
)
def test_neither_order_nor_batches_nor_chunks_matter(kind, order, cuts, chunk_size):
    edges = [0, *sorted(cuts), N]
    batches = [(X[list(order[a:b])], Y[list(order[a:b])]) for a, b in pairwise(edges)]
    found = curvature_sums(
        MODEL, batches, likelihoods.Categorical(), curvature=kind, chunk_size=chunk_size
    )
    assert_trees_close(found.curvature, WHOLE[kind].curvature)
    torch.testing.assert_close(found.loss, WHOLE[kind].loss)
    assert found.num_data == N


def test_batches_may_differ_in_shape():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    model, likelihood = Model.from_module(net), likelihoods.Categorical()
    batches = [
        (torch.randn(n, 2, t).double(), torch.randint(0, 3, (n,)))
        for n, t in ((2, 4), (3, 7), (1, 4))
    ]
    found = ggn(model, batches, likelihood)
    parts = [dense_reference(model, x, y, likelihood, "ggn") for x, y in batches]
    assert_trees_close(found, trees.tree_map(lambda *p: sum(p), *parts))


def test_automatic_chunks_follow_the_budget(monkeypatch):
    net, x, y = case("conv2d")
    model, likelihood = Model.from_module(net), likelihoods.Categorical()
    seen = []
    original = perturbation.gradients_by_batch

    def spy(model, leaves, plan, x, *rest, **options):
        seen.append(len(x))
        return original(model, leaves, plan, x, *rest, **options)

    monkeypatch.setattr(perturbation, "gradients_by_batch", spy)
    ggn(model, (x, y), likelihood)
    assert seen == [N]
    seen.clear()
    monkeypatch.setattr("funcbayes.curvature.sums.MOST_CHUNK_BYTES", 1)
    ggn(model, (x, y), likelihood)
    assert seen == [1] * N


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CURVATURES)
def test_low_precision_accumulates_in_float32(dtype, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    x, y = torch.randn(64, 4, dtype=dtype), torch.randint(0, 2, (64,))
    found = curvature_sums(
        Model.from_module(net), (x, y), likelihoods.Categorical(), curvature=kind
    )
    exact = CURVATURES[kind](
        Model.from_module(copy.deepcopy(net).double()), (x.double(), y), likelihoods.Categorical()
    )
    assert found.loss.dtype == torch.float32
    for a, b in zip(trees.leaves(found.curvature), trees.leaves(exact), strict=True):
        assert a.dtype == torch.float32
        # One rounding at each of about 4 operations, squared: 8 eps, of bfloat16 8 · 2⁻⁸ = 3 %.
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_squares_of_half_precision_do_not_underflow():
    small = 2.0**-8
    weight = torch.zeros(1, 1, dtype=torch.float16)
    model = Model(apply=lambda w, x: F.linear(x, w), params=weight)
    data = torch.full((N, 1), small, dtype=torch.float16)
    found = empirical_fisher(model, (data, data), likelihoods.Gaussian())
    # The gradient -y x = 2⁻¹⁶ is a float16, its square 2⁻³² is none.
    assert float(found) == N * small**4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["batch norm", "tied", "lstm"])
def test_nothing_of_the_callers_changes(name, mode):
    net, x, y = case(name)
    net.train()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    model = Model.from_module(net)
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    pointers = [p.data_ptr() for p in net.parameters()]
    rng = torch.get_rng_state()
    with mode():
        found = ggn(model, (x, y), likelihoods.Categorical())
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert not any(leaf.requires_grad or leaf.is_inference() for leaf in trees.leaves(found))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(part.training for part in net.modules())
    assert pointers == [p.data_ptr() for p in net.parameters()]
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", ["batch norm", "stray", "lstm"])
def test_inference_tensors_are_as_good_as_others(name, kind):
    net, x, y = case(name)
    expected = CURVATURES[kind](Model.from_module(net), (x, y), likelihoods.Categorical())
    with torch.inference_mode():
        state = {key: value.clone() for key, value in net.state_dict().items()}

        def apply(params, x, constants=None):
            constants = constants or {}
            return functional_call(net.eval(), {**constants, **params}, x)

        params = {name: state.pop(name) for name, _ in net.named_parameters()}
        model = Model(apply=apply, params=params, constants=state)
        found = CURVATURES[kind](model, (x.clone(), y.clone()), likelihoods.Categorical())
    assert_trees_close(found, expected)


def small():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return Model.from_module(net), torch.randn(N, 3), torch.randint(0, 2, (N,))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": nn.Linear(3, 2)}, TypeError, r"`model` is a Linear, .*Model\.from_module"),
        ({"likelihood": "categorical"}, TypeError, r"`likelihood` is 'categorical'"),
        ({"structure": "kron"}, ValueError, r"`structure` is 'kron', expected one of \"diagonal\""),
        ({"chunk_size": 0}, ValueError, r"`chunk_size` is 0, expected at least 1"),
        ({"chunk_size": 2.0}, TypeError, r"`chunk_size` is 2\.0, expected an int"),
        ({"data": []}, ValueError, r"`data` yielded no data"),
        ({"data": 3}, TypeError, r"`data` is a int, expected an iterable"),
        ({"data": [torch.zeros(3)]}, TypeError, r"batch 0 of `data` is a Tensor"),
        ({"y": torch.zeros(N)}, ValueError, r"`targets` has dtype torch\.float32"),
        ({"y": torch.full((N,), 2)}, ValueError, r"`targets`"),
        ({"y": torch.zeros(N - 1).long()}, ValueError, r"`targets` has shape \(4,\)"),
        ({"x": torch.full((N, 3), torch.nan)}, ValueError, r"loss of batch 0 of `data`"),
        (
            {"x": {"a": torch.zeros(N, 3), "b": torch.zeros(2, 3)}},
            ValueError,
            r"inputs\['b'\] of batch 0 of `data` has shape \(2, 3\), expected a leading",
        ),
    ],
    ids=lambda value: None,
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(change, error, match):
    model, x, y = small()
    model = change.pop("model", model)
    data = change.pop("data", (change.pop("x", x), change.pop("y", y)))
    likelihood = change.pop("likelihood", likelihoods.Categorical())
    for function in CURVATURES.values():
        with pytest.raises(error, match=match):
            function(model, data, likelihood, **change)


def test_bad_curvature_and_weights_are_named():
    model, x, y = small()
    with pytest.raises(ValueError, match=r"`curvature` is 'fisher', expected one of \"ggn\""):
        curvature_sums(model, (x, y), likelihoods.Categorical(), curvature="fisher")
    model.params["bias"][1] = torch.inf
    with pytest.raises(ValueError, match=r"`params\['bias'\]` has 1 of 2 entries NaN or infinite"):
        ggn(model, (x, y), likelihoods.Categorical())


def test_an_infinite_slope_is_named():
    model = Model(apply=lambda p, x: (p["w"] * x).abs().sqrt(), params={"w": torch.ones(2)})
    x = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ValueError, match="the curvature of 'w' is not finite"):
        ggn(model, (x, x), likelihoods.Gaussian())


def test_errors_of_the_model_are_not_taken_for_vmaps(caplog):
    model, x, y = small()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ggn(model, (x[:, :2], y), likelihoods.Categorical())
    assert not caplog.records
