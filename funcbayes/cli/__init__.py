"""The command line: `funcbayes compare` and what it is made of."""

from funcbayes.cli.commands import main

__all__ = ["main"]
