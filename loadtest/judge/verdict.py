"""A result and guard rails -> pass, fail or inconclusive, check by check, each with the reason.

cast_serve/guard.py has the guard rails and what a limit makes of an interval. A limit on what was
not measured, or on one answer only, is inconclusive. A run passes if every check does, and fails if
one does. A void run and one that was stopped are inconclusive, whatever else they show.

Answers of unequal length always fail: they compare unequal work. So does a launch of the servers
whose warm-up failed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from cast_serve.guard import FAIL, INCONCLUSIVE, PASS, Check, Guard, agreement_check

MIN_ANSWERS = 2  # prompts or questions: one has no interval
MOST_MORE = 50  # times as many: nobody waits for more


def judge(result: Mapping[str, Any], guard: Guard) -> dict[str, Any]:
    """`verdict`, `has_guard` and `checks`, as result.json has them."""
    why = unsound(result)
    checks = []
    if "complete" in why:
        checks.append(Check("complete", True, False, INCONCLUSIVE, why["complete"]))
    if "warmup" in why:
        checks.append(Check("warmup", 0, result["num_warmup_errors"], FAIL, why["warmup"]))
    if result["num_requests"]:
        limit, rate = guard.max_error_rate, max(result["error_rate"].values())
        text = why.get("error_rate", "no request failed")
        checks.append(Check("error_rate", limit, rate, PASS if rate <= limit else FAIL, text))
        unequal = result["num_unequal_lengths"]
        asked = "at most as many" if result["workload"].get("until_eos") else "as many"
        text = why.get("unequal_lengths", f"every answer has {asked} tokens as it was asked for")
        checks.append(Check("unequal_lengths", 0, unequal, FAIL if unequal else PASS, text))
        is_void, allowed = result["harness"]["is_void"], guard.allow_void
        text = why.get("void", "the harness kept up")
        state = PASS if allowed or not is_void else INCONCLUSIVE
        checks.append(Check("void", allowed, is_void, state, text))
        checks += [*_speed(result, guard), *_agreement(result, guard), *_accuracy(result, guard)]
    states = {check.name: check.verdict for check in checks}
    verdict = FAIL if FAIL in states.values() else PASS
    if INCONCLUSIVE in (states.get("complete"), states.get("void")) or (
        verdict == PASS and INCONCLUSIVE in states.values()
    ):
        verdict = INCONCLUSIVE
    return {
        "verdict": verdict,
        "has_guard": guard.is_set,
        "checks": [asdict(check) for check in checks],
    }


def unsound(result: Mapping[str, Any]) -> dict[str, str]:
    """What makes the figures mean less, by the name of its check, the most serious first."""
    found = {}
    num_requests, num_warmup_errors = result["num_requests"], result["num_warmup_errors"]
    classes = ", ".join(
        f"{variant} {error} x{number}"
        for variant, errors in result["errors"].items()
        for error, number in errors.items()
    )
    if not result["is_complete"]:
        found["complete"] = (
            f"the run was stopped: {result['num_block_pairs']} of {result['num_planned_pairs']} "
            "block pairs were measured; run it again"
        )
    if num_requests and result["harness"]["is_void"]:
        found["void"] = result["harness"]["why"]
    if not num_requests and (num_warmup_errors or not found):
        found["warmup"] = (
            f"the warm-up failed, so nothing was measured: {classes or 'another candidate'}; see "
            "the server's log"
        )
    elif num_warmup_errors:
        found["warmup"] = (
            f"{num_warmup_errors} warm-up requests failed, so their launches of the servers were "
            f"not measured, and {result['num_launches']} were; all failures: {classes}; see the "
            "server's log"
        )
    if result["num_errors"]:
        found["error_rate"] = (
            f"{result['num_errors']} of {num_requests} requests failed: {classes}; they count as "
            "slower than any answered one, so a percentile among them reads “failed”; see the "
            "server's log, or send fewer at once"
        )
    if result["num_unequal_lengths"]:
        found["unequal_lengths"] = (
            f"{result['num_unequal_lengths']} of {num_requests} responses do not have as many "
            "tokens as they were asked for, so the variants did unequal work; lower "
            "--output-tokens, make the server honour ignore_eos, or give --until-eos"
        )
    return found


def _speed(result: Mapping[str, Any], guard: Guard) -> Iterator[Check]:
    for limit in guard.speed_limits:
        speedup = result["speedups"].get(limit.metric, {})
        ends = [speedup.get(key) for key in ("ratio", "low", "high")]
        if None in ends:
            why = _unknown(limit.metric, result)
            yield Check(limit.name, limit.limit, None, INCONCLUSIVE, why)
            continue
        ratio, low, high = ends
        check = limit.check(ratio, low, high)
        if check.verdict == INCONCLUSIVE:
            check = _with(check, _how_many_more(result, ratio, low, high, limit.least))
        yield check


def _with(check: Check, remedy: str) -> Check:
    return replace(check, why=f"{check.why}; {remedy}")


def is_open(result: Mapping[str, Any]) -> bool:
    """Whether more block pairs may change a verdict: a speed limit is open, and none has failed."""
    checks = {check["name"]: check["verdict"] for check in result["checks"]}
    is_decidable = {
        f"{kind}.{metric}": speedup["ratio"] is not None
        for kind in ("min_speedup", "max_slowdown")
        for metric, speedup in result["speedups"].items()
    }
    return FAIL not in checks.values() and any(
        verdict == INCONCLUSIVE and is_decidable.get(name, False)
        for name, verdict in checks.items()
    )


def _how_many_more(
    result: Mapping[str, Any], ratio: float, low: float, high: float, limit: float
) -> str:
    """How much more to measure until the interval leaves the limit: it shrinks as 1 / sqrt(n)."""
    if result["num_launches"] > 1:
        num, what = result["num_launches"], "launches"
    else:
        num, what = result["num_block_pairs"], "block pairs"
    if not low:
        return f"more {what} may settle it"
    reach, distance = math.log(high / low) / 2, abs(math.log(ratio / limit))
    if distance * math.sqrt(MOST_MORE) < reach:
        return (
            f"the ratio is so close to the limit that {MOST_MORE} times as many {what} may not do"
        )
    needed = math.ceil(num * (reach / distance) ** 2)
    return f"about {max(needed - num, 1)} more {what} would settle it"


def _agreement(result: Mapping[str, Any], guard: Guard) -> Iterator[Check]:
    limit, quality = guard.min_token_agreement, result["quality"]
    agreement = quality and quality["token_agreement"]
    if limit is None:
        return
    why = ""
    if agreement is None:
        why = "quality was not measured; give --quality-prompts"
    elif quality["num_scored"] < MIN_ANSWERS:
        why = "one prompt gives no interval; give more --quality-prompts"
    if why:
        yield Check("min_token_agreement", limit, None, INCONCLUSIVE, why)
        return
    mean, low, high = (agreement[key] for key in ("mean", "low", "high"))
    check = agreement_check(limit, mean, low, high, quality["num_scored"])
    if check.verdict == INCONCLUSIVE:
        check = _with(check, "more --quality-prompts would settle it")
    yield check


def _accuracy(result: Mapping[str, Any], guard: Guard) -> Iterator[Check]:
    limit, choices = guard.max_accuracy_loss, result.get("choices")
    loss, verdict = None, INCONCLUSIVE
    if limit is None:
        return
    if not choices:
        why = "accuracy was not measured; give --choices"
    elif choices["acc_norm_difference"]["num_questions"] < MIN_ANSWERS:
        why = "one question gives no interval; give a file with more, or raise --choices-limit"
    else:
        difference = choices["acc_norm_difference"]
        mean, low, high = (difference[key] for key in ("mean", "low", "high"))
        loss = 0 - low  # never -0
        verdict = PASS if loss <= limit else FAIL if -high > limit else INCONCLUSIVE
        why = (
            f"acc_norm, candidate - baseline {mean:+.4f} ({low:+.4f} to {high:+.4f}) over "
            f"{difference['num_questions']} questions: its lower end must reach {0 - limit:g}"
        )
        if verdict == INCONCLUSIVE:
            why += "; more questions would settle it"
    yield Check("max_accuracy_loss", limit, loss, verdict, why)


def _unknown(metric: str, result: Mapping[str, Any]) -> str:
    if metric == "goodput" and not result["slo"]:
        return "goodput was not measured; give --slo-ttft-ms or --slo-tpot-ms"
    if result["speedups"].get(metric, {}).get("ratio"):
        if result["until"]:
            return "has no interval in a run with --until; limit a median or throughput"
        return (
            "has no interval: too few block pairs or requests; give more --blocks, or a longer run"
        )
    return "unknown: too many requests failed"
