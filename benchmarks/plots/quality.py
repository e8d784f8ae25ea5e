"""Records of trained and pruned models -> plots of what zeros cost in quality."""

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.tables.records import losses_above, read
from cast_serve.intervals import series_stderr

TEXTS = {"wiki": "Wikipedia text", "c4": "C4"}
# How a series is drawn, and its records by stored bits a weight: 16 N / 64 and 1 for the bitmask.
ZEROS: dict[str, tuple[str, dict[float, str]]] = {
    "2:4, one-shot": ("C1D:", {9: "zen4-solved-2-4"}),
    "N of 64, one-shot": (
        "C0o:",
        {
            8: "zen4-solved-28-64",
            9: "zen4-solved-32-64",
            10: "zen4-solved-36-64",
            11: "zen4-solved-40-64",
            13: "zen4-solved-48-64",
        },
    ),
    "an N for each linear, one-shot": (
        "C2^:",
        {
            8: "zen4-budget-56",
            9: "zen4-budget-50",
            10: "zen4-budget-44",
            11: "zen4-budget-37",
            13: "zen4-budget-25",
        },
    ),
    "2:4, 41 thousand tokens": ("C1D-", {9: "zen4-trained-2-4"}),
    "N of 64, 41 thousand tokens": (
        "C0o-",
        {
            8: "zen4-trained-28-64",
            9: "zen4-trained-32-64",
            10: "zen4-trained-36-64",
            11: "zen4-trained-40-64",
            13: "zen4-trained-48-64",
        },
    ),
    "an N for each linear, 41 thousand tokens": (
        "C2^-",
        {
            8: "zen4-trained-budget-56",
            9: "zen4-trained-budget-50",
            10: "zen4-trained-budget-44",
            11: "zen4-trained-budget-37",
            13: "zen4-trained-budget-25",
        },
    ),
    "2:4, 4 million tokens": ("C3*-", {9: "hidden-4m"}),
}
CURVES = {  # by style
    "C1D-": ("long", "2:4"),
    "C0o-": ("long-hidden", "2:4, hidden states distilled"),
    "C3*-": ("hidden-4m", "the same, 4 million tokens"),
    "C2^-": ("long-45", "2:4 with 45 % zeros"),
    "C4s-": ("dense-4m", "dense, fine-tuned on the same text"),
}
BITS = {  # a quantised model and itself in 16 bits
    "8 bits, linears and head": ("int8", "sparse"),
    "4 bits, rounded to nearest": ("long-int4-rounded", "long"),
    "4 bits, scale groups of 128": ("long-int4", "long"),
    "4 bits, scale groups of 64": ("long-int4-64", "long"),
    "the same, 45 % zeros": ("long-hidden-45-int4-64", "long-hidden-45"),
    "the same, 4 million tokens": ("hidden-4m-int4-64", "hidden-4m"),
    "its last steps trained in 4 bits": ("hidden-4m-4-bits", "hidden-4m"),
}
MASKS = {  # a mask that gates learnt and Wanda's
    "300 steps of gates, weights frozen": ("mask-300-32-64", "zen4-solved-32-64"),
    "then 100 steps of weights each": ("learnt-100-32-64", "wanda-100-32-64"),
    "400 steps each, gates and weights": ("learnt-100-32-64", "wanda-400-32-64"),
    "40 steps each, an N for each linear": ("demo-cast-warm", "demo-fixed"),
    "40 steps each, 32:64, another seed": ("gates-32-64-seed-1", "fixed-32-64-seed-1"),
}


def zeros(records: Path) -> Figure:
    """Perplexity over the dense model's by stored bits a weight; hollow: pruned in one shot."""
    figure = Figure(figsize=(8, 4.4))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (text, title) in zip(panels, TEXTS.items(), strict=True):
        for name, (style, models) in ZEROS.items():
            ratios = [
                math.exp(_nats(records, model, "dense", text)[0]) for model in models.values()
            ]
            face = "none" if "one-shot" in name else None
            axes.plot(list(models), ratios, style, markerfacecolor=face, label=name)
        _log_ticks(axes, [1, 1.2, 1.5, 2, 3, 4])
        axes.set(title=title, xlabel="stored bits a weight, values in 16 bits")
    panels[0].set(ylabel="times dense's perplexity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def tokens(records: Path) -> Figure:
    """Perplexity on the first 8,176 tokens of Wikipedia text by training tokens."""
    figure = Figure(figsize=(8, 3.8))
    axes = figure.subplots()
    for style, (name, title) in CURVES.items():
        curve = read(records / f"curves/{name}.json")["curve"]
        num_millions = [point["tokens"] / 1e6 for point in curve]
        axes.plot(num_millions, [point["perplexity"] for point in curve], style, label=title)
    _log_ticks(axes, [18, 20, 22, 24, 26, 28, 30, 32])
    axes.set(xlabel="training tokens, millions", ylabel="perplexity, 8,176 tokens", xlim=(0, None))
    axes.legend(loc="upper right")
    return figure


def bits(records: Path) -> Figure:
    """Perplexity that 8 and 4 bits add to 2:4 models."""
    figure = Figure()
    axes = figure.subplots()
    _pairs(axes, records, BITS)
    axes.set(
        xlabel="log perplexity above the same model in 16 bits, nats (± 2 standard errors)",
        xlim=(0, None),
    )
    return figure


def masks(records: Path) -> Figure:
    """A mask that gates learnt against Wanda's, both 32:64; left of 0 the learnt one is better."""
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    _pairs(axes, records, MASKS)
    axes.axvline(0, color="C4")
    axes.set(xlabel="log perplexity of the learnt mask above Wanda's, nats (± 2 standard errors)")
    return figure


def _pairs(axes: Axes, records: Path, pairs: Mapping[str, tuple[str, str]]) -> None:
    """A line a pair, each text's mean difference with two standard errors on either side."""
    for colour, (text, title) in enumerate(TEXTS.items()):
        for line, (model, other) in enumerate(pairs.values()):
            if not (records / f"perplexity/{model}-{text}.json").exists():
                continue
            nats, error = _nats(records, model, other, text)
            label = title if line == 0 else None
            y = line + 0.2 * colour - 0.1
            axes.errorbar(
                nats, y, xerr=2 * error, fmt="os"[colour], color=f"C{colour}", label=label
            )
    axes.set_yticks(range(len(pairs)), list(pairs))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend()


def _nats(records: Path, model: str, other: str, text: str) -> tuple[float, float]:
    """Log perplexity of a model above another's on the same blocks, and its standard error."""
    folder = records / "perplexity"
    above = losses_above(folder / f"{model}-{text}.json", folder / f"{other}-{text}.json")
    return statistics.fmean(above), series_stderr(above) or math.nan


def _log_ticks(axes: Axes, ticks: list[float]) -> None:
    axes.set_yscale("log")
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


PLOTS: dict[str, Callable[[Path], Figure]] = {
    "zeros": zeros,
    "tokens": tokens,
    "bits": bits,
    "masks": masks,
}
