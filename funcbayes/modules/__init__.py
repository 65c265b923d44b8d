"""The class interface: methods as `nn.Module` objects around a network.

Thin shells over the functions, for programs written against the published interface of these
classes; everything they do is also a function elsewhere in the library. Where that contract
differs from the conventions of the functions, the class says so and why.

What all of them share: `predict` evaluates all posterior samples through `funcbayes.predict`,
in evaluation mode, and changes nothing: no mode, no buffer, no parameter, no gradient, and no
global random state if it is given a key. Variances are unbiased, epistemic, and 0 for one sample.
"""

from funcbayes.modules.base import BaseBayesianMethod
from funcbayes.modules.dropout import MCDropout
from funcbayes.modules.ensemble import DeepEnsemble
from funcbayes.modules.laplace import LaplaceApproximation
from funcbayes.modules.swag import SWAG
from funcbayes.modules.variational import GaussianLinear, VariationalBayesNN

__all__ = [
    "SWAG",
    "BaseBayesianMethod",
    "DeepEnsemble",
    "GaussianLinear",
    "LaplaceApproximation",
    "MCDropout",
    "VariationalBayesNN",
]
