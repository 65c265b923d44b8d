"""Exceptions of the library; everything else raises `ValueError` or `TypeError`."""


class NotFittedError(RuntimeError):
    """A posterior or a prediction was asked for before any data was seen."""
