"""A recorded ramp -> the rate up to which each variant keeps up.

While a server keeps up, TTFT does not depend on the rate. Once it does not, requests queue and TTFT
grows until the ramp ends. So the requests of all blocks, in the order of their place in
the block, are cut into ten parts; a variant is *saturated* from the part on from which every median
TTFT is above one and a half times that of the first part. A failed request counts as longer than
any answered one. Where all parts but the first are slow, the first may be too, and tells nothing.
"""

from typing import Any

import numpy as np

from loadtest.record import Recorded

NUM_PARTS = 10
FACTOR = 1.5
OFFSET_DIGITS = 6  # of seconds; the times of equal places differ by rounding alone


def saturation(recorded: Recorded, variant: str) -> dict[str, Any]:
    """Finds a variant's last rate before it is saturated.

    Args:
        recorded: with blocks.
        variant: one of its two.

    Returns:
        `rate_per_s`: requests a second in the part before, None if no part is known to be kept up
        with; `is_reached`: False if the variant kept up to the end, and then the rate is that of
        the last part.
    """
    blocks = recorded.blocks_of(variant)
    found = sorted(
        (
            request.intended_send_s - block.started_s,
            np.inf if request.timing is None else request.timing.ttft_s or 0.0,
        )
        for block in blocks
        for request in block.requests
    )
    parts = np.array_split(np.array(found), min(NUM_PARTS, len(found)))
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
