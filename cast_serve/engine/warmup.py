"""A loaded engine -> the same engine after its first answers, and the seconds of its full step.

vLLM does some work with its first requests; for one, g++ compiles a function when log-probabilities
are first asked for. On a busy machine that took longer than the gateway's hang limit, so a worker
that had just reported "ready" was killed. Here the work is done before the worker reports "ready".
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cast_serve.errors import FailedError

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


@dataclass(frozen=True)
class WarmUp:
    """Times of the first requests.

    Attributes:
        first_s: seconds of the first request, of one token.
        step_s: seconds of a full step, once warm.
        step_tokens: prompt tokens of that step.
    """

    first_s: float
    step_s: float
    step_tokens: int


async def warm_up(engine: "EngineClient") -> WarmUp:
    """Sends one request of one token, then two that each fill a step; times the last.

    vLLM's own metrics count these three like any other: the engine client has no public way to
    leave a request out. They are counted before the first scrape, so rates and increases do not
    include them.

    Args:
        engine: loaded, without other requests meanwhile.

    Raises:
        FailedError: if the engine does not answer one of them.
    """
    vocabulary_size = engine.model_config.get_vocab_size()
    step_tokens = min(
        engine.vllm_config.scheduler_config.max_num_batched_tokens,
        engine.model_config.max_model_len - 1,  # one is left for the answer
    )
    seconds = []
    for first_id, num_tokens in enumerate((1, step_tokens, step_tokens)):
        # Each prompt begins with another token, else the prefix cache would spare its computation.
        prompt = [(first_id + place) % vocabulary_size for place in range(num_tokens)]
        begun_s = time.perf_counter()
        try:
            await _answer(engine, prompt, f"warm-up-{first_id}")
        except Exception as error:  # whatever it is, this engine must not be served
            cause = error.__cause__ or error
            raise FailedError(
                f"the engine did not answer a request of {num_tokens} prompt tokens during "
                f"warm-up ({type(cause).__name__}: {cause}); its log above says why"
            ) from error
        seconds.append(time.perf_counter() - begun_s)
    return WarmUp(first_s=seconds[0], step_s=seconds[-1], step_tokens=step_tokens)


async def _answer(engine: "EngineClient", prompt: list[int], request_id: str) -> None:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    # logprobs=0: only of the sampled token, which every --max-logprobs allows.
    asked = SamplingParams(max_tokens=1, logprobs=0, detokenize=False)
    async for _ in engine.generate(tokens_input(prompt), asked, request_id):
        pass
