"""A second model's directory -> vLLM's speculative decoding with it, and how well it predicts.

The draft proposes some tokens, one after another. The served model checks them in one pass and
keeps those that it would have written itself, so its distribution is unchanged (Leviathan et al.,
2023, https://arxiv.org/abs/2211.17192). All of that is vLLM's; here it is asked for.
"""

import argparse
import math
from pathlib import Path

from cast_serve.checkpoint.record import read_json
from cast_serve.engine.claims import METHOD
from cast_serve.errors import UsageError

NUM_TOKENS = 3
# More at once keep the cores busy without proposals to check (benchmarks/log.md, "Drafts").
CPU_MAX_REQUESTS = 4
OF_VLLM = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
PROPOSED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


def check_vocabularies(model: Path, draft: Path) -> None:
    """Refuses a draft that vLLM would refuse once both models are loaded.

    Raises:
        UsageError: if config.json of both names a vocabulary, and their sizes differ.
    """
    of_model, of_draft = _vocabulary_size(model), _vocabulary_size(draft)
    if None not in (of_model, of_draft) and of_model != of_draft:
        raise UsageError(
            f"--draft {draft} has a vocabulary of {of_draft} tokens, but {model} has {of_model}; "
            "name a draft that was made from the same model"
        )


def speculate(
    args: argparse.Namespace,
    draft: Path,
    num_tokens: int,
    max_requests: int | None,
    has_zeros: bool,
) -> None:
    """Has vLLM's server decode with the draft.

    Args:
        args: of vLLM's server; changed in place.
        draft: a directory that can be served.
        num_tokens: that it proposes at once.
        max_requests: at a time up to which it proposes; None: however many there are.
        has_zeros: whether its sparse weights are stored with their zeros, which config.json does
            not tell vLLM.

    Raises:
        UsageError: if the user's flags configure speculative decoding too.
    """
    given = [f"--{name.replace('_', '-')}" for name in OF_VLLM if getattr(args, name) is not None]
    if given:
        raise UsageError(
            f"{given[0]} and --draft {draft} both configure speculative decoding; leave one out"
        )
    args.speculative_config = {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": num_tokens,
        **({"quantization": METHOD} if has_zeros else {}),
    }
    if max_requests is not None:  # the last entry holds for all above it too
        args.speculative_config["num_speculative_tokens_per_batch_size"] = [
            [1, max_requests, num_tokens],
            [max_requests + 1, max_requests + 1, 0],
        ]


def publish_acceptance(name: str) -> None:
    """Shows, in this process's /metrics, the share of the proposed tokens that were accepted.

    It counts from the start, out of vLLM's own counters, and is NaN before the first proposal.

    Args:
        name: of the variant.
    """
    from prometheus_client import REGISTRY, Gauge

    def ratio() -> float:
        sums = dict.fromkeys((PROPOSED, ACCEPTED), 0.0)
        for family in REGISTRY.restricted_registry(sums).collect():
            for sample in family.samples:
                sums[sample.name] += sample.value
        return sums[ACCEPTED] / sums[PROPOSED] if sums[PROPOSED] else math.nan

    text = "Draft tokens accepted, of those proposed since the start"
    gauge = Gauge("cast_draft_acceptance_ratio", text, ["variant"], registry=REGISTRY)
    gauge.labels(name).set_function(ratio)


def _vocabulary_size(model: Path) -> int | None:
    """As vLLM reads it; None if config.json leaves it to the architecture's default."""
    config = read_json(model / "config.json")
    text = config.get("text_config")  # of a model that also sees or hears
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    return size if isinstance(size, int) else None
