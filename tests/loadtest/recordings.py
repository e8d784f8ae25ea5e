"""Figures -> recorded runs, made by hand or from a seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loadtest.record import Recorded, Recorder, Request
from loadtest.report.files import write_reports
from loadtest.report.result import result_of

PLAN = {
    "baseline": "dense",
    "candidate": "sparse",
    "concurrency": 1,
    "num_prompts": 3,
    "num_block_pairs": 2,
    "num_warmup": 0,
    "output_tokens": 3,
}
HARNESS = {
    "num_processes": 1,
    "slip_p99_s": 0.0004,
    "cpu_share": 0.12,
    "is_void": False,
    "why": None,
}


def about(**changes: Any) -> dict[str, Any]:
    """A run.json. What `plan` and `harness` name replaces single fields there."""
    plan = {**PLAN, **changes.pop("plan", {})}
    harness = {**HARNESS, **changes.pop("harness", {})}
    return {
        "format_version": 1,
        "url": "http://server",
        "date": "2026-11-25T10:00:00+00:00",
        "command": "cast-loadtest run --url http://server",
        "versions": {"cast-serve": "0.1.0"},
        "plan": plan,
        "workload": {"seed": 0, "prompt_words": 128},
        "schedule": "closed",
        "rate_per_s": None,
        "harness": harness,
        "timeout_s": 120.0,
        "served": {},
        "is_aa": False,
        "slo": None,
        "guard": {},
        "quality": None,
        **changes,
    }


def request(
    block: int | None,
    pair: int | None,
    variant: str,
    ttft_s: float | None,
    tpot_s: float = 0.25,
    *,
    sent_s: float = 0.0,
    output_tokens: int = 3,
    asked_tokens: int = 3,
    error: str = "http_503",
) -> Request:
    """An answer that came a token at a time, or an error one second after it left."""
    answered = ttft_s is not None
    events = []
    if ttft_s is not None:
        events = [sent_s + ttft_s + n * tpot_s for n in range(output_tokens)]
    return Request(
        block=block,
        block_pair=pair,
        variant=variant,
        prompt_index=0,
        error=None if answered else error,
        prompt_tokens=10 if answered else None,
        output_tokens=output_tokens if answered else None,
        intended_send_s=sent_s,
        sent_s=sent_s,
        token_events_s=tuple(events),
        last_s=events[-1] if events else None,
        ended_s=events[-1] if events else sent_s + 1.0,
        asked_tokens=asked_tokens,
    )


def recorded(requests: Iterable[Request], **changes: Any) -> Recorded:
    """A run of these requests; `changes` as in `about`."""
    return Recorded(about(**changes), tuple(requests))


def joined(launches: Sequence[Recorded], about: Mapping[str, Any]) -> Recorded:
    """The runs of several launches of the same servers, recorded as one."""
    with TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder), about)
        for run in launches:
            recorder.begin_launch()
            recorder.add(run.requests, {})
        recorder.complete({})
        return Recorded(about, Recorded.read(Path(folder)).requests)


def write_out(out: Path, run: Recorded) -> None:
    """A run's directory, as `cast-loadtest run --out` leaves it."""
    out.mkdir(parents=True)
    run.write(out)
    write_reports(out, run, result_of(run))


def two_pairs(**changes: Any) -> Recorded:
    """Pair 0: TTFT medians 4 and 2. Pair 1: 9 and 3. TPOT 0.5 and 0.25 throughout."""
    ttfts_s = (
        ("dense", 0, 3.0, 4.0, 8.0),
        ("sparse", 0, 1.0, 2.0, 3.0),
        ("sparse", 1, 3.0, 3.0, 5.0),
        ("dense", 1, 9.0, 9.0, 9.0),
    )
    found = []
    for block, (variant, pair, *block_ttfts_s) in enumerate(ttfts_s):
        tpot_s = 0.5 if variant == "dense" else 0.25
        found += [
            request(block, pair, variant, ttft_s, tpot_s, sent_s=100.0 * block)
            for ttft_s in block_ttfts_s
        ]
    return recorded(found, **changes)


def four_pairs(**changes: Any) -> Recorded:
    """The two pairs of `two_pairs` twice, which are enough for intervals."""
    pairs = two_pairs(**changes)
    twice = joined([pairs, pairs], pairs.about)
    return Recorded(twice.about, tuple(replace(each, launch=0) for each in twice.requests))


def broken_runs() -> list[Recorded]:
    """A run without blocks, one in which a variant never answered, and one that met no limit."""
    lost = [request(0, 0, "dense", 1.0), request(1, 0, "sparse", None)]
    open_loop = {"schedule": "poisson", "rate_per_s": 2.0}
    return [
        recorded([request(None, None, "dense", None)]),
        recorded(lost, **open_loop),
        two_pairs(**open_loop, slo={"ttft_s": 0.001, "tpot_s": None}),
    ]


def simulated(
    seed: int,
    *,
    speedup: float = 1.0,
    num_block_pairs: int = 20,
    num_prompts: int = 8,
    output_tokens: int = 16,
    noise: float = 0.05,
    block_noise: float = 0.02,
    drift: float = 0.2,
    **changes: Any,
) -> Recorded:
    """A closed loop at concurrency 1 on a noisy machine, candidate `speedup` times as fast.

    Every request is noisy and every block on top (both log-normal), and the machine gets slower by
    `drift` from the first block to the last.
    """
    rng = np.random.default_rng(seed)
    found, now_s = [], 0.0
    for pair in range(num_block_pairs):
        order = ("dense", "sparse") if pair % 2 == 0 else ("sparse", "dense")
        for place, variant in enumerate(order):
            block = 2 * pair + place
            block_factor = np.exp(rng.normal(0, block_noise)) * (
                1 + drift * block / (2 * num_block_pairs)
            )
            for _ in range(num_prompts):
                factor = block_factor * np.exp(rng.normal(0, noise))
                factor /= speedup if variant == "sparse" else 1
                answer = request(
                    block,
                    pair,
                    variant,
                    0.2 * factor,
                    0.05 * factor,
                    sent_s=now_s,
                    output_tokens=output_tokens,
                    asked_tokens=output_tokens,
                )
                found.append(answer)
                now_s = answer.ended_s
            now_s += 1.0
    plan = {
        "num_prompts": num_prompts,
        "num_block_pairs": num_block_pairs,
        "output_tokens": output_tokens,
    }
    return recorded(found, plan={**plan, **changes.pop("plan", {})}, **changes)
