"""A dense model + text -> every way of learning the pattern, at equal tokens and seeds, compared.

Each run is a `cast-train run` of its own, in a process of its own, so that time and memory are its
own too. Its figures go to OUT/results.jsonl as soon as it is done and its weights are removed; a
study that was stopped goes on where it was. In the end:

result.json    all figures, and their summary
report.md      the table
report.png     perplexity against tokens, and the last perplexity of every seed
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_train.config import TrainConfig

# Name -> what it changes in the study's common settings.
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "fixed wanda mask": {"hard_fraction": 0.0, "tau_end_fraction": 0.0, "blend_end_fraction": 0.0},
    "ste": {"method": "ste", "start": "magnitude"},
    "ste, wanda scores": {"method": "ste"},
    "soft_topk": {},
    "gumbel": {"selector": "gumbel"},
    "penalty": {"selector": "penalty", "gate_learning_rate": 0.1},
    "generator": {"selector": "generator"},
    "adams": {"method": "adams"},
    "soft_topk, distilled": {"distillation_weight": 0.5},
    "fixed wanda mask, distilled": {
        "hard_fraction": 0.0,
        "tau_end_fraction": 0.0,
        "blend_end_fraction": 0.0,
        "distillation_weight": 0.5,
    },
}
ONESHOT = ("magnitude", "wanda")


class StudyError(RuntimeError):
    """A run of the study failed."""


def ways_of(text: str | None) -> list[str]:
    """Parses ``ste;soft_topk`` (names may hold commas); None: all.

    Raises:
        ValueError: naming the known ones.
    """
    if text is None:
        return list(WAYS)
    names = [name.strip() for name in text.split(";")]
    if unknown := [name for name in names if name not in WAYS]:
        raise ValueError(
            f"--ways has {', '.join(map(repr, unknown))}; choose from {'; '.join(WAYS)}"
        )
    return names


def run(
    model: Path,
    text_files: Sequence[Path],
    heldout: Path,
    out: Path,
    settings: Mapping[str, Any],
    ways: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Runs what is not in OUT/results.jsonl yet, and writes the report over all of it.

    Args:
        model: dense HF directory.
        text_files: training text, UTF-8.
        heldout: text to measure on.
        out: directory; may hold an unfinished study of the same settings.
        settings: of TrainConfig, common to all ways.
        ways: names out of WAYS.
        seeds: each way runs once per seed.

    Raises:
        ValueError: for a wrong setting, or if out holds another study.
        StudyError: if a run fails; what is done stays done.
    """
    configs = {
        (way, seed): TrainConfig.from_dict({**settings, **WAYS[way], "seed": seed})
        for way in ways
        for seed in seeds
    }
    identity = {
        "model": model.resolve().name,
        "text": [path.name for path in text_files],
        "heldout": heldout.name,
        "settings": dict(settings),
    }
    _check_identity(out, identity)
    done = {(row["way"], row["seed"]): row for row in _read_rows(out)}
    for method in ONESHOT:
        if (method, None) not in done:
            done[method, None] = _append(out, _oneshot(model, text_files, heldout, out, method))
    if ("before", None) not in done:
        perplexity = _evaluate(model, heldout, out)
        done["before", None] = _append(
            out, {"way": "before", "seed": None, "perplexity": perplexity}
        )
    for number, ((way, seed), config) in enumerate(configs.items(), 1):
        if (way, seed) not in done:
            print(f"study: run {number} of {len(configs)}: {way}, seed {seed}", flush=True)
            row = _train(model, text_files, heldout, out, way, config)
            done[way, seed] = _append(out, row)
    result = {
        **identity,
        "runs": list(done.values()),
        "summary": summarise(list(done.values())),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(table_of(result), encoding="utf-8")
    _draw(out / "report.png", result)
    return result


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Way -> mean and range over its seeds.

    ``recovered`` is the share of the gap in log perplexity between one-shot Wanda (0) and the dense
    model before any training (1) that the way closes; above 1 is possible, since it trains.
    """
    single = {row["way"]: row["perplexity"] for row in rows if row["seed"] is None}
    gap = math.log(single["wanda"]) - math.log(single["before"])
    summary: dict[str, dict[str, Any]] = {
        way: {"perplexity": perplexity, "num_seeds": 0} for way, perplexity in single.items()
    }
    for way in dict.fromkeys(row["way"] for row in rows if row["seed"] is not None):
        runs = [row for row in rows if row["way"] == way]
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
            "step_s": statistics.median(row["step_s"] for row in runs),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in runs),
            "tokens": runs[0]["tokens"],
            "num_seeds": len(runs),
        }
    return summary


def table_of(result: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        f"{result['model']}, trained on {', '.join(result['text'])}, measured on "
        f"{result['heldout']}.",
        "",
        "| way | tokens | perplexity, mean (range of seeds) | recovered of the log gap | soft to "
        "hard | mask flipped | s a step | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, row in sorted(result["summary"].items(), key=lambda item: item[1]["perplexity"]):
        if not row["num_seeds"]:
            name = {"before": "dense, as given"}.get(way, f"one-shot {way}")
            lines.append(f"| {name} | 0 | {row['perplexity']:.2f} | | | | | |")
            continue
        recovered = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
        lines.append(
            f"| {way} | {row['tokens']} | {row['perplexity']:.2f} ({row['perplexity_min']:.2f} to "
            f"{row['perplexity_max']:.2f}, n={row['num_seeds']}) | {recovered} | "
            f"{row['soft_to_hard']:+.2%} | {row['flipped_share']:.1%} | {row['step_s']:.2f} | "
            f"{row['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _check_identity(out: Path, identity: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != identity:
            raise ValueError(f"{out} holds another study ({path}); choose another --out")
    elif any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no study; choose another --out")
    else:
        path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def _read_rows(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _call(*arguments: object) -> tuple[dict[str, Any], float, float]:
    """Runs `cast-train`: its last line, seconds, and peak memory in MB."""
    command = [sys.executable, "-m", "cast_train", *map(str, arguments)]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as stdout:
        printed = stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise StudyError(
            f"{' '.join(command)} ended with {process.returncode}; start the study again to go on"
        )
    elapsed_s = time.monotonic() - began
    return json.loads(printed.splitlines()[-1]), elapsed_s, usage.ru_maxrss / 1024


def _evaluate(directory: Path, heldout: Path, out: Path) -> float:
    settings = json.loads((out / "study.json").read_text(encoding="utf-8"))["settings"]
    config = TrainConfig.from_dict(settings)
    tokens = config.heldout_blocks * config.block_size
    figures, _, _ = _call(
        *("eval", directory, "--text", heldout),
        *("--context", config.block_size, "--tokens", tokens),
    )
    return float(figures["perplexity"])


def _oneshot(
    model: Path, text_files: Sequence[Path], heldout: Path, out: Path, method: str
) -> dict[str, Any]:
    folder = out / "pruned"
    shutil.rmtree(folder, ignore_errors=True)
    text = ("--text", *text_files) if method == "wanda" else ()
    settings = json.loads((out / "study.json").read_text(encoding="utf-8"))["settings"]
    sparsity = TrainConfig.from_dict(settings).sparsity
    _call("oneshot", "--model", model, "--method", method, "--sparsity", sparsity, *text,
          "--out", folder)  # fmt: skip
    row = {"way": method, "seed": None, "perplexity": _evaluate(folder, heldout, out)}
    shutil.rmtree(folder)
    return row


def _train(
    model: Path,
    text_files: Sequence[Path],
    heldout: Path,
    out: Path,
    way: str,
    config: TrainConfig,
) -> dict[str, Any]:
    folder = out / f"{way.replace(' ', '-').replace(',', '')}-{config.seed}"
    settings = folder.with_suffix(".toml")
    settings.write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.as_dict().items())
    )
    figures, elapsed_s, peak_memory_mb = _call(
        *("run", "--model", model, "--text", *text_files, "--heldout", heldout),
        *("--config", settings, "--out", folder, "--resume"),
    )
    record = json.loads((folder / "cast.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    settings.unlink()
    return {
        "way": way,
        "seed": config.seed,
        "tokens": figures["tokens_seen"],
        "perplexity": figures["perplexity_hard"],
        "perplexity_soft": figures["perplexity_soft"],
        "flipped_share": figures["flipped_share"],
        "step_s": record["step_s"],
        "elapsed_s": elapsed_s,
        "peak_memory_mb": peak_memory_mb,
        "curve": record["curve"],
    }


def _draw(path: Path, result: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    trained = [row for row in result["runs"] if row["seed"] is not None]
    ways = list(dict.fromkeys(row["way"] for row in trained))
    figure = Figure(figsize=(13, 5), layout="constrained")
    curves, ends = figure.subplots(1, 2)
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
        ends.scatter([row["perplexity"] for row in runs], [number] * len(runs), color=f"C{number}")
    summary = result["summary"]
    for axes in (curves.axhline, ends.axvline):
        axes(summary["before"]["perplexity"], color="grey", linewidth=1)
        axes(summary["wanda"]["perplexity"], color="grey", linewidth=1, linestyle=":")
    curves.set(
        xlabel="training tokens",
        ylabel="held-out perplexity in the model's phase",
        yscale="log",
        title="grey: dense as given; dotted: one-shot Wanda",
    )
    curves.legend(fontsize=7)
    ends.set_yticks(range(len(ways)), ways)
    ends.set(xlabel="held-out perplexity of the exact N:M model, a dot per seed")
    figure.savefig(path, dpi=120)
