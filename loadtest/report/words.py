"""A result -> what every report says in words: headline, table rows, how it was measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cast_serve.guard import PASS
from cast_serve.latency import QUANTILES, TIMES
from loadtest.judge.statistics import THROUGHPUT, num_needed

MIN_BUSY_S = 10.0  # of a block in a closed loop
SOUNDNESS = ("error_rate", "unequal_lengths", "void")  # checked in any run
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        label: what it is, with its unit.
        baseline: the figure, formatted.
        candidate: likewise.
        speedup: ratio with interval; "-" if there is none.
        interval: (ratio, low, high) if all three are known.
        n: values behind it, of baseline and candidate; None for rates.
    """

    label: str
    baseline: str
    candidate: str
    speedup: str
    interval: tuple[float, float, float] | None
    n: tuple[int, int] | None


def title(result: Result) -> str:
    """What was compared."""
    return f"{result['candidate']} against {result['baseline']}"


def origin(result: Result) -> str:
    """When and where the run was made."""
    machine = result["machine"]
    where = "machine not recorded"
    if machine:
        # A virtual machine may hide the name, but not family and model.
        name = f"{machine['cpu']} (family {machine['family']}, model {machine['model']})"
        where = f"{name}, {len(machine['cores'])} cores"
    return f"Load test of {result['date'][:16].replace('T', ' ')} UTC, {where}"


def verdict(result: Result) -> str:
    """In capitals; PASS only where a guard rail was set that could have failed."""
    if result["verdict"] == PASS and not result["has_guard"]:
        return "NO GUARD RAIL SET"
    return str(result["verdict"]).upper()


def guard_rails(result: Result) -> list[str]:
    """What the verdict rests on, a line each: the limits that were set, and whatever failed."""
    found = [
        f"{stressed(check)}: {check['name']}: {check['why']}"
        for check in result["checks"]
        if check["name"] not in SOUNDNESS or check["verdict"] != PASS
    ]
    if not result["has_guard"]:
        found.append(
            "No limits on speed or quality were set (--guard FILE). The run only checked that "
            "all requests were answered, that answers have the asked lengths and that the harness "
            "kept up."
        )
    return found


def stressed(check: Mapping[str, Any]) -> str:
    """A check's verdict, in capitals unless it passed."""
    word = str(check["verdict"])
    return word if word == PASS else word.upper()


def headline(result: Result) -> str:
    """The run in one sentence."""
    if not result["num_requests"]:
        why = "the warm-up failed" if result["num_warmup_errors"] else "the run was stopped"
        return f"Nothing was measured: {why}."
    baseline, candidate, speedups = result["baseline"], result["candidate"], result["speedups"]
    per_token, first = (times(speedups.get(f"{name}_p50")) for name in ("tpot", "ttft"))
    rate = times(speedups["throughput"])
    start = "VOID: " if result["harness"]["is_void"] else ""
    if result["is_aa"]:
        start += "one model under two names: "
    return (
        f"{start}{candidate} is {per_token} as fast per token as {baseline} and {first} as fast "
        f"to the first token, with {rate} the tokens per second."
    )


def output_lengths(result: Result) -> str:
    """How many tokens answers had."""
    medians = result["output_tokens_per_request"]
    asked = result["workload"].get("output_tokens", result["plan"].get("output_tokens"))
    if isinstance(asked, int) and not result["workload"].get("until_eos"):
        return f"{asked} output tokens each"
    found = [f"{variant} {n:g}" for variant, n in medians.items() if n is not None]
    return f"output tokens (median) {', '.join(found) or 'none'}"


def times(speedup: Mapping[str, float | None] | None) -> str:
    """A ratio with its interval, as `1.28x (1.21 to 1.36)`."""
    if not speedup or not speedup["ratio"]:
        return "an unknown number of times"
    if speedup["low"] is None or speedup["high"] is None:
        return f"{speedup['ratio']:.2f}x (no interval)"
    return f"{speedup['ratio']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})"


def notes(result: Result) -> list[str]:
    """What helps to read the figures."""
    if not result["num_requests"]:
        return []
    num_launches = result["num_launches"]
    over = f"{result['num_block_pairs']} block pairs"
    if num_launches > 1:
        over = f"{num_launches} launches of the servers and {over}"
    num_intervals = sum(s["low"] is not None for s in result["speedups"].values())
    intervals = f"95 % bootstrap intervals over {over}"
    if result["until"]:
        intervals = f"95 % intervals over {over} that hold however often the run was looked at"
    found = [
        f"Ratios above 1 favour the candidate. Ranges are {intervals}; an interval that contains "
        "1 shows no difference.",
        f"This report's claim is the speed-up per token, TPOT p50. With {num_intervals} "
        "intervals, one or two are likely to miss the true value by chance, so the others only "
        "explain the claim.",
    ]
    if num_launches == 1:
        found.append(
            "The servers were launched once, so the intervals leave out whatever affects all "
            "requests of a launch alike (memory layout, cores). If launches differ by 4 %, the "
            "intervals contain the true value only about half the time. --launches 6 measures "
            "this."
        )
    if result["is_aa"]:
        known = [s for s in result["speedups"].values() if s["low"] is not None]
        covering = sum(s["low"] <= 1 <= (s["high"] or 1) for s in known)
        found.append(
            "A/A calibration: both names serve one model, so the true ratio is 1, and 95 of 100 "
            f"intervals should contain it; here {covering} of {len(known)} do. They come from one "
            "run, so they are right or wrong together."
        )
    if result["workload"].get("until_eos"):
        found.append(
            "Answers ended by themselves, so the variants wrote answers of different lengths: "
            "compare TPOT and ITL, and TTFT of first turns; E2E and tokens/s compare different "
            "work."
        )
    n = min(side["n"] for side in result["e2e_s"].values())
    if n < num_needed(0.99):
        found.append(
            f"With {n} requests per variant, p99 is close to the slowest request and has no "
            f"interval, which needs {num_needed(0.99)}."
        )
    busy_s = result["busy_s_per_block"]
    if result["schedule"] != "closed":
        found.append(
            "Requests left on a schedule, so their rate sets the throughput of a variant that "
            "keeps up. Throughput is counted while requests arrive, not after the last one."
        )
    elif busy_s < MIN_BUSY_S:
        found.append(
            f"Short blocks: each kept {result['concurrency']} requests in flight for {busy_s:.1f} "
            f"s (median), then drained. Below {MIN_BUSY_S:.0f} s that says more about a burst "
            "than about steady load; leave out --num-prompts."
        )
    if result["saturation"]:
        limits = [
            f"{variant} does not keep up with any rate of the ramp; start it lower"
            if limit["is_reached"] and limit["rate_per_s"] is None
            else f"{variant} keeps up to {_rate(limit['rate_per_s'])} requests/s"
            + ("" if limit["is_reached"] else ", where the ramp ends")
            for variant, limit in result["saturation"].items()
        ]
        found.append(
            f"Saturation: {'; '.join(limits)}. Beyond it, TTFT stays above 1.5x its value in the "
            "first tenth of the ramp."
        )
    return found


def rows(result: Result) -> list[Row]:
    """The table: each time at each percentile, then the rates."""
    variants, speedups = (result["baseline"], result["candidate"]), result["speedups"]
    found = []
    for metric in TIMES:
        sides = [result[f"{metric}_s"][variant] for variant in variants]
        n = (sides[0]["n"], sides[1]["n"])
        for name in QUANTILES:
            key = "median" if name == "p50" else name
            cells = [_milliseconds(side[key], side["n"]) for side in sides]
            label = f"{NAMES[metric]} {name}, ms"
            found.append(_row(label, cells, speedups.get(f"{metric}_{name}"), n))
    by_turn = zip(*(result["ttft_by_turn_s"][variant] for variant in variants), strict=True)
    for turn, both in enumerate(by_turn, start=1):
        cells = [_milliseconds(side["median"], side["n"]) for side in both]
        label = f"TTFT p50 in turn {turn}, ms"
        found.append(_row(label, cells, None, (both[0]["n"], both[1]["n"])))
    speeds = [_rate(result[THROUGHPUT][variant]) for variant in variants]
    found.append(_row("output tokens/s", speeds, speedups.get("throughput"), None))
    if result["goodput"]:
        goods = [result["goodput"][variant] for variant in variants]
        rates = [_rate(good["requests_per_s"], 3) for good in goods]
        found.append(_row("goodput, requests/s", rates, speedups.get("goodput"), None))
        shares = ["-" if good["share"] is None else f"{good['share']:.1%}" for good in goods]
        found.append(_row("within the limits", shares, None, (goods[0]["n"], goods[1]["n"])))
    return found


def _row(
    label: str,
    cells: list[str],
    speedup: Mapping[str, float | None] | None,
    n: tuple[int, int] | None,
) -> Row:
    ratio, low, high = (speedup[key] if speedup else None for key in ("ratio", "low", "high"))
    shown = times(speedup) if ratio else "failed" if ratio == 0 else "-"
    interval = (ratio, low, high) if ratio and low and high else None
    return Row(label, cells[0], cells[1], shown, interval, n)


def _milliseconds(seconds: float | None, n: int) -> str:
    if seconds is None:
        return "failed" if n else "-"
    return f"{1e3 * seconds:.2f}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _rate(per_s: float | None, digits: int = 1) -> str:
    return "-" if per_s is None else f"{per_s:.{digits}f}"


def facts(result: Result) -> list[tuple[str, str]]:
    """(name, value) of how it was measured."""
    plan, harness, workload = result["plan"], result["harness"], result["workload"]
    rate = f", {result['rate_per_s']:g} requests/s on average" if result["rate_per_s"] else ""
    load = f"{result['schedule']}{rate}"
    if result["schedule"] == "closed":
        load = f"closed loop, {plan['concurrency']} in flight"
    lengths = output_lengths(result)
    if result["prompt_tokens_per_request"] is not None:
        lengths = f"{result['prompt_tokens_per_request']:g} prompt tokens (median), {lengths}"
    found = [
        ("command", result["command"]),
        ("server", result["url"]),
        ("date", result["date"]),
        ("load", load),
        (
            "plan",
            f"{plan['num_block_pairs']} block pairs in ABBA order, {plan['num_prompts']} prompts "
            f"per block, {plan['num_warmup']} uncounted warm-up requests per variant; "
            f"{result['num_launches']} launch{'es' if result['num_launches'] > 1 else ''}",
        ),
        ("lengths", lengths),
        ("workload", ", ".join(f"{key} {value}" for key, value in workload.items())),
        ("timeout", f"{result['timeout_s']:g} s per request"),
        (
            "harness",
            f"{harness['num_processes']} process{'es' if harness['num_processes'] > 1 else ''}, "
            f"requests left {1e3 * harness['slip_p99_s']:.2f} ms late (p99), "
            f"{harness['cpu_share']:.0%} of a core (busiest process)",
        ),
        ("versions", ", ".join(f"{name} {text}" for name, text in result["versions"].items())),
    ]
    if machine := result["machine"]:
        before, *after = machine["load_average"]  # a run that was stopped has no other
        found.append(
            (
                "machine",
                f"{machine['cpu']}, family {machine['family']} model {machine['model']}, "
                f"{len(machine['cores'])} cores, {' '.join(machine['flags'])}; load average "
                f"{before:.1f} before" + "".join(f", {average:.1f} after" for average in after),
            )
        )
    for variant, labels in result["served"].items():
        found.append((variant, ", ".join(f"{key} {text}" for key, text in labels.items() if text)))
    if result["slo"]:
        found.append(("limits", f"a good request has at most {limits_of(result['slo'])}"))
    return found


def limits_of(slo: Mapping[str, float | None]) -> str:
    """The limits of a good request."""
    return " and ".join(
        f"{NAMES[name.removesuffix('_s')]} {1e3 * limit:g} ms"
        for name, limit in slo.items()
        if limit is not None
    )


def quality_texts(result: Result) -> list[str]:
    """What is known about quality, a paragraph each."""
    return [text for text in (quality_text(result), accuracy_text(result)) if text]


def quality_text(result: Result) -> str | None:
    """Agreement and KL in a sentence; None if quality was not measured."""
    quality = result["quality"]
    if not quality:
        return None
    agreement, kl = quality["token_agreement"], quality["kl_nats_per_token"]
    if agreement is None:
        return f"None of {quality['num_prompts']} prompts could be compared token by token."
    source = f" of {result['quality_source']}" if result["quality_source"] else ""
    return (
        f"{result['candidate']} ranks the same token first as {result['baseline']} for "
        f"{agreement['mean']:.1%} ({agreement['low']:.1%} to {agreement['high']:.1%}) of the "
        f"{quality['num_tokens']} tokens that {result['baseline']} generated; KL is at least "
        f"{kl['mean']:.3f} ({kl['low']:.3f} to {kl['high']:.3f}) nats per token, on "
        f"{quality['num_scored']} of {quality['num_prompts']} prompts{source}. The KL is a lower "
        "bound: it covers the 20 most likely tokens, with all others merged into one."
    )


def accuracy_text(result: Result) -> str | None:
    """Accuracy on a choice set in a sentence; None if it was not measured."""
    choices = result["choices"]
    if not choices:
        return None
    candidate, baseline = result["candidate"], result["baseline"]
    of_candidate, of_baseline = choices["accuracy"][candidate], choices["accuracy"][baseline]
    difference = choices["acc_norm_difference"]
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    interval = "" if low is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    is_certain = low is not None and not low <= 0 <= high
    meaning = "" if is_certain else ", which is not statistically significant"
    return (
        f"On {difference['num_questions']} questions from {choices['source']}, {candidate} "
        f"answers {_share(of_candidate, 'acc_norm')} correctly and {baseline} "
        f"{_share(of_baseline, 'acc_norm')} by log likelihood per byte (acc_norm): a difference "
        f"of {100 * mean:+.1f} points{interval}, paired by question{meaning}. By summed log "
        f"likelihood (acc) they answer {_share(of_candidate, 'acc')} and "
        f"{_share(of_baseline, 'acc')}. ± is one standard error{_chance(choices['chance'])}."
    )


def _chance(chance: float | None) -> str:
    return "" if chance is None else f"; guessing gets {chance:.1%}"


def _share(side: Mapping[str, float | None], name: str) -> str:
    error = side[f"{name}_stderr"]
    return f"{side[name]:.1%}" + ("" if error is None else f" ± {error:.1%}")


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown; all columns but the first are aligned to the right."""
    head = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (*head, *lines)]


def speedup(found: Mapping[str, float | None]) -> str:
    """A ratio with its interval, as everywhere in README and docs: `1.33 (1.23 to 1.41)`."""
    if found["low"] is None or found["high"] is None:
        return f"{found['ratio']:.2f}"
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
