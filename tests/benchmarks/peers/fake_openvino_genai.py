"""openvino_genai as openvino_decode.py calls it: a token is a letter, an answer so many of them."""

import sys
from types import SimpleNamespace
from typing import Any


class StreamingStatus:
    RUNNING = 0


class StreamerBase:
    pass


class GenerationConfig:
    max_new_tokens = 0


class LLMPipeline:
    def __init__(self, path: str, device: str, **properties: Any) -> None:
        print(f"made: {device} {properties}", file=sys.stderr, flush=True)

    def get_tokenizer(self) -> SimpleNamespace:
        return SimpleNamespace(encode=_encode)

    def generate(self, prompts: Any, config: Any, streamer: Any = None) -> Any:
        print(f"asked: {prompts!r} {sorted(vars(config).items())}", file=sys.stderr, flush=True)
        if streamer is not None:
            streamer.write([0])  # as the library does, which also writes several together
            for token in range(1, config.max_new_tokens - ("short" in prompts)):
                streamer.write(token)
        num_tokens = len(prompts) * config.max_new_tokens
        metrics = SimpleNamespace(get_num_generated_tokens=lambda: num_tokens)
        return SimpleNamespace(perf_metrics=metrics)


def _encode(prompt: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=SimpleNamespace(shape=[1, len(prompt)]))
