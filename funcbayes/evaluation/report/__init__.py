"""A comparison of methods as one HTML file that needs nothing beside it.

The figures' names, formats and explanations live here, so that the table in the terminal and
the one in the file agree. The file loads nothing: pictures, style and script are inside, and
its content security policy forbids the rest. Needs the extra `report`.
"""

import base64
import hashlib
import os
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from funcbayes.evaluation.plots import Points, Surface
from funcbayes.evaluation.report import svg
from funcbayes.evaluation.report.content import MethodReport, Prediction, Report
from funcbayes.evaluation.report.figures import METRICS, Cell, Column, Metric, columns
from funcbayes.evaluation.report.sections import is_finite, sections
from funcbayes.extras import needs_extra

with needs_extra("report"):
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

__all__ = [
    "METRICS",
    "Cell",
    "Column",
    "MethodReport",
    "Metric",
    "Points",
    "Prediction",
    "Report",
    "Surface",
    "columns",
    "write_html",
]


def write_html(path: Path, report: Report) -> None:
    """Writes the report as a single HTML file that loads nothing from anywhere.

    Args:
        path: file to write; replaced in one step.
        report: what to show.

    Raises:
        ValueError: there is no method, two have the same label, or a figure is not in
            `METRICS`.
    """
    labels = [method.label for method in report.methods]
    if not labels:
        raise ValueError("the report has no method, expected at least one")
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels of the methods are {labels}, expected different ones")
    environment = Environment(
        loader=PackageLoader("funcbayes.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("funcbayes.evaluation.report") / "templates"
    style = svg.palette_style() + (folder / "report.css").read_text(encoding="utf-8")
    script = (folder / "report.js").read_text(encoding="utf-8")
    table = columns(report.methods)
    page = environment.get_template("report.html.jinja").render(
        report=report,
        columns=table,
        groups=_groups(table),
        sections=list(sections(report)),
        unfinished=_unfinished(report),
        diverged=[m.label for m in report.methods if not is_finite(m.prediction)],
        choices=_choices(report),
        details={
            name.replace("_", " "): _text(value)
            for name, value in (report.versions | report.machine).items()
        },
        created=_readable_date(report.created),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
    )
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)


def _groups(table: list[Column]) -> list[tuple[str, int]]:
    """Headings over neighbouring columns, with the number of columns below each."""
    names = [column.metric.group for column in table]
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def _unfinished(report: Report) -> list[str]:
    """Which methods lack seeds, in words."""
    done = {
        method.label: max(map(len, method.metrics.values()), default=0) for method in report.methods
    }
    wanted = len(report.seeds)
    return [f"{label}: {num} of {wanted} seeds" for label, num in done.items() if num < wanted]


def _choices(report: Report) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """For each method with choices, their names and, for each seed, the value as text."""
    found = []
    for method in report.methods:
        names = dict.fromkeys(name for choices in method.choices for name in choices)
        rows = [
            (name.replace("_", " "), [_text(c[name]) if name in c else "–" for c in method.choices])
            for name in names
        ]
        if rows:
            found.append((method.label, rows))
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _readable_date(text: str) -> str:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{date.day} {date:%B %Y, %H:%M} {date.tzname() or ''}".strip()


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
