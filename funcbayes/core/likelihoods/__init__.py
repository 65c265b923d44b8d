"""Likelihoods p(y | outputs): what a network's raw outputs say about the targets.

`Categorical`, `Bernoulli`, `Gaussian` and `HeteroscedasticGaussian` are small immutable values.
`Likelihood` is the interface they share; an object of one's own with these methods serves
wherever one of ours does.

Shapes: `outputs` is `[batch, *out]`, one row a datum. For further leading axes (posterior
samples) use `torch.func.vmap`. Except for `check`, no method looks at the value of a tensor, so
all of them work under `vmap`, `grad`, `jvp` and `torch.compile`.

Units and precision: densities and entropies are in nats and complete, constants included.
Half-precision outputs are computed in float32, and results stay in float32, as under
`torch.autocast`: a sum of log densities soon exceeds what float16 holds. `hessian_root` alone
returns the dtype of `outputs`, since its columns are cotangents of them.
"""

from funcbayes.core.likelihoods.base import Likelihood, check_likelihood
from funcbayes.core.likelihoods.bernoulli import Bernoulli
from funcbayes.core.likelihoods.categorical import Categorical
from funcbayes.core.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "check_likelihood",
]
