"""A gateway and one of its workers -> what the way through the gateway adds to TTFT and TPOT.

    .venv/bin/python -m benchmarks.gateway.added GATEWAY_URL WORKER_URL MODEL [--pairs 60]

The same prompt goes both ways, one after the other, in ABBA order, one
request at a time; times are those of loadtest/send/client.py. A prompt has its own number, and the
second of a pair finds the first's prefix cached: so each pair is preceded by one that warms it up.
Any two URLs can be compared so, for instance a gateway with and without shadow traffic.
"""

import argparse
import asyncio
import json
import statistics
import sys
from typing import Any

from cast_serve.provenance import origin
from loadtest.record import Request
from loadtest.send.client import Client
from loadtest.send.distribution import Distribution
from loadtest.send.workload import Workload

TIMEOUT_S = 120


async def measure(
    gateway: str, worker: str, model: str, pairs: int, prompt_words: int, output_tokens: int
) -> dict[str, Any]:
    """Medians, and the quartiles of the differences and ratios pair by pair.

    Args:
        gateway: URL of the longer way.
        worker: URL of the shorter way.
        model: the variant's name, known to both.
        pairs: 2 or more.
        prompt_words: words of a prompt.
        output_tokens: of an answer, 2 or more.

    Raises:
        ValueError: if a number is too small.
        RuntimeError: if a request fails.
    """
    if pairs < 2 or output_tokens < 2:
        raise ValueError(
            f"{pairs} pairs of {output_tokens} output tokens give no quartiles or no TPOT; "
            "ask for 2 of each or more"
        )
    begun = origin()
    workload = Workload(Distribution(str(prompt_words)))
    ttft_s: dict[str, list[float]] = {"gateway": [], "worker": []}
    tpot_s: dict[str, list[float]] = {"gateway": [], "worker": []}
    async with (
        Client(gateway, timeout_s=TIMEOUT_S) as through,
        Client(worker, timeout_s=TIMEOUT_S) as straight,
    ):
        ways = {"gateway": through, "worker": straight}
        for pair in range(pairs):
            prompt = workload.prompt(pair)
            await straight.complete(model, pair, prompt, 2)
            for way in ("gateway", "worker") if pair % 2 else ("worker", "gateway"):
                request = await ways[way].complete(model, pair, prompt, output_tokens)
                first, each = _times_s(way, request)
                ttft_s[way].append(first)
                tpot_s[way].append(each)
    added_ms = [
        1e3 * (ours - theirs)
        for ours, theirs in zip(ttft_s["gateway"], ttft_s["worker"], strict=True)
    ]
    ratios = [
        ours / theirs for ours, theirs in zip(tpot_s["gateway"], tpot_s["worker"], strict=True)
    ]
    return {
        **begun,
        "num_launches": 1,
        "pairs": pairs,
        "added_ttft_ms": statistics.median(added_ms),
        "added_ttft_ms_quartiles": statistics.quantiles(added_ms, n=4),
        "ttft_ms_p95": {
            way: 1e3 * statistics.quantiles(times, n=20, method="inclusive")[-1]
            for way, times in ttft_s.items()
        },
        "tpot_ratio": statistics.median(ratios),
        "tpot_ratio_quartiles": statistics.quantiles(ratios, n=4),
    }


def _times_s(way: str, request: Request) -> tuple[float, float]:
    """TTFT and TPOT of a request that succeeded."""
    timing = request.timing
    if timing is None or timing.ttft_s is None or timing.tpot_s is None:
        raise RuntimeError(f"a request to the {way} failed: {request.error or 'no tokens came'}")
    return timing.ttft_s, timing.tpot_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gateway")
    parser.add_argument("worker")
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    try:
        found = asyncio.run(measure(**vars(parser.parse_args())))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"benchmarks.gateway.added: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
