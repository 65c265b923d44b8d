"""Hypothesis strategies for everything a law is about: keys, trees, networks, posteriors, states.

Few things are drawn one by one (shapes, seeds, magnitudes); the numbers of a tensor come from a
keyed generator, so that a draw is fast and a failing example shrinks to few, small, plain
tensors. Among the examples are the values that break code: zeros, tensors whose entries lie
orders of magnitude apart, scalar and empty leaves, members of one, variances next to nothing.
How far magnitudes go is an argument, `scales`, everywhere.

    >>> from hypothesis import given
    >>> import funcbayes as fb
    >>> from funcbayes.testing import check_key_determinism, strategies
    >>> @given(posterior=strategies.posteriors(), key=strategies.keys())
    ... def test_sample_i_is_a_function_of_key_and_i(posterior, key):
    ...     check_key_determinism(posterior, key=key)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcbayes.core import likelihoods, random, trees
from funcbayes.core.random import Key
from funcbayes.core.trees import TensorTree
from funcbayes.curvature import Block, Curvature, DiagonalBlock
from funcbayes.extras import needs_extra
from funcbayes.inference import swag
from funcbayes.inference.ensemble import EnsembleState
from funcbayes.inference.laplace import LaplaceState
from funcbayes.inference.vi import ViState
from funcbayes.posteriors import Diagonal, DropoutMasks, Empirical, LowRank, mixture
from funcbayes.testing import networks as network_kinds

with needs_extra("testing"):
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy

FLOATS = (torch.float32, torch.float64)
"""The dtypes that are drawn unless others are asked for."""

CONTAINERS = ("dict", "list", "tuple")
"""What `parameter_trees` nests, unless asked otherwise; "namedtuple" is the fourth."""

FAMILIES = ("diagonal", "low_rank", "empirical", "mixture", "dropout_masks")
"""The posteriors that `posteriors` draws."""

LIKELIHOODS = (
    "gaussian",
    "heteroscedastic",
    "bernoulli",
    "categorical",
    "poisson",
    "negative_log_likelihood",
)
"""The likelihoods that `likelihoods_with_targets` draws."""

METHODS = ("swag", "laplace", "vi", "ensemble")
"""The methods whose states `states` draws."""

Scales = tuple[float, float]
"""The smallest and the largest magnitude that tensors are drawn with."""

_SEEDS = st.integers(0, 2**32 - 1)
# Not hypothesis' own type for it, a protocol that run-time type checkers cannot check.
DrawFn = Callable[[SearchStrategy[Any]], Any]
# A tree has this many numbers at least: with none at all there is nothing to sample.
_LEAST_ELEMENTS = 1


class Pair(NamedTuple):
    """A container for trees, of a type that the library does not know."""

    first: TensorTree
    second: TensorTree


class NetworkCase(NamedTuple):
    """A network with a batch.

    Attributes:
        kind: one of `funcbayes.testing.networks.NETWORKS`.
        net: the network, in evaluation mode.
        inputs: tree with leaves `[batch, …]`.
        targets: class labels `[batch]`, int64.
    """

    kind: str
    net: nn.Module
    inputs: Any
    targets: Tensor


class LikelihoodCase(NamedTuple):
    """A likelihood with outputs and targets that it takes.

    Attributes:
        likelihood: one of `funcbayes.likelihoods`.
        outputs: raw outputs of a network, `[batch, *out]`.
        targets: what `likelihood.check` accepts beside them.
    """

    likelihood: likelihoods.Likelihood
    outputs: Tensor
    targets: Tensor


def keys(*, derived: bool = True) -> SearchStrategy[Key]:
    """Keys; the simplest is `funcbayes.random.key(0)`.

    Args:
        derived: whether keys that were split off or folded are among them.
    """
    seeds = st.integers(0, 2**128 - 1).map(random.key)
    return _derived(seeds) if derived else seeds


@st.composite
def _derived(draw: DrawFn, parents: SearchStrategy[Key]) -> Key:
    key = draw(parents)
    for number in draw(st.lists(st.integers(0, 2**64 - 1), max_size=2)):
        # Split for small numbers, so that both ways of deriving are drawn.
        key = random.split(key, number + 1)[-1] if number < 4 else random.fold_in(key, number)
    return key


def tensors(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    scales: Scales = (1e-3, 1e3),
    positive: bool = False,
    zeros: bool = True,
) -> SearchStrategy[Tensor]:
    """Tensors of one shape; the simplest is full of ones (or of the scale next to 1).

    Drawn are a magnitude, which is a power of ten in `scales`, and one of: the magnitude in
    all entries; normal numbers times it; normal numbers each of a magnitude of its own; zeros
    in all entries, or in about half of them.

    Args:
        shape: of the tensor; () for a scalar, and axes of length 0 are allowed.
        dtype: floating point.
        scales: the smallest and the largest magnitude. Numbers are at most 4 times the
            largest, and where `positive` at least a tenth of the smallest.
        positive: whether entries are positive, apart from zeros.
        zeros: whether tensors with zeros are among them.

    Raises:
        ValueError: `scales` is not an increasing pair of positive numbers that `dtype` holds.
    """
    return _tensors(tuple(shape), dtype, _magnitudes(scales, dtype), positive, zeros)


@st.composite
def _tensors(
    draw: DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    magnitudes: list[float],
    positive: bool,  # noqa: FBT001 (composite strategies take positions)
    zeros: bool,  # noqa: FBT001
) -> Tensor:
    ways = ["same", "normal", "spread"] + (["zeros", "half"] if zeros else [])
    way, scale = draw(st.sampled_from(ways)), draw(st.sampled_from(magnitudes))
    if way == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if way == "same":
        return torch.full(shape, scale, dtype=dtype)
    number, other = random.split(draw(_SEEDS))
    values = random.normal(number, shape, dtype=torch.float64).clamp(-4, 4)
    if positive:
        values = values.abs().clamp(min=0.1)
    if way == "spread":
        which = random.randint(other, 0, len(magnitudes), shape)
        values = values * torch.tensor(magnitudes, dtype=torch.float64)[which]
    else:
        values = values * scale
    if way == "half":
        values = values * random.bernoulli(other, 0.5, shape)
    return values.to(dtype)


def parameter_trees(
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    max_leaves: int = 4,
    max_dims: int = 3,
    max_side: int = 3,
    max_elements: int = 40,
    scales: Scales = (1e-3, 1e3),
    containers: Sequence[str] = CONTAINERS,
    empty: bool = True,
    mixed_dtypes: bool = False,
) -> SearchStrategy[TensorTree]:
    """Trees of floating-point tensors; the simplest is one scalar.

    Args:
        dtypes: of the leaves.
        max_leaves: most leaves.
        max_dims: most axes of a leaf; scalars are always among them.
        max_side: longest axis.
        max_elements: most numbers in all leaves; at least one is there.
        scales: magnitudes of the leaves, as for `tensors`; leaves of zeros are among them.
        containers: which of "dict", "list", "tuple", "namedtuple" (`Pair`) are nested; none for
            bare tensors.
        empty: whether leaves without entries are among them, beside others.
        mixed_dtypes: whether leaves of one tree may differ in dtype.

    Raises:
        ValueError: there is no such container.
    """
    _check_names(containers, (*CONTAINERS, "namedtuple"), "containers")
    sides = st.integers(0 if empty else 1, max_side)
    # On the meta device a tensor is a shape that trees take for a leaf.
    shapes = st.lists(sides, max_size=max_dims).map(lambda s: torch.empty(s, device="meta"))

    def nest(parts: SearchStrategy[Any]) -> SearchStrategy[Any]:
        lists = st.lists(parts, min_size=1, max_size=max_leaves)
        names = st.sampled_from(["weight", "bias", "scale", "a.b", "0"])
        ways: dict[str, SearchStrategy[Any]] = {
            "dict": st.dictionaries(names, parts, min_size=1, max_size=max_leaves),
            "list": lists,
            "tuple": lists.map(tuple),
            "namedtuple": st.builds(Pair, parts, parts),
        }
        return st.one_of(*(ways[name] for name in containers))

    skeletons = st.recursive(shapes, nest, max_leaves=max_leaves) if containers else shapes

    def fits(skeleton: Any) -> bool:
        sizes = [leaf.numel() for leaf in trees.leaves(skeleton)]
        return len(sizes) <= max_leaves and _LEAST_ELEMENTS <= sum(sizes) <= max_elements

    return _filled(skeletons.filter(fits), tuple(dtypes), scales, mixed_dtypes)


@st.composite
def _filled(
    draw: DrawFn,
    skeletons: SearchStrategy[Any],
    dtypes: tuple[torch.dtype, ...],
    scales: Scales,
    mixed_dtypes: bool,  # noqa: FBT001
) -> TensorTree:
    skeleton = draw(skeletons)
    several = st.sampled_from(dtypes)
    one = st.just(draw(several))
    return trees.tree_map(
        lambda empty: draw(
            tensors(empty.shape, dtype=draw(several if mixed_dtypes else one), scales=scales)
        ),
        skeleton,
    )


def networks(
    *,
    kinds: Sequence[str] = tuple(network_kinds.NETWORKS),
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> SearchStrategy[nn.Module]:
    """Small networks with random weights, in evaluation mode; the simplest is the first kind.

    Args:
        kinds: of `funcbayes.testing.networks.NETWORKS`; `LOGIT_KINDS` there are those that a
            likelihood applies to.
        dtypes: of parameters and buffers.
    """
    return networks_with_batches(kinds=kinds, dtypes=dtypes, max_batch=1).map(lambda c: c.net)


def batches(
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    min_batch: int = 1,
    max_batch: int = 5,
    contiguous: bool = True,
) -> SearchStrategy[tuple[Any, Tensor]]:
    """Inputs and class labels for a network of one kind.

    Args:
        kind: one of `funcbayes.testing.networks.NETWORKS`.
        dtype: of floating-point inputs.
        min_batch: fewest rows; 0 makes empty batches too.
        max_batch: most rows.
        contiguous: False: inputs that do not lie in order in memory are among them.
    """
    return _batches(kind, dtype, min_batch, max_batch, contiguous)


@st.composite
def _batches(
    draw: DrawFn,
    kind: str,
    dtype: torch.dtype,
    min_batch: int,
    max_batch: int,
    contiguous: bool,  # noqa: FBT001
) -> tuple[Any, Tensor]:
    num, seed = draw(st.integers(min_batch, max_batch)), draw(_SEEDS)
    x = network_kinds.inputs(kind, num, seed=seed, dtype=dtype)
    if not contiguous and draw(st.booleans()):
        x = network_kinds.strided(x)
    return x, network_kinds.targets(num, seed=seed + 1)


def networks_with_batches(
    *,
    kinds: Sequence[str] = tuple(network_kinds.NETWORKS),
    dtypes: Sequence[torch.dtype] = FLOATS,
    min_batch: int = 1,
    max_batch: int = 5,
    contiguous: bool = True,
) -> SearchStrategy[NetworkCase]:
    """Networks of any kind with inputs and class labels that fit them.

    Args:
        kinds: as for `networks`.
        dtypes: of parameters, buffers and floating-point inputs.
        min_batch: as for `batches`.
        max_batch: as for `batches`.
        contiguous: as for `batches`.
    """
    return _network_cases(tuple(kinds), tuple(dtypes), min_batch, max_batch, contiguous)


@st.composite
def _network_cases(
    draw: DrawFn,
    kinds: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    min_batch: int,
    max_batch: int,
    contiguous: bool,  # noqa: FBT001
) -> NetworkCase:
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    net = network_kinds.make(kind, seed=draw(_SEEDS), dtype=dtype)
    return NetworkCase(kind, net, *draw(_batches(kind, dtype, min_batch, max_batch, contiguous)))


def likelihoods_with_targets(
    *,
    kinds: Sequence[str] = LIKELIHOODS,
    dtypes: Sequence[torch.dtype] = FLOATS,
    min_batch: int = 1,
    max_batch: int = 4,
    scales: Scales = (1e-3, 1e2),
) -> SearchStrategy[LikelihoodCase]:
    """Likelihoods with every option, outputs of every shape, and targets that they take.

    Args:
        kinds: which of `LIKELIHOODS`.
        dtypes: of the outputs.
        min_batch: fewest data.
        max_batch: most data.
        scales: magnitudes of the outputs, as for `tensors`; the log variances of
            "heteroscedastic" and the log rates of "poisson" are at most 20 whatever this says,
            as exp of more overflows in places where that is right.

    Raises:
        ValueError: there is no such kind.
    """
    _check_names(kinds, LIKELIHOODS, "kinds")

    sizes = st.integers(min_batch, max_batch)
    return _likelihood_cases(tuple(kinds), tuple(dtypes), sizes, scales)


@st.composite
def _likelihood_cases(
    draw: DrawFn,
    kinds: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    sizes: SearchStrategy[int],
    scales: Scales,
) -> LikelihoodCase:
    make, dtype = _LIKELIHOODS[draw(st.sampled_from(kinds))], draw(st.sampled_from(dtypes))
    num, key = draw(sizes), random.key(draw(_SEEDS))
    return make(draw, lambda *out: draw(tensors((num, *out), dtype=dtype, scales=scales)), key)


def posteriors(
    params: TensorTree | SearchStrategy[TensorTree] | None = None,
    *,
    families: Sequence[str] = FAMILIES,
    scales: Scales = (1e-3, 1e1),
    zero_std: bool = False,
    constants: Mapping[str, Tensor] | None = None,
    max_members: int = 4,
) -> SearchStrategy[Any]:
    """Posteriors over a parameter tree, centred near it, all with a positive definite covariance.

    Args:
        params: the tree, such as `model.params`, or a strategy for it. None: any, by
            `parameter_trees(scales=(1e-3, 1e1))`, so that deviations don't round away.
        families: which of `FAMILIES`. A mixture has components of the other families, without
            dropout masks; "mixture" alone has diagonal and low-rank ones.
        scales: magnitudes of standard deviations, of the rows of low-rank factors, and of the
            distance between members.
        zero_std: whether standard deviations of 0, which hold a parameter fixed, are among
            them, alone and beside others; the covariance is then no longer definite.
        constants: constants of the model by name; the members of "empirical" then have copies
            of their own, the floating-point ones scaled.
        max_members: most members of "empirical" and components of "mixture".

    Raises:
        ValueError: there is no such family.
    """
    _check_names(families, FAMILIES, "families")
    if params is None:
        params = parameter_trees(scales=(1e-3, 1e1))
    centres = params if isinstance(params, SearchStrategy) else st.just(params)
    options = _Options(scales, zero_std, dict(constants or {}), max_members)
    return _posteriors(centres, tuple(families), options)


class _Options(NamedTuple):
    scales: Scales
    zero_std: bool
    constants: dict[str, Tensor]
    max_members: int


@st.composite
def _posteriors(
    draw: DrawFn,
    centres: SearchStrategy[TensorTree],
    families: tuple[str, ...],
    options: _Options,
) -> Any:
    centre = trees.clone(draw(centres))
    family = draw(st.sampled_from(families))
    if family == "dropout_masks":
        rate = draw(st.none() | st.sampled_from([0.5, 0.1, 0.9]))
        return DropoutMasks(centre, rate, draw(st.sampled_from(["row", "batch"])))
    if family != "mixture":
        return _over_parameters(draw, centre, family, options)
    within = [f for f in families if f in ("diagonal", "low_rank", "empirical")]
    groups = [within or ["diagonal", "low_rank"]]
    if options.constants:  # they are sampled for all components or for none
        groups = [[f for f in groups[0] if (f == "empirical") is own] for own in (False, True)]
    of: list[str] = draw(st.sampled_from([group for group in groups if group]))
    chosen = draw(st.lists(st.sampled_from(of), min_size=1, max_size=options.max_members))
    components = [_over_parameters(draw, centre, name, options) for name in chosen]
    return mixture(components, [draw(st.integers(1, 9)) for _ in chosen])


def _over_parameters(draw: DrawFn, centre: TensorTree, family: str, options: _Options) -> Any:
    scales = options.scales
    if family == "empirical":
        num = draw(st.integers(1, options.max_members))
        members = trees.tree_map(torch.add, _like(draw, centre, scales, num), centre)
        return Empirical(members, _stacked_constants(options.constants, num))
    # Components of a mixture share no memory.
    mean = trees.clone(centre)
    std = _like(draw, centre, scales, positive=True, zeros=options.zero_std)
    if family == "diagonal":
        return Diagonal(mean, std)
    return LowRank(mean, std, _like(draw, centre, scales, draw(st.integers(1, 3))))


def _like(
    draw: DrawFn,
    tree: TensorTree,
    scales: Scales,
    *batch: int,
    positive: bool = False,
    zeros: bool = True,
) -> TensorTree:
    """A tree like another, its leaves `[*batch, *shape]`."""
    return trees.tree_map(
        lambda p: draw(
            tensors(
                (*batch, *p.shape), dtype=p.dtype, scales=scales, positive=positive, zeros=zeros
            )
        ),
        tree,
    )


def states(
    params: TensorTree | SearchStrategy[TensorTree] | None = None,
    *,
    methods: Sequence[str] = METHODS,
    scales: Scales = (1e-3, 1e1),
    constants: Mapping[str, Tensor] | None = None,
) -> SearchStrategy[Any]:
    """States as a fit leaves them: with data, without gradients, ready for `posterior`.

    Args:
        params: as for `posteriors`.
        methods: which of `METHODS`.
        scales: magnitudes of the spread of iterates and members, of curvatures and of standard
            deviations.
        constants: constants of the model by name, of which the members of "ensemble" have copies
            of their own, the floating-point ones scaled.

    Raises:
        ValueError: there is no such method.
    """
    _check_names(methods, METHODS, "methods")
    if params is None:
        params = parameter_trees(scales=(1e-3, 1e1))
    centres = params if isinstance(params, SearchStrategy) else st.just(params)

    return _states(centres, tuple(methods), scales, dict(constants or {}))


@st.composite
def _states(
    draw: DrawFn,
    centres: SearchStrategy[TensorTree],
    methods: tuple[str, ...],
    scales: Scales,
    constants: dict[str, Tensor],
) -> Any:
    centre = trees.clone(draw(centres))
    method = draw(st.sampled_from(methods))
    if method == "swag":
        state = swag.init(centre, max_rank=draw(st.sampled_from([0, 2, 3])))
        for _ in range(draw(st.integers(1, 4))):
            step = _like(draw, centre, scales)
            state = swag.update(state, trees.tree_map(torch.add, centre, step))
        return state
    if method == "ensemble":
        num = draw(st.integers(1, 4))
        members = trees.tree_map(torch.add, _like(draw, centre, scales, num), centre)
        return EnsembleState(members, _stacked_constants(constants, num))
    if method == "vi":
        std = _like(draw, centre, scales, positive=True, zeros=False)
        # The inverse of softplus, in the form that neither overflows nor rounds to −∞.
        return ViState(centre, trees.tree_map(lambda s: s + (-(-s).expm1()).log(), std))
    wide = trees.tree_map(lambda p: p.to(torch.promote_types(p.dtype, torch.float32)), centre)
    loss = draw(tensors((), dtype=trees.leaves(wide)[0].dtype, scales=(1e-3, 1e4)))
    num_data = torch.tensor(draw(st.integers(1, 10_000)))
    diagonal = trees.leaves(_like(draw, wide, scales, positive=True))
    blocks: dict[tuple[str, ...], Block] = {
        (name,): DiagonalBlock(h) for name, h in zip(trees.names(centre), diagonal, strict=True)
    }
    return LaplaceState(centre, Curvature(blocks), num_data, loss, ())


def _stacked_constants(constants: Mapping[str, Tensor], num: int) -> dict[str, Tensor]:
    """A copy for each member; scaled, so that mixed-up members show."""
    factors = [1 + i / 8 for i in range(num)]
    return {
        name: torch.stack([leaf * f if leaf.is_floating_point() else leaf for f in factors])
        for name, leaf in constants.items()
    }


# -- likelihoods ---------------------------------------------------------------------------

_Outputs = Callable[..., Tensor]


def _temperature(draw: DrawFn) -> dict[str, float]:
    return {"temperature": draw(st.sampled_from([1.0, 0.1, 10.0]))}


def _categorical(draw: DrawFn, outputs: _Outputs, key: Key) -> LikelihoodCase:
    classes = draw(st.integers(2, 4))
    # Classes last, beside positions, or before them as images have them.
    positions = draw(st.lists(st.integers(1, 2), max_size=2))
    class_dim = draw(st.sampled_from([-1, 1]))
    out = (classes, *positions) if class_dim == 1 else (*positions, classes)
    f = outputs(*out)
    targets = random.randint(key, 0, classes, (len(f), *positions))
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    likelihood = likelihoods.Categorical(class_dim=class_dim, **_temperature(draw))
    return LikelihoodCase(likelihood, f, targets.to(dtype))


def _bernoulli(draw: DrawFn, outputs: _Outputs, key: Key) -> LikelihoodCase:
    f = outputs(*draw(_OUT))
    targets = random.bernoulli(key, 0.5, f.shape)
    dtype = draw(st.sampled_from([f.dtype, torch.bool, torch.int64]))
    likelihood = likelihoods.Bernoulli(**_temperature(draw))
    return LikelihoodCase(likelihood, f, _perhaps_squeezed(draw, targets.to(dtype)))


def _gaussian(draw: DrawFn, outputs: _Outputs, key: Key) -> LikelihoodCase:
    f = outputs(*draw(_OUT))
    noise_std = draw(st.sampled_from([1.0, 0.01, 100.0]))
    if f.dim() > 1 and draw(st.booleans()):
        noise_std = torch.linspace(noise_std / 2, noise_std, f.shape[-1], dtype=f.dtype)
    targets = f + random.normal(key, f.shape, dtype=f.dtype)
    likelihood = likelihoods.Gaussian(noise_std=noise_std)
    return LikelihoodCase(likelihood, f, _perhaps_squeezed(draw, targets))


def _heteroscedastic(draw: DrawFn, outputs: _Outputs, key: Key) -> LikelihoodCase:
    *positions, size = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    mean, log_var = outputs(*positions, size), outputs(*positions, size).clamp(-20, 20)
    targets = mean + random.normal(key, mean.shape, dtype=mean.dtype)
    f = torch.cat([mean, log_var], -1)
    targets = _perhaps_squeezed(draw, targets)
    return LikelihoodCase(likelihoods.HeteroscedasticGaussian(), f, targets)


def _perhaps_squeezed(draw: DrawFn, targets: Tensor) -> Tensor:
    """Without a last axis of length one, which may be missing."""
    if targets.dim() > 1 and targets.shape[-1] == 1 and draw(st.booleans()):
        return targets.squeeze(-1)
    return targets


def _poisson(draw: DrawFn, outputs: _Outputs, key: Key) -> LikelihoodCase:
    log_rates = outputs(*draw(_OUT)).clamp(-20, 20)
    dtype = draw(st.sampled_from([torch.int64, log_rates.dtype]))
    # Counts from 0 to 9; a float dtype holds them exactly.
    targets = random.randint(key, 0, 10, tuple(log_rates.shape)).to(dtype)
    return LikelihoodCase(likelihoods.Poisson(), log_rates, _perhaps_squeezed(draw, targets))


def _negative(draw: DrawFn, outputs: _Outputs, key: Key) -> LikelihoodCase:
    values = outputs(*draw(_OUT))
    targets = random.normal(key, tuple(values.shape), dtype=values.dtype)
    fn = draw(st.sampled_from([_squared, _pseudo_huber]))
    predictive = draw(st.sampled_from([None, likelihoods.Gaussian(noise_std=1.0)]))
    return LikelihoodCase(likelihoods.NegativeLogLikelihood(fn, predictive), values, targets)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (targets - outputs).square().unsqueeze(-1).flatten(1).sum(1)


def _pseudo_huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((targets - outputs).square() + 1).sqrt().unsqueeze(-1).flatten(1).sum(1)


_LIKELIHOODS: dict[str, Callable[[DrawFn, _Outputs, Key], LikelihoodCase]] = {
    "gaussian": _gaussian,
    "heteroscedastic": _heteroscedastic,
    "bernoulli": _bernoulli,
    "categorical": _categorical,
    "poisson": _poisson,
    "negative_log_likelihood": _negative,
}
# The outputs of one datum.
_OUT = st.lists(st.integers(1, 3), max_size=2)


# -- options -------------------------------------------------------------------------------


def _magnitudes(scales: Scales, dtype: torch.dtype) -> list[float]:
    """Both ends and the powers of ten between them, the one next to 1 first."""
    low, high = scales
    if not 0 < low <= high < math.inf:
        raise ValueError(
            f"`scales` is {scales}, expected the smallest and the largest magnitude, both positive"
        )
    info = torch.finfo(dtype)
    if low / 10 < info.tiny or high * 4 > info.max:
        raise ValueError(
            f"`scales` is {scales}, expected magnitudes from {10 * info.tiny:.1g} to"
            f" {info.max / 4:.1g}, which {dtype} holds"
        )
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    powers = {10.0**e for e in range(first, last + 1) if low <= 10.0**e <= high}
    return sorted({low, high} | powers, key=lambda scale: abs(math.log10(scale)))


def _check_names(names: Sequence[str], known: Sequence[str], argument: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"`{argument}` has {unknown}, expected some of {', '.join(known)}")
