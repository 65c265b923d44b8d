"""The laws of the library as functions, and hypothesis strategies, for posteriors of one's own.

Laws need torch and NumPy only. `funcbayes.testing.strategies` needs hypothesis, and is imported
when it is asked for.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from funcbayes.testing import networks
from funcbayes.testing.laws import (
    check_checkpoint_round_trip,
    check_chunk_invariant,
    check_compiles,
    check_key_determinism,
    check_log_prob_matches_samples,
    check_merge,
    check_pure,
    check_sampling_moments,
    check_state_vmappable,
    check_vectorised_equals_loop,
)

if TYPE_CHECKING:
    from funcbayes.testing import strategies

__all__ = [
    "check_checkpoint_round_trip",
    "check_chunk_invariant",
    "check_compiles",
    "check_key_determinism",
    "check_log_prob_matches_samples",
    "check_merge",
    "check_pure",
    "check_sampling_moments",
    "check_state_vmappable",
    "check_vectorised_equals_loop",
    "networks",
    "strategies",
]


def __getattr__(name: str) -> ModuleType:
    if name != "strategies":
        raise AttributeError(f"module 'funcbayes.testing' has no attribute {name!r}")
    return import_module("funcbayes.testing.strategies")
