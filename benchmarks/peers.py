"""The other libraries, where they are installed. The package itself imports none of them."""

import importlib
import warnings
from functools import cache
from types import ModuleType

from funcbayes.cli.bench.timing import one_line

# The baseline of every ratio: the original class interface, which runs one Python
# iteration for each posterior sample and for each datum.
BASELINE = "incerto"


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The module and "", or None and why it cannot be imported."""
    with warnings.catch_warnings():
        # Deprecations that importing a peer runs into are not ours to mend.
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name), ""
        except ModuleNotFoundError as error:
            if error.name and name.split(".")[0] == error.name:
                return None, "not installed"
            return None, one_line(error)
        except Exception as error:
            # A peer may be installed beside a torch that it does not load with.
            return None, one_line(error)
