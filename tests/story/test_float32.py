"""In float32, where no rounding hides anything, sparse and dense twin agree to the last token."""

import pytest

from tests.story.conftest import NUM_TOKENS, PROMPTS, Served, complete, logits_error

pytestmark = [pytest.mark.model, pytest.mark.server]

DTYPE = "float32"
FLAGS = ("--logprobs-mode", "raw_logits")  # what `logits_error` compares


def test_logits_equal_the_dense_twins(served: Served) -> None:
    assert logits_error(served) < 1e-4


def test_greedy_output_equals_the_dense_twins(served: Served) -> None:
    for prompt in PROMPTS[::4]:  # in float32 vLLM takes seconds an answer
        dense, sparse = (
            complete(served, name, prompt, max_tokens=NUM_TOKENS) for name in ("dense", "sparse")
        )
        assert dense["text"] == sparse["text"]
