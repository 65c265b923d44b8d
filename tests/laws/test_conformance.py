"""The conformance table: every method, on every kind of network, under every law.

Rows are the methods of `tests/methods.py`, columns the functions below, each of a cell alone:
a method joins by a row there, a law by a column here. `test_cell` tries a third of the cells, each
once, with small choices that differ from cell to cell; `test_law_under_any_choices` and
`test_column_under_any_choices` (slow) draw kinds, keys, sizes and, for the posterior families,
networks and posteriors.

What a cell answers where something is not supported stands in `REFUSED`, and is tested to be
that error; what makes no sense is left out by `Column.leaves_out`, which says why. Law 4
(never slower than the loop) is a matter of the benchmarks.
"""

import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.core.masks import KeyedDropout
from funcbayes.core.model import Model
from funcbayes.testing import networks, strategies
from tests.methods import METHODS, NO_STATE, Row

# beartype, which the shape hook calls, picks the items that it looks at by Python's generator.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

NUM_DATA = 5
ROW, BATCH = "dropout_per_row", "dropout_per_batch"
# Networks of depth under ten in float64, with outputs of order one, or a few hundred where
# weights are drawn far apart: rounding is some hundred eps of that.
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-11}


class Choices(NamedTuple):
    """What may be chosen freely in a cell.

    Attributes:
        key: to sample with.
        num_samples: at least 2.
        chunk: samples at a time.
        strategy: of `predict`.
        batch: rows of the inputs.
        seed: of the inputs.
        fit: which of a few fits.
        faults: whether forward passes are made to raise, one after the other.
    """

    key: int
    num_samples: int
    chunk: int
    strategy: str
    batch: int
    seed: int
    fit: int
    faults: bool


class Cell(NamedTuple):
    """A method on a network, fitted, with choices.

    Attributes:
        name: of the row.
        row: the method.
        kind: of the network.
        net: the network.
        model: the network as a model.
        posterior: the method's.
        data: what it was fitted on, `(inputs, targets)`.
        x: inputs to predict on.
        choices: the rest.
    """

    name: str
    row: Row
    kind: str
    net: nn.Module
    model: Model
    posterior: Any
    data: tuple[Any, Tensor]
    x: Any
    choices: Choices

    def predict(self, model: Model | None = None, **options: Any) -> Any:
        """The samples of a prediction, `[samples, batch, …]`."""
        options = {
            "key": self.choices.key,
            "num_samples": self.choices.num_samples,
            "strategy": "loop",
            **options,
        }
        x = options.pop("x", self.x)
        model = model or self.model
        return fb.predict(model, self.posterior, x, return_samples=True, **options).samples

    @property
    def strategy(self) -> str:
        """The chosen strategy, where the network allows it."""
        refused = self.choices.strategy == "vmap" and self.kind in networks.UNBATCHABLE_KINDS
        return "auto" if refused else self.choices.strategy


class Column(NamedTuple):
    """A law of one cell.

    Attributes:
        check: raises where the cell breaks the law.
        dtype: that the cell is fitted in.
        only: the kinds that it is about; None for all.
        fast: the kinds in the fast selection; None for all.
        bayesian: the uncertain parameters, by name; None for all.
        leaves_out: the reason why a row has no part in it, or None.
    """

    check: Callable[[Cell], None]
    dtype: torch.dtype = torch.float64
    only: tuple[str, ...] | None = None
    fast: tuple[str, ...] | None = None
    bayesian: Callable[[str], bool] | None = None
    leaves_out: Callable[[Row], str | None] = lambda row: None

    def kinds(self, row: Row, *, fast: bool) -> list[str]:
        """The kinds of network that the column tries a row on."""
        if self.leaves_out(row):
            return []
        chosen = self.fast if fast else None
        return [
            kind
            for kind in row.kinds
            if kind in (self.only or row.kinds) and kind in (chosen or row.kinds)
        ]


# -- law 1: pure ---------------------------------------------------------------------------


def fitting_is_pure(cell: Cell) -> None:
    net = networks.make(cell.kind, dtype=torch.float64)
    net.train()  # a mode of the user's own, and one layer in another
    next(iter(net.children())).eval()
    x, y = cell.data
    outputs = trees.leaves(net(*networks.arguments(trees.clone(x))))
    sum(leaf.square().sum() for leaf in outputs).backward()  # gradients of the user's own
    fb.testing.check_pure(
        lambda: cell.row.fit(net, (x, y), 0), [net, x, y], raises=cell.choices.faults
    )


def predicting_is_pure(cell: Cell) -> None:
    options = {"strategy": cell.strategy, "chunk_size": cell.choices.chunk}
    fb.testing.check_pure(
        lambda: cell.predict(**options),
        [cell.net, cell.model, cell.posterior, cell.x],
        raises=cell.choices.faults,
    )


def posterior_does_not_follow_further_training(cell: Cell) -> None:
    net = networks.make(cell.kind, dtype=torch.float64)
    model, posterior = cell.row.fit(net, cell.data, cell.choices.fit)
    own = cell._replace(net=net, model=model, posterior=posterior)
    before, samples = trees.clone(posterior), own.predict()
    with torch.no_grad():
        for parameter in trees.leaves(model.params):
            parameter.add_(1.0)  # shares the memory of the network's
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(trees.tensor_leaves(posterior), trees.tensor_leaves(before), **same)
    torch.testing.assert_close(own.predict(), samples, **CLOSE)


# -- law 2: one sample, one key ------------------------------------------------------------


def sample_i_is_a_function_of_key_and_i(cell: Cell) -> None:
    fb.testing.check_key_determinism(
        cell.posterior, key=cell.choices.key, num_samples=cell.choices.num_samples
    )


def chunks_do_not_matter(cell: Cell) -> None:
    fb.testing.check_chunk_invariant(
        cell.model,
        cell.posterior,
        cell.x,
        key=cell.choices.key,
        num_samples=cell.choices.num_samples,
        chunk_sizes=[cell.choices.chunk],
        **CLOSE,
    )


# -- law 3: vectorised = looped ------------------------------------------------------------


def vectorised_equals_the_loop(cell: Cell) -> None:
    fb.testing.check_vectorised_equals_loop(
        cell.model,
        cell.posterior,
        cell.x,
        key=cell.choices.key,
        num_samples=cell.choices.num_samples,
        strategies=[cell.strategy],
        **CLOSE,
    )


def moments_are_those_of_a_loop_by_hand(cell: Cell) -> None:
    samples = looped_by_hand(cell)
    options: Any = {"key": cell.choices.key, "num_samples": cell.choices.num_samples}
    options["chunk_size"] = cell.choices.chunk
    pred = fb.predict(cell.model, cell.posterior, cell.x, **options)
    torch.testing.assert_close(pred.mean, trees.tree_map(lambda s: s.mean(0), samples), **CLOSE)
    torch.testing.assert_close(pred.variance, trees.tree_map(lambda s: s.var(0), samples), **CLOSE)
    options["likelihood"] = fb.likelihoods.Categorical()
    if not isinstance(samples, Tensor):
        with pytest.raises(TypeError, match="describes one tensor: wrap the network"):
            fb.predict(cell.model, cell.posterior, cell.x, **options)
        return
    pred = fb.predict(cell.model, cell.posterior, cell.x, **options)
    probs = torch.softmax(samples, dim=-1)
    mean = probs.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    expected_entropy = torch.special.entr(probs).sum(-1).mean(0)
    torch.testing.assert_close(pred.mean, mean, **CLOSE)
    torch.testing.assert_close(pred.variance, probs.var(0), **CLOSE)
    torch.testing.assert_close(pred.aleatoric, (probs * (1 - probs)).mean(0), **CLOSE)
    torch.testing.assert_close(pred.total, mean * (1 - mean), **CLOSE)
    torch.testing.assert_close(pred.entropy, entropy, **CLOSE)
    torch.testing.assert_close(pred.expected_entropy, expected_entropy, **CLOSE)
    torch.testing.assert_close(pred.mutual_information, entropy - expected_entropy, **CLOSE)


@torch.no_grad()
def looped_by_hand(cell: Cell) -> Any:
    """One `functional_call` of the network a sample, without `Model` and `predict`."""
    draws = cell.posterior.draw(random.key(cell.choices.key), 0, cell.choices.num_samples)
    x, results = trees.clone(cell.x), []
    parts = [x]
    if cell.name == BATCH or getattr(cell.posterior, "per", None) == "batch":
        parts = [networks.rows(x, i, i + 1) for i in range(cell.choices.batch)]
    for i in range(cell.choices.num_samples):
        tensors = dict(cell.net.named_parameters()) | dict(cell.net.named_buffers())
        for sampled in (draws.params, draws.constants):
            tensors |= trees.index(sampled or {}, i)
        outputs = []
        for part in parts:
            arguments = networks.arguments(part)
            if draws.masks is None:
                outputs.append(functional_call(cell.net, tensors, arguments))
                continue
            with KeyedDropout([draws.masks.keys[i]], rate=draws.masks.rate, always=True):
                outputs.append(functional_call(cell.net, tensors, arguments))
        results.append(trees.tree_map(lambda *rows: torch.cat(rows), *outputs))
    return trees.stack(results)


# -- where and on what it runs -------------------------------------------------------------


def dtype_is_kept(cell: Cell) -> None:
    dtype = trees.leaves(cell.model.params)[0].dtype
    pred = fb.predict(
        cell.model,
        cell.posterior,
        cell.x,
        key=cell.choices.key,
        num_samples=cell.choices.num_samples,
        strategy=cell.strategy,
        return_samples=True,
    )
    for leaf in trees.leaves((pred.mean, pred.variance, pred.samples)):
        assert leaf.dtype == dtype
        assert leaf.isfinite().all()
    # To half of the digits of the largest output, the law's own tolerance.
    fb.testing.check_vectorised_equals_loop(
        cell.model, cell.posterior, cell.x, key=cell.choices.key, num_samples=2, strategies=["auto"]
    )


def predicting_in_inference_mode(cell: Cell) -> None:
    expected = cell.predict()
    model = Model.from_module(cell.net)  # without the plans and buffers of calls before
    with torch.inference_mode():
        inside = cell.predict(model, strategy=cell.strategy, x=trees.clone(cell.x))
    # What the call left behind serves outside too.
    for found in (inside, cell.predict(model, strategy=cell.strategy)):
        torch.testing.assert_close(found, expected, **CLOSE)


def fitting_in_inference_mode(cell: Cell) -> None:
    net = networks.make(cell.kind, dtype=torch.float64)
    with torch.inference_mode():
        _, posterior = cell.row.fit(net, cell.data, 0)
    _, expected = cell.row.fit(net, cell.data, 0)
    torch.testing.assert_close(
        trees.tensor_leaves(trees.clone(posterior)), trees.tensor_leaves(expected), **CLOSE
    )


def threads_at_once(cell: Cell) -> None:
    options = {"strategy": cell.strategy, "num_samples": 2}
    keys = range(cell.choices.key, cell.choices.key + 3)
    expected = [cell.predict(key=key, num_samples=2) for key in keys]
    model = Model.from_module(cell.net)  # shared, and new: all find it without plans
    start = threading.Barrier(len(keys))

    def work(key: int) -> Any:
        start.wait()
        return cell.predict(model, key=key, **options)

    with ThreadPoolExecutor(len(keys)) as pool:
        found = list(pool.map(work, keys))
    torch.testing.assert_close(found, expected, **CLOSE)


def strided_inputs(cell: Cell) -> None:
    found = cell.predict(x=networks.strided(cell.x), strategy=cell.strategy)
    torch.testing.assert_close(found, cell.predict(), **CLOSE)
    x, y = cell.data
    _, fitted_on = cell.row.fit(cell.net, (networks.strided(x), y), 0)
    _, expected = cell.row.fit(cell.net, (x, y), 0)
    torch.testing.assert_close(
        trees.tensor_leaves(fitted_on), trees.tensor_leaves(expected), **CLOSE
    )


def batch_of_one(cell: Cell) -> None:
    first = networks.rows(cell.x, 0, 1)
    found = cell.predict(x=first, strategy=cell.strategy)
    whole = trees.tensor_map(lambda leaf: leaf[:, :1], cell.predict())
    if cell.name == ROW or getattr(cell.posterior, "per", None) == "row":
        # Masks are drawn for all rows of a batch together, so those of one are others.
        one = cell._replace(x=first, choices=cell.choices._replace(batch=1))
        whole = looped_by_hand(one)
    torch.testing.assert_close(found, whole, **CLOSE)


def batch_of_none(cell: Cell) -> None:
    found = cell.predict(x=networks.rows(cell.x, 0, 0), strategy=cell.strategy)
    for leaf, other in zip(trees.leaves(found), trees.leaves(cell.predict()), strict=True):
        assert leaf.shape == (other.shape[0], 0, *other.shape[2:])
        assert leaf.dtype == other.dtype


def batching_where_vmap_has_no_rule(cell: Cell) -> None:
    cell.predict(strategy="vmap")


# -- law 5: states are data ----------------------------------------------------------------


def states_are_tensors_apart_from_the_network(cell: Cell) -> None:
    state = cell.row.state(cell.model, cell.data, cell.choices.fit)
    live = [*cell.net.parameters(), *cell.net.buffers()]
    memory = {t.untyped_storage().data_ptr() for t in live if t.numel()}
    for name, leaf in trees.leaves_with_names(state):
        assert isinstance(leaf, Tensor), name
        assert not leaf.numel() or leaf.untyped_storage().data_ptr() not in memory, name


def stacked_states(cell: Cell) -> None:
    fits = [cell.row.state(cell.model, cell.data, cell.choices.fit + i) for i in range(2)]
    fb.testing.check_state_vmappable(cell.row.posterior, trees.stack(fits))


def shards_merge(cell: Cell) -> None:
    assert callable(cell.row.merge)
    data, fit, merge = cell.row.merge(cell.model, cell.data)
    cuts = [1 + cell.choices.key % (trees.leading_size(data) - 1)]
    fb.testing.check_merge(fit, merge, data, cuts=cuts, rtol=1e-9, atol=1e-12)


def checkpoints(cell: Cell) -> None:
    if not cell.row.family and not cell.row.vmappable:
        state = cell.row.state(cell.model, cell.data, cell.choices.fit)
        fb.testing.check_checkpoint_round_trip(state)
    fb.testing.check_checkpoint_round_trip(cell.posterior)


# -- samples, moments and densities --------------------------------------------------------


def moments_are_stated(cell: Cell) -> None:
    num = 300 if is_mixture(cell) else 3000
    fb.testing.check_sampling_moments(cell.posterior, key=cell.choices.key, num_samples=num)


def density_is_that_of_the_samples(cell: Cell) -> None:
    num = 1000 if is_mixture(cell) else 5000
    fb.testing.check_log_prob_matches_samples(cell.posterior, key=cell.choices.key, num_samples=num)


def is_mixture(cell: Cell) -> bool:
    """Whether samples are drawn one at a time, which takes longer."""
    return isinstance(cell.posterior, fb.posteriors.Mixture)


# -- the table -----------------------------------------------------------------------------

STRATEGIES = ("auto", "vmap", "threads")
# The moments and densities of posteriors know nothing of the network: the smallest will do, and
# for densities, which are tested in few dimensions, a posterior over its last bias alone.
SMALLEST = ("tied",)


def unfitted(row: Row) -> str | None:
    return "nothing is fitted" if row.family else None


COLUMNS: dict[str, Column] = {
    "pure_fit": Column(fitting_is_pure, leaves_out=unfitted),
    "pure_predict": Column(predicting_is_pure),
    "detached": Column(posterior_does_not_follow_further_training),
    "keys": Column(sample_i_is_a_function_of_key_and_i),
    "chunks": Column(chunks_do_not_matter),
    "loop": Column(vectorised_equals_the_loop),
    "moments": Column(moments_are_those_of_a_loop_by_hand),
    "bfloat16": Column(dtype_is_kept, dtype=torch.bfloat16),
    "float32": Column(dtype_is_kept, dtype=torch.float32),
    "float64": Column(dtype_is_kept),
    "inference_mode": Column(predicting_in_inference_mode),
    "inference_mode_fit": Column(fitting_in_inference_mode, leaves_out=unfitted),
    "threads": Column(threads_at_once),
    "strided": Column(strided_inputs),
    "one_row": Column(batch_of_one),
    "no_rows": Column(batch_of_none),
    "unbatchable": Column(batching_where_vmap_has_no_rule, only=networks.UNBATCHABLE_KINDS),
    "tensors": Column(
        states_are_tensors_apart_from_the_network, leaves_out=lambda row: row.vmappable
    ),
    "stacked": Column(stacked_states, leaves_out=lambda row: row.vmappable),
    "shards": Column(
        shards_merge, leaves_out=lambda row: row.merge if isinstance(row.merge, str) else None
    ),
    "checkpoint": Column(checkpoints),
    "stated_moments": Column(moments_are_stated, fast=SMALLEST),
    "density": Column(
        density_is_that_of_the_samples,
        only=SMALLEST,
        bayesian=lambda name: name == "head.bias",
        leaves_out=lambda row: row.log_prob,
    ),
}

# Those that call a law of `funcbayes.testing`.
LAWS = (
    "pure_fit", "pure_predict", "keys", "chunks", "loop", "stacked", "shards", "checkpoint",
    "stated_moments", "density",
)  # fmt: skip
ANY = "*"
# (column, row, kind): the error that is the documented answer there.
REFUSED: dict[tuple[str, str, str], tuple[type[Exception], str]] = {
    ("unbatchable", ANY, "recurrent"): (ValueError, "'vmap', but vmap cannot batch this model"),
    ("inference_mode_fit", "vi", ANY): (RuntimeError, "which torch.inference_mode forbids"),
    ("inference_mode_fit", "ensemble", ANY): (RuntimeError, "which torch.inference_mode forbids"),
}


def refusal(column: str, row: str, kind: str) -> tuple[type[Exception], str] | None:
    for (c, r, k), answer in REFUSED.items():
        if c == column and r in (row, ANY) and k in (kind, ANY):
            return answer
    return None


def try_cell(column: str, cell: Cell) -> None:
    answer = refusal(column, cell.name, cell.kind)
    if answer is None:
        COLUMNS[column].check(cell)
        return
    error, message = answer
    with pytest.raises(error, match=message):
        COLUMNS[column].check(cell)


@cache
def fitted(
    name: str, kind: str, dtype: torch.dtype, bayesian: Any, fit: int
) -> tuple[nn.Module, Model, Any]:
    net, data = networks.make(kind, dtype=dtype), data_of(kind, dtype)
    return net, *METHODS[name].fit(net, data, fit, bayesian)


def data_of(kind: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    return networks.inputs(kind, NUM_DATA, dtype=dtype), networks.targets(NUM_DATA)


def cell_of(
    column: str, name: str, kind: str, choices: Choices, parts: tuple[Any, ...] | None = None
) -> Cell:
    """A cell; `parts` are network, model and posterior, None for those of a fit."""
    dtype, bayesian = COLUMNS[column].dtype, COLUMNS[column].bayesian
    x = networks.inputs(kind, choices.batch, seed=choices.seed, dtype=dtype)
    parts = parts or fitted(name, kind, dtype, bayesian, choices.fit)
    return Cell(name, METHODS[name], kind, *parts, data_of(kind, dtype), x, choices)


def choices_of(name: str) -> Choices:
    """Small choices, the same on every run, and others in every cell."""
    number = zlib.crc32(name.encode())
    return Choices(
        key=number,
        num_samples=2 + number % 2,
        chunk=1 + number // 2 % 3,
        strategy=STRATEGIES[number // 6 % 3],
        batch=1 + number // 18 % 3,
        seed=number // 54 % 100,
        fit=0,
        faults=number // 5400 % 2 == 0,
    )


def is_fast(column: str, name: str, kind: str) -> bool:
    """Whether a cell is in the fast selection.

    A third of them are, or fewer where the row says so: of every column and kind a third of the
    rows, and of every column and row a third of the kinds.
    """
    places = (list(COLUMNS), column), (list(METHODS), name), (list(networks.NETWORKS), kind)
    return sum(names.index(one) for names, one in places) % METHODS[name].fast == 0


CELLS = [
    pytest.param(column, name, kind, id=f"{column}-{name}-{kind}")
    for column in COLUMNS
    for name in METHODS
    for kind in COLUMNS[column].kinds(METHODS[name], fast=True)
    if is_fast(column, name, kind)
]


@pytest.mark.parametrize(("column", "name", "kind"), CELLS)
def test_cell(column, name, kind):
    choices = choices_of(f"{column}-{name}-{kind}")
    try_cell(column, cell_of(column, name, kind, choices))


# Not a column, since compile tests run in a process without the shape hook.
@pytest.mark.compile
@pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.vmappable != NO_STATE])
def test_posteriors_and_their_moments_compile(name):
    row = METHODS[name]
    cell = cell_of("tensors", name, "tied", choices_of(name))

    def moments_and_density(state: Any, params: Any) -> Any:
        posterior = row.posterior(state)
        density = None if row.log_prob else posterior.log_prob(params)
        return posterior.mean, posterior.variance, density

    state = row.state(cell.model, cell.data, 0)
    params = trees.tree_map(lambda p: p + 0.01, cell.model.params)
    fb.testing.check_compiles(moments_and_density, state, params, backend="aot_eager")


@st.composite
def any_choices(draw):
    return Choices(
        key=draw(st.integers(0, 2**64)),
        num_samples=draw(st.integers(2, 5)),
        chunk=draw(st.integers(1, 6)),
        strategy=draw(st.sampled_from((*STRATEGIES, "loop"))),
        batch=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**32)),
        fit=draw(st.integers(0, 2)),
        faults=draw(st.integers(0, 5)) == 5,
    )


@st.composite
def any_cell(draw, column, name):
    """A cell of a column and a row; a posterior family is drawn, and its network too."""
    row, dtype = METHODS[name], COLUMNS[column].dtype
    kind = draw(st.sampled_from(COLUMNS[column].kinds(row, fast=False)))
    choices = draw(any_choices())
    if not row.family:
        return cell_of(column, name, kind, choices)
    net = draw(strategies.networks(kinds=[kind], dtypes=[dtype]))
    model = Model.from_module(net, COLUMNS[column].bayesian)
    options = {"constants": model.constants, "scales": (1e-2, 1e0)}
    posterior = draw(strategies.posteriors(model.params, families=[row.family], **options))
    return cell_of(column, name, kind, choices, (net, model, posterior))


def drawn(*, law: bool) -> list[Any]:
    """The columns that are laws of `funcbayes.testing`, or the others, with every row."""
    return [
        pytest.param(column, name, id=f"{column}-{name}")
        for column in COLUMNS
        for name, row in METHODS.items()
        if (column in LAWS) is law and COLUMNS[column].kinds(row, fast=False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("column", "name"), drawn(law=True))
@settings(max_examples=max(200, settings().max_examples * 2 // 3))
@given(data=st.data())
def test_law_under_any_choices(column, name, data):
    try_cell(column, data.draw(any_cell(column, name)))


@pytest.mark.slow
@pytest.mark.parametrize(("column", "name"), drawn(law=False))
@settings(max_examples=max(60, settings().max_examples // 5))
@given(data=st.data())
def test_column_under_any_choices(column, name, data):
    try_cell(column, data.draw(any_cell(column, name)))
