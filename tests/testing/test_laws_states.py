"""The laws on states: sound methods pass, planted bugs are named."""

import sys
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import funcbayes as fb
from funcbayes import checkpoint
from funcbayes.core import random, trees
from funcbayes.testing import networks, strategies
from funcbayes.testing.laws import (
    check_checkpoint_round_trip,
    check_compiles,
    check_merge,
    check_state_vmappable,
)
from funcbayes.testing.laws.states import _other_value

F64 = torch.float64
# beartype, the shape hook's checker, draws from Python's generator to check containers.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

FEW = settings(max_examples=max(5, settings().max_examples // 3))


def iterates(*batch, dtype=F64):
    key = random.key(0)
    return {
        "w": random.normal(random.fold_in(key, 0), (*batch, 3, 2), dtype=dtype),
        "b": random.normal(random.fold_in(key, 1), (*batch, 2), dtype=dtype),
    }


class Moments(NamedTuple):
    """A state of a user's own: count, mean and sum of squared deviations."""

    count: Tensor
    mean: dict[str, Tensor]
    sum_sq_dev: dict[str, Tensor]


def fit(data):
    num = torch.tensor(trees.leading_size(data))
    return Moments(
        num,
        trees.tree_map(lambda x: x.mean(0), data),
        trees.tree_map(lambda x: (x - x.mean(0)).square().sum(0), data),
    )


def merge(a, b):
    num = a.count + b.count
    share = b.count / num.double()

    def sum_sq_dev(s, t, m, n):
        return s + t + (n - m).square() * a.count * share

    return Moments(
        num,
        trees.tree_map(lambda m, n: m * (1 - share) + n * share, a.mean, b.mean),
        trees.tree_map(sum_sq_dev, a.sum_sq_dev, b.sum_sq_dev, a.mean, b.mean),
    )


# -- vmap ----------------------------------------------------------------------------------


def test_sound_updates_pass_through_vmap():
    stack = iterates(4, 5)
    check_state_vmappable(partial(fb.swag.init, max_rank=2), trees.index(stack, 0))
    states = torch.func.vmap(partial(fb.swag.init, max_rank=2))(trees.index(stack, 0))
    for i in range(3):
        check_state_vmappable(fb.swag.update, states, trees.index(stack, i))
        states = torch.func.vmap(fb.swag.update)(states, trees.index(stack, i))
    check_state_vmappable(fb.swag.posterior, states)
    check_state_vmappable(fit, stack)
    check_state_vmappable(lambda tree, name: {name: tree["w"].sum()}, stack, "total")
    check_state_vmappable(lambda x: x.exp(), torch.zeros(3, 0, dtype=torch.bfloat16))


@FEW
@given(posteriors=strategies.posteriors(families=("diagonal", "low_rank")))
def test_densities_pass_through_vmap(posteriors):
    params = posteriors.sample(0, 3)
    # A posterior of large rank to diagonal ratio has few digits in float32.
    check_state_vmappable(posteriors.log_prob, params, rtol=1e-2, atol=1e-2)


def branches(state):
    return {"w": state["w"] if state["w"].sum() > 0 else -state["w"]}


def reads_a_number(state):
    return {"w": state["w"] * float(state["w"].sum())}


def draws(state):
    return {"w": state["w"] + torch.rand(3, 2)}


def counts(state):
    return {"w": state["w"], "count": 1}


def all_axes(state):
    return {"w": state["w"] / state["w"].sum()}


def flips_outermost(state):
    return Flip.apply(state["w"])


class Flip(torch.autograd.Function):
    """Its rule for vmap reverses the states."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x.flip(in_dims[0]), in_dims[0]


def writes(state):
    return {"w": state["w"].add_(1)}


VMAP_BUGS = {
    branches: r"vmap\(function\) raised RuntimeError: vmap: .*data-dependent.*a Python `if`",
    reads_a_number: r"vmap\(function\) raised RuntimeError: vmap: .*\.item\(\).*`float\(\)`",
    draws: r"after function, torch's global generator was moved.*without a key",
    counts: r"the result, leaf \['count'\], is a int, which vmap cannot stack",
    flips_outermost: r"vmap\(function\) against a loop: sample \d, entry \(\d, \d\): .* operation",
    writes: r"after function, `stacked\[0\]\['w'\]` changed, entry \(0, 0, 0\)",
}


@pytest.mark.parametrize("bug", VMAP_BUGS, ids=lambda bug: bug.__name__)
def test_a_function_that_vmap_cannot_take_is_named(bug):
    with (
        torch.random.fork_rng(),
        pytest.raises(AssertionError, match="^check_state_vmappable: " + VMAP_BUGS[bug]),
    ):
        check_state_vmappable(bug, {"w": iterates(4)["w"]})


def test_no_leading_axis_is_refused():
    check_state_vmappable(all_axes, iterates(4))
    with pytest.raises(ValueError, match="leading axes are"):
        check_state_vmappable(all_axes, {"w": torch.ones(3), "b": torch.ones(4)})


# -- merge ---------------------------------------------------------------------------------


def laplace_fit(data):
    net = networks.make("linear", dtype=F64)
    model = fb.Model.from_module(net)
    return fb.laplace.fit(model, data, likelihood=fb.likelihoods.Categorical())


def swag_fit(data):
    state = fb.swag.init(trees.index(data, 0))
    for params in trees.unstack(data):
        state = fb.swag.update(state, params)
    return state


def test_sound_merges_pass():
    data = networks.inputs("linear", 6, dtype=F64), networks.targets(6)
    check_merge(laplace_fit, fb.laplace.merge, data)
    check_merge(swag_fit, fb.swag.merge, iterates(5))
    check_merge(fit, merge, iterates(40))
    check_merge(fit, merge, iterates(2))
    check_merge(fit, merge, iterates(7, dtype=torch.float32), cuts=[3])
    check_merge(lambda x: x.sum(0), torch.add, torch.arange(12).reshape(4, 3))


def averaged(a, b):
    return trees.tree_map(lambda x, y: (x + y) / 2 if x.is_floating_point() else x + y, a, b)


def without_shift(a, b):
    both = merge(a, b)
    return both._replace(sum_sq_dev=trees.tree_map(torch.add, a.sum_sq_dev, b.sum_sq_dev))


def without_count(a, b):
    return merge(a, b)._replace(count=a.count)


def privileged(a, b):
    return merge(a, b) if a.count >= b.count else b


def in_place(a, b):
    a.count.add_(b.count)
    return merge(a, b)


def as_integers(a, b):
    return merge(a, b)._replace(count=int(a.count + b.count))


MERGE_BUGS = {
    averaged: r"data cut at 1 of 6: merge against fit, leaf \.mean\['w'\]: entry \(\d, \d\): "
    r".* came where .* is expected.*a mean where a sum is meant",
    without_shift: r"data cut at 1 of 6: merge against fit, leaf \.sum_sq_dev\['w'\]: entry",
    without_count: r".*leaf \.count: 1 came where 6 is expected, 5 apart.*a count that is not",
    privileged: r"data cut at 1 of 6: merge against fit",
    in_place: r"after merge \(data cut at 1 of 6\), `arguments\[0\].count` changed, is 6, was 1",
    as_integers: r".*leaf \.count: 6 came where tensor\(6\) is expected",
}


@pytest.mark.parametrize("bug", MERGE_BUGS, ids=lambda bug: bug.__name__)
def test_a_merge_that_is_none_is_named(bug):
    with pytest.raises(AssertionError, match="^check_merge: " + MERGE_BUGS[bug]):
        check_merge(fit, bug, iterates(6))


def test_a_mean_of_means_is_seen_though_equal_halves_pass():
    def means(data):
        return {"mean": data.mean(0)}

    def mean_of_means(a, b):
        return {"mean": (a["mean"] + b["mean"]) / 2}

    data = iterates(4)["w"]
    with pytest.raises(AssertionError, match=r"cut at 1 and 2 of 4: merge\(a, merge\(b, c\)\)"):
        check_merge(means, mean_of_means, data, cuts=[2])
    with pytest.raises(AssertionError, match=r"data cut at 1 of 4"):
        check_merge(means, mean_of_means, data)


def test_a_merge_that_keeps_the_first_is_named():
    def newest(data):
        return {"sum": data.sum(), "newest": torch.ones(())}

    def keeps_first(a, b):
        lean = 8e-4 * torch.sign(a["sum"] - b["sum"])
        return {"sum": a["sum"] + b["sum"], "newest": a["newest"] + lean}

    with pytest.raises(AssertionError, match=r"merge\(b, a\) against merge\(a, b\).*privileged"):
        check_merge(newest, keeps_first, torch.tensor([1.0, 2.0]), atol=1e-3)


def test_impossible_cuts_are_refused():
    with pytest.raises(ValueError, match="`data` holds 1 data, expected at least 2"):
        check_merge(fit, merge, iterates(1))
    with pytest.raises(ValueError, match="`cuts` holds 4, expected between 1 and 3"):
        check_merge(fit, merge, iterates(4), cuts=[4])


# -- checkpoints ---------------------------------------------------------------------------


@FEW
@given(state=strategies.states() | strategies.posteriors())
def test_any_state_survives_a_round_trip(state):
    check_checkpoint_round_trip(state)


def test_states_of_a_users_own_and_odd_tensors_survive():
    check_checkpoint_round_trip(fit(iterates(3)), types=[Moments])
    odd = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "others": [1, 2.5, "text", None, True, (torch.ones(1),)],
    }
    check_checkpoint_round_trip(odd)


def wrong_load(monkeypatch, change):
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *args, **options: change(load(*args, **options)))


def as_float32(leaf):
    return leaf.float() if leaf.is_floating_point() else leaf


CHECKPOINT_BUGS = {
    "dtype": (
        lambda state: trees.tensor_map(as_float32, state),
        r"what was loaded against the state, leaf \.mean\['w'\]: the dtype is torch.float32 where"
        r" torch.float64 is expected",
    ),
    "shape": (
        lambda state: state._replace(count=state.count.reshape(1)),
        r"leaf \.count: the shape is \(1,\) where \(\) is expected",
    ),
    "type": (tuple, r"a tuple came back where a Moments was saved"),
    "bits": (
        lambda state: trees.tensor_map(lambda x: x * (1 + 2**-52) if x.dim() else x, state),
        r"leaf \.mean\['w'\]: entry \(\d, \d\): ",
    ),
    "inner type": (
        lambda state: state._replace(mean=list(state.mean.values())),
        r"the leaf \.mean\[0\], \.mean\[1\] is not expected",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINT_BUGS)
def test_a_checkpoint_that_loses_something_is_named(monkeypatch, name):
    change, message = CHECKPOINT_BUGS[name]
    wrong_load(monkeypatch, change)
    with pytest.raises(AssertionError, match="^check_checkpoint_round_trip: .*" + message):
        check_checkpoint_round_trip(fit(iterates(3)), types=[Moments])


def test_a_checkpoint_that_shares_memory_is_named(monkeypatch):
    state = fit(iterates(3))
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: state)
    with pytest.raises(AssertionError, match=r"leaf \.count: shares memory with the state"):
        check_checkpoint_round_trip(state)
    kept = trees.clone(state)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: kept)
    with pytest.raises(AssertionError, match=r"loaded a second time.*share the file's memory"):
        check_checkpoint_round_trip(state)


def test_saving_that_changes_the_state_is_named(monkeypatch):
    save = checkpoint.save

    def careless(path, state):
        save(path, state)
        state.count.add_(1)

    monkeypatch.setattr(checkpoint, "save", careless)
    with pytest.raises(AssertionError, match=r"after save, `state.count` changed"):
        check_checkpoint_round_trip(fit(iterates(3)), types=[Moments])


# -- compile -------------------------------------------------------------------------------


class Counted(NamedTuple):
    count: int | Tensor
    mean: Tensor


def step(state, x):
    return Counted(state.count + 1, state.mean + (x - state.mean) / (state.count + 1))


@pytest.mark.compile
def test_sound_functions_compile():
    x = torch.ones(3)
    for compiler in ("eager", "aot_eager"):
        check_compiles(step, Counted(torch.tensor(2), x), x, backend=compiler)
    state = fb.swag.init({"w": x}, max_rank=2)
    for _ in range(3):
        state = fb.swag.update(state, {"w": x})
    check_compiles(fb.swag.update, state, {"w": x}, backend="aot_eager")


@pytest.mark.compile
@pytest.mark.slow
def test_sound_functions_compile_to_machine_code():
    check_compiles(step, Counted(torch.tensor(2), torch.ones(3)), torch.ones(3))


@pytest.mark.compile
def test_a_python_counter_is_named():
    message = r"^check_compiles: other values .* compile a new graph: - 0/0: .*count.*Python num"
    with pytest.raises(AssertionError, match=message):
        check_compiles(step, Counted(2, torch.ones(3)), torch.ones(3), backend="eager")


@pytest.mark.compile
def test_a_branch_on_a_value_is_named():
    def branch(x):
        return x if x.sum() > 0 else -x

    message = r"^check_compiles: torch.compile\(fullgraph=True\) raised .*a Python `if`"
    with pytest.raises(AssertionError, match=message):
        check_compiles(branch, torch.ones(3), backend="eager")


@pytest.mark.compile
def test_an_error_of_the_function_itself_is_passed_on():
    def wrong(x):
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own"):
        check_compiles(wrong, torch.ones(3), backend="eager")


@pytest.mark.compile
def test_a_compiler_that_is_wrong_is_named():
    def doubles(graph, inputs):
        return lambda *args: [2 * out for out in graph(*args)]

    with pytest.raises(AssertionError, match=r"the compiled function against the function: entry"):
        check_compiles(lambda x: x.exp(), torch.ones(3), backend=doubles)


def test_laws_need_no_hypothesis_and_strategies_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "funcbayes.testing.strategies")
    monkeypatch.delattr(fb.testing, "strategies", raising=False)
    assert callable(fb.testing.check_merge)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'funcbayes\[testing\]'"):
        fb.testing.strategies  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'laww'"):
        fb.testing.laww  # noqa: B018


def test_other_values_stay_in_their_range():
    assert _other_value(2) == 3
    assert _other_value(2.0) == 1.5
    assert _other_value(True) is True
    assert _other_value("a") == "a"
    assert _other_value(torch.tensor(4)) == 4
    assert _other_value(torch.tensor([0, 1, 2])).tolist() == [2, 0, 1]
    assert _other_value(torch.tensor([0.5], requires_grad=True)).requires_grad
