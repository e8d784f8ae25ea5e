"""Two recorded runs, an old and a new one -> how the speed-ups changed, with intervals.

Two runs at different times, perhaps on different machines, cannot be compared in milliseconds.
Their speed-ups can: each compares two variants on the same machine at the same time. A speed-up
became *worse* if the new interval lies wholly below the old one, *better* if wholly above.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from rich.table import Table

from cast_serve.intervals import SEED, Ratio
from cast_serve.latency import TIMES
from loadtest.judge.statistics import MIN_BLOCK_PAIRS, THROUGHPUT, speedups
from loadtest.record import Recorded
from loadtest.report.result import result_of
from loadtest.report.words import rows, times

TABLE_WIDTH = 110
LOAD = ("plan", "workload", "schedule", "rate_per_s", "timeout_s", "until")
NOT_LOAD = {"run_number"}  # every run has another
CPU = ("cpu", "family", "model")
SERVED = ("kernel", "isa", "head", "dtype", "weight_bytes")  # of a variant, as our gateway says


def compare(old: Recorded, new: Recorded) -> dict[str, Any]:
    """Compares two runs.

    Returns:
        `changes`: by name of the speed-up, `old` and `new` and `change`, new over old, all with
        intervals, and `verdict`: worse, better or same, None where failed requests or too few block
        pairs hide it; `differences`: settings that are not the same; `warnings`: of both runs;
        `num_worse`: number of speed-ups that became worse; `old` and `new`: their times and rates.
    """
    earlier, later = speedups(old), speedups(new)
    num_pairs = min(len(run.pairs) for run in (old, new))
    num_independent = min(map(_num_independent, (old, new)))
    # Both runs' resamples come from the same seed; shuffled, they are independent of each other.
    shuffled = np.random.default_rng(SEED).permutation
    changes: dict[str, Any] = {}
    for name, before in earlier.items():
        if name not in later:
            continue
        after = later[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            change = Ratio.of_quantiles(
                np.divide(after.value or np.nan, before.value or np.nan),
                after.resampled / shuffled(before.resampled),
                num_independent,
            )
        # Percentiles of too few values have no interval, nor has a change of one.
        has_intervals = None not in (before.low, after.low)
        # Of a run that went on until it was certain no resamples say how sure a change is.
        has_intervals = has_intervals and not (old.about.get("until") or new.about.get("until"))
        if num_pairs < MIN_BLOCK_PAIRS or not has_intervals:
            change = replace(change, low=None, high=None)
        changes[name] = {
            "old": before.about(),
            "new": after.about(),
            "change": change.about(),
            "verdict": _verdict(before, after),
        }
    results = {"old": result_of(old), "new": result_of(new)}
    kept = ["baseline", "candidate", "num_requests", "slo", "goodput", THROUGHPUT]
    kept += [*(f"{metric}_s" for metric in TIMES), "ttft_by_turn_s", "speedups"]
    return {
        "changes": changes,
        "num_worse": sum(change["verdict"] == "worse" for change in changes.values()),
        "differences": _differences(old, new),
        "warnings": [
            f"{which}: {text}" for which, result in results.items() for text in result["warnings"]
        ],
        "old": {key: results["old"][key] for key in kept},
        "new": {key: results["new"][key] for key in kept},
    }


def _num_independent(run: Recorded) -> int:
    """Launches of the servers, or block pairs if there was one: a launch's depend on each other."""
    num_launches = len({block.launch for block in run.blocks})
    return num_launches if num_launches > 1 else len(run.pairs)


def _verdict(before: Ratio, after: Ratio) -> str | None:
    if None in (before.low, before.high, after.low, after.high):
        return None
    if after.high < before.low:  # type: ignore[operator]
        return "worse"
    return "better" if after.low > before.high else "same"  # type: ignore[operator]


def _differences(old: Recorded, new: Recorded) -> list[str]:
    """Each setting that decides what was measured and is not the same, as `name: OLD, then NEW`."""

    def flat(run: Recorded) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in LOAD:
            value = run.about.get(key)  # older records do not have all
            found |= value if isinstance(value, dict) else {key: value}
        return {key: value for key, value in found.items() if key not in NOT_LOAD}

    def place(run: Recorded) -> dict[str, Any]:
        """The machine, vLLM and what was served, as far as the record has it."""
        machine, versions = run.about.get("machine") or {}, run.about["versions"]
        found = {key: machine[key] for key in CPU if key in machine}
        found |= {name: versions[name] for name in versions if name.startswith("vllm")}
        for variant, served in run.about["served"].items():
            found |= {f"{variant} {key}": served[key] for key in SERVED if key in served}
        return found

    before, after = flat(old), flat(new)
    differences = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    earlier, later = place(old), place(new)  # of older records, or other servers, not all is known
    places = [key for key in earlier.keys() & later.keys() if earlier[key] != later[key]]
    before, after = before | earlier, after | later
    return [
        f"{key}: {before.get(key)}, then {after.get(key)}"
        for key in (*differences, *sorted(places))
    ]


def table_of(comparison: dict[str, Any]) -> Table:
    """The comparison for the terminal: speed-ups, then each variant's own figures."""
    table = Table(caption="worse, better: the intervals of old and new do not overlap")
    table.add_column("", no_wrap=True)
    for heading in ("old", "new", "change, new over old"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    styles = {"worse": "red", "better": "green"}
    for name, found in comparison["changes"].items():
        cells = [
            times(found[key]) if found[key]["ratio"] else "-" for key in ("old", "new", "change")
        ]
        verdict = found["verdict"]
        table.add_row(f"speed-up, {name}", *cells, verdict or "unknown", style=styles.get(verdict))
    table.add_section()
    old, new = comparison["old"], comparison["new"]
    later = {row.label: row for row in rows(new)}
    for before in rows(old):
        after = later.get(before.label)
        if after and "p95" not in before.label and "p99" not in before.label:
            for side in ("baseline", "candidate"):
                cells = [getattr(before, side), getattr(after, side)]
                table.add_row(f"{old[side]}, {before.label}", *cells, "", "")
    return table
