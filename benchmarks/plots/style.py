"""How every plot looks: one set of rcParams for light pages and one for dark ones.

Draw with the colours "C0" to "C4" and set no other: they change with the page, and C0 to C3 differ
for colour-blind readers too. C4 is grey, for what others are compared with.
"""

from typing import Any

from cycler import cycler


def _style(foreground: str, grid: str, colours: list[str]) -> dict[str, Any]:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": foreground,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": foreground,
        "axes.prop_cycle": cycler(color=colours),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "none",
        "figure.figsize": (8, 3.6),
        "font.size": 9,
        "grid.color": grid,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "cast-serve",  # so ids follow from what is drawn
        "text.color": foreground,
        "xtick.color": foreground,
        "ytick.color": foreground,
    }


STYLES = {  # by what follows the plot's name in the file's
    "": _style("#333333", "#e0e0e0", ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777"]),
    "-dark": _style("#cccccc", "#444444", ["#56b4e9", "#e69f00", "#2bc9a0", "#dd99c4", "#999999"]),
}
