"""Records of benchmarks.peers -> quality against bytes, and against TPOT, of each server.

Of SmolLM2-135M perplexity: down and left is better, and servers without one are left out. Of
Qwen2.5-Coder-1.5B the problems of HumanEval that it solves: up and left is better.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.tables.records import read

SOLVED = {  # by server of peers-coder-1.5b-forms.json: its record in tasks/, and the variant there
    "dense": ("coder-1.5b-dense", "dense"),
    "int8-48": ("coder-1.5b-int8", "int8"),
    "int4-64": ("coder-1.5b-forms", "int4-64"),
    "int4-40": ("coder-1.5b-forms", "int4-40"),
    "file:native+fa": ("coder-1.5b-dense", "dense"),  # holds the very weights
    "q3_k_s:native+fa": ("coder-1.5b-q3_k_s", "q3_k_s"),
}
TITLES = {"file:native+fa": "Q4_K_M", "q3_k_s:native+fa": "Q3_K_S"}


def perplexity(records: Path) -> Figure:
    found = read(records / "peers-intel.json")
    figure = Figure(figsize=(8, 3.4))
    by_bytes, by_time = figure.subplots(1, 2, sharey=True)
    for server in found["servers"].values():
        if "perplexity" not in server:
            continue
        title = server["title"].removesuffix(", flash attention").replace("'s decode", "")
        colour = "C0o" if title.startswith("vLLM") else "C1s"
        for axes, value in (
            (by_bytes, server["weight_bytes"] / 1e6),
            (by_time, server["tpot_ms"]),
        ):
            axes.plot(value, server["perplexity"], colour)
            place = (value, server["perplexity"])
            axes.annotate(title, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    plan = found["plan"]
    num_tokens = plan["blocks"] * (plan["block_size"] - 1)
    by_bytes.set(xlabel="weights, MB", ylabel=f"perplexity, first {num_tokens:,} tokens")
    by_time.set(xlabel="TPOT, ms, one request at a time")
    for axes in (by_bytes, by_time):
        axes.set_xlim(0, 1.4 * axes.get_xlim()[1])  # with room for the names
        axes.margins(y=0.12)
    figure.suptitle(f"SmolLM2-135M, {_machine(found)}", fontsize=10)
    return figure


def solved(records: Path) -> Figure:
    """pass@1 with its interval; a line joins the servers that none beats in both.

    Hollow: measured on the dense model, which has the file's weights.
    """
    found = read(records / "peers-coder-1.5b-forms.json")
    figure = Figure(figsize=(8, 3.6))
    for axes, key, unit, ticks, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("weight_bytes", "tpot_ms"),
        (1e6, 1),
        ([800, 1200, 2000, 3500], [30, 40, 60, 100, 150]),
        ("files, MB", "TPOT, ms, one request at a time"),
        strict=True,
    ):
        places = {}
        for name, (record, variant) in SOLVED.items():
            shares = read(records / f"tasks/{record}.json")["variants"][variant]
            places[name] = (found["servers"][name][key] / unit, 100 * shares["pass_at_1"])
            spread = [[100 * abs(shares[end] - shares["pass_at_1"])] for end in ("low", "high")]
            style = "C1s" if name in TITLES else "C0o"
            face = "none" if name.startswith("file") else None
            line = {"fmt": style, "markerfacecolor": face, "elinewidth": 0.8}
            axes.errorbar(*places[name], yerr=spread, **line)
            title = TITLES.get(name, name)
            place = (5, 4) if name in TITLES else (5, -11)  # dots of both kinds lie close
            axes.annotate(title, places[name], xytext=place, textcoords="offset points", fontsize=8)
        best = [
            p for p in places.values() if not any(_beats(other, p) for other in places.values())
        ]
        axes.plot(*zip(*sorted(best), strict=True), "C4--", zorder=0)
        axes.set(xlabel=label, xscale="log")
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.2)
    figure.axes[0].set(ylabel="HumanEval solved, %")
    figure.suptitle(f"Qwen2.5-Coder-1.5B, {_machine(found)}", fontsize=10)
    return figure


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether it costs no more, solves no less, and is not the same place."""
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def _machine(found: Mapping[str, Any]) -> str:
    machine = found["machine"]  # a virtual one may hide the name, but not family and model
    cores = f"{found['cores']} core{'s' if found['cores'] > 1 else ''}"
    return f"{cores} of {machine['cpu']} (family {machine['family']}, model {machine['model']})"


PLOTS: dict[str, Callable[[Path], Figure]] = {"peers": perplexity, "coder": solved}
