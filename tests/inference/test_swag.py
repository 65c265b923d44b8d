"""SWAG's moments against two-pass float64 references, its posterior, and its batch-norm pass."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from funcbayes.core import random, trees
from funcbayes.core.model import Model
from funcbayes.core.trees import tree_map
from funcbayes.exceptions import NotFittedError
from funcbayes.inference import swag
from funcbayes.posteriors import Diagonal, DropoutMasks, LowRank

SHAPES = {"w": (3, 2), "nested": [(4,), ()]}
EPS = {torch.float32: 2**-23, torch.float64: 2**-52}


def build(shapes, make):
    if isinstance(shapes, dict):
        return {k: build(v, make) for k, v in shapes.items()}
    if isinstance(shapes, list):
        return [build(v, make) for v in shapes]
    return make(shapes)


def iterates(num, *, seed=0, offset=0.0, dtype=torch.float64):
    """A tree with leaves [num, *shape], entries in offset ± 1."""
    gen = torch.Generator().manual_seed(seed)

    def make(shape):
        noise = torch.rand(num, *shape, generator=gen, dtype=torch.float64)
        return (offset + 2 * noise - 1).to(dtype)

    return build(SHAPES, make)


def run(stack, start, stop, *, max_rank=0):
    state = swag.init(trees.index(stack, 0), max_rank=max_rank)
    for i in range(start, stop):
        state = swag.update(state, trees.index(stack, i))
    return state


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]


# -- moments -------------------------------------------------------------------------------


@given(
    num=st.integers(1, 12),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_running_moments_equal_two_pass_moments(num, offset, dtype, seed):
    stack = iterates(num, seed=seed, offset=offset, dtype=dtype)
    start = swag.init(trees.index(stack, 0))
    state = run(stack, 0, num)

    assert int(state.count) == num
    # n roundings at magnitude offset + 1, each times a deviation of at most 2.
    # E[θ²] − E[θ]² would err by about n·eps·offset²: 1e5 times more at offset 1e6.
    atol = 8 * num * EPS[dtype] * (offset + 1)
    for mean, sum_sq_dev, x in zip(
        trees.leaves(state.mean), trees.leaves(state.sum_sq_dev), trees.leaves(stack), strict=True
    ):
        wide = x.double()
        assert mean.dtype == sum_sq_dev.dtype == dtype
        assert_close(mean.double(), wide.mean(0), rtol=0, atol=atol)
        expected = (wide - wide.mean(0)).square().sum(0)
        assert_close(sum_sq_dev.double(), expected, rtol=0, atol=atol)
        assert not bool((sum_sq_dev < 0).any())
    assert not any(bool(leaf.any()) for leaf in trees.leaves(start))  # inputs stay unmodified


@given(num=st.integers(0, 9), max_rank=st.sampled_from([0, 2, 3, 5]), seed=st.integers(0, 2**32))
def test_deviations_are_the_last_ones_from_the_running_mean(num, max_rank, seed):
    stack = iterates(max(num, 1), seed=seed)
    state = run(stack, 0, num, max_rank=max_rank)
    for kept, x in zip(trees.leaves(state.deviations), trees.leaves(stack), strict=True):
        # After the update: iterate i deviates from the mean of iterates 1 … i.
        rows = [x[i] - x[: i + 1].mean(0) for i in range(num)]
        rows = [torch.zeros_like(x[0])] * max_rank + rows
        expected = torch.stack(rows[len(rows) - max_rank :]) if max_rank else kept[:0]
        assert kept.shape == (max_rank, *x.shape[1:])
        assert_close(kept, expected, rtol=0, atol=1e-14)


@given(num=st.integers(1, 6), max_rank=st.sampled_from([0, 2, 4]), seed=st.integers(0, 2**32))
def test_vmapped_update_and_posterior_equal_the_loop(num, max_rank, seed):
    members = 3
    paths = [iterates(num, seed=seed + m) for m in range(members)]
    looped = [run(path, 0, num, max_rank=max_rank) for path in paths]

    stacked = vmap(lambda p: swag.init(p, max_rank=max_rank))(
        trees.stack([trees.index(path, 0) for path in paths])
    )
    for i in range(num):
        stacked = vmap(swag.update)(stacked, trees.stack([trees.index(path, i) for path in paths]))

    assert_close(stacked, trees.stack(looped), rtol=1e-14, atol=1e-15)
    assert_close(
        vmap(swag.posterior)(stacked),
        trees.stack([swag.posterior(s) for s in looped]),
        rtol=1e-13,
        atol=1e-15,
    )


def test_a_bfloat16_trajectory_is_averaged_in_float32():
    num = 400
    gen = torch.Generator().manual_seed(0)
    path = (1 + 0.1 * torch.randn(num, 5, generator=gen)).bfloat16()
    state = swag.init({"w": path[0]}, max_rank=2)
    for theta in path:
        state = swag.update(state, {"w": theta})
    # float32: 400 roundings of 2⁻²⁴ at most. A bfloat16 mean stops moving at n = 256, and
    # would be off by 4e-3 from its spacing alone.
    assert_close(state.mean["w"], path.float().mean(0), rtol=0, atol=1e-4)
    assert_close(state.sum_sq_dev["w"] / num, path.float().var(0, correction=0), rtol=1e-3, atol=0)
    posterior = swag.posterior(state)
    assert {leaf.dtype for leaf in trees.leaves(posterior)} == {torch.bfloat16}


def test_a_narrow_spread_at_a_large_weight_survives_float32():
    num, std = 200, 2e-3
    gen = torch.Generator().manual_seed(1)
    path = (10 + std * torch.randn(num, 50, generator=gen, dtype=torch.float64)).float()
    state = swag.init(path[0])
    for theta in path:
        state = swag.update(state, theta)
    expected = path.double().var(0, correction=0)
    # E[θ²] − E[θ]² in float32 errs by 1e-5 here, more than the variance of 4e-6.
    assert_close((state.sum_sq_dev / num).double(), expected, rtol=1e-2, atol=0)


def test_the_state_does_not_alias_the_live_parameters():
    params = {"w": torch.randn(3, requires_grad=True)}
    state = swag.init(params, max_rank=2)
    for _ in range(2):
        state = swag.update(state, params)
    before = trees.clone(state)
    with torch.no_grad():
        params["w"].add_(100)
    assert_close(state, before, rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in trees.leaves(state))
    assert params["w"].grad is None


# -- merging -------------------------------------------------------------------------------


@given(
    cuts=st.tuples(st.integers(0, 10), st.integers(0, 10)),
    max_rank=st.sampled_from([0, 2, 4]),
    seed=st.integers(0, 2**32),
)
def test_shards_merge_to_the_whole(cuts, max_rank, seed):
    num = 10
    stack = iterates(num, seed=seed, offset=3.0)
    a, b = sorted(cuts)
    shards = [run(stack, *span, max_rank=max_rank) for span in [(0, a), (a, b), (b, num)]]
    whole = run(stack, 0, num, max_rank=max_rank)
    left = swag.merge(swag.merge(shards[0], shards[1]), shards[2])
    right = swag.merge(shards[0], swag.merge(shards[1], shards[2]))
    for merged in (left, right):
        assert_close(merged.count, whole.count)
        assert_close(merged.mean, whole.mean, rtol=0, atol=1e-13)
        assert_close(merged.sum_sq_dev, whole.sum_sq_dev, rtol=0, atol=1e-12)
    assert_close(left.deviations, right.deviations)


@given(nums=st.tuples(st.integers(0, 6), st.integers(0, 6)), seed=st.integers(0, 2**32))
def test_a_merge_keeps_the_newest_deviations(nums, seed):
    rank = 4
    parts = [run(iterates(6, seed=seed + j), 0, n, max_rank=rank) for j, n in enumerate(nums)]
    merged = swag.merge(*parts)
    for kept, d, e in zip(*(trees.leaves(s.deviations) for s in (merged, *parts)), strict=True):
        filled = [x[rank - min(n, rank) :] for x, n in zip((d, e), nums, strict=True)]
        rows = torch.cat([torch.zeros_like(d), *filled])
        assert_close(kept, rows[len(rows) - rank :], rtol=0, atol=0)
    with_vmap = vmap(swag.merge)(*(trees.stack([p, p]) for p in parts))
    assert_close(trees.index(with_vmap, 1), merged)


# -- posterior -----------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "max_rank", "scale"), [(9, 4, None), (3, 5, 0.7), (6, 0, None)])
def test_the_posterior_covariance_is_that_of_the_formula(num, max_rank, scale):
    stack = iterates(num, seed=3)
    state = run(stack, 0, num, max_rank=max_rank)
    post = swag.posterior(state, scale=scale)

    flat = trees.ravel(stack, batch_dims=1)
    expected = torch.diag(flat.var(0, correction=0))
    if max_rank:
        kept = min(num, max_rank)
        columns = [flat[i] - flat[: i + 1].mean(0) for i in range(num - kept, num)]
        d = torch.stack(columns, dim=1)
        expected = (
            0.5 * (expected + d @ d.T / (kept - 1))
            if scale is None
            else scale * (expected + d @ d.T / (kept - 1))
        )
    covariance = torch.diag(trees.ravel(post.std).square())
    if max_rank:
        assert isinstance(post, LowRank)
        rows = trees.ravel(post.factor, batch_dims=1)
        covariance = covariance + rows.T @ rows
    else:
        assert isinstance(post, Diagonal)
    assert_close(covariance, expected, rtol=1e-12, atol=1e-14)
    assert_close(trees.ravel(post.mean), flat.mean(0), rtol=0, atol=1e-14)


def test_samples_have_the_moments_of_the_formula():
    num = 8_000
    path = iterates(8, seed=5)["w"].flatten(1)
    state = swag.init(path[0], max_rank=3)
    for theta in path:
        state = swag.update(state, theta)
    d = state.deviations
    expected = 0.5 * (torch.diag(path.var(0, correction=0)) + d.T @ d / 2)
    samples = swag.posterior(state).sample(random.key(0), num)
    z_mean = (samples.mean(0) - path.mean(0)) / (expected.diag() / num).sqrt()
    assert float(z_mean.abs().max()) < 5
    # A sample covariance entry has variance (c_ii c_jj + c_ij²) / n.
    spread = ((torch.outer(expected.diag(), expected.diag()) + expected.square()) / num).sqrt()
    assert float(((samples.T.cov() - expected) / spread).abs().max()) < 5


def test_one_iterate_has_no_low_rank_part_and_the_clamped_spread():
    stack = iterates(1)
    post = swag.posterior(run(stack, 0, 1, max_rank=3), var_clamp=1e-6)
    assert isinstance(post, LowRank)
    assert not any(bool(leaf.any()) for leaf in trees.leaves(post.factor))
    for std in trees.leaves(post.std):
        assert_close(std, torch.full_like(std, math.sqrt(0.5e-6)))


def test_var_clamp_is_a_floor_and_leaves_larger_variances():
    state = swag.init(torch.zeros(2).double())
    for theta in ([1.0, 0.0], [-1.0, 0.1]):  # variances 1 and 0.0025
        state = swag.update(state, torch.tensor(theta).double())
    std = swag.posterior(state, var_clamp=0.25).std
    assert_close(std, torch.tensor([1, 0.5]).double(), rtol=1e-12, atol=0)


def test_scale_zero_is_the_mean():
    stack = iterates(5)
    post = swag.posterior(run(stack, 0, 5, max_rank=3), scale=0.0)
    for sample, mean in zip(
        trees.leaves(post.sample(random.key(0), 4)), trees.leaves(post.mean), strict=True
    ):
        assert_close(sample, mean.expand_as(sample), rtol=0, atol=0)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_init_are_refused():
    params = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"`max_rank` is -1, expected 0 \(diagonal\) or at least"):
        swag.init(params, max_rank=-1)
    with pytest.raises(ValueError, match="`max_rank` is 1, expected 0"):
        swag.init(params, max_rank=1)
    with pytest.raises(TypeError, match="`max_rank` is a float, expected an integer"):
        swag.init(params, max_rank=2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`params` has no leaves"):
        swag.init({})
    with pytest.raises(TypeError, match=r"`params\['n'\]` is torch.int64, expected a floating"):
        swag.init({"n": torch.zeros(2, dtype=torch.int64)})


def test_a_bad_iterate_is_refused_and_the_state_is_intact():
    state = swag.update(swag.init({"w": torch.zeros(2, 3)}, max_rank=2), {"w": torch.ones(2, 3)})
    before = trees.clone(state)
    with pytest.raises(ValueError, match=r"`params\['w'\]` has 1 of 6 entries NaN or infinite"):
        swag.update(
            state, {"w": torch.ones(2, 3).index_put((torch.tensor(0),) * 2, torch.tensor(math.nan))}
        )
    with pytest.raises(ValueError, match=r"`params\['w'\]` has shape \(3, 2\), expected \(2, 3\)"):
        swag.update(state, {"w": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"params\['w'\] is missing"):
        swag.update(state, {"v": torch.ones(2, 3)})
    assert_close(state, before, rtol=0, atol=0)


def test_bad_arguments_of_posterior_and_merge_are_refused():
    params = {"w": torch.zeros(2)}
    empty = swag.init(params)
    with pytest.raises(NotFittedError, match="`state` has seen no iterate"):
        swag.posterior(empty)
    state = swag.update(empty, params)
    with pytest.raises(
        ValueError, match=r"`scale` is -1.0, expected a finite number of at least 0"
    ):
        swag.posterior(state, scale=-1.0)
    for bad in (0.0, -1e-6, math.nan):
        with pytest.raises(ValueError, match=r"`var_clamp` is .*, expected a finite positive"):
            swag.posterior(state, var_clamp=bad)
    with pytest.raises(ValueError, match=r"`state.count` has shape \(2,\).*vmap\(posterior\)"):
        swag.posterior(trees.stack([state, state]))
    with pytest.raises(ValueError, match=r"`b.deviations\['w'\]` has shape \(2, 2\), expected"):
        swag.merge(state, swag.init(params, max_rank=2))


# -- batch norm ----------------------------------------------------------------------------


def conv_net(*, momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(3 * 16, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    ).double()


def spread_posterior(model, std=0.1):
    return Diagonal(model.params, tree_map(lambda p: torch.full_like(p, std), model.params))


def loader(sizes, *, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [
        (3 + torch.randn(n, 1, 6, 6, generator=gen, dtype=torch.float64), torch.zeros(n))
        for n in sizes
    ]


def authors_bn_update(data, net):
    """The recursion of the SWAG authors' code, with dropout off."""
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    net.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    with torch.no_grad():
        for x, _ in data:
            for layer in layers:
                layer.momentum = len(x) / (seen + len(x))
            net(x)
            seen += len(x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [[8, 8], [8, 5, 3]])
def test_batch_norm_statistics_equal_the_loop_over_draws(sizes, momentum):
    net, data = conv_net(momentum=momentum), loader(sizes)
    model = Model.from_module(net)
    result = swag.reestimate_batch_norm(model, spread_posterior(model), data, key=1, num_samples=3)
    assert sorted(result.constants) == sorted(
        f"{i}.running_{stat}" for i in (1, 6) for stat in ("mean", "var")
    )
    for i in range(3):
        one = copy.deepcopy(net)
        one.load_state_dict(trees.index(result.params, i), strict=False)
        authors_bn_update(data, one)
        expected = {name: dict(one.named_buffers())[name] for name in result.constants}
        assert_close(trees.index(result.constants, i), expected, rtol=1e-12, atol=1e-12)
        if len(set(sizes)) == 1:
            one[3].p = 0.0
            torch.optim.swa_utils.update_bn(data, one)
            assert_close(trees.index(result.constants, i), expected, rtol=1e-12, atol=1e-12)


def test_the_batch_norm_pass_changes_nothing_of_the_users():
    net = conv_net()
    net.train()
    net[6].eval()
    model = Model.from_module(net)
    posterior = spread_posterior(model)
    before, flags = snapshot(net)
    rng = torch.get_rng_state()
    swag.reestimate_batch_norm(model, posterior, loader([4, 4]), key=0, num_samples=2)
    after, flags_after = snapshot(net)
    assert flags == flags_after
    assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_draws_do_not_depend_on_how_many_there_are():
    model = Model.from_module(conv_net())
    posterior, data = spread_posterior(model), loader([6])
    few = swag.reestimate_batch_norm(model, posterior, data, key=0, num_samples=2)
    many = swag.reestimate_batch_norm(model, posterior, data, key=0, num_samples=5)
    assert_close(few, tree_map(lambda x: x[:2], many), rtol=1e-12, atol=1e-12)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_vmap_cannot_batch_is_looped_over(caplog):
    torch.manual_seed(0)
    net = Recurrent().double()
    data = [(torch.randn(6, 5, 3, dtype=torch.float64), torch.zeros(6)) for _ in range(2)]
    model = Model.from_module(net)
    result = swag.reestimate_batch_norm(model, spread_posterior(model), data, key=0, num_samples=2)
    assert "vmap cannot batch" in caplog.text
    for i in range(2):
        one = copy.deepcopy(net)
        one.load_state_dict(trees.index(result.params, i), strict=False)
        authors_bn_update(data, one)
        expected = {name: dict(one.named_buffers())[name] for name in result.constants}
        assert_close(trees.index(result.constants, i), expected, rtol=1e-12, atol=1e-12)


def test_a_pure_function_with_batch_norm_constants_is_reestimated():
    def apply(params, x, constants):
        x = F.batch_norm(x @ params, constants["mean"], constants["var"])
        return F.batch_norm(x + 1, constants["mean"], constants["var"])  # a second use

    x = torch.randn(7, 3, dtype=torch.float64)
    weight = torch.randn(3, 2, dtype=torch.float64)
    buffers = {"mean": torch.zeros(2).double(), "var": torch.ones(2).double()}
    model = Model(apply, weight, buffers)
    posterior = Diagonal(weight, torch.zeros_like(weight))
    result = swag.reestimate_batch_norm(model, posterior, (x, torch.zeros(7)), key=0, num_samples=2)
    first = x @ weight
    second = F.batch_norm(first, None, None, training=True) + 1
    expected = {
        "mean": torch.stack([first.mean(0), second.mean(0)]).mean(0),
        "var": torch.stack([first.var(0), second.var(0)]).mean(0),
    }
    for i in range(2):
        assert_close(trees.index(result.constants, i), expected, rtol=1e-12, atol=1e-12)
    assert_close(buffers, {"mean": torch.zeros(2).double(), "var": torch.ones(2).double()})


def test_a_model_without_batch_norm_gets_its_draws_back():
    model = Model.from_module(nn.Linear(3, 2).double())
    posterior = spread_posterior(model)
    data = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4))
    result = swag.reestimate_batch_norm(model, posterior, data, key=0, num_samples=3)
    assert result.constants == {}
    assert_close(result.params, posterior.sample(random.key(0), 3), rtol=0, atol=0)


def test_bad_arguments_of_the_batch_norm_pass_are_refused():
    model = Model.from_module(conv_net())
    posterior, data = spread_posterior(model), loader([4])

    def call(posterior=posterior, data=data, num_samples=2):
        swag.reestimate_batch_norm(model, posterior, data, key=0, num_samples=num_samples)

    with pytest.raises(ValueError, match="`num_samples` is 0, expected at least 1"):
        call(num_samples=0)
    with pytest.raises(ValueError, match="`data` yielded no data"):
        call(data=[])
    with pytest.raises(ValueError, match=r"one value per channel at '6.running_mean'.*drop_last"):
        call(data=loader([4, 1]))
    with pytest.raises(
        ValueError, match=r"`statistics\['1.running_mean'\]` has 6 of 6 entries NaN"
    ):
        call(data=[(torch.full((4, 1, 6, 6), math.inf, dtype=torch.float64), torch.zeros(4))])
    with pytest.raises(TypeError, match="`posterior` is a DropoutMasks, which draws no parameters"):
        call(posterior=DropoutMasks(model.params, None, "row"))


# -- torch.compile -------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("max_rank", [0, 3])
def test_update_compiles_to_one_graph(max_rank):
    torch.compiler.reset()
    stack = iterates(5)
    compiled = torch.compile(swag.update, fullgraph=True, backend="aot_eager")
    state = swag.init(trees.index(stack, 0), max_rank=max_rank)
    for i in range(5):
        # A Python counter in the state would compile a graph a step.
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            state = compiled(state, trees.index(stack, i))
    assert_close(state, run(stack, 0, 5, max_rank=max_rank), rtol=1e-14, atol=1e-14)


def test_the_count_goes_to_a_device_once():
    state = run(iterates(4), 0, 4, max_rank=3)
    elsewhere = trees.tensor_map(lambda leaf: leaf.to("meta"), state)._replace(count=state.count)
    moves = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.Tensor.to and args[0].device != result.device:
                moves.append(result.device)
            return result

    with Watch():
        posterior = swag.posterior(elsewhere)
    assert {leaf.device.type for leaf in trees.leaves(posterior)} == {"meta"}
    assert moves == [torch.device("meta")]
