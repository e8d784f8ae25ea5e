"""A study's rows -> their summary, a table in Markdown and a plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The figures that report.png shows as bars, one per way, beside the perplexities.
BARS = {
    "recovered": "share of the log gap recovered,\none-shot Wanda to dense",
    "step_s": "seconds per step, median",
    "peak_memory_mb": "peak memory, MB",
}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Way -> mean and range over its seeds.

    ``recovered`` is the share of the gap in log perplexity between one-shot Wanda (0) and the dense
    model before any training (1) that the way closes. It may exceed 1, since the ways train.
    """
    single = {row["way"]: row["perplexity"] for row in rows if row["seed"] is None}
    gap = math.log(single["wanda"]) - math.log(single["before"])
    summary: dict[str, dict[str, Any]] = {
        row["way"]: {"perplexity": row["perplexity"], "num_seeds": 0, **_answers([row])}
        for row in rows
        if row["seed"] is None
    }
    for way in dict.fromkeys(row["way"] for row in rows if row["seed"] is not None):
        runs = [row for row in rows if row["way"] == way and row["seed"] is not None]
        step_s = [row["step_s"] for row in runs if row["step_s"] is not None]
        hard = [row["perplexity"] for row in runs]
        mean = statistics.fmean(hard)
        summary[way] = {
            "perplexity": mean,
            "perplexity_min": min(hard),
            "perplexity_max": max(hard),
            "recovered": (math.log(single["wanda"]) - math.log(mean)) / gap if gap else None,
            "soft_to_hard": statistics.fmean(
                row["perplexity"] / row["perplexity_soft"] - 1 for row in runs
            ),
            "flipped_share": statistics.fmean(row["flipped_share"] for row in runs),
            "step_s": statistics.median(step_s) if step_s else None,
            **_cpu_seconds(runs),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in runs),
            "tokens": runs[0]["tokens"],
            "num_seeds": len(runs),
            **_answers(runs),
        }
    return summary


def _cpu_seconds(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Their mean; of a study that an earlier version began, some runs have none."""
    if not all("cpu_s" in row for row in runs):
        return {}
    return {"cpu_s": statistics.fmean(row["cpu_s"] for row in runs)}


def _answers(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean KL and accuracies of runs that have them; a standard error is that of one run."""
    if not all("choices" in row for row in runs):
        return {}
    return {
        "kl_nats_per_token": statistics.fmean(row["kl_nats_per_token"] for row in runs),
        "choices": {
            name: {
                key: None if None in values else statistics.fmean(values)
                for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
                for values in [[row["choices"][name][key] for row in runs]]
            }
            for name in runs[0]["choices"]
        },
    }


def table_of(result: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    summary = result["summary"]
    asked = list(dict.fromkeys(name for row in summary.values() for name in row.get("choices", {})))
    head = ["way", "tokens", "perplexity, mean (range of seeds)", "recovered of the log gap"]
    head += ["soft to hard", "mask flipped", "s per step", "CPU s per run", "peak MB"]
    head += ["KL, nats per token", *(f"{name} acc_norm" for name in asked)] if asked else []
    table = [head, ["---"] * len(head)]
    for way, row in sorted(summary.items(), key=lambda item: item[1]["perplexity"]):
        if row["num_seeds"]:
            recovered = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
            cells = [
                way,
                str(row["tokens"]),
                f"{row['perplexity']:.2f} ({row['perplexity_min']:.2f} to "
                f"{row['perplexity_max']:.2f}, n={row['num_seeds']})",
                recovered,
                f"{row['soft_to_hard']:+.2%}",
                f"{row['flipped_share']:.1%}",
                "" if row["step_s"] is None else f"{row['step_s']:.2f}",
                f"{row['cpu_s']:.0f}" if "cpu_s" in row else "",
                f"{row['peak_memory_mb']:.0f}",
            ]
        else:
            name = "dense, as given" if way == "before" else f"one-shot {way}"
            cells = [name, "0", f"{row['perplexity']:.2f}", "", "", "", "", "", ""]
        if asked:
            cells.append(f"{row['kl_nats_per_token']:.3f}" if "choices" in row else "")
            for name in asked:
                found = row.get("choices", {}).get(name)
                stderr = found and found["acc_norm_stderr"]
                error = "" if stderr is None else f" +- {stderr:.3f}"
                cells.append(f"{found['acc_norm']:.3f}{error}" if found else "")
        table.append(cells)
    text = f"{result['model']}, trained on {', '.join(result['text'])}, measured on "
    return (
        f"{text}{result['heldout']}.\n\n"
        + "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        + "\n"
    )


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draws the curves and, of every way, the last perplexities and BARS.

    Args:
        path: an image to write, by its suffix.
        result: as `study.run` returns it.
    """
    from matplotlib.figure import Figure

    trained = [row for row in result["runs"] if row["seed"] is not None]
    ways = list(dict.fromkeys(row["way"] for row in trained))
    summary = result["summary"]
    figure = Figure(figsize=(15, 5 + 0.3 * len(ways)), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(4, 1 + 0.3 * len(ways)))
    curves = figure.add_subplot(grid[0, :])
    ends = figure.add_subplot(grid[1, 0])
    for number, way in enumerate(ways):
        runs = [row for row in trained if row["way"] == way]
        style = "-" if number < 10 else "--"
        for row in runs:
            curves.plot(
                [point["tokens"] for point in row["curve"]],
                [point["perplexity"] for point in row["curve"]],
                style,
                color=f"C{number % 10}",
                alpha=0.7,
                label=way if row is runs[0] else None,
            )
        ends.scatter(
            [row["perplexity"] for row in runs], [number] * len(runs), color=f"C{number % 10}"
        )
    for draw_line in (curves.axhline, ends.axvline):
        draw_line(summary["before"]["perplexity"], color="grey", linewidth=1)
        draw_line(summary["wanda"]["perplexity"], color="grey", linewidth=1, linestyle=":")
    curves.set(
        xlabel="training tokens",
        ylabel="held-out perplexity in the model's phase",
        yscale="log",
        title="grey: dense as given; dotted: one-shot Wanda",
    )
    curves.legend(fontsize=7)
    ends.set_yticks(range(len(ways)), ways)
    ends.set(xlabel="perplexity of the exact N:M model,\na dot per seed")
    for column, (key, label) in enumerate(BARS.items(), 1):
        bars = figure.add_subplot(grid[1, column], sharey=ends)
        colors = [f"C{number % 10}" for number in range(len(ways))]
        bars.barh(range(len(ways)), [summary[way][key] or 0.0 for way in ways], color=colors)
        bars.tick_params(labelleft=False)
        bars.set(xlabel=label)
    figure.savefig(path, dpi=120)
