"""Answers of a server that scores prompts, and of variants that answered questions."""

from typing import Any

GOOD = '{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}'


def echoed(
    *tokens: tuple[str, float | None], num_generated: int = 0, is_short: bool = False
) -> dict[str, Any]:
    """A completion's answer as vLLM writes it: each token's text and log likelihood.

    Args:
        is_short: one log likelihood is missing.
    """
    texts = [text for text, _ in tokens]
    offsets = [len("".join(texts[:place])) for place in range(len(texts))]
    found = {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob in tokens[is_short:]],
        "text_offset": offsets,
    }
    usage = {"prompt_tokens": len(texts) - num_generated, "completion_tokens": num_generated}
    choice = {"index": 0, "text": "".join(texts), "logprobs": found, "finish_reason": "length"}
    return {"choices": [choice], "usage": usage}


def each(rows: list[tuple[int, int, int]]) -> dict[str, Any]:
    """(right, dense's choice, sparse's choice) a question, the same in sum and per byte."""
    found = [
        {"right": right, "num_choices": 4, "by_sum": both, "by_byte": both}
        for right, dense, sparse in rows
        for both in [{"dense": dense, "sparse": sparse}]
    ]
    return {"source": "set.jsonl", "source_sha256": "0", "each": found}
