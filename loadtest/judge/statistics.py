"""A recorded run -> percentiles, speed-ups with intervals, drift and goodput, in one JSON object.

A request that failed or timed out stays in: its TTFT, TPOT and E2E, and as many ITLs as were asked
for, count as longer than any answered one. A percentile that falls among those is None: it is not
known. Percentiles always come with their n.

Every ratio above 1 favours the candidate: baseline / candidate for times, candidate / baseline for
rates. A *speed-up* compares the two variants' percentiles over the whole run, with an interval over
block pairs, or over launches of the servers if there are several (cast_serve/intervals.py). A
percentile beyond which not even one request is expected has no interval, and below
`MIN_BLOCK_PAIRS` nothing has one. In a run that went on until it was certain, a speed-up of medians
or rates is the geometric mean over block pairs, with an interval that allows for every look
(cast_serve/anytime.py). *ratio* compares the two blocks' medians of each block pair alone. *drift*
compares the blocks of each variant alone, one after the other within a launch.

*Throughput* of a closed loop counts a block from its first send to its last token. In an open loop
that would count the time after the last arrival, in which the server only empties its queue; so the
tokens that came while requests arrived are divided by how long they arrived. *Goodput*, requests a
second within the limits, likewise.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cast_serve import anytime
from cast_serve.intervals import (
    Array,
    Ratio,
    draws,
    finite,
    quantile,
    ratio_of_quantiles,
    ratio_of_rates,
)
from cast_serve.latency import QUANTILES, TIMES
from loadtest.record import Block, Recorded, Request

THROUGHPUT = "output_tokens_per_s"
MIN_BLOCK_PAIRS = 4
# Speed-ups that have a value for each block pair, and so can be looked at while a run goes on.
AT_EVERY_LOOK = {**{f"{time}_p50": time for time in TIMES}, "throughput": THROUGHPUT}


def values(requests: Iterable[Request], metric: str) -> Array:
    """Ascending seconds of one of TIMES; inf for what a failed request would have had."""
    found: list[float] = []
    requests = list(requests)
    # Where answers end by themselves, all are far shorter than they may be.
    longest = max((request.output_tokens or 0 for request in requests), default=0)
    for request in requests:
        timing = request.timing
        if timing is None:
            num_tokens = min(request.asked_tokens, longest or request.asked_tokens)
            found += [np.inf] * (max(num_tokens - 1, 0) if metric == "itl" else 1)
        elif metric == "itl":
            found += timing.itl_s
        else:
            value: float | None = getattr(timing, f"{metric}_s")
            found += [] if value is None else [value]
    return np.sort(np.array(found, float))


def distribution(ascending: Array) -> dict[str, Any]:
    """Median, p95 and p99 in the values' unit; None without values, or among failed requests."""
    found: dict[str, float | None] = {"median": None, "p95": None, "p99": None}
    if len(ascending):
        for name, share in zip(found, QUANTILES.values(), strict=True):
            found[name] = finite(quantile(ascending, share))
    return {**found, "n": len(ascending), "num_failed": int(np.isinf(ascending).sum())}


def meets(request: Request, slo: dict[str, float | None]) -> bool:
    """Whether a request was answered within `ttft_s` and `tpot_s`, as far as they are set."""
    timing = request.timing
    if timing is None:
        return False
    found = {"ttft_s": timing.ttft_s, "tpot_s": timing.tpot_s}
    return all(limit is None or (found[name] or 0.0) <= limit for name, limit in slo.items())


def speedups(recorded: Recorded) -> dict[str, Ratio]:
    """By name: `ttft_p50` and so on for TIMES and QUANTILES, `throughput`, and `goodput` if asked.

    Empty if nothing was measured.
    """
    pairs = recorded.pairs
    if not pairs:
        return {}
    resamples = draws(len(pairs), groups=[block.launch for block, _ in pairs])
    baseline_blocks = [block for block, _ in pairs]
    candidate_blocks = [block for _, block in pairs]
    found = {}
    for metric in TIMES:
        baseline = _in_blocks(recorded, baseline_blocks, metric)
        candidate = _in_blocks(recorded, candidate_blocks, metric)
        if any(map(len, baseline)) and any(map(len, candidate)):
            num_values = min(sum(map(len, baseline)), sum(map(len, candidate)))
            num_requests = min(  # gaps between tokens are more
                sum(len(block.requests) for block in blocks)
                for blocks in (baseline_blocks, candidate_blocks)
            )
            for name, share in QUANTILES.items():
                ratio = ratio_of_quantiles(baseline, candidate, resamples, share)
                if min(num_values, num_requests) < num_needed(share):
                    ratio = replace(ratio, low=None, high=None)
                found[f"{metric}_{name}"] = ratio
    found["throughput"] = ratio_of_rates(
        [throughput_of(recorded, block) for block in candidate_blocks],
        [throughput_of(recorded, block) for block in baseline_blocks],
        resamples,
    )
    if slo := recorded.about.get("slo"):
        found["goodput"] = ratio_of_rates(
            [_goodput_of(recorded, block, slo) for block in candidate_blocks],
            [_goodput_of(recorded, block, slo) for block in baseline_blocks],
            resamples,
        )
    if recorded.about.get("until"):
        found = {name: replace(ratio, low=None, high=None) for name, ratio in found.items()}
        found |= {
            name: _at_every_look(recorded, name, found[name])
            for name in AT_EVERY_LOOK
            if name in found
        }
    if len(pairs) < MIN_BLOCK_PAIRS:
        found = {name: replace(ratio, low=None, high=None) for name, ratio in found.items()}
    return found


def _at_every_look(recorded: Recorded, name: str, once: Ratio) -> Ratio:
    """One of AT_EVERY_LOOK in place of its ratio as of one look; unknown if a pair has no value."""
    each = ratios(recorded, AT_EVERY_LOOK[name])
    if len(each) < len(recorded.pairs):
        return replace(once, value=None)
    mean, low, high = (
        float(np.exp(end)) for end in anytime.interval([float(log) for log in np.log(each)])
    )
    return replace(once, value=mean, low=low or None, high=finite(high))


def num_needed(share: float) -> int:
    """How many requests a quantile's interval needs: one is expected beyond it."""
    return round(1 / (1 - share))


def throughput_of(recorded: Recorded, block: Block) -> tuple[float, float]:
    """A block's output tokens, and the seconds in which they came; see the module."""
    if recorded.about["schedule"] == "closed" or not block.arrival_s:
        return block.output_tokens, block.wall_s
    return block.output_tokens_until(block.started_s + block.arrival_s), block.arrival_s


def _goodput_of(
    recorded: Recorded, block: Block, slo: dict[str, float | None]
) -> tuple[float, float]:
    """A block's requests that met every limit, and the seconds in which they were sent.

    Of an open loop without those sent last: N arrivals have N - 1 gaps between them.
    """
    if recorded.about["schedule"] == "closed" or not block.arrival_s:
        return sum(meets(request, slo) for request in block.requests), block.wall_s
    last_s = block.started_s + block.arrival_s
    earlier = [request for request in block.requests if request.intended_send_s < last_s]
    return sum(meets(request, slo) for request in earlier), block.arrival_s


def ratios(recorded: Recorded, metric: str) -> list[float]:
    """One ratio a block pair, above 1 = candidate better; pairs without a value are left out.

    `metric` is one of TIMES, for the blocks' medians, or THROUGHPUT.
    """
    found = []
    for pair in recorded.pairs:
        baseline, candidate = (block_value(recorded, block, metric) for block in pair)
        if baseline and candidate:
            found.append(candidate / baseline if metric == THROUGHPUT else baseline / candidate)
    return found


def block_value(recorded: Recorded, block: Block, metric: str) -> float | None:
    """A block's median of one of TIMES in seconds, or its THROUGHPUT; None if it has none."""
    if metric == THROUGHPUT:
        tokens, seconds = throughput_of(recorded, block)
        return tokens / seconds
    (ascending,) = _in_blocks(recorded, [block], metric)
    return finite(quantile(ascending, 0.5)) if len(ascending) else None


def _in_blocks(recorded: Recorded, blocks: Sequence[Block], metric: str) -> list[Array]:
    """Ascending seconds of each block."""
    return [values(block.requests, metric) for block in blocks]


def _median(found: Sequence[float]) -> float | None:
    return float(np.median(found)) if found else None


def _spread(found: Sequence[float]) -> dict[str, Any]:
    return {
        "median": _median(found),
        "min": min(found, default=None),
        "max": max(found, default=None),
        "num_block_pairs": len(found),
        "per_block_pair": list(found),
    }


def drift(recorded: Recorded, variant: str, metric: str) -> dict[str, Any]:
    """How a variant's blocks change within a launch of the servers, from one to the next.

    Differences between launches are not drift, so each launch is compared with itself.

    Returns:
        `per_block_s`: medians in the order run; `second_half_over_first`: mean of the later half of
        a launch's over that of the earlier half, geometric mean over the launches of two blocks or
        more; `slope_per_minute`: of a straight line through them, as a share of the launch's mean.
        Both are None if a block's median is not known.
    """
    blocks = recorded.blocks_of(variant)
    medians = [block_value(recorded, block, metric) for block in blocks]
    known = [median for median in medians if median is not None]
    if len(known) < len(blocks) or min(known, default=0) <= 0:
        return {"per_block_s": medians, "second_half_over_first": None, "slope_per_minute": None}
    halves: list[float] = []
    shares: list[Array] = []
    minutes: list[Array] = []
    for launch in sorted({block.launch for block in blocks}):
        places = [i for i, block in enumerate(blocks) if block.launch == launch]
        of_launch = np.array([known[i] for i in places])
        if middle := len(places) // 2:
            halves.append(float(of_launch[-middle:].mean() / of_launch[:middle].mean()))
            begun = np.array([blocks[i].started_s / 60 for i in places])
            minutes.append(begun - begun.mean())
            shares.append(of_launch / of_launch.mean())
    slope = None
    if halves:
        x, y = np.concatenate(minutes), np.concatenate(shares)
        slope = float(x @ y / (x @ x))
    return {
        "per_block_s": medians,
        "second_half_over_first": float(np.exp(np.mean(np.log(halves)))) if halves else None,
        "slope_per_minute": slope,
    }


def _rate(amounts: Iterable[tuple[float, float]]) -> float | None:
    """The sum of amounts over the sum of their seconds; None without any."""
    pairs = list(amounts)
    return sum(amount for amount, _ in pairs) / sum(s for _, s in pairs) if pairs else None


def goodput(recorded: Recorded, variant: str, slo: dict[str, float | None]) -> dict[str, Any]:
    """Requests of a variant that met every limit: a second, and as a share of all of them."""
    blocks = recorded.blocks_of(variant)
    requests = [request for block in blocks for request in block.requests]
    num_good = sum(meets(request, slo) for request in requests)
    return {
        "requests_per_s": _rate(_goodput_of(recorded, block, slo) for block in blocks),
        "share": num_good / len(requests) if requests else None,
        "n": len(requests),
    }


def _by_turn(requests: Iterable[Request]) -> list[dict[str, Any]]:
    """`distribution` of TTFT at each turn of a conversation; empty if all have one turn."""
    turns: dict[int, list[Request]] = {}
    for request in requests:
        turns.setdefault(request.turn, []).append(request)
    if len(turns) < 2:
        return []
    return [distribution(values(turns[turn], "ttft")) for turn in sorted(turns)]


def summarise(recorded: Recorded, found: dict[str, Ratio]) -> dict[str, Any]:
    """The part of the result that is computed; `found` has the run's speed-ups."""
    variants = recorded.variants
    blocks = {v: recorded.blocks_of(v) for v in variants}
    requests = {v: [r for b in blocks[v] for r in b.requests] for v in variants}
    measured = [r for v in variants for r in requests[v]]
    warmup = recorded.warmup
    failed = {v: [r for r in requests[v] if r.error] for v in variants}
    classes = {v: [r.error for r in warmup if r.error and r.variant == v] for v in variants}
    prompt_tokens = [r.prompt_tokens for r in measured if r.prompt_tokens is not None]
    slo = recorded.about.get("slo")
    until_eos = recorded.about["workload"].get("until_eos", False)
    summary: dict[str, Any] = {
        "num_requests": len(measured),
        "num_block_pairs": len(recorded.pairs),
        "num_planned_pairs": recorded.num_planned_pairs,
        "num_launches": len({block.launch for block in recorded.blocks}) or 1,
        "busy_s_per_block": _median([block.arrival_s for block in recorded.blocks]),
        "num_errors": sum(map(len, failed.values())),
        "num_warmup_errors": sum(r.error is not None for r in warmup),
        "num_unequal_lengths": sum(
            r.error is None and r.output_tokens != r.asked_tokens and not until_eos
            for r in measured
        ),
        "errors": {
            v: dict(Counter([*classes[v], *(r.error for r in failed[v])])) for v in variants
        },
        "error_rate": {
            v: len(failed[v]) / len(requests[v]) if requests[v] else None for v in variants
        },
        "prompt_tokens_per_request": _median(prompt_tokens),
        "output_tokens_per_request": {
            v: _median([r.output_tokens for r in requests[v] if r.output_tokens]) for v in variants
        },
        "ttft_by_turn_s": {v: _by_turn(requests[v]) for v in variants},
    }
    for metric in TIMES:
        summary[f"{metric}_s"] = {v: distribution(values(requests[v], metric)) for v in variants}
    summary[THROUGHPUT] = {
        v: _rate(throughput_of(recorded, block) for block in blocks[v]) for v in variants
    }
    summary["speedups"] = {name: ratio.about() for name, ratio in found.items()}
    summary["ratio"] = {
        metric: _spread(ratios(recorded, metric)) for metric in (*TIMES, THROUGHPUT)
    }
    summary["drift"] = {m: {v: drift(recorded, v, m) for v in variants} for m in ("ttft", "tpot")}
    summary["slo"] = slo
    summary["goodput"] = {v: goodput(recorded, v, slo) for v in variants} if slo else None
    return summary
