"""What the command line reports in one sentence instead of a traceback."""


class UsageError(Exception):
    """An argument that does not fit; the message says which, and what to do."""
