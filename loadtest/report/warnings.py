"""A result -> what a reader must know before any figure, since figures can mislead.

A run that was stopped, a void run, failed requests, unequal lengths, more requests than are
carried, too few block pairs, drift.
"""

from loadtest.judge.statistics import MIN_BLOCK_PAIRS
from loadtest.judge.verdict import unsound
from loadtest.report.words import NAMES, Result

MAX_DRIFT = 0.10
MAX_GROWTH = 2.0
MIN_TPOT_S = 1e-4  # no server writes 10,000 tokens a second to one client


def warnings(result: Result) -> list[str]:
    """The warnings of a result, the most serious first."""
    starts = {"complete": "INCOMPLETE: ", "void": "VOID: the harness did not keep up: "}
    found = [starts.get(name, "") + why for name, why in unsound(result).items()]
    if not result["num_requests"]:
        return found
    behind = [
        f"{variant} {growth:.1f}x"
        for variant, growth in (result["ttft_growth"] or {}).items()
        if growth is not None and growth > MAX_GROWTH
    ]
    if behind:
        found.append(
            "The load exceeds what the server can carry: TTFT in the last quarter of the blocks, "
            f"over the first quarter, is {', '.join(behind)}. Such times measure a queue that "
            "grows until the block ends; lower --rate."
        )
    at_once = [
        variant
        for variant, tpot in result["tpot_s"].items()
        if tpot["median"] is not None and tpot["median"] < MIN_TPOT_S
    ]
    if at_once:
        found.append(
            f"The tokens of {' and '.join(at_once)} arrive all at once, so TPOT and TTFT say "
            "nothing about the server: something between server and client buffers the stream."
        )
    has_tokens = any(result["output_tokens_per_request"].values())
    if has_tokens and result["prompt_tokens_per_request"] is None:
        found.append(
            "The answers carry no `usage`, so each piece of a stream counts as a token; a server "
            "that sends several in one seems slower per token."
        )
    served = result["served"].get(result["candidate"], {})
    is_dense = served.get("num_sparse_layers") == "0" and not served.get("draft")
    if not result["is_aa"] and is_dense:
        found.append(f"{result['candidate']} has no sparse layers: this compares dense with dense.")
    if result["num_block_pairs"] < MIN_BLOCK_PAIRS:
        found.append(
            f"{result['num_block_pairs']} block pairs are too few for an interval; give --blocks "
            f"{MIN_BLOCK_PAIRS} or more, and at least 8 for a reliable one."
        )
    drifts = [
        f"{variant} {NAMES[metric]} {drift['second_half_over_first']:.2f}x"
        for metric, variants in result["drift"].items()
        for variant, drift in variants.items()
        if abs((drift["second_half_over_first"] or 1) - 1) > MAX_DRIFT
    ]
    if drifts:
        found.append(
            "The run drifted: the second half of the blocks, over the first half, is "
            f"{', '.join(drifts)}. Pairing cancels this in the ratios, not in the milliseconds."
        )
    return found
