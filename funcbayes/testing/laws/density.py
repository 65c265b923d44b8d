"""The agreement of a posterior's log density with its samples, normalising constant included."""

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.func import grad_and_value

from funcbayes.core import random, trees
from funcbayes.core.batching import map_samples
from funcbayes.core.random import Key, KeyLike
from funcbayes.core.trees import TensorTree
from funcbayes.posteriors.base import check_num_samples
from funcbayes.testing.laws.comparing import fail, needs, place
from funcbayes.testing.laws.moments import widened

_LAW = "check_log_prob_matches_samples"
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# Samples' worth of overlap that the estimate of the constant needs: its standard error is
# then below √(2/200) = 0.1 nats.
_LEAST_OVERLAP = 200
_MOST_NUMBERS = 2**28


def check_log_prob_matches_samples(
    posterior: Any, *, key: KeyLike = 0, num_samples: int = 20_000, z_bound: float = 5.0
) -> None:
    """Checks that `log_prob` is the log density of what `sample` draws, in nats.

    For posteriors over few parameters (up to some tens). The first half of the samples fixes
    a centre c and a normal density q; with the second half, drawn from p, and s = ∇ log p from
    `log_prob`, three statements are tested:

    1. Scores average to zero: E[s] = 0, entry by entry. A density with another centre breaks
       it.
    2. E[(θ − c)ᵢ sⱼ] = −1 for i = j and 0 otherwise, for any c (integrate by parts). A density
       of another scale breaks the diagonal, where −σ²/σ'² comes instead of −1; another
       correlation breaks the rest; and so does a parameter that the density forgets. The
       sum over i = j is tested as well.
    3. For any normalised q, E_q[p/(p + q)] = E_p[q/(p + q)], as both are ∫pq/(p + q). Were
       `log_prob` δ too high, the two would differ; δ solves the equation with p exp(−δ) in
       place of p (Bennett 1976), and it must be 0. Mass in other places than the samples makes
       them differ as well. Every term lies in [0, 1], so no rare sample decides, as it would in
       an average of q/p, and q need not be a good fit.

    Means are compared in standard errors of their own sample. False alarms: one in 1.7 million
    calls with `z_bound=5`, for all tests of a call together (Bonferroni: the bound grows to 6
    for 25 parameters). Smallest detectable errors with bound z and n = `num_samples`, with
    probability ½: a centre off by zσ√(2/n) (0.05σ by default), a scale off by z/√n (3.5 %),
    and δ = 2z/√(n·o) nats or less, where o ≤ 1 is how much p and q overlap: under 0.05 for
    normals.

    What cannot be decided is an error as well: no parameter that varies, an overlap of less
    than 200 samples, or a spread too small for the digits of the dtype.

    Args:
        posterior: has `sample` and `log_prob`. Its density must be differentiable and fall to 0
            continuously: a density that ends abruptly (uniform on a box) breaks statement 2
            though it is right. Parameters that do not vary at all are left out.
        key: the key to sample with.
        num_samples: n, half of which are tested.
        z_bound: the bound on |z| for one test, before it is widened for many.

    Raises:
        TypeError: the posterior lacks `sample` or `log_prob`.
        ValueError: `num_samples` is below 1000.
        AssertionError: the law does not hold, or cannot be decided; the message says which,
            and where.

    Source:
        Stein (1972) for the identities of the score; Bennett (1976),
        doi:10.1016/0021-9991(76)90078-4, for the estimate of the constant.
    """
    needs(_LAW, posterior, "sample", "log_prob")
    if check_num_samples(num_samples) < 1000:
        raise ValueError(f"`num_samples` is {num_samples}, expected at least 1000")
    parent = random.as_key(key)
    entries = trees.num_elements(posterior.sample(parent, 1))
    if entries * num_samples > _MOST_NUMBERS:
        _undecided(f"{num_samples} samples of {entries} parameters are too much to hold")
    samples = trees.clone(posterior.sample(parent, num_samples))
    space = _free_space(samples)
    half = num_samples // 2
    held_out, tested = space.free(samples)[:half], space.free(samples)[half:]
    if held_out.shape[1] > half // 20:
        _undecided(
            f"{held_out.shape[1]} parameters vary, too many for {num_samples} samples: raise"
            " `num_samples`, or give the law a posterior over fewer parameters"
        )
    gradients, log_p = _scores(posterior, trees.tensor_map(lambda leaf: leaf[half:], samples))
    _check_finite(space, tested, log_p)
    gradients = space.free(gradients)
    num = tested.shape[1]
    bound = widened(z_bound, num**2 + num + 2)
    if bool((gradients != 0).any()):
        _check_scores(space, tested - held_out.median(0).values, gradients, bound)
    _check_constant(posterior, space, parent, held_out, tested, log_p, bound)


class _Space(NamedTuple):
    """The entries of a parameter tree that vary.

    Attributes:
        example: one sample, in which the others keep their values.
        varies: `[entries]`, in the order of `ravel`.
        eps: of the dtype of each entry that varies.
        names: path and index of each entry that varies.
    """

    example: TensorTree
    varies: Tensor
    eps: Tensor
    names: list[str]

    def free(self, tree: TensorTree) -> Tensor:
        """The entries that vary, `[samples, entries]` in float64."""
        return _flat(tree)[:, self.varies]

    def tree(self, free: Tensor) -> TensorTree:
        """Samples with the given entries; rounded to the dtypes of the leaves."""
        fixed = trees.tensor_map(lambda leaf: leaf.unsqueeze(0), self.example)
        flat = _flat(fixed).repeat(len(free), 1)
        flat[:, self.varies] = free
        return trees.unravel(flat, self.example, batch_dims=1)


def _flat(tree: TensorTree) -> Tensor:
    return trees.ravel(trees.tensor_map(lambda leaf: leaf.detach().double(), tree), batch_dims=1)


def _free_space(samples: TensorTree) -> _Space:
    flat = _flat(samples)
    if not bool(torch.isfinite(flat).all()):
        fail(_LAW, "samples hold NaN or infinite numbers")
    varies = flat.amax(0) > flat.amin(0)
    names, eps = [], []
    for name, leaf in trees.leaves_with_names(samples):
        for i in range(leaf[0].numel()):
            at = torch.unravel_index(torch.tensor(i), leaf.shape[1:])
            names.append(place(name, [int(k) for k in at]))
            eps.append(torch.finfo(leaf.dtype).eps)
    if not varies.any():
        _undecided("no parameter varies over the samples, so they have no density")
    widths = torch.tensor(eps, dtype=torch.float64, device=flat.device)[varies]
    chosen = [name for name, v in zip(names, varies.tolist(), strict=True) if v]
    _check_digits(flat[:, varies], widths, chosen)
    return _Space(trees.index(samples, 0), varies, widths, chosen)


def _check_digits(free: Tensor, eps: Tensor, names: list[str]) -> None:
    """Whether the dtypes have digits enough for each entry's spread, the others given."""
    std, root = _scale_and_root(free)
    conditional = std * torch.cholesky_inverse(root).diagonal().rsqrt()
    coarse = conditional < 64 * eps * free.abs().median(0).values
    if coarse.any():
        j = int(coarse.nonzero()[0])
        _undecided(
            f"{names[j]}: its spread, the other parameters given, is"
            f" {float(conditional[j]):.3g}, less than 64 units in the last place of its numbers:"
            " give the law the posterior in float64"
        )


def _scale_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations, and the Cholesky factor of the correlation matrix."""
    std = x.std(0)
    correlation = torch.cov((x / std).T).reshape(len(std), len(std))
    root, info = torch.linalg.cholesky_ex(correlation)
    if int(info) or not bool(torch.isfinite(root).all()):
        _undecided("the samples' covariance is singular: they lie in a plane, without a density")
    return std, root


def _scores(posterior: Any, samples: TensorTree) -> tuple[TensorTree, Tensor]:
    """Gradients of `log_prob` and its values, sample by sample."""

    def one(params: TensorTree) -> tuple[TensorTree, Tensor]:
        return grad_and_value(lambda p: _scalar(posterior.log_prob(p)))(params)

    gradients, values = map_samples(one, samples, quiet=True)
    return gradients, values.detach().double()


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != ():
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fail(_LAW, f"`log_prob` returned {came}, expected one number: sum over the parameters")
    return value


def _check_finite(space: _Space, tested: Tensor, log_p: Tensor) -> None:
    bad = ~torch.isfinite(log_p)
    if bad.any():
        i = int(bad.nonzero()[0])
        fail(
            _LAW,
            f"`log_prob` is {float(log_p[i])} at a sample (number {len(tested) + i}; in all at"
            f" {int(bad.sum())} of {len(log_p)})",
            "a density over parameters that do not vary, or a support that `sample` leaves",
        )


def _check_scores(space: _Space, t: Tensor, g: Tensor, bound: float) -> None:
    num, names = len(t), space.names
    for j, name in enumerate(names):
        if not bool((g[:, j] != 0).any()):
            fail(_LAW, f"{name} varies over the samples, and `log_prob` does not depend on it")
    # Rounding of the score: some units in its last place, which an average does not lose.
    slack = 64 * space.eps
    mean, error = g.mean(0), g.std(0) / math.sqrt(num)
    z = (mean.abs() - slack * g.abs().mean(0)) / error.clamp_min(1e-300)
    j = int(z.argmax())
    if z[j] > bound:
        fail(
            _LAW,
            f"{names[j]}: the derivative of `log_prob` averages to {_estimate(mean[j], error[j])}"
            f" over the samples, expected 0 (z = {float(z[j]):.1f}, {bound:.1f} is allowed)",
            "the density is centred elsewhere than the samples",
        )
    expected = -torch.eye(len(names), dtype=t.dtype, device=t.device)
    products = t.T @ g / num
    squares = t.square().T @ g.square() / num
    error = ((squares - products.square()).clamp_min(0) / num).sqrt()
    z = ((products - expected).abs() - slack * squares.sqrt()) / error.clamp_min(1e-300)
    # Both halves of the law: an entry's own scale, then all at once, then correlations.
    own = z.diagonal()
    j = int(own.argmax())
    total = (t * g).sum(1)
    total_error = total.std() / math.sqrt(num)
    total_off = (total.mean() + len(names)).abs() - float(slack.max()) * total.abs().mean()
    cause = (
        "`log_prob` and `sample` scale the noise differently (a standard deviation taken for a"
        " variance, a factor left out)"
    )
    if own[j] > bound:
        value = products[j, j]
        ratio = f": its scale is {float((-value).rsqrt()):.3g} of the samples'" if value < 0 else ""
        fail(
            _LAW,
            f"{names[j]}: (θ − c)·∂log_prob averages to {_estimate(value, error[j, j])}, expected"
            f" -1 (z = {float(own[j]):.1f}, {bound:.1f} is allowed){ratio}",
            cause,
        )
    if total_off > bound * total_error:
        fail(
            _LAW,
            f"all parameters: (θ − c)ᵀ∇log_prob averages to {_estimate(total.mean(), total_error)},"
            f" expected {-len(names)} (z = {float(total_off / total_error):.1f})",
            cause,
        )
    i, j = (int(k) for k in torch.unravel_index(z.argmax(), z.shape))
    if z[i, j] > bound:
        fail(
            _LAW,
            f"{names[i]} and {names[j]}: (θ − c)·∂log_prob, one of each, averages to"
            f" {_estimate(products[i, j], error[i, j])}, expected 0 (z = {float(z[i, j]):.1f},"
            f" {bound:.1f} is allowed)",
            "the density has another correlation between them than the samples",
        )


def _check_constant(
    posterior: Any,
    space: _Space,
    key: Key,
    held_out: Tensor,
    tested: Tensor,
    log_p: Tensor,
    bound: float,
) -> None:
    num = tested.shape[1]
    held_out = _without_tails(held_out)
    centre = held_out.mean(0)
    scale, root = _scale_and_root(held_out)
    root = scale.unsqueeze(1) * root
    # Split, not folded: samples are drawn from the folds of the key.
    noise_key = random.split(key, 1)[0]
    noise = random.normal(noise_key, tested.shape, dtype=torch.float64).to(tested)
    drawn = space.tree(centre + noise @ root.T)
    values = map_samples(lambda p: _scalar(posterior.log_prob(p)), drawn, quiet=True)
    log_p_drawn = values.detach().double()
    if bool(log_p_drawn.isnan().any()):
        fail(_LAW, "`log_prob` is NaN near the samples (at draws of a normal fitted to them)")

    def log_q(x: Tensor) -> Tensor:
        inside = torch.linalg.solve_triangular(root, (x - centre).T, upper=False)
        squared = inside.square().sum(0)
        return -0.5 * squared - root.diagonal().log().sum() - num * _HALF_LOG_2PI

    from_p = log_p - log_q(tested)
    from_q = log_p_drawn - log_q(space.free(drawn))
    shift = _solve(from_p, from_q)
    p_terms, q_terms = torch.sigmoid(shift - from_p), torch.sigmoid(from_q - shift)
    overlap = float(p_terms.sum().minimum(q_terms.sum()))
    if overlap < _LEAST_OVERLAP:
        _undecided(
            f"a normal fitted to the samples overlaps with the density by {overlap:.0f} samples"
            f" of {len(tested)}, fewer than {_LEAST_OVERLAP}: raise `num_samples`, or give the"
            " law fewer or less separated components"
        )
    slope = (p_terms * (1 - p_terms)).mean() + (q_terms * (1 - q_terms)).mean()
    error = ((p_terms.var() + q_terms.var()) / len(tested)).sqrt() / slope
    slack = 64 * float(space.eps.max()) * float(log_p.abs().mean() + 1)
    if abs(shift) - slack > bound * error:
        hint = ""
        for text, constant in _constants(num, root):
            # The constants are known as well as the covariance of so many samples.
            if abs(shift - constant) < 3 * (float(error) + math.sqrt(num / (2 * len(tested)))):
                hint = f" ({text} is {constant:.4g})"
        fail(
            _LAW,
            f"`log_prob` is {abs(shift):.4g} ± {float(error):.2g} nats too"
            f" {'high' if shift > 0 else 'low'} where the samples lie: its exponential does not"
            f" integrate to 1, or lies elsewhere{hint}",
            "the normalising constant, or a part of it, is missing; or modes have other weights",
        )


def _without_tails(x: Tensor) -> Tensor:
    """Entries moved to within 5 robust standard deviations: a normal fits no heavier tails."""
    ordered = x.sort(0).values  # `torch.quantile` takes 16 million numbers at most
    lower, median, upper = (ordered[len(x) * quarter // 4] for quarter in (1, 2, 3))
    reach = 5 * (upper - lower) / 1.35
    reach = reach.masked_fill(reach == 0, math.inf)
    return x.clamp(median - reach, median + reach)


def _constants(num: int, root: Tensor) -> list[tuple[str, float]]:
    """What is often left out of a normal density's logarithm."""
    log_2pi, log_det = num * _HALF_LOG_2PI, float(root.diagonal().log().sum())
    return [
        (f"½ log 2π for {num} parameters", log_2pi),
        ("½ log det of the covariance", log_det),
        ("½ log det of 2π the covariance", log_2pi + log_det),
    ]


def _solve(from_p: Tensor, from_q: Tensor) -> float:
    """The shift δ of log p at which E_q[p/(p + q)] = E_p[q/(p + q)], by bisection."""
    finite = torch.cat([from_p, from_q[torch.isfinite(from_q)]])
    low, high = float(finite.min()) - 50, float(finite.max()) + 50
    for _ in range(100):
        middle = 0.5 * (low + high)
        # Decreasing in the shift.
        q_part = torch.sigmoid(from_q - middle).mean()
        if q_part > torch.sigmoid(middle - from_p).mean():
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _estimate(value: Tensor, error: Tensor) -> str:
    return f"{float(value):.4g} ± {float(error):.2g}"


def _undecided(why: str) -> NoReturn:
    fail(f"{_LAW} cannot decide", why)
