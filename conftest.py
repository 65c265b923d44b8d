"""Runs the Python blocks of Markdown files as tests.

A file's blocks share one namespace and run in order, so the README reads, and is
tested, as one session. Docstring examples are left to pytest's own doctest.
"""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/**/*.md", "docs/*.md"],
).pytest()
