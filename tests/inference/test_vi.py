"""Mean-field inference against closed forms: KL, ELBO and its gradient, and the exact optimum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.testing import assert_close

from funcbayes.core import random, trees
from funcbayes.core.likelihoods import Categorical, Gaussian
from funcbayes.core.model import Model
from funcbayes.core.trees import tree_map
from funcbayes.inference import vi
from funcbayes.posteriors import Diagonal


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def table(num=12, *, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=gen, dtype=torch.float64)
    return x, torch.randint(2, (num,), generator=gen)


def random_state(like, *, seed=0, width=1.0):
    gen = torch.Generator().manual_seed(seed)

    def noise(leaf):
        z = torch.randn(leaf.shape, generator=gen, dtype=torch.float64)
        return (width * z).to(leaf.dtype).requires_grad_()

    return vi.ViState(tree_map(noise, like), tree_map(noise, like))


def linear_gaussian(num=20, *, noise_std=0.7):
    """y = xᵀθ + noise: everything about its ELBO is known."""
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(num, 3, generator=gen, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double()
    y = y + noise_std * torch.randn(num, 1, generator=gen, dtype=torch.float64)
    model = Model(lambda theta, x: x @ theta["w"], {"w": torch.zeros(3, 1).double()})
    return model, x, y, Gaussian(noise_std=noise_std)


def exact_loss(state, x, y, *, noise_std, prior_std, kl_weight, num_data):
    """E_q[−log p(y|x, θ)] / N + kl_weight · KL / num_data, in closed form."""
    mean, std = state.mean["w"], F.softplus(state.rho["w"])
    squares = (y - x @ mean).square() + x.square() @ std.square()
    nll = (squares / (2 * noise_std**2) + math.log(noise_std * math.sqrt(2 * math.pi))).mean()
    kl = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), prior_std)).sum()
    return nll + kl_weight * kl / num_data, nll, kl


# -- init and posterior --------------------------------------------------------------------


@given(
    std=st.floats(1e-30, 1e4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_init_gives_the_std_asked_for_at_any_size(std, dtype):
    state = vi.init({"w": torch.ones(2, dtype=dtype)}, std=std)
    # softplus has relative condition |rho| at small std: log(1e-30) = -69 roundings of rho.
    tolerance = 200 * torch.finfo(dtype).eps
    assert_close(
        vi.posterior(state).std["w"],
        torch.full((2,), std, dtype=dtype),
        rtol=tolerance,
        atol=0,
    )


def test_init_copies_and_any_optimizer_takes_its_leaves():
    params = {"w": torch.ones(3)}
    state = vi.init(params)
    leaves = trees.leaves(state)
    assert len(leaves) == 2
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    steps = torch.optim.SGD(leaves, lr=0.1)
    vi.kl_divergence(state).backward()
    steps.step()
    assert params["w"].tolist() == [1, 1, 1]
    assert not torch.equal(state.mean["w"].detach(), params["w"])


def test_the_posterior_is_a_detached_copy():
    state = random_state({"w": torch.zeros(4)})
    posterior = vi.posterior(state)
    assert isinstance(posterior, Diagonal)
    assert_close(posterior.std["w"], F.softplus(state.rho["w"]).detach())
    before = trees.clone(posterior)
    with torch.no_grad():
        state.mean["w"].add_(1)
        state.rho["w"].add_(1)
    assert_close(posterior, before, rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in trees.leaves(posterior))


# -- KL ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), prior_std=st.floats(1e-2, 1e3), centred=st.booleans())
def test_kl_equals_the_closed_form_of_torch(seed, prior_std, centred):
    like = {"a": torch.zeros(2, 3).double(), "b": [torch.zeros(()).double()]}
    state = random_state(like, seed=seed)
    centre = tree_map(torch.zeros_like, like) if centred else tree_map(lambda p: p + 0.3, like)
    kl = vi.kl_divergence(state, prior_std=prior_std, prior_mean=None if centred else centre)
    expected = sum(
        kl_divergence(Normal(m, F.softplus(r)), Normal(c, prior_std)).sum()
        for m, r, c in zip(*map(trees.leaves, (*state, centre)), strict=True)
    )
    assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(kl, trees.leaves(state))
    assert_close(grads, torch.autograd.grad(expected, trees.leaves(state)), rtol=1e-9, atol=1e-11)


def test_kl_to_itself_is_zero_and_a_wide_prior_does_not_overflow():
    params = {"w": torch.zeros(5)}
    for std in (1e-3, 1.0, 90.0, 1e4):
        kl = vi.kl_divergence(vi.init(params, std=std), prior_std=std)
        # Five terms ½(r² − 1) − log r at r = 1 + 20 roundings: of second order but for eps.
        assert abs(kl.item()) < 1e-5


def test_a_bfloat16_kl_is_summed_in_float32():
    state = vi.init({"w": torch.zeros(10_000, dtype=torch.bfloat16)}, std=0.1)
    kl = vi.kl_divergence(state)
    std = float(vi.posterior(state).std["w"][0].float())
    assert kl.dtype == torch.float32
    # bfloat16 cannot count beyond 256 ones.
    expected = 10_000 * (0.5 * (std**2 - 1) - math.log(std))
    assert_close(kl.item(), expected, rtol=1e-2, atol=0)


# -- negative ELBO -------------------------------------------------------------------------


@given(num_samples=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_the_vectorised_loss_and_gradient_equal_the_loop_over_draws(num_samples, seed):
    net, batch = small_net(), table()
    model = Model.from_module(net)
    state = random_state(model.params, seed=seed)

    loss, info = vi.negative_elbo(
        state,
        model,
        batch,
        key=seed,
        likelihood=Categorical(),
        num_data=100,
        num_samples=num_samples,
        prior_std=0.5,
        kl_weight=0.3,
    )
    # Draw by draw, sample i alone from its own key, in evaluation mode.
    total = trees.num_elements(model.params)
    nll = 0
    for i in range(num_samples):
        noise = random.normal(random.fold_in(seed, i), (total,), dtype=torch.float64)
        z = trees.unravel(noise, model.params)
        params = {k: state.mean[k] + F.softplus(state.rho[k]) * z[k] for k in z}
        outputs = torch.func.functional_call(net.eval(), params, (batch[0],))
        nll = nll + F.cross_entropy(outputs, batch[1]) / num_samples
    expected = nll + 0.3 * vi.kl_divergence(state, prior_std=0.5) / 100
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert_close(info.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    assert_close(info.nll, nll.detach(), rtol=1e-12, atol=1e-12)
    assert not any(part.requires_grad for part in info)
    grads = torch.autograd.grad(loss, trees.leaves(state))
    assert_close(grads, torch.autograd.grad(expected, trees.leaves(state)), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_unbiased_for_the_exact_elbo():
    """Means over 4000 independent draws against the closed form, in standard errors."""
    model, x, y, likelihood = linear_gaussian()
    state = random_state(model.params, seed=4, width=0.5)
    fixed = {"prior_std": 2.0, "kl_weight": 0.7, "num_data": 50}
    exact, _, _ = exact_loss(state, x, y, noise_std=0.7, **fixed)
    exact_grads = torch.cat([g.flatten() for g in torch.autograd.grad(exact, trees.leaves(state))])
    draws, values = [], []
    repeats, num_samples = 400, 10
    for i in range(repeats):
        loss, _ = vi.negative_elbo(
            state,
            model,
            (x, y),
            key=random.fold_in(0, i),
            likelihood=likelihood,
            num_samples=num_samples,
            **fixed,
        )
        grads = torch.autograd.grad(loss, trees.leaves(state))
        draws.append(torch.cat([g.flatten() for g in grads]))
        values.append(loss.detach())
    for sample, expected in [
        (torch.stack(draws), exact_grads),
        (torch.stack(values)[:, None], exact.detach()[None]),
    ]:
        error = sample.std(0) / math.sqrt(repeats)
        # Precise enough to matter: a biased gradient would differ by a tenth of its size.
        assert float((error / expected.abs().max()).max()) < 0.05
        assert float(((sample.mean(0) - expected) / error).abs().max()) < 5


def test_batches_average_to_the_loss_of_the_whole():
    model, x, y, likelihood = linear_gaussian()
    state = random_state(model.params)
    common = {"key": 0, "likelihood": likelihood, "num_data": 20, "num_samples": 3}
    whole, _ = vi.negative_elbo(state, model, (x, y), **common)
    parts = [
        vi.negative_elbo(state, model, (x[i : i + 5], y[i : i + 5]), **common)[0]
        for i in range(0, 20, 5)
    ]
    assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_without_kl_weight_only_the_likelihood_remains():
    model, x, y, likelihood = linear_gaussian()
    loss, info = vi.negative_elbo(
        random_state(model.params),
        model,
        (x, y),
        key=0,
        likelihood=likelihood,
        num_data=20,
        kl_weight=0.0,
    )
    assert_close(loss.detach(), info.nll)
    assert float(info.kl) > 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_a_model_that_vmap_cannot_batch_is_looped_over(caplog):
    torch.manual_seed(0)
    net = Recurrent().double()
    model = Model.from_module(net)
    batch = (torch.randn(6, 5, 3).double(), torch.randint(2, (6,)))
    state = random_state(model.params, width=0.3)
    loss, _ = vi.negative_elbo(
        state, model, batch, key=0, likelihood=Categorical(), num_data=6, num_samples=3
    )
    assert caplog.text.count("vmap cannot batch") == 1
    draws = Diagonal(state.mean, tree_map(F.softplus, state.rho)).sample(0, 3)
    nll = sum(
        F.cross_entropy(
            torch.func.functional_call(net, trees.index(draws, i), (batch[0],)), batch[1]
        )
        for i in range(3)
    )
    expected = nll / 3 + vi.kl_divergence(state) / 6
    assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(loss, trees.leaves(state))
    assert_close(grads, torch.autograd.grad(expected, trees.leaves(state)), rtol=1e-9, atol=1e-12)

    caplog.clear()
    vi.fit(model, [batch] * 2, key=0, likelihood=Categorical(), num_epochs=2)
    assert caplog.text.count("vmap cannot batch") == 1  # once, not once a step


# -- fit -----------------------------------------------------------------------------------


def test_fit_finds_the_exact_optimum_of_a_linear_gaussian_model():
    model, x, y, likelihood = linear_gaussian()
    trained = vi.fit(
        model,
        (x, y),
        key=0,
        likelihood=likelihood,
        num_epochs=500,
        num_samples=20,
        prior_std=2.0,
        optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.03),
        state=vi.init(model.params, std=0.1),
    )
    # Mean field at its best: the exact posterior mean, and 1 / (diagonal of the precision).
    precision = x.T @ x / 0.7**2 + torch.eye(3).double() / 2.0**2
    mean = torch.linalg.solve(precision, x.T @ y / 0.7**2)
    std = precision.diagonal().rsqrt()
    posterior = vi.posterior(trained)
    # Adam hovers around the optimum, by a fraction of a standard deviation at this step size.
    assert float(((posterior.mean["w"] - mean)[:, 0] / std).abs().max()) < 0.3
    assert_close(posterior.std["w"][:, 0], std, rtol=0.15, atol=0)


def test_fit_is_a_function_of_its_key_and_changes_nothing_that_was_given():
    net = small_net()
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = Model.from_module(net)
    start = vi.init(model.params, std=0.05)
    start_before = trees.clone(start)
    x, y = table()
    x.requires_grad_()
    rng = torch.get_rng_state()

    def run(key):
        data = [(x[:6], y[:6]), (x[6:], y[6:])]
        return vi.fit(model, data, key=key, likelihood=Categorical(), num_epochs=2, state=start)

    first, second, other = run(1), run(1), run(2)
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first.mean["0.weight"], other.mean["0.weight"])
    assert torch.equal(torch.get_rng_state(), rng)
    assert_close(trees.clone(start), start_before, rtol=0, atol=0)
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert net.training
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert not any(leaf.requires_grad for leaf in trees.leaves(first))


def test_only_the_bayesian_parameters_are_in_the_state():
    net = small_net()
    model = Model.from_module(net, lambda name: name.startswith("3"))
    trained = vi.fit(model, table(), key=0, likelihood=Categorical(), num_epochs=1)
    assert sorted(trained.mean) == ["3.bias", "3.weight"]
    assert net[0].weight.grad is None


def test_num_data_is_counted_and_the_callback_sees_every_step():
    model, (x, y) = Model.from_module(small_net()), table(10)
    data, seen = [(x[:7], y[:7]), (x[7:], y[7:])], []
    common = {"key": 0, "likelihood": Categorical(), "num_epochs": 2}
    counted = vi.fit(model, data, **common, callback=lambda step, info: seen.append((step, info)))
    given_ = vi.fit(model, data, **common, num_data=10)
    assert_close(counted, given_, rtol=0, atol=0)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    start = vi.init(model.params)
    _, info = vi.negative_elbo(
        start, model, data[0], key=random.fold_in(0, 0), likelihood=Categorical(), num_data=10
    )
    assert_close(seen[0][1], info)
    assert_close(info.loss, info.nll + info.kl / 10)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_init_and_kl_are_refused():
    params = {"w": torch.zeros(2)}
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"`std` is .*, expected a finite positive number"):
            vi.init(params, std=bad)
        with pytest.raises(ValueError, match=r"`prior_std` is .*, expected a finite positive"):
            vi.kl_divergence(vi.init(params), prior_std=bad)
    with pytest.raises(ValueError, match="`params` has no leaves"):
        vi.init({})
    with pytest.raises(TypeError, match=r"`params\['w'\]` is torch.int64, expected a floating"):
        vi.init({"w": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"`params\['w'\]` has 1 of 2 entries NaN or infinite"):
        vi.init({"w": torch.tensor([0, math.inf])})
    with pytest.raises(ValueError, match=r"`prior_mean\['w'\]` has shape \(3,\), expected \(2,\)"):
        vi.kl_divergence(vi.init(params), prior_mean={"w": torch.zeros(3)})


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_the_loss_are_refused():
    model, (x, y) = Model.from_module(small_net()), table()
    state = vi.init(model.params)

    def loss(batch=(x, y), state=state, **changes):
        call = {"key": 0, "likelihood": Categorical(), "num_data": 12, **changes}
        vi.negative_elbo(state, model, batch, **call)

    with pytest.raises(ValueError, match="`num_samples` is 0, expected at least 1"):
        loss(num_samples=0)
    with pytest.raises(TypeError, match=r"`num_samples` is 1.5, expected an integer"):
        loss(num_samples=1.5)
    with pytest.raises(ValueError, match="`num_data` is 0, expected a finite positive number"):
        loss(num_data=0)
    with pytest.raises(ValueError, match="`kl_weight` is -1, expected a finite number of at least"):
        loss(kl_weight=-1)
    with pytest.raises(ValueError, match=r"`state.mean` has another structure: .*is missing"):
        loss(state=vi.ViState({"w": torch.zeros(2)}, {"w": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"`targets` has dtype torch.float64"):
        loss(batch=(x, y.double()))
    with pytest.raises(ValueError, match=r"`targets` .*2"):
        loss(batch=(x, y + 1))
    with pytest.raises(ValueError, match=r"`targets` has dtype torch.int64, expected floating"):
        loss(likelihood=Gaussian())


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_fit_are_refused():
    model = Model.from_module(small_net())

    def fit(data=None, **changes):
        call = {"key": 0, "likelihood": Categorical(), "num_epochs": 1, **changes}
        vi.fit(model, table() if data is None else data, **call)

    with pytest.raises(ValueError, match="`num_epochs` is 0, expected at least 1"):
        fit(num_epochs=0)
    with pytest.raises(ValueError, match=r"`learning_rate` is -0.1, expected a finite positive"):
        fit(learning_rate=-0.1)
    with pytest.raises(ValueError, match="`data` yielded no data"):
        fit(data=[])
    with pytest.raises(ValueError, match="`data` yielded no data"):
        fit(data=iter([table()]))  # counted, and then gone
    with pytest.raises(TypeError, match="`optimizer` gives a list, expected a function from a"):
        fit(optimizer=lambda leaves: leaves)
    with pytest.raises(TypeError, match="`optimizer` gives a SGD, expected a function from a"):
        fit(optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_state():
    model, (x, y) = Model.from_module(small_net()), table()
    start = vi.init(model.params)
    before = trees.clone(start)
    bad = x.clone()
    bad[0] = math.nan
    with pytest.raises(
        ValueError, match=r"the loss is nan at step 1 \(epoch 0\).*Check the inputs"
    ):
        vi.fit(
            model,
            [(x, y), (bad, y)],
            key=0,
            likelihood=Categorical(),
            num_epochs=2,
            state=start,
        )
    assert_close(trees.clone(start), before, rtol=0, atol=0)


# -- torch.compile -------------------------------------------------------------------------


@pytest.mark.compile
def test_kl_compiles_to_one_graph():
    state = random_state({"a": torch.zeros(3).double(), "b": torch.zeros(2, 2).double()})
    torch.compiler.reset()
    compiled = torch.compile(vi.kl_divergence, fullgraph=True, backend="aot_eager")
    assert_close(compiled(state), vi.kl_divergence(state), rtol=1e-12, atol=0)
