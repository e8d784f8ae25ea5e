"""A dense model + text -> every way of learning the pattern, at equal tokens and seeds, compared.

Each run is a `cast-train run` of its own, in a process of its own, so that time and memory are its
own too. Its figures go to OUT/results.jsonl as soon as it is done and its weights are removed; a
study that was stopped goes on where it was. In the end:

result.json    all figures, and their summary
report.md      the table
report.png     perplexity against tokens; of every way the last perplexities, the recovered share of
               the gap, step time and memory
"""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_train import oneshot
from cast_train.config import TrainConfig

# Name -> what it changes in the study's common settings.
# The baselines are undistilled, as they are known; "ste distillation_weight=0.5" is the fair pair.
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "distillation_weight": 0.0},
    "fixed mask": {
        "start": "wanda",
        "hard_fraction": 0.0,
        "tau_end_fraction": 0.0,
        "blend_end_fraction": 0.0,
        "distillation_weight": 0.0,
    },
    "ste": {"method": "ste", "distillation_weight": 0.0},
    "soft_topk": {},
    "gumbel": {"selector": "gumbel"},
    "penalty": {
        "selector": "penalty",
        "gate_learning_rate": 0.1,
        "hard_fraction": 0.5,
        "tau_end_fraction": 0.45,
    },
    "generator": {"selector": "generator"},
    "adams": {"method": "adams", "scale_parts": 2, "distillation_weight": 0.33},
}
# What report.png draws a bar of for every way, beside the perplexities.
BARS = {
    "recovered": "share of the log gap recovered,\none-shot Wanda to dense",
    "step_s": "seconds a step, median",
    "peak_memory_mb": "peak memory, MB",
}


class StudyError(RuntimeError):
    """A run of the study failed."""


def ways_of(text: str | None) -> dict[str, dict[str, Any]]:
    """Parses ``ste;soft_topk;soft_topk start=magnitude``; None: all of WAYS.

    Returns:
        what each way changes in the common settings, by the way's text.

    Raises:
        ValueError: naming the known ones.
    """
    ways = {}
    for way in WAYS if text is None else (part.strip() for part in text.split(";")):
        words = way.split()
        name = " ".join(word for word in words if "=" not in word)
        if name not in WAYS:
            raise ValueError(
                f"--ways has {name!r}; choose from {'; '.join(WAYS)}, each with "
                "KEY=VALUE after it for any setting of the run"
            )
        changes = dict(word.split("=", 1) for word in words if "=" in word)
        ways[way] = WAYS[name] | {key: _parsed(value) for key, value in changes.items()}
    return ways


def _parsed(value: str) -> Any:
    """A TOML value; what is none is a string, so that no quotes need quoting."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def run(
    model: Path,
    text_files: Sequence[Path],
    heldout: Path,
    out: Path,
    settings: Mapping[str, Any],
    ways: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    choices: Sequence[Path] = (),
    rivals: Sequence[Path] = (),
) -> dict[str, Any]:
    """Runs what is not in OUT/results.jsonl yet, and writes the report over all of it.

    Args:
        model: dense HF directory.
        text_files: training text, UTF-8.
        heldout: text to measure on.
        out: directory; may hold an unfinished study of the same settings.
        settings: of TrainConfig, common to all ways.
        ways: what each changes in the settings, see `ways_of`.
        seeds: each way runs once per seed.
        choices: questions, JSONL, that every model answers; with any, KL to the dense model too.
        rivals: directories that were pruned by other means, measured beside ours by their names.

    Raises:
        ValueError: for a wrong setting or rival's name, or if out holds another study.
        StudyError: if a run fails; what is done stays done.
    """
    configs = {
        (way, seed): TrainConfig.from_dict({**settings, **changes, "seed": seed})
        for way, changes in ways.items()
        for seed in seeds
    }
    identity = {
        "model": model.resolve().name,
        "text": [path.name for path in text_files],
        "heldout": heldout.name,
        "settings": dict(settings),
    }
    taken = {"before", *oneshot.METHODS} & {rival.name for rival in rivals}
    if taken:
        raise ValueError(f"a rival cannot be called {taken.pop()}, a row of its own; rename it")
    _check_identity(out, identity)
    done = {(row["way"], row["seed"]): row for row in _read_rows(out)}
    measure = _Measure(model, heldout, choices, settings)
    for name in ("before", *oneshot.METHODS, *(rival.name for rival in rivals)):
        if (name, None) not in done:
            figures = _measure_untrained(name, text_files, out, measure, rivals)
            done[name, None] = _append(out, {"way": name, "seed": None, **figures})
    for number, ((way, seed), config) in enumerate(configs.items(), 1):
        if (way, seed) not in done:
            print(f"study: run {number} of {len(configs)}: {way}, seed {seed}", flush=True)
            row = _train(model, text_files, heldout, out, way, config, measure)
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
        row["way"]: {"perplexity": row["perplexity"], "num_seeds": 0, **_answers([row])}
        for row in rows
        if row["seed"] is None
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
            **_answers(runs),
        }
    return summary


def _answers(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean KL and accuracies of runs that have them; a standard error is that of one run."""
    if not all("choices" in row for row in runs):
        return {}
    return {
        "kl_nats_per_token": statistics.fmean(row["kl_nats_per_token"] for row in runs),
        "choices": {
            name: {
                key: statistics.fmean(row["choices"][name][key] for row in runs)
                for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
            }
            for name in runs[0]["choices"]
        },
    }


def table_of(result: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    summary = result["summary"]
    asked = list(dict.fromkeys(name for row in summary.values() for name in row.get("choices", {})))
    head = ["way", "tokens", "perplexity, mean (range of seeds)", "recovered of the log gap"]
    head += ["soft to hard", "mask flipped", "s a step", "peak MB"]
    head += ["KL, nats a token", *(f"{name} acc_norm" for name in asked)] if asked else []
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
                f"{row['step_s']:.2f}",
                f"{row['peak_memory_mb']:.0f}",
            ]
        else:
            name = "dense, as given" if way == "before" else f"one-shot {way}"
            cells = [name, "0", f"{row['perplexity']:.2f}", *[""] * 5]
        if asked:
            cells.append(f"{row['kl_nats_per_token']:.3f}" if "choices" in row else "")
            for name in asked:
                found = row.get("choices", {}).get(name)
                cells.append(
                    f"{found['acc_norm']:.3f} +- {found['acc_norm_stderr']:.3f}" if found else ""
                )
        table.append(cells)
    text = f"{result['model']}, trained on {', '.join(result['text'])}, measured on "
    return (
        f"{text}{result['heldout']}.\n\n"
        + "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        + "\n"
    )


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
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with process.stdout as stdout:
            printed = stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()  # a study that is stopped leaves no run behind
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise StudyError(
            f"{' '.join(command)} ended with {process.returncode}; start the study again to go on"
        )
    elapsed_s = time.monotonic() - began
    return json.loads(printed.splitlines()[-1]), elapsed_s, usage.ru_maxrss / 1024


@dataclass(frozen=True)
class _Measure:
    """`cast-train eval` as the study calls it."""

    model: Path
    heldout: Path
    choices: Sequence[Path]
    settings: Mapping[str, Any]

    def __call__(self, directory: Path) -> dict[str, Any]:
        """The directory's perplexity and, if there are choices, its KL and accuracies."""
        config = TrainConfig.from_dict(dict(self.settings))
        tokens = config.heldout_blocks * config.block_size
        more: list[object] = []
        if self.choices:
            more = ["--reference", self.model]
            for path in self.choices:
                more += ["--choices", path]
        found, _, _ = _call(
            *("eval", directory, "--text", self.heldout),
            *("--context", config.block_size, "--tokens", tokens, *more),
        )
        figures: dict[str, Any] = {
            "perplexity": found.get("perplexity_hard", found.get("perplexity"))
        }
        if self.choices:
            figures["kl_nats_per_token"] = found["kl_nats_per_token"]
            figures["choices"] = {path.stem: found[path.stem] for path in self.choices}
        return figures


def _measure_untrained(
    name: str, text_files: Sequence[Path], out: Path, measure: _Measure, rivals: Sequence[Path]
) -> dict[str, Any]:
    """Of the dense model ("before"), of what one shot makes of it, or of a rival."""
    if name == "before":
        return measure(measure.model)
    if name not in oneshot.METHODS:
        return measure(next(rival for rival in rivals if rival.name == name))
    folder = out / "pruned"
    shutil.rmtree(folder, ignore_errors=True)
    text = ("--text", *text_files) if name != "magnitude" else ()
    sparsity = TrainConfig.from_dict(dict(measure.settings)).sparsity
    _call("oneshot", "--model", measure.model, "--method", name, "--sparsity", sparsity, *text,
          "--out", folder)  # fmt: skip
    figures = measure(folder)
    shutil.rmtree(folder)
    return figures


def _train(
    model: Path,
    text_files: Sequence[Path],
    heldout: Path,
    out: Path,
    way: str,
    config: TrainConfig,
    measure: _Measure,
) -> dict[str, Any]:
    folder = out / f"{re.sub('[^a-z0-9_.]+', '-', way)}-{config.seed}"
    settings = folder.with_name(folder.name + ".toml")
    settings.write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.as_dict().items())
    )
    figures, elapsed_s, peak_memory_mb = _call(
        *("run", "--model", model, "--text", *text_files, "--heldout", heldout),
        *("--config", settings, "--out", folder, "--resume"),
    )
    record = json.loads((folder / "cast.json").read_text(encoding="utf-8"))
    answers = measure(folder) if measure.choices else {}
    shutil.rmtree(folder)
    settings.unlink()
    return {
        **answers,
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
    ends.set(xlabel="perplexity of the exact N:M model,\na dot per seed")
    for column, (key, label) in enumerate(BARS.items(), 1):
        bars = figure.add_subplot(grid[1, column], sharey=ends)
        colors = [f"C{number % 10}" for number in range(len(ways))]
        bars.barh(range(len(ways)), [summary[way][key] or 0.0 for way in ways], color=colors)
        bars.tick_params(labelleft=False)
        bars.set(xlabel=label)
    figure.savefig(path, dpi=120)
