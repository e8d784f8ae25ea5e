"""Records of `cast-loadtest kernels` -> plots of how much faster the sparse ops are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables.records import read


def over_vllm(records: Path) -> Figure:
    """2:4 in 16, 8 and 4 bits against vLLM's bf16 op, a panel for each CPU."""
    cpus = {
        "Zen 4": ("kernels", "kernels-int8", "kernels-int4"),
        "Zen 5": ("kernels-zen5", "kernels-zen5-int8", "kernels-zen5-int4"),
        "Intel with AMX": ("kernels-amx", "kernels-amx-int8-read", "kernels-amx-int4"),
    }
    figure = Figure()
    panels = figure.subplots(1, len(cpus), sharey=True)
    for axes, (cpu, names) in zip(panels, cpus.items(), strict=True):
        for colour, name in enumerate(names):
            record = read(records / f"{name}.json")
            _draw(axes, record, "vllm", f"{record['weights']}, 2:4", colour)
        _finish(axes, cpu)
    panels[0].set(ylabel="speed-up over vLLM's bf16 op (×)", ylim=(0, None))
    panels[0].legend(loc="upper right")
    return figure


def n_of_64(records: Path) -> Figure:
    """32:64 against 2:4, and both against vLLM's int8 op, a row of one run's ops for each CPU."""
    cpus = {
        "Zen 4": "kernels-64-{}",
        "Zen 5": "kernels-64-zen5-{}",
        "Intel with AMX": "kernels-64-amx-{}",
    }
    figure = Figure(figsize=(8, 9.4))
    panels = figure.subplots(len(cpus), 2, sharey="col")
    for (beside_24, beside_int8), (cpu, name) in zip(panels, cpus.items(), strict=True):
        for colour, weights in enumerate(("bf16", "int8", "int4")):
            record = read(records / f"{name.format(weights)}.json")
            _draw(beside_24, record, "sparse24", f"{weights}, 32:64", colour)
            if weights != "bf16":
                _draw(beside_int8, record, "vllm_int8", f"{weights}, 32:64", colour)
                _draw(beside_int8, record, "vllm_int8", f"{weights}, 2:4", colour, of="sparse24")
        for axes, other in ((beside_24, "2:4 in the same bits"), (beside_int8, "vLLM's int8 op")):
            _finish(axes, cpu)
            axes.set(ylabel=f"speed-up over {other} (×)", ylim=(0, None))
    for axes in panels[0]:
        axes.legend()
    return figure


def _draw(
    axes: Axes, record: dict[str, Any], over: str, label: str, colour: int, of: str = ""
) -> None:
    """A line through the geometric means over the shapes; bars: the least and greatest shape.

    Args:
        axes: what is drawn on.
        record: of `cast-loadtest kernels`.
        over: the op whose time is divided, as in the record's `ratio_...`.
        label: in the legend.
        colour: which of the style's.
        of: the op by whose time it is divided; "": the sparse one.
    """
    tokens = [int(number) for number in record[f"geomean_ratio_{over}"]]
    means = []
    below, above = [], []
    for number in tokens:
        mean = record[f"geomean_ratio_{over}"][str(number)]
        rows = [row for row in record["results"] if row["num_tokens"] == number]
        ratios = [row[f"ratio_{over}"] for row in rows]
        if of:
            mean /= record[f"geomean_ratio_{of}"][str(number)]
            ratios = [row[f"ratio_{over}"] / row[f"ratio_{of}"] for row in rows]
        means.append(mean)
        below.append(mean - min(ratios))
        above.append(max(ratios) - mean)
    apart = 1 + 0.06 * (colour - 1)  # so that bars do not hide each other
    axes.errorbar(
        [number * apart for number in tokens],
        means,
        [below, above],
        label=label,
        color=f"C{colour}",
        linestyle="--" if of else "-",
        marker="o",
        markersize=4,
        elinewidth=1,
        capsize=2,
    )


def _finish(axes: Axes, title: str) -> None:
    """A line at 1, and the numbers of tokens that were measured."""
    axes.axhline(1, color="C4", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 8, 16, 64, 256], ["1", "4", "8", "16", "64", "256"])
    axes.set(title=title, xlabel="tokens")


PLOTS: dict[str, Callable[[Path], Figure]] = {"kernels": over_vllm, "kernels-64": n_of_64}
