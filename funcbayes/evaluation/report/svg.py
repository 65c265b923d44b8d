"""Pictures inside a page: SVG whose colours follow the reader's light or dark scheme."""

import base64
import io
import re
import warnings
from typing import NamedTuple

from funcbayes.evaluation.plots import style
from funcbayes.extras import needs_extra

with needs_extra("report"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

# From a name to the colour of the pictures and its counterpart on a dark page.
PALETTE = {
    "paper": (style.PAPER, "#14171a"),
    "ink": (style.INK, "#e8eaed"),
    "muted": (style.MUTED, "#a0a9b4"),
    "grid": (style.GRID, "#30363d"),
    "blue": (style.BLUE, "#4aa8e0"),
    "vermilion": (style.VERMILION, "#f0813a"),
    "green": (style.GREEN, "#2fbf8f"),
    "orange": (style.ORANGE, "#e0a526"),
    "purple": (style.PURPLE, "#d98cbb"),
    "sky": (style.SKY, "#8fcdf2"),
}


class Image(NamedTuple):
    """A picture for an `img` element.

    Attributes:
        uri: data URI.
        width: natural width, CSS pixels.
        height: natural height, CSS pixels.
    """

    uri: str
    width: int
    height: int


def palette_style() -> str:
    """CSS that defines each colour of the palette, `--ink` for "ink", in both schemes."""

    def rule(scheme: int) -> str:
        colors = (f"--{name}:{pair[scheme]}" for name, pair in PALETTE.items())
        return f":root{{{';'.join(colors)}}}"

    return f"{rule(0)}@media screen and (prefers-color-scheme:dark){{{rule(1)}}}"


def image(figure: Figure) -> Image:
    """Draws a figure as an SVG that takes its font and its colours from the reader's system.

    Args:
        figure: one of `plots`; only the colours of the palette change with the scheme.
    """
    file = io.StringIO()
    # Text stays text: smaller than outlines, and in the font of the page. No date and a fixed
    # salt: the same figure gives the same file.
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "funcbayes"}),
        warnings.catch_warnings(),
    ):
        # The font that measures the text lacks some scripts, the reader's system does not.
        warnings.filterwarnings("ignore", message="Glyph")
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", facecolor="none", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    # matplotlib writes a list with its own font in front.
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = text.replace("<defs>", f"<style>{palette_style()}</style><defs>", 1)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    encoded = base64.b64encode(text.encode()).decode()
    return Image(f"data:image/svg+xml;base64,{encoded}", width, height)
