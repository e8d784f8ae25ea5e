"""A recorded run and its result -> report.png, for places that show no HTML."""

from pathlib import Path
from typing import Any

import numpy as np

from loadtest.judge.statistics import THROUGHPUT, values
from loadtest.record import Recorded
from loadtest.report.words import NAMES, headline

COLOURS = ("#0072b2", "#d55e00")  # told apart by colour-blind readers too
RATIO_COLOURS = ("#009e73", "#cc79a7", "#56b4e9")


def draw(path: Path, recorded: Recorded, result: dict[str, Any]) -> None:
    """Distributions of TTFT and TPOT, and every block pair's ratios."""
    from matplotlib.figure import Figure  # an optional extra, needed for --out only

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *distributions, pairs = figure.subplots(1, 3)
    output_tokens = recorded.about["plan"]["output_tokens"]
    for axes, metric in zip(distributions, ("ttft", "tpot"), strict=True):
        for variant, colour in zip(recorded.variants, COLOURS, strict=True):
            requests = [r for block in recorded.blocks_of(variant) for r in block.requests]
            found = values(requests, metric, output_tokens)
            known = 1e3 * found[np.isfinite(found)]
            shares = (1 + np.arange(len(known))) / max(len(found), 1)
            label = f"{variant} (n={len(found)}, {len(found) - len(known)} failed)"
            axes.step(known, shares, where="post", color=colour, label=label)
        axes.set(xlabel=f"{NAMES[metric]} (ms)", ylabel="share of requests", ylim=(0, 1.02))
        axes.legend()
    for metric, colour in zip(("ttft", "tpot", THROUGHPUT), RATIO_COLOURS, strict=True):
        per_pair = result["ratio"][metric]["per_block_pair"]
        numbers = range(1, len(per_pair) + 1)
        pairs.plot(numbers, per_pair, marker="o", color=colour, label=NAMES.get(metric, metric))
        speedup = result["speedups"].get("throughput" if metric == THROUGHPUT else f"{metric}_p50")
        if speedup and None not in speedup.values():
            pairs.axhspan(speedup["low"], speedup["high"], color=colour, alpha=0.15, linewidth=0)
    pairs.axhline(1, color="grey", linewidth=1)
    pairs.set(xlabel="block pair (bands: 95 % over the run)", ylabel="above 1: candidate better")
    pairs.xaxis.get_major_locator().set_params(integer=True)
    pairs.legend()
    figure.suptitle(headline(result), wrap=True, fontsize=11)
    figure.savefig(path, dpi=120)
