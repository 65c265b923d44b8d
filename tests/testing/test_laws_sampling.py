"""The laws on draws, moments and densities: sound posteriors pass, planted bugs are named."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcbayes as fb
from funcbayes.core import random, trees
from funcbayes.posteriors import Diagonal, Draws, DropoutMasks, Empirical, LowRank, mixture
from funcbayes.testing import strategies
from funcbayes.testing.laws import (
    check_key_determinism,
    check_log_prob_matches_samples,
    check_sampling_moments,
)
from funcbayes.testing.laws.moments import widened
from funcbayes.testing.laws.snapshots import global_generators, same_value

# beartype, the shape hook's checker, draws from Python's generator to check containers.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

FEW = settings(max_examples=max(3, settings().max_examples // 8))
SHAPES = {"w": (3, 2), "b": (2,), "s": ()}
WIDE_FLOATS = (torch.float32, torch.float64)
ALL_FLOATS = (*WIDE_FLOATS, torch.bfloat16, torch.float16)


def tree(seed, *batch, positive=False, dtype=torch.float32):
    key = random.key(seed)
    draws = [random.normal(random.fold_in(key, i), (*batch, *s)) for i, s in enumerate(_shapes())]
    return {
        name: (d.abs() + 0.2 if positive else d).to(dtype)
        for name, d in zip(SHAPES, draws, strict=True)
    }


def _shapes():
    return SHAPES.values()


def sound(dtype=torch.float32):
    mean, std = tree(0, dtype=dtype), tree(1, positive=True, dtype=dtype)
    diagonal, low_rank = Diagonal(mean, std), LowRank(mean, std, tree(2, 3, dtype=dtype))
    return {
        "diagonal": diagonal,
        "low_rank": low_rank,
        "empirical": Empirical(tree(3, 3, dtype=dtype), {"c": torch.arange(3.0)}),
        "mixture": mixture([diagonal, low_rank], [1, 3]),
        "mixture of members": mixture(
            [Empirical(tree(4, 3, dtype=dtype), {}), Empirical(tree(5, 2, dtype=dtype), {})]
        ),
        "masks": DropoutMasks(mean, None, "row"),
    }


SOUND = sound()
families = pytest.mark.parametrize("family", SOUND)


class Normal:
    """A posterior of a user's own: independent normals, in one class without the library's."""

    def __init__(self, mean=None, std=None):
        self.mean = tree(0) if mean is None else mean
        self.std = tree(1, positive=True) if std is None else std

    @property
    def variance(self):
        return trees.tree_map(torch.square, self.std)

    @property
    def draw_size(self):
        return trees.num_elements(self.mean)

    def noise(self, key, start, stop):
        return random.normal_rows(key, start, stop, self.draw_size)

    def transform(self, mean, std, z):
        return mean + std * z

    def sample(self, key, num_samples):
        return self.draw(random.as_key(key), 0, num_samples).params

    def draw(self, key, start, stop, out=None):
        rows = self.noise(key, start, stop)
        if out is not None:
            rows = out.copy_(rows)
        z = trees.unravel(rows, self.mean, batch_dims=1)
        return Draws(trees.tree_map(self.transform, self.mean, self.std, z), None, None)

    def log_prob(self, params):
        def leaf(x, mean, std):
            return torch.distributions.Normal(mean, std).log_prob(x).sum()

        return sum(trees.leaves(trees.tree_map(leaf, params, self.mean, self.std)))


class OnlySample:
    """Just `sample`."""

    def sample(self, key, num_samples):
        return Normal().sample(key, num_samples)


# -- sound posteriors ----------------------------------------------------------------------


@families
@pytest.mark.parametrize("key", [2**100, random.fold_in(5, 7), np.int64(4)])
def test_sound_posteriors_are_deterministic(family, key):
    check_key_determinism(SOUND[family], key=key)


@given(
    posterior=strategies.posteriors(
        strategies.parameter_trees(dtypes=ALL_FLOATS, scales=(1e-3, 1e1)),
        families=("diagonal", "low_rank", "dropout_masks"),
        zero_std=True,
    ),
    key=strategies.keys(),
    num=st.integers(2, 9),
)
def test_any_sound_posterior_is_deterministic(posterior, key, num):
    check_key_determinism(posterior, key=key, num_samples=num)


@families
def test_sound_posteriors_have_their_moments(family):
    # A mixture draws its samples one by one.
    check_sampling_moments(SOUND[family], num_samples=300 if "mixture" in family else 2000)


@FEW
@given(
    posterior=strategies.posteriors(
        strategies.parameter_trees(dtypes=ALL_FLOATS, scales=(1e-3, 1e1)),
        families=("diagonal", "low_rank"),
        zero_std=True,
    )
)
def test_any_sound_posterior_has_its_moments(posterior):
    check_sampling_moments(posterior, num_samples=1000)


@pytest.mark.parametrize(
    "family", ["diagonal", "low_rank", pytest.param("mixture", marks=pytest.mark.slow)]
)
def test_sound_densities_match(family):
    check_log_prob_matches_samples(SOUND[family], num_samples=1000 if family == "mixture" else 3000)


def test_a_posterior_of_a_users_own_passes():
    check_key_determinism(Normal())
    check_key_determinism(OnlySample())
    check_sampling_moments(Normal())
    check_log_prob_matches_samples(Normal(), num_samples=5000)


def test_what_a_law_needs_and_a_posterior_lacks_is_a_type_error():
    with pytest.raises(TypeError, match=r"OnlySample without `mean` and `variance`, which check_s"):
        check_sampling_moments(OnlySample())
    with pytest.raises(TypeError, match=r"an Empirical|is a Empirical without `log_prob`, which"):
        check_log_prob_matches_samples(SOUND["empirical"])
    with pytest.raises(TypeError, match=r"`posterior` is a SwagState without `sample`"):
        check_key_determinism(fb.swag.init(tree(0)))


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match=r"`num_samples` is 1, expected at least 2"):
        check_key_determinism(Normal(), num_samples=1)
    with pytest.raises(ValueError, match=r"`num_samples` is 99, expected at least 100"):
        check_sampling_moments(Normal(), num_samples=99)
    with pytest.raises(ValueError, match=r"`num_samples` is 999, expected at least 1000"):
        check_log_prob_matches_samples(Normal(), num_samples=999)


def test_the_laws_leave_the_global_generators():
    before = global_generators()
    check_key_determinism(OnlySample())
    check_log_prob_matches_samples(Normal(), num_samples=1000)
    after = global_generators()
    assert all(same_value(before[name], after[name]) for name in before)


# -- planted bugs in the keys --------------------------------------------------------------


class GlobalTorch(Normal):
    def noise(self, key, start, stop):
        return torch.randn(stop - start, self.draw_size)


class GlobalNumpy(Normal):
    def noise(self, key, start, stop):
        return torch.from_numpy(np.random.randn(stop - start, self.draw_size)).float()  # noqa: NPY002


class GlobalSeed(Normal):
    def noise(self, key, start, stop):
        return super().noise(torch.initial_seed(), start, stop)


class SharedGenerator(Normal):
    generator = torch.Generator()

    def noise(self, key, start, stop):
        return torch.randn(stop - start, self.draw_size, generator=self.generator)


class InPlace(Normal):
    def transform(self, mean, std, z):
        return mean.add_(0.5) + std * z


class OneGenerator(Normal):
    """Draws by the key, but all rows of a chunk from one stream."""

    def noise(self, key, start, stop):
        # Transposed, so that the number of rows matters.
        return random.normal(key, (self.draw_size, stop - start)).T.contiguous()


class ChunkSeed(Normal):
    """Rows are counted from the start of the chunk."""

    def noise(self, key, start, stop):
        return super().noise(key, 0, stop - start)


class CentredChunk(Normal):
    """A sample depends on how many there are."""

    def noise(self, key, start, stop):
        rows = super().noise(key, start, stop)
        return rows - rows.mean(0)


class IntegersOnly(Normal):
    def sample(self, key, num_samples):
        generator = torch.Generator().manual_seed(key)
        z = torch.randn(num_samples, self.draw_size, generator=generator)
        z = trees.unravel(z, self.mean, batch_dims=1)
        return trees.tree_map(self.transform, self.mean, self.std, z)


class IntegersDiffer(Normal):
    def sample(self, key, num_samples):
        return super().sample(random.fold_in(key, 0) if isinstance(key, int) else key, num_samples)


class NoKey(Normal):
    def noise(self, key, start, stop):
        return super().noise(0, start, stop)


class NoPath(Normal):
    def noise(self, key, start, stop):
        return super().noise(key.entropy, start, stop)


class ReadsBuffer(Normal):
    def draw(self, key, start, stop, out=None):
        if out is not None:
            out[:, 0].mul_(0)
            out[:, 1:] = self.noise(key, start, stop)[:, 1:]
            z = trees.unravel(out, self.mean, batch_dims=1)
            return Draws(trees.tree_map(self.transform, self.mean, self.std, z), None, None)
        return super().draw(key, start, stop)


class OneMemory(Normal):
    memory = {}  # noqa: RUF012

    def sample(self, key, num_samples):
        samples = super().sample(key, num_samples)
        kept = self.memory.setdefault(num_samples, samples)
        trees.tree_map(torch.Tensor.copy_, kept, samples)
        return kept


class NotDraws(Normal):
    def sample(self, key, num_samples):
        return super().draw(random.as_key(key), 0, num_samples).params

    def draw(self, key, start, stop, out=None):
        return super().draw(key, start, stop, out).params


class NoAxis(Normal):
    def sample(self, key, num_samples):
        return trees.index(super().sample(key, num_samples), 0)


class ConstantsOfTheChunk(Normal):
    def draw(self, key, start, stop, out=None):
        drawn = super().draw(key, start, stop, out)
        return drawn._replace(constants={"c": torch.arange(stop - start)})


class MaskOfTheChunk(DropoutMasks):
    def draw(self, key, start, stop, out=None):
        drawn = super().draw(key, start, stop, out)
        keys = [random.fold_in(key, i) for i in range(stop - start)]
        return drawn._replace(masks=drawn.masks._replace(keys=keys))


KEY_BUGS = {
    GlobalTorch: r"`sample` moved torch's global generator.*drawn without a generator",
    GlobalNumpy: r"`sample` moved NumPy's global generator",
    GlobalSeed: r"two calls of `sample` with one key, leaf \['w'\]: sample \d, entry \(\d, \d\):"
    r" .*Likely cause: a global generator is read",
    SharedGenerator: r"two calls of `sample` with one key.*cause: the posterior holds a generator",
    InPlace: r"two calls of `sample` with one key.*another state that a call moves",
    OneGenerator: r"`sample\(key, 1\)` against the first rows of `sample\(key, 8\)`, leaf"
    r" \['w'\]: sample 0, entry .* one generator serves several samples",
    ChunkSeed: r"`draw\(key, 1, 2\)` against rows 1 to 1 of `sample\(key, 8\)`.*sample 0",
    CentredChunk: r"`sample\(key, 1\)` against the first rows",
    IntegersOnly: r"`sample\(Key\(entropy=0, path=\(\)\), 8\)` raised RuntimeError.*as_key",
    IntegersDiffer: r"`sample\(0, …\)` against `sample\(funcbayes.random.key\(…\), …\)`",
    NoKey: r"8 other seeds gave the samples of Key.*is ignored",
    NoPath: r"8 keys derived by fold_in gave the samples.*`path`, is ignored",
    ReadsBuffer: r"`draw\(key, 0, 1, buffer\)`.*nan came.*read before it is written",
    OneMemory: r"samples that were taken, after more were.*return fresh tensors",
    NotDraws: r"`draw` returned a dict, expected a funcbayes.posteriors.Draws",
    NoAxis: r"`sample\(key, 8\)`, leaf \['w'\]: \(3, 2\), expected shape \(8, …\)",
    ConstantsOfTheChunk: r"`draw\(key, 1, 2\)`, constants and masks, .*leaf \[0\]\['c'\]: sample 0",
}


@pytest.mark.parametrize("bug", KEY_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_the_keys_is_named(bug):
    with (
        torch.random.fork_rng(),
        pytest.raises(AssertionError, match="^check_key_determinism: " + KEY_BUGS[bug]),
    ):
        check_key_determinism(bug())


def test_masks_that_depend_on_the_chunk_are_named():
    with pytest.raises(AssertionError, match=r"`draw\(key, 1, 2\)`, constants and masks, "):
        check_key_determinism(MaskOfTheChunk(tree(0), None, "row"))


def test_samples_a_thousandth_of_the_mean_apart_are_told_apart():
    narrow = {"w": torch.full((4,), 1e-4)}
    check_key_determinism(Normal({"w": torch.ones(4)}, narrow))
    with pytest.raises(AssertionError, match=r"`draw\(key, 1, 2\)` against rows 1 to 1"):
        check_key_determinism(ChunkSeed({"w": torch.ones(4)}, narrow))


def test_what_is_not_random_needs_no_other_samples():
    still = trees.zeros_like(tree(0))
    check_key_determinism(NoKey(tree(0), still))
    check_key_determinism(Empirical(tree(0, 1), {}))
    check_key_determinism(Empirical(tree(0, 2), {}))


# -- planted bugs in the moments -----------------------------------------------------------


class StdScaled(Normal):
    factor = 1.1

    def transform(self, mean, std, z):
        return mean + self.factor * std * z


class SmallerEverywhere(StdScaled):
    factor = 0.98


class VarianceForStd(Normal):
    def transform(self, mean, std, z):
        return mean + std.square() * z


class Shifted(Normal):
    def transform(self, mean, std, z):
        return mean + std * (z + 0.1)


class OneEntry(Normal):
    def transform(self, mean, std, z):
        scale = torch.ones_like(std)
        if std.dim() == 2:
            scale[2, 1] = 0.9
        return mean + std * z * scale


class SameEachTime(Normal):
    def noise(self, key, start, stop):
        return super().noise(key, 0, 1).expand(stop - start, -1)


class NoisyWhereFixed(Normal):
    def transform(self, mean, std, z):
        return mean + std.clamp_min(1e-3) * z


class Infinite(Normal):
    def transform(self, mean, std, z):
        return (mean + std * z).masked_fill(z > 3, math.inf)


MOMENT_BUGS = {
    StdScaled: r"leaf \['\w'\], averaged over its \d entries: the variance of samples is 1\.\d+ of"
    r" the stated one \(their standard deviation 1\.\d+ of it\), .* standard errors off over 4000",
    VarianceForStd: r"leaf .* the variance .*a standard deviation taken for a variance",
    Shifted: r"leaf .* stated standard deviations away from `mean`",
    OneEntry: r"leaf \['w'\], entry \(2, 1\): samples have the variance",
    SameEachTime: r"leaf \['[wb]'\], ",
    Infinite: r"samples, leaf \['w'\]: NaN or infinite",
}


@pytest.mark.parametrize("bug", MOMENT_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_the_moments_is_named(bug):
    with pytest.raises(AssertionError, match="^check_sampling_moments: " + MOMENT_BUGS[bug]):
        check_sampling_moments(bug(), num_samples=4000)


def test_an_error_that_all_entries_share_is_seen_at_two_per_cent():
    # 200 entries and 2000 samples: 4 % of the variance are 18 standard errors √(2/4e5). One
    # entry alone has a standard error of 3.2 %.
    mean, std = {"w": torch.zeros(200)}, {"w": torch.ones(200)}
    check_sampling_moments(Normal(mean, std), num_samples=2000)
    with pytest.raises(AssertionError, match=r"averaged over its 200 entries.*0\.9\d+ of it"):
        check_sampling_moments(SmallerEverywhere(mean, std), num_samples=2000)


def test_a_wrong_correction_of_a_small_sample_is_named():
    # Moments of 20 iterates, stated with ddof 1 and sampled with ddof 0: the variance is off
    # by 1/20. One entry needs 5 = (1/20)/√(2/n), n = 20000; forty share it, so 500 would do.
    iterates = random.normal(0, (20, 40))
    mean = {"w": iterates.mean(0)}
    stated, drawn = {"w": iterates.std(0)}, {"w": iterates.std(0, correction=0)}
    check_sampling_moments(Diagonal(mean, stated), num_samples=5000)

    class Wrong(Normal):
        def transform(self, mean, std, z):
            return mean + drawn["w"] * z

    with pytest.raises(AssertionError, match=r"variance of samples is 0\.9[45]\d* of the s"):
        check_sampling_moments(Wrong(mean, stated), num_samples=5000)


def test_noise_where_the_variance_is_zero_is_named():
    std = tree(1, positive=True)
    std["b"] = std["b"] * torch.tensor([0.0, 1.0])
    check_sampling_moments(Normal(std=std), num_samples=1000)
    with pytest.raises(AssertionError, match=r"'b'\], entry \(0\): the stated variance is 0"):
        check_sampling_moments(NoisyWhereFixed(std=std), num_samples=1000)


def test_moments_that_make_no_sense_are_named():
    for variance, message in (
        ({"w": torch.tensor([-1.0])}, r"`variance\['w'\]` is negative or not finite"),
        (
            {"w": torch.ones(2)},
            r"`variance\['w'\]` has shape \(2,\), expected \(1,\), as in",
        ),
    ):
        posterior = Normal({"w": torch.ones(1)}, {"w": torch.ones(1)})
        wrong = type("Wrong", (Normal,), {"variance": variance})
        posterior.__class__ = wrong
        with pytest.raises(AssertionError, match=message):
            check_sampling_moments(posterior, num_samples=100)


def test_means_beyond_the_digits_of_the_dtype():
    # σ is a fifth of a unit in the last place: samples are the mean or its neighbours.
    mean, std = {"w": torch.full((50,), 1000.0)}, {"w": torch.full((50,), 1e-5)}
    check_sampling_moments(Diagonal(mean, std), num_samples=1000)
    mean, std = {"w": torch.ones(50).bfloat16()}, {"w": torch.full((50,), 0.2).bfloat16()}
    check_sampling_moments(Diagonal(mean, std), num_samples=1000)


def test_the_bound_is_widened_for_many_tests():
    assert widened(5.0, 1) == pytest.approx(5.0)
    one = 2 * NormalDist().cdf(-5.0)
    for tests in (10, 1000, 10**6):
        assert 2 * NormalDist().cdf(-widened(5.0, tests)) * tests == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("law", [check_sampling_moments, check_log_prob_matches_samples])
def test_false_alarms_are_as_rare_as_stated(law):
    # At z_bound=2, 4.55 % of calls at most (Bonferroni is an inequality) but for the skewness
    # of a variance's error; 200 calls: 9 ± 3 alarms. 20 would be nearly 4 standard deviations.
    def alarm(key):
        try:
            law(SOUND["diagonal"], key=key, num_samples=2000, z_bound=2.0)
        except AssertionError:
            return True
        return False

    assert sum(alarm(key) for key in range(200)) < 20


# -- planted bugs in the density -----------------------------------------------------------


class NoConstant(Normal):
    def log_prob(self, params):
        return super().log_prob(params) + 0.5 * math.log(2 * math.pi) * self.draw_size


class NoDeterminant(Normal):
    def log_prob(self, params):
        return super().log_prob(params) + sum(s.log().sum() for s in trees.leaves(self.std))


class HalfANat(Normal):
    def log_prob(self, params):
        return super().log_prob(params) - 0.5


class WrongScale(Normal):
    def log_prob(self, params):
        return Normal(self.mean, trees.tree_map(lambda s: 1.1 * s, self.std)).log_prob(params)


class WrongCentre(Normal):
    def log_prob(self, params):
        shifted = trees.tree_map(lambda m, s: m + 0.2 * s, self.mean, self.std)
        return Normal(shifted, self.std).log_prob(params)


class ForgottenLeaf(Normal):
    def log_prob(self, params):
        return super().log_prob({**params, "b": self.mean["b"]})


class Negative(Normal):
    def log_prob(self, params):
        return -super().log_prob(params)


class PerEntry(Normal):
    def log_prob(self, params):
        return torch.distributions.Normal(self.mean["w"], self.std["w"]).log_prob(params["w"])


class Truncated(Normal):
    def log_prob(self, params):
        inside = (params["w"] > self.mean["w"]).any()
        return torch.where(inside, super().log_prob(params), -math.inf)


class NotANumber(Normal):
    def log_prob(self, params):
        return super().log_prob(params) * math.nan


DENSITY_BUGS = {
    NoConstant: r": `log_prob` is 8\.\d+ ± \S+ nats too high.*½ log 2π for 9 parameters is 8\.27.*"
    r"the normalising constant",
    NoDeterminant: r": `log_prob` is .* nats too (low|high).*½ log det of the covariance",
    HalfANat: r": `log_prob` is 0\.[45]\d* ± \S+ nats too low",
    WrongScale: r": (leaf .*)?\(θ − c\).* averages to -(0\.[78]|7\.).*scale the noise differently",
    WrongCentre: r": leaf .*: the derivative of `log_prob` averages to 0\.\d.*centred elsewhere",
    ForgottenLeaf: r": leaf \['b'\], entry \(0\) varies over the samples, and `log_prob` does not",
    Negative: r": leaf .* averages to (1|0\.9)\S* ± .*, expected -1",
    PerEntry: r": `log_prob` returned shape \(3, 2\), expected one number",
    Truncated: r": `log_prob` is -inf at a sample \(number \d+; in all at \d+ of 2500\)",
    NotANumber: r": `log_prob` is nan at a sample",
}


@pytest.mark.parametrize("bug", DENSITY_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_the_density_is_named(bug):
    with pytest.raises(AssertionError, match="^check_log_prob_matches_samples" + DENSITY_BUGS[bug]):
        check_log_prob_matches_samples(bug(), num_samples=5000)


def test_a_wrong_correlation_is_named():
    mean, std = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    turned = LowRank(mean, std, {"w": torch.tensor([[1.0, -1.0]])})

    class Wrong(LowRank):
        def log_prob(self, params):
            return turned.log_prob(params)

    posterior = Wrong(mean, std, {"w": torch.tensor([[1.0, 1.0]])})
    with pytest.raises(AssertionError, match=r"leaf \['w'\], entry \(0\).* averages to"):
        check_log_prob_matches_samples(posterior, num_samples=4000)


def test_a_correlation_that_is_left_out_is_named():
    # Unit variances with correlation ½, and a density without: each entry alone is right.
    half = {"w": torch.full((2,), 0.5**0.5)}

    class Independent(LowRank):
        def log_prob(self, params):
            return -0.5 * params["w"].square().sum() - math.log(2 * math.pi)

    posterior = Independent({"w": torch.zeros(2)}, half, {"w": half["w"].unsqueeze(0)})
    message = r"entry \(\d\) and leaf \['w'\], entry \(\d\): .* averages to -0\.[45].*correlation"
    with pytest.raises(AssertionError, match=message):
        check_log_prob_matches_samples(posterior, num_samples=4000)


def test_posteriors_with_gradients_pass():
    posterior = trees.tensor_map(lambda leaf: leaf.clone().requires_grad_(), SOUND["diagonal"])
    check_key_determinism(posterior)
    check_sampling_moments(posterior, num_samples=500)
    check_log_prob_matches_samples(posterior, num_samples=1000)


class Other:
    """A posterior of a few independent numbers, by a distribution of torch."""

    def __init__(self, distribution):
        self.distribution = distribution

    def sample(self, key, num_samples):
        u = random.uniform(key, (num_samples, 2), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        return {"w": self.distribution.icdf(u)}

    def log_prob(self, params):
        return self.distribution.log_prob(params["w"]).sum()


class Scaled(Other):
    def log_prob(self, params):
        return self.distribution.log_prob(0.9 * params["w"]).sum()


def test_densities_that_are_not_normal_pass():
    zero = torch.zeros(2, dtype=torch.float64)
    for family in (torch.distributions.Cauchy, torch.distributions.Laplace):
        check_log_prob_matches_samples(Other(family(zero, 1.0)), num_samples=10_000)
        with pytest.raises(AssertionError, match=r"averages to|nats too"):
            check_log_prob_matches_samples(Scaled(family(zero, 1.0)), num_samples=10_000)


class TwoNormals:
    """Two equally likely normals at −1 and 1, all samples at once."""

    def __init__(self, size, std, weights=(0.5, 0.5)):
        one = torch.ones(size, dtype=torch.float64)
        self.std = std * one
        self.components = [Diagonal({"w": at * one}, {"w": self.std}) for at in (-1, 1)]
        self.log_weights = torch.tensor(weights).log()

    def sample(self, key, num_samples):
        noise, choice = random.split(key)
        at = 2 * random.randint(choice, 0, 2, (num_samples, 1)) - 1
        z = random.normal(noise, (num_samples, len(self.std)), dtype=torch.float64)
        return {"w": at + self.std * z}

    def log_prob(self, params):
        each = torch.stack([c.log_prob(params) for c in self.components])
        return torch.logsumexp(each + self.log_weights, 0)


def test_modes_far_apart_pass_and_their_constant_is_tested():
    check_log_prob_matches_samples(TwoNormals(2, 0.1), num_samples=4000)
    with pytest.raises(AssertionError, match=r"0\.[67]\d* ± \S+ nats too high"):
        check_log_prob_matches_samples(TwoNormals(2, 0.1, weights=(1.0, 1.0)), num_samples=4000)


def test_wrong_weights_of_modes_are_named():
    with pytest.raises(AssertionError, match=r"or modes have other weights"):
        check_log_prob_matches_samples(TwoNormals(2, 0.5, weights=(0.8, 0.2)), num_samples=4000)


def test_what_cannot_be_decided_is_an_error():
    still = Diagonal({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    with pytest.raises(AssertionError, match=r"samples cannot decide: no parameter varies"):
        check_log_prob_matches_samples(still, num_samples=1000)
    many = Diagonal({"w": torch.zeros(200)}, {"w": torch.ones(200)})
    with pytest.raises(AssertionError, match=r"cannot decide: 200 parameters vary, too many for"):
        check_log_prob_matches_samples(many, num_samples=2000)
    large = Diagonal({"w": torch.zeros(300_000)}, {"w": torch.ones(300_000)})
    with pytest.raises(AssertionError, match=r"decide: 1000 samples of 300000 parameters are too"):
        check_log_prob_matches_samples(large, num_samples=1000)
    coarse = Diagonal({"w": torch.full((2,), 100.0)}, {"w": torch.full((2,), 1e-4)})
    with pytest.raises(AssertionError, match=r"decide: leaf \['w'\], entry \(0\): its spread"):
        check_log_prob_matches_samples(coarse, num_samples=1000)

    class Plane(Normal):
        def transform(self, mean, std, z):
            return (mean + std * z).flatten(1)[:, :1].view(-1, *[1] * mean.dim()).expand_as(z)

    with pytest.raises(AssertionError, match=r"cannot decide: the samples' covariance is singular"):
        check_log_prob_matches_samples(
            Plane({"w": torch.zeros(2)}, {"w": torch.ones(2)}), num_samples=1000
        )
    with pytest.raises(AssertionError, match=r"cannot decide: a normal fitted .* overlaps"):
        check_log_prob_matches_samples(TwoNormals(6, 1e-3), num_samples=2000)


def test_fixed_parameters_are_left_out_of_the_density():
    std = tree(1, positive=True)
    std["b"] = torch.zeros(2)
    check_log_prob_matches_samples(Diagonal(tree(0), std), num_samples=3000)


def test_a_density_that_vmap_cannot_batch_runs_one_sample_at_a_time():
    class Branching(Normal):
        def log_prob(self, params):
            if float(params["w"].sum()) > 1e9:
                return torch.tensor(-math.inf)
            return super().log_prob(params)

    check_log_prob_matches_samples(Branching(), num_samples=1000)
