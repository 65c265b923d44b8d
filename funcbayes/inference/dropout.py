"""Monte Carlo dropout: the dropout a network was trained with, kept active.

There is nothing to fit: a posterior sample is a set of masks. What counts as dropout is
every call of torch's dropout functions: the `nn` layers, `F.dropout` and its relatives,
attention's and recurrent layers' dropout. Evaluation mode does not switch them off here, and
everything else (batch norm above all) stays in evaluation mode.

A rate that the network's own code turns into 0 in evaluation mode, such as
`dropout_p=self.p if self.training else 0.0`, cannot be seen.

Source:
    Gal and Ghahramani (2016), arXiv:1506.02142.
"""

from typing import Literal

from funcbayes.core import trees
from funcbayes.core.model import Model
from funcbayes.posteriors import DropoutMasks


def posterior(
    model: Model, *, rate: float | None = None, per: Literal["row", "batch"] = "row"
) -> DropoutMasks:
    """The distribution over networks that the model's dropout makes.

    Args:
        model: the network. Its current parameters are copied.
        rate: replaces the rate of every dropout, 0 ≤ rate < 1; None keeps each one's own.
        per: "row": every row of a batch has a mask of its own; "batch": one mask a sample
            for all rows, which makes a sample one function of the input, as joint
            predictions and active learning need.

    Returns:
        A posterior for `funcbayes.predict`, which warns where no dropout is active.

    Raises:
        TypeError: `model` is not a model, or `rate` is not a number.
        ValueError: `rate` or `per` is out of range.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` is a {type(model).__name__}, expected a funcbayes.Model: make one with"
            " funcbayes.Model.from_module(net)"
        )
    if rate is not None and not isinstance(rate, int | float):
        raise TypeError(f"`rate` is a {type(rate).__name__}, expected a number or None")
    if rate is not None and not 0 <= rate < 1:
        raise ValueError(f"`rate` is {rate}, expected 0 ≤ rate < 1, or None for the network's own")
    if per not in ("row", "batch"):
        raise ValueError(f"`per` is {per!r}, expected 'row' or 'batch'")
    return DropoutMasks(trees.clone(model.params), rate, per)
