"""run.json's `directories` and `served` -> what each variant's model is: bits, zeros, perplexity.

`directories` is what our gateway says of the directories it serves (its /v1/comparison), `served`
what the workers report of themselves. Another server says neither, and older records lack the
first: then a cell says so.
"""

from collections.abc import Mapping
from typing import Any

from cast_serve.dtypes import DTYPE_BITS

NOT_RECORDED = "not recorded"


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A name and what baseline and candidate have of it, for each property of the models.

    What was accepted of a draft is that of the last launch.
    """
    names = ("model", "directory", "bits per weight", "zeros", "perplexity")
    variants = [result[side] for side in ("baseline", "candidate")]
    sides = [_properties(result, variant) for variant in variants]
    found = list(zip(names, *sides, strict=True))
    if accepted := result.get("draft_acceptance"):
        one, other = (f"{accepted[v]:.0%}" if v in accepted else "no draft" for v in variants)
        found.append(("draft tokens accepted", one, other))
    return found


def _properties(result: Mapping[str, Any], variant: str) -> tuple[str, str, str, str, str]:
    directory = (result["directories"] or {}).get(variant) or {}
    zeros = directory.get("zeros")
    return (
        directory.get("model") or NOT_RECORDED,
        directory.get("path") or NOT_RECORDED,
        _bits(directory, result["served"].get(variant) or {}),
        "unknown" if zeros is None else f"{zeros:.0%}",
        _perplexity(directory),
    )


def _bits(directory: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Stored for a weight of the linears: of the directory, else in the worker's memory."""
    if (bits := directory.get("bits_per_weight")) is not None:
        return f"{bits:.3g}"
    try:
        share = float(labels["weight_bytes"]) / float(labels["dense_weight_bytes"])
        return f"{share * DTYPE_BITS[labels['dtype']]:.3g}"
    except (KeyError, ValueError, ZeroDivisionError):
        return "unknown"


def _perplexity(directory: Mapping[str, Any]) -> str:
    if not directory.get("path"):
        return NOT_RECORDED
    quality = directory.get("quality")
    if not quality:
        return "not measured"
    if quality.get("perplexity") is None:
        return "infinite"
    before = f" before {directory['quantized']}" if quality.get("is_before_quantizing") else ""
    text = f"{quality['perplexity']:.4g}{before}"
    if quality.get("text") and quality.get("num_tokens"):
        text += f" ({quality['text']}, {quality['num_tokens']:,} tokens)"
    return text
