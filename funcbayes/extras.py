"""What happens where an optional dependency is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turns a failed import inside the block into one sentence that says what to install.

    Args:
        extra: the extra of this package that brings the modules imported in the block.

    Raises:
        ModuleNotFoundError: with the command that installs the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise ModuleNotFoundError(
            f"{package} is not installed: run `pip install 'funcbayes[{extra}]'`",
            name=error.name,
        ) from None
