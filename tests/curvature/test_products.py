"""Matrix-free products against dense float64 matrices, for every kind of network and loss."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcbayes.core import likelihoods, trees
from funcbayes.core.model import Model
from funcbayes.curvature import products
from funcbayes.curvature.products import (
    KINDS,
    CurvatureOperator,
    curvature_product,
    hessian_dense,
    hessian_diagonal,
)

N, CLASSES = 5, 3
CATEGORICAL = likelihoods.Categorical()


def dense(model, x, y, likelihood, kind, chosen=None):
    """The matrix of the chosen leaves by plain autograd, one row after the other."""
    leaves = [leaf.clone().requires_grad_() for leaf in trees.leaves(model.params)]
    wanted = [leaves[i] for i in (range(len(leaves)) if chosen is None else chosen)]

    def gradient(root, **options):
        if not root.requires_grad:
            return torch.zeros(sum(leaf.numel() for leaf in wanted), dtype=root.dtype)
        parts = torch.autograd.grad(
            root, wanted, retain_graph=True, allow_unused=True, materialize_grads=True, **options
        )
        return torch.cat([part.flatten() for part in parts])

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        outputs = model.apply(trees.unflatten(leaves, model.params), x)
    losses = likelihood.nll(outputs, y)
    if kind == "hessian":
        slope = gradient(losses.sum(), create_graph=True)
        return torch.stack([gradient(entry) for entry in slope])
    if kind == "empirical_fisher":
        g = torch.stack([gradient(loss) for loss in losses])
        return g.T @ g
    total = 0
    for row, target in zip(outputs, y, strict=True):
        jacobian = torch.stack([gradient(entry) for entry in row.flatten()])
        total = total + jacobian.T @ middle(likelihood, row.detach(), target) @ jacobian
    return total


def middle(likelihood, row, target):
    """Λ of one datum, `[outputs, outputs]`."""
    at = row.flatten()
    if isinstance(likelihood, likelihoods.HeteroscedasticGaussian):
        # The Fisher of a normal in its mean and its log variance.
        half = len(at) // 2
        return torch.diag(torch.cat([(-at[half:]).exp(), torch.full_like(at[half:], 0.5)]))
    return torch.autograd.functional.hessian(
        lambda f: likelihood.nll(f.view(1, *row.shape), target.unsqueeze(0)).sum(), at
    )


def assert_close(found, expected):
    # Sums of under 1e4 products of O(1) in another order: 1e4 eps = 2e-12 of the largest.
    torch.testing.assert_close(
        found, expected, rtol=1e-10, atol=1e-11 * float(expected.abs().max())
    )


class Tied(nn.Module):
    """One matrix as embedding, whose last row is padding, and as output layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 4, padding_idx=-1, scale_grad_by_freq=False)
        with torch.no_grad():
            self.embed.weight[-1] = 0.3
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.mix(torch.tanh(self.mix(self.embed(x))))).mean(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(3, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.encoder(x + self.position)
        return self.head(self.attention(x, x, x, need_weights=False)[0]).sum(1)


class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(2, 3), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.a(x["a"]) * torch.tanh(self.b(x["b"]))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class NoTangents(torch.autograd.Function):
    """Differentiable twice, but not forward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.square, self.head = nn.Linear(3, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(NoTangents.apply(self.square(x), self.square.weight)))


def mlp():
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES)
    )


def conv():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, padding="same"), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(3), nn.Linear(3, CLASSES),
    )  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def reals(*shape):
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def words():
    return torch.randint(0, CLASSES, (N, 6))


BATCHED = {
    "mlp": (mlp, reals(4)),
    "conv": (conv, reals(2, 8, 8)),
    "attention": (Attention, reals(3, 4)),
    "tied": (Tied, words),
    "dict input": (DictInput, lambda: {"a": reals(2)(), "b": reals(4)()}),
}
LOOPED = {
    "lstm": (Recurrent, reals(4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), reals(4, 3)),
    "custom function": (Custom, reals(3)),
}


def case(name):
    torch.manual_seed(len(name))
    make, inputs = {**BATCHED, **LOOPED}[name]
    model = Model.from_module(make().double())
    return model, trees.leaves(model.params), inputs(), torch.randint(0, CLASSES, (N,))


def vectors_for(leaves, k=4):
    torch.manual_seed(1)
    return torch.randn(sum(leaf.numel() for leaf in leaves), k, dtype=leaves[0].dtype)


@pytest.fixture
def tiny():
    return case("mlp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BATCHED)
def test_equals_the_dense_matrix_without_a_loop(name, kind, caplog):
    model, leaves, x, y = case(name)
    v = vectors_for(leaves)
    with caplog.at_level(logging.INFO, logger="funcbayes"):
        found = curvature_product(model, leaves, range(len(leaves)), (x, y), CATEGORICAL, kind, v)
    assert not caplog.records
    assert_close(found, dense(model, x, y, CATEGORICAL, kind) @ v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOOPED)
def test_what_has_no_batched_rule_is_exact_and_says_so_once(name, kind, caplog):
    model, leaves, x, y = case(name)
    v = vectors_for(leaves)
    with caplog.at_level(logging.INFO, logger="funcbayes"):
        found = curvature_product(
            model, leaves, range(len(leaves)), (x, y), CATEGORICAL, kind, v, chunk_size=2
        )
    assert len(caplog.records) == 1
    assert "columns run one by one" in caplog.text
    assert_close(found, dense(model, x, y, CATEGORICAL, kind) @ v)


def test_a_failure_halfway_loses_and_doubles_nothing(tiny, monkeypatch):
    model, leaves, x, y = tiny
    batched = products._batched

    def failing(problem, x, y):
        multiply, calls = batched(problem, x, y), []

        def once(columns):
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("vmap has no batching rule for today")
            return multiply(columns)

        return once

    monkeypatch.setattr(products, "_batched", failing)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    v = vectors_for(leaves)
    found = curvature_product(model, leaves, range(6), (x, y), CATEGORICAL, "ggn", v)
    assert_close(found, dense(model, x, y, CATEGORICAL, "ggn") @ v)


def test_out_of_memory_is_not_answered_by_a_loop(tiny, monkeypatch):
    model, leaves, x, y = tiny

    def failing(problem, x, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(products, "_batched", failing)
    with pytest.raises(torch.OutOfMemoryError):
        curvature_product(model, leaves, range(6), (x, y), CATEGORICAL, "ggn", vectors_for(leaves))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("likelihood", "shape", "targets"),
    [
        (likelihoods.Categorical(temperature=0.7), (), lambda: torch.randint(0, 4, (N,))),
        (likelihoods.Categorical(class_dim=1), (4, 2), lambda: torch.randint(0, 4, (N, 2))),
        (likelihoods.Bernoulli(temperature=2.0), (), lambda: torch.randint(0, 2, (N, 4))),
        (likelihoods.Gaussian(noise_std=0.3), (), reals(4)),
        (likelihoods.Gaussian(noise_std=torch.tensor([0.3, 1.0, 2.0, 0.1])), (), reals(4)),
        (likelihoods.HeteroscedasticGaussian(), (), reals(2)),
    ],
    ids=["categorical", "positions", "bernoulli", "gaussian", "per output", "heteroscedastic"],
)
def test_every_likelihood(likelihood, shape, targets, kind):
    torch.manual_seed(0)
    width = shape[0] * shape[1] if shape else 4
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, width), nn.Unflatten(1, shape or (4,))
    )
    model, x, y = Model.from_module(net.double()), reals(3)(), targets()
    leaves = trees.leaves(model.params)
    v = vectors_for(leaves)
    found = curvature_product(model, leaves, range(4), (x, y), likelihood, kind, v)
    assert_close(found, dense(model, x, y, likelihood, kind) @ v)


@pytest.mark.parametrize("temperature", [1.0, 1e-2])
def test_ggn_does_not_cancel_where_the_network_is_certain(temperature):
    # Λ = diag(p) − ppᵀ with p₀ = 1 − 3e-9 and less: in float32 p₀ is 1, and u₀ − Σ pᵢ uᵢ is a
    # rounding error of u. The shift makes all entries accurate to some eps.
    likelihood = likelihoods.Categorical(temperature=temperature)
    outputs = torch.tensor([[20.0 * temperature, 0.1 * temperature, -0.2 * temperature]])
    weight = torch.zeros(3)
    model = Model(lambda params, x: x + params, weight)
    v = torch.eye(3) + 1
    found = curvature_product(
        model, [weight], [0], (outputs, torch.tensor([1])), likelihood, "ggn", v
    )
    p = (outputs.double() / temperature).softmax(1)[0]
    # diag(p) − ppᵀ without cancellation: off the diagonal −pᵢpⱼ, rows sum to 0.
    exact = -p[:, None] * p
    exact.fill_diagonal_(0)
    exact = (exact - exact.sum(1).diag()) / temperature**2 @ v.double()
    # Exponentials of logits of 20 carry 20 eps = 2.4e-6.
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_weight_norm_has_the_second_derivative_of_its_formula():
    # The reference by hand: torch's own second derivative of its kernel is not symmetric.
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()).double()
    g, v = net[0].parametrizations.weight.original0, net[0].parametrizations.weight.original1

    def by_hand(params, x):
        weight = params["v"] * params["g"] / params["v"].norm(dim=1, keepdim=True)
        return torch.tanh(F.linear(x, weight, params["b"]))

    plain = Model(by_hand, {"b": net[0].bias.detach(), "g": g.detach(), "v": v.detach()})
    model, x, y = Model.from_module(net), reals(4)(), torch.randint(0, 3, (N,))
    leaves = trees.leaves(model.params)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in trees.leaves(plain.params)]
    for kind in KINDS:
        found = hessian_dense(model, leaves, range(3), (x, y), CATEGORICAL, kind=kind)
        assert_close(found, dense(plain, x, y, CATEGORICAL, kind))


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_embedding_bags_of_one_length(kind, mode, caplog):
    # The reference by its parts: torch has no second derivative of its kernel.
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(CLASSES, 4, mode=mode), nn.Tanh()).double()

    def by_hand(params, x):
        rows = params["w"][x]
        return torch.tanh(rows.mean(1) if mode == "mean" else rows.sum(1))

    model = Model.from_module(net)
    plain = Model(by_hand, {"w": net[0].weight.detach()})
    x, y = words(), torch.randint(0, 4, (N,))
    leaves = trees.leaves(model.params)
    found = hessian_dense(model, leaves, [0], (x, y), CATEGORICAL, kind=kind)
    assert not caplog.records
    assert_close(found, dense(plain, x, y, CATEGORICAL, kind))


def test_gradient_scaling_by_frequency_is_no_property_of_the_function():
    torch.manual_seed(0)
    scaled = nn.Sequential(nn.Embedding(CLASSES, 4, scale_grad_by_freq=True), nn.Flatten())
    scaled = scaled.double()
    plain = nn.Sequential(nn.Embedding.from_pretrained(scaled[0].weight.detach()), nn.Flatten())
    x, y = words()[:, :1], torch.randint(0, 4, (N,))
    matrices = []
    for net in (scaled, plain):
        model = Model.from_module(net, bayesian=lambda name: True)
        leaves = trees.leaves(model.params)
        matrices.append(hessian_dense(model, leaves, [0], (x, y), CATEGORICAL))
    assert_close(*matrices)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_leaves_in_their_order(tiny, kind):
    model, leaves, x, y = tiny
    chosen = [3, 0]
    v = vectors_for([leaves[3], leaves[0]])
    found = curvature_product(model, leaves, chosen, (x, y), CATEGORICAL, kind, v)
    assert_close(found, dense(model, x, y, CATEGORICAL, kind, chosen) @ v)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_and_its_diagonal(tiny, kind, monkeypatch):
    model, leaves, x, y = tiny
    monkeypatch.setattr(products, "CHUNK_BYTES", 2**12)  # several chunks of columns and data
    expected = dense(model, x, y, CATEGORICAL, kind, [2, 3])
    found = hessian_dense(model, leaves, [2, 3], (x, y), CATEGORICAL, kind=kind)
    assert_close(found, expected)
    assert torch.equal(found, found.T)
    found = hessian_diagonal(model, leaves, [2, 3], (x, y), CATEGORICAL, kind=kind)
    assert_close(found, expected.diag())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 2**11, 2**14])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 7])
def test_chunks_do_not_matter(kind, budget, chunk_size, monkeypatch):
    model, leaves, x, y = case("conv")
    v = vectors_for(leaves, 11)
    arguments = (model, leaves, range(len(leaves)))
    whole = curvature_product(*arguments, (x, y), CATEGORICAL, kind, v)
    monkeypatch.setattr(products, "CHUNK_BYTES", budget)
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    parts = curvature_product(*arguments, batches, CATEGORICAL, kind, v, chunk_size=chunk_size)
    assert_close(parts, whole)


def test_chunks_follow_from_the_memory(tiny, monkeypatch):
    model, leaves, x, y = tiny
    seen = []
    batched = products._batched

    def spy(problem, x, y):
        multiply = batched(problem, x, y)

        def counted(columns):
            seen.append((len(x), len(columns[0])))
            return multiply(columns)

        return counted

    monkeypatch.setattr(products, "_batched", spy)
    v = vectors_for(leaves, 20)
    arguments = (model, leaves, range(6), (x, y), CATEGORICAL, "ggn", v)
    curvature_product(*arguments)
    assert seen == [(N, 20)]
    seen.clear()
    monkeypatch.setattr(products, "CHUNK_BYTES", 3 * 8 * len(v) * 6)
    curvature_product(*arguments)
    assert {columns for _, columns in seen} == {6, 2}  # tangents of the parameters fit 6 times
    seen.clear()
    monkeypatch.setattr(products, "CHUNK_BYTES", 2**11)
    curvature_product(*arguments)
    assert max(data for data, _ in seen) < N


def test_masks_split_the_ggn_by_output():
    torch.manual_seed(0)
    std = torch.tensor([0.5, 2.0, 1.0])
    net = mlp().double()
    model, x, y = Model.from_module(net), reals(4)(), reals(3)()
    leaves = trees.leaves(model.params)
    v = vectors_for(leaves)
    gaussian = likelihoods.Gaussian(noise_std=std)
    arguments = (model, leaves, range(6), (x, y), gaussian, "ggn", v)
    parts = [curvature_product(*arguments, column_weights=mask) for mask in torch.eye(3)]
    assert_close(torch.stack(parts).sum(0), curvature_product(*arguments))
    # A change of one output's noise is a change of that part's weight.
    weights = torch.tensor([1.0, 4.0, 1.0])
    changed = likelihoods.Gaussian(noise_std=torch.tensor([0.5, 1.0, 1.0]))
    expected = curvature_product(model, leaves, range(6), (x, y), changed, "ggn", v)
    assert_close(curvature_product(*arguments, column_weights=weights), expected)
    assert_close(parts[0] + 4 * parts[1] + parts[2], expected)


def test_weights_of_a_matrix_that_is_not_diagonal_stay_symmetric(tiny):
    model, leaves, x, y = tiny
    w = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)

    class Weighted(likelihoods.Categorical):
        def hessian_root(self, outputs):
            return super().hessian_root(outputs) * w.sqrt()

    v = vectors_for(leaves)
    found = curvature_product(
        model, leaves, range(6), (x, y), CATEGORICAL, "ggn", v, column_weights=w
    )
    # A class of one's own goes through its root.
    expected = curvature_product(model, leaves, range(6), (x, y), Weighted(), "ggn", v)
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_accumulates_in_float32(kind, dtype):
    model64, leaves, x, y = case("mlp")
    model = Model.from_module(mlp().to(dtype))
    low = [leaf.to(dtype) for leaf in leaves]
    v = vectors_for(leaves)
    exact = dense(model64, x, y, CATEGORICAL, kind) @ v
    found = curvature_product(model, low, range(6), (x.to(dtype), y), CATEGORICAL, kind, v.float())
    assert found.dtype == torch.float32
    # About ten roundings to the dtype's eps (1.2e-7, 7.8e-3) on the way, of the largest entry.
    atol = 10 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


class TestOperator:
    def test_goes_through_the_data_once_a_product(self, tiny):
        model, leaves, x, y = tiny
        passes = []

        class Data:
            def __iter__(self):
                passes.append(1)
                yield x[:2], y[:2]
                yield x[2:], y[2:]

        operator = CurvatureOperator(model, Data(), CATEGORICAL)
        v = vectors_for(leaves)
        assert not passes
        assert (operator.size, operator.dtype) == (len(v), torch.float64)
        expected = dense(model, x, y, CATEGORICAL, "ggn") @ v
        for number in (1, 2):
            assert_close(operator(v), expected)
            assert (len(passes), operator.num_products) == (number, number)
        assert operator.num_data == N

    @pytest.mark.parametrize("make", [iter, lambda data: (pair for pair in data)])
    def test_refuses_an_iterator(self, tiny, make):
        model, _, x, y = tiny
        with pytest.raises(ValueError, match=r"`data` is an iterator .*exhausted after one pass"):
            CurvatureOperator(model, make([(x, y)]), CATEGORICAL)

    def test_one_product_may_come_from_an_iterator(self, tiny):
        model, leaves, x, y = tiny
        v = vectors_for(leaves)
        found = curvature_product(model, leaves, range(6), iter([(x, y)]), CATEGORICAL, "ggn", v)
        assert_close(found, dense(model, x, y, CATEGORICAL, "ggn") @ v)

    def test_notices_other_data(self, tiny):
        model, leaves, x, y = tiny
        data = [(x, y)]
        operator = CurvatureOperator(model, data, CATEGORICAL)
        operator(vectors_for(leaves))
        data.append((x[:1], y[:1]))
        with pytest.raises(ValueError, match="gave 6 data on pass 2 and 5 before"):
            operator(vectors_for(leaves))


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_caller_changes(name, kind):
    torch.manual_seed(0)
    make, inputs = {**BATCHED, **LOOPED}[name]
    net = make().double().train()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model, x, y = Model.from_module(net), inputs().requires_grad_(), torch.randint(0, 3, (N,))
    copy, state = x.detach().clone(), torch.get_rng_state()
    leaves = list(net.parameters())
    v = vectors_for(leaves).requires_grad_()
    torch.set_rng_state(state)
    arguments = (model, leaves, range(len(leaves)), (x, y), CATEGORICAL, kind, v)
    expected = curvature_product(*arguments)
    assert not expected.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copy)
    assert x.grad is None
    assert v.grad is None
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    with torch.no_grad():
        assert_close(curvature_product(*arguments), expected)
    with torch.inference_mode():
        inference = (x.clone(), y.clone())
        assert_close(
            curvature_product(*arguments[:3], inference, CATEGORICAL, kind, v.clone()), expected
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "fisher"}, ValueError, "`kind` is 'fisher', expected one of \"ggn\""),
        ({"chosen": []}, ValueError, r"`chosen` is \(\), expected different numbers from 0 to 5"),
        ({"chosen": [0, 0]}, ValueError, "`chosen` is"),
        ({"chosen": [6]}, ValueError, "`chosen` is"),
        ({"leaves": []}, ValueError, "`leaves` has 0 tensors, expected 6"),
        ({"vectors": torch.ones(3, 2)}, ValueError, r"shape \(3, 2\), expected \(64, k\)"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` is 0, expected at least 1"),
        ({"chunk_size": 1.5}, TypeError, "`chunk_size` is 1.5, expected an int"),
        ({"likelihood": "categorical"}, TypeError, "`likelihood` is 'categorical'"),
        ({"column_weights": torch.ones(2)}, ValueError, r"\(2,\), expected one that broadcasts to"),
        ({"column_weights": torch.ones(1, 3)}, ValueError, "`column_weights` has shape"),
        ({"column_weights": -torch.ones(3)}, ValueError, "`column_weights` has entries that are"),
        (
            {"column_weights": torch.ones(3), "kind": "hessian"},
            ValueError,
            '`column_weights` came with `kind` "hessian"',
        ),
        ({"data": []}, ValueError, "`data` yielded no data"),
        ({"data": (torch.randn(5, 4).double(), torch.ones(6).long())}, ValueError, "`targets`"),
        (
            {"data": (torch.full((5, 4), torch.nan).double(), torch.ones(5).long())},
            ValueError,
            "the curvature of .* is not finite",
        ),
        (
            {"data": [({"a": torch.ones(2, 4), "b": torch.ones(3, 4)}, torch.ones(2).long())]},
            ValueError,
            r"inputs\['b'\] of batch 0 of `data` has shape \(3, 4\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(tiny, change, error, message):
    model, leaves, x, y = tiny
    arguments = {
        "leaves": leaves, "chosen": range(6), "data": (x, y), "likelihood": CATEGORICAL,
        "kind": "ggn", "vectors": vectors_for(leaves), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        curvature_product(model, **arguments)
