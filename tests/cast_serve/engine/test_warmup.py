import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from cast_serve.engine.warmup import warm_up

pytest.importorskip("vllm", reason="comes with the cpu and gpu extras")

# What vLLM's own imports warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Engine:
    """Takes what vLLM's engine client takes, and notes it."""

    def __init__(self, vocabulary_size: int, max_model_len: int, max_num_batched_tokens: int):
        self.model_config = SimpleNamespace(
            max_model_len=max_model_len, get_vocab_size=lambda: vocabulary_size
        )
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=max_num_batched_tokens)
        )
        self.prompts: list[list[int]] = []
        self.asked: list[Any] = []
        self.pauses_s = [0.0, 0.0, 0.0]

    async def generate(self, prompt: Any, asked: Any, request_id: str) -> AsyncIterator[None]:
        self.prompts.append(prompt["prompt_token_ids"])
        self.asked.append(asked)
        pause_s = self.pauses_s[len(self.prompts) - 1]
        if pause_s < 0:
            raise RuntimeError("out of memory")
        await asyncio.sleep(pause_s)
        yield None


@pytest.mark.parametrize(
    ("vocabulary_size", "max_model_len", "max_num_batched_tokens", "step_tokens"),
    [(49152, 1024, 512, 512), (49152, 16, 512, 15), (256, 1024, 512, 512)],
)
def test_two_full_steps_that_share_no_beginning(
    vocabulary_size: int, max_model_len: int, max_num_batched_tokens: int, step_tokens: int
) -> None:
    engine = Engine(vocabulary_size, max_model_len, max_num_batched_tokens)
    warmed_up = asyncio.run(warm_up(engine))
    assert warmed_up.step_tokens == step_tokens
    assert [len(prompt) for prompt in engine.prompts] == [1, step_tokens, step_tokens]
    assert len({prompt[0] for prompt in engine.prompts}) == 3
    assert {0 <= token < vocabulary_size for prompt in engine.prompts for token in prompt} == {True}
    assert {asked.max_tokens for asked in engine.asked} == {1}


def test_the_second_full_step_is_the_one_told() -> None:
    engine = Engine(100, 100, 10)
    engine.pauses_s = [0.0, 0.3, 0.1]
    assert 0.1 <= asyncio.run(warm_up(engine)).step_s < 0.3


@pytest.mark.parametrize(("place", "num_tokens"), [(0, 1), (1, 10), (2, 10)])
def test_an_engine_that_does_not_answer_is_not_served(place: int, num_tokens: int) -> None:
    engine = Engine(100, 100, 10)
    engine.pauses_s[place] = -1
    message = rf"did not answer a request of {num_tokens} prompt .*\(RuntimeError: out of memory\)"
    with pytest.raises(RuntimeError, match=message):
        asyncio.run(warm_up(engine))
