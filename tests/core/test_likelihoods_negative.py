"""A likelihood from its negative log likelihood: its Hessian at the targets, and its doors."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, vjp, vmap

from funcbayes.core.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    NegativeLogLikelihood,
    Poisson,
    hessian_root,
)

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def randint(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def log_cosh(f, y):
    """Robust regression; each output its own, curved most where the residual is small."""
    r = (y - f).flatten(1)
    return (r.abs() + F.softplus(-2 * r.abs()) - math.log(2)).sum(1)


def length(f, y):
    """√(1 + |y - f|²): outputs that the Hessian couples, and that the targets move."""
    return (1 + (y - f).flatten(1).square().sum(1)).sqrt()


def smoothed(f, y):
    """Cross-entropy with smoothed labels: a singular Hessian."""
    return F.cross_entropy(f, y, reduction="none", label_smoothing=0.1)


def weighted(f, targets):
    """Targets that are a tree: values and the weight of each datum."""
    return targets["weight"] * (targets["value"] - f).square().sum(-1) / 2


def student(f, y):
    """Convex only near the target."""
    return 2 * torch.log1p((y - f).flatten(1).square() / 3).sum(1)


TREE = {"value": rand(5, 2, seed=1), "weight": rand(5, seed=2).exp()}
CASES = {
    "log-cosh": (log_cosh, rand(6, 1), 3 * rand(6, 1, seed=1)),
    "log-cosh-outputs": (log_cosh, rand(4, 3), 3 * rand(4, 3, seed=1)),
    "length": (length, rand(5, 3), rand(5, 3, seed=1)),
    "length-positions": (length, rand(3, 2, 2), rand(3, 2, 2, seed=1)),
    "smoothed": (smoothed, rand(5, 4), randint(4, 5)),
    "weighted": (weighted, rand(5, 2), TREE),
    "student-near": (student, rand(5, 2), rand(5, 2)),
    "no-axes": (lambda f, y: (y - f).square() + (y - f) ** 4, rand(4), rand(4, seed=1)),
}
cases = pytest.mark.parametrize("name", CASES)


def datum(targets, n):
    return (
        {k: v[n : n + 1] for k, v in targets.items()}
        if isinstance(targets, dict)
        else targets[n : n + 1]
    )


def reference(fn, outputs, targets):
    """[batch, n, n] by plain autograd, one datum after the other."""
    blocks = []
    for n, f in enumerate(outputs):
        y = datum(targets, n)
        h = torch.autograd.functional.hessian(lambda f, y=y: fn(f[None], y).sum(), f)
        blocks.append(h.reshape(f.numel(), f.numel()))
    return torch.stack(blocks)


def outer(root):
    root = root.flatten(2) if root.ndim > 2 else root[..., None]
    return torch.einsum("cni,cnj->nij", root, root)


# Roots


@cases
def test_root_is_that_of_the_hessian_at_the_targets(name):
    fn, outputs, targets = CASES[name]
    likelihood = NegativeLogLikelihood(fn)
    likelihood.check(outputs, targets)
    root = hessian_root(likelihood, outputs, targets)
    assert root.shape == (outputs[0].numel(), *outputs.shape)
    # Eigenvalues are good to eps |Λ|, |Λ| up to 60 here; the square root makes nothing worse in
    # the product.
    torch.testing.assert_close(outer(root), reference(fn, outputs, targets), rtol=0, atol=1e-13)


# torch's own, in forward mode: decompositions that it scripts, and logsigmoid's under vmap.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        (Categorical(), 2 * rand(5, 4), randint(4, 5)),
        (Categorical(temperature=2.0), rand(5, 3), randint(3, 5)),
        (Categorical(class_dim=1), rand(3, 4, 2), randint(4, 3, 2)),
        (Categorical(class_dim=-2), rand(3, 2, 4, 2), randint(4, 3, 2, 2)),
        (Bernoulli(), rand(5, 3), randint(2, 5, 3)),
        (Poisson(), rand(5, 3), randint(6, 5, 3)),
        (Poisson(), rand(5), randint(6, 5)),
        (Gaussian(noise_std=torch.tensor([0.5, 1.0, 2.0], dtype=F64)), rand(5, 3), rand(5, 3)),
    ],
)
def test_built_in_nll_gives_the_built_in_curvature(likelihood, outputs, targets):
    # By torch.func.hessian on the one side and the eigendecomposition on the other.
    own = NegativeLogLikelihood(likelihood.nll)
    want = outer(likelihood.hessian_root(outputs))
    torch.testing.assert_close(outer(own.hessian_root(outputs, targets)), want, atol=1e-13, rtol=0)

    def nll(f, y):
        return likelihood.nll(f[None], y[None])[0]

    n = outputs[0].numel()
    h = vmap(hessian(nll))(outputs, targets).reshape(len(outputs), n, n)
    torch.testing.assert_close(want, h, rtol=0, atol=1e-13)


@cases
def test_a_batch_of_one_inside_vmap_equals_the_batch(name):
    fn, outputs, targets = CASES[name]
    likelihood = NegativeLogLikelihood(fn)
    whole = likelihood.hessian_root(outputs, targets)

    def single(f, y):
        one = {k: v[None] for k, v in y.items()} if isinstance(y, dict) else y[None]
        return hessian_root(likelihood, f[None], one).squeeze(1)

    each = vmap(single, out_dims=1)(outputs, targets)
    torch.testing.assert_close(outer(each), outer(whole), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["log-cosh-outputs", "length"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_ggn_of_a_linear_model_is_the_sum_over_data(name, mode):
    # Σ JᵀΛJ with the root sent back through the model inside vmap, as curvatures do.
    fn, _, targets = CASES[name]
    likelihood = NegativeLogLikelihood(fn)
    x, w = rand(len(targets), 2, seed=5), rand(2, 3, seed=6)

    def columns(x, y):
        outputs, pull_back = vjp(lambda w: x[None] @ w, w)
        (g,) = vmap(pull_back)(hessian_root(likelihood, outputs, y[None]))
        return g.flatten(1)

    with mode():
        g = vmap(columns)(x, targets).flatten(0, 1)
    lam = reference(fn, x @ w, targets)
    want = torch.einsum("na,nij,nb->aibj", x, lam, x).reshape(6, 6)
    torch.testing.assert_close(g.mT @ g, want, rtol=0, atol=1e-12)


def test_an_indefinite_hessian_gives_nan_for_that_datum_alone():
    outputs = torch.zeros(3, 2, dtype=F64)
    targets = torch.tensor([[0.0, 0.1], [0.0, 9.0], [1.0, 1.0]], dtype=F64)
    root = NegativeLogLikelihood(student).hessian_root(outputs, targets)
    assert root.isnan().any(0).any(-1).tolist() == [False, True, False]
    assert root[:, 1].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [2, 3, 5, 60])  # torch.linalg.eigh raises at 3 and 5
def test_a_hessian_that_is_not_finite_gives_nan_for_that_datum_alone(bad, size):
    targets = torch.zeros(3, size, dtype=F64)
    targets[1, 0] = bad
    root = NegativeLogLikelihood(length).hessian_root(rand(3, size), targets)
    assert root.isnan().any(0).any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e4])
def test_rounding_is_not_taken_for_an_indefinite_hessian(dtype, scale):
    # Saturated losses: Λ vanishes beside the terms whose difference it is.
    f, y = scale * rand(200, 4).to(dtype), randint(4, 200)
    for fn, targets in (
        (smoothed, y),
        (log_cosh, torch.zeros_like(f)),
        (lambda f, y: torch.logsumexp(f, -1) - f.gather(-1, y[:, None])[:, 0], y),
        (lambda f, y: (F.softplus(f) * (y[:, None] + 1)).sum(-1), y),
        (lambda f, y: 20 * F.cross_entropy(f, y, reduction="none"), f.argmax(-1)),
    ):
        assert NegativeLogLikelihood(fn).hessian_root(f, targets).isfinite().all()


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, 1e-5), (F64, 1e-11)])
def test_a_hessian_that_is_negative_beyond_rounding_is_never_rounded_up(dtype, smallest):
    f = torch.zeros(3, 2, dtype=dtype)
    curvature = torch.tensor([[1.0, 0.1], [1.0, -smallest * 2], [-smallest, 0.0]], dtype=dtype)
    root = NegativeLogLikelihood(lambda f, h: (h * f.square()).sum(-1) / 2).hessian_root(
        f, curvature
    )
    assert root.isnan().any(0).any(-1).tolist() == [False, True, True]


def test_half_precision_is_computed_in_float32():
    f, y = rand(4, 3).half(), randint(3, 4)
    likelihood = NegativeLogLikelihood(smoothed)
    assert likelihood.nll(f, y).dtype == torch.float32
    root = likelihood.hessian_root(f, y)
    assert root.dtype == torch.float16
    want = outer(likelihood.hessian_root(f.double(), y))
    # Entries below 1, each rounded to float16's 1/2048, three products of two.
    torch.testing.assert_close(outer(root.double()), want, rtol=0, atol=3e-3)


def test_an_empty_batch_gives_an_empty_root():
    likelihood = NegativeLogLikelihood(length)
    f = rand(0, 3)
    likelihood.check(f, f)
    assert likelihood.hessian_root(f, f).shape == (3, 0, 3)


# Values and the other likelihood


def test_predictions_are_those_of_predictive():
    f, y = rand(5, 4), randint(4, 5)
    likelihood = NegativeLogLikelihood(smoothed, Categorical())
    assert isinstance(likelihood, Likelihood)
    plain = Categorical()
    p = plain.inverse_link(f)
    for method in ("inverse_link", "aleatoric", "entropy"):
        assert torch.equal(getattr(likelihood, method)(f), getattr(plain, method)(f))
    assert torch.equal(likelihood.predictive_entropy(p, p), plain.predictive_entropy(p, p))
    assert torch.equal(likelihood.sample(0, f), plain.sample(0, f))
    torch.testing.assert_close(likelihood.nll(f, y), smoothed(f, y))


def test_it_is_a_value():
    assert NegativeLogLikelihood(length) == NegativeLogLikelihood(length)
    assert hash(NegativeLogLikelihood(length)) == hash(NegativeLogLikelihood(length))
    assert NegativeLogLikelihood(length) != NegativeLogLikelihood(log_cosh)
    assert NegativeLogLikelihood(length) != NegativeLogLikelihood(length, Gaussian())
    with pytest.raises(dataclasses.FrozenInstanceError, match="fn"):
        NegativeLogLikelihood(length).fn = log_cosh  # pyright: ignore[reportAttributeAccessIssue]


def test_gradients_flow_through_what_the_function_closes_over():
    f, y = rand(4, 2), rand(4, 2, seed=1)

    def loss(log_scale):
        own = NegativeLogLikelihood(lambda f, y: log_cosh(f, y) * log_scale.exp())
        return own.nll(f, y).sum()

    s = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(grad(loss)(s), loss(s))


def test_check_calls_the_function_once_without_a_graph():
    calls = []

    def fn(f, y):
        calls.append((f + 1).requires_grad)
        return (y - f).square().sum(-1)

    f = rand(4, 2).requires_grad_()
    NegativeLogLikelihood(fn).check(f, f.detach())
    assert calls == [False]


# Messages


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fn", "targets", "error", "message"),
    [
        (
            lambda f, y: F.mse_loss(f, y),
            rand(4, 2),
            ValueError,
            r"`fn` returned shape \(\), expected \(4,\) .* no mean or sum over the batch",
        ),
        (
            lambda f, y: (f - y).square(),
            rand(4, 2),
            ValueError,
            r"`fn` returned shape \(4, 2\), expected \(4,\) .*: sum over the outputs of a datum",
        ),
        (
            lambda f, y: (f - y).square().sum(0),
            rand(4, 2),
            ValueError,
            r"`fn` returned shape \(2,\), expected \(4,\) .*: one number a datum, in the order",
        ),
        (
            lambda f, y: (f > y).sum(-1),
            rand(4, 2),
            ValueError,
            "`fn` returned dtype torch.int64, expected floating point: it must be differentiable",
        ),
        (
            lambda f, y: [0.0] * 4,
            rand(4, 2),
            TypeError,
            r"`fn` returned list, expected a tensor of shape \(4,\)",
        ),
        (
            length,
            [1.0, 2.0, 3.0, 4.0],
            TypeError,
            "`targets` is of type list and holds no tensor, expected a tensor or a tree",
        ),
        (
            length,
            {"value": rand(4, 2), "weight": rand(3)},
            ValueError,
            r"`targets` has a tensor of shape \(3,\), expected a leading batch axis of 4, as `outp",
        ),
        (
            length,
            torch.tensor(1.0),
            ValueError,
            r"`targets` has a tensor of shape \(\), expected a leading batch axis of 4",
        ),
    ],
)
def test_check_names_what_is_wrong(fn, targets, error, message):
    outputs = rand(4, 2)
    likelihood = NegativeLogLikelihood(fn)
    with pytest.raises(error, match=message):
        likelihood.check(outputs, targets)
    if message.startswith("`fn`"):
        with pytest.raises(error, match=message):
            likelihood.nll(outputs, targets)


def test_check_names_outputs_that_are_no_tensor():
    with pytest.raises(TypeError, match="`outputs` is of type dict, expected a tensor"):
        NegativeLogLikelihood(length).check({"a": rand(2)}, rand(2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fn": 3},
            "`fn` is 3, expected a function of outputs and targets that gives the negative",
        ),
        ({"fn": torch.nn.MSELoss}, "`fn` is .*MSELoss.*, expected a function of outputs"),
        ({"fn": length, "predictive": "gaussian"}, "`likelihood` is 'gaussian', expected a likel"),
    ],
)
def test_fields_must_be_a_function_and_a_likelihood(fields, message):
    with pytest.raises(TypeError, match=message):
        NegativeLogLikelihood(**fields)


@pytest.mark.parametrize("method", ["inverse_link", "aleatoric", "entropy", "sample"])
def test_without_predictive_the_message_says_what_to_give(method):
    bound = getattr(NegativeLogLikelihood(length), method)
    arguments = (0, rand(2, 3)) if method == "sample" else (rand(2, 3),)
    message = rf"`{method}` needs to know what the outputs mean.*give `predictive`, .*=None"
    with pytest.raises(ValueError, match=message):
        bound(*arguments)


def test_without_predictive_its_entropy_says_what_to_give():
    with pytest.raises(ValueError, match=r"`predictive_entropy` needs .*give `predictive`"):
        NegativeLogLikelihood(length).predictive_entropy(rand(2, 3), rand(2, 3))


def test_a_root_without_targets_says_how_to_give_them():
    with pytest.raises(ValueError, match=r"needs `targets`, .*hessian_root\(likelihood, outputs"):
        NegativeLogLikelihood(length).hessian_root(rand(2, 3))


def test_the_fisher_of_heteroscedastic_noise_is_the_mean_of_the_hessian():
    # Its own root is that; the Hessian at a target, which this class takes, is indefinite far out.
    likelihood, f = HeteroscedasticGaussian(), rand(4, 6)
    mean, std = likelihood.inverse_link(f), likelihood.aleatoric(f).sqrt()
    ends = [reference(likelihood.nll, f, mean + s * std) for s in (-1, 1)]
    torch.testing.assert_close(outer(likelihood.hessian_root(f)), sum(ends) / 2, rtol=0, atol=1e-13)
    own = NegativeLogLikelihood(likelihood.nll, likelihood)
    assert own.hessian_root(f, mean + 3 * std).isnan().all()
