"""Joint uncertainty of a batch of labels, and the batch to label next (BatchBALD).

A sample of the posterior fixes the function, so given a sample the labels of a batch are
independent, and what they share is what they say about the sample:

p(y_1 … y_B) = 1/S Σ_s Π_b p_s(y_b),  H(y) = Σ_b E_s H[p_s(y_b)] + I(y; s).

So `samples[s]` must be one function for the whole batch. It is for every posterior over
parameters; Monte Carlo dropout needs `per="batch"`, because with a mask for every row (`per="row"`)
the rows share nothing and the joint information would be made up.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcbayes.core import random
from funcbayes.core.random import KeyLike
from funcbayes.evaluation.uncertainty.common import (
    divergence,
    entropy,
    log_probs,
    log_zero,
    mean_log_probs,
    work_dtype,
)

# Numbers of a table over configurations, candidates and classes that is made at a time: 32 MiB.
_TABLE = 2**22


class Selection(NamedTuple):
    """Rows that are most informative together, best first.

    Attributes:
        indices: rows of the batch, `[size]`, no two the same.
        information: mutual information of the labels of the first n rows and the parameters,
            in nats, `[size]`; it never falls.
    """

    indices: Int[Tensor, " size"]
    information: Float[Tensor, " size"]


def joint_entropy(
    samples: Float[Tensor, "samples batch classes"],
    *,
    key: KeyLike | None = None,
    max_configurations: int = 10_000,
    logits: bool = False,
) -> Float[Tensor, ""]:
    """Entropy of the labels of all rows of a batch together.

    Exact where the batch has no more than `max_configurations` configurations of labels,
    classesᵇᵃᵗᶜʰ. Beyond, an unbiased estimate from that many random ones, drawn equally often
    from each sample; its error falls as their number to the power −½.

    Args:
        samples: class probabilities `[samples, batch, classes]`, of which sample s must be one
            function for all rows: `per="batch"` for dropout.
        key: a key or an int; needed where configurations have to be drawn.
        max_configurations: configurations to enumerate or to draw (rounded up to a multiple of
            the number of samples). Time and memory are samples · max_configurations.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        H[y_1 … y_B] in nats, `[]`.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one; `max_configurations` is below
            1; there are more configurations than that and no key.

    Source:
        Kirsch, van Amersfoort and Gal (2019), arXiv:1906.08158, equations 10 and 13. Departs from
        it beyond enumeration: the entropy is the exact Σ_b E H[p_s(y_b)] plus an estimate of the
        joint mutual information, which varies less than one of the entropy itself.
    """
    rows = _rows(samples, logits=logits)
    information = _information(rows, key, max_configurations)
    return (entropy(rows).sum(1).mean(0) + information).to(work_dtype(samples))


def joint_mutual_information(
    samples: Float[Tensor, "samples batch classes"],
    *,
    key: KeyLike | None = None,
    max_configurations: int = 10_000,
    logits: bool = False,
) -> Float[Tensor, ""]:
    """Mutual information of the parameters and the labels of all rows together (BatchBALD).

    At most the sum of `mutual_information` over the rows, which counts twice what two rows both
    say, and at most log(samples).

    Args:
        samples: class probabilities `[samples, batch, classes]`, of which sample s must be one
            function for all rows: `per="batch"` for dropout.
        key: a key or an int; needed where configurations have to be drawn.
        max_configurations: configurations of labels to enumerate or to draw, as in
            `joint_entropy`.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        I(y_1 … y_B; parameters) in nats, `[]`; never negative. Exact or unbiased as
        `joint_entropy` is.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one; `max_configurations` is below
            1; there are more configurations than that and no key.

    Source:
        Kirsch, van Amersfoort and Gal (2019), arXiv:1906.08158, equation 7. Each configuration
        counts with the divergence of p(sample | y) from uniform, not with log p(y | sample) /
        p(y): the same on average, never negative, and less variable.
    """
    rows = _rows(samples, logits=logits)
    return _information(rows, key, max_configurations).to(work_dtype(samples))


def select_batch(
    samples: Float[Tensor, "samples batch classes"],
    size: int,
    *,
    key: KeyLike | None = None,
    max_configurations: int = 10_000,
    logits: bool = False,
) -> Selection:
    """Chooses, one after the other, the rows whose labels tell most about the parameters.

    Each step adds the row that raises the joint mutual information most; that is within
    1 − 1/e of the best batch of the size, as the information is submodular (where it is exact).

    Args:
        samples: class probabilities `[samples, batch, classes]` of the candidates, of which
            sample s must be one function for all rows: `per="batch"` for dropout.
        size: rows to choose.
        key: a key or an int; needed where classes^(size − 1) is above `max_configurations`.
        max_configurations: configurations of the labels of the rows chosen so far that are
            looked at, M: all of them, or as many random ones (rounded up to a multiple of the
            number of samples). Each step takes M · samples · batch · classes multiplications.
        logits: `samples` are unnormalised log probabilities.

    Returns:
        `(indices, information)`.

    Raises:
        TypeError: `samples` is not a floating-point tensor.
        ValueError: `samples` has not three axes, or an empty one; `size` is not between 1 and
            the number of rows; `max_configurations` is below 1; a key is needed.

    Source:
        Kirsch, van Amersfoort and Gal (2019), arXiv:1906.08158, algorithm 1 and section 3.3. The
        gain of a row is written as its mutual information under the posterior that each
        configuration of the chosen labels leads to, which is the same and does not underflow.
    """
    rows = _rows(samples, logits=logits)
    num_samples, batch, classes = rows.shape
    if not 1 <= size <= batch:
        raise ValueError(
            f"`size` is {size}, expected 1 to {batch}, the number of rows of `samples`"
        )
    key = _key(classes, size - 1, key, max_configurations)
    probs, expected = rows.exp(), entropy(rows).mean(0)
    log_joint = rows.new_zeros(num_samples, 1)
    drawn = False
    chosen, gains = [], []
    for step in range(size):
        # What each row's label would still tell of the samples, the chosen labels being known.
        gain = (_expected_entropy_given(log_joint, probs, drawn=drawn) - expected).clamp_min(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        gains.append(gain[chosen[-1]])
        if step == size - 1:
            break
        if drawn:
            log_joint = _append_drawn(log_joint, rows[:, chosen[-1]], key, step)
        elif log_joint.shape[1] * classes <= max_configurations:
            log_joint = _append_all(log_joint, rows[:, chosen[-1]])
        else:
            log_joint, drawn = _draw(rows[:, chosen], key, max_configurations), True
    return Selection(
        torch.tensor(chosen, device=rows.device),
        torch.stack(gains).cumsum(0).to(work_dtype(samples)),
    )


def _rows(samples: Tensor, *, logits: bool) -> Tensor:
    """Log probabilities in float64: those of a configuration are sums over the batch.

    Normalised anew, since rows in half precision do not quite sum to one.
    """
    each = log_probs(samples, logits=logits).double().log_softmax(-1)
    return each.clamp_min(log_zero(each))


def _key(classes: int, rows: int, key: KeyLike | None, most: int) -> KeyLike:
    """The key, once it is known to be there if the labels of `rows` rows have to be drawn."""
    if most < 1:
        raise ValueError(f"`max_configurations` is {most}, expected at least 1")
    if classes**rows > most and key is None:
        raise ValueError(
            f"there are {classes}^{rows} configurations of labels, more than "
            f"`max_configurations`, {most}, and `key` is None: give a key to draw them, or raise "
            "`max_configurations`"
        )
    return 0 if key is None else key


def _information(rows: Tensor, key: KeyLike | None, most: int) -> Tensor:
    num_samples, batch, classes = rows.shape
    key = _key(classes, batch, key, most)
    if classes**batch > most:
        log_joint = _draw(rows, key, most)
        return divergence(log_joint, mean_log_probs(log_joint)).mean()
    log_joint = rows.new_zeros(num_samples, 1)
    for row in rows.unbind(1):
        log_joint = _append_all(log_joint, row)
    log_mean = mean_log_probs(log_joint)
    return log_mean.exp() @ divergence(log_joint, log_mean)


def _append_all(log_joint: Tensor, row: Tensor) -> Tensor:
    """Every configuration `[samples, configurations]` followed by every label of one more row."""
    longer = (log_joint[:, :, None] + row[:, None, :]).flatten(1)
    return longer.clamp_min(log_zero(longer))


def _draw(rows: Tensor, key: KeyLike, most: int) -> Tensor:
    """Draws configurations, equally many from each sample, one sample's after the other's.

    Returns:
        Their log probability under every sample, `[samples, configurations]`.
    """
    num_samples = len(rows)
    log_joint = rows.new_zeros(num_samples, num_samples * math.ceil(most / num_samples))
    for position, row in enumerate(rows.unbind(1)):
        log_joint = _append_drawn(log_joint, row, key, position)
    return log_joint


def _append_drawn(log_joint: Tensor, row: Tensor, key: KeyLike, position: int) -> Tensor:
    """Every configuration followed by a label of one more row, drawn from its own sample."""
    own = random.fold_in(key, position)
    u = random.uniform(own, log_joint.shape[1:], dtype=row.dtype, device=row.device)
    cumulative = row.exp().cumsum(-1)
    u = u.reshape(len(row), -1) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, u, right=True)
    # u = 1 − eps may round up to the total: the last class that has a probability at all.
    possible = torch.arange(row.shape[-1], device=row.device) * (row.exp() > 0)
    labels = torch.minimum(labels, possible.amax(-1, keepdim=True))
    longer = log_joint + row[:, labels.flatten()]
    return longer.clamp_min(log_zero(longer))


def _expected_entropy_given(log_joint: Tensor, probs: Tensor, *, drawn: bool) -> Tensor:
    """E H[y_n | chosen labels] of every candidate n, `[batch]`, over configurations of these."""
    responsibilities = log_joint.softmax(0).T
    num = len(responsibilities)
    weights = probs.new_full((num,), 1 / num) if drawn else mean_log_probs(log_joint).exp()
    chunks = []
    for part in probs.split(max(1, _TABLE // (num * probs.shape[-1])), dim=1):
        # p(y_n | chosen labels) as one matrix product, [configurations, part, classes].
        given = (responsibilities @ part.flatten(1)).unflatten(1, part.shape[1:])
        chunks.append(torch.tensordot(weights, torch.special.entr(given).sum(-1), dims=1))
    return torch.cat(chunks)
