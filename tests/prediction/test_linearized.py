"""The linearised predictive against dense float64 Jacobians, and its links."""

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev

import funcbayes as fb
from funcbayes.core import uses
from funcbayes.prediction import links

STRUCTURES = (
    "diagonal",
    "kronecker",
    "ekfac",
    "dense",
    "block_diagonal",
    "low_rank",
    {"0.*": "diagonal", "*": "dense"},
)


def case(name):
    torch.manual_seed(0)
    if name == "mlp":
        net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.LayerNorm(6))
        net.append(nn.Linear(6, 3))
        return net.double(), torch.randn(7, 5).double(), fb.likelihoods.Categorical()
    if name == "conv":
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.BatchNorm2d(4)
        ).extend([nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(3, 2)])
        return net.double().eval(), torch.randn(5, 2, 4, 4).double(), fb.likelihoods.Gaussian(0.5)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    return net, torch.randn(4, 1, 3, 3).double(), fb.likelihoods.Categorical(class_dim=1)


def targets(name, num):
    torch.manual_seed(1)
    if name == "conv":
        return torch.randn(num, 2).double()
    return torch.randint(0, 3, (num, 3, 3) if name == "segmentation" else (num,))


def fitted(name, structure):
    net, x, likelihood = case(name)
    model = fb.Model.from_module(net)
    options = {"rank": 12} if structure == "low_rank" else {}
    state = fb.laplace.fit(
        model, (x, targets(name, len(x))), likelihood=likelihood, structure=structure, **options
    )
    return model, state, x, likelihood


def jacobian(model, x, likelihood):
    """`[batch, *positions, classes, parameters]`."""
    with uses.batchable():
        outputs = model.apply(model.params, x)
        parts = jacrev(lambda p: model.apply(p, x))(model.params)
    flat = torch.cat([part.reshape(*outputs.shape, -1) for part in parts.values()], -1)
    axis = likelihood.class_dim if isinstance(likelihood, fb.likelihoods.Categorical) else -1
    return outputs.movedim(axis, -1), flat.movedim(axis % outputs.dim(), -2)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv", "segmentation"])
def test_covariances_equal_those_of_the_dense_jacobian(name, structure):
    model, state, x, likelihood = fitted(name, structure)
    posterior = fb.laplace.posterior(state, prior_precision=0.7, temperature=1.3)
    precision = state.curvature.to_dense(model.params) / 1.3
    covariance = torch.linalg.inv(precision + 0.7 * torch.eye(len(precision)))
    mean, jac = jacobian(model, x, likelihood)
    flat = jac.reshape(-1, len(covariance))
    for chunk_size in (None, 2):
        found = fb.linearized(
            model, posterior, x, likelihood=likelihood, joint=True, chunk_size=chunk_size
        )
        torch.testing.assert_close(found.mean, mean)
        torch.testing.assert_close(found.covariance, jac @ covariance @ jac.mT)
        joint = flat @ covariance @ flat.T
        torch.testing.assert_close(found.joint_covariance.reshape(joint.shape), joint)
    alone = fb.linearized(model, posterior, x, likelihood=likelihood, chunk_size=3)
    torch.testing.assert_close(alone.covariance, jac @ covariance @ jac.mT)
    assert alone.joint_covariance is None


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_differentiable_in_the_input_and_the_prior(structure):
    model, state, x, likelihood = fitted("mlp", structure)
    direction = torch.randn_like(x)

    def value(x, prior):
        posterior = fb.laplace.posterior(state, prior_precision=prior)
        return fb.linearized(model, posterior, x, likelihood=likelihood).variance.sum()

    prior = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    live = x.clone().requires_grad_()
    slopes = torch.autograd.grad(value(live, prior), (live, prior))
    step = 1e-5
    by_x = (value(x + step * direction, 0.7) - value(x - step * direction, 0.7)) / (2 * step)
    by_prior = (value(x, 0.7 + step) - value(x, 0.7 - step)) / (2 * step)
    torch.testing.assert_close((slopes[0] * direction).sum(), by_x, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(slopes[1], by_prior, rtol=1e-5, atol=1e-7)


def test_swag_posteriors_have_a_linearised_predictive():
    net, x, likelihood = case("mlp")
    model = fb.Model.from_module(net)
    state = fb.swag.init(model.params, max_rank=3)
    for i in range(5):
        params = {
            k: v + 0.1 * fb.random.normal(i, v.shape, dtype=v.dtype)
            for k, v in model.params.items()
        }
        state = fb.swag.update(state, params)
    posterior = fb.swag.posterior(state)
    at_mean = fb.Model(apply=model.apply, params=posterior.mean)
    mean, jac = jacobian(at_mean, x, likelihood)
    std = torch.cat([s.flatten() for s in posterior.std.values()])
    rows = torch.cat([f.flatten(1) for f in posterior.factor.values()], 1)
    covariance = std.square().diag() + rows.T @ rows
    found = fb.linearized(model, posterior, x, likelihood=likelihood, joint=True)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, jac @ covariance @ jac.mT)
    flat = jac.reshape(-1, len(std))
    joint = found.joint_covariance.reshape(len(flat), len(flat))
    torch.testing.assert_close(joint, flat @ covariance @ flat.T)


@pytest.mark.parametrize("joint", [False, True])
def test_samples_have_the_covariance(joint):
    model, state, x, likelihood = fitted("mlp", "kronecker")
    found = fb.linearized(
        model, fb.laplace.posterior(state), x[:2], likelihood=likelihood, joint=joint
    )
    num = 20_000
    samples = found.sample(0, num).flatten(1)
    exact = torch.block_diag(*found.covariance)
    if joint:
        exact = found.joint_covariance.reshape(6, 6)
    deviations = samples - found.mean.flatten()
    sampled = deviations.T @ deviations / num
    # Wishart: Var = (σ_ii σ_jj + σ_ij²) / n.
    spread = ((exact.diag()[:, None] * exact.diag() + exact.square()) / num).sqrt()
    assert float(((sampled - exact) / spread).abs().max()) < 5
    assert float((deviations.mean(0) / (exact.diag() / num).sqrt()).abs().max()) < 5


def test_links_agree_with_monte_carlo():
    model, state, x, likelihood = fitted("mlp", "dense")
    found = fb.linearized(
        model, fb.laplace.posterior(state, prior_precision=1000.0), x, likelihood=likelihood
    )
    sampled = found.probabilities("monte_carlo", key=0, num_samples=20_000)
    for link in ("probit", "bridge", "bridge_normalized"):
        probs = found.probabilities(link)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(x)).double())
    # An approximation, at logit variances up to about 1; samples add 0.5 / √20 000 at most.
    # The bridge is none at variances as small as these: it does not tend to the softmax.
    assert float((found.probabilities("probit") - sampled).abs().max()) < 0.03


@pytest.mark.parametrize("name", ["mlp", "conv", "segmentation"])
def test_the_predictive_has_the_axes_and_moments_of_predict(name):
    model, state, x, likelihood = fitted(name, "kronecker")
    found = fb.linearized(
        model, fb.laplace.posterior(state, prior_precision=50.0), x, likelihood=likelihood
    )
    # More than are drawn at a time.
    num = 2**26 // found.mean.numel() // 8 + 1000
    pred = found.predictive(key=0, num_samples=num)
    sampled = fb.predict(
        model, fb.laplace.posterior(state), x, key=0, num_samples=3, likelihood=likelihood
    )
    for field in ("mean", "variance", "total", "entropy", "mutual_information"):
        assert getattr(pred, field).shape == getattr(sampled, field).shape, field
    if name == "conv":
        torch.testing.assert_close(pred.mean, found.mean)
        torch.testing.assert_close(pred.total, found.total)
        entropy = (2 * math.pi * math.e * found.total).log().sum(-1) / 2
        torch.testing.assert_close(pred.entropy, entropy)
        assert torch.equal(pred.variance, found.predictive().variance)
        return
    axis = 1 if name == "segmentation" else -1
    expected = found.probabilities("monte_carlo", key=1, num_samples=20_000).movedim(-1, axis)
    # Probabilities vary by less than 1/2 about their means.
    assert float((pred.mean - expected).abs().max()) < 5 * 0.5 * (1 / num + 1 / 20_000) ** 0.5
    torch.testing.assert_close(pred.total, pred.mean * (1 - pred.mean))
    with pytest.raises(ValueError, match="`key` is None"):
        found.predictive()


def test_the_bridge_by_its_formula():
    torch.manual_seed(0)
    f, root = torch.randn(4).double(), torch.randn(4, 4).double()
    covariance = root @ root.T
    total = covariance.sum()
    mean = f - covariance.sum(1) * f.sum() / total
    conditioned = covariance - torch.outer(covariance.sum(1), covariance.sum(1)) / total
    alpha = (1 - 2 / 4 + mean.exp() / 16 * (-mean).exp().sum()) / conditioned.diag()
    torch.testing.assert_close(links.laplace_bridge(f, covariance), alpha / alpha.sum())
    assert links.laplace_bridge(1000 * f, covariance).isfinite().all()


def test_probit_for_two_classes_is_the_known_formula():
    probs = links.sigmoid_probit(torch.tensor(1.5), torch.tensor(2.0))
    assert float(probs) == pytest.approx(1 / (1 + math.exp(-1.5 / math.sqrt(1 + math.pi / 4))))


def test_regression_adds_the_noise_by_name():
    model, state, x, likelihood = fitted("conv", "kronecker")
    found = fb.linearized(model, fb.laplace.posterior(state), x, likelihood=likelihood)
    torch.testing.assert_close(found.total, found.variance + 0.25)


def test_one_output_without_an_axis():
    torch.manual_seed(0)
    model = fb.Model(apply=lambda p, x: x @ p["w"][:, 0], params={"w": torch.randn(3, 1)})
    posterior = fb.posteriors.Diagonal(model.params, {"w": torch.ones(3, 1)})
    x = torch.randn(4, 3)
    found = fb.linearized(model, posterior, x)
    torch.testing.assert_close(found.covariance[:, 0, 0], x.square().sum(1))


def test_nothing_of_the_callers_changes():
    net, x, likelihood = case("conv")
    net.train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    model = fb.Model.from_module(net)
    state = fb.laplace.fit(model, (x, targets("conv", 5)), likelihood=likelihood)
    with torch.inference_mode():
        fb.linearized(model, fb.laplace.posterior(state), x, joint=True)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bad_input_is_named(monkeypatch):
    model, state, x, likelihood = fitted("mlp", "diagonal")
    posterior = fb.laplace.posterior(state)
    with pytest.raises(TypeError, match="`posterior` is a LaplaceState, expected a normal"):
        fb.linearized(model, state, x)
    with pytest.raises(ValueError, match="`x` holds no data"):
        fb.linearized(model, posterior, x[:0])
    with pytest.raises(ValueError, match=r"posterior\.mean"):
        fb.linearized(model, posterior._replace(mean={"a": x}), x)
    found = fb.linearized(model, posterior, x)
    with pytest.raises(ValueError, match="`probabilities` needs a likelihood of classes"):
        found.probabilities()
    with pytest.raises(ValueError, match="`total` needs the noise"):
        _ = found.total
    found = fb.linearized(model, posterior, x, likelihood=likelihood)
    with pytest.raises(ValueError, match="`link` is 'mc', expected one of"):
        found.probabilities("mc")
    with pytest.raises(ValueError, match="`key` is None"):
        found.probabilities("monte_carlo")
    monkeypatch.setattr("funcbayes.core.memory.available_bytes", lambda device: 10)
    with pytest.raises(MemoryError, match="the covariance of 7 data with 3 outputs takes"):
        fb.linearized(model, posterior, x)
