"""Every structure of every curvature against dense float64 references."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev

import funcbayes as fb
from funcbayes import curvature
from funcbayes.core import trees, uses

STRUCTURES = ("diagonal", "kronecker", "ekfac", "dense", "block_diagonal", "low_rank")
CLASSES = 3


class Tied(nn.Module):
    """One weight twice, a position embedding, a gain, a token embedding and a view."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(3, 4))
        self.gain = nn.Parameter(torch.randn(4))
        self.shared = nn.Linear(4, 4)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.viewed = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = (self.tokens(x) + self.position) * self.gain
        x = torch.tanh(self.shared(torch.tanh(self.shared(x)))) @ self.mix
        return self.head(F.linear(x, self.viewed.T).mean(1))


def case(name):
    torch.manual_seed(0)
    if name == "mlp":
        net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.LayerNorm(6))
        net.append(nn.Linear(6, CLASSES))
        return net.double(), torch.randn(7, 5).double()
    if name == "conv":
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 3, 3, stride=2, padding_mode="circular", padding=1),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        )
        return net.double().eval(), torch.randn(7, 2, 4, 4).double()
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        net = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(12, CLASSES))
        return net.double().eval(), torch.randn(7, 3, 4).double()
    return Tied().double(), torch.randint(0, 7, (7, 3))


def targets(likelihood):
    torch.manual_seed(1)
    if isinstance(likelihood, fb.likelihoods.Gaussian):
        return torch.randn(7, CLASSES).double()
    return torch.randint(0, CLASSES, (7,))


LIKELIHOODS = {
    "categorical": fb.likelihoods.Categorical(),
    "gaussian": fb.likelihoods.Gaussian(0.7),
}


def reference(model, x, y, likelihood, kind):
    """The whole matrix, datum by datum from its Jacobian."""
    total = 0
    for n in range(len(x)):
        one, target = x[n : n + 1], y[n : n + 1]
        with uses.batchable():
            jacobian = jacrev(lambda p, one=one: model.apply(p, one))(model.params)
        outputs = model.apply(model.params, one)
        flat = torch.cat([j.reshape(CLASSES, -1) for j in trees.leaves(jacobian)], 1)
        if kind == "ggn":
            rows = likelihood.hessian_root(outputs).reshape(-1, CLASSES) @ flat
        else:
            slope = torch.func.grad(lambda f, t=target: likelihood.nll(f, t).sum())(outputs)
            rows = slope @ flat
        total = total + rows.T @ rows
    return total


def options(structure, size):
    return {"rank": size} if structure == "low_rank" else {}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("name", ["mlp", "conv", "transformer", "tied"])
def test_structures_keep_their_part_of_the_matrix(name, kind, likelihood):
    net, x = case(name)
    model, likelihood = fb.Model.from_module(net), LIKELIHOODS[likelihood]
    y = targets(likelihood)
    exact = reference(model, x, y, likelihood, kind)
    take = getattr(curvature, kind)
    found = {
        structure: take(
            model,
            [(x[:3], y[:3]), (x[3:], y[3:])],
            likelihood,
            structure=structure,
            **options(structure, len(exact)),
        ).to_dense(model.params)
        for structure in STRUCTURES
    }
    # Sums of a few hundred products in float64: far below 1e-10 of the largest entry.
    close = {"rtol": 1e-8, "atol": 1e-10 * float(exact.abs().max())}
    torch.testing.assert_close(found["diagonal"], exact.diagonal().diag(), **close)
    torch.testing.assert_close(found["dense"], exact, **close)
    torch.testing.assert_close(found["low_rank"], exact, **close)
    sizes = [leaf.numel() for leaf in trees.leaves(model.params)]
    mask = torch.block_diag(*(torch.ones(n, n) for n in sizes)).bool()
    blocks = torch.where(mask, exact, 0)
    torch.testing.assert_close(found["block_diagonal"], blocks, **close)
    # In a fixed basis no diagonal is nearer in Frobenius norm than the exact one.
    assert (found["ekfac"] - blocks).norm() <= (found["kronecker"] - blocks).norm() * (1 + 1e-12)


@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_ekfac_has_the_exact_diagonal_in_the_basis_of_the_factors(name):
    net, x = case(name)
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    kronecker, ekfac, exact = (
        curvature.ggn(model, (x, y), likelihood, structure=s).blocks
        for s in ("kronecker", "ekfac", "block_diagonal")
    )
    nearer = []
    for names, block in ekfac.items():
        if not isinstance(block, curvature.EigenKroneckerBlock):
            continue
        matrix = exact[names].to_dense()
        basis = torch.block_diag(
            *(
                torch.kron(left.contiguous(), right.contiguous())
                for left, right in zip(block.output_basis, block.input_basis, strict=True)
            )
        )
        inside = basis.T @ matrix @ basis
        torch.testing.assert_close(block.eigenvalues.flatten(), inside.diagonal())
        before = basis.T @ kronecker[names].to_dense() @ basis
        torch.testing.assert_close(before, before.diagonal().diag(), rtol=0, atol=1e-9)
        # Pythagoras: the same off the diagonal, and 0 on it.
        wrong = (before.diagonal() - inside.diagonal()).norm()
        far, near = ((b[names].to_dense() - matrix).norm() for b in (kronecker, ekfac))
        torch.testing.assert_close(far.square(), near.square() + wrong.square())
        nearer.append(float(near / far))
    assert min(nearer) < 0.99


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors_by_their_definition(sharing):
    net, x = case("conv")
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    found = curvature.ggn(
        model, (x, targets(likelihood)), likelihood, structure="kronecker", sharing=sharing
    ).blocks[("3.weight",)]
    hidden = net[:3](x).detach()
    padded = F.pad(hidden, (1, 1, 1, 1), mode="circular")
    a = F.unfold(padded, 3, stride=2).mT  # [data, positions, i]
    output = net[3](hidden).detach().requires_grad_()
    logits = net[4:](output)
    root = likelihood.hessian_root(logits.detach())
    g = torch.stack([torch.autograd.grad(logits, output, r, retain_graph=True)[0] for r in root])
    g = g.flatten(3).permute(1, 0, 3, 2)  # [data, columns, positions, o]
    if sharing == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    a, g = a.flatten(0, 1), g.flatten(0, 2)
    torch.testing.assert_close(found.inputs[0] / found.count, a.T @ a / len(a))
    torch.testing.assert_close(found.outputs[0], g.T @ g)


@pytest.mark.parametrize("kind", ["ggn", "monte_carlo_fisher"])
def test_sampled_curvatures_are_unbiased_and_do_not_depend_on_chunks(kind):
    net, x = case("mlp")
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    exact = reference(model, x, y, likelihood, "ggn").diagonal()
    take = getattr(curvature, kind)
    draws = torch.stack(
        [
            take(model, (x, y), likelihood, key=i, num_samples=2, structure="dense")
            .to_dense(model.params)
            .diagonal()
            for i in range(200)
        ]
    )
    error = draws.std(0) / math.sqrt(200)
    seen = error > 0
    assert float(((draws.mean(0) - exact).abs() / error)[seen].max()) < 5
    assert float(error[seen].max()) < 0.1 * float(exact.max())
    whole, parts = (
        take(model, (x, y), likelihood, key=3, num_samples=2, chunk_size=c) for c in (None, 2)
    )
    for a, b in zip(trees.leaves(whole), trees.leaves(parts), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "block_diagonal", "low_rank"])
def test_hessians(structure):
    net, x = case("mlp")
    net[1] = nn.Tanh()
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    # Not of the norm: torch.func differentiates its gradient wrongly.
    names = list(model.params)
    with torch.enable_grad():
        leaves = [model.params[name].clone().requires_grad_() for name in names]
        loss = likelihood.nll(model.apply(dict(zip(names, leaves, strict=True)), x), y).sum()
        slope = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)]
        )
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(s, leaves, retain_graph=True)])
            for s in slope
        ]
    exact = torch.stack(rows)
    found = curvature.hessian(
        model, (x, y), likelihood, structure=structure, **options(structure, len(exact))
    ).to_dense(model.params)
    if structure == "diagonal":
        exact = exact.diagonal().diag()
    if structure == "block_diagonal":
        sizes = [leaf.numel() for leaf in trees.leaves(model.params)]
        exact = exact * torch.block_diag(*(torch.ones(n, n) for n in sizes))
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-9)


def test_low_rank_finds_the_largest_eigenvalues():
    net, x = case("transformer")
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    exact = torch.linalg.eigvalsh(reference(model, x, y, likelihood, "ggn")).flip(0)
    found = curvature.ggn(model, (x, y), likelihood, structure="low_rank", rank=4)
    (block,) = found.blocks.values()
    torch.testing.assert_close(block.eigenvalues[0], exact[:4], rtol=1e-8, atol=0)


def test_a_mapping_mixes_structures():
    net, x = case("mlp")
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    found = curvature.ggn(
        model,
        (x, y),
        likelihood,
        structure={"3.*": "dense", "0.weight": "kronecker", "*": "diagonal"},
    )
    kinds = {names: type(block).__name__ for names, block in found.blocks.items()}
    assert kinds == {
        ("0.weight",): "KroneckerBlock",
        ("0.bias",): "DiagonalBlock",
        ("2.weight",): "DiagonalBlock",
        ("2.bias",): "DiagonalBlock",
        ("3.weight", "3.bias"): "DenseBlock",
    }
    exact = reference(model, x, y, likelihood, "ggn")[-21:, -21:]
    torch.testing.assert_close(found.blocks[("3.weight", "3.bias")].to_dense(), exact)


def test_a_last_layer_is_a_block_of_the_whole():
    net, x = case("conv")
    whole, last = (
        fb.Model.from_module(net, bayesian=b) for b in (None, lambda name: name.startswith("5."))
    )
    likelihood = fb.likelihoods.Categorical()
    y = targets(likelihood)
    a, b = (
        curvature.ggn(m, (x, y), likelihood, structure="dense").to_dense(m.params)
        for m in (whole, last)
    )
    torch.testing.assert_close(a[-len(b) :, -len(b) :], b)


def test_the_report_says_which_way_each_parameter_takes():
    net, x = case("tied")
    report = curvature.report(fb.Model.from_module(net), x, structure="kronecker")
    rows = {row.name: (row.path, row.block) for row in report.rows}
    assert rows["shared.weight"] == ("linear weight ×2", "kronecker")
    assert rows["mix"] == ("matmul weight", "kronecker")
    assert rows["position"] == ("add weight", "dense")
    assert rows["gain"] == ("mul weight", "dense")
    assert rows["tokens.weight"] == ("embedding weight", "dense")
    assert rows["viewed"][0].startswith("general (")
    assert rows["viewed"][1] == "dense"
    assert report.whole_batches is False
    assert "matmul weight" in str(report)


def test_whole_batches_run_where_no_datum_sees_another():
    net, x = case("transformer")
    assert curvature.report(fb.Model.from_module(net), x).whole_batches

    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.linear(x - x.mean(0))

    coupled = Coupled().double()
    assert not curvature.report(
        fb.Model.from_module(coupled), torch.randn(4, 5).double()
    ).whole_batches


def test_large_embeddings_get_a_block_for_each_row(monkeypatch):
    monkeypatch.setattr("funcbayes.curvature.layout.SMALL_BLOCK", 200)
    net, x = case("tied")
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    found = curvature.ggn(model, (x, y), likelihood, structure="kronecker")
    block = found.blocks[("tokens.weight",)]
    assert block.matrix.shape == (7, 4, 4)
    mask = torch.block_diag(*(torch.ones(4, 4),) * 7)
    start = trees.names(model.params).index("tokens.weight")
    offset = sum(leaf.numel() for leaf in trees.leaves(model.params)[:start])
    exact = reference(model, x, y, likelihood, "ggn")[offset : offset + 28, offset : offset + 28]
    torch.testing.assert_close(block.to_dense(), exact * mask)


def test_merged_shards_equal_one_fit():
    net, x = case("conv")
    model, likelihood = fb.Model.from_module(net), fb.likelihoods.Categorical()
    y = targets(likelihood)
    for structure in ("diagonal", "kronecker", "dense", "block_diagonal", "low_rank"):
        extra = options(structure, 200)
        parts = [
            fb.laplace.fit(model, part, likelihood=likelihood, structure=structure, **extra)
            for part in ((x[:3], y[:3]), (x[3:], y[3:]))
        ]
        merged = fb.laplace.merge(*parts)
        whole = fb.laplace.fit(model, (x, y), likelihood=likelihood, structure=structure, **extra)
        assert int(merged.num_data) == 7
        torch.testing.assert_close(
            merged.curvature.to_dense(model.params), whole.curvature.to_dense(model.params)
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "full"}, r"`structure` is 'full', expected one of \"diagonal\""),
        ({"structure": {"0.*": "dense"}}, r"`structure` has no pattern for '2.weight'"),
        (
            {"structure": {"*": "dense", "9.*": "dense"}},
            r"`structure\['9.\*'\]` is the first match of",
        ),
        ({"structure": {"*": "kfac"}}, r"`structure\['\*'\]` is 'kfac'"),
        ({"sharing": "both"}, r"`sharing` is 'both', expected one of"),
        ({"structure": "low_rank"}, r"`rank` is None, expected the number of eigenvalues"),
        ({"rank": 3}, r"`rank` is 3, which only"),
        ({"num_samples": 2}, r"`key` is None, expected a key"),
        ({"key": 2}, r"`num_samples` and `key`|sampled"),
    ],
)
def test_bad_options_are_named(changes, message):
    net, x = case("mlp")
    likelihood = fb.likelihoods.Categorical()
    with pytest.raises(ValueError, match=message):
        curvature.ggn(fb.Model.from_module(net), (x, targets(likelihood)), likelihood, **changes)


def test_kronecker_factors_of_a_hessian_do_not_exist():
    net, x = case("mlp")
    likelihood = fb.likelihoods.Categorical()
    with pytest.raises(ValueError, match="built from gradients, but the curvature is the Hessian"):
        curvature.hessian(
            fb.Model.from_module(net), (x, targets(likelihood)), likelihood, structure="kronecker"
        )


def test_iterators_cannot_be_gone_through_twice():
    net, x = case("mlp")
    likelihood = fb.likelihoods.Categorical()
    with pytest.raises(ValueError, match="`data`"):
        curvature.ggn(
            fb.Model.from_module(net),
            iter([(x, targets(likelihood))]),
            likelihood,
            structure="ekfac",
        )


@pytest.mark.parametrize(
    ("structure", "what"),
    [
        ("dense", "dense one"),
        ("block_diagonal", "dense one"),
        ("kronecker", "Kronecker product"),
        ("ekfac", "Kronecker product"),
        ("low_rank", "one of low rank"),
    ],
)
def test_what_does_not_fit_says_how_large_it_is(monkeypatch, structure, what):
    net, x = case("mlp")
    likelihood = fb.likelihoods.Categorical()
    data, rank = (x, targets(likelihood)), 3 if structure == "low_rank" else None
    model = fb.Model.from_module(net)
    # What a fit keeps is at most what is counted before it.
    found = curvature.ggn(model, data, likelihood, structure=structure, rank=rank)
    kept = 4 * sum(t.numel() for block in found.blocks.values() for t in block)
    monkeypatch.setattr("funcbayes.core.memory.available_bytes", lambda device: kept // 2)
    with pytest.raises(MemoryError, match=rf"the curvature takes .* is the {what} over the [0-9]+"):
        curvature.ggn(model, data, likelihood, structure=structure, rank=rank)
    monkeypatch.setattr("funcbayes.core.memory.available_bytes", lambda device: 4 * kept)
    if structure != "low_rank":  # which looks for its vectors among several times as many
        curvature.ggn(model, data, likelihood, structure=structure)


def test_uses_that_differ_between_data_are_exact_or_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    torch.manual_seed(0)
    model, x = fb.Model.from_module(Branching().double()), torch.randn(7, 5).double()
    likelihood = fb.likelihoods.Categorical()
    y = targets(likelihood)
    exact = reference(model, x, y, likelihood, "ggn")
    found = curvature.ggn(model, (x, y), likelihood, structure="dense").to_dense(model.params)
    torch.testing.assert_close(found, exact)
