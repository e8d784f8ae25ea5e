"""A result and guard rails -> pass, fail or inconclusive, check by check, each with the reason.

Guard rails come from a TOML file; every key may be left out:

    min_speedup = {tpot_p50 = 1.2, throughput = 1.1}
    max_slowdown = {ttft_p99 = 1.1}                    # candidate over baseline
    max_error_rate = 0.01                              # of the worse variant
    min_token_agreement = 0.5
    max_accuracy_loss = 0.02                           # baseline - candidate
    allow_void = true                                  # judge even if the harness was too slow

A limit passes if the whole interval meets it, fails if none of it does, and else is inconclusive,
as is a limit on what was not measured, or on one answer only. A run passes if every check does, and
fails if one does. A void run and one that was stopped are inconclusive, whatever else they show.

Without a file, and for keys that it does not set, no request may fail. Answers of unequal length
always fail: they compare unequal work. So does a launch of the servers whose warm-up failed.
"""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loadtest.errors import UsageError
from loadtest.judge.statistics import QUANTILES, TIMES

SPEEDUPS = [f"{time}_{name}" for time in TIMES for name in QUANTILES] + ["throughput", "goodput"]
MIN_ANSWERS = 2  # prompts or questions: one has no interval
PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
MOST_MORE = 50  # times as many: nobody waits for more


@dataclass(frozen=True)
class Guard:
    """What a run must keep to; see the module for each."""

    min_speedup: Mapping[str, float] = field(default_factory=dict)
    max_slowdown: Mapping[str, float] = field(default_factory=dict)
    max_error_rate: float = 0.0
    min_token_agreement: float | None = None
    max_accuracy_loss: float | None = None
    allow_void: bool = False

    @classmethod
    def read(cls, path: Path) -> "Guard":
        """Reads a TOML file.

        Raises:
            UsageError: if it cannot be read, a key is unknown or a value is out of range.
        """
        try:
            return cls.of(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, UsageError) as error:
            raise UsageError(f"guard {path}: {error}") from error

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Guard":
        """Checks keys and values as TOML or JSON gives them.

        Raises:
            UsageError: if a key is unknown or a value is out of range.
        """
        known = [each.name for each in fields(cls)]
        if unknown := sorted(given.keys() - set(known)):
            raise UsageError(f"unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
        for name in ("min_speedup", "max_slowdown"):
            limits = given.get(name, {})
            if not isinstance(limits, Mapping):
                raise UsageError(f"{name} is {limits!r}; write, for example, {{tpot_p50 = 1.1}}")
            for metric, limit in limits.items():
                if metric not in SPEEDUPS:
                    raise UsageError(
                        f"{name} has unknown key {metric!r}; known keys: {', '.join(SPEEDUPS)}"
                    )
                if not _is_number(limit) or limit <= 0:
                    raise UsageError(f"{name}.{metric} is {limit!r}; give a number above 0")
        for name in ("max_error_rate", "min_token_agreement", "max_accuracy_loss"):
            share = given.get(name)
            if share is not None and not (_is_number(share) and 0 <= share <= 1):
                raise UsageError(f"{name} is {share!r}; give a number from 0 to 1")
        if not isinstance(given.get("allow_void", False), bool):
            raise UsageError(f"allow_void is {given['allow_void']!r}; give true or false")
        return cls(**given)

    @property
    def is_set(self) -> bool:
        """Whether it limits speed or quality; without, a sound run has passed nothing."""
        limits = (self.min_token_agreement, self.max_accuracy_loss)
        return bool(self.min_speedup or self.max_slowdown) or limits != (None, None)

    def about(self) -> dict[str, Any]:
        """As run.json has it; `of` reads it again."""
        return asdict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Check:
    """One condition: its limit, what was found, PASS, FAIL or INCONCLUSIVE, and why."""

    name: str
    limit: float | bool
    found: float | bool | None
    verdict: str
    why: str


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
            f"the warm-up failed, so nothing was measured: {classes}; see the server's log"
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
    for kind, limits in (("min_speedup", guard.min_speedup), ("max_slowdown", guard.max_slowdown)):
        for metric, limit in limits.items():
            speedup = result["speedups"].get(metric, {})
            ends = [speedup.get(key) for key in ("ratio", "low", "high")]
            if None in ends:
                why = _unknown(metric, result)
                yield Check(f"{kind}.{metric}", limit, None, INCONCLUSIVE, why)
                continue
            ratio, low, high = ends
            least = limit if kind == "min_speedup" else 1 / limit
            verdict = PASS if low >= least else FAIL if high < least else INCONCLUSIVE
            if kind == "min_speedup":
                found = low
                why = f"{ratio:.3f} ({low:.3f} to {high:.3f}): its lower end must reach {limit:g}"
            else:
                found = 1 / low if low else None  # 0: the percentile is among failed requests
                slower, least_slow, most_slow = (1 / end if end else math.inf for end in ends)
                why = (
                    f"candidate over baseline {slower:.3f} ({most_slow:.3f} to {least_slow:.3f}): "
                    f"its upper end must not exceed {limit:g}"
                )
            if verdict == INCONCLUSIVE:
                why += f"; {_how_many_more(result, ratio, low, high, least)}"
            yield Check(f"{kind}.{metric}", limit, found, verdict, why)


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
    found, verdict = None, INCONCLUSIVE
    if limit is None:
        return
    if agreement is None:
        why = "quality was not measured; give --quality-prompts"
    elif quality["num_scored"] < MIN_ANSWERS:
        why = "one prompt gives no interval; give more --quality-prompts"
    else:
        mean, found, high = (agreement[key] for key in ("mean", "low", "high"))
        verdict = PASS if found >= limit else FAIL if high < limit else INCONCLUSIVE
        why = (
            f"{mean:.3f} ({found:.3f} to {high:.3f}) over {quality['num_scored']} prompts: its "
            f"lower end must reach {limit:g}"
        )
        if verdict == INCONCLUSIVE:
            why += "; more --quality-prompts would settle it"
    yield Check("min_token_agreement", limit, found, verdict, why)


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
