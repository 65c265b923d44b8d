"""The laws of the library as functions: they return nothing, or raise an AssertionError."""

from funcbayes.testing.laws.density import check_log_prob_matches_samples
from funcbayes.testing.laws.keys import check_key_determinism
from funcbayes.testing.laws.moments import check_sampling_moments
from funcbayes.testing.laws.predictions import check_chunk_invariant, check_vectorised_equals_loop
from funcbayes.testing.laws.purity import check_pure
from funcbayes.testing.laws.states import (
    check_checkpoint_round_trip,
    check_compiles,
    check_merge,
    check_state_vmappable,
)

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
]
