"""A loaded engine -> the same engine after its first answers, and the seconds of its full step.

vLLM leaves work for its first requests: among it, g++ compiles a function for the first one that
wants log-probabilities. On a busy machine that took longer than a gateway waits for a sign of life,
so a worker that had just said "ready" was killed. Here that work is done before "ready" is said.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


@dataclass(frozen=True)
class WarmUp:
    """What the first requests took.

    Attributes:
        first_s: seconds of the very first one, of one token.
        step_s: seconds of a full step, once warm.
        step_tokens: prompt tokens of that step.
    """

    first_s: float
    step_s: float
    step_tokens: int


async def warm_up(engine: "EngineClient") -> WarmUp:
    """Has one request of one token answered, then two that each fill a step; times the last.

    vLLM's own metrics count these three like any other: the engine client has no public way to
    leave a request out. They stand in the counters before the first scrape, so rates and increases
    do not see them.

    Args:
        engine: loaded, and asked by nobody else meanwhile.

    Raises:
        RuntimeError: if the engine does not answer one of them.
    """
    vocabulary_size = engine.model_config.get_vocab_size()
    step_tokens = min(
        engine.vllm_config.scheduler_config.max_num_batched_tokens,
        engine.model_config.max_model_len - 1,  # one is left for the answer
    )
    seconds = []
    for first_id, num_tokens in enumerate((1, step_tokens, step_tokens)):
        # The prefix cache would answer for a prompt that begins like one before.
        prompt = [(first_id + place) % vocabulary_size for place in range(num_tokens)]
        begun_s = time.perf_counter()
        try:
            await _answer(engine, prompt, f"warm-up-{first_id}")
        except Exception as error:  # whatever it is, this engine is not to be served
            cause = error.__cause__ or error
            raise RuntimeError(
                f"the engine did not answer a request of {num_tokens} prompt tokens before it was "
                f"to serve ({type(cause).__name__}: {cause}); what it logged above says why"
            ) from error
        seconds.append(time.perf_counter() - begun_s)
    return WarmUp(first_s=seconds[0], step_s=seconds[-1], step_tokens=step_tokens)


async def _answer(engine: "EngineClient", prompt: list[int], request_id: str) -> None:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    # logprobs=0: of the sampled token alone, which no --max-logprobs forbids.
    asked = SamplingParams(max_tokens=1, logprobs=0, detokenize=False)
    async for _ in engine.generate(tokens_input(prompt), asked, request_id):
        pass
