"""A recorded run and its result -> the figures of report.html, as inline SVG.

The baseline is drawn dashed and hollow, the candidate solid and filled.
"""

import math
from html import escape
from typing import Any

from loadtest.judge.statistics import THROUGHPUT, values
from loadtest.record import Recorded
from loadtest.report import charts
from loadtest.report.words import NAMES, times

KINDS = ("v0", "v1")
PAIR_NAMES = {**NAMES, THROUGHPUT: "output tokens/s"}


def figure(title: str, caption: str, svg: str) -> str:
    """A chart with words around it."""
    return (
        f'<figure class="panel"><h3>{escape(title)}</h3>{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def legend(baseline: str, candidate: str) -> str:
    """Which line is whose."""
    keys = (
        f'<span class="key"><svg viewBox="0 0 28 10"><line class="series {kind}" x1="0" y1="5" '
        f'x2="28" y2="5"/></svg>{escape(name)}</span>'
        for name, kind in zip((baseline, candidate), KINDS, strict=True)
    )
    return f'<p class="muted">{"".join(keys)}</p>'


def distribution(recorded: Recorded, metric: str) -> str:
    """The share of requests that had a time, or a shorter one."""
    output_tokens = recorded.about["plan"]["output_tokens"]
    sides = []
    for variant in recorded.variants:
        requests = [r for block in recorded.blocks_of(variant) for r in block.requests]
        sides.append(values(requests, metric, output_tokens) * 1e3)
    answered = [side[side < math.inf] for side in sides]
    name = NAMES[metric]
    if not all(map(len, answered)):
        return figure(name, "A variant has no values.", "")
    x = charts.x_scale([value for side in answered for value in (side[0], side[-1])], pad=0.02)
    y = charts.y_scale((0.0, 1.0), pad=0.02)
    marks = []
    for side, known, kind in zip(sides, answered, KINDS, strict=True):
        points = [(x.low, 0.0)]
        points += [(value, (rank + 1) / len(side)) for rank, value in enumerate(known.tolist())]
        points.append((x.high, len(known) / len(side)))
        marks.append(charts.steps(charts.thinned(points), x, y, kind))
    lost = [
        f"{variant} ends at {len(known) / len(side):.1%}, the rest failed"
        for variant, side, known in zip(recorded.variants, sides, answered, strict=True)
        if len(known) < len(side)
    ]
    n = " and ".join(str(len(side)) for side in sides)
    caption = "; ".join([f"n = {n}; further left is faster", *lost]) + "."
    labels = (f"{name} (ms)", "share of requests")
    svg = charts.chart(f"{name} of both variants", x, y, *labels, marks)
    return figure(f"{name}: share of requests that were as fast", caption, svg)


def pairs(result: dict[str, Any], metric: str) -> str:
    """Each block pair's ratio, and the run's with its interval."""
    per_pair = result["ratio"][metric]["per_block_pair"]
    name = PAIR_NAMES[metric]
    speedup = result["speedups"].get("throughput" if metric == THROUGHPUT else f"{metric}_p50")
    if not per_pair or not speedup or None in speedup.values():
        return figure(name, "Too many requests failed.", "")
    ends = (charts.LEFT, charts.WIDTH - charts.RIGHT)
    x = charts.Scale(0.5, len(per_pair) + 0.5, *ends, is_whole=True)
    y = charts.y_scale([*per_pair, speedup["low"], speedup["high"], 1.0])
    points = [(n, r, f"pair {n}: {r:.3f}") for n, r in enumerate(per_pair, start=1)]
    marks = [
        charts.band(speedup["low"], speedup["high"], y),
        charts.level(1.0, y, "even"),
        charts.level(speedup["ratio"], y, "value"),
        charts.dots(points, x, y, "v1"),
    ]
    svg = charts.chart(f"{name} by block pair", x, y, "block pair", "ratio", marks)
    caption = f"Line and band: {times(speedup)} over the whole run. Dots: each pair's medians."
    if metric == THROUGHPUT:
        caption = f"Line and band: {times(speedup)} over the whole run. Dots: each pair alone."
    return figure(f"{name}: above 1, {result['candidate']} is better", caption, svg)


def drift(recorded: Recorded, result: dict[str, Any], metric: str) -> str:
    """Each block's median against when it began."""
    name, found, sides = NAMES[metric], result["drift"][metric], []
    for variant in recorded.variants:
        blocks = recorded.blocks_of(variant)
        medians = found[variant]["per_block_s"]
        sides.append(
            [
                (block.started_s, 1e3 * median, f"{variant}, pair {block.block_pair + 1}")
                for block, median in zip(blocks, medians, strict=True)
                if median is not None
            ]
        )
    everything = [point for side in sides for point in side]
    if not everything:
        return figure(name, "Too many requests failed.", "")
    x = charts.Scale(*_span(recorded), charts.LEFT, charts.WIDTH - charts.RIGHT)
    y = charts.y_scale([value for _, value, _ in everything])
    marks = []
    for side, kind in zip(sides, KINDS, strict=True):
        if side:
            marks.append(charts.line([(at, value) for at, value, _ in side], x, y, kind))
        texts = [(at, value, f"{text}: {value:.2f} ms") for at, value, text in side]
        marks.append(charts.dots(texts, x, y, kind))
    labels = ("seconds since the run's start", f"block median of {name} (ms)")
    svg = charts.chart(f"{name} over the run", x, y, *labels, marks)
    return figure(f"{name}: block after block", _drift_caption(found), svg)


def _span(recorded: Recorded) -> tuple[float, float]:
    starts = [block.started_s for block in recorded.blocks]
    room = 0.03 * (max(starts) - min(starts)) or 1.0
    return min(starts) - room, max(starts) + room


def _drift_caption(found: dict[str, Any]) -> str:
    halves = [
        f"{variant} {drift['second_half_over_first']:.3f}x"
        for variant, drift in found.items()
        if drift["second_half_over_first"] is not None
    ]
    return f"Later half of the blocks over the earlier: {', '.join(halves) or 'not known'}."


def timeline(recorded: Recorded, metric: str) -> str:
    """Each request's time against when it should have left, counted from its block's start."""
    name = NAMES[metric]
    sent = [(block, request) for block in recorded.blocks for request in block.requests]
    answered: dict[str, list[tuple[float, float, str]]] = {v: [] for v in recorded.variants}
    lost: dict[str, list[tuple[float, str]]] = {v: [] for v in recorded.variants}
    for block, request in sent:
        at = request.intended_send_s - block.started_s
        if request.timing is None:
            lost[block.variant].append((at, f"{block.variant}: {request.error}"))
        else:
            value = 1e3 * (getattr(request.timing, f"{metric}_s") or 0.0)
            answered[block.variant].append((at, value, f"{block.variant}: {value:.2f} ms"))
    if not any(answered.values()):
        return figure(name, "No request was answered.", "")
    last_s = max(request.intended_send_s - block.started_s for block, request in sent)
    room = 0.02 * last_s or 1.0
    x = charts.Scale(-room, last_s + room, charts.LEFT, charts.WIDTH - charts.RIGHT)
    y = charts.y_scale([value for side in answered.values() for _, value, _ in side])
    marks, num_drawn = [], 0
    for variant, kind in zip(recorded.variants, KINDS, strict=True):
        found = charts.thinned(sorted(answered[variant]))
        failed = charts.thinned(sorted(lost[variant]))
        marks += [charts.dots(found, x, y, kind), charts.crosses(failed, x, charts.TOP, kind)]
        num_drawn += len(found) + len(failed)
    labels = ("intended send, seconds from the block's start", f"{name} (ms)")
    svg = charts.chart(f"{name} against time", x, y, *labels, marks)
    caption = f"{num_drawn} of {len(sent)} requests, all blocks laid over each other."
    if any(lost.values()):
        caption += " Crosses at the top failed."
    return figure(f"{name} against the time in the block", caption, svg)
