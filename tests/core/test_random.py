"""Keys and the numbers drawn from them: a function of the key, and of nothing else."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.testing import assert_close

from funcbayes.core import random, workers
from funcbayes.core.masks import KeyedDropout

STEPS = st.one_of(
    st.tuples(st.just("fold_in"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("split"), st.integers(0, 5)),
)
# Small numbers too, so that chains that differ only in how they are built come up.
CHAINS = st.lists(
    st.one_of(STEPS, st.tuples(st.sampled_from(["fold_in", "split"]), st.integers(0, 2))),
    max_size=4,
).map(tuple)
DRAWS = {
    "normal": lambda key: random.normal(key, (3, 2)),
    "uniform": lambda key: random.uniform(key, (3, 2)),
    "bernoulli": lambda key: random.bernoulli(key, 0.5, (64,)),
    "randint": lambda key: random.randint(key, 0, 1000, (9,)),
    "permutation": lambda key: random.permutation(key, 50),
    "normal_rows": lambda key: random.normal_rows(key, 0, 2, 3),
}


def derive(seed, chain):
    key = random.key(seed)
    for step, number in chain:
        key = random.fold_in(key, number) if step == "fold_in" else random.split(key, 6)[number]
    return key


def z_score(x, mean, variance):
    return float((x.double().mean() - mean) / math.sqrt(variance / x.numel()))


# -- keys ----------------------------------------------------------------------------------


@example(first=(("split", 1), ("split", 0), ("split", 0)), second=(("fold_in", 0),))
@example(first=(("fold_in", 1),), second=(("fold_in", 1 + 2**32),))
@example(first=(("split", 2),), second=(("fold_in", 2),))
@given(first=CHAINS, second=CHAINS)
def test_chains_of_splits_and_folds_never_collide(first, second):
    a, b = derive(0, first), derive(0, second)
    assert (a == b) == (first == second)
    assert (random.seed(a) == random.seed(b)) == (first == second)


@given(seeds=st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1)), chain=CHAINS)
def test_different_seeds_never_collide(seeds, chain):
    a, b = (derive(seed, chain) for seed in seeds)
    assert (random.seed(a) == random.seed(b)) == (seeds[0] == seeds[1])


def test_a_split_is_no_fold_and_no_seed():
    keys = [random.key(0), random.key(1), random.key(2**32), random.key(2**64)]
    keys += random.split(0, 3) + [random.fold_in(0, i) for i in (0, 1, 2, 2**32, 2**33)]
    assert len({random.seed(key) for key in keys}) == len(keys)


def test_a_split_into_more_keys_begins_with_the_same_ones():
    assert random.split(3, 5)[:2] == random.split(3)
    assert random.split(3, 0) == []


def test_keys_are_immutable_and_deriving_leaves_the_parent_alone():
    key = random.key(5)
    random.fold_in(key, 1)
    random.split(key)
    assert key == random.Key(5, ())
    assert hash(key) == hash(random.key(5))
    with pytest.raises(AttributeError):
        key.entropy = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("as_int", [5, np.int64(5), np.uint8(5), torch.tensor(5)])
def test_an_integer_stands_for_its_key(name, as_int):
    assert_close(DRAWS[name](as_int), DRAWS[name](random.key(5)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, TypeError, "`key` is a bool, expected a funcbayes key or an integer"),
        (1.0, TypeError, "`key` is a float, expected a non-negative integer"),
        ("0", TypeError, "`key` is a str"),
        (None, TypeError, "`key` is a NoneType"),
        ((0, ()), TypeError, "`key` is a tuple"),
        (torch.tensor([0, 1]), TypeError, "`key` is a Tensor"),
        (-1, ValueError, r"`key` is -1, expected 0 ≤ key < 2\*\*128"),
        (2**128, ValueError, r"expected 0 ≤ key < 2\*\*128"),
    ],
)
def test_what_is_no_key_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        random.as_key(value)


def test_derivations_check_their_numbers():
    with pytest.raises(ValueError, match="`seed` is -1, expected 0 ≤ seed"):
        random.key(-1)
    with pytest.raises(TypeError, match="`seed` is a bool"):
        random.key(True)
    with pytest.raises(ValueError, match="`data` is -1"):
        random.fold_in(0, -1)
    with pytest.raises(ValueError, match=r"`data` is \d+, expected 0 ≤ data < 2\*\*64"):
        random.fold_in(0, 2**64)
    with pytest.raises(TypeError, match="`data` is a bool"):
        random.fold_in(0, True)
    with pytest.raises(ValueError, match="`num` is -2"):
        random.split(0, -2)


# -- draws ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
@given(seed=st.integers(0, 2**128 - 1), chain=CHAINS)
def test_the_same_key_gives_the_same_numbers_and_touches_nothing(name, seed, chain):
    key = derive(seed, chain)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = DRAWS[name](key)
    torch.rand(3)  # the global generator moves between the draws
    assert_close(DRAWS[name](key), first, rtol=0, atol=0)
    torch.set_rng_state(before)
    DRAWS[name](key)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("name", DRAWS)
def test_another_key_gives_other_numbers(name):
    assert not torch.equal(DRAWS[name](random.key(0)), DRAWS[name](random.key(1)))
    a, b = random.split(0)
    assert not torch.equal(DRAWS[name](a), DRAWS[name](b))


def test_moments_of_normal_and_uniform_numbers():
    n = 100_000
    for dtype in (torch.float32, torch.float64):
        z = random.normal(0, (n,), dtype=dtype)
        assert z.dtype == dtype
        # Fourth moment 3, so the square has variance 2.
        assert abs(z_score(z, 0, 1)) < 5
        assert abs(z_score(z.square(), 1, 2)) < 5
        u = random.uniform(1, (n,), dtype=dtype)
        assert u.dtype == dtype
        assert bool(((u >= 0) & (u < 1)).all())
        assert abs(z_score(u, 1 / 2, 1 / 12)) < 5
        assert abs(z_score(u.square(), 1 / 3, 1 / 5 - 1 / 9)) < 5


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.3, 1.0])
def test_bernoulli_has_its_probability(probability):
    n = 200_000
    hits = random.bernoulli(0, probability, (n,))
    assert hits.dtype == torch.bool
    if probability in (0, 1):
        assert int(hits.sum()) == n * probability
    else:
        assert abs(z_score(hits, probability, probability * (1 - probability))) < 5


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_bernoulli_refuses_what_is_no_probability(probability):
    with pytest.raises(ValueError, match=r"`probability` is .*, expected a number in \[0, 1\]"):
        random.bernoulli(0, probability, (2,))


@given(low=st.integers(-5, 5), size=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_randint_takes_every_value_of_its_range(low, size, seed):
    drawn = random.randint(seed, low, low + size, (400,))
    # Probability that one of 6 values is missed: 6 · (5/6)^400 < 1e-30.
    assert sorted(set(drawn.tolist())) == list(range(low, low + size))


def test_randint_refuses_an_empty_range():
    with pytest.raises(ValueError, match="`high` is 3, expected more than `low`, which is 3"):
        random.randint(0, 3, 3, (1,))


def test_every_permutation_is_equally_likely():
    n = 2000
    drawn = [tuple(random.permutation(random.fold_in(0, i), 3).tolist()) for i in range(n)]
    assert set(map(frozenset, drawn)) == {frozenset(range(3))}
    for order in set(drawn):
        hits = torch.tensor([d == order for d in drawn])
        assert abs(z_score(hits, 1 / 6, 5 / 36)) < 5
    assert len(set(drawn)) == 6
    assert random.permutation(0, 0).shape == (0,)


# -- rows ----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**64),
    cuts=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    num=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    into_buffer=st.booleans(),
)
def test_a_row_does_not_depend_on_the_chunk_it_is_drawn_in(seed, cuts, num, dtype, into_buffer):
    start, stop = sorted(cuts)
    whole = random.normal_rows(seed, 0, 7, num, dtype=dtype)
    out = torch.full((stop - start, num), math.nan, dtype=dtype) if into_buffer else None
    part = random.normal_rows(seed, start, stop, num, dtype=dtype, out=out)
    assert_close(part, whole[start:stop], rtol=0, atol=0)
    assert out is None or part is out
    for i in range(start, stop):
        row = random.normal(random.fold_in(seed, i), (num,), dtype=dtype)
        assert_close(whole[i], row, rtol=0, atol=0)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_draw_what_one_thread_draws(inference, monkeypatch):
    alone = random.normal_rows(3, 0, 9, 50)
    before = torch.get_num_threads()
    monkeypatch.setattr(workers, "THREADS_FROM", 1)
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            together = random.normal_rows(3, 0, 9, 50)
            assert_close(together.clone(), alone, rtol=0, atol=0)
            buffer = torch.empty(9, 50)
            random.normal_rows(3, 0, 9, 50, out=buffer)
            assert_close(buffer.clone(), alone, rtol=0, atol=0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_longer_than_a_block_goes_on_where_the_block_ended(dtype, monkeypatch):
    # Odd lengths on purpose: numbers come in pairs.
    monkeypatch.setattr(random, "_BLOCK_BYTES", 24)
    z = random.normal(0, (4001,), dtype=dtype).double()
    assert abs(z_score(z, 0, 1)) < 5
    assert abs(z_score(z.square(), 1, 2)) < 5
    for lag in range(1, 7):
        assert abs(z_score(z[lag:] * z[:-lag], 0, 1)) < 5


def test_streams_go_on_where_they_ended():
    device = torch.device("cpu")
    whole, first, second = (random.memory([n], torch.int64, device) for n in (12, 5, 7))
    random.Stream(0, device).words(whole)
    stream = random.Stream(0, device)
    stream.words(first)
    stream.words(second)
    assert (np.concatenate([first, second]) == whole).all()


def test_no_two_items_share_a_stream():
    """Over several blocks of items, two parents, a split, and an item of an item."""
    parents = [random.key(0), random.key(1), random.fold_in(0, 3), random.split(0)[1]]
    parents += [random.split(random.split(0)[1])[i] for i in range(2)]
    keys = [random.fold_in(p, i) for p in parents for i in (*range(600), 2**32, 2**40 + 255)]
    keys += [*parents, *(random.Key(0, (random._ITEMS, block, 0)) for block in range(3))]
    drawn = random.memory([1], torch.int64, torch.device("cpu"))
    found = set()
    for key in keys:
        random.Stream(key, torch.device("cpu")).words(drawn)
        found.add(int(drawn[0]))
    assert len(found) == len(set(keys))


def test_the_index_of_a_split_is_not_taken_for_a_fold():
    """The path of a split of a split ends like that of an item: its seed is its own."""
    own = random.split(random.split(0)[1])[0]
    assert own.path[-3] == random._FOLD
    assert isinstance(random._seed_sequence(own), np.random.SeedSequence)
    assert isinstance(random._seed_sequence(random.fold_in(own, 2**40)), random._Words)


def test_few_and_many_words_come_from_one_stream(monkeypatch):
    """NumPy has a function for few and one for many: the words are the same."""
    many = random._FEW + 1
    expected = random.Stream(3, torch.device("cpu")).draw(many)
    monkeypatch.setattr(random, "_FEW", many)
    assert (random.Stream(3, torch.device("cpu")).draw(many) == expected).all()
    monkeypatch.setattr(random, "_FEW", many - 1)
    stream = random.Stream(3, torch.device("cpu"))
    pieces = [stream.draw(5), stream.draw(many), stream.draw(7)]
    monkeypatch.setattr(random, "_FEW", 10 * many)
    whole = random.Stream(3, torch.device("cpu")).draw(many + 12)
    assert (np.concatenate(pieces) == whole).all()


def test_numbers_can_be_drawn_inside_transforms():
    def f(x):
        return (random.normal(0, x.shape) * x).sum()

    x = torch.ones(2, 3)
    expected = random.normal(0, (2, 3))
    assert_close(torch.func.grad(f)(x), expected, rtol=0, atol=0)
    rows = torch.func.vmap(torch.func.grad(f))(x)
    assert_close(rows, random.normal(0, (3,)).expand(2, 3), rtol=0, atol=0)


def test_rows_are_standard_normal_and_uncorrelated():
    rows, num = 20, 20_000
    z = random.normal_rows(0, 0, rows, num, dtype=torch.float64)
    assert abs(z_score(z, 0, 1)) < 5
    assert abs(z_score(z.square(), 1, 2)) < 5
    between = (z @ z.T / math.sqrt(num))[~torch.eye(rows, dtype=torch.bool)]
    assert float(between.abs().max()) < 5  # each standard normal
    neighbours = z[:, 1:] * z[:, :-1]
    assert abs(z_score(neighbours, 0, 1)) < 5


def test_rows_check_their_buffer_and_their_numbers():
    with pytest.raises(ValueError, match=r"`out` has shape \(3, 4\), expected \(2, 4\)"):
        random.normal_rows(0, 0, 2, 4, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="`data` is -1"):
        random.normal_rows(0, -1, 2, 4)
    assert random.normal_rows(0, 4, 4, 3).shape == (0, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["normal", "uniform", "normal_rows"])
def test_draws_on_cuda_are_functions_of_the_key(name):
    draw = {
        "normal": lambda key: random.normal(key, (5,), device="cuda"),
        "uniform": lambda key: random.uniform(key, (5,), device="cuda"),
        "normal_rows": lambda key: random.normal_rows(key, 0, 2, 5, device="cuda"),
    }[name]
    before = torch.cuda.get_rng_state()
    assert draw(0).is_cuda
    assert_close(draw(0), draw(random.key(0)), rtol=0, atol=0)
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(before, torch.cuda.get_rng_state())
    rows = random.normal_rows(7, 0, 4, 5, device="cuda")
    assert_close(random.normal_rows(7, 2, 3, 5, device="cuda"), rows[2:3], rtol=0, atol=0)


IN_TRANSFORMS = {
    "normal": lambda device: random.normal(0, (5,), device=device),
    "normal_rows": lambda device: random.normal_rows(0, 2, 3, 5, device=device)[0],
    "coupled": lambda device: random.normal_rows(random.orthogonal(0), 2, 3, 5, device=device)[0],
    "masks": lambda device: F.dropout(torch.ones(5, device=device), 0.5),
}


def drawn_in_transforms(name, device):
    """The numbers drawn outside, under `vmap` that allows no randomness, and under `grad`."""

    def draw(x):
        with KeyedDropout([random.key(0)], always=True):
            return x * IN_TRANSFORMS[name](device)

    ones = torch.ones(3, 5, device=device)
    return draw(ones[0]), vmap(draw)(ones), grad(lambda x: draw(x).sum())(ones[0])


@pytest.mark.parametrize("name", IN_TRANSFORMS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_draws_are_no_operations_of_a_transform(name, device):
    outside, mapped, differentiated = drawn_in_transforms(name, device)
    assert_close(mapped, outside.expand(3, 5), rtol=0, atol=0)
    assert_close(differentiated, outside, rtol=0, atol=0)


@pytest.mark.parametrize("name", IN_TRANSFORMS)
def test_draws_off_the_cpu_are_no_operations_of_a_transform(name, monkeypatch):
    # A device without memory draws by torch's functions, as CUDA does, but has no generator.
    monkeypatch.setattr(random, "generator", lambda key, device: torch.Generator())
    _, mapped, differentiated = drawn_in_transforms(name, "meta")
    assert (mapped.device.type, mapped.shape) == ("meta", (3, 5))
    assert (differentiated.device.type, differentiated.shape) == ("meta", (5,))


# -- coupled rows --------------------------------------------------------------------------


@given(
    seed=st.integers(0, 100), cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    num=st.integers(1, 12), size=st.sampled_from([2, 4]),
)  # fmt: skip
def test_coupled_rows_do_not_depend_on_their_chunk(seed, cuts, num, size):
    couple = {2: random.antithetic, 4: random.orthogonal}[size]
    start, stop = sorted(cuts)
    whole = random.normal_rows(couple(seed), 0, 9, num, dtype=torch.float64)
    part = random.normal_rows(couple(seed), start, stop, num, dtype=torch.float64)
    assert_close(part, whole[start:stop], rtol=0, atol=0)
    for group in range(9 // size):
        rows = whole[group * size : (group + 1) * size]
        first = random.normal(random.fold_in(seed, group), (num,), dtype=torch.float64)
        assert_close(rows[0], first, rtol=0, atol=0)
        assert_close(rows[1::2], -rows[::2], rtol=0, atol=0)
        if size == 4:
            assert_close(rows[2].square().sum(), first.square().sum())
            half = num // 2
            left_over = first[half : num - half].square().sum()
            assert_close(rows[2] @ first, left_over, rtol=0, atol=1e-12)


@pytest.mark.parametrize("couple", [random.antithetic, random.orthogonal])
def test_coupled_rows_are_standard_normal_each(couple):
    z = random.normal_rows(couple(0), 0, 8, 40_001)
    for row in z:
        assert abs(z_score(row, 0, 1)) < 5
        assert abs(z_score(row.square(), 1, 2)) < 5
    between = (z[::4] @ z[2::4].T).diagonal() if couple is random.orthogonal else z[::2] @ z[::2].T
    assert bool((between.flatten()[1:3] / math.sqrt(40_001) < 5).all())


@pytest.mark.usefixtures("unchecked")
def test_a_coupled_key_is_refused_where_nothing_is_coupled():
    with pytest.raises(TypeError, match="`key` is a Coupled key, which only samples of normal"):
        random.fold_in(random.antithetic(0), 1)
