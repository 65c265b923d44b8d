"""What predict takes, gives, refuses, and falls back to; its laws are in tests/laws."""

import copy
import logging
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcbayes as fb
from funcbayes.core import trees
from funcbayes.posteriors import Diagonal, Empirical
from funcbayes.prediction import forward, planner
from funcbayes.prediction.predictive import RunningMoments
from funcbayes.testing import networks


def diagonal(model: fb.Model, std: float = 0.1) -> Diagonal:
    return Diagonal(
        trees.clone(model.params), trees.tree_map(lambda p: torch.full_like(p, std), model.params)
    )


@pytest.fixture
def case():
    net = networks.make("linear")
    model = fb.Model.from_module(net)
    return model, diagonal(model), networks.inputs("linear", 5)


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "`num_samples` is 0, expected at least 1"),
        ({"num_samples": -3}, ValueError, "`num_samples` is -3"),
        ({"num_samples": 2.0}, TypeError, "`num_samples` is 2.0, expected an integer"),
        ({"num_samples": None}, ValueError, "`num_samples` is None, expected a number"),
        ({"key": None}, ValueError, "`key` is None, expected a key or an integer seed"),
        ({"key": -1}, ValueError, "`key` is -1"),
        ({"key": 1.5}, TypeError, "`key` is a float"),
        ({"strategy": "fast"}, ValueError, "`strategy` is 'fast', expected one of"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` is 0"),
        ({"x": "text"}, ValueError, "hold no tensor"),
        ({"x": torch.tensor(1.0)}, ValueError, "scalar tensor"),
        ({"model": nn.Linear(2, 2)}, TypeError, r"funcbayes.Model.from_module\(net\)"),
        ({"posterior": object()}, TypeError, "`posterior` is a object"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(case, change, error, match):
    model, posterior, x = case
    arguments = {
        "model": model, "posterior": posterior, "x": x, "key": 0, "num_samples": 3, **change
    }  # fmt: skip
    with pytest.raises(error, match=match):
        fb.predict(arguments.pop("model"), arguments.pop("posterior"), arguments.pop("x"),
                   **arguments)  # fmt: skip


def test_a_state_in_place_of_a_posterior_is_named(case):
    model, _, x = case
    with pytest.raises(TypeError, match=r"funcbayes\.swag\.posterior\(state\)"):
        fb.predict(model, fb.swag.init(model.params), x, key=0, num_samples=2)


def test_parameters_that_are_not_finite_are_named(case):
    model, posterior, x = case
    posterior.mean["3.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"posterior\.mean\['3\.weight'\]` has 1 of 18 entries"):
        fb.predict(model, posterior, x, key=0, num_samples=2)


def test_a_posterior_of_another_model_is_named(case):
    model, _, x = case
    other = fb.Model.from_module(networks.make("tied"))
    with pytest.raises(ValueError, match=r"posterior\.mean"):
        fb.predict(model, diagonal(other), x, key=0, num_samples=2)


def test_a_network_with_randomness_of_its_own_is_refused_and_the_generator_put_back():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(3)

    model = fb.Model.from_module(Noisy(4, 3))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws from torch's global generator"):
        fb.predict(model, diagonal(model), torch.ones(2, 4), key=0, num_samples=3)
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_of_the_networks_own_comes_through(case):
    model, posterior, _ = case
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fb.predict(model, posterior, torch.ones(2, 7), key=0, num_samples=3)


def test_moments_that_need_a_likelihood_say_so(case):
    model, posterior, x = case
    pred = fb.predict(model, posterior, x, key=0, num_samples=3)
    for name in ("entropy", "expected_entropy", "mutual_information", "aleatoric", "total"):
        with pytest.raises(ValueError, match=f"`{name}` needs to know what the outputs mean"):
            getattr(pred, name)


# What it falls back to.


def test_what_vmap_cannot_batch_runs_one_by_one_with_one_log_line(caplog):
    model = fb.Model.from_module(networks.make("recurrent"))
    x = networks.inputs("recurrent", 5)
    with caplog.at_level(logging.WARNING, logger="funcbayes"):
        for _ in range(3):
            fb.predict(model, diagonal(model), x, key=0, num_samples=4)
    assert len(caplog.records) == 1
    assert "vmap cannot batch this model" in caplog.text


def test_out_of_memory_halves_the_chunk_and_goes_on(case, monkeypatch):
    model, posterior, x = case
    expected = fb.predict(model, posterior, x, key=0, num_samples=16, strategy="loop")
    sizes = []
    whole = forward.all_samples

    def small_machine(model, draws, x):
        size = trees.leading_size(draws.params)
        sizes.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, draws, x)

    monkeypatch.setattr(forward, "all_samples", small_machine)
    monkeypatch.setattr(planner, "calls_matter", lambda plan: False)  # nothing is recorded
    found = fb.predict(model, posterior, x, key=0, num_samples=16, strategy="vmap")
    assert sizes == [16, 8, 4, 4, 4, 4]
    torch.testing.assert_close(found.variance, expected.variance)


def test_out_of_memory_in_threads_halves_the_pass_and_goes_on(case, monkeypatch):
    model, posterior, x = case
    expected = fb.predict(model, posterior, x, key=0, num_samples=16, strategy="loop")
    whole = forward.all_samples

    def small_machine(model, draws, x):
        if trees.leading_size(draws.params) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, draws, x)

    monkeypatch.setattr(forward, "all_samples", small_machine)
    found = fb.predict(model, posterior, x, key=0, num_samples=16, strategy="threads", chunk_size=8)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.variance, expected.variance)


def test_out_of_memory_for_one_sample_is_an_error(case, monkeypatch):
    model, posterior, x = case

    def no_memory(model, draws, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "all_samples", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fb.predict(model, posterior, x, key=0, num_samples=5, strategy="vmap")


# How it plans.


def profiled(**changes):
    values = {
        "shared": 0.0, "sampled": 1e6, "kernels": 10, "largest": 10**4, "stochastic": True,
        "channels_last": False, "batchable": True, **changes
    }  # fmt: skip
    return planner.Profile(**values)


def planned(profile, num=20, **changes):
    values = {
        "strategy": "auto", "chunk_size": None, "draw_size": 0, "draw_bytes": 4 * 10**5,
        "device": torch.device("cpu"), "budget": None, **changes
    }  # fmt: skip
    return planner.plan(profile, num, **values)


@pytest.mark.parametrize(
    ("profile", "num", "numbers", "expected"),
    [
        (profiled(), 1, 0, ("loop", 1)),
        (profiled(), 19, 0, ("vmap", 19)),
        (profiled(), 19, 10**6, ("threads", 10)),
        (profiled(sampled=1e9), 19, 10**6, ("threads", 1)),
        (profiled(batchable=False), 19, 0, ("threads", 1)),
        (profiled(shared=1e10, sampled=2e7), 19, 0, ("vmap", 19)),
        (profiled(shared=1e6, sampled=1e9), 19, 0, ("threads", 1)),
        (profiled(sampled=3e9, largest=2**23), 19, 0, ("loop", 1)),
        (profiled(sampled=3e9, largest=2**23, channels_last=True), 19, 0, ("threads", 1)),
    ],
)
def test_plan(profile, num, numbers, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    plan = planned(profile, num, draw_size=numbers)
    assert (plan.strategy, plan.chunk_size) == expected
    assert plan.reason in str(plan)


def test_one_core_has_no_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert planned(profiled(), draw_size=10**6).strategy == "vmap"
    assert planned(profiled(sampled=1e9)).strategy == "loop"


@pytest.mark.parametrize(
    ("chunk_size", "expected"), [(None, ("loop", 1)), (1, ("loop", 1)), (8, ("vmap", 8))]
)
def test_one_thread_runs_the_passes_on_other_devices(chunk_size, expected):
    device = torch.device("cuda")
    plan = planned(
        profiled(), strategy="threads", chunk_size=chunk_size, device=device, budget=10**9
    )
    assert (plan.strategy, plan.chunk_size, plan.threads) == (*expected, 1)


def test_plans_depend_on_autocast_of_the_inputs_device(case):
    _, posterior, x = case
    keys = [planner.plan_key(posterior, x)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            keys.append(planner.plan_key(posterior, x))
    assert len(set(keys)) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        there = planner.plan_key(posterior, x.to("meta"))
    assert there == planner.plan_key(posterior, x.to("meta"))


@pytest.mark.parametrize("strategy", ["auto", "vmap", "threads"])
def test_passes_keep_to_the_memory_budget(strategy, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    one = planner.sample_bytes(profiled(), 4 * 10**5)
    for num in (7, 100):
        for budget in (one, 3 * one, 50 * one):
            plan = planned(profiled(), num, strategy=strategy, budget=budget, draw_size=10**6)
            assert plan.peak_bytes <= max(budget, plan.threads * one)


def test_a_small_budget_gives_the_same_numbers(case):
    model, posterior, x = case
    expected = fb.predict(model, posterior, x, key=0, num_samples=9, return_samples=True)
    found = fb.predict(
        model, posterior, x, key=0, num_samples=9, return_samples=True, memory_budget=1
    )
    torch.testing.assert_close(found.samples, expected.samples)
    with pytest.raises(ValueError, match="`memory_budget` is 0, expected at least 1"):
        fb.predict(model, posterior, x, key=0, num_samples=9, memory_budget=0)


def test_explain_says_what_predict_does(case, monkeypatch):
    model, posterior, x = case
    before = torch.get_rng_state()
    plan = fb.explain(model, posterior, x, num_samples=9)
    assert torch.equal(before, torch.get_rng_state())
    assert (plan.num_samples, plan.profile.sampled) == (9, 2 * 5 * 4 * 6 + 2 * 5 * 6 * 3)
    assert plan.draw_bytes == 4 * posterior.draw_size
    for word in (plan.strategy, "9, 9 a pass", "420 a sample", "MB a sample", "budget of"):
        assert word in str(plan)
    calls = []
    evaluate = forward.evaluate

    def spy(*args, batched, **others):
        calls.append((*args[4:], batched))
        return evaluate(*args, batched=batched, **others)

    monkeypatch.setattr(forward, "evaluate", spy)
    fb.predict(model, posterior, x, key=0, num_samples=9)
    assert calls == [(0, 9, True)]
    assert fb.explain(model, posterior, x).num_samples == 30
    members = Empirical(posterior.sample(0, 4), {})
    assert fb.explain(model, members, x).num_samples == 4
    with pytest.raises(TypeError, match="`posterior` is a object"):
        fb.explain(model, object(), x)


def test_operations_before_the_first_uncertain_parameter_are_shared():
    net = networks.make("linear")
    last = fb.Model.from_module(net, bayesian=lambda name: name.startswith("3"))
    x = networks.inputs("linear", 5)
    sample = forward.only(diagonal(last).draw(fb.random.key(0), 0, 1))
    _, profile = planner.measure(last, sample, x)
    assert profile.shared == 2 * 5 * 4 * 6
    assert profile.sampled == 2 * 5 * 6 * 3
    posterior = fb.dropout.posterior(fb.Model.from_module(net))
    sample = forward.only(posterior.draw(fb.random.key(0), 0, 1))
    _, profile = planner.measure(fb.Model.from_module(net), sample, x)
    assert (profile.shared, profile.sampled) == (2 * 5 * 4 * 6, 2 * 5 * 6 * 3)


def test_a_batched_pass_evaluates_the_trunk_once():
    calls = []

    class Trunk(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            calls.append(torch._C._functorch.is_batchedtensor(out))
            return out

    net = nn.Sequential(Trunk(4, 6), nn.Linear(6, 3)).eval()
    model = fb.Model.from_module(net, bayesian=lambda name: name.startswith("1"))
    fb.predict(model, diagonal(model), torch.ones(2, 4), key=0, num_samples=8, strategy="vmap")
    assert calls == [False, False]  # sample 0, and the batched pass of the others


def test_threads_run_in_threads_and_leave_thread_counts_alone(case):
    x = case[2]
    seen = set()

    class Spy(nn.Linear):
        def forward(self, x):
            seen.add((threading.current_thread().name, torch.get_num_threads()))
            return super().forward(x)

    model = fb.Model.from_module(Spy(4, 3))
    before = torch.get_num_threads()
    fb.predict(model, diagonal(model), x, key=0, num_samples=9, strategy="threads")
    workers = {entry for entry in seen if entry[0].startswith("funcbayes")}
    assert workers
    assert all(count == 1 for _, count in workers)
    assert torch.get_num_threads() == before
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


def test_a_view_in_the_network_survives_the_channels_last_format():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)
            self.head = nn.Linear(48, 3)

        def forward(self, x):
            return self.head(self.conv(x).view(x.shape[0], -1))

    model = fb.Model.from_module(Views())
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = fb.predict(model, diagonal(model), x, key=0, num_samples=4, strategy="loop")
    found = fb.predict(model, diagonal(model), x, key=0, num_samples=4)
    torch.testing.assert_close(found.mean, expected.mean)


# What it gives.


def test_an_ensemble_without_a_key_is_every_member_once_in_order():
    net = networks.make("linear")
    model = fb.Model.from_module(net)
    members = [trees.tree_map(lambda p, i=i: p + 0.1 * i, model.params) for i in range(4)]
    x = networks.inputs("linear", 5)
    pred = fb.predict(model, Empirical(trees.stack(members), {}), x, key=None, return_samples=True)
    expected = torch.stack([model.apply(member, x) for member in members])
    torch.testing.assert_close(pred.samples, expected)
    torch.testing.assert_close(pred.mean, expected.mean(0))
    torch.testing.assert_close(pred.variance, expected.var(0))


def test_one_sample_has_no_variance(case):
    model, posterior, x = case
    likelihood = fb.likelihoods.Categorical()
    pred = fb.predict(model, posterior, x, key=0, num_samples=1, likelihood=likelihood)
    assert not pred.variance.any()
    assert not pred.mutual_information.any()


def test_outputs_may_be_trees():
    class Many(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return {"logits": out, "parts": (out.sum(-1), out[:, :1])}

    model = fb.Model.from_module(Many(4, 3))
    x = torch.ones(5, 4)
    pred = fb.predict(model, diagonal(model), x, key=0, num_samples=6, return_samples=True)
    assert pred.mean["logits"].shape == (5, 3)
    assert pred.variance["parts"][1].shape == (5, 1)
    assert pred.samples["parts"][0].shape == (6, 5)
    with pytest.raises(TypeError, match="`likelihood` describes one tensor"):
        fb.predict(
            model, diagonal(model), x, key=0, num_samples=2,
            likelihood=fb.likelihoods.Categorical(),
        )  # fmt: skip


def test_regression_moments_match_the_mixture():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    model = fb.Model.from_module(net)
    x = networks.inputs("linear", 5, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    pred = fb.predict(
        model, diagonal(model), x, key=0, num_samples=40, chunk_size=7, return_samples=True,
        likelihood=fb.likelihoods.Gaussian(noise_std=sigma),
    )  # fmt: skip
    torch.testing.assert_close(pred.mean, pred.samples.mean(0))
    torch.testing.assert_close(pred.variance, pred.samples.var(0))
    torch.testing.assert_close(pred.aleatoric, sigma.square().expand(5, 2))
    torch.testing.assert_close(pred.total, pred.samples.var(0, correction=0) + sigma.square())
    normal = torch.distributions.Normal(pred.mean, pred.total.sqrt())
    torch.testing.assert_close(pred.entropy, normal.entropy().sum(-1))
    noise = torch.distributions.Normal(0, sigma).entropy().sum()
    torch.testing.assert_close(pred.expected_entropy, noise.expand(5))
    assert (pred.mutual_information >= 0).all()


@given(
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    offset=st.floats(-1e6, 1e6),
    seed=st.integers(0, 100),
)
def test_streamed_moments_equal_two_pass_moments(cuts, offset, seed):
    gen = torch.Generator().manual_seed(seed)
    chunks = [torch.rand(n, 3, 2, generator=gen, dtype=torch.float64) + offset for n in cuts]
    moments = RunningMoments(None, None, keep_samples=False)
    for chunk in chunks:
        moments.add(chunk)
    pred = moments.result()
    whole = torch.cat(chunks)
    # One rounding at the magnitude of the offset a chunk, times deviations of at most one;
    # a mean of squares less a squared mean would err by offset² eps, a million times more.
    atol = 64 * torch.finfo(torch.float64).eps * (abs(offset) + 1)
    torch.testing.assert_close(pred.mean, whole.mean(0), rtol=0, atol=atol)
    variance = whole.var(0) if len(whole) > 1 else torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(pred.variance, variance, rtol=0, atol=atol)


def test_half_precision_outputs_are_averaged_in_single():
    moments = RunningMoments(None, None, keep_samples=False)
    for _ in range(3000):
        moments.add(torch.full((1, 1, 1), 0.1, dtype=torch.bfloat16))
    # Summed in bfloat16 the mean would stop growing after a few hundred terms.
    assert moments.result().mean.item() == torch.tensor(0.1, dtype=torch.bfloat16).item()


def test_callers_modes_reach_the_samples(case):
    model, posterior, x = case
    for strategy in ("loop", "threads"):  # torch's vmap adds a bias outside of autocast
        with torch.inference_mode():
            pred = fb.predict(model, posterior, x, key=0, num_samples=3, strategy=strategy)
            assert pred.mean.is_inference()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pred = fb.predict(model, posterior, x, key=0, num_samples=3, strategy=strategy)
            assert pred.mean.dtype == torch.bfloat16


@pytest.mark.cuda
def test_on_cuda():
    net = networks.make("convolution").cuda()
    model = fb.Model.from_module(net)
    x = networks.inputs("convolution", 5).cuda()
    loop = fb.predict(model, diagonal(model), x, key=0, num_samples=6, strategy="loop")
    for strategy in ("auto", "vmap"):
        found = fb.predict(model, diagonal(model), x, key=0, num_samples=6, strategy=strategy)
        assert found.mean.device.type == "cuda"
        torch.testing.assert_close(found.variance, loop.variance, rtol=1e-3, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_streams_and_autocast_hold_for_threads_on_cuda(chunk_size):
    net = networks.make("linear").cuda()
    model = fb.Model.from_module(net)
    x = networks.inputs("linear", 5).cuda()
    with torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda", dtype=torch.bfloat16):
        found = [
            fb.predict(
                *(model, diagonal(model), x),
                key=0,
                num_samples=6,
                strategy=strategy,
                chunk_size=chunk_size,
                return_samples=True,
            ).samples
            for strategy in ("threads", "loop")
        ]
        assert found[0].dtype == torch.bfloat16
        torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
    torch.cuda.synchronize()


def test_inputs_may_hold_what_is_no_tensor():
    class Masked(nn.Linear):
        def forward(self, x):
            return torch.dropout(super().forward(x["a"]), 0.5, False) if x["m"] is None else None

    model = fb.Model.from_module(Masked(4, 3))
    x = {"a": torch.ones(5, 4), "m": None}
    for per in ("row", "batch"):
        posterior = fb.dropout.posterior(model, per=per)
        assert fb.predict(model, posterior, x, key=0, num_samples=4).variance.any()


def test_a_posterior_of_the_users_own_needs_no_more_than_the_protocol(case):
    model, diagonal_, x = case

    class Own:
        draw_size = diagonal_.draw_size

        def sample(self, key, num_samples):
            return diagonal_.sample(key, num_samples)

        def draw(self, key, start, stop, out=None):
            return diagonal_.draw(key, start, stop, out)

    expected = fb.predict(model, diagonal_, x, key=0, num_samples=5)
    found = fb.predict(model, Own(), x, key=0, num_samples=5)
    torch.testing.assert_close(found.variance, expected.variance)


@pytest.mark.parametrize("strategy", ["vmap", "loop", "threads"])
def test_outputs_that_are_parameters_are_not_overwritten_by_the_next_draw(strategy):
    params = {"w": torch.zeros(3)}
    model = fb.Model(apply=lambda p, x: p["w"].expand(x.shape[0], 3), params=params)
    posterior = Diagonal(params, {"w": torch.ones(3)})
    pred = fb.predict(
        model, posterior, torch.ones(2, 1), key=0, num_samples=9, strategy=strategy,
        chunk_size=2, return_samples=True,
    )  # fmt: skip
    expected = posterior.sample(0, 9)["w"].unsqueeze(1).expand(9, 2, 3)
    torch.testing.assert_close(pred.samples, expected, rtol=0, atol=0)
    kept = pred.samples.clone()
    fb.predict(model, posterior, torch.ones(2, 1), key=1, num_samples=9, strategy=strategy)
    assert torch.equal(pred.samples, kept)


def test_noise_memory_is_kept_for_the_next_prediction_and_left_out_of_copies(case):
    model, posterior, x = case
    for _ in range(2):  # the first call runs sample 0 alone
        fb.predict(model, posterior, x, key=0, num_samples=8, strategy="vmap")
    (buffer,) = model._scratch.buffers
    with torch.inference_mode():
        fb.predict(model, posterior, x, key=1, num_samples=8, strategy="vmap")
    assert model._scratch.buffers[0].data_ptr() == buffer.data_ptr()
    assert not copy.deepcopy(model)._scratch.buffers


def test_noise_memory_is_kept_on_cpu_only(case, monkeypatch):
    model, posterior, _ = case
    monkeypatch.setattr(
        forward, "noise_format", lambda params: (torch.float32, torch.device("meta"))
    )
    with forward._kept_buffer(model, posterior, 3) as buffer:
        assert buffer.shape == (3, posterior.draw_size)
        assert buffer.device.type == "meta"
    assert not model._scratch.buffers


def test_draws_of_another_thread_are_none_of_the_networks(case):
    _, _, x = case
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for seed in range(20):
            model = fb.Model.from_module(networks.make("linear", seed=seed))
            fb.predict(model, diagonal(model), x, key=0, num_samples=2)
    finally:
        stop.set()
        thread.join()


def test_threads_inside_threads_do_not_wait_for_each_other(case):
    inner, posterior, x = case

    def apply(params, x):
        options = {"key": 0, "num_samples": 3, "strategy": "threads"}
        return fb.predict(inner, posterior, x, **options).mean * params["w"]

    outer = fb.Model(apply=apply, params={"w": torch.ones(3)})
    pred = fb.predict(outer, diagonal(outer), x, key=1, num_samples=5, strategy="threads")
    assert pred.variance.any()


@pytest.mark.parametrize("couple", [fb.random.antithetic, fb.random.orthogonal])
def test_coupled_samples_have_the_exact_mean_of_a_linear_network(couple):
    model = fb.Model.from_module(nn.Linear(4, 3).double())
    posterior, x = diagonal(model, 0.5), torch.randn(5, 4, dtype=torch.float64)
    expected = model.apply(model.params, x)
    for strategy in ("auto", "loop", "threads"):
        pred = fb.predict(model, posterior, x, key=couple(0), num_samples=8, strategy=strategy)
        torch.testing.assert_close(pred.mean, expected)
        assert (pred.variance > 0).all()
    low_rank = fb.posteriors.LowRank(*posterior, trees.stack([posterior.std, posterior.mean]))
    pred = fb.predict(model, low_rank, x, key=couple(0), num_samples=8)
    torch.testing.assert_close(pred.mean, expected)


@pytest.mark.usefixtures("unchecked")
def test_coupled_samples_of_a_mixture_are_refused(case):
    model, posterior, x = case
    mixture = fb.posteriors.mixture([posterior])
    with pytest.raises(TypeError, match="is a Coupled key, which only samples of normal"):
        fb.predict(model, mixture, x, key=fb.random.antithetic(0), num_samples=8)
