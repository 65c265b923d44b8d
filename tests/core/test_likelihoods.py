import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal
from torch.distributions import Poisson as TorchPoisson
from torch.func import grad, hessian, jvp, vmap

from funcbayes.core.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    hessian_root,
)

F64 = torch.float64
# Everything here is a handful of exponentials and a sum of at most 60 terms of size up to 1e3.
TOL = {"rtol": 1e-12, "atol": 1e-12}


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randint(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "categorical": (Categorical(), 2 * rand(5, 4), randint(4, 5)),
    "categorical-two": (Categorical(), rand(5, 2), randint(2, 5)),
    "categorical-positions": (Categorical(), rand(3, 5, 4), randint(4, 3, 5)),
    "categorical-images": (Categorical(class_dim=1), rand(3, 4, 2, 3), randint(4, 3, 2, 3)),
    "categorical-images-back": (Categorical(class_dim=-3), rand(3, 4, 2, 3), randint(4, 3, 2, 3)),
    "categorical-tempered": (Categorical(temperature=2.5), 4 * rand(5, 4), randint(4, 5)),
    "categorical-tempered-images": (
        Categorical(class_dim=1, temperature=torch.tensor(0.4, dtype=F64)),
        rand(3, 4, 2, 3),
        randint(4, 3, 2, 3),
    ),
    "bernoulli": (Bernoulli(), 2 * rand(5), randint(2, 5)),
    "bernoulli-tempered": (Bernoulli(temperature=0.3), rand(5), randint(2, 5)),
    "bernoulli-tempered-labels": (
        Bernoulli(temperature=torch.tensor(3.0, dtype=F64)),
        4 * rand(5, 3),
        randint(2, 5, 3),
    ),
    "bernoulli-column": (Bernoulli(), rand(5, 1), randint(2, 5)),
    "bernoulli-labels": (Bernoulli(), rand(5, 3), randint(2, 5, 3).bool()),
    "poisson": (Poisson(), rand(5), randint(9, 5)),
    "poisson-column": (Poisson(), 2 * rand(5, 1), randint(40, 5)),
    "poisson-outputs": (Poisson(), 2 * rand(4, 3), randint(40, 4, 3).to(F64)),
    "poisson-positions": (Poisson(), rand(3, 2, 2) + 3, randint(40, 3, 2, 2)),
    "gaussian": (Gaussian(noise_std=0.3), rand(5), rand(5, seed=1)),
    "gaussian-column": (Gaussian(noise_std=2), rand(5, 1), rand(5, seed=1)),
    "gaussian-per-output": (
        Gaussian(noise_std=torch.tensor([0.1, 1.0, 3.0], dtype=F64)),
        rand(5, 3),
        rand(5, 3, seed=1),
    ),
    "gaussian-positions": (
        Gaussian(noise_std=torch.tensor([[0.5], [2.0]], dtype=F64)),
        rand(4, 2, 3),
        rand(4, 2, 3, seed=1),
    ),
    "heteroscedastic": (HeteroscedasticGaussian(), rand(5, 2), rand(5, seed=1)),
    "heteroscedastic-outputs": (HeteroscedasticGaussian(), rand(4, 3, 4), rand(4, 3, 2, seed=1)),
}
cases = pytest.mark.parametrize("name", CASES)
# torch itself scripts a few decompositions the first time that forward mode is used.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def reference(likelihood, outputs):
    """The distribution of each target as torch.distributions has it, class axis last."""
    if isinstance(likelihood, Categorical):
        logits = outputs.movedim(likelihood.class_dim, -1) / likelihood.temperature
        return TorchCategorical(logits=logits)
    if isinstance(likelihood, Bernoulli):
        return TorchBernoulli(logits=outputs / likelihood.temperature)
    if isinstance(likelihood, Poisson):
        return TorchPoisson(outputs.exp())
    if isinstance(likelihood, Gaussian):
        return Normal(outputs, torch.as_tensor(likelihood.noise_std, dtype=outputs.dtype))
    mean, log_var = outputs.chunk(2, -1)
    return Normal(mean, (log_var / 2).exp())


def methods(likelihood, targets):
    """Every method but `check` and `sample`, as functions of the outputs."""

    def predictive_entropy(f):
        return likelihood.predictive_entropy(likelihood.inverse_link(f), likelihood.aleatoric(f))

    return {
        "nll": lambda f: likelihood.nll(f, targets),
        "inverse_link": likelihood.inverse_link,
        "aleatoric": likelihood.aleatoric,
        "entropy": likelihood.entropy,
        "predictive_entropy": predictive_entropy,
        "hessian_root": likelihood.hessian_root,
    }


# Densities and moments


@cases
def test_check_passes_what_belongs_together(name):
    likelihood, outputs, targets = CASES[name]
    assert likelihood.check(outputs, targets) is None
    assert isinstance(likelihood, Likelihood)


@cases
def test_nll_equals_torch_distributions(name):
    likelihood, outputs, targets = CASES[name]
    dist = reference(likelihood, outputs)
    targets = targets.reshape(dist.batch_shape)
    targets = targets if isinstance(dist, TorchCategorical) else targets.to(F64)
    expected = -dist.log_prob(targets).reshape(len(outputs), -1).sum(1)
    torch.testing.assert_close(likelihood.nll(outputs, CASES[name][2]), expected, **TOL)


@cases
def test_moments_equal_torch_distributions(name):
    likelihood, outputs, _ = CASES[name]
    dist = reference(likelihood, outputs)
    if isinstance(dist, TorchCategorical):
        mean = dist.probs.movedim(-1, likelihood.class_dim)
        variance = mean * (1 - mean)
    else:
        mean, variance = dist.mean, dist.variance
    torch.testing.assert_close(likelihood.inverse_link(outputs), mean, **TOL)
    torch.testing.assert_close(likelihood.aleatoric(outputs), variance, **TOL)


@cases
def test_entropies_equal_torch_distributions(name):
    likelihood, outputs, targets = CASES[name]
    dist = reference(likelihood, outputs)
    if isinstance(likelihood, Poisson):  # which torch has no entropy of
        log_probs = dist.log_prob(torch.arange(500.0, dtype=F64).view(-1, *[1] * outputs.ndim))
        expected = -(log_probs.exp() * log_probs).sum(0)
    else:
        expected = dist.entropy()
    if isinstance(likelihood, Gaussian | HeteroscedasticGaussian) and expected.ndim > 1:
        expected = expected.sum(-1)
    torch.testing.assert_close(likelihood.entropy(outputs), expected, **TOL)
    # A mixture of one component is that component, and a normal has its own moments.
    single = methods(likelihood, targets)["predictive_entropy"](outputs)
    torch.testing.assert_close(single, expected, **TOL)


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli()])
@pytest.mark.parametrize("out", [(), (1,)])
@pytest.mark.parametrize("target", [(), (1,)])
def test_a_column_is_never_broadcast_against_a_row(likelihood, out, target):
    outputs, targets = rand(6, *out), randint(2, 6, *target).to(F64)
    expected = -reference(likelihood, outputs.reshape(6)).log_prob(targets.reshape(6))
    torch.testing.assert_close(likelihood.nll(outputs, targets), expected, **TOL)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, F64])
def test_bernoulli_takes_labels_of_any_real_dtype(dtype):
    outputs, targets = rand(5), randint(2, 5)
    likelihood = Bernoulli()
    likelihood.check(outputs, targets.to(dtype))
    expected = likelihood.nll(outputs, targets)
    torch.testing.assert_close(likelihood.nll(outputs, targets.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_categorical_takes_labels_of_any_integer_dtype(dtype):
    outputs, targets = rand(5, 3), randint(3, 5)
    Categorical().check(outputs, targets.to(dtype))
    expected = Categorical().nll(outputs, targets)
    torch.testing.assert_close(Categorical().nll(outputs, targets.to(dtype)), expected)


@cases
def test_an_empty_batch_gives_empty_results(name):
    likelihood, outputs, targets = CASES[name]
    outputs, targets = outputs[:0], targets[:0]
    likelihood.check(outputs, targets)
    assert likelihood.nll(outputs, targets).shape == (0,)
    assert likelihood.hessian_root(outputs).shape[1:] == outputs.shape
    assert likelihood.aleatoric(outputs).shape == likelihood.inverse_link(outputs).shape


# Roots of the Hessian


def autograd_hessian(likelihood, outputs, targets):
    """[datum, out, out] from torch.autograd, flattened outputs."""
    blocks = []
    for f, y in zip(outputs, targets, strict=True):
        h = torch.autograd.functional.hessian(
            lambda f, y=y: likelihood.nll(f[None], y[None]).sum(), f
        )
        blocks.append(h.reshape(f.numel(), f.numel()))
    return torch.stack(blocks)


def outer(root):
    """Σ_c r_c r_cᵀ, [datum, out, out]."""
    root = root.flatten(2) if root.ndim > 2 else root[..., None]
    return torch.einsum("cni,cnj->nij", root, root)


@cases
def test_root_equals_autograd_hessian(name):
    likelihood, outputs, targets = CASES[name]
    root = likelihood.hessian_root(outputs)
    assert root.shape[1:] == outputs.shape
    if isinstance(likelihood, HeteroscedasticGaussian):
        # The Fisher is the mean of the Hessian over the targets. That is quadratic in the target,
        # so the two points mean ± σ, with the normal's first two moments, give it exactly.
        mean, std = likelihood.inverse_link(outputs), likelihood.aleatoric(outputs).sqrt()
        ends = (mean - std, mean + std)
        expected = sum(autograd_hessian(likelihood, outputs, y) for y in ends) / 2
    else:
        expected = autograd_hessian(likelihood, outputs, targets)
    # autograd's own Hessian of log_softmax is good to a few roundings of p.
    torch.testing.assert_close(outer(root), expected, rtol=1e-10, atol=1e-13)


def all_targets(likelihood, outputs):
    """Targets `[values, *shape]`, the same for all data, and probabilities `[values, batch]`."""
    if isinstance(likelihood, Categorical):
        classes = torch.arange(outputs.shape[1])
        return classes[:, None].expand(-1, len(outputs)), likelihood.inverse_link(outputs).T
    labels = torch.cartesian_prod(*[torch.tensor([0, 1])] * outputs.shape[1])
    p = likelihood.inverse_link(outputs)
    probs = torch.where(labels[:, None, :] == 1, p, 1 - p).prod(-1)
    return labels[:, None].expand(-1, len(outputs), -1), probs


@pytest.mark.parametrize("name", ["categorical", "categorical-tempered", "bernoulli-labels"])
def test_root_is_that_of_the_fisher_by_enumeration_too(name):
    # E[g gᵀ] over all targets, each with its probability: no second derivative in it.
    likelihood, outputs, _ = CASES[name]
    targets, probs = all_targets(likelihood, outputs)
    g = torch.stack([grad(lambda f, y=y: likelihood.nll(f, y).sum())(outputs) for y in targets])
    fisher = torch.einsum("tn,tni,tnj->nij", probs, g, g)
    torch.testing.assert_close(outer(likelihood.hessian_root(outputs)), fisher, **TOL)


@cases
def test_root_of_any_likelihood_takes_targets_or_leaves_them(name):
    likelihood, outputs, targets = CASES[name]
    root = hessian_root(likelihood, outputs, targets)
    assert torch.equal(root, likelihood.hessian_root(outputs))


def test_labels_of_a_datum_are_independent():
    # Multi-label: the nll is the sum of the labels', the joint probability the product, several
    # labels may be 1, and the Hessian has nothing off the diagonal.
    outputs, targets = rand(5, 3), randint(2, 5, 3)
    likelihood = Bernoulli()
    each = [likelihood.nll(outputs[:, i], targets[:, i]) for i in range(3)]
    torch.testing.assert_close(likelihood.nll(outputs, targets), sum(each), **TOL)
    labels, probs = all_targets(likelihood, outputs)
    nll = torch.stack([likelihood.nll(outputs, y) for y in labels])
    torch.testing.assert_close((-nll).exp(), probs, **TOL)
    torch.testing.assert_close(probs.sum(0), torch.ones(5, dtype=F64), **TOL)
    assert likelihood.hessian_root(outputs).shape == (3, 5, 3)
    p = outputs.sigmoid()
    want = (p * (1 - p)).diag_embed()
    torch.testing.assert_close(outer(likelihood.hessian_root(outputs)), want, **TOL)
    assert likelihood.entropy(outputs).shape == (5, 3)


def test_categorical_root_is_one_column_a_class_less_one_and_position():
    assert Categorical().hessian_root(rand(5, 4)).shape == (3, 5, 4)
    assert Categorical(class_dim=1).hessian_root(rand(5, 4, 2, 3)).shape == (18, 5, 4, 2, 3)


@given(st.lists(st.floats(-300, 300), min_size=2, max_size=6))
def test_categorical_root_is_exact_for_extreme_logits(logits):
    logits = torch.tensor([logits], dtype=F64)
    probs = logits.softmax(-1)
    expected = probs.diag_embed() - probs[..., :, None] * probs[..., None, :]
    # p(1 - p) in the reference cancels at p near 1: an absolute error of one rounding.
    root = Categorical().hessian_root(logits)
    torch.testing.assert_close(outer(root), expected, rtol=1e-12, atol=1e-15)


def test_categorical_root_keeps_small_probabilities_to_full_relative_accuracy():
    # At (0, -60) Λ = p(1 - p) [[1, -1], [-1, 1]] with p = e^-60: √p_c (e_c - p) gives 0 for one
    # of the four entries in float64.
    root = Categorical().hessian_root(torch.tensor([[0.0, -60.0]], dtype=F64))
    signs = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=F64)
    torch.testing.assert_close(outer(root), math.exp(-60) * signs, rtol=1e-12, atol=0)


def test_masked_classes_are_as_if_absent():
    outputs = torch.tensor([[0.3, -math.inf, -1.2, -math.inf]], dtype=F64)
    kept, y = outputs[:, [0, 2]], torch.tensor([2])
    likelihood = Categorical()
    torch.testing.assert_close(likelihood.entropy(outputs), likelihood.entropy(kept))
    torch.testing.assert_close(likelihood.nll(outputs, y), likelihood.nll(kept, y // 2))
    variance = likelihood.aleatoric(outputs)
    torch.testing.assert_close(variance[:, [0, 2]], likelihood.aleatoric(kept))
    expected = torch.zeros(1, 4, 4, dtype=F64)
    expected[:, ::2, ::2] = outer(likelihood.hessian_root(kept))
    torch.testing.assert_close(outer(likelihood.hessian_root(outputs)), expected)


# Laws

logit_tables = (
    st.integers(2, 5)
    .flatmap(
        lambda c: st.lists(
            st.lists(st.floats(-800, 800, width=32), min_size=c, max_size=c), min_size=1, max_size=4
        )
    )
    .map(lambda rows: torch.tensor(rows, dtype=F64))
)


@given(logit_tables)
def test_probabilities_sum_to_one_and_entropies_are_bounded(logits):
    probs = Categorical().inverse_link(logits)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits), dtype=F64), **TOL)
    for entropy in (
        Categorical().entropy(logits),
        Categorical().predictive_entropy(probs, probs * (1 - probs)),
    ):
        assert (entropy >= 0).all()
        assert (entropy <= math.log(logits.shape[1]) + 1e-12).all()
    for entropy in (
        Bernoulli().entropy(logits),
        Bernoulli().predictive_entropy(logits.sigmoid(), probs),
    ):
        assert (entropy >= 0).all()
        assert (entropy <= math.log(2) + 1e-12).all()


@given(logit_tables, st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_nothing(logits, shift):
    targets = torch.zeros(len(logits), dtype=torch.int64)
    # Rounding of logits + shift at 900 is 1e-13 and moves an nll by as much.
    for name, method in methods(Categorical(), targets).items():
        moved = method(logits + shift)
        torch.testing.assert_close(
            moved, method(logits), rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@given(logit_tables)
def test_bernoulli_is_categorical_with_logits_zero_and_f(logits):
    f = logits[:, 0]
    two = torch.stack([torch.zeros_like(f), f], -1)
    y = torch.arange(len(f)) % 2
    torch.testing.assert_close(Bernoulli().nll(f, y), Categorical().nll(two, y), **TOL)
    torch.testing.assert_close(Bernoulli().entropy(f), Categorical().entropy(two), **TOL)
    for method in ("inverse_link", "aleatoric"):
        ours, theirs = getattr(Bernoulli(), method)(f), getattr(Categorical(), method)(two)[:, 1]
        torch.testing.assert_close(ours, theirs, **TOL)


@given(logit_tables)
def test_total_variance_of_a_mixture_is_that_of_its_mean(rows):
    # The rows are posterior samples of one datum. A label is 0 or 1, so the mixture's variance is
    # m(1 - m), and the law of total variance splits it.
    for likelihood in (Categorical(), Bernoulli()):
        probs = likelihood.inverse_link(rows)
        mean = probs.mean(0)
        total = likelihood.aleatoric(rows).mean(0) + probs.var(0, correction=0)
        torch.testing.assert_close(total, mean * (1 - mean), **TOL)


@given(logit_tables)
def test_a_mixture_is_no_surer_than_its_components_on_average(rows):
    for likelihood in (Categorical(), Bernoulli()):
        probs = likelihood.inverse_link(rows)
        mean = probs.mean(0, keepdim=True)
        predictive = likelihood.predictive_entropy(mean, mean * (1 - mean))
        assert (predictive >= likelihood.entropy(rows).mean(0) - 1e-12).all()


def test_normal_of_the_mixtures_moments_is_no_surer_than_the_components():
    outputs = rand(7, 5, 4)  # samples, batch, out
    likelihood = HeteroscedasticGaussian()
    mean, variance = vmap(likelihood.inverse_link)(outputs), vmap(likelihood.aleatoric)(outputs)
    total = variance.mean(0) + mean.var(0, correction=0)
    predictive = likelihood.predictive_entropy(mean.mean(0), total)
    assert (predictive >= vmap(likelihood.entropy)(outputs).mean(0)).all()


# Extremes of precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("categ", "bern"))])
def test_half_precision_is_exact_at_logits_of_a_hundred(name, dtype):
    likelihood, outputs, targets = CASES[name]
    outputs = 100 * outputs.sign()  # exact in every dtype
    exact, half = methods(likelihood, targets), outputs.to(dtype)
    for method, f in exact.items():
        result = f(half)
        if method == "hessian_root":
            assert result.dtype == dtype
        else:
            # Half of them is stored in half precision, which the results must not be.
            assert result.dtype == torch.float32
        expected = f(outputs).to(result.dtype)
        torch.testing.assert_close(result, expected, msg=lambda m, method=method: f"{method}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("categ", "bern"))])
def test_gradients_are_finite_at_logits_of_a_hundred(name, dtype):
    likelihood, outputs, targets = CASES[name]
    for method, f in methods(likelihood, targets).items():
        for scale in (100, 1e4):
            g = grad(lambda x, f=f: f(x).sum())((scale * outputs.sign()).to(dtype))
            assert g.isfinite().all(), method


def test_half_precision_does_not_overflow_in_sums_or_exponentials():
    outputs = torch.full((1, 1000, 2), 100.0, dtype=torch.float16)
    outputs[..., 1] = -100
    nll = Categorical().nll(outputs, torch.ones(1, 1000, dtype=torch.int64))
    torch.testing.assert_close(nll, torch.tensor([200_000.0]))
    # exp(12) and 300² exceed the largest float16, 65504.
    outputs = torch.tensor([[0.0, 12.0]], dtype=torch.float16)
    variance = HeteroscedasticGaussian().aleatoric(outputs)
    torch.testing.assert_close(variance, torch.tensor([[math.exp(12)]]))
    nll = Gaussian().nll(torch.zeros(1, dtype=torch.float16), torch.tensor([300.0]))
    torch.testing.assert_close(nll, torch.tensor([45_000 + 0.5 * math.log(2 * math.pi)]))


def test_a_wrong_label_at_an_extreme_logit_has_the_full_gradient():
    logits = torch.tensor([30.0, -30.0], dtype=F64)
    targets = torch.tensor([0, 1])
    g = grad(lambda f: Bernoulli().nll(f, targets).sum())(logits)
    torch.testing.assert_close(g, torch.tensor([1.0, -1.0], dtype=F64), rtol=1e-12, atol=0)
    # nll = 21 + log(1 + e^-21), of which F.softplus would drop the second term, 8e-10.
    wrong = Bernoulli().nll(torch.tensor([21.0], dtype=F64), torch.tensor([0]))
    torch.testing.assert_close(wrong.item(), 21 + math.log1p(math.exp(-21)), rtol=1e-14, atol=0)
    right = Bernoulli().nll(torch.tensor([25.0], dtype=F64), torch.tensor([1]))
    torch.testing.assert_close(right.item(), math.log1p(math.exp(-25)), rtol=1e-12, atol=0)


def test_heteroscedastic_nll_survives_tiny_variances():
    # exp(100) is no float32; a residual of 0 has nll ½(s + log 2π) all the same.
    outputs = torch.tensor([[1.0, -100.0]])
    targets = torch.tensor([1.0])
    nll, g = HeteroscedasticGaussian().nll(outputs, targets), torch.tensor([[0.0, 0.5]])
    torch.testing.assert_close(nll, torch.tensor([(-100 + math.log(2 * math.pi)) / 2]))
    torch.testing.assert_close(
        grad(lambda f: HeteroscedasticGaussian().nll(f, targets).sum())(outputs), g
    )


# Transforms


@cases
def test_a_batch_of_one_under_vmap_equals_the_batch(name):
    likelihood, outputs, targets = CASES[name]
    nll = vmap(lambda f, y: likelihood.nll(f[None], y[None])[0])(outputs, targets)
    torch.testing.assert_close(nll, likelihood.nll(outputs, targets), **TOL)
    for method, f in methods(likelihood, targets).items():
        if method == "nll":
            continue
        axis = 1 if method == "hessian_root" else 0
        single = vmap(lambda x, f=f, axis=axis: f(x[None]).squeeze(axis), out_dims=axis)(outputs)
        torch.testing.assert_close(single, f(outputs), **TOL)


@cases
def test_results_keep_the_batch_axis_under_vmap_over_samples(name):
    likelihood, outputs, targets = CASES[name]
    stacked = torch.stack([outputs, -outputs, 2 * outputs])
    for f in methods(likelihood, targets).values():
        expected = torch.stack([f(x) for x in stacked])
        torch.testing.assert_close(vmap(f)(stacked), expected, **TOL)


@forward_mode
@cases
def test_forward_and_reverse_derivatives_agree_with_differences(name):
    likelihood, outputs, targets = CASES[name]
    direction, step = rand(*outputs.shape, seed=2), 1e-6
    for method, f in methods(likelihood, targets).items():
        _, forward = jvp(f, (outputs,), (direction,))
        up, down = f(outputs + step * direction), f(outputs - step * direction)
        # Central differences err by step² times a third derivative, and by eps/step.
        tolerance = {"rtol": 1e-6, "atol": 1e-7}
        message = {"msg": lambda m, method=method: f"{method}: {m}"}
        torch.testing.assert_close(forward, (up - down) / (2 * step), **tolerance, **message)
        weight = rand(*forward.shape, seed=3)
        reverse = grad(lambda x, f=f, w=weight: (w * f(x)).sum())(outputs)
        inner = (reverse * direction).sum()
        # torch's logcumsumexp is differentiated by differences of exponentials.
        tolerance = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(inner, (weight * forward).sum(), **tolerance, **message)


@forward_mode
def test_per_datum_hessian_by_torch_func_equals_the_root():
    likelihood, outputs, targets = CASES["categorical"]
    h = vmap(hessian(lambda f, y: likelihood.nll(f[None], y[None])[0]))(outputs, targets)
    torch.testing.assert_close(outer(likelihood.hessian_root(outputs)), h, rtol=1e-10, atol=1e-13)


def test_noise_std_can_be_learnt_and_mapped_over():
    outputs, targets = rand(5, 2), rand(5, 2, seed=1)

    def loss(log_std):
        return Gaussian(noise_std=log_std.exp()).nll(outputs, targets).sum()

    log_std = torch.tensor([0.3, -0.2], dtype=F64)
    # d/d log σ of ½ z² + log σ is 1 - z².
    z = (targets - outputs) / log_std.exp()
    torch.testing.assert_close(grad(loss)(log_std), (1 - z.square()).sum(0), **TOL)
    grid = torch.stack([log_std, 2 * log_std])
    torch.testing.assert_close(vmap(loss)(grid), torch.stack([loss(s) for s in grid]), **TOL)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)])
def test_gradients_reach_a_noise_std_of_any_shape(shape):
    outputs, targets = rand(4, 2, 3), rand(4, 2, 3, seed=1)
    std = (rand(math.prod(shape), seed=2).reshape(shape) / 2).exp().requires_grad_()
    Gaussian(noise_std=std).nll(outputs, targets).sum().backward()
    # d/dσ of ½ (r/σ)² + log σ is 1/σ - r²/σ³, summed over all that share the σ.
    slopes = 1 / std.detach() - (targets - outputs).square() / std.detach() ** 3
    torch.testing.assert_close(std.grad, slopes.sum_to_size(shape), **TOL)


def test_the_best_noise_std_is_the_root_mean_squared_residual():
    outputs, targets = rand(50, 2), 3 * rand(50, 2, seed=1)
    log_std = torch.zeros(2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_std], max_iter=50, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = Gaussian(noise_std=log_std.exp()).nll(outputs, targets).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    want = (targets - outputs).square().mean(0).sqrt()
    # A minimum is found to about the root of a rounding.
    torch.testing.assert_close(log_std.detach().exp(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [n for n in CASES if "tempered" in n])
def test_temperature_divides_the_logits_in_every_method(name):
    likelihood, outputs, targets = CASES[name]
    plain = dataclasses.replace(likelihood, temperature=1)
    t = likelihood.temperature
    expected = methods(plain, targets)
    for method, f in methods(likelihood, targets).items():
        want = expected[method](outputs / t)
        # The chain rule: one factor 1/T a derivative, of which a root has one.
        want = want / t if method == "hessian_root" else want
        torch.testing.assert_close(f(outputs), want, **TOL)
    assert torch.equal(likelihood.sample(0, outputs), plain.sample(0, outputs / t))


@pytest.mark.parametrize("make", [Categorical, Bernoulli])
def test_temperature_can_be_learnt_and_mapped_over(make):
    outputs = rand(6, 3)
    targets = randint(3, 6) if make is Categorical else randint(2, 6, 3)

    def loss(log_t):
        return make(temperature=log_t.exp()).nll(outputs, targets).sum()

    log_t, step = torch.tensor(0.3, dtype=F64), 1e-6
    difference = (loss(log_t + step) - loss(log_t - step)) / (2 * step)
    torch.testing.assert_close(grad(loss)(log_t), difference, rtol=1e-7, atol=1e-8)
    grid = torch.stack([log_t, 2 * log_t])
    torch.testing.assert_close(vmap(loss)(grid), torch.stack([loss(t) for t in grid]), **TOL)

    def root(log_t):
        return make(temperature=log_t.exp()).hessian_root(outputs)

    torch.testing.assert_close(vmap(root)(grid), torch.stack([root(t) for t in grid]), **TOL)


@pytest.mark.parametrize("make", [Categorical, Bernoulli])
def test_limits_of_the_temperature_are_the_mode_and_the_uniform(make):
    outputs = torch.tensor([[0.3, -1.2], [2.0, 5.0]])
    cold, hot = make(temperature=1e-30), make(temperature=1e30)
    mode = (outputs > 0) if make is Bernoulli else outputs.softmax(-1) > 0.5
    torch.testing.assert_close(cold.inverse_link(outputs), mode.float())
    torch.testing.assert_close(hot.inverse_link(outputs), torch.full((2, 2), 0.5))
    for likelihood in (cold, hot):
        assert likelihood.hessian_root(outputs).isfinite().all()
        assert likelihood.entropy(outputs).isfinite().all()
    assert not cold.entropy(outputs).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_temperature_takes_the_dtype_of_the_outputs(dtype):
    outputs = rand(4, 3, dtype=dtype)
    for make in (Categorical, Bernoulli):
        for t in (2.0, torch.tensor(2.0, dtype=F64), torch.tensor(2.0, dtype=torch.float16)):
            probs = make(temperature=t).inverse_link(outputs)
            assert probs.dtype == torch.float32
            torch.testing.assert_close(probs, make().inverse_link(outputs.float() / 2))
            assert make(temperature=t).hessian_root(outputs).dtype == dtype


def test_check_looks_at_values_only_outside_transforms():
    def loss(f, y):
        Categorical().check(f[None], y[None])
        Gaussian().check(f[None], f[None])
        return f.sum()

    outputs = rand(3, 2)
    vmap(loss)(outputs, torch.tensor([0, 7, 1]))
    meta = outputs.to("meta")
    Categorical().check(meta, torch.empty(3, dtype=torch.int64, device="meta"))


@pytest.mark.compile
@cases
def test_methods_compile_to_one_graph(name):
    torch.compiler.reset()  # the cases share code, and so one recompilation limit
    likelihood, outputs, targets = CASES[name]
    for f in methods(likelihood, targets).values():
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(outputs), f(outputs), **TOL)
    likelihood_check = torch.compile(likelihood.check, backend="eager", fullgraph=True)
    likelihood_check(outputs, targets)


# Samples


@cases
def test_samples_are_targets_and_a_function_of_the_key(name):
    likelihood, outputs, _ = CASES[name]
    before = torch.get_rng_state()
    y = likelihood.sample(3, outputs)
    likelihood.check(outputs, y)
    assert torch.equal(y, likelihood.sample(3, outputs))
    assert torch.equal(before, torch.get_rng_state())
    stacked = torch.stack([outputs, outputs])
    mapped = vmap(lambda f: likelihood.sample(3, f), randomness="same")(stacked)
    assert torch.equal(mapped, torch.stack([y, y]))
    if not isinstance(likelihood, Categorical | Bernoulli | Poisson):
        assert not torch.equal(y, likelihood.sample(4, outputs))


@cases
def test_sample_moments_are_those_of_the_likelihood(name):
    likelihood, outputs, _ = CASES[name]
    n = 4000
    many = outputs.repeat(n, *[1] * (outputs.ndim - 1))
    y = likelihood.sample(0, many)
    if isinstance(likelihood, Categorical):
        classes = outputs.shape[likelihood.class_dim]
        y = torch.nn.functional.one_hot(y, classes).to(F64).movedim(-1, likelihood.class_dim)
    mean, variance = likelihood.inverse_link(outputs), likelihood.aleatoric(outputs)
    y = y.reshape(n, *mean.shape)
    z = (y.mean(0) - mean) / (variance / n).sqrt()
    assert z.abs().max() < 5
    # Fourth moments: p(1-p)(1 - 4p(1-p)) of a label about its variance, 2v² of a normal, 2v² + v
    # of a count.
    spread = 2 * variance.square()
    if isinstance(likelihood, Categorical | Bernoulli):
        spread = variance * (1 - 4 * variance) + variance.square() / n
    if isinstance(likelihood, Poisson):
        spread = spread + variance
    z = (((y - mean).square().mean(0)) - variance) / (spread / n + 1e-30).sqrt()
    assert z.abs().max() < 5


def test_certain_labels_are_always_drawn():
    outputs = torch.tensor([[-math.inf, 0.0, -math.inf]]).repeat(1000, 1)
    assert (Categorical().sample(0, outputs) == 1).all()
    y = Bernoulli().sample(0, torch.tensor([200.0, -200.0]).repeat(1000))
    assert torch.equal(y, torch.tensor([1.0, 0.0]).repeat(1000))


# Values


def test_likelihoods_are_values():
    assert Categorical() == Categorical(class_dim=-1)
    assert hash(Gaussian(noise_std=2)) == hash(Gaussian(noise_std=2.0))
    assert Gaussian() != Gaussian(noise_std=2.0)
    assert Gaussian() != Bernoulli()
    std = torch.ones(3)
    assert Gaussian(noise_std=std) == Gaussian(noise_std=std)
    assert hash(Gaussian(noise_std=std)) == hash(Gaussian(noise_std=std))
    assert Gaussian(noise_std=std) != Gaussian(noise_std=std.clone())
    assert Gaussian(noise_std=std) != Gaussian()
    for make in (Categorical, Bernoulli):
        assert make(temperature=1) == make()
        assert hash(make(temperature=2)) == hash(make(temperature=2.0))
        assert make(temperature=2.0) != make()
        t = torch.tensor(2.0)
        assert make(temperature=t) == make(temperature=t)
        assert hash(make(temperature=t)) == hash(make(temperature=t))
        assert make(temperature=t) != make(temperature=t.clone())
        assert make(temperature=t) != make(temperature=2.0)
    assert Categorical(class_dim=1) != Categorical()
    with pytest.raises(dataclasses.FrozenInstanceError, match="noise_std"):
        Gaussian().noise_std = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_ones_own_likelihood_is_a_likelihood():
    class Laplacian(Gaussian):
        pass

    assert isinstance(Laplacian(), Likelihood)
    assert not isinstance(torch.nn.CrossEntropyLoss(), Likelihood)


# Messages


def bad(likelihood, outputs, targets, error, message):
    return pytest.param(likelihood, outputs, targets, error, message, id=message[:40])


ROW, INTS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
NAN = torch.tensor([0.0, math.nan, math.inf, 1.0])


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "error", "message"),
    [
        bad(
            Categorical(),
            {"logits": ROW},
            INTS,
            TypeError,
            "`outputs` is of type dict, expected a tensor: let the model return",
        ),
        bad(
            Categorical(),
            ROW,
            [0, 1, 2, 0],
            TypeError,
            "`targets` is of type list, expected a tensor: .*torch.as_tensor",
        ),
        bad(
            Categorical(),
            ROW.long(),
            INTS,
            ValueError,
            "`outputs` has dtype torch.int64, expected floating point: the network's raw",
        ),
        bad(
            Bernoulli(),
            torch.tensor(1.0),
            torch.tensor(1),
            ValueError,
            r"`outputs` has shape \(\), expected .* leading batch axis: .*outputs\[None\]",
        ),
        bad(
            Categorical(),
            ROW,
            INTS.float(),
            ValueError,
            r"`targets` has dtype torch.float32, expected integer class labels: .*targets.long\(\)",
        ),
        bad(
            Categorical(),
            ROW,
            INTS.bool(),
            ValueError,
            "`targets` has dtype torch.bool, expected integer class labels",
        ),
        bad(
            Categorical(),
            ROW,
            INTS - 1,
            ValueError,
            "labels from -1 to 1, expected 0 to 2 for `outputs` with 3 classes on axis -1: give",
        ),
        bad(
            Categorical(),
            ROW,
            torch.tensor([1, 2, 3, 1]),
            ValueError,
            "labels from 1 to 3, expected 0 to 2 .* start at 1 become right by `targets - 1`",
        ),
        bad(
            Categorical(),
            ROW,
            torch.tensor([0, 2, -100, 1]),
            ValueError,
            "labels from -100 to 2, expected 0 to 2 .*: -100 looks like an ignore index",
        ),
        bad(
            Categorical(),
            ROW,
            torch.full((4, 3), 1 / 3),
            ValueError,
            r"`targets` has the shape of `outputs`, \(4, 3\), expected labels of shape \(4,\): "
            r"soft and one-hot labels are not supported, .*targets.argmax\(-1\)",
        ),
        bad(
            Categorical(),
            ROW,
            INTS[:, None],
            ValueError,
            r"`targets` has shape \(4, 1\), expected \(4,\) .*: drop .*targets.squeeze\(-1\)",
        ),
        bad(
            Categorical(),
            ROW,
            INTS[:2],
            ValueError,
            r"`targets` has shape \(2,\), expected \(4,\) .* of shape \(4, 3\) .*cut off",
        ),
        bad(
            Categorical(),
            torch.zeros(4, 3, 5, 6),
            torch.zeros(4, 5, 6, dtype=torch.int64),
            ValueError,
            r"`targets` has shape \(4, 5, 6\), expected \(4, 3, 5\) .*Categorical\(class_dim=1\)\?",
        ),
        bad(
            Categorical(),
            torch.zeros(4, 1),
            INTS,
            ValueError,
            r"`outputs` has shape \(4, 1\), 1 logit on class axis -1, .*: use Bernoulli\(\)",
        ),
        bad(
            Categorical(),
            torch.zeros(4),
            INTS,
            ValueError,
            r"`outputs` has shape \(4,\), expected .* use Bernoulli\(\) for one logit a datum",
        ),
        bad(
            Categorical(class_dim=2),
            ROW,
            INTS,
            ValueError,
            r"`outputs` has shape \(4, 3\), .* classes on axis 2, .*: set `class_dim`",
        ),
        bad(
            Categorical(class_dim=-2),
            ROW,
            INTS,
            ValueError,
            r"`outputs` has shape \(4, 3\), .* axis -2, which is not the batch axis",
        ),
        bad(
            Bernoulli(),
            ROW[:, 0],
            torch.tensor([-1, 1, 1, -1]),
            ValueError,
            r"`targets` holds values outside \{0, 1\}, from -1 to 1, expected 0 or 1 .*threshold",
        ),
        bad(
            Bernoulli(),
            ROW[:, 0],
            torch.tensor([0.0, 0.5, 1.0, 1.0]),
            ValueError,
            r"`targets` holds values outside \{0, 1\}, from 0 to 1",
        ),
        bad(
            Bernoulli(),
            ROW[:, 0],
            NAN,
            ValueError,
            r"`targets` holds values outside \{0, 1\}, from nan to nan",
        ),
        bad(
            Bernoulli(),
            ROW[:, :2],
            INTS,
            ValueError,
            r"`targets` has shape \(4,\), expected \(4, 2\) .*: one 0 or 1 .* Categorical\(\)",
        ),
        bad(
            Bernoulli(),
            ROW[:, :1],
            INTS[None],
            ValueError,
            r"`targets` has shape \(1, 4\), expected \(4, 1\) for `outputs` of shape \(4, 1\)",
        ),
        bad(
            Poisson(),
            ROW[:, 0],
            torch.tensor([3, -1, 0, -2]),
            ValueError,
            "`targets` holds 2 values of 4 that are no counts, such as -1, expected 0, 1, .*rate",
        ),
        bad(
            Poisson(),
            ROW[:, 0],
            torch.tensor([0.0, 0.5, 1.0, 1.0]),
            ValueError,
            "`targets` holds 1 values of 4 that are no counts, such as 0.5, .* Gaussian",
        ),
        bad(
            Poisson(),
            ROW[:, 0],
            NAN,
            ValueError,
            "`targets` holds 2 values of 4 that are no counts, such as nan",
        ),
        bad(
            Poisson(),
            ROW[:, 0],
            INTS.bool(),
            ValueError,
            r"`targets` has dtype torch.bool, expected counts .*: use Bernoulli\(\) for yes-or-no",
        ),
        bad(
            Poisson(),
            ROW[:, :2],
            INTS,
            ValueError,
            r"`targets` has shape \(4,\), expected \(4, 2\) .*: one count for each output",
        ),
        bad(
            Gaussian(),
            ROW[:, 0],
            INTS,
            ValueError,
            r"`targets` has dtype torch.int64, expected floating point for regression: .*"
            r"targets.float\(\).* Categorical\(\)",
        ),
        bad(
            Gaussian(),
            ROW[:, 0],
            NAN,
            ValueError,
            "`targets` holds 2 NaN or infinite values of 4, expected finite ones: drop or impute",
        ),
        bad(
            Gaussian(),
            ROW,
            ROW[:, 0],
            ValueError,
            r"`targets` has shape \(4,\), expected \(4, 3\) .*: one value for each output",
        ),
        bad(
            Gaussian(),
            ROW,
            ROW.T,
            ValueError,
            r"`targets` has shape \(3, 4\), expected \(4, 3\)",
        ),
        bad(
            Gaussian(noise_std=torch.ones(4)),
            ROW,
            ROW,
            ValueError,
            r"`noise_std` has shape \(4,\), expected one that broadcasts to \(3,\), .*Heterosc",
        ),
        bad(
            Gaussian(noise_std=torch.ones(4)),
            ROW[:, 0],
            ROW[:, 0],
            ValueError,
            r"`noise_std` has shape \(4,\), expected one that broadcasts to \(\)",
        ),
        bad(
            HeteroscedasticGaussian(),
            ROW,
            ROW[:, 0],
            ValueError,
            r"`outputs` has shape \(4, 3\), expected \[batch, ..., 2 D\] .*: give the network two",
        ),
        bad(
            HeteroscedasticGaussian(),
            ROW[:, 0],
            ROW[:, 0],
            ValueError,
            r"`outputs` has shape \(4,\), expected \[batch, ..., 2 D\]",
        ),
        bad(
            HeteroscedasticGaussian(),
            ROW[:, :2],
            ROW[:, :2],
            ValueError,
            r"`targets` has shape \(4, 2\), expected \(4, 1\) .*: one value for each pair",
        ),
        bad(
            HeteroscedasticGaussian(),
            ROW[:, :2],
            INTS,
            ValueError,
            "`targets` has dtype torch.int64, expected floating point for regression",
        ),
        bad(
            HeteroscedasticGaussian(),
            ROW[:, :2],
            NAN,
            ValueError,
            "`targets` holds 2 NaN or infinite values of 4",
        ),
    ],
)
def test_check_names_what_is_wrong(likelihood, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        likelihood.check(outputs, targets)
    # What needs no values to see is refused by `nll` as well, also under transforms; a wrong
    # `outputs` alone would stop at the type hook of the test run.
    beyond = ("holds", "labels from", "`outputs` has dtype", "leading batch axis")
    if error is ValueError and not any(part in message for part in beyond):
        with pytest.raises(error, match=message):
            likelihood.nll(outputs, targets)


def construct(cls, **fields):
    """`cls(**fields)`, past the type hook, which would refuse a wrong type with its own message."""
    value = object.__new__(cls)
    for name, field in fields.items():
        object.__setattr__(value, name, field)
    value.__post_init__()


@pytest.mark.parametrize(
    ("noise_std", "error", "message"),
    [
        (0, ValueError, "`noise_std` is 0, expected positive and finite: it is the standard dev"),
        (-0.5, ValueError, "`noise_std` is -0.5, expected positive and finite"),
        (math.nan, ValueError, "`noise_std` is nan, expected positive and finite"),
        (math.inf, ValueError, "`noise_std` is inf, expected positive and finite"),
        (True, TypeError, "`noise_std` is True of type bool, expected a number or a tensor"),
        ("1", TypeError, "`noise_std` is '1' of type str, expected .*torch.as_tensor"),
        ([1.0], TypeError, r"`noise_std` is \[1.0\] of type list, expected a number or a tensor"),
        (
            torch.tensor([0.5, -1.0]),
            ValueError,
            "`noise_std` holds values from -1 to 0.5, expected positive and finite .* exponential",
        ),
        (torch.tensor(math.nan), ValueError, "`noise_std` holds values from nan to nan"),
        (torch.tensor(1), ValueError, r"`noise_std` has dtype torch.int64, .*noise_std.float\(\)"),
    ],
)
def test_noise_std_must_be_positive(noise_std, error, message):
    with pytest.raises(error, match=message):
        construct(Gaussian, noise_std=noise_std)


@pytest.mark.parametrize(
    ("class_dim", "error", "message"),
    [
        (0, ValueError, "`class_dim` is 0, which is the batch axis of `outputs`, .* -1 for"),
        (1.0, TypeError, "`class_dim` is 1.0 of type float, expected an int: the axis"),
        (True, TypeError, "`class_dim` is True of type bool, expected an int"),
    ],
)
def test_class_dim_must_be_an_axis(class_dim, error, message):
    with pytest.raises(error, match=message):
        construct(Categorical, class_dim=class_dim, temperature=1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [Categorical, Bernoulli])
@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (0, ValueError, "`temperature` is 0, expected positive and finite: above 1 it softens"),
        (-1.5, ValueError, "`temperature` is -1.5, expected positive and finite"),
        (math.nan, ValueError, "`temperature` is nan, expected positive and finite"),
        (math.inf, ValueError, "`temperature` is inf, expected positive and finite"),
        (True, TypeError, "`temperature` is True of type bool, expected a number or a tensor"),
        ("2", TypeError, "`temperature` is '2' of type str, expected a number or a tensor"),
        (torch.tensor(-1.0), ValueError, "`temperature` is -1, expected positive .* exponential"),
        (torch.tensor(math.nan), ValueError, "`temperature` is nan, expected positive and finite"),
        (torch.tensor(2), ValueError, r"has dtype torch.int64, .*`temperature.float\(\)`"),
        (torch.ones(3), ValueError, r"`temperature` has shape \(3,\), expected \(\): one number"),
    ],
)
def test_temperature_must_be_positive(make, temperature, error, message):
    with pytest.raises(error, match=message):
        construct(make, class_dim=-1, temperature=temperature)
