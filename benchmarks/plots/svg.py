"""Every plot by name, and the text of its SVG files."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.plots import kernels, peers, quality
from benchmarks.plots.style import STYLES

PLOTS: dict[str, Callable[[Path], Figure]] = {
    **quality.PLOTS,
    **kernels.PLOTS,
    **peers.PLOTS,
}


def files(name: str, records: Path) -> dict[str, str]:
    """A plot's files, name -> SVG: the same text from the same records and matplotlib.

    Args:
        name: a key of PLOTS.
        records: benchmarks/records.
    """
    texts = {}
    for suffix, style in STYLES.items():
        file = StringIO()
        with rc_context(style):
            PLOTS[name](records).savefig(file, format="svg", metadata={"Date": None})
        lines = (line.rstrip() for line in file.getvalue().splitlines())
        texts[f"{name}{suffix}.svg"] = "\n".join(lines) + "\n"
    return texts
