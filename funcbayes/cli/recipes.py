"""How long and with which settings networks are trained on images and on tables."""

from typing import NamedTuple

from funcbayes.cli.data import Splits

# The steps of a training, where that is neither too few nor too many epochs.
_STEPS = 1500


class Recipe(NamedTuple):
    """What differs between images and tables.

    Attributes:
        weight_decays: to choose from, for the plain network and with it the ensemble.
        epochs: least and most passes over the training split unless said otherwise.
        prior_precisions: to choose from, for Laplace.
        vi_std: where the standard deviations of VI start.
        vi_learning_rate: of VI.
        tolerance: how many standard errors of its validation NLL a candidate may lie above
            the best one and still be taken for as good; of those, the least sure is chosen.
    """

    weight_decays: tuple[float, ...]
    epochs: tuple[int, int]
    prior_precisions: tuple[float, ...]
    vi_std: float
    vi_learning_rate: float
    tolerance: float


IMAGES = Recipe(
    weight_decays=(5e-4,),
    epochs=(10, 60),
    prior_precisions=tuple(10.0 ** (k / 4) for k in range(2, 17)),
    vi_std=0.01,
    vi_learning_rate=5e-4,
    tolerance=0.0,
)
# Few rows choose, and they lie where the training rows do: how unsure to be elsewhere they
# cannot tell. So what they cannot tell apart is decided for the wider posterior.
TABLES = Recipe(
    weight_decays=(1e-3, 1e-2, 3e-2, 1e-1),
    epochs=(20, 300),
    prior_precisions=tuple(10.0 ** (k / 4) for k in range(-4, 21)),
    vi_std=0.05,
    vi_learning_rate=2e-3,
    tolerance=0.5,
)


def recipe(data: Splits) -> Recipe:
    """The one for a data set."""
    return TABLES if data.features else IMAGES


def default_epochs(data: Splits) -> int:
    """Passes over the training split that make some 1500 steps, within bounds."""
    least, most = recipe(data).epochs
    steps = len(data.train.targets) // batch_size(data)
    return min(most, max(least, round(_STEPS / steps)))


def batch_size(data: Splits) -> int:
    """32, and more where an epoch would be long: the power of two that makes 64 steps."""
    rows = len(data.train.targets)
    return min(rows, 256, max(32, 2 ** ((rows // 64).bit_length() - 1 if rows >= 64 else 0)))
