"""All comparisons with other libraries are in float64."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64():
    # By default, as some peers multiply with identities of the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
