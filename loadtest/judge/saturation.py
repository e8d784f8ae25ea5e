"""A recorded open loop -> whether each variant keeps up; of a ramp, up to which rate.

While a server keeps up, TTFT does not depend on the rate. Once it does not, requests queue and TTFT
grows until the ramp ends. So the requests of all blocks, in the order of their place in
the block, are cut into ten parts; a variant is *saturated* from the part on from which every median
TTFT is above one and a half times that of the first part. A failed request counts as longer than
any answered one. Where all parts but the first are slow, the first may be too, and tells nothing.

At a rate that stays, a variant that does not keep up has a TTFT that *grows* through each block.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.record import Recorded

NUM_PARTS = 10
FACTOR = 1.5
NUM_QUARTERS = 4
OFFSET_DIGITS = 6  # of seconds; the times of equal places differ by rounding alone


def saturation(recorded: Recorded, variant: str) -> dict[str, Any]:
    """Finds a variant's last rate before it is saturated.

    Returns:
        `rate_per_s`: requests a second in the part before, None if no part is known to be kept up
        with; `is_reached`: False if the variant kept up to the end, and then the rate is that of
        the last part.
    """
    found = _sends_and_ttfts(recorded, variant)
    parts = np.array_split(found, min(NUM_PARTS, len(found)))
    medians_s = [float(np.median(part[:, 1])) for part in parts]
    if np.isinf(medians_s[0]):  # nothing was kept up with, not even at the lowest rate
        return {"rate_per_s": None, "is_reached": True}
    is_slow = [median_s > FACTOR * medians_s[0] for median_s in medians_s]
    num_kept_up = len(parts)
    while num_kept_up > 1 and is_slow[num_kept_up - 1]:
        num_kept_up -= 1
    if num_kept_up == 1 < len(parts):
        return {"rate_per_s": None, "is_reached": True}
    part = parts[num_kept_up - 1]
    # Between the places of the part, which all blocks have alike; a part may cut through one.
    num_gaps = len(np.unique(part[:, 0].round(OFFSET_DIGITS))) - 1
    width_s = float(part[-1, 0] - part[0, 0])
    return {
        "rate_per_s": num_gaps / width_s if num_gaps > 0 and width_s > 0 else None,
        "is_reached": num_kept_up < len(parts),
    }


def growth(recorded: Recorded, variant: str) -> float | None:
    """How many times as long TTFT is in the last quarter of the blocks as in the first.

    It is the ratio of the medians; None with fewer than four requests, or among failed ones.
    """
    found = _sends_and_ttfts(recorded, variant)
    if len(found) < NUM_QUARTERS:
        return None
    quarters = np.array_split(found, NUM_QUARTERS)
    first_s, last_s = (float(np.median(quarters[place][:, 1])) for place in (0, -1))
    return last_s / first_s if 0 < first_s < np.inf and last_s < np.inf else None


def _sends_and_ttfts(recorded: Recorded, variant: str) -> NDArray[np.float64]:
    """Seconds from a block's start, and TTFT, of first turns in that order, [num_turns, 2]."""
    found = sorted(
        (
            request.intended_send_s - block.started_s,
            np.inf if request.timing is None else request.timing.ttft_s or 0.0,
        )
        for block in recorded.blocks_of(variant)
        for request in block.requests
        if request.turn == 0  # later turns leave when the answer before has come
    )
    return np.array(found).reshape(-1, 2)
