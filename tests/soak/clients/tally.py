"""What all clients saw + the gateway's /metrics and log -> where the two differ: findings."""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.soak.clients.oracle import Seen
from tests.soak.clients.request import CHAT, COMPARE, COMPLETIONS, VARIANTS, Ask

MAX_TOLD = 20
ROUTES = (COMPLETIONS, CHAT, COMPARE, "/tokenize", "/detokenize")
UNCOUNTED = (401, 405, 431)  # answered before the route
UNCAUGHT = re.compile(r"^(?:Traceback|.* was never (?:retrieved|awaited)|.* was destroyed)", re.M)
KEY = re.compile(r"[0-9a-f]{14}")  # of request.py
GAUGES = ("cast_requests_in_flight", "cast_requests_queued")


@dataclass
class Tally:
    """What all clients saw.

    Attributes:
        kinds: requests by what the client did.
        seen: requests that were answered, by route and the code that they ended with.
        left: requests whose client left after its answer had begun, by route.
        left_early: those whose client left before, so that the gateway may not have seen them.
        lost: when (time.monotonic) a connection was closed without an answer, and the route.
        num_plain: answers of the HTTP server itself, which no route counts.
        tokens: output tokens of whole answers, by variant.
        left_tokens: the most that those who left were counted for.
        fallbacks: answers of another variant than the one that was asked.
        untimed: those of them whose text was generated whole; their time is no variant's.
        statuses: HTTP status by X-Request-Id.
        num_hung: requests that were given up on; wrong ones too.
        num_wrong: wrong answers; `wrong` has the first.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    left_early: Counter[str] = field(default_factory=Counter)
    lost: list[tuple[float, str]] = field(default_factory=list)
    num_plain: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    left_tokens: int = 0
    fallbacks: int = 0
    untimed: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    num_hung: int = 0
    num_wrong: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        """All that were sent."""
        left = self.left.total() + self.left_early.total()
        return self.seen.total() + left + len(self.lost) + self.num_plain

    def note(self, ask: Ask, seen: Seen) -> None:
        """Counts an answer that was judged."""
        if seen.is_plain:
            self.num_plain += 1
            return
        self.statuses[ask.key] = seen.status
        self.seen[ask.route, seen.code] += 1
        self.fallbacks += seen.is_fallback
        self.untimed += seen.is_fallback and seen.output_tokens > 0
        if seen.output_tokens:
            self.tokens[seen.variant] += seen.output_tokens

    def note_wrong(self, what: str) -> None:
        """Counts a wrong answer; the first are told at once, a run may take hours."""
        self.num_wrong += 1
        if len(self.wrong) < MAX_TOLD:
            self.wrong.append(what[:600])
            print(f"soak: wrong: {what[:600]}", file=sys.stderr, flush=True)

    def note_left(self, ask: Ask, has_begun: bool) -> None:
        """Counts a client that left after its request was sent."""
        (self.left if has_begun else self.left_early)[ask.route] += 1
        self.left_tokens += ask.num_tokens * ask.num_choices


def read_metrics(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Values of an exposition by name, then by the labels' values in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def audit_metrics(tally: Tally, text: str) -> list[str]:
    """Where /metrics of a gateway that is at rest differs from what the clients saw."""
    found: list[str] = []
    metrics = read_metrics(text)

    def compare(what: str, counted: float, least: float, most: float) -> None:
        if not least <= counted <= most:
            found.append(f"{what}: counted {counted:.0f}, seen {least:.0f} to {most:.0f}")

    counted: Counter[tuple[str, int]] = Counter()  # labels in the order code, route, variant
    for (code, route, _), value in metrics["cast_requests_total"].items():
        counted[route, int(code)] += int(value)
    for route in ROUTES:
        lost = sum(place == route for _, place in tally.lost) + tally.left_early[route]
        left = tally.left[route]
        sent = sum(number for (place, _), number in tally.seen.items() if place == route) + left
        ended = sum(number for (place, _), number in counted.items() if place == route)
        compare(f"requests to {route}", ended, sent, sent + lost)
        codes = {code for place, code in (counted | tally.seen) if place == route}
        for each in sorted(codes - {499}):
            seen = tally.seen[route, each]
            compare(f"{route} {each}", counted[route, each], seen, seen + left + lost)
    slack = tally.left_tokens + 1000 * len(tally.lost)
    for variant in VARIANTS:
        tokens = metrics.get("cast_output_tokens_total", {}).get((variant,), 0)
        compare(
            f"tokens of {variant}", tokens, tally.tokens[variant], tally.tokens[variant] + slack
        )
    generated = sum(
        n for (route, code), n in tally.seen.items() if route != COMPARE and code == 200
    )
    generated -= tally.seen["/tokenize", 200] + tally.seen["/detokenize", 200]
    left = tally.left.total() + tally.left_early.total() + len(tally.lost)
    timed = sum(metrics.get("cast_e2e_request_latency_seconds_count", {}).values())
    counted_times = generated - tally.untimed
    compare("latencies", timed, counted_times, counted_times + left)
    fallbacks = sum(metrics.get("cast_fallbacks_total", {}).values())
    compare("fallbacks", fallbacks, tally.fallbacks, tally.fallbacks + left)
    shed = metrics.get("cast_requests_shed_total", {})
    full = sum(number for (_, code), number in tally.seen.items() if code == 429)
    counted_full = shed.get(("queue_full",), 0) + shed.get(("too_many_bytes",), 0)
    compare("shed, 429", counted_full, full, full + left)
    for name in GAUGES:
        if rest := {labels: value for labels, value in metrics.get(name, {}).items() if value}:
            found.append(f"{name} is not 0 at rest: {rest}")
    return found


def audit_log(tally: Tally, log: Path, metrics: str) -> list[str]:
    """Where the gateway's log differs: each request has one line, with the status that was seen,
    and on the routes that are counted as many lines as /metrics counts. Nor may there be exceptions
    that nothing caught."""
    lines: Counter[str] = Counter()
    logged: Counter[str] = Counter()
    wrong: list[str] = []
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if not line.startswith('{"method"'):
            continue
        entry = json.loads(line)
        if entry["method"] == "POST" and entry["status"] not in UNCOUNTED:
            logged[entry["path"]] += 1
        if not KEY.fullmatch(key := entry["request_id"]):
            continue  # a hostile client's, or the gateway's own
        lines[key] += 1
        seen = tally.statuses.get(key)
        if seen is not None and entry["status"] != seen:
            wrong.append(f"{key}: status {entry['status']} in the log, {seen} seen")
    wrong += [f"{key}: {number} lines in the log" for key, number in lines.items() if number > 1]
    wrong += [f"{key}: not in the log" for key in sorted(tally.statuses.keys() - lines.keys())]
    found = [f"{len(wrong)} requests are told wrongly; {'; '.join(wrong[:5])}"] if wrong else []
    uncaught = Counter(UNCAUGHT.findall(text))
    found += [f"in the log {number} times: {what}" for what, number in uncaught.items()]
    counted: Counter[str] = Counter()
    for (_, route, _), value in read_metrics(metrics).get("cast_requests_total", {}).items():
        counted[route] += int(value)
    return found + [
        f"{route}: {counted[route]} counted, {logged[route]} in the log"
        for route in ROUTES
        if counted[route] != logged[route]
    ]
