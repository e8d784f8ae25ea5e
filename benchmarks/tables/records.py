"""A record on disk -> its values; two perplexity records -> the difference of each block's loss."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """A record that is one JSON object.

    Raises:
        ValueError: if it cannot be read or is not one.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"record {path} cannot be read: {error}") from error


def value(path: Path, key: str) -> Any:
    """What a record holds at a dotted key, such as speedups.tpot_p50.ratio.

    Raises:
        ValueError: if the record cannot be read or has nothing there.
    """
    found: Any = read(path)
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"record {path} has no {key!r}: {name!r} is missing")
        found = found[name]
    return found


def losses_above(path: Path, other: Path) -> list[float]:
    """Each block's loss above the other model's: `cast-train eval --losses` of both, one text.

    The other record may go on where the first one ends.

    Raises:
        ValueError: if a record cannot be read, or they do not begin with the same blocks.
    """
    ours, theirs = read(path), read(other)
    texts = [[Path(text).name for text in value(each, "text")] for each in (path, other)]
    num_blocks = len(ours["losses"])
    if texts[0] != texts[1] or len(theirs["losses"]) < num_blocks:
        raise ValueError(f"{path} and {other} are of different texts")
    pairs = zip(ours["losses"], theirs["losses"][:num_blocks], strict=True)
    return [own - of_other for own, of_other in pairs]


def above_first(study: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """`cast-train study`'s result.json -> nats of each trained way above the first one.

    Returns:
        Mean over seeds and its standard error, paired by seed; the first way has 0 and 0.
    """
    logs: dict[str, dict[int, float]] = {}
    for row in study["runs"]:
        if row["seed"] is not None:
            logs.setdefault(row["way"], {})[row["seed"]] = math.log(row["perplexity"])
    first = next(iter(logs.values()))
    differences = {
        way: [found[seed] - first[seed] for seed in first] for way, found in logs.items()
    }
    return {
        way: (statistics.fmean(above), statistics.stdev(above) / math.sqrt(len(above)))
        for way, above in differences.items()
    }
