"""Colours, lines, markers and type that all pictures share."""

import numpy as np
from torch import Tensor

from funcbayes.extras import needs_extra

with needs_extra("report"):
    from matplotlib.axes import Axes

PAPER, INK, MUTED, GRID = "#ffffff", "#22262b", "#626b77", "#e1e5ea"

# The palette of Okabe and Ito, its light colours darkened to a contrast of 3 with white.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#00845f"

ORANGE, PURPLE, SKY = "#b37800", "#b3588f", "#2f93cc"

# A line keeps its dashes and its marker without its colour.
LINES = (
    (INK, (0, (1, 1.2)), "o"),
    (BLUE, "-", "s"),
    (VERMILION, (0, (5, 1.5)), "^"),
    (GREEN, (0, (5, 1.5, 1, 1.5)), "D"),
    (PURPLE, "-", "v"),
    (ORANGE, (0, (3, 1)), "P"),
    (SKY, (0, (5, 1.2, 1, 1.2, 1, 1.2)), "X"),
)

# A marker for each class, and the character that looks like it.
MARKERS = tuple(zip("o^sDvPX*", "○▲□◆▽✚✕★", strict=True))

# On top of a map, which looks the same on paper of any colour.
WHITE, BLACK = "#fdfdfd", "#111315"


def style_axes(axes: Axes) -> None:
    """Leaves two spines and a quiet horizontal grid."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, length=3)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def shortened(text: str, length: int) -> str:
    """At most `length` characters of a name from outside, safe to draw."""
    # Neither SVG nor a line of text holds control characters; a dollar sign begins a formula.
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def percent(share: float, _: float) -> str:
    """Formats a tick of a share."""
    return f"{100 * share:.3g} %"


def signed_percent(share: float, _: float) -> str:
    """Formats a tick of a difference of shares."""
    return f"{100 * share:+.3g} %".replace("-", "−") if share else "0 %"


def array(values: Tensor) -> np.ndarray:
    """Values as float64, without their gradient, on the CPU."""
    return values.detach().double().cpu().numpy()
