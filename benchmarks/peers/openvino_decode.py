"""A GGUF file -> OpenVINO GenAI's answers without a server, asked by JSON lines on stdin.

Runs in the environment of openvino-genai, started by process.py; imports nothing of this project.
Greedy; OpenVINO's defaults otherwise (paged attention, 8-bit cache, activations quantised as it
sees fit).

    stdout, once the model is loaded:
        {"about": OpenVINO's version}
    stdin, a line each:
        {"prompts": [TEXT, ...], "output_tokens": NUMBER}
    stdout, a line for each:
        {"prompt_tokens": [of each], "times_s": [when each token was known, or all answers were]}

Times count from the call that is given the text. A token that would end the text does not end the
answer. What fails is a traceback on stderr and exit code 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import openvino  # type: ignore[import-not-found]  # only in the other environment
import openvino_genai  # type: ignore[import-not-found]


class Watch(openvino_genai.StreamerBase):
    """When each token was known, in seconds from `began_s`."""

    def __init__(self, began_s: float) -> None:
        super().__init__()
        self.began_s = began_s
        self.times_s: list[float] = []

    def write(self, token: Any) -> Any:
        tokens = token if isinstance(token, list) else [token]
        self.times_s += [time.perf_counter() - self.began_s] * len(tokens)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Has nothing to hand on."""


def answers(pipeline: Any, prompts: Sequence[str], output_tokens: int) -> dict[str, Any]:
    """Writes exactly so many tokens for every prompt, all prompts at once.

    Raises:
        RuntimeError: if an answer has another number of tokens.
    """
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = output_tokens
    config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
    tokenizer = pipeline.get_tokenizer()
    prompt_tokens = [int(tokenizer.encode(prompt).input_ids.shape[1]) for prompt in prompts]
    began_s = time.perf_counter()
    watch = Watch(began_s)
    if len(prompts) == 1:
        pipeline.generate(prompts[0], config, watch)
        times_s = watch.times_s
        found = len(times_s)
    else:
        result = pipeline.generate(list(prompts), config)
        times_s = [time.perf_counter() - began_s]
        found = result.perf_metrics.get_num_generated_tokens() // len(prompts)
    if found != output_tokens:
        raise RuntimeError(f"{found} tokens were written where {output_tokens} were asked for")
    return {"prompt_tokens": prompt_tokens, "times_s": times_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    pipeline = openvino_genai.LLMPipeline(args.model, "CPU", INFERENCE_NUM_THREADS=args.threads)
    print(json.dumps({"about": f"OpenVINO {openvino.get_version()}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers(pipeline, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
