"""A TOML file of guard rails -> limits on speed, failures and agreement, and checks of them.

Every key may be left out:

    min_speedup = {tpot_p50 = 1.2, throughput = 1.1}   # baseline over candidate
    max_slowdown = {ttft_p99 = 1.1}                    # candidate over baseline
    max_error_rate = 0.01                              # of the worse variant; a canary's own
    min_token_agreement = 0.5
    max_accuracy_loss = 0.02                           # baseline - candidate
    allow_void = true                                  # judge even if the harness was too slow

A limit passes if the whole interval meets it, fails if none of it does, and else is inconclusive.
Without `max_error_rate` no request may fail.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cast_serve.errors import UsageError
from cast_serve.latency import QUANTILES, TIMES

RATES = ("throughput", "goodput")
SPEEDUPS = [*(f"{time}_{name}" for time in TIMES for name in QUANTILES), *RATES]
PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"


@dataclass(frozen=True)
class Guard:
    """What a variant must keep to; see the module for each."""

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
                if not (_is_number(limit) and 0 < limit < math.inf):
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

    @property
    def speed_limits(self) -> list["SpeedLimit"]:
        """Of `min_speedup`, then of `max_slowdown`."""
        return [
            SpeedLimit(kind, metric, limit)
            for kind in ("min_speedup", "max_slowdown")
            for metric, limit in getattr(self, kind).items()
        ]

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


@dataclass(frozen=True)
class SpeedLimit:
    """One limit on a ratio baseline over candidate, above 1 = the candidate is faster.

    Attributes:
        kind: `min_speedup` or `max_slowdown`.
        metric: one of SPEEDUPS.
        limit: as the guard has it.
    """

    kind: str
    metric: str
    limit: float

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.metric}"

    @property
    def least(self) -> float:
        """What the ratio must reach."""
        return self.limit if self.kind == "min_speedup" else 1 / self.limit

    def check(self, ratio: float, low: float, high: float) -> Check:
        """Judges a ratio by its interval."""
        verdict = verdict_of(low, high, self.least)
        if self.kind == "min_speedup":
            why = f"{ratio:.3f} ({low:.3f} to {high:.3f}): its lower end must reach {self.limit:g}"
            return Check(self.name, self.limit, low, verdict, why)
        slower, least_slow, most_slow = (1 / end if end else math.inf for end in (ratio, high, low))
        why = (
            f"slow-down {slower:.3f} ({least_slow:.3f} to {most_slow:.3f}): its upper end must not "
            f"exceed {self.limit:g}"
        )
        # 0: the percentile is among failed requests
        return Check(self.name, self.limit, most_slow if low else None, verdict, why)


def verdict_of(low: float, high: float, least: float) -> str:
    """What an interval of a value that must reach `least` says."""
    return PASS if low >= least else FAIL if high < least else INCONCLUSIVE


def agreement_check(limit: float, mean: float, low: float, high: float, num_prompts: int) -> Check:
    """Judges the share of tokens that both variants rank first by its interval."""
    why = (
        f"{mean:.3f} ({low:.3f} to {high:.3f}) over {num_prompts} prompts: its lower end must "
        f"reach {limit:g}"
    )
    return Check("min_token_agreement", limit, low, verdict_of(low, high, limit), why)
