"""Eigenpairs from products against `torch.linalg.eigh`, for spectra of every kind."""

import math

import pytest
import torch
from torch import nn

from funcbayes.core import likelihoods
from funcbayes.core.model import Model
from funcbayes.curvature import eigenpairs
from funcbayes.curvature.eigenpairs import top_eigenpairs
from funcbayes.curvature.products import CurvatureOperator, hessian_dense

CPU = torch.device("cpu")
N = 200


def line(start, stop, num=N):
    return torch.linspace(start, stop, num, dtype=torch.float64)


SPECTRA = {
    "geometric": torch.logspace(0, -8, N, dtype=torch.float64),
    "slow": 1 / torch.arange(1, N + 1, dtype=torch.float64),
    "linear": line(0, 1),
    "multiple": torch.cat([torch.ones(15), line(0.6, 0.6, 15), line(0.5, 0, N - 30)]).double(),
    "cluster at the rank": torch.cat([line(2, 1, 8), line(0.9, 0.899, 30), line(0.5, 0, N - 38)]),
    "tiny": 1e-12 * line(0, 1),
    "huge": 1e12 * line(0, 1),
    "indefinite": line(-2, 1),
    "negative": -line(0.1, 1),
}


def matrix(spectrum, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    n = len(spectrum)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    a = (q * spectrum) @ q.T
    return ((a + a.T) / 2).to(dtype)


def top(spectrum, rank, order):
    by = spectrum.abs() if order == "magnitude" else spectrum
    return spectrum[by.argsort(descending=True)[:rank]]


def solve(a, rank, **options):
    return top_eigenpairs(lambda v: a @ v, len(a), rank, dtype=a.dtype, device=CPU, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", eigenpairs.ORDERS)
@pytest.mark.parametrize("name", SPECTRA)
def test_finds_the_top_eigenpairs(name, order, dtype):
    spectrum, rank = SPECTRA[name], 10
    a = matrix(spectrum, dtype)
    values, vectors, info = solve(a, rank, order=order)
    assert info.converged
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    scale = float(spectrum.abs().max())
    # Never worse than the residual allows, tolerance · |λ| and some rounding.
    rounding = 100 * torch.finfo(dtype).eps * scale
    expected = top(spectrum, rank, order)
    torch.testing.assert_close(values.double(), expected, rtol=tolerance, atol=rounding)
    errors = (a @ vectors - vectors * values).double().norm(dim=0)
    assert bool((errors <= 1.1 * tolerance * expected.abs() + rounding).all())
    gram = (vectors.T @ vectors).double()
    # Each entry is a sum of len(a) products, of a size that adds up to 1 or less.
    torch.testing.assert_close(
        gram, torch.eye(rank).double(), rtol=0, atol=len(a) * torch.finfo(dtype).eps
    )
    # An eigenvalue's Rayleigh quotient is off by the square of its vector's error, over the gap.
    if name in ("geometric", "slow", "linear"):
        torch.testing.assert_close(
            values.double(), expected, rtol=max(1e-11, rounding / scale), atol=rounding
        )
    assert info.smallest <= float(spectrum.max())
    if name == "indefinite":
        assert info.smallest < -1.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("true_rank", [0, 1, 7, 12])
def test_beyond_the_rank_of_the_matrix_eigenvalues_are_exactly_zero(true_rank, dtype):
    spectrum = torch.cat([line(1, 2, true_rank), line(0, 0, N - true_rank)])
    values, vectors, info = solve(matrix(spectrum, dtype), 12)
    assert info.converged
    assert info.num_products <= 3
    assert int((values == 0).sum()) == 12 - true_rank
    gram = (vectors.T @ vectors).double()
    torch.testing.assert_close(
        gram, torch.eye(12).double(), rtol=0, atol=20 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("size", [1, 2, 9, 12, 14, 17, 25, 40])
@pytest.mark.parametrize("rank", [1, 8, 12, 50])
def test_every_size_and_rank(size, rank):
    spectrum = line(0.5, 1, size)
    values, vectors, info = solve(matrix(spectrum), rank)
    expected = spectrum.flip(0)[:rank]
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    assert vectors.shape == (size, min(rank, size))
    assert info.converged
    if size <= 40 and rank >= 8:  # a space that fits is filled without a restart
        assert info.num_vectors <= size


def test_short_directions_are_orthogonal_to_all_others():
    # Lengths from 1 to 1e-4, and rounding errors of 1e-7 along the basis, as images have them.
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(400, 40, generator=generator, dtype=torch.float64))[0].T
    basis, wanted = q[:30].float(), q[30:]
    noise = 1e-7 * torch.randn(10, 400, generator=generator, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    rows = mixing @ (torch.logspace(0, -4, 10, dtype=torch.float64)[:, None] * wanted) + noise
    found = eigenpairs._orthonormal(rows.float(), basis, 1e-6)
    assert found.shape == (10, 400)
    everything = torch.cat([basis, found]).double()
    torch.testing.assert_close(
        everything @ everything.T, torch.eye(40, dtype=torch.float64), rtol=0, atol=2e-6
    )
    fewer = eigenpairs._orthonormal(rows.float(), basis, 1e-2)
    assert len(fewer) == 5  # 1, 0.36, 0.13, 0.046, 0.017


def test_multiples_of_the_identity():
    values, vectors, info = solve(3 * torch.eye(50, dtype=torch.float64), 5)
    assert info.num_products == 1
    torch.testing.assert_close(values, torch.full((5,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5, dtype=torch.float64))


def test_restarts_keep_what_was_found(monkeypatch):
    a = matrix(SPECTRA["linear"])
    free = solve(a, 3)
    monkeypatch.setattr(eigenpairs, "BASIS_BYTES", 1)
    bounded = solve(a, 3)
    assert bounded[2].converged
    assert bounded[2].num_products > free[2].num_products > eigenpairs.FEWEST_BLOCKS
    torch.testing.assert_close(bounded[0], free[0], rtol=1e-10, atol=0)


def test_the_algebraic_order_passes_by_negative_eigenvalues_of_larger_magnitude():
    a = matrix(torch.cat([line(-5, -4, 20), line(0, 1, N - 20)]))
    values, _, info = solve(a, 4, order="algebraic")
    torch.testing.assert_close(values, line(0, 1, N - 20).flip(0)[:4], rtol=1e-6, atol=0)
    assert info.smallest < -4.5
    by_magnitude = solve(a, 4)[0]
    torch.testing.assert_close(by_magnitude, line(-5, -4, 20)[:4], rtol=1e-6, atol=0)


def test_counts_and_limits_the_products():
    a, seen = matrix(SPECTRA["linear"]), []

    def product(v):
        seen.append(v.shape[1])
        return a @ v

    options = {"dtype": a.dtype, "device": CPU}
    _, vectors, info = top_eigenpairs(product, N, 4, max_products=3, **options)
    assert not info.converged
    assert (info.num_products, info.num_vectors) == (3, sum(seen)) == (len(seen), sum(seen))
    assert info.residual > 1e-6
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=a.dtype))
    loose = top_eigenpairs(product, N, 4, tolerance=0.3, **options)[2]
    assert loose.converged
    assert loose.num_products < solve(a, 4)[2].num_products


def test_is_reproducible_and_leaves_the_global_generator_alone():
    a = matrix(SPECTRA["slow"])
    state = torch.get_rng_state()
    first, second = solve(a, 5), solve(a, 5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["ggn", "hessian", "empirical_fisher"])
def test_of_a_network(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = Model.from_module(net.double())
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 3, (30,))
    likelihood, data = likelihoods.Categorical(), [(x[:20], y[:20]), (x[20:], y[20:])]
    operator = CurvatureOperator(model, data, likelihood, kind)
    values, vectors, info = top_eigenpairs(
        operator, operator.size, 6, dtype=operator.dtype, device=operator.device
    )
    assert operator.num_products == info.num_products
    dense = hessian_dense(model, list(model.params.values()), range(4), data, likelihood, kind=kind)
    torch.testing.assert_close(values, top(torch.linalg.eigvalsh(dense), 6, "magnitude"))
    torch.testing.assert_close(dense @ vectors, vectors * values, rtol=0, atol=1e-5 * values[0])
    # Both are Rayleigh quotients or bounds of them: within the spectrum.
    assert info.smallest >= float(torch.linalg.eigvalsh(dense)[0]) - 1e-10
    assert math.isfinite(info.residual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` is 0, expected at least 1"),
        ({"size": 0}, "`size` is 0, expected at least 1"),
        ({"max_products": 0}, "`max_products` is 0, expected at least 1"),
        ({"order": "smallest"}, "`order` is 'smallest', expected \"magnitude\""),
        ({"product": lambda v: v[:2]}, r"`product` gave \(2, 7\) for vectors \(9, 7\)"),
        ({"product": lambda v: v / 0}, "`product` gave NaN or infinite"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {
        "product": lambda v: v, "size": 9, "rank": 2, "dtype": torch.float32, "device": CPU,
        **options,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(**arguments)
