"""Hypothesis profiles, and the skip of CUDA tests where there is no CUDA device."""

import os

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline and no "too slow": a first call pays for torch's lazy initialisation,
# and every call for the run-time shape checks.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

# The same examples on every run: what fails in CI fails at home.
settings.register_profile("fast", max_examples=25, derandomize=True, **_COMMON)
# New examples on every run, and what reproduces a failure printed with it.
settings.register_profile("slow", max_examples=300, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("FUNCBAYES_HYPOTHESIS_PROFILE", "fast"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def unchecked():
    """Lets arguments of a wrong type past the shape hook, to the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
