"""llama_cpp's low-level calls as loadtest/bench/llama_decode.py makes them, over a model of sums.

A prompt's tokens are its bytes. The likeliest next token is the sum of all tokens that the context
holds, modulo the vocabulary. `answer_of` tells the same without a context. What was asked is
printed on stderr.
"""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

NUM_VOCAB = 31
LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED = 0, 1
llama_token = ctypes.c_int32


def answer_of(prompt: str, output_tokens: int) -> list[int]:
    tokens = list(prompt.encode())
    for _ in range(output_tokens):
        tokens.append(sum(tokens) % NUM_VOCAB)
    return tokens[-output_tokens:]


def llama_backend_init() -> None:
    pass


def llama_model_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_context_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_model_load_from_file(path: bytes, params: Any) -> str | None:
    return None if b"broken" in path else "model"


def llama_init_from_model(model: str, params: Any) -> SimpleNamespace:
    print(f"params: {sorted(vars(params).items())}", file=sys.stderr, flush=True)
    return SimpleNamespace(tokens=[], num_batch=params.n_batch)


def llama_model_get_vocab(model: str) -> str:
    return "vocab"


def llama_vocab_n_tokens(vocab: str) -> int:
    return NUM_VOCAB


def llama_print_system_info() -> bytes:
    return b"FAKE = 1"


def llama_get_memory(context: SimpleNamespace) -> SimpleNamespace:
    return context


def llama_memory_clear(memory: SimpleNamespace, clears_data: bool) -> None:
    memory.tokens.clear()


def llama_tokenize(
    vocab: str, text: bytes, length: int, tokens: Any, most: int, special: bool, parsed: bool
) -> int:
    assert length == len(text)
    assert special
    assert parsed
    print(f"prompt: {text.decode()!r}", file=sys.stderr, flush=True)
    if length > most:
        return -length
    tokens[:length] = text
    return length


def llama_batch_get_one(tokens: Any, num_tokens: int) -> list[int]:
    return list(tokens[:num_tokens])


def llama_decode(context: SimpleNamespace, batch: list[int]) -> int:
    if not batch or len(batch) > context.num_batch:
        return -1
    print(f"batch: {len(batch)}", file=sys.stderr, flush=True)
    context.tokens += batch
    return 0


def llama_get_logits_ith(context: SimpleNamespace, index: int) -> Any:
    assert index == -1
    logits = (ctypes.c_float * NUM_VOCAB)()
    logits[sum(context.tokens) % NUM_VOCAB] = 1.0
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
