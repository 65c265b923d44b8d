"""Likelihoods p(y | outputs): what a network's raw outputs say about the targets.

| likelihood | targets | outputs of a datum |
| --- | --- | --- |
| `Categorical` | one of C classes | C logits (a position) |
| `Bernoulli` | yes or no; several independent labels | one logit a label |
| `Poisson` | counts | one log rate a count |
| `Gaussian` | real numbers, noise known or learnt | one mean a target |
| `HeteroscedasticGaussian` | real numbers, noise predicted | a mean and a log variance a target |
| `NegativeLogLikelihood` | any, from a function | any tensor |

They are small immutable values. `Likelihood` is the interface they share; an object of one's own
with these methods serves wherever one of ours does.

Shapes: `outputs` is `[batch, *out]`, one row a datum. For further leading axes (posterior
samples) use `torch.func.vmap`. Except for `check`, no method looks at the value of a tensor, so
all of them work under `vmap`, `grad`, `jvp` and `torch.compile`.

Units and precision: densities and entropies are in nats and complete, constants included.
Half-precision outputs are computed in float32, and results stay in float32, as under
`torch.autocast`: a sum of log densities soon exceeds what float16 holds. `hessian_root` alone
returns the dtype of `outputs`, since its columns are cotangents of them.

The roots of `Categorical`, `Bernoulli`, `Poisson` and `Gaussian` are those of the Hessian of `nll`
itself, which in their parametrisation does not depend on the targets. That of
`HeteroscedasticGaussian` is the Fisher's, that of `NegativeLogLikelihood` takes the targets.
"""

from funcbayes.core.likelihoods.base import (
    Likelihood,
    check_likelihood,
    hessian_root,
)
from funcbayes.core.likelihoods.bernoulli import Bernoulli
from funcbayes.core.likelihoods.categorical import Categorical
from funcbayes.core.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian
from funcbayes.core.likelihoods.negative import NegativeLogLikelihood
from funcbayes.core.likelihoods.poisson import Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "NegativeLogLikelihood",
    "Poisson",
    "check_likelihood",
    "hessian_root",
]
